"""How a call is made: the library's hypergradient under every mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from fuzz import trees
from fuzz.calls import Call
from fuzz.loop import derivative
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import diffopt

Named = dict[str, Tensor]


@dataclass
class Found:
    """The derivatives that a call gave, by their places, and the numbers of the forward pass where these are plain."""

    gradients: list[Tensor]
    leaves: list[Tensor] | None = None
    losses: Tensor | None = None


def solve(call: Call, bases: Named) -> diffopt.Solution[Any]:
    """The call of ``diffopt.solve``."""
    return diffopt.solve(
        call.solved_loss,
        trees.fill(call.params, call.leaves_of(bases)),
        *call.arguments(bases),
        optimizer=call.optimizer(bases),
        steps=call.steps,
        batches=call.batch_tree(bases),
        estimator=call.estimator.make(),
        check=call.check,
        compile=call.compiled,
    )


def outer(call: Call, bases: Named) -> Tensor:
    """The outer loss of a solve."""
    return _outer(call, solve(call, bases))


def _outer(call: Call, solution: diffopt.Solution[Any]) -> Tensor:
    buffers = []
    if call.reads_buffers:
        found = solution.state.buffers
        buffers = [x for name in sorted(found) for x in trees.pick(call.params, found[name])]
    return call.outer(trees.pick(call.params, solution.params), buffers)


def ready(call: Call, bases: Named) -> Named:
    """Tensors of the caller's own, of which the wanted ones require grad."""
    wanted = set(call.wanted(bases))
    return {name: x.clone().requires_grad_(name in wanted) for name, x in bases.items()}


def run(call: Call) -> Found:
    """The call as the library answers it."""
    bases = ready(call, call.bases())
    torch.manual_seed(call.seed)
    return _MODES[call.mode](call, bases)


def _autograd(call: Call, bases: Named) -> Found:
    solution = solve(call, bases)
    grads = derivative(_outer(call, solution), [bases[name] for name in call.wanted(bases)])
    return Found(grads, [x.detach() for x in trees.pick(call.params, solution.params)], solution.losses)


def _backward(call: Call, bases: Named) -> Found:
    end = outer(call, bases)
    if end.requires_grad:
        end.backward()
    found = [bases[name] for name in call.wanted(bases)]
    return Found([torch.zeros_like(x) if x.grad is None else x.grad for x in found])


def _twice(call: Call, bases: Named) -> Found:
    end = outer(call, bases)
    wanted = [bases[name] for name in call.wanted(bases)]
    first, second = derivative(end, wanted), derivative(end, wanted)
    return Found([(a + b) / 2 for a, b in zip(first, second, strict=True)])


def _detached(bases: Named) -> Named:
    return {name: x.detach() for name, x in bases.items()}


def _of_wanted(
    call: Call, bases: Named, function: Callable[[Call, Named], Any]
) -> tuple[Callable[[Named], Any], Named]:
    """A function of the wanted tensors alone, the others fixed, and these tensors."""
    plain = _detached(bases)
    wanted = {name: plain[name] for name in call.wanted(bases)}
    return (lambda held: function(call, {**plain, **held})), wanted


def _func(call: Call, bases: Named) -> Found:
    function, wanted = _of_wanted(call, bases, outer)
    return Found(list(torch.func.grad(function)(wanted).values()))


def _dims(call: Call, bases: Named) -> dict[str, int | None]:
    return {name: 0 if name in call.own else None for name in bases}


def _vmap_grad(call: Call, bases: Named) -> Found:
    plain = _detached(bases)
    wanted = call.wanted(bases)

    def one(held: Named) -> Named:
        return torch.func.grad(lambda w: outer(call, {**held, **w}))({name: held[name] for name in wanted})

    found = torch.func.vmap(one, (_dims(call, bases),), randomness="same")(plain)
    return Found([found[name] for name in wanted])


def _over_tasks(call: Call, bases: Named) -> Tensor:
    each = torch.func.vmap(lambda held: outer(call, held), (_dims(call, bases),), randomness="same")
    return each(bases).sum()


def _grad_vmap(call: Call, bases: Named) -> Found:
    function, wanted = _of_wanted(call, bases, _over_tasks)
    return Found(list(torch.func.grad(function)(wanted).values()))


def _autograd_vmap(call: Call, bases: Named) -> Found:
    return Found(derivative(_over_tasks(call, bases), [bases[name] for name in call.wanted(bases)]))


def _mean_over_tasks(call: Call, bases: Named) -> Found:
    names = list(bases)
    mean = diffopt.mean_over_tasks(
        lambda *held: outer(call, dict(zip(names, held, strict=True))),
        *bases.values(),
        in_dims=list(_dims(call, bases).values()),
        task_chunk=call.task_chunk,
        randomness="same",
    )
    return Found(derivative(mean, [bases[name] for name in call.wanted(bases)]))


def _final(call: Call, bases: Named) -> Tensor:
    return torch.cat([x.reshape(-1) for x in trees.pick(call.params, solve(call, bases).params)])


def _jacrev(call: Call, bases: Named) -> Found:
    function, wanted = _of_wanted(call, bases, _final)
    return Found(list(torch.func.jacrev(function)(wanted).values()))


def _batched_grads(call: Call, bases: Named) -> Found:
    final, wanted = _final(call, bases), [bases[name] for name in call.wanted(bases)]
    if not final.requires_grad:
        return Found([x.new_zeros(len(final), *x.shape) for x in wanted])
    eye = torch.eye(len(final), dtype=final.dtype)
    found = torch.autograd.grad(final, wanted, eye, is_grads_batched=True, allow_unused=True)
    return Found([x.new_zeros(len(final), *x.shape) if g is None else g for g, x in zip(found, wanted, strict=True)])


def _no_grad(call: Call, bases: Named) -> Found:
    with torch.no_grad():
        solution = solve(call, bases)
    leaves = trees.pick(call.params, solution.params)
    assert not call.steps or not any(x.requires_grad for x in leaves)
    return Found([], leaves, solution.losses)


def _inference(call: Call, bases: Named) -> Found:
    with torch.inference_mode():
        return Found([], trees.pick(call.params, solve(call, bases).params))


def _second(call: Call, bases: Named) -> Found:
    return Found(second_of(call, bases, outer(call, bases)))


def second_of(call: Call, bases: Named, end: Tensor) -> list[Tensor]:
    """The derivative of the sum of the squares of the first derivatives."""
    wanted = [bases[name] for name in call.wanted(bases)]
    first = derivative(end, wanted, create_graph=True)
    return derivative(sum(g.abs().square().sum() for g in first), wanted)


def _checkpointed(call: Call, bases: Named) -> Found:
    names = list(bases)
    end = checkpoint(
        lambda *held: outer(call, dict(zip(names, held, strict=True))), *bases.values(), use_reentrant=False
    )
    return Found(derivative(end, [bases[name] for name in call.wanted(bases)]))


def _around(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[Call, Named], Found]:
    def within(call: Call, bases: Named) -> Found:
        with context():
            return _autograd(call, bases)

    return within


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


_MODES: dict[str, Callable[[Call, Named], Found]] = {
    "autograd": _autograd,
    "backward": _backward,
    "func": _func,
    "twice": _twice,
    "no_grad": _no_grad,
    "inference": _inference,
    "save_on_cpu": _around(torch.autograd.graph.save_on_cpu),
    "autocast": _around(autocast),
    "vmap_grad": _vmap_grad,
    "grad_vmap": _grad_vmap,
    "autograd_vmap": _autograd_vmap,
    "mean_over_tasks": _mean_over_tasks,
    "jacrev": _jacrev,
    "batched_grads": _batched_grads,
    "second": _second,
    "checkpointed": _checkpointed,
}
