"""What an estimator says of itself."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, final, get_args

from diffopt.errors import HyperparameterError
from diffopt.tensors.arguments import Options
from diffopt.tensors.tree import describe

Kind: TypeAlias = Literal["init", "args", "batches", "hyperparameters"]
"""What a hypergradient is taken of: where the inner problem starts, what its loss reads (the same at every step, or a
batch for each), and the optimizer's own numbers."""

KINDS: tuple[Kind, ...] = ("init", "args", "batches", "hyperparameters")
ALL_INPUTS: frozenset[Kind] = frozenset(KINDS)

Exactness: TypeAlias = Literal["always", "at the fixed point", "never"]


@final
@dataclass(frozen=True)
class Claims:
    """What an estimator says of itself; :func:`diffopt.testing.check_estimator` tests every claim both ways.

    The default says everything that can be said of an estimator: who does not say otherwise is held to it.

    Attributes:
        exact: whether the hypergradient is that of the steps taken: ``"always"``, ``"at the fixed point"`` (once the
            steps no longer change anything) or ``"never"``. For a ``random`` estimator: its mean.
        inputs: the kinds of input that get a hypergradient; the others get exact zeros.
        own_steps: takes other steps than the optimizer alone would; ``exact`` then speaks of these.
        vmap: gives the same numbers under ``torch.func.vmap`` as in a loop; ``False``: raises a
            :class:`~diffopt.DiffoptError` there.
        second_derivatives: needs second derivatives of the inner loss.
        twice: its hypergradient can be differentiated again; ``False``: that raises
            :class:`~diffopt.SecondDerivativeError`.
        linear: linear in the gradient of the outer loss.
        random: draws random numbers of its own, from torch's global generator or one in its fields.
        reports: ``Solution.counts`` and ``Solution.kept`` say what was computed and stored; ``False``: they stay zero.
        tolerance: relative accuracy in float64, of linear solves and finite differences for instance.

    Raises:
        HyperparameterError: ``exact`` or ``inputs`` is none of what is listed, or ``tolerance`` is below
            1e-10 (sums in another order differ by that) or above 0.1 (which would be no claim).
    """

    exact: Exactness = "always"
    inputs: frozenset[Kind] = ALL_INPUTS
    own_steps: bool = False
    vmap: bool = True
    second_derivatives: bool = True
    twice: bool = False
    linear: bool = True
    random: bool = False
    reports: bool = True
    tolerance: float = 1e-9

    def __post_init__(self) -> None:
        """Refuse what is not a claim."""
        options = Options(self)
        options.choice("exact", *get_args(Exactness))
        options.number("tolerance", 1e-10, 0.1, up_to=True)
        options.flag(*(field.name for field in fields(self) if isinstance(field.default, bool)))
        if not isinstance(self.inputs, Set) or not self.inputs or not frozenset(self.inputs) <= ALL_INPUTS:
            raise HyperparameterError(f"Claims: inputs is {describe(self.inputs)}", f"a set of some of {KINDS}")
