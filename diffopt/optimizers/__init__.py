"""Inner optimizers as pure update rules, one a file, with the semantics of ``torch.optim``."""

from diffopt.optimizers.adagrad import Adagrad
from diffopt.optimizers.adam import Adam, AdamW
from diffopt.optimizers.base import EACH, PREFIX, TREE, Buffers, Hyperparameter, Optimizer, Schedule
from diffopt.optimizers.preconditioned import Preconditioned
from diffopt.optimizers.proximal import ProximalGD
from diffopt.optimizers.rmsprop import RMSprop
from diffopt.optimizers.sgd import SGD

__all__ = [
    "EACH",
    "PREFIX",
    "SGD",
    "TREE",
    "Adagrad",
    "Adam",
    "AdamW",
    "Buffers",
    "Hyperparameter",
    "Optimizer",
    "Preconditioned",
    "ProximalGD",
    "RMSprop",
    "Schedule",
]
