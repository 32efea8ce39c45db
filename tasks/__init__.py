"""Problems with data: where bilevel methods are compared, tested and shown.

Toy problems with closed-form hypergradients (:class:`Quadratic`, :class:`Ridge`); few-shot learning
(:class:`Sinusoid`, :class:`Omniglot`, :class:`CIFARFS`, :class:`FC100`, :class:`MiniImageNet`,
:class:`TieredImageNet`, :class:`Caltech101`, :func:`sample_episodes`); wrong labels (:class:`HyperCleaning` on
:class:`MNIST`); learning what and where to transfer (:class:`MetaTransfer`); networks (:class:`MLP`, :class:`Conv4`,
:class:`ResNet12`, and in stages :class:`ResidualStages`, :class:`PlainStages`). ``functional`` is
:func:`diffopt.functional`.
"""

from __future__ import annotations

from diffopt.functional import functional
from diffopt.tasks.caltech101 import Caltech101
from diffopt.tasks.cifar100 import CIFARFS, FC100
from diffopt.tasks.classification import ClassificationSet
from diffopt.tasks.data import data_folder
from diffopt.tasks.episodes import Episodes, sample_episodes
from diffopt.tasks.errors import DataError, ProblemError
from diffopt.tasks.hyper_cleaning import HyperCleaning
from diffopt.tasks.layers import BatchStatisticsNorm2d
from diffopt.tasks.meta_transfer import MetaTransfer
from diffopt.tasks.mini_imagenet import MiniImageNet
from diffopt.tasks.mnist import MNIST
from diffopt.tasks.models import MLP, Conv4
from diffopt.tasks.omniglot import Omniglot
from diffopt.tasks.quadratic import Quadratic, QuadraticHypergradient
from diffopt.tasks.ragged import RaggedImages
from diffopt.tasks.residual import PlainStages, ResidualStages, ResNet12, Staged
from diffopt.tasks.ridge import Ridge
from diffopt.tasks.sinusoid import Sinusoid
from diffopt.tasks.tiered_imagenet import TieredImageNet

__all__ = [
    "CIFARFS",
    "FC100",
    "MLP",
    "MNIST",
    "BatchStatisticsNorm2d",
    "Caltech101",
    "ClassificationSet",
    "Conv4",
    "DataError",
    "Episodes",
    "HyperCleaning",
    "MetaTransfer",
    "MiniImageNet",
    "Omniglot",
    "PlainStages",
    "ProblemError",
    "Quadratic",
    "QuadraticHypergradient",
    "RaggedImages",
    "ResNet12",
    "ResidualStages",
    "Ridge",
    "Sinusoid",
    "Staged",
    "TieredImageNet",
    "data_folder",
    "functional",
    "sample_episodes",
]
