"""Optimizers of optimizers beside plain functions on lists of tensors, which autograd goes through: no library code.

An oracle is ``update(params, grads, memory, t) -> params`` on lists of three matrices ``[body b, body w, head h]``;
what it remembers it keeps in ``memory``, a dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import oracles
import torch
from torch import Tensor

import diffopt
from diffopt import EMA, SGD, Adam, AdamW, Clip, Groups, Lookahead, Muon, Proximal, ProximalGD, Schedule
from diffopt.prox import L1, Box, GroupL1, L2Ball, Nonnegative, Prox, Simplex

Update: TypeAlias = Callable[[list[Tensor], list[Tensor], dict[Any, Any], int], list[Tensor]]
Hypers: TypeAlias = dict[str, Tensor]

SHAPES = {"b": (1, 3), "w": (2, 3), "h": (3, 1)}
STEPS = 4

# ------------------------------------------------------------------------------------------------- the oracles' pieces


def leafwise(step: Callable[..., Tensor], **options: Any) -> Update:
    """A rule of ``oracles.py``; an option may be a list, an entry for each leaf, and a function of the step."""

    def update(ps, gs, memory, t):
        after = []
        for i, (p, g) in enumerate(zip(ps, gs, strict=True)):
            now = {k: v[i] if isinstance(v, list) else v for k, v in options.items()}
            now = {k: v(t) if callable(v) else v for k, v in now.items()}
            after.append(step(p, g, memory.setdefault(i, {}), t, **now))
        return after

    return update


def at(schedule: Tensor) -> Callable[[int], Tensor]:
    return lambda t: schedule[t - 1]


def sgd(**options: Any) -> Update:
    return leafwise(oracles.sgd_step, **options)


def adam(**options: Any) -> Update:
    return leafwise(oracles.adam_step, **options)


def adamw(**options: Any) -> Update:
    return leafwise(lambda *a, **o: oracles.adam_step(*a, decoupled=True, **o), **options)


def clipped_norm(inner: Update, most: Any) -> Update:
    def update(ps, gs, memory, t):
        total = torch.cat([g.flatten() for g in gs]).norm()
        bound = most(t) if callable(most) else most
        factor = bound / (total + 1e-6)
        return inner(ps, [g * factor if float(factor.detach()) < 1 else g for g in gs], memory, t)

    return update


def clipped_value(inner: Update, most: list[Any]) -> Update:
    def cut(g, c):
        return torch.where(g > c, c * torch.ones_like(g), torch.where(g < -c, -c * torch.ones_like(g), g))

    return lambda ps, gs, memory, t: inner(ps, [cut(g, c) for g, c in zip(gs, most, strict=True)], memory, t)


def grouped(*parts: tuple[list[int], Update]) -> Update:
    def update(ps, gs, memory, t):
        after = list(ps)
        for number, (places, inner) in enumerate(parts):
            own = memory.setdefault(("group", number), {})
            for i, p in zip(places, inner([ps[i] for i in places], [gs[i] for i in places], own, t), strict=True):
                after[i] = p
        return after

    return update


def then(inner: Update, prox: Callable[[list[Tensor], int], list[Tensor]]) -> Update:
    return lambda ps, gs, memory, t: prox(inner(ps, gs, memory, t), t)


def soft(x: Tensor, threshold: Any) -> Tensor:
    return torch.sign(x) * torch.relu(x.abs() - threshold)


def row_soft(x: Tensor, threshold: Any) -> Tensor:
    return torch.stack([row * torch.relu(1 - threshold / row.norm()) for row in x])


def on_simplex(row: Tensor) -> Tensor:
    """The best of all supports, each tried."""
    best, least = row, math.inf
    for number in range(1, 2 ** len(row)):
        support = torch.tensor([bool(number >> i & 1) for i in range(len(row))])
        shift = (row[support].sum() - 1) / support.sum()
        point = torch.where(support, row - shift, 0 * row)
        distance = float((point - row).square().sum().detach())
        if bool((point.detach() >= 0).all()) and distance < least - 1e-14:
            best, least = point, distance
    return best


def in_ball(ps: list[Tensor], radius: Any) -> list[Tensor]:
    size = torch.cat([p.flatten() for p in ps]).norm()
    return [p * radius / size for p in ps] if bool((size > radius).detach()) else ps


def averaged(inner: Update, decay: Any) -> Update:
    def update(ps, gs, memory, t):
        before = memory.get("average", ps)
        after = inner(ps, gs, memory.setdefault("inner", {}), t)
        memory["average"] = [decay * a + (1 - decay) * p for a, p in zip(before, after, strict=True)]
        return after

    return update


def ahead(inner: Update, period: int, ratio: Any) -> Update:
    def update(ps, gs, memory, t):
        slow = memory.setdefault("slow", ps)
        fast = inner(ps, gs, memory.setdefault("inner", {}), t)
        if t % period:
            return fast
        memory["slow"] = [(1 - ratio) * s + ratio * f for s, f in zip(slow, fast, strict=True)]
        return memory["slow"]

    return update


def muon(
    lr, weight_decay=0.1, momentum=0.95, nesterov=True, abc=(3.4445, -4.7750, 2.0315), eps=1e-7, rms=False, steps=5
) -> Update:
    """Muon with the Gram matrix of the columns, whatever the shape: no transposition."""

    def one(p, g, memory, t):
        memory["v"] = memory.get("v", 0 * g) * momentum + g * (1 - momentum)
        d = g * (1 - momentum) + memory["v"] * momentum if nesterov else memory["v"]
        x = d / torch.clamp(d.pow(2).sum() ** 0.5, min=eps)
        for _ in range(steps):
            gram = x.T @ x
            x = x @ (abc[0] * torch.eye(len(gram), dtype=x.dtype) + abc[1] * gram + abc[2] * gram @ gram)
        rows, columns = p.shape
        ratio = 0.2 * max(rows, columns) ** 0.5 if rms else max(1.0, rows / columns) ** 0.5
        return p * (1 - lr * weight_decay) - lr * ratio * x

    return leafwise(one)


# ---------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Composition:
    """An optimizer and its oracle, as functions of the hyperparameters, which are all learned."""

    name: str
    make: Callable[[Hypers], diffopt.Optimizer]
    oracle: Callable[[Hypers], Update]
    learned: dict[str, Any]
    averages: bool = False
    """Whether the outer loss reads the buffer ``average`` too."""

    def __str__(self) -> str:
        return self.name

    def hypers(self) -> Hypers:
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in self.learned.items()}


def body(b: Any, w: Any) -> dict[str, Any]:
    return {"b": b, "w": w}


def whole(b: Any, w: Any, h: Any) -> dict[str, Any]:
    return {"body": {"b": b, "w": w}, "head": {"h": h}}


_rates = [0.03, 0.08, 0.05, 0.1]
_adam = {"lr": 0.05, "beta": 0.8, "eps": 0.05}

COMPOSITIONS = [
    Composition(
        "clip by norm, momentum",
        lambda v: Clip(SGD(v["lr"], v["mu"], weight_decay=v["decay"]), max_norm=v["most"]),
        lambda v: clipped_norm(sgd(lr=v["lr"], momentum=v["mu"], weight_decay=v["decay"]), v["most"]),
        {"lr": 0.1, "mu": 0.7, "decay": 0.05, "most": 0.8},
    ),
    Composition(
        "clip by a scheduled norm, Adam with a scheduled lr",
        lambda v: Clip(Adam(Schedule(v["lr"]), (v["beta"], 0.9), v["eps"]), max_norm=Schedule(v["most"])),
        lambda v: clipped_norm(adam(lr=at(v["lr"]), betas=(v["beta"], 0.9), eps=v["eps"]), at(v["most"])),
        {**_adam, "lr": _rates, "most": [0.4, 0.9, 2.0, 0.3]},
    ),
    Composition(
        "clip by a tree of values, a tree of lrs",
        lambda v: Clip(SGD(whole(v["b"], v["w"], 0.1), momentum=0.5), value=whole(v["p"], v["q"], 0.2)),
        lambda v: clipped_value(
            sgd(lr=[v["b"], v["w"], 0.1], momentum=0.5), [v["p"], v["q"], torch.tensor(0.2, dtype=torch.float64)]
        ),
        {"b": 0.1, "w": [[0.1, 0.2, 0.15], [0.05, 0.1, 0.12]], "p": 0.3, "q": [[0.1, 0.3, 0.2], [0.5, 0.1, 0.2]]},
    ),
    Composition(
        "clip by norm around clip by value",
        lambda v: Clip(Clip(SGD(v["lr"]), value=v["value"]), max_norm=v["norm"]),
        lambda v: clipped_norm(clipped_value(sgd(lr=v["lr"]), [v["value"]] * 3), v["norm"]),
        {"lr": 0.2, "value": 0.15, "norm": 0.6},
    ),
    Composition(
        "groups: a tree for the part and Adam",
        lambda v: Groups(
            {"body": SGD(body(v["b"], v["w"]), v["mu"]), "head": Adam(v["lr"], (v["beta"], 0.9), v["eps"])}
        ),
        lambda v: grouped(
            ([0, 1], sgd(lr=[v["b"], v["w"]], momentum=v["mu"])),
            ([2], adam(lr=v["lr"], betas=(v["beta"], 0.9), eps=v["eps"])),
        ),
        {"b": 0.1, "w": [[0.1, 0.2, 0.15], [0.05, 0.1, 0.12]], "mu": 0.6, **_adam},
    ),
    Composition(
        "groups by a function, a tree like params and a schedule of trees",
        lambda v: Groups(
            lambda path: "vectors" if path.endswith((".b", ".h")) else "matrices",
            {
                "vectors": SGD(whole(v["b"], 9.0, v["h"]), momentum=Schedule(v["mu"])),
                "matrices": AdamW(Schedule({"w": v["w"]}), (0.7, 0.8), 0.05, v["decay"]),
            },
        ),
        lambda v: grouped(
            ([0, 2], sgd(lr=[v["b"], v["h"]], momentum=at(v["mu"]))),
            ([1], adamw(lr=at(v["w"]), betas=(0.7, 0.8), eps=0.05, weight_decay=v["decay"])),
        ),
        {"b": 0.1, "h": [[0.1], [0.05], [0.2]], "mu": [0.2, 0.5, 0.6, 0.3], "w": _rates, "decay": 0.1},
    ),
    Composition(
        "clip by norm around groups, and within one",
        lambda v: Clip(
            Groups({"body": Clip(SGD(v["lr"], v["mu"]), max_norm=v["body"]), "head": SGD(v["fast"])}), v["all"]
        ),
        lambda v: clipped_norm(
            grouped(([0, 1], clipped_norm(sgd(lr=v["lr"], momentum=v["mu"]), v["body"])), ([2], sgd(lr=v["fast"]))),
            v["all"],
        ),
        {"lr": 0.2, "mu": 0.5, "fast": 0.3, "body": 0.3, "all": 0.9},
    ),
    Composition(
        "L1 with a scheduled lr",
        lambda v: Proximal(SGD(Schedule(v["lr"]), weight_decay=v["decay"]), L1(v["strength"])),
        lambda v: then(
            sgd(lr=at(v["lr"]), weight_decay=v["decay"]),
            lambda ps, t: [soft(p, v["lr"][t - 1] * v["strength"]) for p in ps],
        ),
        {"lr": [0.1, 0.3, 0.2, 0.1], "decay": 0.1, "strength": 0.7},
    ),
    Composition(
        "L1 of a tree around groups with lrs of their own",
        lambda v: Proximal(
            Groups({"body": SGD(v["lr"]), "head": ProximalGD({"h": v["h"]}, v["pull"])}), L1(whole(v["s"], v["t"], 0.6))
        ),
        lambda v: then(
            grouped(
                ([0, 1], sgd(lr=v["lr"])),
                ([2], from_start(oracles.proximal_step, oracles.proximal_buffers, lr=v["h"], strength=v["pull"])),
            ),
            lambda ps, t: [soft(ps[0], v["lr"] * v["s"]), soft(ps[1], v["lr"] * v["t"]), soft(ps[2], v["h"] * 0.6)],
        ),
        {"lr": 0.2, "h": [[0.1], [0.05], [0.2]], "pull": 0.3, "s": 0.4, "t": [[0.4, 0.2, 1.0], [0.3, 0.8, 0.1]]},
    ),
    Composition(
        "groups of proxes: rows, a simplex, with momentum and clipping",
        lambda v: Groups(
            lambda path: path[-1],
            {
                "b": Proximal(Clip(SGD(v["lr"]), v["most"]), Simplex()),
                "w": Proximal(SGD(v["fast"], v["mu"]), GroupL1(v["strength"], axis=1)),
                "h": Proximal(SGD(v["lr"]), L2Ball(v["radius"])),
            },
        ),
        lambda v: grouped(
            ([0], then(clipped_norm(sgd(lr=v["lr"]), v["most"]), lambda ps, t: [on_simplex(ps[0][0])[None]])),
            ([2], then(sgd(lr=v["lr"]), lambda ps, t: in_ball(ps, v["radius"]))),
            (
                [1],
                then(
                    sgd(lr=v["fast"], momentum=v["mu"]),
                    lambda ps, t: [row_soft(p, v["fast"] * v["strength"]) for p in ps],
                ),
            ),
        ),
        {"lr": 0.3, "fast": 0.4, "most": 0.5, "mu": 0.5, "strength": 0.7, "radius": 0.6},
    ),
    Composition(
        "a box with learned bounds, then no negative numbers",
        lambda v: Proximal(
            Proximal(SGD(v["lr"]), Box(whole(v["low"], -0.3, -0.5), Schedule(v["high"]))), Nonnegative()
        ),
        lambda v: then(
            sgd(lr=v["lr"]),
            lambda ps, t: [
                torch.relu(torch.minimum(torch.maximum(p, low * torch.ones_like(p)), v["high"][t - 1]))
                for p, low in zip(ps, [v["low"], -0.3, -0.5], strict=True)
            ],
        ),
        {"lr": 0.3, "low": [[0.05, -0.1, 0.2]], "high": [0.8, 0.6, 0.7, 0.5]},
    ),
    Composition(
        "the ball of all leaves together",
        lambda v: Proximal(SGD(v["lr"], v["mu"]), L2Ball(Schedule(v["radius"]))),
        lambda v: then(sgd(lr=v["lr"], momentum=v["mu"]), lambda ps, t: in_ball(ps, v["radius"][t - 1])),
        {"lr": 0.2, "mu": 0.4, "radius": [1.5, 9.0, 1.4, 1.3]},
    ),
    Composition(
        "an average of iterates",
        lambda v: EMA(SGD(v["lr"], v["mu"]), whole(v["b"], v["w"], 0.5)),
        lambda v: averaged_leaves(sgd(lr=v["lr"], momentum=v["mu"]), [v["b"], v["w"], 0.5]),
        {"lr": 0.2, "mu": 0.4, "b": 0.6, "w": [[0.1, 0.2, 0.9], [0.5, 0.7, 0.3]]},
        averages=True,
    ),
    Composition(
        "look ahead with Adam",
        lambda v: Lookahead(Adam(v["lr"], (v["beta"], 0.9), v["eps"]), period=2, ratio=v["ratio"]),
        lambda v: ahead(adam(lr=v["lr"], betas=(v["beta"], 0.9), eps=v["eps"]), 2, v["ratio"]),
        {**_adam, "ratio": 0.4},
    ),
    Composition(
        "Muon",
        lambda v: Muon(v["lr"], v["decay"], v["mu"], True, (v["a"], v["b"], v["c"])),
        lambda v: muon(v["lr"], v["decay"], v["mu"], True, (v["a"], v["b"], v["c"])),
        {"lr": 0.1, "decay": 0.2, "mu": 0.7, "a": 3.4445, "b": -4.7750, "c": 2.0315},
    ),
    Composition(
        "everything: an average of look ahead of groups of Muon, clipped, and of L1",
        lambda v: EMA(
            Lookahead(
                Groups(
                    {
                        "body.w": Clip(Muon(v["slow"], momentum=v["mu"], adjust_lr_fn="match_rms_adamw"), v["most"]),
                        "body.b": Proximal(SGD(Schedule(v["lr"]), v["mu"]), L1(v["strength"])),
                        "head": AdamW({"h": v["h"]}, (0.7, 0.8), 0.05),
                    }
                ),
                period=3,
                ratio=whole(v["ratio"], 0.3, 0.8),
            ),
            v["decay"],
        ),
        lambda v: averaged(
            ahead_leaves(
                grouped(
                    ([1], clipped_norm(muon(v["slow"], momentum=v["mu"], rms=True), v["most"])),
                    (
                        [0],
                        then(
                            sgd(lr=at(v["lr"]), momentum=v["mu"]),
                            lambda ps, t: [soft(p, v["lr"][t - 1] * v["strength"]) for p in ps],
                        ),
                    ),
                    ([2], adamw(lr=v["h"], betas=(0.7, 0.8), eps=0.05, weight_decay=1e-2)),
                ),
                3,
                [v["ratio"], 0.3, 0.8],
            ),
            v["decay"],
        ),
        {
            "slow": 0.1,
            "mu": 0.6,
            "most": 0.4,
            "lr": [0.2, 0.1, 0.3, 0.2],
            "strength": 0.3,
            "h": [[0.1], [0.05], [0.2]],
            "ratio": [[0.4, 0.5, 0.6]],
            "decay": 0.7,
        },
        averages=True,
    ),
]


def from_start(step: Callable[..., Tensor], buffers: Callable[..., dict[str, Tensor]], **options: Any) -> Update:
    """A rule whose memory holds the initial params."""
    inner = leafwise(step, **options)

    def update(ps, gs, memory, t):
        for i, p in enumerate(ps):
            memory.setdefault(i, buffers(p))
        return inner(ps, gs, memory, t)

    return update


def averaged_leaves(inner: Update, decays: list[Any]) -> Update:
    def update(ps, gs, memory, t):
        before = memory.get("average", ps)
        after = inner(ps, gs, memory.setdefault("inner", {}), t)
        memory["average"] = [d * a + (1 - d) * p for d, a, p in zip(decays, before, after, strict=True)]
        return after

    return update


def ahead_leaves(inner: Update, period: int, ratios: list[Any]) -> Update:
    def update(ps, gs, memory, t):
        slow = memory.setdefault("slow", ps)
        fast = inner(ps, gs, memory.setdefault("inner", {}), t)
        if t % period:
            return fast
        memory["slow"] = [s + r * (f - s) for s, r, f in zip(slow, ratios, fast, strict=True)]
        return memory["slow"]

    return update


# -------------------------------------------------------------------------------------------------------- the problem


@dataclass(frozen=True)
class Setting:
    """A small network of three matrices with a weight for every example."""

    start: list[Tensor]
    weights: Tensor
    data: tuple[Tensor, Tensor]
    query: Tensor

    @staticmethod
    def random(seed: int) -> Setting:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        start = [normal(*shape) for shape in SHAPES.values()]
        return Setting(start, normal(4), (normal(4, 2), normal(4, 1)), normal(3, 2))

    @staticmethod
    def loss(params: dict[str, Any], weights: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        own, (x, y) = params["body"], data
        errors = (torch.tanh(x @ own["w"] + own["b"]) @ params["head"]["h"] - y).square().sum(-1)
        return (torch.sigmoid(weights) * errors).mean()

    def outer(self, ps: list[Tensor], query: Tensor) -> Tensor:
        return (torch.tanh(query @ ps[1] + ps[0]) @ ps[2]).square().mean() + sum(p.sin().sum() for p in ps)

    def inputs(self, case: Composition) -> list[Tensor]:
        """What a hypergradient is taken of: params, weights, data, hyperparameters."""
        return [*self.start, self.weights, *self.data, *case.hypers().values()]

    def value(self, case: Composition, inputs: list[Tensor], estimator: Any, query: Tensor, **options: Any) -> Tensor:
        """The outer loss by the library."""
        b, w, h, weights, x, y, *values = inputs
        hypers = dict(zip(case.learned, values, strict=True))
        solution = diffopt.solve(
            self.loss,
            whole(b, w, h),
            weights,
            (x, y),
            optimizer=case.make(hypers),
            steps=STEPS,
            estimator=estimator,
            **options,
        )
        ends = [solution.params, *([solution.state.buffers["average"]] if case.averages else [])]
        return sum(self.outer([e["body"]["b"], e["body"]["w"], e["head"]["h"]], query) for e in ends)

    def expected(self, case: Composition, inputs: list[Tensor], query: Tensor, curvature: float = 1.0) -> Tensor:
        """The outer loss by a plain loop; ``curvature`` is a factor on every second derivative of the inner loss."""
        b, w, h, weights, x, y, *values = inputs
        update, memory = case.oracle(dict(zip(case.learned, values, strict=True))), {}
        now = [b, w, h]
        for t in range(1, STEPS + 1):
            now = [p if p.requires_grad else p.detach().requires_grad_() for p in now]
            loss = self.loss(whole(*now), weights, (x, y))
            grads = torch.autograd.grad(loss, now, create_graph=True)
            now = update(now, [g.detach() + curvature * (g - g.detach()) for g in grads], memory, t)
        ends = [now, *([memory["average"]] if case.averages else [])]
        return sum(self.outer(end, query) for end in ends)


def gradient(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    made = [x.detach().clone().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(function(made), made, allow_unused=True, materialize_grads=True))


def kinds(held: Any) -> set[type]:
    """The classes of an optimizer and of all that it holds."""
    found = {type(held)}
    for field in fields(held):
        value = getattr(held, field.name)
        parts = value.values() if isinstance(value, dict) else [value]
        found = found.union(*(kinds(part) for part in parts if isinstance(part, diffopt.Optimizer | Prox)))
    return found
