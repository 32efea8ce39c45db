"""``EMA`` and ``Lookahead``: known answers, buffers, and what is refused."""

from __future__ import annotations

import pytest
import torch

import diffopt
from diffopt import EMA, SGD, Adam, Clip, Lookahead, Schedule
from diffopt.estimators import Binomial, ForwardMode, Reverse, Unrolled

DOUBLE = torch.float64
EXACT = [Reverse(), Reverse(1), Reverse("sqrt"), Unrolled(), ForwardMode()]


@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_the_average_of_a_geometric_sequence(estimator):
    """``w_t = q^t w`` and ``a_T = d^T w + (1 - d) w sum d^(T-t) q^t``, with ``q = 1 - lr``."""
    w = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    lr, decay = (torch.tensor(x, dtype=DOUBLE, requires_grad=True) for x in (0.3, 0.8))
    solution = diffopt.solve(lambda w: w**2 / 2, w, optimizer=EMA(SGD(lr), decay), steps=5, estimator=estimator)
    q = 1 - lr
    expected = w * (decay**5 + (1 - decay) * sum(decay ** (5 - t) * q**t for t in range(1, 6)))
    average = solution.state.buffers["average"]
    assert float(average.detach()) == pytest.approx(float(expected.detach()), rel=1e-14)
    assert float(solution.params.detach()) == pytest.approx(float((w * q**5).detach()), rel=1e-14)
    got, wanted = (torch.autograd.grad(x, [w, lr, decay]) for x in (average, expected))
    assert [float(x) for x in got] == pytest.approx([float(x) for x in wanted], rel=1e-12)


def test_buffers_are_trees_and_named_apart_at_any_depth():
    params = {"a": torch.ones(2), "b": torch.ones(1)}
    optimizer = EMA(Lookahead(EMA(Clip(SGD(0.1, 0.5), max_norm=1.0), 0.5), 2), 0.9)
    buffers = diffopt.solve(lambda p: p["a"].sum() + p["b"].sum(), params, optimizer=optimizer, steps=3).state.buffers
    assert sorted(buffers) == ["average", "inner.inner.average", "inner.inner.inner.velocity", "inner.slow"]
    assert buffers["average"]["a"].shape == (2,)
    assert not torch.equal(buffers["average"]["a"], buffers["inner.inner.average"]["a"])


@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_look_ahead_on_a_line(estimator):
    """On ``w`` with a step of 1: ahead by three, back to a part of it; two more steps are not cut short."""
    ratio = torch.tensor(0.25, dtype=DOUBLE, requires_grad=True)
    start = torch.tensor(0.0, dtype=DOUBLE)
    solution = diffopt.solve(lambda w: w, start, optimizer=Lookahead(SGD(1.0), 3, ratio), steps=8, estimator=estimator)
    assert float(solution.params.detach()) == -3.5
    assert float(solution.state.buffers["slow"].detach()) == -1.5
    (got,) = torch.autograd.grad(solution.params, ratio)
    assert float(got) == -6.0


def test_the_momentum_of_the_inner_optimizer_goes_on():
    options = {"optimizer": Lookahead(SGD(1.0, 0.5), period=1, ratio=0.5), "steps": 2}
    solution = diffopt.solve(lambda w: w, torch.tensor(0.0).double(), **options)
    assert float(solution.params) == -(0.5 * 1 + 0.5 * 1.5)
    assert float(solution.state.buffers["inner.velocity"]) == 1.5


def test_a_ratio_of_one_is_the_inner_optimizer_and_schedules_count_its_steps():
    def final(optimizer):
        return diffopt.solve(lambda w: w.cos().sum(), torch.arange(3.0).double(), optimizer=optimizer, steps=4).params

    assert torch.allclose(final(Lookahead(Adam(0.1), 2, 1.0)), final(Adam(0.1)), rtol=1e-14)
    ratios = Schedule(torch.tensor([9.0, 0.5, 9.0, 0.25]).double())
    end = diffopt.solve(lambda w: w, torch.tensor(0.0).double(), optimizer=Lookahead(SGD(1.0), 2, ratios), steps=4)
    assert float(end.params) == -1.0 - 0.5


def test_params_and_buffers_of_the_solution_are_tensors_of_their_own():
    solution = diffopt.solve(lambda w: w, torch.tensor(0.0), optimizer=Lookahead(SGD(1.0), 1), steps=1)
    assert solution.params.data_ptr() != solution.state.buffers["slow"].data_ptr()
    start = torch.tensor([0.0, 1.0])
    average = diffopt.solve(lambda w: w.sum(), start, optimizer=EMA(SGD(1.0)), steps=0).state.buffers["average"]
    average += 1
    assert start.tolist() == [0.0, 1.0]


def test_orders_look_at_the_number_of_the_step():
    """An estimator without graphs of the steps: at full order it is exact."""
    start = torch.tensor([0.3, -0.7], dtype=DOUBLE, requires_grad=True)

    def gradient(estimator):
        optimizer = Lookahead(SGD(0.3, 0.5), 2, 0.4)
        end = diffopt.solve(lambda w: w.cos().sum(), start, optimizer=optimizer, steps=5, estimator=estimator).params
        return torch.autograd.grad(end.square().sum(), start)[0]

    assert torch.allclose(gradient(Binomial(4, window=4)), gradient(Binomial(9, window=4)), rtol=1e-12)
    assert torch.allclose(gradient(Binomial(5)), gradient(Reverse()), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EMA(SGD(0.1), 1.0), r"EMA: decay is 1\.0, expected 0 <= decay < 1"),
        (lambda: EMA(SGD(0.1), -0.5), r"EMA: decay is -0\.5"),
        (lambda: EMA("SGD"), "EMA: optimizer is str 'SGD'"),
        (lambda: Lookahead(SGD(0.1), 0), "Lookahead: period is int 0, expected an integer >= 1"),
        (lambda: Lookahead(SGD(0.1), 2.5), r"Lookahead: period is float 2\.5"),
        (lambda: Lookahead(SGD(0.1), 2, 1.5), r"Lookahead: ratio is 1\.5"),
        (lambda: Lookahead(Adam, 2), "Lookahead: optimizer is .*call it"),
    ],
)
def test_options_out_of_their_ranges_are_refused(make, match):
    with pytest.raises((diffopt.HyperparameterError, diffopt.OptimizerError), match=match):
        make()
