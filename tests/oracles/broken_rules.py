"""Estimators that are not what they claim to be, each beside the findings that must say so."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from diffopt.errors import GradModeError, MissingDerivativeError
from diffopt.estimators import Adjoint, Claims, Cotangents, Estimator, Keep, Reverse, StepByStep, Truncated, Unrolled
from diffopt.tensors.derivatives import jvp
from diffopt.tensors.leaves import Leaves

EXACT, BIASED = Claims(), Claims("never")
RANDOM = Claims(random=True, tolerance=1e-3)
NOT_LINEAR = Claims("never", linear=False)
GRAPHS, STATES = Keep(1, "graph"), Keep(1, 1)
FIXED_POINT = Claims("at the fixed point")
BROKEN: dict[str, tuple[Estimator, tuple[str, ...]]] = {}
"""By name: an estimator, and the findings that must say what is wrong with it."""


def broken(*findings, of="after", **options):
    """What follows makes a broken estimator: a class without arguments, or a change of a part of :class:`Changed`."""

    def add(made):
        estimator = made(**options) if isinstance(made, type) else Changed(**{of: made}, **options)
        BROKEN[f"{made.__name__}: {findings[0]}"] = (estimator, findings)
        return made

    return add


@dataclass(frozen=True)
class Saying(Estimator):
    """A shipped estimator that claims something else."""

    estimator: Estimator
    said: Claims

    def claims(self, steps):
        return self.said

    def run(self, problem):
        return self.estimator.run(problem)


def saying(estimator, **other):
    return Saying(estimator, replace(estimator.claims(4), **other))


@dataclass(frozen=True)
class Changed(Adjoint):
    """The exact estimator with its input, its sweep or its result changed."""

    after: Callable = lambda trajectory, result: result
    before: Callable = lambda trajectory, cotangent: cotangent
    sweep: Callable = lambda trajectory, cotangent: trajectory.sweep(cotangent)
    said: Claims = EXACT
    kept: Keep = GRAPHS

    def claims(self, steps):
        return self.said

    def keep(self, steps):
        return self.kept

    def pullback(self, trajectory, cotangent):
        return self.after(trajectory, self.sweep(trajectory, self.before(trajectory, cotangent)))


@broken("exact for a vector field: got")
@dataclass(frozen=True)
class Symmetric(Adjoint):
    """The exact estimator with ``V u`` in the place of ``V' u``: right for every loss."""

    def keep(self, steps):
        return Keep(first=1, checkpoint=1, gradients=True)

    def pullback(self, trajectory, cotangent):
        steps, adjoint, dynamics = StepByStep(trajectory), cotangent, trajectory.dynamics
        for t in range(trajectory.steps, 0, -1):
            turned = steps.turn(t, adjoint)
            steps.curvature(t, turned)  # for the arguments
            params = dynamics.layout.params(trajectory.rollout.states[t])
            read = dynamics.layout.at_step(trajectory.inputs, t)[0]

            def gradient(roots, read=read):
                return dynamics.gradient(dynamics.losses(roots, read), roots, differentiable=True)

            adjoint = steps.through(t, adjoint, Leaves(jvp(gradient, params, turned)[1]))
        return steps.cotangents(adjoint)


def scaled(result, factor):
    initial = None if result.initial is None else factor * result.initial
    return Cotangents(initial, {place: factor * x for place, x in result.direct.items()})


@broken("exact: got 2")
def negated(trajectory, result):
    return scaled(result, -1.0)


@broken("hyperparameters: has a hypergradient: got 0", "exact: got")
def without_hyperparameters(trajectory, result):
    return Cotangents(result.initial, {place: x for place, x in result.direct.items() if place.part == "read"})


@broken("batches and schedules: sum", said=BIASED)
def without_last_batch(trajectory, result):
    direct = dict(result.direct)
    for place in direct:
        if trajectory.layout.runs_over_steps(place):
            direct[place] = direct[place].clone()
            trajectory.layout.slice_at(place, direct[place], trajectory.steps).zero_()
    return Cotangents(result.initial, direct)


@broken("exact in the final buffers, and for sched", of="before")
def without_buffers(trajectory, cotangent):
    return trajectory.layout.padded(trajectory.layout.params(cotangent), cotangent)


@broken("exact in the final buffers, and for sched")
def schedules_reversed(trajectory, result):
    layout, direct = trajectory.layout, dict(result.direct)
    for place in direct:
        if place.part == "hyperparameters" and layout.runs_over_steps(place):
            direct[place] = direct[place].flip(layout.step_axis(place))
    return Cotangents(result.initial, direct)


@broken("float32: the numbers of float64")
def in_half(trajectory, result):
    if trajectory.final[0].dtype != torch.float32:
        return result
    halves = {place: x.half().float() * 1.01 for place, x in result.direct.items()}
    return Cotangents(result.initial, halves)


@broken("float64: returns tensors like the inputs: got no")
def in_single(trajectory, result):
    return Cotangents(result.initial, {place: x.float() for place, x in result.direct.items()})


@broken("float32: returns tensors like the inputs: got no")
def in_double(trajectory, result):
    return Cotangents(result.initial, {place: x.double() for place, x in result.direct.items()})


@broken("init: the same alone", said=BIASED)
def by_company(trajectory, result):
    return scaled(result, 1 / (1 + len(trajectory.wanted)))


@broken("only init wanted: terms for others")
def with_unwanted(trajectory, result):
    zeros = {place: torch.zeros_like(x) for place, x in trajectory.extras.items() if x.is_floating_point()}
    return Cotangents(result.initial, zeros | dict(result.direct))


@broken("the order of the leaves", said=BIASED)
def first_leaf_doubled(trajectory, result):
    if result.initial is None:
        return result
    return Cotangents(Leaves([2 * result.initial[0], *result.initial[1:]]), result.direct)


@broken("exact with Adam: got 5.0e-01")
def wrong_for_adam(trajectory, result):
    buffers = dict(trajectory.layout.buffers_layout)
    return scaled(result, 0.5) if "square" in buffers else result


@broken("draws nothing from torch's generator: got no", "repeats itself to the bit", said=BIASED)
@broken("every task draws for itself: got", "vmap of grad: the mean of a loop", said=RANDOM)
def noisy(trajectory, result):
    return scaled(result, 1 + 0.1 * float(torch.randn(())))


@broken("precise enough to test", said=RANDOM)
def very_noisy(trajectory, result):
    return scaled(result, 1 + 100 * float(torch.randn(())))


@broken("a second backward pass agrees")
def once(trajectory, result):
    """Right the first time; the diagnostics survive until the next."""
    if "done" in trajectory.record.diagnostics:
        return scaled(result, 0.5)
    trajectory.record.diagnostics["done"] = torch.ones(())
    return result


@broken("the same seed: the same numbers", said=Claims(random=True, tolerance=0.1))
def by_the_clock(trajectory, result):
    return scaled(result, 1 + 0.01 * random.gauss(0, 1))


@broken(
    "all in them at most: got 5, expected 4 to 4",
    "depth: the batches that the loss saw, or fewer if some need not wait: got 5, expected 1 to 4",
    "gradients: those that the loss saw, but for one per product: got 54, expected 0 to 4",
)
def miscounting(trajectory, result):
    trajectory.record.counts.products += 1
    trajectory.record.counts.depth += 1
    trajectory.record.counts.gradients += 50
    return result


@broken("leaves its inputs alone: got no")
def writing(trajectory, result):
    trajectory.inputs.read[1].add_(1.0)  # the argument that the loss does not read
    return result


@broken("writes no .grad: got no")
def writing_grad(trajectory, result):
    trajectory.inputs.read[1].grad = torch.zeros_like(trajectory.inputs.read[1])
    return result


@broken("zero for a zero outer gradient", said=BIASED)
def constant_added(trajectory, result):
    initial = None if result.initial is None else result.initial + 1.0
    return Cotangents(initial, result.direct)


@broken("\nlinear in the outer gradient", of="before", said=BIASED)
def clipped(trajectory, cotangent):
    return cotangent.map(lambda x: x.clamp(-0.1, 0.1))


@broken("linearity: got NonFiniteGradientError, expected no error; ", of="before", said=NOT_LINEAR)
def normalised_by_leaf(trajectory, cotangent):
    count = trajectory.layout.params_count
    return Leaves([*(x / x.norm() for x in cotangent[:count]), *cotangent[count:]])


OVER_TASKS = ("vmap, then backward: as in", "vmap of grad: as in", "vmap of vmap, on other axes: as in")


@broken(*OVER_TASKS, of="before", said=NOT_LINEAR)
def normalised_over_all_tasks(trajectory, cotangent):
    return cotangent.map(lambda x: x / (1 + x.square().sum()))


LEAKED: list = []


@broken("outlive the backward pass")
def leaking(trajectory, result):
    LEAKED.append(trajectory.final)
    return result


@broken("exact: got", of="sweep", kept=Keep(2, "graph"))
def without_the_first_step(trajectory, cotangent):
    return trajectory.sweep(cotangent, first=2)


LAST: list[Leaves] = []


@broken("repeats itself to the bit", of="before")
def averaged_with_the_last_call(trajectory, cotangent):
    last = LAST.pop() if LAST else cotangent
    LAST.append(cotangent)
    usable = [x.shape for x in last] == [x.shape for x in cotangent]
    return 0.9 * cotangent + 0.1 * last.map(lambda x, y: x.to(y.dtype), cotangent) if usable else cotangent


OTHER_NUMBERS = ("exact or refused: got", "the generator moves on as in a loop: got no")


@broken(*(f"a loss with dropout: {finding}" for finding in OTHER_NUMBERS), of="sweep", kept=STATES)
def with_other_numbers(trajectory, cotangent):
    """Draws the loss's random numbers anew in the backward pass, unnoticed."""
    trajectory.rollout.draws.clear()
    return replace(trajectory, check=False).sweep(cotangent)


@broken(
    "no input wanted: gradients: got 8",
    "no input wanted: products: got 4",
    "only init wanted: derivatives in what the loss reads",
    "only hyperparameters wanted: derivatives in what the loss reads",
)
@dataclass(frozen=True)
class Eager(Estimator):
    """Takes every derivative beforehand, for nobody."""

    def run(self, problem):
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in problem.inputs.flat]
        outcome = Reverse().run(replace(problem, inputs=problem.dynamics.layout.inputs(leaves)))
        torch.autograd.grad(sum(x.sum() for x in outcome.state), [x for x in leaves if x.requires_grad])
        return Reverse().run(problem)


@broken("needs no second derivatives", of="sweep", said=Claims(second_derivatives=False), kept=STATES)
def falling_back(trajectory, cotangent):
    """Says that it needs no second derivatives, and is another estimator where there are none."""
    try:
        return trajectory.sweep(cotangent)
    except MissingDerivativeError:
        return Cotangents(cotangent, {})


def same(x):
    return x


@dataclass(frozen=True)
class AroundUnrolling(Estimator):
    """Unrolled, with something done to its initial state, where no check of the library looks, and to its final one."""

    before: Callable = same
    after: Callable = same

    def claims(self, steps):
        return Claims(twice=True, reports=False)

    def run(self, problem):
        inputs, layout = problem.inputs, problem.dynamics.layout
        changed = layout.with_state(inputs, [self.before(x) for x in inputs.state])
        outcome = Unrolled().run(replace(problem, inputs=changed))
        return replace(outcome, state=tuple(self.after(x) for x in outcome.state))


def with_infinite_slope(x):
    return x + (x - x).abs().sqrt()


class Forgetful(torch.autograd.Function):
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
        if trajectory.tasks_shape:
            raise self.error("one task at a time: loop over tasks instead of vmap")
        return trajectory.sweep(cotangent)


NOT_FINITE = (
    *(f"{dtype}: derivatives are finite: got no" for dtype in ("float64", "float32")),
    "uses nothing or one leaf: got no",
)
BROKEN |= {
    "changed, said to be biased": (Changed(said=BIASED), ("biased: got",)),
    "changed, said to be the fixed point's": (Changed(said=FIXED_POINT), ("biased: got",)),
    "negated, said to be the fixed point's": (Saying(Changed(negated), FIXED_POINT), ("exact at the fixed point",)),
    "negated, said to be random": (Saying(Changed(negated), RANDOM), ("exact: got 2",)),
    "does not run": (Truncated(9), ("does not run on 4 steps (StepsError)",)),
    "infinite slope": (AroundUnrolling(before=with_infinite_slope), NOT_FINITE),
    "another second order": (
        AroundUnrolling(same, Forgetful.apply),
        ("its derivative is that of central differences",),
    ),
    "refuses tasks, untyped": (RefusesBatches(ValueError), ("refuses vmap of grad: got ValueError",)),
    "refuses tasks, unsaid": (Saying(RefusesBatches(), EXACT), ("tasks: got GradModeError, expected no error; ",)),
}
