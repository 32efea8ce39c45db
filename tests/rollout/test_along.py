"""What is handed out along the way: losses, what is observed, what the loss returns besides; against plain loops."""

from __future__ import annotations

import gc
import itertools
import weakref

import estimator_names
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from limits import sampled
from oracles import adam_step, relative_error, sgd_step

import diffopt
from diffopt import Schedule, solve
from diffopt.estimators import (
    Binomial,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reverse,
    Truncated,
    Unrolled,
)

STEPS = 5
BY_REVERSE = ("graph", "default", "states", "every second", "sqrt")
EXACT = estimator_names.exact(STEPS, *BY_REVERSE, "forward", "forward in chunks", "unrolled", "window of one")
OPTIMIZERS = {
    "sgd": (lambda lr, other: diffopt.SGD(lr, momentum=other), lambda lr, other: (sgd_step, {"momentum": other})),
    "adam": (
        lambda lr, other: diffopt.Adam(lr, betas=(other, 0.95), weight_decay=0.05),
        lambda lr, other: (adam_step, {"betas": (other, 0.95), "weight_decay": 0.05}),
    ),
}


def descended(loss, params, *args, lr=0.1, steps=2, **options):
    """The solution after some steps of plain descent."""
    return solve(loss, params, *args, optimizer=diffopt.SGD(lr), steps=steps, **options)


def inner(params, slope, batch):
    a, b = params["a"], params["b"]
    return (slope * a * batch).sin().sum() + (b * slope.sum()).square().sum() / 8 + (a.sum() * b).sum() / 5


def observed(params, slope, batch):
    """A scalar, a vector and a count; depends on everything that the loss reads, too."""
    return {
        "far": (params["a"] * batch).cos().sum() * slope.prod(),
        "rest": [params["b"] ** 2 + slope[0], torch.tensor(7)],
    }


def outer(final, losses, seen, weights):
    """Depends on the end and, by the weights, on the losses, on what was observed, on both, or on neither."""
    steps = torch.arange(1.0, len(losses) + 1, dtype=losses.dtype)
    end = (final["a"].sin().sum() + final["b"].sum() ** 2) * weights[0]
    return end + weights[1] * (losses * steps).sum() + weights[2] * ((steps * seen[0]).sum() + seen[1].pow(3).sum())


WEIGHTS = [w for w in itertools.product((0.0, 1.0), repeat=3) if any(w)]


def meta(requires_grad=True):
    given = [
        torch.linspace(-1, 1, 3),
        torch.tensor([0.7, -0.4]),
        torch.tensor([0.5, 1.0, 2.0]),
        1 + torch.linspace(0, 1, 3 * STEPS).reshape(STEPS, 3).sin(),
        torch.linspace(0.06, 0.13, STEPS),
        torch.tensor(0.6),
    ]
    return [x.double().requires_grad_(requires_grad) for x in given]


def by_loop(name, weights, a, b, slope, batches, lr, other):
    """The outer loss by a loop of formulas of the tests' own, which autograd records."""
    step, options = OPTIMIZERS[name][1](lr, other)
    now = {"a": a + 0, "b": b + 0}
    now = {k: p if p.requires_grad else p.requires_grad_() for k, p in now.items()}
    buffers, losses, far, rest = {"a": {}, "b": {}}, [], [], []
    for t in range(1, STEPS + 1):
        loss = inner(now, slope, batches[t - 1])
        grads = torch.autograd.grad(loss, [now["a"], now["b"]], create_graph=True)
        pairs = zip(now.items(), grads, strict=True)
        now = {k: step(p, g, buffers[k], t, lr=lr[t - 1], **options) for (k, p), g in pairs}
        seen = observed(now, slope, batches[t - 1])
        losses.append(loss)
        far.append(seen["far"])
        rest.append(seen["rest"][0])
    return outer(now, torch.stack(losses), [torch.stack(far), torch.stack(rest)], weights)


def by_solve(name, weights, estimator, a, b, slope, batches, lr, other, **options):
    options.update(
        batches=batches, optimizer=OPTIMIZERS[name][0](Schedule(lr), other), steps=STEPS, estimator=estimator
    )
    found = solve(inner, {"a": a, "b": b}, slope, observe=observed, **options)
    assert found.losses.shape == found.observed["rest"][1].shape == (STEPS,)
    assert not found.observed["rest"][1].requires_grad
    return outer(found.params, found.losses, [found.observed["far"], found.observed["rest"][0]], weights)


def gradient(function, values):
    found = torch.autograd.grad(function(*values), values, materialize_grads=True)
    return [x.detach() for x in found]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("weights", sampled(WEIGHTS[::-1], 2))
def test_every_exact_estimator_differentiates_what_happens_along_the_way(name, mode, weights):
    values = meta()
    expected = gradient(lambda *x: by_loop(name, weights, *x), values)
    found = gradient(lambda *x: by_solve(name, weights, EXACT[mode], *x), values)
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("mode", ["graph", "sqrt", "states", "forward", "unrolled"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_under_transforms_it_is_the_same(mode, weights):
    """Tasks with slopes of their own: vmap of gradients, the gradient of a vmap, and nested vmaps."""
    a, b, slope, batches, lr, other = meta(False)
    factors = torch.tensor([[0.5, 1.5], [1.0, 0.7]], dtype=torch.float64)

    def task(way, factor, a, slope, lr):
        return way(a, b, factor * slope, batches, lr, other)

    def ours(*x):
        return by_solve("adam", weights, EXACT[mode], *x)

    def all_of(way, *x):
        return sum(task(way, f, *x) for f in factors.flatten())

    values = [x.clone().requires_grad_() for x in (a, slope, lr)]
    expected = gradient(lambda *x: all_of(lambda *y: by_loop("adam", weights, *y), *x), values)
    nested = torch.func.vmap(torch.func.vmap(lambda f, *x: task(ours, f, *x), (0, None, None, None)), (0, *[None] * 3))
    found = gradient(lambda *x: nested(factors, *x).sum(), values)
    assert relative_error(found, expected) < 1e-10
    found = torch.func.grad(lambda *x: nested(factors, *x).sum(), argnums=(0, 1, 2))(a, slope, lr)
    assert relative_error(found, expected) < 1e-10
    each = torch.func.vmap(torch.func.grad(lambda f, *x: task(ours, f, *x), argnums=(1, 2, 3)), (0, *[None] * 3))
    found = [x.sum(0) for x in each(factors.flatten(), a, slope, lr)]
    assert relative_error(found, expected) < 1e-10


@pytest.mark.compiler
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.0, 0.0)])
def test_compiled_it_is_the_same(weights):
    values = meta()
    expected = gradient(lambda *x: by_loop("adam", weights, *x), values)
    found = gradient(lambda *x: by_solve("adam", weights, Reverse(), *x, compile=True), values)
    assert relative_error(found, expected) < 1e-10


def test_a_jacobian_of_all_losses():
    """One row for each inner loss: many cotangents at once."""
    a, b, slope, batches = meta(False)[:4]

    def losses(slope):
        options = {"batches": batches, "optimizer": diffopt.SGD(0.1, momentum=0.5), "steps": STEPS}
        return solve(inner, {"a": a, "b": b}, slope, **options).losses

    leaf = slope.clone().requires_grad_()
    rows = torch.stack([torch.autograd.grad(losses(leaf)[i], leaf)[0] for i in range(STEPS)])
    assert relative_error([torch.func.jacrev(losses)(slope)], [rows]) < 1e-12
    assert rows.norm() > 0.1


BIASED = {**estimator_names.biased(2), "windows": MultiStep(1, Truncated(1))}


@pytest.mark.parametrize("estimator", BIASED.values(), ids=BIASED)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_an_estimator_that_would_drop_it_refuses(estimator, weights):
    """And gives what it always gave where the outer loss looks at the end only."""
    values = meta()
    with pytest.raises(diffopt.EstimatorError, match=r"depends on Solution\.losses or Solution\.observed"):
        gradient(lambda *x: by_solve("sgd", weights, estimator, *x), values)


def test_windows_observe_after_each_window():
    """One gradient serves two updates: three losses for five, and the params after each window are seen."""
    a, b, slope, batches = meta()[:4]
    options = {"batches": batches, "steps": STEPS, "estimator": MultiStep(2)}
    found = descended(inner, {"a": a, "b": b}, slope, observe=lambda params, slope, batch: params["a"], **options)
    assert found.observed.shape == (3, 3)
    torch.testing.assert_close(found.observed[-1], found.params["a"], rtol=0, atol=0)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    got = torch.autograd.grad((found.losses * weight).sum() + found.observed[1].sum(), [a, slope, batches])
    now, losses, seen = {"a": a + 0, "b": b + 0}, [], []
    for t in (0, 2, 4):
        losses.append(inner(now, slope, batches[t]))
        grads = torch.autograd.grad(losses[-1], [now["a"], now["b"]], create_graph=True)
        for _ in range(min(2, STEPS - t)):
            now = {k: p - 0.1 * g for (k, p), g in zip(now.items(), grads, strict=True)}
        seen.append(now["a"])
    expected = torch.autograd.grad((torch.stack(losses) * weight).sum() + seen[1].sum(), [a, slope, batches])
    assert relative_error(got, expected) < 1e-10


# ------------------------------------------------------------------------------------------------ aux


@pytest.mark.parametrize("mode", EXACT)
def test_aux_is_stacked_over_steps_and_detached(mode):
    values = meta()

    def with_aux(params, slope, batch):
        loss = inner(params, slope, batch)
        return loss, {"size": (params["a"] * batch).square().sum(), "number": 3, "all": [params["b"]]}

    given = {"a": values[0], "b": values[1]}, values[2]
    options = {"batches": values[3], "steps": STEPS}
    found = descended(with_aux, *given, has_aux=True, estimator=EXACT[mode], **options)
    plain = descended(inner, *given, observe=lambda params, slope, batch: params, **options)
    assert not any(x.requires_grad for x in (found.aux["size"], found.aux["all"][0]))
    assert found.aux["number"].tolist() == [3] * STEPS
    before = torch.cat([values[0][None], plain.observed["a"][:-1]])
    torch.testing.assert_close(found.aux["size"], (before * values[3]).square().sum(1).detach(), rtol=1e-12, atol=0)
    assert found.aux["all"][0].shape == (STEPS, 2)
    got, expected = (torch.autograd.grad(x.params["a"].sum() + x.losses.sum(), values[:4]) for x in (found, plain))
    assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("estimator", [Reverse(), Unrolled(), Truncated(1), FirstOrder()], ids=repr)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compiler)])
def test_aux_of_every_task(estimator, compiled):
    """Under vmap, and where steps could be compiled."""
    slopes = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])

    def run(slope):
        found = descended(aux_of_a_sum, torch.ones(2), slope, has_aux=True, estimator=estimator, compile=compiled)
        return found.aux, found.losses.detach()

    aux, losses = torch.func.vmap(run)(slopes)
    assert aux.shape == (3, 2, 2)
    torch.testing.assert_close(aux[:, 0], slopes)
    torch.testing.assert_close(aux[:, 1], slopes * (1 - 0.1 * slopes))
    assert losses.shape == (3, 2)


def aux_of_a_sum(w, slope):
    return (w * slope).sum(), w * slope


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda w: w.sum(), r"has_aux=True: the inner loss returned a float32 tensor"),
        (lambda w: (w.sum(), 1, 2), r"returned tuple .*a pair \(loss, aux\)"),
        (lambda w: (w.sum(), {"a": "text"}), r"aux\['a'\] is str 'text', expected dense tensors and numbers"),
        (lambda w: (w, 1), "the inner loss returned a float32 tensor of shape"),
    ],
)
def test_aux_that_is_none_is_refused(loss, told):
    with pytest.raises(diffopt.LossError, match=told):
        descended(loss, torch.ones(2), has_aux=True)


def test_a_pair_without_has_aux_is_told_of_it():
    with pytest.raises(diffopt.LossError, match="has_aux=True"):
        descended(lambda w: (w.sum(), 1), torch.ones(2))


@pytest.mark.parametrize("estimator", [Reverse(), Unrolled()], ids=repr)
def test_trees_that_change_their_form_are_refused(estimator):
    calls = itertools.count()

    def by_form(w):
        return w.sum() if next(calls) == 0 else [w.sum()]

    def run(observe):
        descended(lambda w: w.sum(), torch.ones(3), steps=3, observe=observe, estimator=estimator)

    with pytest.raises(diffopt.LossError, match="at every step the form of the first"):
        run(by_form)
    with pytest.raises(diffopt.LossError, match="observe is int 3"):
        run(3)
    with pytest.raises(diffopt.LossError, match="observe"):
        run(lambda w, more: w)


def test_rows_of_other_shapes_are_refused():
    shapes = iter([1, 2, 3])
    with pytest.raises(diffopt.LossError, match=r"what observe returned has shape \(2,\) at step 2, expected \(1,\)"):
        descended(lambda w: w.sum(), torch.ones(3), steps=3, observe=lambda w: w[: next(shapes)])


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), ForwardMode(), Truncated(1)], ids=repr)
def test_what_observe_captures_is_refused(estimator):
    """It would get no hypergradient."""
    w = torch.ones(2, requires_grad=True)

    def seen(scale):
        observe = lambda w: (w * scale).sum()  # noqa: E731
        return descended(lambda w: w.square().sum(), w, observe=observe, estimator=estimator).observed.sum()

    with pytest.raises(diffopt.CapturedTensorError, match="observe reads `scale`"):
        seen(torch.ones(2, requires_grad=True))
    with pytest.raises(diffopt.CapturedTensorError):
        torch.func.grad(seen)(torch.ones(2))


def test_random_numbers_are_those_of_the_rollout():
    """Dropout in the loss and in what is observed: where steps are taken again both draw as they did."""
    w = torch.ones(50, dtype=torch.float64, requires_grad=True)

    def dropped(w):
        return torch.dropout(w, 0.5, True).pow(3).sum()

    def found(estimator):
        torch.manual_seed(5)
        got = descended(
            lambda w: torch.dropout(w, 0.5, True).square().sum(), w, steps=4, observe=dropped, estimator=estimator
        )
        return torch.autograd.grad(got.observed.sum() + got.losses.prod(), w)

    expected = found(Reverse("graph"))
    for estimator in (Reverse(1), Reverse(2), Unrolled(), ForwardMode()):
        assert relative_error(found(estimator), expected) < 1e-10


def test_no_step_hands_out_nothing():
    for estimator in (Reverse(), Unrolled()):
        found = descended(lambda w: w.sum(), torch.ones(3), steps=0, observe=lambda w: w, estimator=estimator)
        assert found.steps == 0
        assert found.losses.shape == (0,)


# ------------------------------------------------------------------------------------------------ stopping


def bowl(w, target):
    return (w - target).square().sum() / 2


def in_the_bowl():
    """Where steps begin, and the target, to differentiate by."""
    given = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([0.5, 1.0], dtype=torch.float64)
    return [x.requires_grad_() for x in given]


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("tol", [1.0, 0.3, 0.011])
def test_steps_end_where_the_gradient_is_small_and_so_does_the_hypergradient(mode, tol):
    """As many steps as a loop of the test's own makes, and the hypergradient of so many."""
    values = w, target, lr = *in_the_bowl(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    steps, now = 0, w
    while (now - target).norm() > tol:
        now, steps = now - lr * (now - target), steps + 1

    def found(**options):
        return descended(bowl, w, target, lr=lr, estimator=EXACT[mode], observe=bowl, **options)

    stopped, whole = found(steps=100, tol=tol), found(steps=steps)
    assert stopped.steps == stopped.state.step == steps
    assert stopped.losses.shape == stopped.observed.shape == (steps,)
    assert bool(stopped.diagnostics["converged"])
    got, expected = (
        torch.autograd.grad(x.params.prod() + x.losses.sum() + x.observed.sum(), values) for x in (stopped, whole)
    )
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize(
    "estimator", [Truncated(3), Truncated(3, checkpoint="graph"), Binomial(40), Krylov(40), FirstOrder()]
)
def test_estimators_see_the_steps_that_were_made(estimator):
    values = in_the_bowl()
    stopped = descended(bowl, *values, lr=0.2, steps=30, tol=0.5, estimator=estimator)
    assert 4 < stopped.steps < 30
    whole = descended(bowl, *values, lr=0.2, steps=stopped.steps, estimator=estimator)
    got, expected = (torch.autograd.grad(x.params.prod(), values) for x in (stopped, whole))
    assert relative_error(got, expected) < 1e-12
    if isinstance(estimator, Truncated):
        assert stopped.kept.states == 3


def test_truncation_of_more_steps_than_were_made_is_exact():
    values, estimators = in_the_bowl(), (Truncated(20), Reverse())
    ends = [descended(bowl, *values, lr=0.2, steps=30, tol=2.0, estimator=estimator).params for estimator in estimators]
    got, expected = (torch.autograd.grad(end.prod(), values) for end in ends)
    assert relative_error(got, expected) < 1e-12


def test_tasks_stop_together():
    starts = torch.tensor([[1.0], [4.0], [9.0]], dtype=torch.float64)

    def run(w):
        found = descended(bowl, w, torch.zeros(1, dtype=torch.float64), lr=0.5, steps=50, tol=0.2)
        return found.params, found.losses, torch.tensor(found.steps)

    params, losses, steps = torch.func.vmap(run)(starts)
    assert steps.tolist() == [6, 6, 6]  # 9 / 2**6 < 0.2 < 9 / 2**5
    assert losses.shape == (3, 6)
    torch.testing.assert_close(params, starts / 2**6)
    with pytest.raises(diffopt.EstimatorError, match="Unrolled under vmap"):
        torch.func.vmap(lambda w: descended(bowl, w, 0 * w, tol=0.2, estimator=Unrolled()).params)(starts)


def test_a_tolerance_that_is_not_reached_is_noted():
    found = descended(bowl, torch.ones(2), torch.zeros(2), steps=3, tol=1e-9)
    assert found.steps == 3
    assert not bool(found.diagnostics["converged"])


@pytest.mark.parametrize("mode", EXACT)
def test_on_step_is_told_and_may_stop(mode):
    told = []

    def on_step(step, loss):
        told.append((step, loss))
        return step == 6

    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    target = torch.zeros(2, dtype=torch.float64)
    first = descended(bowl, w, target, steps=3, estimator=EXACT[mode])
    found = descended(bowl, first.state, target, steps=10, on_step=on_step, estimator=EXACT[mode])
    assert found.steps == 3
    assert [step for step, _ in told] == [4, 5, 6]
    assert [loss for _, loss in told] == pytest.approx(found.losses.tolist())
    assert all(type(loss) is float for _, loss in told)
    assert found.state.step == 6
    torch.testing.assert_close(torch.autograd.grad(found.params.sum(), w)[0], torch.full_like(w, 0.9**6))


def test_an_interrupted_solve_leaves_what_on_step_was_given():
    told = []

    def on_step(step, loss):
        told.append(loss)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        descended(bowl, torch.ones(2), torch.zeros(2), steps=10, on_step=on_step)
    assert len(told) == 3


def test_numbers_are_not_told_of_under_vmap():
    with pytest.raises(diffopt.VmapError, match="on_step is called with numbers"):
        torch.func.vmap(lambda w: descended(bowl, w, w, on_step=lambda *told: None).params)(torch.ones(2, 3))


@pytest.mark.parametrize("options", [{"tol": -1.0}, {"tol": "small"}, {"tol": float("nan")}, {"on_step": 3}])
def test_what_cannot_stop_is_refused(options):
    with pytest.raises(diffopt.DiffoptError, match=next(iter(options))):
        descended(bowl, torch.ones(2), torch.zeros(2), **options)


@given(steps=st.integers(1, 6), stop=st.integers(1, 6), mode=st.sampled_from(sorted(EXACT)))
def test_a_solve_that_was_stopped_can_be_gone_on_from(steps, stop, mode):
    """Stopped after ``stop`` steps and gone on from is the whole."""
    values = [torch.tensor([1.0, 2.0], dtype=torch.float64).requires_grad_(), torch.zeros(2, dtype=torch.float64)]
    optimizer = diffopt.Adam(0.1)

    def run(start, count, **options):
        options.update(optimizer=optimizer, steps=count, estimator=EXACT[mode])
        return solve(lambda w, t: bowl(w, t).sin(), start, values[1], **options)

    first = run(values[0], 6, on_step=lambda step, loss: step == stop)
    assert first.steps == stop
    found, whole = run(first.state, steps), run(values[0], stop + steps)
    got, expected = (torch.autograd.grad(x.params.prod(), values[0]) for x in (found, whole))
    assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("how", ["tol", "on_step"])
def test_a_solve_that_ends_early_has_looked_at_every_loss(how):
    """A tensor that is captured from the second step on: with graphs, losses are looked at some at a time."""
    scale, calls = torch.ones(2, requires_grad=True), itertools.count()
    w = torch.ones(2, requires_grad=True)

    def loss(w):
        return (w.square() * (scale if next(calls) else 1)).sum()

    stop = {"tol": 2.0} if how == "tol" else {"on_step": lambda step, loss: step == 3}
    with pytest.raises(diffopt.CapturedTensorError, match="`scale`"):
        descended(loss, w, steps=12, estimator=Reverse("graph"), **stop)


def test_a_solve_that_ends_early_knows_the_state_that_its_loss_keeps():
    """An average that later losses read: refused where steps are taken again, also if it moved after the first only."""
    w, average = torch.ones(2, requires_grad=True), torch.zeros(())

    def loss(w):
        average.mul_(0.5).add_(w.detach().sum())
        return w.square().sum() * average.detach().clone()

    with pytest.raises(diffopt.HiddenStateError):
        descended(loss, w, lr=0.01, steps=12, estimator=Reverse(1), on_step=lambda step, loss: step == 3)


def test_the_norm_of_a_field_has_no_derivative():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    for estimator in (Reverse(), Unrolled()):
        found = descended(diffopt.VectorField(lambda w: 2 * w), w, estimator=estimator)
        assert found.params.requires_grad
        assert not found.losses.requires_grad


@pytest.mark.parametrize("optimizer", [diffopt.SGD(0.2), diffopt.SGD(0.2, momentum=0.5)], ids=["descent", "momentum"])
@pytest.mark.parametrize("start", ["far away", "at the end"])
def test_implicit_differentiates_where_a_tolerance_was_reached(optimizer, start):
    """Also where no step was needed: the minimum of the bowl is the target, whatever it is."""
    target = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    w = target.detach().clone() if start == "at the end" else torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = solve(bowl, w, target, optimizer=optimizer, steps=400, tol=1e-10, estimator=Implicit())
    assert (found.steps == 0) == (start == "at the end")
    got = torch.autograd.grad(found.params.square().sum(), target)
    assert relative_error(got, [2 * target]) < 1e-8
    assert bool(found.diagnostics["converged"])


def test_implicit_warns_of_a_tolerance_that_was_not_reached():
    target = torch.tensor([0.5, 1.0], requires_grad=True)
    found = descended(bowl, torch.ones(2), target, steps=3, tol=1e-6, estimator=Implicit())
    with pytest.warns(diffopt.EstimateWarning, match="tol was not reached within 3 steps"):
        found.params.sum().backward()


@pytest.mark.parametrize("mode", EXACT)
def test_where_no_step_is_needed_nothing_is_made(mode):
    """The start is the end, handed through with its derivative; there is nothing along the way."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    found = solve(
        bowl, w, torch.zeros(2), optimizer=diffopt.SGD(0.1, momentum=0.5), steps=4, tol=100.0, estimator=EXACT[mode]
    )
    assert found.steps == found.state.step == len(found.losses) == 0
    assert torch.autograd.grad((found.params * torch.tensor([2.0, 3.0])).sum(), w)[0].tolist() == [2, 3]


@pytest.mark.parametrize("mode", ["graph", "states", "unrolled"])
def test_a_solve_that_diverges_before_it_is_stopped_says_where(mode):
    options = {"steps": 50, "estimator": EXACT[mode], "on_step": lambda step, value: step == 6}
    with pytest.raises(diffopt.DivergenceError, match=r"step \d of"):
        descended(lambda w: (w**4).sum(), torch.full((2,), 1e3), lr=1.0, **options)


# ------------------------------------------------------------------------------------------------ what a review found


@pytest.mark.parametrize("mode", EXACT)
def test_numbers_that_begin_as_others_are_not_cut_off(mode):
    """A penalty that is the integer zero at first, and counts later; in aux, too."""

    def penalty(w, a):
        return torch.clamp(w[0] - 0.9, min=0) * a[0] if float(w[0].detach()) > 0.9 else 0

    a = torch.tensor([2.0, 2.0], dtype=torch.float64, requires_grad=True)
    w = torch.full((2,), 0.5, dtype=torch.float64)

    def loss(w, a):
        return (w - a).square().sum(), penalty(w, a)

    options = {"lr": 0.05, "steps": 5, "observe": penalty, "has_aux": True}
    found = descended(loss, w, a, estimator=Reverse("graph"), **options)
    now, seen = w, []
    for _ in range(5):
        now = now - 0.1 * (now - a)
        seen.append(penalty(now, a) + 0 * a[0])
    expected = torch.stack(seen)
    torch.testing.assert_close(found.observed, expected)
    torch.testing.assert_close(found.aux[1:], expected[:-1].detach())
    if "forward" in mode:  # which batches what differs from step to step, and cannot branch
        return
    found = descended(loss, w, a, estimator=EXACT[mode], **options)
    got, wanted = (torch.autograd.grad(x.sum(), a)[0] for x in (found.observed, expected))
    torch.testing.assert_close(got, wanted)
    assert wanted[0] > 1


def test_a_float_has_the_precision_of_params():
    w = torch.ones(2, dtype=torch.float64)
    found = descended(lambda w: w.sum(), w, observe=lambda w: [0.1, 3, True])
    assert found.observed[0].tolist() == [0.1, 0.1]
    assert [x.dtype for x in found.observed] == [torch.float64, torch.int64, torch.bool]


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled(), FirstOrder()], ids=repr)
def test_what_is_observed_is_not_written_to(estimator):
    with pytest.raises(diffopt.InPlaceError):
        descended(lambda w: w.square().sum(), torch.ones(2), estimator=estimator, observe=lambda w: w.mul_(0.5).sum())


@pytest.mark.parametrize("answer", [np.True_, torch.tensor(True), True])
def test_any_true_stops(answer):
    found = descended(bowl, torch.ones(2), torch.zeros(2), steps=5, on_step=lambda step, loss: answer)
    assert found.steps == 1


@pytest.mark.parametrize("estimator", [Reverse(), Unrolled(), ForwardMode(), FirstOrder()], ids=repr)
def test_of_no_step_there_are_trees_of_length_zero(estimator):
    def loss(w):
        return w.square().sum(), {"norm": w.norm(), "all": w}

    options = {"tol": 1e-3, "has_aux": True, "observe": lambda w: (w, 1), "estimator": estimator}
    found = descended(loss, torch.zeros(3), **options)
    assert found.steps == 0
    assert found.aux["norm"].shape == (0,)
    assert found.aux["all"].shape == found.observed[0].shape == (0, 3)
    assert found.observed[1].shape == (0,)


@pytest.mark.parametrize("stop", [{"tol": 1.0}, {"on_step": lambda step, loss: step == 3}])
def test_truncation_at_none_is_first_order_where_a_solve_was_stopped(stop):
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    for estimator in (Truncated(0), FirstOrder()):
        found = descended(bowl, w, torch.zeros(2), lr=0.2, steps=50, estimator=estimator, **stop)
        assert 0 < found.steps < 50
        assert torch.autograd.grad(found.params.sum(), w)[0].tolist() == [1, 1]


def test_what_was_observed_is_let_go_of_without_the_garbage_collector():
    """A solve is no reference cycle: the graph and what it holds die with the solution."""
    a = torch.ones(2, requires_grad=True)
    alive = []
    for backward in (False, True):
        x = (2 * a).detach().requires_grad_()
        alive.append(weakref.ref(x))
        found = descended(lambda w, x: (w * x).square().sum(), torch.ones(2), x, observe=lambda w, x: w.sum())
        if backward:
            torch.autograd.grad(found.observed.sum(), x)
        gc.disable()
        try:
            del found, x
            assert alive[-1]() is None
        finally:
            gc.enable()


def test_a_window_is_told_of_by_the_number_of_its_last_update():
    told = []
    first = descended(bowl, torch.ones(2), torch.zeros(2))
    options = {"estimator": MultiStep(2), "on_step": lambda step, loss: told.append(step)}
    found = descended(bowl, first.state, torch.zeros(2), steps=5, **options)
    assert told == [4, 6, 7]
    assert found.state.step == 7


def test_a_solve_within_a_field_is_unrolled():
    """The field's own derivative is that of the map that the inner solve makes."""

    def field(x, a):
        square, zeros = lambda z, x, a: (z - x * a).square().sum(), torch.zeros(2, dtype=torch.float64)
        return x - descended(square, zeros, x, a, lr=0.2, steps=1, estimator=Unrolled()).params

    a = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    w = torch.ones(2, dtype=torch.float64)
    found = descended(diffopt.VectorField(field), w, a, steps=3)
    now = w
    for _ in range(3):
        now = now - 0.1 * (now - 0.4 * now * a)
    assert relative_error([found.params], [now]) < 1e-12
    got, expected = (torch.autograd.grad(x.sum(), a) for x in (found.params, now))
    assert relative_error(got, expected) < 1e-12


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward mode loads it
@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), FirstOrder()], ids=repr)
def test_a_tangent_that_observe_captures_is_refused(estimator):
    """As one that the loss captures is: what is observed would have none."""
    with torch.autograd.forward_ad.dual_level():
        scale = torch.autograd.forward_ad.make_dual(torch.tensor(2.0), torch.tensor(1.0))
        options = {"observe": lambda w: (w * scale).sum(), "estimator": estimator}
        with pytest.raises(diffopt.DiffoptError, match="observe reads a tensor that carries a tangent"):
            descended(lambda w: w.square().sum(), torch.ones(2), **options)
