"""What a call should give: plain loops under plain autograd, one task at a time; no code of the library in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from fuzz.calls import Call
from fuzz.estimators import Spec
from fuzz.rules import BUFFERS
from torch import Tensor


@dataclass(frozen=True)
class End:
    """Where a loop ends: the leaves, their buffers by the library's names, and the losses on the way."""

    leaves: list[Tensor]
    buffers: list[Tensor]
    losses: Tensor


def loop(
    call: Call,
    bases: dict[str, Tensor],
    detach_until: int = 0,
    curvature: Callable[[int], float] = lambda t: 1.0,
    window: int = 1,
) -> End:
    """All steps by a loop that autograd records.

    Up to step ``detach_until`` the state is replaced by a constant plus the identity in the initial state.
    ``curvature(t)`` is a factor on every second derivative of step ``t``'s loss: ``sg(g) + e (g - sg(g))`` for ``g``.
    ``window`` steps share one gradient.
    """
    kind, steps = call.rule.of, call.steps
    held = call.hyperparameters(bases)
    start = call.leaves_of(bases)
    now = [p + 0 for p in start]
    first = [kind.buffers(p, **call.rule.options(held, i, 1, max(steps, 1))) for i, p in enumerate(start)]
    buffers, grads, losses = [dict(b) for b in first], [], []
    for t in range(1, steps + 1):
        now = [p if p.requires_grad else p.detach().requires_grad_() for p in now]
        if (t - 1) % window == 0:
            value = call.plain_loss(now, bases, t)
            losses.append(value.detach())
            grads = torch.autograd.grad(value, now, create_graph=True)
            grads = [g.detach() + curvature(t) * (g - g.detach()) for g in grads]
        options = [call.rule.options(held, i, t, steps) for i in range(len(now))]
        now = [kind.step(p, g, b, t, **o) for p, g, b, o in zip(now, grads, buffers, options, strict=True)]
        if t <= detach_until:
            now = [p.detach() + (s - s.detach()) for p, s in zip(now, start, strict=True)]
            for b, s in zip(buffers, first, strict=True):
                b.update({k: v.detach() + (s[k] - s[k].detach() if k in s else 0) for k, v in b.items()})
    shown = [b[old] for new, old in sorted(BUFFERS.items()) for b in buffers if old in b and _kept(call, old)]
    return End(now, shown, torch.stack(losses) if losses else torch.zeros(0))


def _kept(call: Call, name: str) -> bool:
    """Whether the library has this buffer too: the plain RMSprop has a velocity without momentum."""
    return name != "v" or "momentum" in call.rule.of.numbers


def gradients(call: Call, bases: dict[str, Tensor], end: End, scale: float = 1.0) -> list[Tensor]:
    """The derivative of the outer loss at an end."""
    outer = call.outer(end.leaves, end.buffers if call.reads_buffers else ()) * scale
    return derivative(outer, [bases[name] for name in call.wanted(bases)])


def derivative(outer: Tensor, wanted: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Zeros where there is none."""
    if not outer.requires_grad:
        return [torch.zeros_like(x) for x in wanted]
    found = torch.autograd.grad(
        outer, wanted, allow_unused=True, materialize_grads=True, create_graph=create_graph, retain_graph=True
    )
    return list(found)


def expected(call: Call, bases: dict[str, Tensor], spec: Spec | None = None, window: int = 1) -> list[Tensor] | None:
    """The hypergradient that the estimator is to give for one task; ``None`` where no identity is known."""
    spec, steps = call.estimator if spec is None else spec, call.steps
    if spec.name == "MultiStep":
        return expected(call, bases, Spec(spec.get("adjoint")), spec.get("window"))
    if spec.name in ("FirstOrder", "Truncated"):
        return gradients(call, bases, loop(call, bases, steps - spec.get("steps", 0), window=window))
    if spec.name == "Reptile":
        return _reptile(call, bases, loop(call, bases, window=window))
    if spec.name == "Binomial":
        return _binomial(call, bases, spec.get("order"), spec.get("window"), spec.get("scale"))
    if spec.name == "Krylov" and spec.get("order") < steps:
        return _binomial(call, bases, spec.get("order"), None, 1.0) if spec.get("order") < 2 else None
    if spec.name == "Implicit":
        return _implicit(call, bases) if call.rule.kind == "gd" else None
    return gradients(call, bases, loop(call, bases, window=window))


def _reptile(call: Call, bases: dict[str, Tensor], end: End) -> list[Tensor]:
    start = call.leaves_of(bases)
    outer = sum(((s - p).detach() * s).sum() for s, p in zip(start, end.leaves, strict=True))
    return derivative(outer, [bases[name] for name in call.wanted(bases)])


def _binomial(call: Call, bases: dict[str, Tensor], order: int, window: int | None, scale: float) -> list[Tensor]:
    """The terms of up to ``order`` factors of curvature: a polynomial in that factor, found from its values."""
    steps = call.steps
    curved = steps if window is None else window
    nodes = torch.cos(torch.pi * (torch.arange(steps + 1) + 0.5) / (steps + 1)).double()
    columns = [
        torch.cat(
            [
                g.flatten().to(torch.complex128 if g.is_complex() else torch.float64).to(torch.complex128)
                for g in gradients(
                    call, bases, loop(call, bases, curvature=lambda t, e=e: e if t > steps - curved else 0.0)
                )
            ]
        )
        for e in nodes.tolist()
    ]
    powers = (nodes[:, None] ** torch.arange(steps + 1)).to(torch.complex128)
    coefficients = torch.linalg.solve(powers, torch.stack(columns))
    total = sum(scale**k * coefficients[k] for k in range(min(order, steps) + 1))
    wanted = [bases[name] for name in call.wanted(bases)]
    parts = torch.split(total, [x.numel() for x in wanted])
    return [
        (part if x.is_complex() else part.real).reshape(x.shape).to(x.dtype)
        for part, x in zip(parts, wanted, strict=True)
    ]


def _implicit(call: Call, bases: dict[str, Tensor]) -> list[Tensor]:
    """``B' (I - J')^{-1} c`` with the last step's blocks at the final state, by an explicit matrix."""
    end = loop(call, bases)
    wanted = [bases[name] for name in call.wanted(bases)]
    leaves = [p.detach().requires_grad_() for p in end.leaves]
    outer = torch.autograd.grad(call.outer(leaves), leaves)
    again = _last_step(call, bases, leaves)
    flat = torch.cat([x.reshape(-1) for x in again])
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(flat[i], leaves, retain_graph=True)])
        for i in range(len(flat))
    ]
    jacobian = torch.stack(rows)
    cotangent = torch.cat([x.reshape(-1) for x in outer])
    v = torch.linalg.solve(torch.eye(len(flat), dtype=flat.dtype) - jacobian.T, cotangent)
    return derivative(flat @ v, wanted)


def _last_step(call: Call, bases: dict[str, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    held = call.hyperparameters(bases)
    grads = torch.autograd.grad(call.plain_loss(leaves, bases, call.steps), leaves, create_graph=True)
    return [
        p - call.rule.options(held, i, call.steps, call.steps)["lr"] * g
        for i, (p, g) in enumerate(zip(leaves, grads, strict=True))
    ]
