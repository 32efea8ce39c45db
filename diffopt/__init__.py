"""Bilevel optimisation and gradient-based meta-learning: exact and approximate hypergradients for PyTorch."""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from diffopt.attribution import attribute
from diffopt.batches import Batches
from diffopt.checking.check import check
from diffopt.citation import cite
from diffopt.comparing.compare import compare
from diffopt.comparing.comparison import Comparison
from diffopt.datamodeling import datamodeling_score
from diffopt.errors import *  # noqa: F403  (each is importable from here too; __all__ lists their base)
from diffopt.errors import DiffoptError
from diffopt.functional import functional
from diffopt.implicit import ImplicitGradients, implicit, implicit_gradients
from diffopt.lifting.from_torch import from_torch
from diffopt.lifting.from_torchopt import from_torchopt
from diffopt.mean_over_tasks import mean_over_tasks
from diffopt.optimizers import EMA, SGD, Adagrad, Adam, AdamW, Clip, Groups, Lookahead, Muon, Proximal, RMSprop
from diffopt.optimizers.base import Optimizer, Schedule
from diffopt.optimizers.preconditioned import Preconditioned
from diffopt.optimizers.proximal import ProximalGD
from diffopt.outer_program import compiled
from diffopt.reports import Finding, Report
from diffopt.retraining.score import DatamodelingScore
from diffopt.solve import Kept, Solution, solve
from diffopt.state import State, state_of
from diffopt.tensors.leaves import Leaves
from diffopt.vector_field import VectorField, fixed_point, game
from diffopt.warm_starts import WarmStarts

if TYPE_CHECKING:
    from types import ModuleType

    from diffopt import distributed as distributed
    from diffopt import errors as errors
    from diffopt import estimators as estimators
    from diffopt import linear_solve as linear_solve
    from diffopt import nn as nn
    from diffopt import prox as prox
    from diffopt import tasks as tasks
    from diffopt import testing as testing

__version__ = "0.1.0"

_AT_HAND = frozenset({"distributed", "errors", "estimators", "linear_solve", "nn", "prox", "tasks", "testing"})
"""Subpackages that are there after ``import diffopt`` too, and imported when they are first asked for."""
_MOVED = {"optimizer": "optimizers.base"}
"""Where the documentation of 0.1 names a module that is elsewhere now."""


def __getattr__(name: str) -> ModuleType:
    if name in _AT_HAND or name in _MOVED:
        return _import_module(f"diffopt.{_MOVED.get(name, name)}")
    raise AttributeError(f"module 'diffopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What a program writes after ``diffopt.``, without the modules of the inside and the single errors."""
    return sorted({*__all__, *_AT_HAND, *(name for name in globals() if name.startswith("__"))})


__all__ = [
    "EMA",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Batches",
    "Clip",
    "Comparison",
    "DatamodelingScore",
    "DiffoptError",
    "Finding",
    "Groups",
    "ImplicitGradients",
    "Kept",
    "Leaves",
    "Lookahead",
    "Muon",
    "Optimizer",
    "Preconditioned",
    "Proximal",
    "ProximalGD",
    "RMSprop",
    "Report",
    "Schedule",
    "Solution",
    "State",
    "VectorField",
    "WarmStarts",
    "attribute",
    "check",
    "cite",
    "compare",
    "compiled",
    "datamodeling_score",
    "fixed_point",
    "from_torch",
    "from_torchopt",
    "functional",
    "game",
    "implicit",
    "implicit_gradients",
    "mean_over_tasks",
    "solve",
    "state_of",
]
