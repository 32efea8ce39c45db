"""``micro_batches=k``: the numbers of the whole batch, in the memory of a piece; what is no mean is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from estimator_names import biased, exact
from torch import Tensor, nn

import diffopt
from diffopt import BatchesError, HyperparameterError, LossError, RandomnessError, solve
from diffopt.estimators import FirstOrder, Reverse, Truncated

pytestmark = pytest.mark.usefixtures("float64_by_default")
STEPS, SIZE = 4, 7
ESTIMATORS = {**exact(STEPS, "graph", "states", "every second", "sqrt", "unrolled", "forward"), **biased(2)}
STEPWISE = ["graph", "states", "sqrt", "truncated"]


def loss(w, decay, weights, batch):
    """Not a quadratic; a mean over the batch, of which ``shift`` has one entry for all; and a penalty."""
    x, y, index = batch["x"], batch["y"], batch["index"]
    errors = (x @ w["a"] + batch["shift"] - y).square() + 0.1
    return (weights[index] * errors.sqrt()).mean() + decay * w["a"].pow(4).sum() + w["b"].square() / 2


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "x": torch.randn(STEPS, SIZE, 3, generator=generator),
        "y": torch.randn(STEPS, SIZE, generator=generator),
        "index": torch.randint(0, 9, (STEPS, SIZE), generator=generator),
        "shift": torch.randn(STEPS, 1, generator=generator),
    }


def of(stack):
    return lambda step: {key: x[step] for key, x in stack.items()}


def given() -> list[Tensor]:
    numbers = [torch.tensor([0.5, -1.0, 0.2]), torch.tensor(0.7), torch.tensor(0.1), torch.linspace(0.5, 1.5, 9)]
    return [x.requires_grad_() for x in [*numbers, torch.tensor(0.2)]]


def found(pieces, batches, estimator=None, losses=False, **options):
    roots = a, b, decay, weights, lr = given()
    options.update(optimizer=diffopt.Adam(lr, eps=0.1), steps=STEPS, batches=batches, micro_batches=pieces)
    solution = solve(loss, {"a": a, "b": b}, decay, weights, estimator=estimator, **options)
    end = solution.params["a"].pow(3).sum() + solution.params["b"]
    if losses:
        end = end + (solution.losses * torch.arange(1.0, STEPS + 1)).sum()
    learned = [x for x in batches.values() if x.requires_grad] if isinstance(batches, dict) else []
    terms = torch.autograd.grad(end, [*roots, *learned], allow_unused=True)
    return [end.detach(), solution.losses.detach(), *terms]


def assert_same(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@functools.cache
def in_pieces(name, stream, pieces):
    torch.manual_seed(1)
    return found(pieces, of(data()) if stream else data(), ESTIMATORS[name])


@pytest.mark.parametrize("stream", [False, True], ids=["stacked", "a function"])
@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_numbers_are_those_of_the_whole_batch(name, pieces, stream):
    got, expected = in_pieces(name, stream, pieces), in_pieces(name, stream, None)
    if name == "evolution":  # differences of two rollouts, over twice 1e-3
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        return
    assert_same(got, expected)


@pytest.mark.parametrize("name", STEPWISE)
def test_batches_may_be_learned(name):
    def learned(pieces):
        stack = data()
        stack["x"].requires_grad_()
        stack["shift"].requires_grad_()
        return found(pieces, stack, ESTIMATORS[name])

    assert_same(learned(3), learned(None))


@pytest.mark.parametrize("name", ["graph", "states", "every second", "sqrt", "forward", "unrolled"])
def test_losses_along_the_way(name):
    assert_same(found(3, data(), ESTIMATORS[name], losses=True), found(None, data(), ESTIMATORS[name], losses=True))


@pytest.mark.parametrize("shared", [True, False], ids=["shared data", "data of each task"])
@pytest.mark.parametrize("name", [*STEPWISE, "forward", "binomial", "unrolled"])
def test_tasks_under_vmap(name, shared):
    stack = data()
    tasks = stack if shared else {key: torch.stack([x, x.flip(1)]) for key, x in stack.items()}
    weights = torch.linspace(0.5, 1.5, 9)

    def outer(pieces, start):
        def task(a, batches):
            params, optimizer = {"a": a, "b": torch.tensor(0.7)}, diffopt.SGD(0.2, momentum=0.5)
            options = {"optimizer": optimizer, "steps": STEPS, "estimator": ESTIMATORS[name], "micro_batches": pieces}
            return solve(loss, params, 0.1, weights, batches=batches, **options).params["a"]

        start = start.clone().requires_grad_()
        ends = torch.func.vmap(task, (0, None if shared else 0))(start, tasks)
        return ends.detach(), *torch.autograd.grad(ends.pow(2).sum(), start)

    start = torch.tensor([[0.5, -1.0, 0.2], [1.0, 0.1, -0.3]])
    assert_same(outer(3, start), outer(None, start))


@pytest.mark.parametrize("name", ["graph", "states", "sqrt"])
def test_transforms(name):
    def value(pieces):
        def end(decay):
            params, weights = {"a": torch.ones(3), "b": torch.tensor(0.7)}, torch.ones(9)
            options = {"optimizer": diffopt.SGD(0.2), "steps": STEPS, "estimator": ESTIMATORS[name]}
            return solve(loss, params, decay, weights, batches=data(), micro_batches=pieces, **options).params["a"]

        at = torch.tensor(0.1)
        return torch.func.grad(lambda d: end(d).sum())(at), torch.func.jacrev(end)(at)

    assert_same(value(3), value(None))


@pytest.mark.parametrize("name", [*STEPWISE, "first order"])
def test_numbers_that_the_pieces_draw_are_drawn_again(name):
    """One replay beside another: dropout differs from the whole batch's, but all estimators agree on it."""

    def dropped(w, scale, batch):
        return (nn.functional.dropout(batch["x"], 0.3) @ w * scale - batch["y"]).square().mean()

    def gradients(estimator):
        torch.manual_seed(4)
        w, scale = torch.ones(3, requires_grad=True), torch.tensor(0.8, requires_grad=True)
        options = {"optimizer": diffopt.SGD(0.1), "steps": STEPS, "batches": data(), "micro_batches": 3}
        end = solve(dropped, w, scale, estimator=estimator, **options).params.sum()
        return [end.detach(), *torch.autograd.grad(end, (w, scale), allow_unused=True)]

    estimator = ESTIMATORS[name]
    if name in ("truncated", "first order"):
        assert torch.equal(gradients(estimator)[0], gradients(Reverse("graph"))[0])
        estimator = Truncated(STEPS, checkpoint=1)
    got = gradients(estimator)

    torch.manual_seed(4)
    w, scale = torch.ones(3, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    now = w
    for step in range(STEPS):
        total = 0
        for first, last in ((0, 3), (3, 5), (5, 7)):
            batch = {key: x[step, first:last] for key, x in data().items() if key in "xy"}
            total = total + (last - first) / SIZE * dropped(now, scale, batch)
        now = now - 0.1 * torch.autograd.grad(total, now, create_graph=True)[0]
    assert_same(got, [now.sum().detach(), *torch.autograd.grad(now.sum(), (w, scale))])


@pytest.mark.parametrize("name", STEPWISE)
def test_one_piece_at_a_time_is_alive(name):
    """What a piece's graph saves is gone before the next piece is evaluated, in both directions."""
    alive, most = [], [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            return x * 1

        @staticmethod
        def backward(ctx, c):
            return c * 1

    class Token:
        def __init__(self):
            alive.append(id(self))
            most[0] = max(most[0], len(alive))

        def __del__(self):
            alive.remove(id(self))

    def counted(w, batch):
        return Counted.apply(batch["x"] @ w - batch["y"]).square().mean()

    w = torch.ones(3, requires_grad=True)
    options = {"optimizer": diffopt.SGD(0.1), "steps": STEPS, "batches": data(), "estimator": ESTIMATORS[name]}
    solve(counted, w, micro_batches=7, **options).params.sum().backward()
    assert most[0] <= 2


# ------------------------------------------------------------------------------------------------------- refusals


def ignoring(w, batch):
    labels = torch.where(batch["index"] > 4, -100, batch["index"] % 2)
    return nn.functional.cross_entropy(batch["x"] @ w, labels, ignore_index=-100)


NO_MEANS = {
    "ignored labels": ignoring,
    "batch statistics": lambda w, b: (
        nn.functional.batch_norm(b["x"] @ w, None, None, training=True).pow(4).mean() + (b["x"] @ w).mean()
    ),
    "a sum": lambda w, b: (b["x"] @ w).square().sum(),
    "a mean of a mask": lambda w, b: ((b["x"] @ w).square().sum(1) * (b["y"] > 0)).sum() / (b["y"] > 0).sum(),
    "a root of a mean": lambda w, b: (b["x"] @ w).square().mean().sqrt(),
    "a product of means": lambda w, b: (b["x"] @ w).mean() * b["y"].mean(),
}


@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(1), FirstOrder()], ids=str)
@pytest.mark.parametrize("name", NO_MEANS)
def test_a_loss_that_is_no_mean_is_refused(name, estimator):
    options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "batches": of(data()), "estimator": estimator}
    with pytest.raises(LossError, match=r"as the mean of its pieces.*batch norm.*ignore_index"):
        solve(NO_MEANS[name], torch.ones(3, 2), micro_batches=2, **options)


@pytest.mark.parametrize("bad", [1, 3, 5])
def test_a_batch_that_is_no_mean_may_come_later(bad):
    """Of six steps: the second, the fourth and the last are looked at."""
    stack = {key: torch.cat([x, x])[:6] for key, x in data().items()}
    stack["index"] = torch.zeros(6, SIZE, dtype=torch.int64)
    stack["index"][bad, :2] = 8
    options = {"optimizer": diffopt.SGD(0.1), "steps": 6, "batches": of(stack), "estimator": Reverse(1)}
    with pytest.raises(LossError, match=f"the loss of step {bad + 1} is"):
        solve(ignoring, torch.ones(3, 2), micro_batches=2, **options)


def test_a_loss_near_zero_by_cancellation_is_a_mean():
    def cancelling(w, batch):
        return (batch["x"] @ w * 1e6).sum(1).mean() - (batch["x"] @ w.detach() * 1e6).sum(1).mean()

    options = {"optimizer": diffopt.SGD(1e-9), "steps": 2, "batches": of(data())}
    solve(cancelling, torch.ones(3, 2), micro_batches=3, **options)


def square(w, batch):
    return (batch["x"] @ w - batch["y"]).square().mean()


REFUSED = {
    "no batches": ({"batches": None}, BatchesError, "micro_batches without batches"),
    "none": ({"micro_batches": 0}, HyperparameterError, "micro_batches is int 0"),
    "half": ({"micro_batches": 1.5}, HyperparameterError, r"micro_batches is float 1\.5"),
    "compiled": ({"compile": True}, LossError, "compile=True"),
    "with aux": ({"has_aux": True}, LossError, "has_aux=True"),
    "no axis": ({"batches": torch.ones(2)}, BatchesError, "no tensor of the batch has an axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_pieces_have_no_meaning_for_is_refused(name):
    changed, kind, message = REFUSED[name]
    options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "batches": of(data()), "micro_batches": 2}
    with pytest.raises(kind, match=message):
        solve(square, torch.ones(3), **{**options, **changed})


def test_a_vector_field_is_refused():
    field = diffopt.VectorField(lambda w, batch: w * batch["x"].mean())
    options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "batches": of(data())}
    with pytest.raises(LossError, match="micro_batches with a VectorField"):
        solve(field, torch.ones(3), micro_batches=2, **options)


def test_a_captured_tensor_is_refused():
    scale = torch.tensor(2.0, requires_grad=True)
    options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "batches": of(data())}
    with pytest.raises(diffopt.CapturedTensorError, match="scale"):
        solve(lambda w, batch: scale * square(w, batch), torch.ones(3), micro_batches=2, **options)


def test_a_batch_that_changes_is_refused():
    asked = []

    def batches(step):
        asked.append(step)
        return {key: x * (1 + (asked.count(step) > 1)) for key, x in of(data())(step).items()}

    w = torch.ones(3, requires_grad=True)
    options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "batches": batches, "estimator": Reverse(1)}
    end = solve(square, w, micro_batches=2, **options).params.sum()
    with pytest.raises(RandomnessError, match="came out differently"):
        end.backward()


@pytest.mark.parametrize("name", ["graph", "states", "sqrt", "unrolled"])
def test_steps_end_as_with_the_whole_batch(name):
    def ended(pieces):
        w, stack = torch.ones(3, requires_grad=True), {key: x[:1].expand(60, *x.shape[1:]) for key, x in data().items()}
        options = {
            "optimizer": diffopt.SGD(0.3),
            "steps": 60,
            "batches": stack,
            "estimator": ESTIMATORS[name],
            "tol": 1e-3,
        }
        solution = solve(square, w, micro_batches=pieces, **options)
        assert 2 < solution.steps < 60
        return torch.tensor(solution.steps), *torch.autograd.grad(solution.params.sum(), w)

    assert_same(ended(3), ended(None))
