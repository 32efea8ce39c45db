"""Estimators that are not what they claim to be, each with the finding that must say so."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from diffopt.claims import ALL_INPUTS
from diffopt.errors import GradModeError, MissingDerivativeError
from diffopt.estimators import (
    Adjoint,
    Claims,
    Cotangents,
    ESJacobian,
    Estimator,
    FirstOrder,
    Implicit,
    Keep,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.leaves import Leaves

EXACT, BIASED = Claims(), Claims("never")


@dataclass(frozen=True)
class Saying(Estimator):
    """A shipped rule that claims something else."""

    rule: Estimator
    said: Claims

    def claims(self, steps):
        return self.said

    def run(self, problem):
        return self.rule.run(problem)


def saying(rule, **other):
    return Saying(rule, replace(rule.claims(4), **other))


@dataclass(frozen=True)
class Changed(Adjoint):
    """The exact rule with its input or its result changed; ``checkpoint`` as in Reverse."""

    after: Callable = lambda trajectory, result: result
    before: Callable = lambda trajectory, cotangent: cotangent
    said: Claims = EXACT
    checkpoint: object = "graph"

    def claims(self, steps):
        return self.said

    def keep(self, steps):
        return Keep(1, self.checkpoint)

    def pullback(self, trajectory, cotangent):
        return self.after(trajectory, trajectory.sweep(self.before(trajectory, cotangent)))


def scaled(result, factor):
    initial = None if result.initial is None else factor * result.initial
    return Cotangents(initial, {i: factor * x for i, x in result.extras.items()})


def negated(trajectory, result):
    return scaled(result, -1.0)


def without_hyperparameters(trajectory, result):
    start = trajectory.dynamics.hyperparameters_start
    return Cotangents(result.initial, {i: x for i, x in result.extras.items() if i < start})


def without_last_batch(trajectory, result):
    extras = dict(result.extras)
    for i in extras:
        if trajectory.dynamics.stepped[i]:
            extras[i] = extras[i].clone()
            trajectory.dynamics.slice_at(i, extras[i], trajectory.steps).zero_()
    return Cotangents(result.initial, extras)


def in_half(trajectory, result):
    if trajectory.final[0].dtype != torch.float32:
        return result
    halves = {i: x.half().float() * 1.01 for i, x in result.extras.items()}
    return Cotangents(result.initial, halves)


def in_single(trajectory, result):
    return Cotangents(result.initial, {i: x.float() for i, x in result.extras.items()})


def in_double(trajectory, result):
    return Cotangents(result.initial, {i: x.double() for i, x in result.extras.items()})


def by_company(trajectory, result):
    return scaled(result, 1 / (1 + len(trajectory.wanted)))


def with_unwanted(trajectory, result):
    zeros = {i: torch.zeros_like(x) for i, x in enumerate(trajectory.extras) if x.is_floating_point()}
    return Cotangents(result.initial, zeros | result.extras)


def first_leaf_doubled(trajectory, result):
    if result.initial is None:
        return result
    return Cotangents(Leaves([2 * result.initial[0], *result.initial[1:]]), result.extras)


def wrong_for_adam(trajectory, result):
    buffers = dict(trajectory.dynamics.buffers_layout)
    return scaled(result, 0.5) if "square" in buffers else result


def noisy(trajectory, result):
    return scaled(result, 1 + 0.01 * float(torch.randn(())))


def noisy_for_all_tasks(trajectory, result):
    return scaled(result, 1 + 0.1 * float(torch.randn(())))


def very_noisy(trajectory, result):
    return scaled(result, 1 + 100 * float(torch.randn(())))


def once(trajectory, result):
    """Right the first time; the diagnostics survive until the next."""
    if "done" in trajectory.record.diagnostics:
        return scaled(result, 0.5)
    trajectory.record.diagnostics["done"] = torch.ones(())
    return result


def by_the_clock(trajectory, result):
    return scaled(result, 1 + 0.01 * random.gauss(0, 1))


def overcounting(trajectory, result):
    trajectory.record.counts.products += 1
    return result


def too_deep(trajectory, result):
    trajectory.record.counts.depth += 1
    return result


def undercounting(trajectory, result):
    trajectory.record.counts.gradients += 50
    return result


def writing(trajectory, result):
    trajectory.extras[1].add_(1.0)  # the argument that the loss does not read
    return result


def writing_grad(trajectory, result):
    trajectory.extras[1].grad = torch.zeros_like(trajectory.extras[1])
    return result


def constant_added(trajectory, result):
    initial = None if result.initial is None else result.initial + 1.0
    return Cotangents(initial, result.extras)


def clipped(trajectory, cotangent):
    return cotangent.map(lambda x: x.clamp(-0.1, 0.1))


def normalised_by_leaf(trajectory, cotangent):
    count = trajectory.dynamics.params_count
    return Leaves([*(x / x.norm() for x in cotangent[:count]), *cotangent[count:]])


def normalised_over_all_tasks(trajectory, cotangent):
    return cotangent.map(lambda x: x / (1 + x.square().sum()))


LEAKED: list = []


def leaking(trajectory, result):
    LEAKED.append(trajectory.final)
    return result


@dataclass(frozen=True)
class ShortSweep(Adjoint):
    """Forgets the first step's Jacobian, and says it is exact."""

    def keep(self, steps):
        return Keep(1, "graph")

    def pullback(self, trajectory, cotangent):
        return trajectory.sweep(cotangent, first=2)


class WarmStarted(Adjoint):
    """Averages with the last call's adjoint."""

    def __init__(self):
        self.last = None

    def keep(self, steps):
        return Keep(1, "graph")

    def pullback(self, trajectory, cotangent):
        last, self.last = self.last, cotangent
        usable = last is not None and [x.shape for x in last] == [x.shape for x in cotangent]
        return trajectory.sweep(
            0.9 * cotangent + 0.1 * last.map(lambda x, y: x.to(y.dtype), cotangent) if usable else cotangent
        )


@dataclass(frozen=True)
class OtherNumbers(Adjoint):
    """Draws the loss's random numbers anew in the backward pass, unnoticed."""

    def keep(self, steps):
        return Keep(1, 1)

    def pullback(self, trajectory, cotangent):
        trajectory.record.draws.clear()
        return replace(trajectory, check=False).sweep(cotangent)


@dataclass(frozen=True)
class Eager(Estimator):
    """Takes every derivative beforehand, for nobody."""

    def run(self, problem):
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in (*problem.state, *problem.extras)]
        count = len(problem.state)
        outcome = Reverse().run(replace(problem, state=tuple(leaves[:count]), extras=tuple(leaves[count:])))
        torch.autograd.grad(sum(x.sum() for x in outcome.state), [x for x in leaves if x.requires_grad])
        return Reverse().run(problem)


@dataclass(frozen=True)
class FallsBack(Adjoint):
    """Says that it needs no second derivatives, and is another rule where there are none."""

    def claims(self, steps):
        return Claims(second_derivatives=False)

    def keep(self, steps):
        return Keep(1, 1)

    def pullback(self, trajectory, cotangent):
        try:
            return trajectory.sweep(cotangent)
        except MissingDerivativeError:
            return Cotangents(cotangent, {})


@dataclass(frozen=True)
class AfterUnrolling(Estimator):
    """Unrolled, with something done to its final state."""

    change: Callable

    def claims(self, steps):
        return Claims(twice=True, reports=False)

    def run(self, problem):
        outcome = Unrolled().run(problem)
        return replace(outcome, state=tuple(self.change(x) for x in outcome.state))


def with_infinite_slope(x):
    return x + (x - x).abs().sqrt()


class _Forgetful(torch.autograd.Function):
    """The identity, whose gradient is a constant to whoever differentiates it again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent.detach()


@dataclass(frozen=True)
class RefusesBatches(Adjoint):
    """Right, and honest: refuses vmap by a typed error."""

    error: type[Exception] = GradModeError

    def claims(self, steps):
        return Claims(vmap=False)

    def keep(self, steps):
        return Keep(1)

    def pullback(self, trajectory, cotangent):
        if trajectory.dynamics.levels:
            raise self.error("one task at a time: loop over tasks instead of vmap")
        return trajectory.sweep(cotangent)


RANDOM = Claims(random=True, tolerance=1e-3)

BROKEN = {
    "wrong sign": (Changed(negated), "exact: got 2"),
    "a dropped term": (Changed(without_hyperparameters), "hyperparameters: has a hypergradient: got 0"),
    "a dropped step": (ShortSweep(), "exact: got"),
    "a dropped batch, biased": (Changed(without_last_batch, said=BIASED), "batches and schedules: sum"),
    "right for momentum only": (Changed(wrong_for_adam), "exact with Adam: got 5.0e-01"),
    "claims exact, is biased": (saying(Truncated(2), exact="always"), "exact: got"),
    "claims biased, is exact": (Changed(said=BIASED), "biased: got"),
    "claims the fixed point, is biased": (saying(Truncated(2), exact="at the fixed point"), "exact at the fixed point"),
    "the fixed point's negative": (Saying(Changed(negated), Claims("at the fixed point")), "exact at the fixed point"),
    "claims biased by a fixed point, is exact": (Changed(said=Claims("at the fixed point")), "biased: got"),
    "keeps state between calls": (WarmStarted(), "repeats itself to the bit"),
    "right only once": (Changed(once), "a second backward pass agrees"),
    "follows another generator": (
        Changed(by_the_clock, said=Claims(random=True, tolerance=0.1)),
        "the same seed: the same numbers",
    ),
    "mixes tasks": (
        Changed(before=normalised_over_all_tasks, said=Claims("never", linear=False)),
        "vmap of grad: as in",
    ),
    "mixes tasks, backward": (
        Changed(before=normalised_over_all_tasks, said=Claims("never", linear=False)),
        "vmap, then backward: as in",
    ),
    "mixes nested tasks": (
        Changed(before=normalised_over_all_tasks, said=Claims("never", linear=False)),
        "vmap of vmap, on other axes: as in",
    ),
    "claims not to batch, does": (saying(Reverse(), vmap=False), "refuses vmap: got no error"),
    "refuses batches by an untyped error": (RefusesBatches(ValueError), "refuses vmap: got ValueError"),
    "claims to batch, refuses": (Saying(RefusesBatches(), EXACT), "tasks: got an error"),
    "claims every input, knows one": (saying(FirstOrder(), inputs=ALL_INPUTS), "args: has a hypergradient: got 0"),
    "claims one input, knows all": (saying(Truncated(2), inputs=frozenset({"init"})), "args: gets exact zeros"),
    "claims an initialisation that it ignores": (saying(Implicit(), inputs=ALL_INPUTS), "init: has a hypergradient"),
    "claims only what it reads": (saying(Truncated(2), inputs=ALL_INPUTS - {"init"}), "init: gets exact zeros"),
    "depends on its company": (Changed(by_company, said=BIASED), "init: the same alone"),
    "returns what nobody wants": (Changed(with_unwanted), "only init wanted: terms for others"),
    "depends on the order of leaves": (Changed(first_leaf_doubled, said=BIASED), "the order of the leaves"),
    "returns single precision": (Changed(in_single), "float64: returns tensors like the inputs: got no"),
    "returns double precision": (Changed(in_double), "float32: returns tensors like the inputs: got no"),
    "loses precision": (Changed(in_half), "float32: the numbers of float64"),
    "claims to be linear, clips": (Changed(before=clipped, said=BIASED), "linear in the outer gradient"),
    "claims to be linear, adds a constant": (Changed(constant_added, said=BIASED), "zero for a zero outer gradient"),
    "claims not to be linear, is": (saying(Truncated(2), linear=False), "not linear in the outer gradient"),
    "claims to be linear, minimises": (saying(Krylov(3), linear=True), "linear in the outer gradient"),
    "NaN at a zero cotangent": (
        Changed(before=normalised_by_leaf, said=Claims("never", linear=False)),
        "linearity: got an error, expected none; check: NonFiniteGradientError",
    ),
    "draws, unsaid": (Changed(noisy, said=BIASED), "draws nothing from torch's generator: got no"),
    "draws, unsaid: not repeatable": (Changed(noisy, said=BIASED), "repeats itself to the bit"),
    "claims to draw, does not": (saying(Reverse(), random=True), "other draws: other numbers: got 0"),
    "twice the mean": (Saying(Changed(negated), RANDOM), "exact: got 2"),
    "one draw for all tasks": (Changed(noisy_for_all_tasks, said=RANDOM), "every task draws for itself: got"),
    "one draw for all tasks: another mean": (
        Changed(noisy_for_all_tasks, said=RANDOM),
        "vmap of grad: the mean of a loop",
    ),
    "too noisy to tell": (Changed(very_noisy, said=RANDOM), "precise enough to test"),
    "biased differences": (saying(ESJacobian(64, 0.3), tolerance=1e-6), "exact: got"),
    "claims its own steps, takes none": (saying(Reverse(), own_steps=True), "takes steps of its own: got"),
    "takes its own steps, unsaid": (saying(MultiStep(2), own_steps=False), "takes the optimizer's steps"),
    "writes on its inputs": (Changed(writing), "leaves its inputs alone: got no"),
    "writes .grad": (Changed(writing_grad), "writes no .grad: got no"),
    "moves the generator": (OtherNumbers(), "a loss with dropout: the generator moves on as in a loop: got no"),
    "draws other numbers": (OtherNumbers(), "a loss with dropout: exact or refused: got"),
    "needs second derivatives, unsaid": (saying(Reverse(), second_derivatives=False), "MissingDerivativeError"),
    "needs none, claims to": (
        saying(FirstOrder(), second_derivatives=True),
        "refuses a loss without second derivatives",
    ),
    "claims a second order": (saying(Reverse(), twice=True), "SecondDerivativeError"),
    "has a second order, unsaid": (saying(Unrolled(), twice=False), "refuses to be differentiated twice: got no error"),
    "counts too many products": (Changed(overcounting), "products counted as seen by the loss: got 5, expected 4"),
    "counts too deep": (Changed(too_deep), "depth counted"),
    "counts other gradients": (Changed(undercounting), "gradients counted"),
    "counts nothing": (saying(Unrolled(), reports=True), "products counted as seen by the loss: got 0, expected 4"),
    "stores unreported": (saying(Unrolled(), reports=True), "bytes of states that outlive the rollout"),
    "claims no report, reports": (saying(Reverse(), reports=False), "reports nothing: got"),
    "takes steps for nobody": (Eager(), "no input wanted: gradients: got 8"),
    "takes products for nobody": (Eager(), "no input wanted: products: got 4"),
    "differentiates what nobody wants": (Eager(), "only init wanted: derivatives in what the loss reads"),
    "reads data for the step size": (Eager(), "only hyperparameters wanted: derivatives in what the loss reads"),
    "falls back": (FallsBack(), "needs no second derivatives"),
    "NaN": (AfterUnrolling(with_infinite_slope), "float64: derivatives are finite: got no"),
    "NaN in float32": (AfterUnrolling(with_infinite_slope), "float32: derivatives are finite: got no"),
    "NaN for unused outputs": (AfterUnrolling(with_infinite_slope), "uses nothing or one leaf: got no"),
    "another second order": (AfterUnrolling(_Forgetful.apply), "its derivative is that of central differences"),
    "does not run": (Truncated(9), "does not run on 4 steps: StepsError"),
    "points nowhere": (saying(Reptile(), linear=True), "zero for a zero outer gradient"),
    "less accurate than said": (saying(Implicit(), tolerance=1e-13), "exact at the fixed point"),
    "leaks": (Changed(leaking), "outlive the backward pass"),
}
