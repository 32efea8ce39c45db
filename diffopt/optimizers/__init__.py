"""Inner optimizers as pure update rules, one a file, with the semantics of ``torch.optim``."""

from diffopt.optimizers.adagrad import Adagrad
from diffopt.optimizers.adam import Adam, AdamW
from diffopt.optimizers.averaging import EMA, Lookahead
from diffopt.optimizers.base import EACH, OPTION, PREFIX, TREE, Buffers, Hyperparameter, Optimizer, Schedule
from diffopt.optimizers.clip import Clip
from diffopt.optimizers.groups import Groups
from diffopt.optimizers.muon import Muon
from diffopt.optimizers.preconditioned import Preconditioned
from diffopt.optimizers.prox import Proximal
from diffopt.optimizers.proximal import ProximalGD
from diffopt.optimizers.rmsprop import RMSprop
from diffopt.optimizers.sgd import SGD

__all__ = [
    "EACH",
    "EMA",
    "OPTION",
    "PREFIX",
    "SGD",
    "TREE",
    "Adagrad",
    "Adam",
    "AdamW",
    "Buffers",
    "Clip",
    "Groups",
    "Hyperparameter",
    "Lookahead",
    "Muon",
    "Optimizer",
    "Preconditioned",
    "Proximal",
    "ProximalGD",
    "RMSprop",
    "Schedule",
]
