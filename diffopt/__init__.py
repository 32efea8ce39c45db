"""Bilevel optimisation and gradient-based meta-learning: exact and approximate hypergradients for PyTorch."""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from diffopt.checking.check import check
from diffopt.citation import cite
from diffopt.comparing.compare import compare
from diffopt.comparing.comparison import Comparison
from diffopt.errors import (
    BatchesError,
    CapturedTensorError,
    CompileWarning,
    ConformanceError,
    DeviceError,
    DiffoptError,
    DisconnectedError,
    DivergenceError,
    DtypeError,
    EstimateWarning,
    EstimatorError,
    GradModeError,
    HiddenStateError,
    HyperparameterError,
    InPlaceError,
    LeafError,
    LiftError,
    LinearSolveError,
    LossError,
    MissingDerivativeError,
    NonFiniteGradientError,
    NonFiniteLossError,
    OptimizerError,
    PrecisionWarning,
    RandomnessError,
    RecomputationError,
    SecondDerivativeError,
    ShapeError,
    StationarityError,
    StepsError,
    StructureError,
    VmapError,
    WrongDerivativeError,
)
from diffopt.implicit import ImplicitGradients, implicit, implicit_gradients
from diffopt.lifting.from_torch import from_torch
from diffopt.lifting.from_torchopt import from_torchopt
from diffopt.mean_over_tasks import mean_over_tasks
from diffopt.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop
from diffopt.optimizers.base import Optimizer, Schedule
from diffopt.optimizers.preconditioned import Preconditioned
from diffopt.optimizers.proximal import ProximalGD
from diffopt.reports import Finding, Report
from diffopt.solve import Kept, Solution, State, solve
from diffopt.tensors.leaves import Leaves

if TYPE_CHECKING:
    from types import ModuleType

    from diffopt import errors as errors
    from diffopt import estimators as estimators
    from diffopt import linear_solve as linear_solve
    from diffopt import tasks as tasks
    from diffopt import testing as testing

__version__ = "0.1.0"

_LATER = frozenset({"estimators", "tasks", "testing"})
"""Subpackages that are there after ``import diffopt`` too, and imported when they are first asked for."""


def __getattr__(name: str) -> ModuleType:
    if name in _LATER:
        return _import_module(f"diffopt.{name}")
    raise AttributeError(f"module 'diffopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BatchesError",
    "CapturedTensorError",
    "Comparison",
    "CompileWarning",
    "ConformanceError",
    "DeviceError",
    "DiffoptError",
    "DisconnectedError",
    "DivergenceError",
    "DtypeError",
    "EstimateWarning",
    "EstimatorError",
    "Finding",
    "GradModeError",
    "HiddenStateError",
    "HyperparameterError",
    "ImplicitGradients",
    "InPlaceError",
    "Kept",
    "LeafError",
    "Leaves",
    "LiftError",
    "LinearSolveError",
    "LossError",
    "MissingDerivativeError",
    "NonFiniteGradientError",
    "NonFiniteLossError",
    "Optimizer",
    "OptimizerError",
    "PrecisionWarning",
    "Preconditioned",
    "ProximalGD",
    "RMSprop",
    "RandomnessError",
    "RecomputationError",
    "Report",
    "Schedule",
    "SecondDerivativeError",
    "ShapeError",
    "Solution",
    "State",
    "StationarityError",
    "StepsError",
    "StructureError",
    "VmapError",
    "WrongDerivativeError",
    "check",
    "cite",
    "compare",
    "from_torch",
    "from_torchopt",
    "implicit",
    "implicit_gradients",
    "mean_over_tasks",
    "solve",
]
