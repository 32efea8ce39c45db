"""Losses that draw random numbers: a rollout draws as a plain loop would, and every backward pass draws the same.

The oracle is a plain loop unrolled by autograd under the same seed; under vmap, one that is given the masks as data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from estimator_names import biased, exact
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.nn import functional

import diffopt
from diffopt.estimators import FirstOrder, ForwardMode, Reverse, Truncated, Unrolled

STEPS, TASKS, LR, MOMENTUM, SEED = 7, 3, 0.1, 0.6, 5
EXACT: dict[str, Any] = {
    **exact(STEPS, "default", "graph", "states", "every third", "sqrt", "log", "forward", "forward in chunks"),
    **exact(STEPS, "truncated in states", "unrolled"),
}


def leaves() -> list[Tensor]:
    """The initial parameters, the weights the loss reads, and the learning rate."""
    generator = torch.Generator().manual_seed(1)
    w, x = (torch.randn(size, dtype=torch.float64, generator=generator) for size in (4, (5, 4)))
    return [w.requires_grad_(), x.requires_grad_(), torch.tensor(LR, dtype=torch.float64, requires_grad=True)]


def given_mask(w: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """The loss, its random numbers given."""
    return ((x * mask) @ torch.tanh(w) - 1).square().mean() + 0.1 * w.pow(4).sum()


def dropout(x: Tensor) -> Tensor:
    return functional.dropout(torch.ones_like(x), 0.4)


def loss(w: Tensor, x: Tensor) -> Tensor:
    """The loss, which draws one mask at every call."""
    return given_mask(w, x, dropout(x))


def unrolled(w: Tensor, x: Tensor, lr: Tensor, masks: list[Tensor] | None = None, last: int = STEPS) -> Tensor:
    """The oracle: momentum SGD, differentiable through the last steps; draws a mask per step unless given them."""
    velocity = torch.zeros_like(w)
    for t in range(STEPS):
        if t < STEPS - last:
            start = w.detach().requires_grad_()
            value = loss(start, x) if masks is None else given_mask(start, x, masks[t])
            velocity = MOMENTUM * velocity + torch.autograd.grad(value, start)[0]
            w = w + (start - lr * velocity - w).detach()  # the value of the step, the derivative of the identity
        else:
            value = loss(w, x) if masks is None else given_mask(w, x, masks[t])
            velocity = MOMENTUM * velocity + torch.autograd.grad(value, w, create_graph=True)[0]
            w = w - lr * velocity
    return w


def solved(w: Tensor, x: Tensor, lr: Tensor, estimator: Any) -> Tensor:
    optimizer = diffopt.SGD(lr, momentum=MOMENTUM)
    return diffopt.solve(loss, w, x, optimizer=optimizer, steps=STEPS, estimator=estimator).params


def seeded(function: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, Tensor]:
    """The value under the seed, and where the generator stands afterwards."""
    torch.manual_seed(SEED)
    return function(*inputs), torch.get_rng_state()


def assert_same(actual: tuple[Tensor, ...] | list[Tensor], expected: tuple[Tensor, ...] | list[Tensor]) -> None:
    """To rounding: the same sums in another order, over seven steps."""
    torch.testing.assert_close(list(actual), list(expected), rtol=1e-11, atol=1e-13)


@pytest.fixture(params=EXACT)
def estimator(request: pytest.FixtureRequest) -> Any:
    return EXACT[request.param]


def test_solution_hypergradient_and_generator_are_those_of_a_plain_loop(estimator: Any) -> None:
    w, x, lr = leaves()
    expected, stand = seeded(unrolled, w, x, lr)
    wanted = torch.autograd.grad(expected.pow(3).sum(), [w, x, lr])
    actual, after = seeded(solved, w, x, lr, estimator)
    assert torch.equal(after, stand)
    assert_same([actual], [expected])
    assert_same(torch.autograd.grad(actual.pow(3).sum(), [w, x, lr]), wanted)
    assert torch.equal(torch.get_rng_state(), stand)


def test_only_the_draws_of_this_seed_give_this_hypergradient(estimator: Any) -> None:
    """Guards the test above: the masks matter."""
    w, x, lr = leaves()
    torch.manual_seed(SEED + 1)
    other = torch.autograd.grad(solved(w, x, lr, estimator).pow(3).sum(), [w, x, lr])
    wanted = torch.autograd.grad(seeded(unrolled, w, x, lr)[0].pow(3).sum(), [w, x, lr])
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(other, wanted, strict=True))


@pytest.mark.parametrize("last", [0, 2, 5])
def test_a_truncated_estimator_draws_in_all_steps(last: int) -> None:
    w, x, lr = leaves()
    expected, stand = seeded(unrolled, w, x, lr, None, last)
    actual, after = seeded(solved, w, x, lr, Truncated(last, checkpoint=2) if last else FirstOrder())
    assert torch.equal(after, stand)
    assert_same([actual], [expected])
    wanted = torch.autograd.grad(expected.pow(3).sum(), [w, x, lr], allow_unused=True, materialize_grads=True)
    assert_same(torch.autograd.grad(actual.pow(3).sum(), [w, x, lr]), wanted)


def test_draws_between_solve_and_backward_do_not_matter(estimator: Any) -> None:
    w, x, lr = leaves()
    wanted = torch.autograd.grad(seeded(unrolled, w, x, lr)[0].pow(3).sum(), [w, x, lr])
    actual, _ = seeded(solved, w, x, lr, estimator)
    torch.manual_seed(99)
    torch.rand(1000)
    before = torch.get_rng_state()
    assert_same(torch.autograd.grad(actual.pow(3).sum(), [w, x, lr]), wanted)
    assert torch.equal(torch.get_rng_state(), before)


def test_backward_twice_gives_the_same_numbers(estimator: Any) -> None:
    w, x, lr = leaves()
    actual, _ = seeded(solved, w, x, lr, estimator)
    value = actual.pow(3).sum()
    first = torch.autograd.grad(value, [w, x, lr], retain_graph=True)
    torch.rand(10)
    assert_same(torch.autograd.grad(value, [w, x, lr], retain_graph=True), first)
    torch.rand(10)
    assert_same(torch.autograd.grad(value, [x], retain_graph=True), first[1:2])  # fewer inputs than were recorded
    assert_same(torch.autograd.grad(value, [w, x, lr]), first)


def test_a_later_solve_does_not_disturb_an_earlier_one(estimator: Any) -> None:
    w, x, lr = leaves()
    torch.manual_seed(SEED)
    both = unrolled(w, x, lr).pow(3).sum() + unrolled(w, x, lr).pow(2).sum()
    wanted = torch.autograd.grad(both, [w, x, lr])
    torch.manual_seed(SEED)
    both = solved(w, x, lr, estimator).pow(3).sum() + solved(w, x, lr, estimator).pow(2).sum()
    assert_same(torch.autograd.grad(both, [w, x, lr]), wanted)


@pytest.mark.parametrize("checkpoint", ["graph", 1, 3])
def test_numbers_from_a_generator_of_the_losss_own_are_right_or_refused(checkpoint: Any) -> None:
    """Graphs need no other draw; a replay would draw other numbers, which is seen at the first step."""
    w, x, lr = leaves()
    generator = torch.Generator().manual_seed(SEED)
    masks = [torch.rand(x.shape, generator=generator, dtype=x.dtype) for _ in range(STEPS)]
    wanted = torch.autograd.grad(unrolled(w, x, lr, masks).pow(3).sum(), [w, x, lr])
    generator.manual_seed(SEED)
    optimizer, estimator = diffopt.SGD(lr, momentum=MOMENTUM), Reverse(checkpoint)
    drawing = partial(draw_and_evaluate, generator)
    if checkpoint == "graph":
        end = diffopt.solve(drawing, w, x, optimizer=optimizer, steps=STEPS, estimator=estimator).params.pow(3).sum()
        assert_same(torch.autograd.grad(end, [w, x, lr]), wanted)
    else:
        with pytest.raises(diffopt.RandomnessError, match="draws from a generator of its own"):
            diffopt.solve(drawing, w, x, optimizer=optimizer, steps=STEPS, estimator=estimator)


def draw_and_evaluate(generator: torch.Generator, w: Tensor, x: Tensor) -> Tensor:
    return given_mask(w, x, torch.rand(x.shape, generator=generator, dtype=x.dtype))


# ------------------------------------------------------------------------------------------------ under vmap


def tasks() -> list[Tensor]:
    """Start and learning rate shared by the tasks, data of their own."""
    w, x, lr = leaves()
    return [w, torch.stack([x.detach() * (1 + 0.2 * i) for i in range(TASKS)]).requires_grad_(), lr]


def by_vmap(inputs: list[Tensor], estimator: Any, randomness: str) -> tuple[Tensor, ...]:
    each = vmap(lambda w, x, lr: solved(w, x, lr, estimator), in_dims=(None, 0, None), randomness=randomness)
    return torch.autograd.grad(each(*inputs).pow(3).sum(), inputs)


def by_vmap_of_grad(inputs: list[Tensor], estimator: Any, randomness: str) -> tuple[Tensor, ...]:
    derivative = grad(lambda w, x, lr: solved(w, x, lr, estimator).pow(3).sum(), argnums=(0, 1, 2))
    w, x, lr = vmap(derivative, in_dims=(None, 0, None), randomness=randomness)(*(i.detach() for i in inputs))
    return w.sum(0), x, lr.sum(0)


@pytest.mark.parametrize("style", [by_vmap, by_vmap_of_grad])
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_under_vmap_the_masks_are_those_of_vmapped_draws(estimator: Any, randomness: str, style: Any) -> None:
    inputs = tasks()
    w, x, lr = inputs
    torch.manual_seed(SEED)
    draws = [vmap(dropout, randomness=randomness)(x.detach()) for _ in range(STEPS)]  # one per step, [task, ...]
    stand = torch.get_rng_state()
    assert torch.equal(draws[0][0], draws[0][1]) == (randomness == "same")
    ends = [unrolled(w, x[i], lr, [draw[i] for draw in draws]) for i in range(TASKS)]
    wanted = torch.autograd.grad(torch.stack(ends).pow(3).sum(), inputs)
    torch.manual_seed(SEED)
    assert_same(style(inputs, estimator, randomness), wanted)
    assert torch.equal(torch.get_rng_state(), stand)


AT_ONCE = ["forward", "forward in chunks"]
"""They compute steps again under a vmap, where torch draws in another order for a tensor that is turned."""

OTHERS = {"unrolled", "truncated in states", *AT_ONCE}  # (truncation refuses an outer loss of what was observed)
STEP_BY_STEP = [pytest.param(estimator, id=name) for name, estimator in EXACT.items() if name not in OTHERS]


@pytest.mark.parametrize("estimator", STEP_BY_STEP)
def test_under_grad_a_tensor_that_is_turned_is_dropped_as_in_a_plain_loop(estimator: Any) -> None:
    """Under a vmap torch draws in another order for it; the first step is looked at under an empty one."""

    def turned(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = functional.dropout(torch.ones_like(x).t(), 0.4).t()
        return given_mask(w, x, mask), mask

    def observe(w: Tensor, x: Tensor) -> Tensor:
        return (functional.dropout(torch.ones_like(x).t(), 0.4).t() @ w).sum()

    def outer(w: Tensor, x: Tensor, lr: Tensor) -> tuple[Tensor, Any]:
        optimizer = diffopt.SGD(lr, momentum=MOMENTUM)
        options = {"optimizer": optimizer, "steps": STEPS, "estimator": estimator, "has_aux": True, "observe": observe}
        found = diffopt.solve(turned, w, x, **options)
        return found.params.pow(3).sum() + found.observed.sum(), found.aux

    def by_hand(w: Tensor, x: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        velocity, masks, total = torch.zeros_like(w), [], torch.zeros(())
        for _ in range(STEPS):
            value, mask = turned(w, x)
            masks.append(mask)
            velocity = MOMENTUM * velocity + torch.autograd.grad(value, w, create_graph=True)[0]
            w = w - lr * velocity
            total = total + observe(w, x)
        return w.pow(3).sum() + total, torch.stack(masks)

    inputs = leaves()
    torch.manual_seed(SEED)
    expected, masks = by_hand(*inputs)
    wanted = torch.autograd.grad(expected, inputs)
    torch.manual_seed(SEED)
    found, drawn = grad(outer, (0, 1, 2), has_aux=True)(*[x.detach() for x in inputs])
    assert torch.equal(drawn, masks)
    assert_same(found, wanted)


@pytest.mark.parametrize("name", AT_ONCE)
@pytest.mark.parametrize("under", [grad, lambda f: f], ids=["grad", "plain"])
def test_a_tensor_that_is_turned_is_refused_where_steps_are_computed_again_at_once(name: str, under: Any) -> None:
    w, x, lr = leaves()

    def turned(w: Tensor, x: Tensor) -> Tensor:
        return given_mask(w, x, functional.dropout(torch.ones_like(x).t(), 0.4).t())

    def outer(w: Tensor) -> Tensor:
        return diffopt.solve(turned, w, x, optimizer=diffopt.SGD(lr), steps=STEPS, estimator=EXACT[name]).params.sum()

    with pytest.raises(diffopt.RandomnessError, match="came out differently"):
        torch.autograd.grad(under(outer)(w).sum(), w)


@pytest.mark.parametrize("style", [by_vmap, by_vmap_of_grad])
def test_under_vmap_that_forbids_random_numbers_the_error_says_what_to_do(estimator: Any, style: Any) -> None:
    with pytest.raises(diffopt.RandomnessError, match="randomness='different'"):
        style(tasks(), estimator, "error")


@pytest.mark.parametrize("name", [name for name in EXACT if name != "unrolled"])
def test_jacrev_over_a_random_loss_is_refused(name: str) -> None:
    """It runs the pullback under a vmap that the rollout did not run under, where the numbers would be others."""
    w, x, lr = (leaf.detach() for leaf in leaves())
    with pytest.raises(diffopt.RandomnessError, match="loop instead of vmap"):
        jacrev(lambda w: solved(w, x, lr, EXACT[name]))(w)


AGAIN = [*biased(2, "evolution", "binomial", "krylov", "implicit").values(), Reverse(1)]


@pytest.mark.parametrize("estimator", AGAIN, ids=str)
def test_a_loss_with_random_numbers_of_its_own_is_refused_by_every_estimator_that_evaluates_it_again(estimator):
    own = np.random.default_rng(0)
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def loss(w):
        return (torch.from_numpy(own.random(4)) * w).square().sum()

    solution = diffopt.solve(loss, w, optimizer=diffopt.SGD(0.1), steps=4, estimator=estimator)
    with pytest.raises(diffopt.RandomnessError, match="came out differently"):
        solution.params.sum().backward()


@pytest.mark.parametrize("estimator", [Reverse(), Reverse("graph"), Reverse(1), Truncated(2)], ids=str)
@pytest.mark.parametrize("changed", ["a number", "a module's mode"])
def test_a_loss_that_has_changed_is_refused_by_the_second_backward_pass(estimator: Any, changed: str) -> None:
    factor, layer = {"is": 1.0}, torch.nn.Dropout(0.5).eval()
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    end = diffopt.solve(
        lambda w: factor["is"] * layer(w).square().sum(), w, optimizer=diffopt.SGD(0.1), steps=4, estimator=estimator
    ).params.sum()
    torch.autograd.grad(end, w, retain_graph=True)
    if changed == "a number":
        factor["is"] = 1.5
    else:
        layer.train()
    with pytest.raises(diffopt.RandomnessError, match="came out differently"):
        torch.autograd.grad(end, w)


# ------------------------------------------------------------------------------------------------ beside other threads


def draws_of_everything(w: Tensor, x: Tensor) -> Tensor:
    """Each way of drawing, in one loss; a number from every one moves it."""
    like = torch.empty_like(w)
    parts = [
        torch.rand_like(w),
        torch.randn_like(w),
        torch.randint_like(w, 5),
        torch.randint_like(w, 2, 7),
        torch.rand(4, dtype=w.dtype),
        torch.randn(4, dtype=w.dtype),
        torch.normal(torch.zeros_like(w), 1.0),
        torch.bernoulli(torch.full_like(w, 0.5)),
        torch.randperm(4).to(w.dtype),
        torch.randint(9, (4,)).to(w.dtype),
        torch.multinomial(torch.ones(6), 4).to(w.dtype),
        torch.poisson(torch.full_like(w, 3.0)),
        like.clone().uniform_(-1, 1),
        like.clone().normal_(),
        like.clone().exponential_(),
        like.clone().cauchy_().clamp(-3, 3),
        like.clone().geometric_(0.4).clamp(max=9),
        like.clone().log_normal_().clamp(max=9),
        functional.dropout(torch.ones_like(w), 0.4),
        functional.dropout(torch.ones_like(w), 0.9).add(1),
        functional.alpha_dropout(torch.ones_like(w), 0.4, training=True),
        functional.rrelu(-torch.ones_like(w), training=True),
        torch.distributions.Gamma(torch.full_like(w, 2.0), 1.0).sample(),
        torch.distributions.Beta(torch.full_like(w, 2.0), 1.0).sample(),
    ]
    return (w * torch.stack(parts).sum(0)).sum().tanh() + given_mask(w, x, torch.ones_like(x))


@pytest.mark.parametrize("drawing", [loss, draws_of_everything])
def test_a_replay_beside_another_thread_draws_the_same_numbers(drawing: Any) -> None:
    """And leaves the generator where it is: it draws from one of its own."""
    estimators = [
        estimator for estimator in EXACT.values() if not isinstance(estimator, ForwardMode | type(Unrolled()))
    ]
    estimators = [Reverse(1), Reverse(3), Truncated(STEPS, checkpoint=2)] if drawing is not loss else estimators
    w, x, lr = leaves()

    def hypergradient(estimator: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)
        optimizer = diffopt.SGD(lr, momentum=MOMENTUM)
        end = diffopt.solve(drawing, w, x, optimizer=optimizer, steps=STEPS, estimator=estimator).params
        return torch.autograd.grad(end.pow(3).sum(), [w, x, lr])

    expected = hypergradient(Reverse("graph"))
    ended, states = threading.Event(), []
    waiting = threading.Thread(target=ended.wait, args=(120,))
    waiting.start()
    try:
        for estimator in estimators:
            assert_same(hypergradient(estimator), expected)
            states.append(torch.get_rng_state())
    finally:
        ended.set()
        waiting.join()
    torch.manual_seed(SEED)
    diffopt.solve(drawing, w, x, optimizer=diffopt.SGD(lr, momentum=MOMENTUM), steps=STEPS)
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)


def test_another_thread_gets_no_number_twice() -> None:
    """It draws as fast as it can while dropout is replayed."""
    seen: set[tuple[float, ...]] = set()
    repeated, ended = [], threading.Event()

    def draw() -> None:
        while not ended.is_set():
            pair = tuple(torch.rand(2, dtype=torch.float64).tolist())
            repeated.extend([pair] if pair in seen else [])
            seen.add(pair)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(20):
            w = torch.randn(20, dtype=torch.float64, requires_grad=True)
            with suppress(diffopt.RandomnessError):  # what the rollout itself draws, another thread may draw between
                options = {"optimizer": diffopt.SGD(0.1), "steps": 4, "estimator": Reverse(1)}
                loss = lambda w: (torch.rand(20, dtype=w.dtype) * w.square()).sum()  # noqa: E731
                diffopt.solve(loss, w, **options).params.sum().backward()
    finally:
        ended.set()
        thread.join()
    assert len(seen) > 10
    assert not repeated
