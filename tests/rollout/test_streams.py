"""``batches=`` as a function of the step: the numbers of stacked batches, whatever takes a step again; and refusals."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from estimator_names import biased, exact
from limits import sampled
from torch import Tensor

import diffopt
from diffopt import BatchesError, CapturedTensorError, LossError, RandomnessError, solve
from diffopt.estimators import Binomial, ESJacobian, FirstOrder, ForwardMode, Krylov, MultiStep, Reverse, Unrolled

pytestmark = pytest.mark.usefixtures("float64_by_default")
STEPS = 5
ESTIMATORS = {
    **exact(STEPS, "default", "graph", "states", "every second", "sqrt", "unrolled", "forward"),
    **biased(3),
    "binomial in chunks": Binomial(3, chunk_size=2),
    "windows": MultiStep(2, Reverse(1)),
}
EXACT = exact(STEPS, "states", "every second", "unrolled", "forward")

COMPILED = pytest.param(True, marks=pytest.mark.compiler)


def loss(w, decay, batch):
    """Not a quadratic, with a mean over the batch and a learned decay."""
    x, y = batch["x"], batch["y"]
    return ((x @ w - y).square() + 0.1).sqrt().mean() + decay * w.pow(4).sum()


def data(steps: int = STEPS, size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(steps, size, 3, generator=generator), "y": torch.randn(steps, size, generator=generator)}


def of(stack: dict[str, Tensor]):
    """The same batches as a function of the step."""
    return lambda step: {key: x[step] for key, x in stack.items()}


def inputs():
    return [torch.tensor([0.5, -1.0, 0.2]), torch.tensor(0.1), torch.tensor(0.2)]


def final(given, batches, estimator=None, steps=STEPS, **options):
    """The final params, and the solution, for the initial ones, the decay and the learning rate."""
    w, decay, lr = given
    optimizer = diffopt.SGD(lr, momentum=0.5)
    return solve(loss, w, decay, optimizer=optimizer, steps=steps, batches=batches, estimator=estimator, **options)


def gradients(batches, estimator=None, **options) -> list[Tensor]:
    given = [x.requires_grad_() for x in inputs()]
    params = final(given, batches, estimator, **options).params
    return [params.detach(), *torch.autograd.grad(params.pow(3).sum(), given, allow_unused=True)]


def assert_same(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compile", [False, COMPILED], ids=["plain", "compiled"])
@pytest.mark.parametrize("estimator", sampled(ESTIMATORS.values(), 2), ids=ESTIMATORS)
def test_the_numbers_are_those_of_stacked_batches(estimator, compile):
    torch.manual_seed(1)
    expected = gradients(data(), estimator, compile=compile)
    torch.manual_seed(1)
    assert_same(gradients(of(data()), estimator, compile=compile), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_all_tasks_of_a_vmap_get_the_same_batch(estimator):
    tasks = torch.stack([torch.tensor([0.5, -1.0, 0.2]) + i for i in range(3)])

    def task(batches, w):
        torch.manual_seed(1)
        return final([w, *inputs()[1:]], batches, estimator).params

    def mean(batches, w):
        w = w.clone().requires_grad_()
        out = torch.func.vmap(lambda w: task(batches, w), randomness="same")(w)
        return out.detach(), *torch.autograd.grad(out.pow(3).sum(), w)

    assert_same(mean(of(data()), tasks), mean(data(), tasks))


@pytest.mark.parametrize("estimator", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap of grad", "grad of vmap"])
def test_under_transforms(estimator, transform):
    def outer(batches):
        def value(w):
            return final([w, *inputs()[1:]], batches, estimator).params

        w = inputs()[0]
        if transform == "grad":
            return torch.func.grad(lambda w: value(w).pow(3).sum())(w)
        if transform == "jacrev":
            return torch.func.jacrev(value)(w)
        if transform == "vmap of grad":
            return torch.func.vmap(torch.func.grad(lambda w: value(w).sum()))(torch.stack([w, 2 * w]))
        return torch.func.grad(lambda ws: torch.func.vmap(value)(ws).pow(2).sum())(torch.stack([w, 2 * w]))

    if transform == "jacrev" and isinstance(estimator, Unrolled):
        pytest.skip("no pullback of its own")
    assert_same([outer(of(data()))], [outer(data())])


@pytest.mark.parametrize("compile", [False, COMPILED], ids=["plain", "compiled"])
@pytest.mark.parametrize("estimator", EXACT.values(), ids=EXACT)
def test_what_observes_sees_the_batch_of_its_step(estimator, compile):
    def of_observed(batches):
        given = [x.requires_grad_() for x in inputs()]
        options = {"observe": loss, "compile": compile}
        found = final(given, batches, estimator, **options).observed
        return found.detach(), *torch.autograd.grad(found.sum(), given)

    assert_same(of_observed(of(data())), of_observed(data()))


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_state_goes_on_with_the_batches_of_its_steps(estimator):
    if isinstance(estimator, (MultiStep, ESJacobian)):
        pytest.skip("other steps in parts, or other directions")
    asked: list[int] = []
    stack = data()

    def batches(step):
        asked.append(step)
        return of(stack)(step)

    w, decay, lr = inputs()
    optimizer = diffopt.SGD(lr, momentum=0.5)
    first = solve(loss, w, decay, optimizer=optimizer, steps=2, batches=batches, estimator=Reverse())
    assert asked == [0, 1]
    root = decay.clone().requires_grad_()
    second = solve(loss, first.state, root, optimizer=optimizer, steps=3, batches=batches, estimator=estimator)
    second.params.sum().backward() if second.params.requires_grad else None
    assert set(asked[2:]) == {2, 3, 4}
    torch.testing.assert_close(second.params.detach(), final(inputs(), data()).params, rtol=1e-12, atol=1e-12)
    rest = {key: x[2:] for key, x in stack.items()}
    again = decay.clone().requires_grad_()
    other = solve(loss, first.state, again, optimizer=optimizer, steps=3, batches=rest, estimator=estimator)
    other.params.sum().backward() if other.params.requires_grad else None
    assert_same([root.grad], [again.grad])


@pytest.mark.parametrize(
    ("estimator", "calls"), [(Reverse("graph"), 1), (Reverse(1), 2), (FirstOrder(), 1), (Krylov(3), 2)]
)
def test_a_batch_is_asked_for_where_its_step_is_evaluated_only(estimator, calls):
    asked: list[int] = []
    gradients(lambda step: asked.append(step) or of(data())(step), estimator)
    assert sorted(asked) == sorted([*range(STEPS)] * calls)


@pytest.mark.compiler
def test_compiled_steps_that_are_looked_at_ask_once_each():
    asked: list[int] = []
    batches = of(data())
    found = final(inputs(), lambda step: asked.append(step) or batches(step), compile=True, observe=loss).observed
    assert asked == [*range(STEPS)]
    torch.testing.assert_close(found, final(inputs(), data(), observe=loss).observed, rtol=1e-12, atol=1e-12)


def test_without_steps_nothing_is_asked_for():
    solution = final(inputs(), lambda step: pytest.fail("asked"), steps=0)
    assert torch.equal(solution.params, inputs()[0])


@pytest.mark.parametrize("estimator", EXACT.values(), ids=EXACT)
def test_steps_may_end_early(estimator):
    seen: list[int] = []
    options = {"on_step": lambda step, loss: seen.append(step) or step == 3}
    ended = gradients(of(data()), estimator, **options)
    assert seen == [1, 2, 3]
    assert_same(ended, gradients(of(data()), estimator, steps=3))


@pytest.mark.parametrize("estimator", [*EXACT.values(), Binomial(STEPS), Krylov(STEPS)], ids=str)
def test_a_vector_field_sees_the_batch_of_its_step(estimator):
    turn = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.5], [0.0, 0.2, 0.3]])
    field = diffopt.VectorField(lambda w, decay, b: turn @ w * b["y"].mean() + decay * w**3 + b["x"].sum(0))

    def found(batches):
        w, decay = torch.ones(3, requires_grad=True), torch.tensor(0.1, requires_grad=True)
        options = {"optimizer": diffopt.SGD(0.05), "steps": STEPS, "batches": batches, "estimator": estimator}
        return torch.autograd.grad(solve(field, w, decay, **options).params.sum(), (w, decay))

    assert_same(found(of(data())), found(data()))


# ---------------------------------------------------------------------------------------- shapes, devices, structure


def ragged(step):
    """One more sample at every step."""
    return {key: x[step] for key, x in data(size=2 + step).items()}


@pytest.mark.parametrize(
    "name", [name for name in ESTIMATORS if name not in ("binomial", "binomial in chunks", "krylov")]
)
def test_batches_may_differ_in_shape(name):
    torch.manual_seed(2)
    found = gradients(ragged, ESTIMATORS[name])
    if name not in ("graph", "states", "every second", "sqrt", "default", "forward", "unrolled"):
        return
    given = [x.requires_grad_() for x in inputs()]
    w, decay, lr = given
    buffer = torch.zeros(3)
    for step in range(STEPS):
        (slope,) = torch.autograd.grad(loss(w, decay, ragged(step)), w, create_graph=True)
        buffer = slope if step == 0 else 0.5 * buffer + slope
        w = w - lr * buffer
    assert_same(found, [w.detach(), *torch.autograd.grad(w.pow(3).sum(), given)])


@pytest.mark.parametrize("estimator", [Binomial(2), Krylov(2), Binomial(2, chunk_size=2)])
def test_estimators_that_take_steps_together_want_one_shape(estimator):
    with pytest.raises(BatchesError, match=r"batches\['x'\] has shapes \(., 3\) and \(., 3\) .*Binomial, Krylov"):
        gradients(ragged, estimator)


@pytest.mark.slow
@pytest.mark.compiler
def test_compiled_steps_of_several_shapes():
    assert_same(gradients(ragged, Reverse(1), compile=True), gradients(ragged, Reverse(1)))


X = torch.ones(STEPS, 4, 3, dtype=torch.float64)
LEARNED = torch.ones(STEPS, 4, 3, dtype=torch.float64, requires_grad=True)
ENDED = iter(())
BAD = {
    "a number": (lambda step: {"x": 3.0}, BatchesError, r"batches\(0\)\['x'\] is float 3.0.*as_tensor"),
    "nothing": (lambda step: None, BatchesError, "end the function with return"),
    "an empty tree": (lambda step: [], BatchesError, "expected a tree of tensors"),
    "no argument": (lambda: X[0], BatchesError, "batches"),
    "two arguments": (lambda step, more: X[0], BatchesError, "batches"),
    "a class": (diffopt.Batches, BatchesError, r"diffopt\.Batches\(dataset, batch_size\)"),
    "an ended iterator": (lambda step: next(ENDED), BatchesError, "use diffopt.Batches"),
    "what is learned": (lambda step: LEARNED[step], CapturedTensorError, "requires grad.*index it inside the loss"),
    "a leaf that is learned": (lambda step: {"x": LEARNED}, CapturedTensorError, r"batches\(0\)\['x'\] requires grad"),
    "random numbers": (lambda step: torch.randn(4, 3), RandomnessError, r"Generator\(\)\.manual_seed\(step\)"),
    "numpy's": (lambda step: torch.from_numpy(np.random.rand(4, 3)), RandomnessError, "draws random numbers"),
    "Python's": (lambda step: torch.full((4, 3), random.random()), RandomnessError, "draws random numbers"),
    "other branches": (lambda step: X[0] if step == 0 else [X[0]], BatchesError, r"batches\(1\) has other branches"),
    "fewer keys": (lambda step: dict([("x", X[0]), ("y", X[0])][: 2 - (step > 1)]), BatchesError, r"batches\(2\)"),
    "random later": (lambda step: X[0] if step < 3 else torch.rand(4, 3), RandomnessError, r"batches\(3\)"),
}


@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(1), Unrolled()], ids=["graph", "states", "unrolled"])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_function_of_the_step_is_refused(name, estimator):
    batches, kind, message = BAD[name]

    def of_leaves(w, batch):
        leaves, _ = torch.utils._pytree.tree_flatten(batch)
        return sum((x @ w).square().mean() for x in leaves)

    with pytest.raises(kind, match=message):
        solve(of_leaves, torch.ones(3), optimizer=diffopt.SGD(0.1), steps=STEPS, batches=batches, estimator=estimator)


TRANSFORMS = {
    "vmap": lambda f, xs: torch.func.vmap(f)(xs),
    "grad": lambda f, xs: torch.func.grad(lambda x: f(x).sum())(xs[0]),
    "jacrev": lambda f, xs: torch.func.jacrev(f)(xs[0]),
    "vmap of grad": lambda f, xs: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(xs),
    "grad of vmap": lambda f, xs: torch.func.grad(lambda xs: torch.func.vmap(f)(xs).sum())(xs),
}


@pytest.mark.parametrize("use", [lambda x, i: x[i], lambda x, i: x, lambda x, i: {"a": 2 * x[: i + 1]}[("a")]])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("estimator", [Reverse(), Unrolled()], ids=["reverse", "unrolled"])
def test_a_tensor_of_a_transform_around_the_solve_is_refused(transform, use, estimator):
    def task(x):
        def square(w, batch):
            return (batch.sum() * w).square().sum()

        optimizer = diffopt.SGD(0.1)
        options = {"optimizer": optimizer, "steps": 2, "batches": lambda i: use(x, i), "estimator": estimator}
        return solve(square, torch.ones(2), **options).params

    with pytest.raises(CapturedTensorError, match=r"belongs to a torch\.func transform.*\*args"):
        TRANSFORMS[transform](task, torch.ones(3, 4))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("estimator", [Reverse(), Unrolled()], ids=["reverse", "unrolled"])
def test_an_argument_is_indexed_inside_the_loss_instead(transform, estimator):
    def task(x):
        def square(w, x, index):
            return (x[index].sum() * w).square().sum()

        options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "batches": torch.tensor, "estimator": estimator}
        return solve(square, torch.ones(2), x, **options).params

    def stacked(x):
        def square(w, x, batch):
            return (x[0] * batch.sum() * 0 + x[batch].sum() * w).square().sum()

        batches = torch.arange(2)
        return solve(square, torch.ones(2), x, optimizer=diffopt.SGD(0.1), steps=2, batches=batches).params

    xs = torch.arange(12.0).reshape(3, 4) / 10
    assert_same([TRANSFORMS[transform](task, xs)], [TRANSFORMS[transform](stacked, xs)])


# ----------------------------------------------------------------------------------------------- what is right stays


def seeded(step):
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(4, 3, generator=generator), "y": torch.randn(4, generator=generator)}


def seeded_globally(step):
    torch.manual_seed(step)
    return {"x": torch.randn(4, 3), "y": torch.randn(4)}


def seeded_in_numpy(step):
    np.random.seed(step)
    return {"x": torch.from_numpy(np.random.rand(4, 3)), "y": torch.from_numpy(np.random.rand(4))}


@pytest.mark.parametrize("threads", [False, True], ids=["alone", "beside another thread"])
@pytest.mark.parametrize("batches", [seeded, seeded_globally, seeded_in_numpy])
@pytest.mark.parametrize("name", ["graph", "states", "sqrt", "unrolled", "forward", "truncated"])
def test_random_batches_of_a_seed_of_the_step(name, batches, threads):
    rows = [batches(step) for step in range(STEPS)]
    stack = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    if threads:
        other.start()
    try:
        assert_same(gradients(batches, ESTIMATORS[name]), gradients(stack, ESTIMATORS[name]))
    finally:
        done.set()


@pytest.mark.parametrize("name", ["graph", "states", "sqrt", "truncated", "first order"])
def test_numbers_that_the_loss_draws_are_drawn_again(name):
    def dropped(w, decay, batch):
        return loss(torch.nn.functional.dropout(w, 0.3), decay, batch)

    def found(batches):
        torch.manual_seed(5)
        w, decay, lr = (x.requires_grad_() for x in inputs())
        estimator = ESTIMATORS[name]
        solution = solve(
            dropped, w, decay, optimizer=diffopt.SGD(lr), steps=STEPS, batches=batches, estimator=estimator
        )
        return torch.autograd.grad(solution.params.sum(), (w, decay), allow_unused=True)

    assert_same(found(of(data())), found(data()))


def test_batches_of_an_encoder_under_no_grad():
    encoder = torch.nn.Linear(3, 3)
    with torch.no_grad():
        solution = final(inputs(), lambda step: {**of(data())(step), "x": encoder(data()["x"][step])})
    assert not solution.params.requires_grad


def test_batches_made_in_inference_mode():
    def batches(step):
        with torch.inference_mode():
            return {key: x + 0 for key, x in of(data())(step).items()}

    assert_same(gradients(batches, Reverse("graph")), gradients(data(), Reverse("graph")))


def test_an_iterator_is_right_where_no_step_is_taken_again():
    rows = iter([of(data())(step) for step in range(STEPS)])
    assert_same(gradients(lambda step: next(rows), Reverse("graph")), gradients(data(), Reverse("graph")))


CHANGING = {name: ESTIMATORS[name] for name in ("states", "every second", "sqrt", "truncated", "binomial", "krylov")}


@pytest.mark.parametrize("compile", [False, COMPILED], ids=["plain", "compiled"])
@pytest.mark.parametrize("estimator", [*CHANGING.values(), ForwardMode(), ESJacobian(2, 1e-3)], ids=str)
def test_a_batch_that_is_another_one_when_asked_for_again_is_refused(estimator, compile):
    asked: list[int] = []

    def batches(step):
        asked.append(step)
        return {key: x * (1 + (asked.count(step) > 1)) for key, x in of(data())(step).items()}

    with pytest.raises(RandomnessError, match="came out differently in the backward pass"):
        gradients(batches, estimator, compile=compile)


def test_a_number_that_is_not_finite_is_named_with_its_step():
    stack = data()
    stack["y"][2, 1] = torch.nan
    with pytest.raises(diffopt.DivergenceError, match=r"batches\['y'\] at step 3 is not finite itself"):
        gradients(of(stack))


def test_the_loss_is_told_apart_from_the_function():
    with pytest.raises(LossError, match="with batches, one for the batch"):
        solve(lambda w: w, torch.ones(()), optimizer=diffopt.SGD(0.1), steps=1, batches=of(data()))
