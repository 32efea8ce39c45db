"""Every error this library raises on purpose: one class per kind of fault.

A message says what was got, what was expected and what to check; an error keeps the three apart, and its text is
composed here alone. All derive from :class:`DiffoptError`, and from the built-in exception (``ValueError``,
``TypeError``, ``RuntimeError``) that names the same kind of fault.
"""

from __future__ import annotations

import copyreg
from typing import Any

__all__ = [
    "BatchesError",
    "CapturedTensorError",
    "CompileWarning",
    "ConformanceError",
    "DeviceError",
    "DiffoptError",
    "DisconnectedError",
    "DivergenceError",
    "DtypeError",
    "EstimateWarning",
    "EstimatorError",
    "GradModeError",
    "HiddenStateError",
    "HyperparameterError",
    "InPlaceError",
    "LeafError",
    "LiftError",
    "LinearSolveError",
    "LossError",
    "MissingDerivativeError",
    "NonFiniteGradientError",
    "NonFiniteLossError",
    "OptimizerError",
    "PrecisionError",
    "PrecisionWarning",
    "RandomnessError",
    "RanksError",
    "RecomputationError",
    "SecondDerivativeError",
    "ShapeError",
    "SmoothnessError",
    "StationarityError",
    "StepsError",
    "StorageError",
    "StructureError",
    "VmapError",
    "WrongDerivativeError",
]


class DiffoptError(Exception):
    """Base of all errors of this library; its text is ``got, expected ...; fix``, without what is empty.

    Attributes:
        got: what was found, and where.
        expected: what should have been there; may be empty.
        fix: what to check or to do about it; may be empty.
    """

    got: str = ""
    expected: str = ""
    fix: str = ""

    def __init__(self, got: str, expected: str = "", fix: str = "") -> None:
        """Keep the three parts; ``args`` holds the text, as that of other exceptions does."""
        self.got, self.expected, self.fix = got, expected, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        """Compose the text; that of a subclass which does not hand its parts to this class is Python's own."""
        if not self.got:
            return super().__str__()
        expected = f", expected {self.expected}" if self.expected else ""
        return f"{self.got}{expected}{f'; {self.fix}' if self.fix else ''}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without ``__init__``, whose arguments a subclass may have changed: attributes are all."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class LossError(DiffoptError, TypeError):
    """The inner loss did not return one floating scalar tensor."""


class NonFiniteLossError(DiffoptError, ValueError):
    """The inner loss is NaN or infinite where the inner problem starts."""


class DivergenceError(DiffoptError, ArithmeticError):
    """The inner optimizer left the finite numbers; ``step`` (from 1) is the first whose loss, or result, is not."""

    def __init__(self, got: str, expected: str = "", fix: str = "", *, step: int) -> None:
        """Keep the parts and the first bad step."""
        super().__init__(got, expected, fix)
        self.step = step


class NonFiniteGradientError(DiffoptError, ArithmeticError):
    """A hypergradient came out NaN or infinite."""


class DisconnectedError(DiffoptError, ValueError):
    """The inner loss does not depend on the parameters it is asked to be minimised over."""


class CapturedTensorError(DiffoptError, ValueError):
    """The inner loss reads, through a closure or an attribute, a tensor that is being differentiated or batched."""


class LeafError(DiffoptError, TypeError):
    """A tree holds a leaf that cannot be optimised: not a tensor, not floating, or empty."""


class StructureError(DiffoptError, ValueError):
    """Two trees that should look alike differ in structure."""


class ShapeError(DiffoptError, ValueError):
    """A tensor has the wrong shape."""


class DtypeError(DiffoptError, TypeError):
    """Tensors that meet in one formula differ in dtype."""


class DeviceError(DiffoptError, ValueError):
    """Tensors that meet in one formula live on different devices."""


class StepsError(DiffoptError, ValueError):
    """A number of steps is not an integer in the allowed range."""


class BatchesError(DiffoptError, ValueError):
    """``batches`` does not hold one entry per inner step, or is no function of the step."""


class HyperparameterError(DiffoptError, ValueError):
    """An optimizer's or estimator's option is outside its range."""


class OptimizerError(DiffoptError, TypeError):
    """What was passed as ``optimizer`` is not one, or broke the contract of :class:`diffopt.Optimizer`."""


class LiftError(DiffoptError, RuntimeError):
    """An optimizer of another library cannot be made a pure function, or came out different when it was."""


class EstimatorError(DiffoptError, TypeError):
    """What was passed as ``estimator`` is not one, or cannot be used here."""


class RandomnessError(DiffoptError, RuntimeError):
    """A loss draws random numbers that the backward pass cannot draw again."""


class RanksError(DiffoptError, RuntimeError):
    """Ranks of one program do not solve the same problem, or communicate so that derivatives come out wrong."""


class HiddenStateError(DiffoptError, RuntimeError):
    """The inner loss keeps a state that its evaluations change, and a step of it is to be computed again."""


class RecomputationError(DiffoptError, RuntimeError):
    """A part of the inner loss that is computed again in the backward pass reads other tensors than the first time."""


class LinearSolveError(DiffoptError, ArithmeticError):
    """A linear system was not solved to the tolerance asked for, or is of a kind its solver cannot solve."""


class StationarityError(DiffoptError, ValueError):
    """A point given as a minimiser is not one."""


class StorageError(DiffoptError, RuntimeError):
    """Stored states could not be written to the disk, or read from it."""


class InPlaceError(DiffoptError, RuntimeError):
    """The inner loss or the optimizer changed a tensor in place."""


class GradModeError(DiffoptError, RuntimeError):
    """A call was made in a mode of autograd that it cannot run in, or given a tensor that was made in one."""


class MissingDerivativeError(DiffoptError, RuntimeError):
    """An operation in the inner loss has no second derivative in torch."""


class WrongDerivativeError(DiffoptError, ArithmeticError):
    """Autograd's second derivative of the inner loss is not the one that finite differences find."""


class SmoothnessError(DiffoptError, ArithmeticError):
    """The outer loss does not move as its hypergradient says, however small the step: it is too rough."""


class PrecisionError(DiffoptError, ArithmeticError):
    """A hypergradient has little in common with the same one in double precision."""


class VmapError(DiffoptError, RuntimeError):
    """The inner loss cannot run, or gives other numbers, under ``torch.func.vmap``."""


class SecondDerivativeError(DiffoptError, RuntimeError):
    """A hypergradient was differentiated again under an estimator that gives first derivatives only."""


class CompileWarning(UserWarning):
    """``compile=True`` has had no effect, or not the one that was hoped for."""


class EstimateWarning(UserWarning):
    """An estimator has measured that its estimate is bad: it may be wrong in size and sign."""


class PrecisionWarning(UserWarning):
    """A hypergradient is computed in a precision in which it is known to be inaccurate."""


class ConformanceError(DiffoptError, AssertionError):
    """An estimator or an optimizer is not what it claims to be; ``table`` holds all that was measured."""

    def __init__(self, got: str, expected: str = "", fix: str = "", *, table: str) -> None:
        """Keep the parts and the table."""
        super().__init__(got, expected, fix)
        self.table = table
