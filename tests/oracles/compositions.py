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


def averaged(inner: Update, decays: list[Any]) -> Update:
    def update(ps, gs, memory, t):
        before = memory.get("average", ps)
        after = inner(ps, gs, memory.setdefault("inner", {}), t)
        memory["average"] = [d * a + (1 - d) * p for d, a, p in zip(decays, before, after, strict=True)]
        return after

    return update


def ahead(inner: Update, period: int, ratios: list[Any]) -> Update:
    def update(ps, gs, memory, t):
        slow = memory.setdefault("slow", ps)
        fast = inner(ps, gs, memory.setdefault("inner", {}), t)
        if t % period:
            return fast
        memory["slow"] = [(1 - r) * s + r * f for s, r, f in zip(slow, ratios, fast, strict=True)]
        return memory["slow"]

    return update


def from_start(step: Callable[..., Tensor], buffers: Callable[..., dict[str, Tensor]], **options: Any) -> Update:
    """A rule whose memory holds the initial params."""
    inner = leafwise(step, **options)

    def update(ps, gs, memory, t):
        for i, p in enumerate(ps):
            memory.setdefault(i, buffers(p))
        return inner(ps, gs, memory, t)

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
    """An optimizer and its oracle, both made of the hyperparameters, which are all learned."""

    name: str
    made: Callable[..., tuple[diffopt.Optimizer, Update]]
    learned: dict[str, Any]
    averages: bool = False
    """Whether the outer loss reads the buffer ``average`` too."""

    def __str__(self) -> str:
        return self.name

    def hypers(self) -> Hypers:
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in self.learned.items()}


COMPOSITIONS: list[Composition] = []


def composition(averages: bool = False, **learned: Any) -> Callable[[Any], Any]:
    """A function that makes an optimizer and its oracle goes into the table, with the values of what it is given."""

    def entered(made: Any) -> Any:
        COMPOSITIONS.append(Composition(made.__name__, made, learned, averages))
        return made

    return entered


def body(b: Any, w: Any) -> dict[str, Any]:
    return {"b": b, "w": w}


def whole(b: Any, w: Any, h: Any) -> dict[str, Any]:
    return {"body": {"b": b, "w": w}, "head": {"h": h}}


RATES, COLUMN = [0.03, 0.08, 0.05, 0.1], [[0.1], [0.05], [0.2]]
MATRIX = [[0.1, 0.2, 0.15], [0.05, 0.1, 0.12]]


@composition(lr=0.1, mu=0.7, decay=0.05, most=0.8)
def clip_by_norm_with_momentum(lr, mu, decay, most):
    options = {"lr": lr, "momentum": mu, "weight_decay": decay}
    return Clip(SGD(**options), max_norm=most), clipped_norm(sgd(**options), most)


@composition(lr=RATES, beta=0.8, eps=0.05, most=[0.4, 0.9, 2.0, 0.3])
def clip_by_a_scheduled_norm_adam_with_a_scheduled_lr(lr, beta, eps, most):
    made = Clip(Adam(Schedule(lr), (beta, 0.9), eps), max_norm=Schedule(most))
    return made, clipped_norm(adam(lr=at(lr), betas=(beta, 0.9), eps=eps), at(most))


@composition(b=0.1, w=MATRIX, p=0.3, q=[[0.1, 0.3, 0.2], [0.5, 0.1, 0.2]])
def clip_by_a_tree_of_values_a_tree_of_lrs(b, w, p, q):
    made = Clip(SGD(whole(b, w, 0.1), momentum=0.5), value=whole(p, q, 0.2))
    return made, clipped_value(sgd(lr=[b, w, 0.1], momentum=0.5), [p, q, torch.tensor(0.2, dtype=torch.float64)])


@composition(lr=0.2, value=0.15, norm=0.6)
def clip_by_norm_around_clip_by_value(lr, value, norm):
    return Clip(Clip(SGD(lr), value=value), max_norm=norm), clipped_norm(clipped_value(sgd(lr=lr), [value] * 3), norm)


@composition(b=0.1, w=MATRIX, mu=0.6, lr=0.05, beta=0.8, eps=0.05)
def groups_of_a_tree_for_the_part_and_adam(b, w, mu, lr, beta, eps):
    of_head = adam(lr=lr, betas=(beta, 0.9), eps=eps)
    made = Groups({"body": SGD(body(b, w), mu), "head": Adam(lr, (beta, 0.9), eps)})
    return made, grouped(([0, 1], sgd(lr=[b, w], momentum=mu)), ([2], of_head))


@composition(b=0.1, h=COLUMN, mu=[0.2, 0.5, 0.6, 0.3], w=RATES, decay=0.1)
def groups_by_a_function_a_tree_like_params_and_a_schedule_of_trees(b, h, mu, w, decay):
    vectors = SGD(whole(b, 9.0, h), momentum=Schedule(mu))
    matrices = AdamW(Schedule({"w": w}), (0.7, 0.8), 0.05, decay)
    by = lambda path: "vectors" if path.endswith((".b", ".h")) else "matrices"  # noqa: E731
    of_matrices = adamw(lr=at(w), betas=(0.7, 0.8), eps=0.05, weight_decay=decay)
    oracle = grouped(([0, 2], sgd(lr=[b, h], momentum=at(mu))), ([1], of_matrices))
    return Groups(by, {"vectors": vectors, "matrices": matrices}), oracle


@composition(lr=0.2, mu=0.5, fast=0.3, part=0.3, most=0.9)
def clip_by_norm_around_groups_and_within_one(lr, mu, fast, part, most):
    made = Clip(Groups({"body": Clip(SGD(lr, mu), max_norm=part), "head": SGD(fast)}), most)
    of_body = clipped_norm(sgd(lr=lr, momentum=mu), part)
    return made, clipped_norm(grouped(([0, 1], of_body), ([2], sgd(lr=fast))), most)


@composition(lr=[0.1, 0.3, 0.2, 0.1], decay=0.1, strength=0.7)
def l1_with_a_scheduled_lr(lr, decay, strength):
    made = Proximal(SGD(Schedule(lr), weight_decay=decay), L1(strength))
    return made, then(sgd(lr=at(lr), weight_decay=decay), lambda ps, t: [soft(p, lr[t - 1] * strength) for p in ps])


@composition(lr=0.2, h=COLUMN, pull=0.3, s=0.4, t=[[0.4, 0.2, 1.0], [0.3, 0.8, 0.1]])
def l1_of_a_tree_around_groups_with_lrs_of_their_own(lr, h, pull, s, t):
    made = Proximal(Groups({"body": SGD(lr), "head": ProximalGD({"h": h}, pull)}), L1(whole(s, t, 0.6)))
    of_head = from_start(oracles.proximal_step, oracles.proximal_buffers, lr=h, strength=pull)

    def shrunk(ps, step):
        return [soft(ps[0], lr * s), soft(ps[1], lr * t), soft(ps[2], h * 0.6)]

    return made, then(grouped(([0, 1], sgd(lr=lr)), ([2], of_head)), shrunk)


@composition(lr=0.3, fast=0.4, most=0.5, mu=0.5, strength=0.7, radius=0.6)
def groups_of_proxes_rows_a_simplex_with_momentum_and_clipping(lr, fast, most, mu, strength, radius):
    made = {
        "b": Proximal(Clip(SGD(lr), most), Simplex()),
        "w": Proximal(SGD(fast, mu), GroupL1(strength, axis=1)),
        "h": Proximal(SGD(lr), L2Ball(radius)),
    }
    of_b = then(clipped_norm(sgd(lr=lr), most), lambda ps, t: [on_simplex(ps[0][0])[None]])
    of_w = then(sgd(lr=fast, momentum=mu), lambda ps, t: [row_soft(p, fast * strength) for p in ps])
    of_h = then(sgd(lr=lr), lambda ps, t: in_ball(ps, radius))
    return Groups(lambda path: path[-1], made), grouped(([0], of_b), ([2], of_h), ([1], of_w))


@composition(lr=0.3, low=[[0.05, -0.1, 0.2]], high=[0.8, 0.6, 0.7, 0.5])
def a_box_with_learned_bounds_then_no_negative_numbers(lr, low, high):
    made = Proximal(Proximal(SGD(lr), Box(whole(low, -0.3, -0.5), Schedule(high))), Nonnegative())

    def boxed(ps, t):
        pairs = zip(ps, [low, -0.3, -0.5], strict=True)
        return [torch.relu(torch.minimum(torch.maximum(p, x * torch.ones_like(p)), high[t - 1])) for p, x in pairs]

    return made, then(sgd(lr=lr), boxed)


@composition(lr=0.2, mu=0.4, radius=[1.5, 9.0, 1.4, 1.3])
def the_ball_of_all_leaves_together(lr, mu, radius):
    made = Proximal(SGD(lr, mu), L2Ball(Schedule(radius)))
    return made, then(sgd(lr=lr, momentum=mu), lambda ps, t: in_ball(ps, radius[t - 1]))


@composition(averages=True, lr=0.2, mu=0.4, b=0.6, w=[[0.1, 0.2, 0.9], [0.5, 0.7, 0.3]])
def an_average_of_iterates(lr, mu, b, w):
    return EMA(SGD(lr, mu), whole(b, w, 0.5)), averaged(sgd(lr=lr, momentum=mu), [b, w, 0.5])


@composition(lr=0.05, beta=0.8, eps=0.05, ratio=0.4)
def look_ahead_with_adam(lr, beta, eps, ratio):
    made = Lookahead(Adam(lr, (beta, 0.9), eps), period=2, ratio=ratio)
    return made, ahead(adam(lr=lr, betas=(beta, 0.9), eps=eps), 2, [ratio] * 3)


@composition(lr=0.1, decay=0.2, mu=0.7, a=3.4445, b=-4.7750, c=2.0315)
def muon_with_all_learned(lr, decay, mu, a, b, c):
    return Muon(lr, decay, mu, True, (a, b, c)), muon(lr, decay, mu, True, (a, b, c))


@composition(
    **{"slow": 0.1, "mu": 0.6, "most": 0.4, "lr": [0.2, 0.1, 0.3, 0.2], "strength": 0.3, "h": COLUMN},
    **{"ratio": [[0.4, 0.5, 0.6]], "decay": 0.7, "averages": True},
)
def everything(slow, mu, most, lr, strength, h, ratio, decay):
    """An average of look ahead of groups of Muon, clipped, and of L1."""
    parts = {
        "body.w": Clip(Muon(slow, momentum=mu, adjust_lr_fn="match_rms_adamw"), most),
        "body.b": Proximal(SGD(Schedule(lr), mu), L1(strength)),
        "head": AdamW({"h": h}, (0.7, 0.8), 0.05),
    }
    of_w = clipped_norm(muon(slow, momentum=mu, rms=True), most)
    of_b = then(sgd(lr=at(lr), momentum=mu), lambda ps, t: [soft(p, lr[t - 1] * strength) for p in ps])
    of_head = adamw(lr=h, betas=(0.7, 0.8), eps=0.05, weight_decay=1e-2)
    made = EMA(Lookahead(Groups(parts), period=3, ratio=whole(ratio, 0.3, 0.8)), decay)
    oracle = ahead(grouped(([1], of_w), ([0], of_b), ([2], of_head)), 3, [ratio, 0.3, 0.8])
    return made, averaged(oracle, [decay] * 3)


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
        optimizer, _ = case.made(**dict(zip(case.learned, values, strict=True)))
        options.update(optimizer=optimizer, steps=STEPS, estimator=estimator)
        solution = diffopt.solve(self.loss, whole(b, w, h), weights, (x, y), **options)
        ends = [solution.params, *([solution.state.buffers["average"]] if case.averages else [])]
        return sum(self.outer([e["body"]["b"], e["body"]["w"], e["head"]["h"]], query) for e in ends)

    def expected(self, case: Composition, inputs: list[Tensor], query: Tensor, curvature: float = 1.0) -> Tensor:
        """The outer loss by a plain loop; ``curvature`` is a factor on every second derivative of the inner loss."""
        b, w, h, weights, x, y, *values = inputs
        (_, update), memory = case.made(**dict(zip(case.learned, values, strict=True))), {}
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
