"""Fixed points of optimizers whose buffers move, under ``Implicit``; and where a solve with a prox may end."""

from __future__ import annotations

import warnings

import pytest
import torch
from limits import sampled

import diffopt
from diffopt import EMA, SGD, Adam, AdamW, Clip, Groups, Lookahead, Proximal, ProximalGD
from diffopt.estimators import Implicit, Reverse
from diffopt.linear_solve import GMRES, Dense
from diffopt.prox import L1, Box, GroupL1, L2Ball, Nonnegative, Simplex

DOUBLE = torch.float64
AIM = [0.9, 0.7, -0.4]


def slopes(make, estimator, steps=600):
    """The derivative of a weighted sum of the end, by the strength and by the aim."""
    strength = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)
    aim = torch.tensor(AIM, dtype=DOUBLE, requires_grad=True)
    start, scales, weights = (
        torch.tensor(x, dtype=DOUBLE) for x in ([0.1, 0.2, 0.3], [1.0, 2.0, 0.5], [1.0, -0.5, 2.0])
    )
    options = {"optimizer": make(strength), "steps": steps, "estimator": estimator}
    end = diffopt.solve(lambda w, aim: (scales * (w - aim).square()).sum() / 2, start, aim, **options).params
    return torch.autograd.grad(weights @ end, [strength, aim], allow_unused=True, materialize_grads=True)


MOVING = {
    "momentum": lambda s: Proximal(SGD(0.2, momentum=0.5), L1(s)),
    "a learned momentum": lambda s: Proximal(SGD(0.2, momentum=torch.tensor(0.3, dtype=DOUBLE)), L1(s)),
    "nesterov": lambda s: Proximal(SGD(0.2, momentum=0.5, nesterov=True), GroupL1(s, 0)),
    "a ball": lambda s: Proximal(SGD(0.2, momentum=0.5), L2Ball(s)),
    "within EMA": lambda s: EMA(Proximal(SGD(0.2, momentum=0.5), L1(s)), 0.9),
    "around Clip": lambda s: Proximal(Clip(SGD(0.2, momentum=0.5), value=9.0), L1(s)),
    "within Groups": lambda s: Groups({"": Proximal(SGD(0.2, momentum=0.5), L1(s))}),
    "Lookahead": lambda s: Lookahead(SGD(0.2, weight_decay=s), 5),
    "Lookahead of a prox": lambda s: Lookahead(Proximal(SGD(0.2), L1(s)), 3),
}


@pytest.mark.parametrize("name", MOVING)
def test_buffers_that_move_the_fixed_point_are_not_held(name):
    with pytest.raises(diffopt.EstimatorError, match=r"holds the optimizer's buffers fixed.*whole_state=True"):
        slopes(MOVING[name], Implicit(GMRES(60, rtol=1e-12)))
    got = slopes(MOVING[name], Implicit(GMRES(60, rtol=1e-12), whole_state=True))
    torch.testing.assert_close(got, slopes(MOVING[name], Reverse()), rtol=1e-8, atol=1e-10)


RESTING = {
    "no momentum": lambda s: Proximal(SGD(0.2, momentum=0.0), L1(s)),
    "a center": lambda s: Proximal(ProximalGD(0.2, 0.3, torch.zeros(3, dtype=DOUBLE)), L1(s)),
    "the start as center": lambda s: Proximal(ProximalGD(0.2, 0.3), L1(s)),
    "an average around": lambda s: EMA(Proximal(SGD(0.2), L1(s)), 0.9),
    "an average within": lambda s: Proximal(EMA(SGD(0.2), 0.9), L1(s)),
    "a box after momentum": lambda s: Proximal(SGD(0.2, momentum=0.5), Box(-1.0, s)),
    "an orthant after momentum": lambda s: Proximal(SGD(0.2, momentum=0.5, weight_decay=s), Nonnegative()),
    "a simplex after momentum": lambda s: Proximal(SGD(0.2, momentum=0.5, weight_decay=s), Simplex()),
    "momentum": lambda s: SGD(0.2, momentum=0.5, weight_decay=s),
    "Clip": lambda s: Clip(SGD(0.2, momentum=0.5, weight_decay=s), max_norm=1.0),
    "Lookahead between": lambda s: Lookahead(SGD(0.2, momentum=0.5, weight_decay=s), 7),
    "Adam": lambda s: Adam(0.05, betas=(0.5, 0.9), eps=0.1, weight_decay=s),
}


@pytest.mark.parametrize("name", sampled(RESTING, 2))
def test_buffers_that_do_not_move_it_are_held(name):
    got = slopes(RESTING[name], Implicit(Dense()))
    torch.testing.assert_close(got, slopes(RESTING[name], Reverse()), rtol=1e-8, atol=1e-10)


def test_a_decoupled_decay_is_not_held_with_its_statistics():
    def make(s):
        return AdamW(0.05, betas=(0.5, 0.9), eps=0.5, weight_decay=s)

    with pytest.raises(diffopt.EstimatorError, match="AdamW with its decoupled weight_decay"):
        slopes(make, Implicit(GMRES()))
    got = slopes(make, Implicit(GMRES(60, rtol=1e-12), whole_state=True), steps=2000)
    torch.testing.assert_close(got, slopes(make, Reverse(), steps=2000), rtol=1e-6, atol=1e-8)
    slopes(lambda s: AdamW(0.05, betas=(0.5, 0.9), eps=0.1, weight_decay=0.0), Implicit(GMRES()))


def derivative(optimizer, steps, start=0.0, **options):
    """Of the end by the aim, which is 1 at the fixed point."""
    aim, start = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True), torch.tensor(start, dtype=DOUBLE)
    options.update(optimizer=optimizer, steps=steps, estimator=Implicit())
    return torch.autograd.grad(diffopt.solve(lambda w, aim: (w - aim).square() / 2, start, aim, **options).params, aim)[
        0
    ]


def test_a_lookahead_that_is_stopped_is_judged_by_the_step_it_ended_at():
    def end(last):
        return derivative(Lookahead(SGD(0.5), 5), 200, on_step=lambda step, loss: step == last)

    assert float(end(99)) == pytest.approx(1.0)
    with pytest.raises(diffopt.EstimatorError, match="goes back at the last step, 100"):
        end(100)


BY_L1, IN_A_BOX = Proximal(SGD(0.1), L1(0.1)), Proximal(SGD(0.1), Box(0.0, 1.0))


@pytest.mark.parametrize("optimizer", [BY_L1, EMA(IN_A_BOX, 0.9), Groups({"": BY_L1})], ids=["prox", "EMA", "Groups"])
def test_no_solve_with_a_prox_ends_at_a_small_gradient(optimizer):
    with pytest.raises(diffopt.OptimizerError, match=r"tol=0\.001 with Proximal.*stationarity"):
        diffopt.solve(lambda w: w.square().sum(), torch.ones(2), optimizer=optimizer, steps=3, tol=1e-3)


# ---------------------------------------------------------------------------------- ends that are no fixed point


@pytest.mark.parametrize(("lr", "steps"), [(3.0, 300), (0.01, 20), (2.0, 7), (0.1, 1)])
def test_an_end_that_is_no_fixed_point_is_told(lr, steps):
    with pytest.warns(diffopt.EstimateWarning, match="is no fixed point"):
        derivative(SGD(lr), steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        derivative(SGD(lr), steps, check=False)


@pytest.mark.parametrize(
    ("lr", "steps", "start"), [(0.1, 400, 0.0), (0.1, 60, 9.0), (0.5, 9, 0.0), (0.1, 3, 1.9), (0.1, 5, 2.0)]
)
def test_an_end_near_one_is_not(lr, steps, start):
    assert float(derivative(SGD(lr), steps, start)) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------- odd prox calls


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_under_a_simplex_is_a_divergence(factor):
    def loss(w, x):
        return (x * w).sum() * torch.where(w[0] > 0.34, factor, 1.0).detach()

    start, slope = torch.ones(3) / 3, torch.tensor([-1.0, 0.0, 0.0])
    with pytest.raises((diffopt.DivergenceError, diffopt.NonFiniteLossError)):
        diffopt.solve(loss, start, slope, optimizer=Proximal(SGD(0.1), Simplex()), steps=4)
    assert bool(Simplex()(torch.tensor([float("nan"), 1.0])).isnan().any())


@pytest.mark.parametrize("size", ["a", None, -0.1, float("nan"), True, {"w": -1.0}, {"w": "a"}])
def test_odd_step_sizes_of_a_call_are_refused(size):
    with pytest.raises(diffopt.HyperparameterError, match="step_size"):
        L1(0.1)({"w": torch.ones(2)}, size)


@pytest.mark.parametrize("size", [{"v": 1.0}, {"w": 1.0, "v": 1.0}, [1.0]])
def test_step_sizes_for_other_params_are_refused(size):
    with pytest.raises(diffopt.StructureError, match="L1: step_size"):
        L1(0.1)({"w": torch.ones(2)}, size)


@pytest.mark.parametrize(
    ("low", "high"),
    [(torch.tensor(1.0), 0.5), (1.0, torch.tensor(0.5)), (torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))],
)
def test_a_box_of_tensors_that_cross_is_refused(low, high):
    with pytest.raises(diffopt.HyperparameterError, match="low <= high"):
        Box(low, high)
    assert float(torch.func.vmap(lambda x: Box(x, 5.0)(torch.tensor(2.0)))(torch.tensor([1.0, 3.0])).sum()) == 5.0


@pytest.mark.parametrize("wrong", [lambda both: both[1], lambda: 0.0, lambda both, a, b: both[1]])
def test_a_players_loss_with_other_arguments_is_named(wrong):
    game = diffopt.game(lambda both, a: (both[0] - a).square(), wrong)
    start = (torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(diffopt.LossError, match=r"player 1's loss takes .* was given 2 arguments"):
        diffopt.solve(game, start, torch.tensor(2.0), optimizer=SGD(0.1), steps=1)
