"""The two autograd functions that join an estimator to autograd and ``torch.func``.

# NOTE [two functions with vmap rules]
``_Solve`` is the rollout, ``_Pullback`` its hypergradient. Under vmap each runs on the stacked tensors (see
``layout.py``, NOTE [a batch of tasks is one problem]), so that however transforms are nested, the rollout and the
estimator run at the bottom, on plain tensors. An estimator therefore never sees a transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffopt.adjoint.call import Call, PullsBack
from diffopt.adjoint.pull_back import pull_back, pull_back_together
from diffopt.errors import EstimatorError, InPlaceError, SecondDerivativeError
from diffopt.rollout.field import VectorField
from diffopt.rollout.loop import roll_out
from diffopt.rollout.refusals import is_imprecise, warn_of_precision
from diffopt.tensors import autograd_graph, tracing, transforms
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.torch_errors import forward_mode_error, is_in_place


def prepared(call: Call, inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """What gives the final state and the losses, differentiable by the estimator (when called: the way is short)."""
    vmap = transforms.innermost_vmap()
    if vmap is not None:  # where nothing is differentiated; below it, the same tensors say what is
        return partial(transforms.below_vmap, partial(_below, call), vmap, inputs)
    if torch.is_grad_enabled():
        call = replace(call, wanted=call.wanted | {i for i, x in enumerate(inputs) if x.requires_grad})
    return transforms.applying(_Solve, call, *inputs)


def _below(call: Call, vmap: Any, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> Any:
    """The same outside a vmap: stacked, unless its tasks share everything."""
    layout = call.dynamics.layout
    if any([dim is not None for dim in dims]):
        inputs, dims = transforms.stacked(inputs, dims, vmap.batch_size, call.wanted | set(range(layout.state_count)))
        call = replace(call, dynamics=call.dynamics.batched(layout.level(vmap, dims)))
    return prepared(call, inputs)()


class _Solve(torch.autograd.Function):
    """``(s_1, what is read, hyperparameters) -> (s_{T+1}, losses, what is observed, what a loss returns besides)``."""

    @staticmethod
    def forward(call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        record, layout = call.record, call.dynamics.layout
        low = bool(call.wanted) and call.watch.values and is_imprecise(call.dynamics, inputs)
        if low and call.estimator.claims(layout.inner_steps).second_derivatives:
            warn_of_precision(call.dynamics, inputs)
        final, record.rollout = roll_out(
            call.dynamics,
            layout.inputs(inputs),
            counts=record.counts,
            keep=call.keep if call.wanted else None,
            wanted=call.wanted_places[1],
            watch=call.watch,
            stop=call.stop,
        )
        record.usable, record.kept = bool(call.wanted), record.rollout.kept
        losses = record.rollout.losses
        assert losses is not None
        # (else all tensors are new)
        same = not (call.dynamics.own_update and layout.steps and not layout.buffers_layout)
        if same and tracing.current() is not None:
            final = final.map(Tensor.clone)
        elif same and record.rollout.stack is None:
            taken = {transforms.storage(x) for x in inputs}
            final = Leaves([x.clone() if transforms.storage(x) in taken else x for x in final])
        along = (losses.clone(), *record.rollout.handed_out)
        if record.rollout.handed_out:  # else what is returned would hold itself
            record.rollout = replace(record.rollout, handed_out=())
        return (*final, *along)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]
        count, observed = ctx.call.state_count, ctx.call.dynamics.observed_count
        along = enumerate(output[count:])
        constant = 0 if isinstance(ctx.call.dynamics.loss, VectorField) else -1  # a field's norm is only reported
        fixed = [x for i, x in along if i == constant or i > observed or not (x.is_floating_point() or x.is_complex())]
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        needed = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        call, saved = ctx.call, _saved_tensors(ctx)
        if call.wanted != set(needed):
            call = replace(call, wanted=frozenset(needed))
        if transforms.has_tangent([c for c in cotangents if c is not None]):
            raise forward_mode_error("a cotangent of solve")
        # (a sparse one comes of an embedding with sparse=True in the outer loss)
        cotangents = tuple([c.to_dense() if c is not None and transforms.is_sparse(c) else c for c in cotangents])
        final = saved[-call.state_count :]
        given = [x.new_zeros(()).expand_as(x) if c is None else c for c, x in zip(cotangents, final, strict=False)]
        along = {i: c for i, c in enumerate(cotangents[call.state_count :]) if c is not None}
        if along:
            _refuse_running_costs(call.estimator)
            call, given = replace(call, running=tuple(along)), [*given, *along.values()]
        # in inference mode no gradient is taken, and what was made in it cannot be recorded
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            ordinary = [c.clone() if c.is_inference() else c for c in given]
            level = transforms.grads_batched()
            plainly = not (level or torch.is_grad_enabled() or transforms.transforms_active())
            function: Any = pull_back if plainly else partial(transforms.apply, _Pullback)
            pullback = partial(function, call, *saved)
            terms = transforms.over_batched_grads(pullback, ordinary, level) if level else pullback(*ordinary)
        results = dict(zip(needed, terms, strict=True))
        return (None, *[results.get(i) for i in range(len(ctx.needs_input_grad) - 1)])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise forward_mode_error()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        outputs = _below(args[0], info, in_dims[1:], args[1:])
        return outputs, (0,) * len(outputs)


class _Pullback(torch.autograd.Function):
    """``(s_1, what is read, hyperparameters, s_{T+1}, Lambda_T) -> `` the hypergradient for the wanted inputs."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return pull_back(call, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise SecondDerivativeError(
            "a hypergradient is being differentiated again",
            "once",
            "this estimator gives first derivatives only; use estimator=diffopt.estimators.Unrolled(), which can "
            "be differentiated to any order",
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise forward_mode_error("a cotangent of solve, or an input,")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        call, *tensors = args
        count, dims, layout = call.state_count, in_dims[1:], call.dynamics.layout
        inputs = len(tensors) - 2 * count - len(call.running)
        own = call.wanted | set(range(count)) | set(range(inputs, len(tensors)))
        shared = all(dim is None for dim in dims[: inputs + count])
        if shared and not call.restacked and not transforms.transforms_active():
            rows = transforms.rows(tensors[inputs + count :], dims[inputs + count :], info.batch_size)
            found = pull_back_together(call, tensors[: inputs + count], rows)
            if found is not None:
                return tuple([torch.stack(column) for column in zip(*found, strict=True)]), (0,) * len(call.wanted)
        new = (0,) if all(dim is None for dim in dims[:inputs]) else ()
        restacked = (*new, *[axis + 1 for axis in call.restacked])
        stacked, dims = transforms.stacked(tensors, dims, info.batch_size, own)
        dynamics = call.dynamics.batched(layout.level(info, dims[:inputs]))
        outputs = transforms.apply(_Pullback, replace(call, dynamics=dynamics, restacked=restacked), *stacked)
        return outputs, (0,) * len(outputs)


def _refuse_running_costs(estimator: PullsBack) -> None:
    """Refuse an outer loss that depends on what happens along the way, where the estimator would drop that."""
    if not estimator.takes_running_costs:
        raise EstimatorError(
            f"the outer loss depends on Solution.losses or Solution.observed, by {estimator!r}",
            "an estimator that differentiates what happens along the way: Reverse, Unrolled, ForwardMode, MultiStep",
            "use one of them; numbers without a derivative are solution.losses.detach()",
        )


def _saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """What a solve saved for its backward pass; read once, for hooks may hand it out once only (checkpoint's do).

    Raises:
        InPlaceError: something has been written to since.
    """
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        return saved
    except RuntimeError as error:
        if not is_in_place(error):
            raise
        raise InPlaceError(
            "a tensor that was given to solve, or that it returned, has been changed in place before the backward "
            "pass that needs it",
            "it to stay as it was until then",
            "the usual cause is an outer optimizer's step() before backward(): take the hypergradient first, or "
            "pass a clone()",
        ) from error


def solves_behind(outer_loss: Tensor) -> list[Any]:
    """The autograd nodes of the solves that a loss depends on; each has ``call`` and ``saved_tensors``."""
    return [node for node in autograd_graph.nodes([outer_loss.grad_fn]) if type(node) is _Solve._backward_cls]
