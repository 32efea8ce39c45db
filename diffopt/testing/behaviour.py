"""What an estimator claims besides its numbers: repeatability, reports, work not done, no side effects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from diffopt.adjoint.claims import KINDS, Kind
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import MissingDerivativeError, RandomnessError, SecondDerivativeError
from diffopt.reports import Finding
from diffopt.rollout.record import Counts
from diffopt.testing.counting_losses import Tally, noisy, once_differentiable, spied
from diffopt.testing.estimator_case import EstimatorCase
from diffopt.testing.findings import above, at_most, decided, equal, holds, raises
from diffopt.testing.problem import Point, distance, flat, gradient, leaves, outer_loss

_STATE = "check what a call leaves behind for the next one: caches, warm starts, counters"


def repeatability(case: EstimatorCase) -> Iterator[Finding]:
    """An estimator that is not random repeats itself to the bit, whatever ran between; a random one by its seed."""
    if case.claims.random:
        one, other = case.gradient(), case.gradient()
        yield at_most("the same seed: the same numbers", distance(one, other), 0.0, _STATE)
        estimator = case.seeded()
        value = partial(case.setting.value, estimator)
        one, other = (gradient(value, case.point, case.claims.inputs) for _ in range(2))
        yield above("other draws: other numbers", distance(one, other), 0.0, "declare random=False: it repeats itself")
        return
    torch.manual_seed(1)
    value = partial(case.setting.value, case.estimator)
    gradient(value, case.setting.point(7), case.claims.inputs)
    error = distance(gradient(value, case.point, case.claims.inputs), case.found)
    yield at_most("repeats itself to the bit", error, 0.0, f"declare random=True if it draws numbers; {_STATE}")
    made = leaves(case.point, case.claims.inputs)
    wanted = [x for x in flat(made) if x.requires_grad]
    loss = value(made)
    first = torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
    second = torch.autograd.grad(loss, wanted, materialize_grads=True)
    error = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
    yield at_most("a second backward pass agrees", error, case.claims.tolerance, _STATE)


def side_effects(case: EstimatorCase) -> Iterator[Finding]:
    """Inputs, ``.grad``, the modes of autograd and torch's generator are as they were."""
    made = leaves(case.point, case.claims.inputs)
    before = [x.detach().clone() for x in flat(made)]
    estimator, state = case.seeded(), torch.get_rng_state()
    value = case.setting.value(estimator, made)
    torch.autograd.grad(value, [x for x in flat(made) if x.requires_grad], materialize_grads=True)
    same = all(torch.equal(a, b) and b._version == 0 for a, b in zip(before, flat(made), strict=True))
    yield holds("leaves its inputs alone", same, "avoid operations in place")
    yield holds("writes no .grad", all(x.grad is None for x in flat(made)), "leave out calls of .backward()")
    if not case.claims.random:
        drawn = not torch.equal(state, torch.get_rng_state())
        yield holds("draws nothing from torch's generator", not drawn, "declare random=True, or draw nothing")


def random_losses(case: EstimatorCase) -> Iterator[Finding]:
    """An exact estimator draws a loss's random numbers again as they were, or refuses such a loss."""
    if case.claims.exact != "always" or case.claims.random or case.claims.own_steps:
        return
    setting = replace(case.setting, loss=noisy)
    torch.manual_seed(0)
    expected = gradient(lambda point: outer_loss(setting.by_hand(point)), case.point)
    stream = torch.get_rng_state()
    claim, fix = "a loss with dropout: exact or refused", "check the numbers drawn in the backward pass (record.replay)"
    try:
        found = case.gradient(setting)
    except RandomnessError as error:
        yield decided(claim, True, type(error).__name__, "exact or RandomnessError", fix)
        return
    yield at_most(claim, distance(found, expected, case.claims.inputs), case.claims.tolerance, fix)
    same = torch.equal(stream, torch.get_rng_state())
    yield holds("a loss with dropout: the generator moves on as in a loop", same, fix)


def second_derivatives(case: EstimatorCase) -> Iterator[Finding]:
    """A loss without second derivatives is differentiated, or refused."""
    setting = replace(case.setting, loss=once_differentiable)
    if case.claims.second_derivatives:
        fix = "check that a missing second derivative is noticed, or declare second_derivatives=False"
        claim = "refuses a loss without second derivatives"
        yield raises(claim, MissingDerivativeError, lambda: case.gradient(setting), fix)
    else:
        error = distance(case.gradient(setting), case.found, case.claims.inputs)
        fix = "take no second derivatives of the loss, or declare second_derivatives=True"
        yield at_most("needs no second derivatives", error, case.claims.tolerance, fix)


def second_order(case: EstimatorCase) -> Iterator[Finding]:
    """The hypergradient is differentiated again, or that is refused."""
    if not case.claims.twice:
        fix = "check for operations that autograd records in the backward pass; or declare twice=True"
        yield raises("refuses to be differentiated twice", SecondDerivativeError, lambda: _twice(case), fix)
        return
    slope = _total(_twice(case))
    high, low = (_total(case.gradient(point=_moved(case.point, case.claims.inputs, step))) for step in (1e-5, -1e-5))
    error = abs(slope - (high - low) / 2e-5) / abs(slope)
    yield at_most("its derivative is that of central differences", error, 1e-6, "check what of run() autograd records")


def _twice(case: EstimatorCase) -> Point:
    """The derivative of the sum of the hypergradient's entries."""

    def total(point: Point) -> Tensor:
        wanted = [x for x in flat(point) if x.requires_grad]
        value = case.setting.value(case.seeded(), point)
        found = torch.autograd.grad(value, wanted, create_graph=True, materialize_grads=True)
        return torch.stack([g.sum() for g in found]).sum()

    return gradient(total, case.point, case.claims.inputs)


def _total(point: Point) -> float:
    return sum(float(x.sum()) for x in flat(point))


def _moved(point: Point, kinds: frozenset[Kind], step: float) -> Point:
    return {kind: tuple(x + step if kind in kinds else x for x in point[kind]) for kind in KINDS}


def reports(case: EstimatorCase) -> Iterator[Finding]:
    """Counts are those that the loss saw; what is stored is no less than what stays alive."""
    tally = Tally()
    setting, made = replace(case.setting, loss=tally.loss), leaves(case.point, case.claims.inputs)
    solution = setting.solve(case.seeded(), made)
    value = outer_loss([solution.params[name] for name in setting.names])
    tally.forget(made["init"])
    alive, kept = tally.bytes_alive(), solution.kept
    tally.remember(solution.params.values())
    torch.autograd.grad(value, [x for x in flat(made) if x.requires_grad], materialize_grads=True)
    tally.forget(made["init"])  # the first step, taken again
    counts = solution.counts
    if not case.claims.reports:
        told = (counts.gradients, counts.products, counts.depth, kept.states, kept.bytes)
        yield equal("reports nothing", told, (0,) * 5, "declare reports=True, or leave counts and kept at zero")
        return
    yield from _counted(counts, tally)
    fix = "check what is stored besides the record"
    yield at_most("bytes of states that outlive the rollout: reported", alive, kept.bytes, fix)
    del solution, value
    gc.collect()
    yield at_most("bytes of states that outlive the backward pass", tally.bytes_alive(), 0, fix)


def _counted(counts: Counts, tally: Tally) -> Iterator[Finding]:
    """Every batch of products that the loss saw counts, without what it was padded with; a product takes a gradient."""
    fix = "check record.counts: add_products for each batch of products, gradients for each evaluation"
    gradients, products, batches = tally.gradients, tally.products, tally.depth
    claim = "products: one per batch that the loss saw at least, all in them at most"
    yield _between(claim, counts.products, batches, products, fix)
    claim = "depth: the batches that the loss saw, or fewer if some need not wait"
    yield _between(claim, counts.depth, min(1, batches), batches, fix)
    claim = "gradients: those that the loss saw, but for one per product"
    yield _between(claim, counts.gradients, gradients - products, gradients, fix)


def _between(claim: str, measured: int, low: int, high: int, fix: str) -> Finding:
    return decided(claim, low <= measured <= high, measured, f"{low} to {high}", fix)


def work(case: EstimatorCase) -> Iterator[Finding]:
    """What nobody wants is not computed."""
    tally, _ = _work(case, frozenset())
    fix = "check what is computed where nothing requires grad"
    yield at_most("no input wanted: gradients", tally.gradients, case.setting.steps, fix)
    yield at_most("no input wanted: products", tally.products, 0, fix)
    for kind in sorted(case.claims.inputs):
        tally, idle = _work(case, frozenset({kind}))
        fix = f"leave out terms that are computed although only {kind} wants a hypergradient (trajectory.wanted)"
        yield at_most(f"only {kind} wanted: terms for others", idle, 0, fix)
        if kind in ("init", "hyperparameters"):
            yield at_most(f"only {kind} wanted: derivatives in what the loss reads", tally.read, 0, fix)


def _work(case: EstimatorCase, kinds: frozenset[Kind]) -> tuple[Tally, int]:
    """What the loss saw while a hypergradient for these kinds was computed, and how many terms nobody had asked for."""
    tally, seen = Tally(), list[tuple[Trajectory, Cotangents]]()
    setting, made = replace(case.setting, loss=tally.loss), leaves(case.point, kinds)
    value = setting.value(spied(case.seeded(), seen), made)
    if kinds:
        torch.autograd.grad(value, [x for x in flat(made) if x.requires_grad], materialize_grads=True)
    return tally, sum(len(set(result.direct) - set(trajectory.wanted)) for trajectory, result in seen)
