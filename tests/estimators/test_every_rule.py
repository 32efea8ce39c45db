"""Every estimator, for every optimizer and every kind of meta-parameter, plain and under vmap, against dense matrices.

Inner problems are small networks, whose curvature changes with the step and its batch, and quadratics with another
random matrix at every step, definite or indefinite. The oracle (``blocks.py``) shares no code with the estimators.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import blocks as oracle
import pytest
import torch
from blocks import Blocks, blocks
from cases import OPTIMIZERS, OptimizerCase, hypergradient, small_network
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import relative_error
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt.errors import EstimatorError
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    Estimator,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.linear_solve import Dense

# Round-off of products of a few matrices of norm 1, over the floor 1e-6 of relative_error; least squares and linear
# systems lose up to their condition number of it.
ROUND_OFF = 1e-8


@dataclasses.dataclass(frozen=True)
class Bowls:
    """``w' H_t w / 2 - w' (b + c_t)``: ``b`` is the loss's argument, the batch of step ``t`` is ``H_t, c_t``."""

    params: list[Tensor]
    weights: Tensor
    batches: tuple[Tensor, Tensor]
    query: Tensor

    @staticmethod
    def loss(params: list[Tensor], weights: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        w, (h, c) = torch.cat([p.flatten() for p in params]), batch
        return w @ h @ w / 2 - w @ (weights + c)

    def outer_loss(self, params: list[Tensor]) -> Tensor:
        return (torch.cat([p.flatten() for p in params]) - self.query).square().sum()


def bowls(seed: int, steps: int, lowest: float) -> Bowls:
    """Eigenvalues between ``lowest`` and 1.5."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    bases = torch.linalg.qr(normal(steps, 5, 5))[0]
    eigenvalues = lowest + (1.5 - lowest) * torch.rand(steps, 1, 5, generator=g, dtype=torch.float64)
    hessians = (bases * eigenvalues) @ bases.mT
    return Bowls([normal(3), normal(1, 2)], normal(5), ((hessians + hessians.mT) / 2, normal(steps, 5)), normal(5))


PROBLEMS: dict[str, Callable[[int, int], Any]] = {
    "network": small_network,
    "definite": lambda seed, steps: bowls(seed, steps, 0.1),
    "indefinite": lambda seed, steps: bowls(seed, steps, -1.0),
}
Rules = dict[str, tuple[Estimator, int, Callable[[Blocks], list[Tensor]]]]


def estimators(T: int, L: int) -> Rules:
    """By name: the estimator, how many updates share a gradient in its dynamics, and its answer."""

    def exact(b: Blocks) -> list[Tensor]:
        return oracle.swept(b, b.T)

    krylov = exact if L >= T else lambda b: oracle.minimal_residual(b, L)
    window = min(T, L + 1)
    return {
        "Reverse, graph": (Reverse("graph"), 1, exact),
        "Reverse, every state": (Reverse(1), 1, exact),
        "Reverse, every second state": (Reverse(2), 1, exact),
        "Unrolled": (Unrolled(), 1, exact),
        "ForwardMode": (ForwardMode(), 1, exact),
        "Truncated": (Truncated(L), 1, lambda b: oracle.swept(b, L)),
        "FirstOrder": (FirstOrder(), 1, oracle.first_order),
        "Reptile": (Reptile(), 1, oracle.reptile),
        "Binomial": (Binomial(L), 1, lambda b: oracle.enumerated(b, L)),
        "Binomial, window and scale": (Binomial(L, window, 0.5, 2), 1, lambda b: oracle.enumerated(b, L, window, 0.5)),
        "Krylov": (Krylov(L), 1, krylov),
        "MultiStep": (MultiStep(2), 2, exact),
        "MultiStep, Truncated": (MultiStep(2, Truncated(1, 1)), 2, lambda b: oracle.swept(b, 1)),
        "MultiStep, Binomial": (MultiStep(2, Binomial(1)), 2, lambda b: oracle.enumerated(b, 1)),
        "MultiStep, Krylov": (MultiStep(2, Krylov(1, chunk_size=1)), 2, lambda b: oracle.enumerated(b, 1)),
        "Implicit": (Implicit(Dense(throw=False)), 1, lambda b: oracle.at_the_fixed_point(b, range)[0]),
    }


NAMES = list(estimators(2, 1))


def merged(found: list[Tensor], params: int) -> list[Tensor]:
    """Params as one vector, and hyperparameters as another."""
    vectors = [x.reshape(-1) for x in found]
    return [torch.cat(vectors[:params]), *found[params : params + 3], torch.cat(vectors[params + 3 :])]


def plain(tasks: list[Any], case: OptimizerCase, steps: int, estimator: Estimator) -> list[list[Tensor]]:
    """Each task's hypergradient, by a call of its own."""
    return [merged(hypergradient(task, case, steps, estimator), len(task.params)) for task in tasks]


def batched(tasks: list[Any], case: OptimizerCase, steps: int, estimator: Estimator) -> list[list[Tensor]]:
    """Each task's hypergradient, all of them at once; they share the hyperparameters and the loss's argument."""

    def one(params: list[Tensor], weights: Tensor, x: Tensor, y: Tensor, hypers: dict[str, Tensor]) -> Tensor:
        optimizer = case.optimizer(hypers)
        options = {"optimizer": optimizer, "steps": steps, "batches": (x, y), "estimator": estimator}
        return tasks[0].outer_loss(diffopt.solve(tasks[0].loss, params, weights, **options).params)

    params = [torch.stack(leaves) for leaves in zip(*(task.params for task in tasks), strict=True)]
    x, y = (torch.stack(halves, dim=1) for halves in zip(*(task.batches for task in tasks), strict=True))
    hypers = {k: torch.tensor(v, dtype=torch.float64) for k, v in case.learned.items()}
    per_task = vmap(grad(one, argnums=(0, 1, 2, 3, 4)), in_dims=(0, None, 1, 1, None))
    leaves, weights, *halves, by_hypers = per_task(params, tasks[0].weights, x, y, hypers)
    found = [*leaves, weights, *halves, *by_hypers.values()]
    return [merged([f[i] for f in found], len(params)) for i in range(len(tasks))]


def some_tasks(kind: str, seed: int, steps: int) -> list[Any]:
    """Two tasks that share the loss's argument and the outer loss."""
    first, second = (PROBLEMS[kind](seed + i, steps) for i in range(2))
    return [first, dataclasses.replace(second, weights=first.weights, query=first.query)]


@functools.cache
def known_blocks(number: int) -> dict[int, list[Blocks]]:
    """The oracle's matrices for an optimizer, by window, once for both ways."""
    tasks = some_tasks("network", 71, 4)
    return {window: [blocks(task, OPTIMIZERS[number], 4, window) for task in tasks] for window in (1, 2)}


WAYS = [(plain, case) for case in OPTIMIZERS[::2]] + [(batched, case) for case in OPTIMIZERS[1::4]]
MORE = [(way, case) for way in (plain, batched) for case in OPTIMIZERS if (way, case) not in WAYS]


@pytest.mark.parametrize(
    ("way", "case"),
    [*WAYS, *[pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE]],
    ids=lambda x: "vmap" if x is batched else getattr(x, "name", "plain"),
)
def test_every_optimizer_with_every_estimator(way, case):
    steps, order = 4, 2
    tasks, known = some_tasks("network", 71, steps), known_blocks(OPTIMIZERS.index(case))
    for name, (estimator, window, answer) in estimators(steps, order).items():
        if name == "Implicit" and case.name == "adamw":  # whose decay depends on buffers that are held fixed
            with pytest.raises(EstimatorError, match="whole_state"):
                way(tasks, case, steps, estimator)
            continue
        for got, b in zip(way(tasks, case, steps, estimator), known[window], strict=True):
            assert relative_error(got, answer(b)) < ROUND_OFF, name


KIND_AND_WAY = {"kind": st.sampled_from(list(PROBLEMS)), "way": st.sampled_from([plain, batched])}
ANY = {**KIND_AND_WAY, "case": st.sampled_from(OPTIMIZERS), "seed": st.integers(0, 2**31)}
STEPS_AND_ORDER = st.tuples(st.integers(1, 5), st.integers(0, 5)).filter(lambda s: s[1] <= s[0])
WITH_MOMENTUM = [case for case in OPTIMIZERS if case.name in {"momentum", "dampened", "nesterov", "ascent"}]


@given(name=st.sampled_from(NAMES), sizes=STEPS_AND_ORDER, **ANY)
def test_random_problems(kind, case, name, way, sizes, seed):
    steps, order = sizes
    assume(name != "Implicit" or case.name != "adamw")  # which is refused
    estimator, window, answer = estimators(steps, order)[name]
    tasks = some_tasks(kind, seed, steps)
    for got, task in zip(way(tasks, case, steps, estimator), tasks, strict=True):
        b = blocks(task, case, steps, window)
        assume(name != "Implicit" or oracle.at_the_fixed_point(b, range)[1] < 1e6)
        assert relative_error(got, answer(b)) < ROUND_OFF


@given(**{**ANY, "case": st.sampled_from(WITH_MOMENTUM)})
def test_the_whole_state_of_momentum(kind, case, way, seed):
    estimator = Implicit(Dense(throw=False), whole_state=True)
    tasks = some_tasks(kind, seed, 3)
    for got, task in zip(way(tasks, case, 3, estimator), tasks, strict=True):
        answer, condition = oracle.at_the_fixed_point(blocks(task, case, 3), lambda params: range(2 * params))
        assume(condition < 1e6)
        assert relative_error(got, answer) < ROUND_OFF


@given(**ANY)
def test_directions_that_are_a_full_frame(kind, case, way, seed):
    estimator = ESJacobian(10_000, 1e-5, generator=torch.Generator().manual_seed(0))
    tasks = some_tasks(kind, seed, 2)
    for got, task in zip(way(tasks, case, 2, estimator), tasks, strict=True):
        b = blocks(task, case, 2)
        got, answer = (torch.cat([x.reshape(-1) for x in tensors]) for tensors in (got, oracle.swept(b, 2)))
        # radius**2 of third derivatives, which are up to some thousand times the first; round-off 1e-16 / 1e-5
        assert float((got - answer).norm()) < 1e-5 * float(answer.norm())
