"""Losses that keep a state besides their arguments: right where steps are computed once, refused where twice.

The oracle is a plain loop unrolled by autograd, which evaluates the loss as often as there are steps.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from estimator_names import biased, exact
from torch import Tensor, nn
from torch.func import functional_call

import diffopt
from diffopt.estimators import Binomial, FirstOrder, ForwardMode, Reverse, Truncated
from diffopt.rollout import keeper

STEPS, LR, MOMENTUM = 4, 0.1, 0.3
TINY = 1e-9
"""How much a state moves the loss: far less than replayed losses are held to."""
X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Loss = Callable[..., Tensor]


def start() -> Tensor:
    return torch.tensor([0.5, -0.4, 0.3], dtype=torch.float64, requires_grad=True)


def mean(w: Tensor) -> Tensor:
    return (X @ w - 1).square().mean()


class Average(nn.Module):
    """Reads a running average of its losses; ``anew``: a new tensor takes the place of the buffer at every call."""

    def __init__(self, anew: bool) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones((), dtype=torch.float64))
        self.anew = anew

    def forward(self, w: Tensor) -> Tensor:
        loss = mean(w) + TINY * self.average * w.sum()
        with torch.no_grad():
            if self.anew:
                self.average = 0.9 * self.average + 0.1 * loss
            else:
                self.average.mul_(0.9).add_(0.1 * loss)
        return loss


class Statistics(nn.Module):
    """Reads the running statistics of a batch norm that counts no batches: torch does not count that as written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(3, dtype=torch.float64))

    def forward(self, w: Tensor) -> Tensor:
        nn.functional.batch_norm(X * w.detach(), self.mean, self.variance, training=True)
        return mean(w) + TINY * (self.mean * w.pow(3)).sum()


class Codebook(nn.Module):
    """Keeps vectors in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.book = [torch.ones(3, dtype=torch.float64)]

    def forward(self, w: Tensor) -> Tensor:
        loss = mean(w) + TINY * (w * self.book[0]).sum()
        self.book[0] = 0.9 * self.book[0] + 0.1 * w.detach()
        return loss


class Counting:
    """An object that counts its calls, of which its loss depends on those after ``quiet``."""

    def __init__(self, quiet: int = 0) -> None:
        self.calls, self.quiet = 0, quiet

    def __call__(self, w: Tensor) -> Tensor:
        self.calls += 1
        return mean(w) * (1 + TINY * max(self.calls - self.quiet, 0))


class Around:
    def __init__(self) -> None:
        self.inner = Average(anew=False)

    def loss(self, w: Tensor) -> Tensor:
        return self.inner(w)


def of_variable() -> Loss:
    calls = 0

    def loss(w: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return mean(w) * (1 + TINY * calls)

    return loss


def of_default() -> Loss:
    def loss(w: Tensor, held: dict[str, int] = {"calls": 0}) -> Tensor:  # noqa: B006  (that is the point)
        held["calls"] += 1
        return mean(w) * (1 + TINY * held["calls"])

    loss.__defaults__ = ({"calls": 0},)
    return loss


evaluations = 0


def of_global() -> Loss:
    global evaluations
    evaluations = 0

    def loss(w: Tensor) -> Tensor:
        global evaluations
        evaluations += 1
        return mean(w) * (1 + TINY * evaluations)

    return loss


def of_history() -> Loss:
    before: deque[Tensor] = deque([torch.zeros(3, dtype=torch.float64)], maxlen=1)

    def loss(w: Tensor) -> Tensor:
        last = before[-1]
        before.append(w.detach())
        return mean(w) + TINY * (w * last).sum()

    return loss


def spectral() -> Loss:
    torch.manual_seed(0)
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)).double().requires_grad_(False)
    net.parametrizations.weight[0]._v.copy_(torch.tensor([1.0, 0, 0]))  # where the power iteration has not converged
    return lambda w: mean(w) + 0.1 * net(w).square().mean()


KEPT: dict[str, Callable[[], Loss]] = {
    "buffer": lambda: Average(anew=False),
    "buffer_replaced": lambda: Average(anew=True),
    "running_statistics": Statistics,
    "list_of_tensors": Codebook,
    "attribute": Counting,
    "attribute_late": lambda: Counting(quiet=2),
    "bound_method": lambda: Around().loss,
    "variable": of_variable,
    "default": of_default,
    "global": of_global,
    "history": of_history,
    "spectral_norm": spectral,
}
ONCE = exact(STEPS, "default", "graph", "unrolled", "truncated at all", "window of one")
AGAIN = {
    **exact(STEPS, "states", "every second", "sqrt", "forward"),
    **biased(2, "truncated", "binomial", "krylov", "evolution", "implicit"),
}


def solve(loss: Loss, w: Tensor, estimator: Any, **options: Any) -> Tensor:
    optimizer = diffopt.SGD(LR, momentum=MOMENTUM)
    return diffopt.solve(loss, w, optimizer=optimizer, steps=STEPS, estimator=estimator, **options).params


def hypergradient(loss: Loss, estimator: Any, **options: Any) -> Tensor:
    w = start()
    return torch.autograd.grad(solve(loss, w, estimator, **options).pow(3).sum(), w)[0]


def unrolled(loss: Loss) -> Tensor:
    w = now = start()
    velocity = torch.zeros_like(w)
    for _ in range(STEPS):
        velocity = MOMENTUM * velocity + torch.autograd.grad(loss(now), now, create_graph=True)[0]
        now = now - LR * velocity
    return torch.autograd.grad(now.pow(3).sum(), w)[0]


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Far above rounding, and far below a billionth, by which the state moves the loss."""
    assert (got - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("estimator", ONCE)
@pytest.mark.parametrize("kind", KEPT)
def test_a_state_is_right_where_every_step_is_computed_once(kind: str, estimator: str) -> None:
    assert_same(hypergradient(KEPT[kind](), ONCE[estimator]), unrolled(KEPT[kind]()))


@pytest.mark.parametrize("estimator", AGAIN)
@pytest.mark.parametrize("kind", KEPT)
def test_a_state_is_refused_where_a_step_is_computed_again(kind: str, estimator: str) -> None:
    with pytest.raises(diffopt.HiddenStateError, match=r"keeps a state, .*expected the same number again"):
        hypergradient(KEPT[kind](), AGAIN[estimator])


@pytest.mark.parametrize("kind", sorted({*KEPT} - {"attribute_late"}))
@pytest.mark.parametrize("estimator", [Reverse(1), Reverse("sqrt"), Truncated(2, checkpoint=1), Binomial(1)], ids=repr)
def test_it_is_refused_at_the_first_step_before_the_others_cost_anything(kind: str, estimator: Any) -> None:
    """If it moves the first loss, the solve itself refuses it."""
    calls = 0
    inner = KEPT[kind]()

    def loss(w: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return inner(w)

    with pytest.raises(diffopt.HiddenStateError):
        solve(loss, start(), estimator)
    assert calls <= 2


@pytest.mark.parametrize("kind", KEPT)
def test_a_large_graph_turns_nothing_wrong(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """``Reverse()`` keeps the graphs of such a loss whatever their size, if it knows of its state at the first step."""
    monkeypatch.setattr(keeper, "GRAPH_BUDGET", 0)
    loss = KEPT[kind]()
    if kind == "attribute_late":
        with pytest.raises(diffopt.HiddenStateError):
            solve(loss, start(), Reverse())
    else:
        assert_same(hypergradient(loss, Reverse()), unrolled(KEPT[kind]()))


@pytest.mark.parametrize("estimator", [Reverse(), Reverse("graph"), Truncated(STEPS)], ids=repr)
@pytest.mark.parametrize("kind", ["buffer", "attribute", "list_of_tensors", "spectral_norm"])
def test_a_second_backward_pass_would_compute_again(kind: str, estimator: Any) -> None:
    w = start()
    end = solve(KEPT[kind](), w, estimator).pow(3).sum()
    torch.autograd.grad(end, w, retain_graph=True)
    with pytest.raises(diffopt.HiddenStateError):
        torch.autograd.grad(end, w)


@pytest.mark.parametrize("kind", ["buffer", "attribute", "variable"])
def test_without_check_nothing_is_looked_at(kind: str) -> None:
    got, right = hypergradient(KEPT[kind](), Reverse(1), check=False), unrolled(KEPT[kind]())
    torch.testing.assert_close(got, right, rtol=1e-6, atol=0)


def drawing() -> Loss:
    generator = torch.Generator().manual_seed(3)
    return lambda w: mean(w) + TINY * (torch.rand(3, generator=generator, dtype=torch.float64) * w).sum()


@pytest.mark.parametrize("estimator", AGAIN)
def test_a_generator_of_the_losss_own_is_named(estimator: str) -> None:
    with pytest.raises(diffopt.RandomnessError, match="draws from a generator of its own"):
        hypergradient(drawing(), AGAIN[estimator])


@pytest.mark.parametrize("budget", [2**30, 0])
def test_a_generator_of_the_losss_own_is_right_where_every_step_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """The look at what it moves, which a large graph makes necessary, leaves it where it was."""
    monkeypatch.setattr(keeper, "GRAPH_BUDGET", budget)
    assert_same(hypergradient(drawing(), Reverse()), unrolled(drawing()))


# ------------------------------------------------------------------------------------------------ no false alarm


class Normed(nn.Module):
    """Batch norm in training mode, which keeps statistics and reads those of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).tanh())


@pytest.mark.parametrize("budget", [2**30, 0])
@pytest.mark.parametrize("estimator", [*ONCE.values(), Reverse(1), Reverse(2), FirstOrder(), Truncated(2, 1)], ids=repr)
def test_batch_norm_is_exact_and_its_statistics_are_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, estimator: Any, budget: int
) -> None:
    monkeypatch.setattr(keeper, "GRAPH_BUDGET", budget)
    nets = []
    for _ in range(2):
        torch.manual_seed(2)
        nets.append(Normed().double())
    now = dict(nets[0].named_parameters())
    velocity = {name: torch.zeros_like(x) for name, x in now.items()}
    for _ in range(STEPS):
        loss = functional_call(nets[0], now, (X,)).sub(1).square().mean()
        grads = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        velocity = {name: MOMENTUM * velocity[name] + g for name, g in zip(now, grads, strict=True)}
        now = {name: x - LR * velocity[name] for name, x in now.items()}
    wanted = torch.autograd.grad(sum(x.pow(3).sum() for x in now.values()), list(nets[0].parameters()))
    params = dict(nets[1].named_parameters())
    options = {"optimizer": diffopt.SGD(LR, momentum=MOMENTUM), "steps": STEPS, "estimator": estimator}
    end = diffopt.solve(lambda p: functional_call(nets[1], p, (X,)).sub(1).square().mean(), params, **options).params
    for name, buffer in nets[1].named_buffers():
        torch.testing.assert_close(buffer, nets[0].get_buffer(name), rtol=1e-12, atol=0)
    got = torch.autograd.grad(sum(x.pow(3).sum() for x in end.values()), list(params.values()))
    if estimator in (*ONCE.values(), Reverse(1), Reverse(2)):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-14)


class Watched:
    """Notes what it sees and changes no number: a counter, a list, the last params, an average."""

    def __init__(self) -> None:
        self.calls, self.losses, self.last, self.average = 0, list[float](), None, torch.zeros((), dtype=torch.float64)

    def __call__(self, w: Tensor) -> Tensor:
        loss = mean(w)
        self.calls, self.last = self.calls + 1, w.detach().sum()
        self.losses.append(float(loss.detach()))
        self.average.mul_(0.9).add_(loss.detach())
        return loss


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Reverse("sqrt"), Truncated(STEPS, 2)], ids=repr)
def test_what_a_loss_only_notes_is_right_and_what_it_noted_is_that_of_a_plain_loop(estimator: Any) -> None:
    oracle, watched, w = Watched(), Watched(), start()
    wanted = unrolled(oracle)
    end = solve(watched, w, estimator)
    assert (watched.calls, watched.losses) == (oracle.calls, pytest.approx(oracle.losses, rel=1e-12))
    torch.testing.assert_close([watched.average, watched.last], [oracle.average, oracle.last], rtol=1e-12, atol=0)
    assert_same(torch.autograd.grad(end.pow(3).sum(), w)[0], wanted)


def test_what_is_set_once_is_no_state() -> None:
    """An initialisation by the data, at the first call."""

    class Scaled:
        scale: float | None = None

        def __call__(self, w: Tensor) -> Tensor:
            self.scale = float((X @ w.detach()).std()) if self.scale is None else self.scale
            return (X @ w / self.scale - 1).square().mean()

    for estimator in (Reverse(1), Binomial(STEPS), ForwardMode()):
        assert_same(hypergradient(Scaled(), estimator), unrolled(Scaled()))


def test_an_iterator_cannot_be_seen_and_is_held_to_its_losses() -> None:
    numbers = itertools.count()
    with pytest.raises(diffopt.RandomnessError, match="came out differently"):
        hypergradient(lambda w: mean(w) * (1 + 1e-3 * next(numbers)), Reverse(1))


def test_frozen_spectral_norm_is_right() -> None:
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)).double().requires_grad_(False).eval()
    for estimator in (Reverse(1), Binomial(STEPS)):
        assert_same(
            hypergradient(lambda w: net(w[None]).square().mean(), estimator), unrolled(lambda w: net(w).square().mean())
        )


@pytest.mark.parametrize("estimator", [Reverse(), Truncated(4)], ids=str)
def test_random_numbers_are_no_state_where_graphs_are_too_large(
    estimator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step that is kept, which need not be the first, is computed again on its own numbers."""
    monkeypatch.setattr(keeper, "GRAPH_BUDGET", 0)
    w = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).requires_grad_()
    torch.manual_seed(0)
    options = {"optimizer": diffopt.SGD(0.1), "steps": 9, "estimator": estimator}
    solution = diffopt.solve(lambda w: torch.nn.functional.dropout(w, 0.5).square().sum(), w, **options)
    assert isinstance(solution.kept.checkpoint, int)
