"""The implicit hypergradient at a point, with the solution of its linear system, for one problem or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffopt.adjoint.fixed_point import LastStep
from diffopt.adjoint.trajectory import Trajectory
from diffopt.errors import SecondDerivativeError
from diffopt.linear_solve import LinearSolution, LinearSolver
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.loop import roll_out
from diffopt.rollout.ranks import refuse_other_cotangents
from diffopt.rollout.record import Keep, Record, Watch
from diffopt.rollout.refusals import is_imprecise, warn_of_precision
from diffopt.tensors import transforms
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Call:
    """One call on its way down through the transforms around it.

    Attributes:
        dynamics: the inner problem: one step that goes nowhere and leaves the gradient in its only buffer.
        solver: of the linear system; ``None``: the default one.
        wanted: what gets a hypergradient.
        check: whether to check the loss.
        watch: what for.
    """

    dynamics: Dynamics
    solver: LinearSolver | None
    wanted: tuple[Place, ...]
    check: bool
    watch: Watch


class Found(NamedTuple):
    """What is found: the hypergradients of what was wanted, the solution, and how it was solved.

    Attributes:
        terms: by place.
        multiplier: the solution, like the params.
        system: the same as the solver returned it.
    """

    terms: dict[Place, Tensor]
    multiplier: Leaves
    system: LinearSolution


def implicit_gradients_at(call: Call, inputs: Inputs, cotangent: Leaves, start: Leaves | None) -> Found:
    """Solve for the multiplier, under whatever transforms run around the caller."""
    tensors = [*inputs.flat, *cotangent, *(start or ())]
    plainly = transforms.current_level() is None
    found = _solved(call, *tensors) if plainly else transforms.apply(_Solved, call, *tensors)
    first, second = len(call.wanted), len(call.wanted) + len(cotangent)
    multiplier = Leaves(found[first:second])
    terms = dict(zip(call.wanted, found[:first], strict=True))
    return Found(terms, multiplier, LinearSolution(multiplier, *found[second:]))


class _Solved(torch.autograd.Function):
    """``(inputs, cotangent, start) -> (hypergradients, multiplier, how it was solved)``."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _solved(call, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise _differentiated()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _differentiated()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        call, *tensors = args
        layout, dims = call.dynamics.layout, in_dims[1:]
        count = len(layout.places)
        own = {
            i for i, place in enumerate(layout.places) if place.part in ("params", "buffers") or place in call.wanted
        }
        stacked, dims = transforms.stacked(tensors, dims, info.batch_size, own | set(range(count, len(tensors))))
        call = replace(call, dynamics=call.dynamics.batched(layout.level(info, dims[:count])))
        plainly = transforms.current_level() is None
        outputs = _solved(call, *stacked) if plainly else transforms.apply(_Solved, call, *stacked)
        return outputs, (0,) * len(outputs)


def _differentiated() -> SecondDerivativeError:
    return SecondDerivativeError(
        "the result of implicit_gradients is being differentiated",
        "a hypergradient that is used as a number",
        "detach() it, or use diffopt.implicit, which is differentiable once",
    )


def _solved(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What :class:`_Solved` computes."""
    layout = call.dynamics.layout
    places, count = len(layout.places), layout.params_count
    inputs = layout.inputs(tensors[:places]).detached()
    cotangent, start = Leaves(tensors[places : places + count]), Leaves(tensors[places + count :])
    if call.check and is_imprecise(call.dynamics, inputs.params):
        warn_of_precision(call.dynamics, inputs.params)
    record = Record()
    _, record.rollout = roll_out(  # for its checks, and its graph
        call.dynamics,
        inputs,
        counts=record.counts,
        keep=Keep(first=1, checkpoint=None),
        wanted=call.wanted,
        watch=call.watch,
    )
    refuse_other_cotangents(record.rollout.copied_to, cotangent)
    trajectory = Trajectory(call.dynamics, inputs, inputs.state, record, (), call.wanted, call.check)
    with torch.no_grad():
        padded = layout.padded(cotangent.map(Tensor.detach), inputs.state)
        initial = start.map(Tensor.detach) if len(start) else None
        step = LastStep(trajectory, call.solver, root=True)
        found = step.solve(step.system, padded, initial)
        result = step.cotangents(found.value, padded)
    terms = [result.direct.get(place, torch.zeros_like(inputs.at(place))) for place in call.wanted]
    return _apart([*terms, *found.value, *found[1:]], tensors)


def _apart(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of a function, none of which is one of its inputs."""
    taken = {id(x) for x in inputs}
    return tuple(x.clone() if id(x) in taken else x.contiguous() for x in outputs)
