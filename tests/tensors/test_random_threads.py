"""Random numbers drawn again in a backward pass, alone and beside threads that draw from the same generator.

Beside a thread every operation that draws is given a generator of its own; each of them is compared, bit for bit, with
torch's own numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from estimator_names import exact
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F  # noqa: N812  (its usual name)

import diffopt
from diffopt.estimators import Reverse
from diffopt.tensors import random_state

CPU = torch.device("cpu")
RECOMPUTING = exact(5, "states", "every second", "sqrt", "forward", "truncated in states")


@contextmanager
def waiting_thread() -> Iterator[None]:
    """Another thread that is alive, and draws nothing."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


BESIDE = {"beside a thread": waiting_thread, "alone": nullcontext}


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64, **options})


HALF, RATES = torch.full((4, 3), 0.5, dtype=torch.float64), torch.arange(1.0, 13.0, dtype=torch.float64).view(4, 3)

DRAWS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(5),
    "rand of float64": lambda: torch.rand(2, 3, dtype=torch.float64),
    "rand of float16": lambda: torch.rand(7, dtype=torch.float16),
    "randn": lambda: torch.randn(3, 40),
    "randn of a few": lambda: torch.randn(3, dtype=torch.float64),
    "complex randn": lambda: torch.randn(3, dtype=torch.complex128),
    "randint": lambda: torch.randint(10, (4, 5)),
    "randint from": lambda: torch.randint(-5, 10, (40,), dtype=torch.int32),
    "randperm": lambda: torch.randperm(30),
    "rand_like": lambda: torch.rand_like(HALF),
    "rand_like of another dtype": lambda: torch.rand_like(HALF, dtype=torch.float32),
    "rand_like of a transpose": lambda: torch.rand_like(RATES.T),
    "rand_like of an expanded tensor": lambda: torch.rand_like(HALF[:1].expand(4, 3)),
    "randn_like": lambda: torch.randn_like(HALF),
    "randn_like of many": lambda: torch.randn_like(zeros(50)),
    "complex randn_like": lambda: torch.randn_like(zeros(5, dtype=torch.complex128)),
    "randint_like": lambda: torch.randint_like(RATES, 7),
    "randint_like from": lambda: torch.randint_like(RATES, -3, 7),
    "randint_like below a tensor": lambda: torch.randint_like(RATES, torch.tensor(7)),
    "bernoulli": lambda: torch.bernoulli(HALF),
    "bernoulli with p": lambda: torch.bernoulli(HALF, 0.3),
    "bernoulli_": lambda: zeros(9).bernoulli_(0.3),
    "bernoulli_ of a tensor": lambda: zeros(4, 3).bernoulli_(HALF),
    "dropout": lambda: F.dropout(RATES, 0.4),
    "dropout_": lambda: F.dropout(RATES.clone(), 0.4, inplace=True),
    "native_dropout": lambda: torch.native_dropout(RATES, 0.4, True)[0],
    "alpha_dropout": lambda: F.alpha_dropout(RATES, 0.4),
    "feature_dropout": lambda: F.dropout1d(RATES[None], 0.4),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(RATES[None], 0.4),
    "multinomial": lambda: torch.multinomial(RATES, 2),
    "multinomial with repeats": lambda: torch.multinomial(RATES, 9, replacement=True),
    "normal of tensors": lambda: torch.normal(RATES, HALF),
    "normal of a mean": lambda: torch.normal(RATES, 2.0),
    "normal of a deviation": lambda: torch.normal(1.0, HALF),
    "normal of numbers": lambda: torch.normal(1.0, 2.0, (40,)),
    "normal_": lambda: zeros(40).normal_(1, 2),
    "uniform_": lambda: zeros(7).uniform_(-1, 2),
    "random_": lambda: zeros(7).random_(),
    "random_ to": lambda: zeros(7).random_(9),
    "random_ from": lambda: zeros(7).random_(-9, 9),
    "exponential_": lambda: zeros(7).exponential_(2.0),
    "cauchy_": lambda: zeros(7).cauchy_(),
    "log_normal_": lambda: zeros(7).log_normal_(),
    "geometric_": lambda: zeros(7).geometric_(0.3),
    "poisson": lambda: torch.poisson(RATES),
    "binomial": lambda: torch.binomial(RATES, HALF),
    "gamma": lambda: torch._standard_gamma(RATES),
    "dirichlet": lambda: torch._sample_dirichlet(RATES),
    "rrelu": lambda: F.rrelu(-RATES, training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(RATES),
    "a distribution": lambda: torch.distributions.Normal(RATES, HALF).rsample(),
    "a beta distribution": lambda: torch.distributions.Beta(RATES, HALF).sample(),
    "initialisation": lambda: nn.init.kaiming_uniform_(zeros(4, 3)),
    "truncated normal": lambda: nn.init.trunc_normal_(zeros(4, 3)),
    "max pooling": lambda: F.fractional_max_pool2d(RATES.view(1, 1, 4, 3), 2, output_size=2),
    "attention": lambda: F.scaled_dot_product_attention(RATES[None], RATES[None], RATES[None], dropout_p=0.4),
    "vmap, different": lambda: vmap(lambda x: torch.rand(3) + x, randomness="different")(torch.zeros(4)),
    "vmap, same": lambda: vmap(lambda x: torch.rand(3) + x, randomness="same")(torch.zeros(4)),
    "vmapped dropout, different": lambda: vmap(lambda x: F.dropout(x, 0.4), randomness="different")(RATES),
    "vmapped dropout, same": lambda: vmap(lambda x: F.dropout(x, 0.4), randomness="same")(RATES),
    "vmapped randn_like": lambda: vmap(torch.randn_like, randomness="different")(RATES),
    "vmapped bernoulli": lambda: vmap(torch.bernoulli, randomness="different")(HALF),
    "vmapped randint": lambda: vmap(lambda x: torch.randint(9, (3,)) + x, randomness="different")(torch.zeros(4)),
    "nested vmap": lambda: vmap(
        vmap(lambda x: torch.rand(2, dtype=torch.float64) + x, randomness="different"), randomness="same"
    )(RATES),
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_is_drawn_again_is_the_same_bit_for_bit(draw: Callable[[], Tensor], beside: Any) -> None:
    """Twice, so that the second draw tells whether the first took as many numbers."""
    torch.manual_seed(11)
    torch.rand(3)
    states = random_state.snapshot(CPU)
    expected, after = [draw(), draw(), torch.rand(2)], torch.get_rng_state()
    assert not torch.equal(after, states[0])
    torch.rand(5)
    stand = torch.get_rng_state()
    with beside(), random_state.replayed(states, CPU):
        found = [draw(), draw(), torch.rand(2)]
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), stand)


@pytest.mark.parametrize("name", DRAWS)
def test_beside_a_thread_the_global_generator_is_not_touched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But by the one operation that takes no generator and that nothing else can stand in for."""
    touched: list[Any] = []
    monkeypatch.setattr(torch, "set_rng_state", touched.append)
    with waiting_thread(), random_state.replayed(random_state.snapshot(CPU), CPU):
        DRAWS[name]()
    assert bool(touched) == (name == "native_dropout")


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_a_generator_of_the_callers_is_left_to_the_caller(beside: Any) -> None:
    torch.manual_seed(11)
    states, generator = random_state.snapshot(CPU), torch.Generator().manual_seed(4)
    expected = [torch.rand(3, generator=torch.Generator().manual_seed(4)), torch.rand(2)]
    with beside(), random_state.replayed(states, CPU):
        found = [torch.rand(3, generator=generator), torch.rand(2)]
    assert torch.equal(torch.cat(found), torch.cat(expected))


# ------------------------------------------------------------------------------------------------ whole solves


def drawing(w: Tensor, x: Tensor) -> Tensor:
    """Draws by dropout and by a function that has no generator."""
    noise = torch.randn_like(x) * torch.rand(4, dtype=torch.float64)
    return (F.dropout(x, 0.3) @ torch.tanh(w) - 1 + 0.1 * noise.sum(-1)).square().mean() + 0.1 * w.pow(4).sum()


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    w, x = (torch.randn(size, dtype=torch.float64, generator=generator) for size in (4, (5, 4)))
    return w.requires_grad_(), x.requires_grad_()


def solution(w: Tensor, x: Tensor, estimator: Any) -> Tensor:
    return diffopt.solve(drawing, w, x, optimizer=diffopt.SGD(0.1, momentum=0.5), steps=5, estimator=estimator).params


def by_loop(w: Tensor, x: Tensor) -> Tensor:
    velocity = torch.zeros_like(w)
    for _ in range(5):
        velocity = 0.5 * velocity + torch.autograd.grad(drawing(w, x), w, create_graph=True)[0]
        w = w - 0.1 * velocity
    return w


def seeded(function: Callable[..., Any], *inputs: Any) -> Any:
    torch.manual_seed(5)
    return function(*inputs)


def by_plain_loop() -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """What is learned, and its hypergradient."""
    inputs = list(given())
    return inputs, torch.autograd.grad(seeded(by_loop, *inputs).pow(3).sum(), inputs)


class Drawer:
    """A thread that draws from the global generator for as long as it is entered, and keeps what it drew."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, ...]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.seen.append(tuple(torch.rand(2, dtype=torch.float64).tolist()))

    def __enter__(self) -> Drawer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def repeats(self) -> int:
        return len(self.seen) - len(set(self.seen))


@pytest.mark.parametrize("estimator", RECOMPUTING.values(), ids=RECOMPUTING)
def test_a_backward_pass_beside_a_drawing_thread_is_right_and_takes_nothing_from_it(estimator: Any) -> None:
    """The solve is alone; only its backward passes run while another thread draws."""
    inputs, expected = by_plain_loop()
    values = [seeded(solution, *inputs, estimator).pow(3).sum() for _ in range(8)]
    with Drawer() as drawer:
        found = [torch.autograd.grad(value, inputs) for value in values]
    assert len(drawer.seen) > 10
    assert drawer.repeats == 0
    for got in found:
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("estimator", RECOMPUTING.values(), ids=RECOMPUTING)
def test_backward_passes_through_one_graph_beside_a_drawing_thread_are_right(estimator: Any) -> None:
    """All but the first roll out again."""
    inputs, expected = by_plain_loop()
    value = seeded(solution, *inputs, estimator).pow(3).sum()
    with Drawer() as drawer:
        found = [torch.autograd.grad(value, inputs, retain_graph=True) for _ in range(8)]
    assert drawer.repeats == 0
    for got in found:
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("estimator", RECOMPUTING.values(), ids=RECOMPUTING)
def test_a_backward_pass_beside_a_quiet_thread_is_that_without(estimator: Any) -> None:
    inputs, expected = by_plain_loop()
    value = seeded(solution, *inputs, estimator).pow(3).sum()
    stand = torch.get_rng_state()
    with waiting_thread():
        found = torch.autograd.grad(value, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert torch.equal(torch.get_rng_state(), stand)


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("estimator", RECOMPUTING.values(), ids=RECOMPUTING)
def test_tasks_beside_a_thread(estimator: Any, randomness: str) -> None:
    w, x = (leaf.detach() for leaf in given())
    tasks = torch.stack([x, 2 * x])
    of_one = grad(lambda w, x: solution(w, x, estimator).pow(3).sum(), argnums=(0, 1))
    each = vmap(of_one, in_dims=(None, 0), randomness=randomness)
    expected = seeded(each, w, tasks)
    with waiting_thread():
        found = seeded(each, w, tasks)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_a_solve_beside_a_drawing_thread_is_right_or_refused() -> None:
    """The rollout itself shares the generator with the thread, which cannot be helped; no number is wrong in silence.

    The oracle reads what a step drew off its loss.
    """

    def loss(w: Tensor) -> Tensor:
        return (torch.rand(1, dtype=torch.float64) * w**2).sum()

    right, reasons = 0, {True}
    with Drawer() as drawer:
        for _ in range(40):
            start = torch.ones(1, dtype=torch.float64, requires_grad=True)
            solution = diffopt.solve(loss, start, optimizer=diffopt.SGD(0.1), steps=3, estimator=Reverse(1))
            w, slope = 1.0, 1.0
            for value in solution.losses.tolist():
                draw = value / w**2
                w, slope = w * (1 - 0.2 * draw), slope * (1 - 0.2 * draw)
            try:
                (found,) = torch.autograd.grad(solution.params.sum(), start)
            except diffopt.RandomnessError as error:
                reasons.add("another thread drew" in str(error))
            else:
                assert float(found) == pytest.approx(slope, rel=1e-10)
                right += 1
    assert drawer.repeats == 0
    assert right > 0
    assert reasons == {True}


# ------------------------------------------------------------------------------------- solves within a replay


def in_pieces(w: Tensor, x: Tensor) -> Tensor:
    sgd, batches = diffopt.SGD(0.1), torch.stack([x[:4], x[1:]])
    return diffopt.solve(drawing, w, optimizer=sgd, steps=2, batches=batches, micro_batches=2).params


def in_chunks(w: Tensor, x: Tensor) -> Tensor:
    tasks = torch.stack([x, 2 * x, 3 * x])
    return diffopt.mean_over_tasks(drawing, w, tasks, in_dims=(None, 0), task_chunk=1, randomness="same")


WITHIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: lambda w, x, estimator=estimator: solution(w, x, estimator) for name, estimator in RECOMPUTING.items()},
    "in pieces": in_pieces,
    "in chunks": in_chunks,
}


@pytest.mark.parametrize("run", WITHIN.values(), ids=WITHIN)
def test_a_solve_within_a_replay_beside_a_thread_is_that_without(run: Any) -> None:
    """Its rollout draws from the replay's own generators, and is to know where they stood."""
    w, x = given()
    torch.manual_seed(5)
    states = random_state.snapshot(CPU)
    first = run(w, x)
    expected = [first.detach(), *torch.autograd.grad(first.pow(3).sum(), [w, x]), torch.rand(3)]
    stand = torch.get_rng_state()
    with waiting_thread(), random_state.replayed(states, CPU):
        found = run(w, x)
        grads = torch.autograd.grad(found.pow(3).sum(), [w, x])
        got = [found.detach(), *grads, torch.rand(3)]
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    assert torch.equal(torch.get_rng_state(), stand)


def test_a_replay_that_outlives_the_other_thread_still_draws_the_same() -> None:
    w, x = given()
    torch.manual_seed(5)
    states = random_state.snapshot(CPU)
    expected = solution(w, x, Reverse(1)).sum().item(), torch.rand(3)
    with waiting_thread():
        replay = random_state.replayed(states, CPU)
        replay.__enter__()
    value = solution(w, x, Reverse(1)).sum()
    value.backward()
    got = value.item(), torch.rand(3)
    replay.__exit__(None, None, None)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_is_preserved_within_a_replay_is_drawn_again(beside: Any) -> None:
    stand = torch.get_rng_state()
    with beside(), random_state.replayed(random_state.snapshot(CPU), CPU):
        with random_state.preserved(CPU):
            first = torch.rand(3)
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), stand)


def test_check_of_a_loss_with_noise_beside_a_thread_finds_what_it_finds_without() -> None:
    w, x = given()
    alone = diffopt.check(drawing, w, x, directions=1, vmap=False, optimizer=diffopt.SGD(0.1), steps=3)
    assert alone.ok, alone
    assert "draws" in alone["deterministic"].measured
    torch.rand(7)
    with waiting_thread():
        found = diffopt.check(drawing, w, x, directions=1, vmap=False, optimizer=diffopt.SGD(0.1), steps=3)
    assert [(f.check, f.outcome) for f in found.findings] == [(f.check, f.outcome) for f in alone.findings], found
