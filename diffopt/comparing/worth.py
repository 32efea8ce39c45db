"""Whether the hypergradient of a problem is worth anything: beside differences of its outer loss, and in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.adjoint.estimator import Estimator
from diffopt.adjoint.smoothness import CALMER, CLOSE, WORTHLESS, Smoothness, smoothness
from diffopt.errors import DiffoptError
from diffopt.rollout.problem import Outcome, Problem
from diffopt.rollout.problem_in_double import problem_in_double
from diffopt.tensors.in_double import InDouble, WatchDraws


class Worth(NamedTuple):
    """What the exact hypergradient of a problem is worth.

    Attributes:
        smoothness: its error beside differences of the outer loss.
        precision: its relative error beside the same in float64; ``None``: the problem does not run in that, or draws
            other random numbers in it.
        kind: the precision of the outer loss.
        drawn: whether it draws other random numbers in float64.
    """

    smoothness: Smoothness
    precision: float | None
    kind: str
    drawn: bool = False

    def notes(self) -> Iterator[str]:
        """In words."""
        by = f"{self.smoothness} of the meta-parameters"
        text = f"the exact hypergradient is off differences of the outer loss by {by}"
        if self.smoothness.hidden:
            yield "whether the exact hypergradient is right cannot be told: the outer loss changes by its round-off"
        elif self.smoothness.derivative is False:
            yield f"{text}, which agree with one another: look for a detach(), or for tensors made outside the problem"
        elif self.smoothness.cut_short and self.smoothness.error > CLOSE:
            yield f"{text}, smaller ones lost in round-off: whether it is the derivative cannot be told"
        elif self.smoothness.undefined:
            yield f"{text}: the outer loss is not defined there, or not finite"
        elif self.smoothness.error > WORTHLESS:
            yield f"{text}: it is chaotic or jumps, and no estimator's number says much; {CALMER}"
        else:
            yield f"{text}{': expect noise' if self.smoothness.error > CLOSE else ''}"
        if self.drawn:
            yield f"from one seed, the problem draws other random numbers in float64 than in {self.kind}: not compared"
        elif self.precision is None:
            yield f"the problem does not run in float64, beside which to set its {self.kind}"
        else:
            bad = ": use a higher precision" if self.precision > CLOSE else ""
            yield f"in {self.kind} the exact hypergradient is {self.precision:.1e} off that in float64{bad}"


def worth(
    run: Callable[[Estimator], Tensor],
    estimator: Estimator,
    leaves: Sequence[Tensor],
    own: Tensor,
    directions: int,
    dtype: torch.dtype,
) -> Worth:
    """Look at the hypergradient ``own``, in one vector, of the meta-parameters ``leaves`` of a problem.

    Args:
        run: the problem.
        estimator: the exact estimator.
        leaves: the meta-parameters.
        own: its hypergradient, in one vector.
        directions: along how many random directions to look.
        dtype: the precision of the outer loss.
    """
    kind = str(dtype).removeprefix("torch.")
    here, gradient = [x.detach() for x in leaves], torch.split(own, [x.numel() for x in leaves])
    double, kinds, raised = _in_double(run, estimator, leaves), set[torch.dtype](), None
    if double is not None:
        raised, gradient, kinds = double
    drawn = torch.float64 in kinds and _drawn(run, estimator) != kinds

    def value(moved: Sequence[Tensor]) -> Tensor:
        try:
            with _at(leaves, moved, estimator, raised) as used:
                return run(used).detach()
        except DiffoptError:  # it has none there
            return torch.tensor(torch.nan, dtype=torch.float64)

    slopes = [g.reshape(x.shape) for g, x in zip(gradient, here, strict=True)]
    smooth = smoothness(value, here, slopes, directions)
    if double is None or drawn:
        return Worth(smooth, None, kind, drawn)
    exact = torch.cat([g.double().flatten() for g in gradient])
    return Worth(smooth, float((own - exact).norm()) / (float(exact.norm()) + 1e-300), kind)


def _in_double(
    run: Callable[[Estimator], Tensor], estimator: Estimator, leaves: Sequence[Tensor]
) -> tuple[Sequence[Tensor], tuple[Tensor, ...], set[torch.dtype]] | None:
    """What is raised by itself, the hypergradient in double precision, if the problem runs in it, and what is drawn.

    A hyperparameter must have the precision of the params, which the problem may have made outside: the meta-parameters
    are then raised only where they meet double precision.
    """
    here = [x.detach() for x in leaves]
    for raised in (leaves, ()):
        try:
            with _at(leaves, here, estimator, raised) as used:
                with WatchDraws() as watch:
                    loss = run(used)
                found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        except Exception:  # a problem may ask for a precision in any way
            continue
        if loss.dtype == torch.float64:
            return raised, found, watch.kinds
    return None


def _drawn(run: Callable[[Estimator], Tensor], estimator: Estimator) -> set[torch.dtype]:
    """The precisions in which a problem draws random numbers."""
    watch = WatchDraws()
    with watch:
        run(estimator)
    return watch.kinds


@contextmanager
def _at(
    leaves: Sequence[Tensor], values: Sequence[Tensor], estimator: Estimator, raised: Sequence[Tensor] | None
) -> Iterator[Estimator]:
    """Let the meta-parameters have other values for a while, and give the estimator to run the problem with.

    # NOTE [other values, not other tensors]
    A problem has its meta-parameters in its closure, by their objects. Each is given another storage, and then its own
    again, which has not been written to. The storage has their precision: in another, torch would make a new
    accumulator of their gradient, without the hooks of the old one (DistributedDataParallel's reduction is one).

    ``raised``: those to raise wherever they are met, in a run in double precision; ``None``: in their own.
    """
    with ExitStack() as stack:
        for leaf, value in zip(leaves, values, strict=True):
            stack.callback(setattr, leaf, "data", leaf.data)
            leaf.data = value
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of the precision, which is looked at here
        if raised is not None:
            stack.enter_context(InDouble(raised))
        yield estimator if raised is None else _doubling(estimator)


def _doubling(estimator: Estimator) -> Estimator:
    """A copy of an estimator that takes problems to double precision (``compare.py``, NOTE [a copy, not a wrapper])."""
    copied = copy.copy(estimator)

    def run(problem: Problem) -> Outcome:
        return estimator.run(problem_in_double(problem))

    object.__setattr__(copied, "run", run)
    return copied
