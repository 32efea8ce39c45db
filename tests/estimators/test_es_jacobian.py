"""Evolution-strategy Jacobians: exact with a full frame, unbiased else, with the stated variance and no Hessian."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from cases import OPTIMIZERS, expected_hypergradient, hypergradient, small_network
from differences import DIFFERENCE, INPUTS, RADIUS, STEPS, WEIGHTS, close, generator
from limits import sampled
from oracles import relative_error
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import ESJacobian, Reverse

SAMPLINGS = ["gaussian", "rademacher", "sphere", "orthonormal"]


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_a_full_frame_is_exact_up_to_the_difference(case):
    problem = small_network(seed=51, steps=STEPS)
    got = hypergradient(problem, case, STEPS, ESJacobian(1000, RADIUS, generator=generator()))
    assert close(got, expected_hypergradient(problem, case, STEPS))


class Linear:
    """Descent on a quadratic: the solution is linear in the start ``w`` and in ``b``, together ``p`` numbers."""

    p = 6

    def __init__(self):
        g = generator(7)
        h, self.mix = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
        self.hessian = h @ h.mT / 3
        self.w, self.b, self.target = torch.randn(3, 3, generator=g, dtype=torch.float64)

    def loss(self, w, b):
        return w @ self.hessian @ w / 2 - w @ self.mix @ b

    def gradient(self, estimator, momentum=0.0, scale=1.0):
        """The hypergradient in ``w`` and ``b``, where the solve is given ``b / scale``."""
        w, b = self.w.clone().requires_grad_(), self.b.clone().requires_grad_()
        optimizer = diffopt.SGD(0.2, momentum=momentum)
        options = {"optimizer": optimizer, "steps": 4, "estimator": estimator}
        solution = diffopt.solve(lambda w, b: self.loss(w, scale * b), w, b / scale, **options)
        return torch.cat(torch.autograd.grad(solution.params @ self.target, [w, b]))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_as_many_directions_as_learned_numbers_are_a_full_frame(momentum):
    linear = Linear()
    got = linear.gradient(ESJacobian(linear.p, 0.1, generator=generator()), momentum)
    # a linear map has no error of the difference
    assert relative_error([got], [linear.gradient(Reverse(), momentum)]) < 1e-12


@pytest.mark.parametrize("antithetic", [True, False])
def test_all_rademacher_directions(antithetic, monkeypatch):
    """Each sign pattern once: the mean is exact and the variance is ``(p - 1) |w|**2``."""
    linear = Linear()
    exact = linear.gradient(Reverse())
    patterns = torch.tensor(list(itertools.product([-0.5, 0.5], repeat=linear.p)), dtype=torch.float64)
    found = []
    for pattern in [*patterns[:, None], patterns]:
        monkeypatch.setattr(torch, "randn", lambda *shape, pattern=pattern, **options: pattern)
        found.append(linear.gradient(ESJacobian(len(pattern), 0.1, "rademacher", antithetic)))
    each, together = torch.stack(found[:-1]), found[-1]
    assert relative_error([each.mean(0), together], [exact, exact]) < 1e-12
    variance = (each - exact).square().sum(-1).mean()
    assert float(variance) == pytest.approx((linear.p - 1) * float(exact.square().sum()), rel=1e-12)


@pytest.mark.parametrize("sampling", sampled(SAMPLINGS, 2))
def test_mean_and_variance(sampling):
    linear, directions, samples = Linear(), 2, 200
    p, exact = linear.p, linear.gradient(Reverse())
    relative = {"gaussian": (p + 1) / 2, "rademacher": (p - 1) / 2, "sphere": (p - 1) / 2, "orthonormal": p / 2 - 1}
    estimator = ESJacobian(directions, 0.1, sampling, generator=generator(3))
    found = torch.stack([linear.gradient(estimator) for _ in range(samples)])
    variance = relative[sampling] * float(exact.square().sum())
    # the seed is fixed; five standard errors of the mean, and a quarter of the variance, whose own error is a tenth
    assert float((found.mean(0) - exact).norm()) < 5 * math.sqrt(variance / samples)
    assert float((found - exact).square().sum(-1).mean()) == pytest.approx(variance, rel=0.25)


def test_mixed_scales_cost_more_than_the_formula():
    """What the solve is given counts: the second moment of a Haar frame's projection, seen through the scaling."""
    linear, directions, samples, scale = Linear(), 2, 400, 30.0
    p, exact = linear.p, linear.gradient(Reverse())
    estimator = ESJacobian(directions, 0.1, generator=generator(4))
    found = torch.stack([linear.gradient(estimator, scale=scale) for _ in range(samples)])
    before = torch.tensor([1.0] * 3 + [1 / scale] * 3, dtype=torch.float64)  # the solve is given b / scale
    given = exact / before
    shared = directions * (p - directions) / (p * (p - 1) * (p + 2))
    along = directions * (p * directions + p - 2) / (p * (p - 1) * (p + 2))
    moment = shared * given.square().sum() * before.square().sum() + along * exact.square().sum()
    expected = float((p / directions) ** 2 * moment / exact.square().sum() - 1)
    assert float((found - exact).square().sum(-1).mean() / exact.square().sum()) == pytest.approx(expected, rel=0.25)
    assert expected > 20 * (p / directions - 1)
    assert float((linear.gradient(Reverse(), scale=scale) - exact).norm()) < 1e-12


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_differences_error_is_of_second_or_first_order_in_the_radius(antithetic):
    case, problem = OPTIMIZERS[1], small_network(seed=52, steps=STEPS)
    exact = torch.cat([x.reshape(-1) for x in expected_hypergradient(problem, case, STEPS)])
    sizes = []
    for radius in (4e-3, 1e-3):
        estimator = ESJacobian(1000, radius, antithetic=antithetic, generator=generator())  # the same frame
        got = torch.cat([x.reshape(-1) for x in hypergradient(problem, case, STEPS, estimator)])
        sizes.append(float((got - exact).norm()))
    assert sizes[0] / sizes[1] == pytest.approx(16 if antithetic else 4, rel=0.05)


class TestTasks:
    @staticmethod
    def run(w, lr, x, estimator):
        def loss(w, x):
            return (torch.tanh(x @ w) - 1).square().mean()

        solution = diffopt.solve(loss, w, x, optimizer=diffopt.SGD(lr, momentum=0.5), steps=STEPS, estimator=estimator)
        return solution.params.square().sum()

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_each_task_draws_directions_of_its_own(self, sampling):
        estimator = ESJacobian(1, RADIUS, sampling, generator=generator())
        x, lr = INPUTS[:1].expand(3, 4, 2), torch.tensor(0.3, dtype=torch.float64)  # three times the same task
        got = vmap(grad(lambda w, x: self.run(w, lr, x, estimator), argnums=(0, 1)), in_dims=(None, 0))(WEIGHTS, x)
        for part in got:
            assert not torch.allclose(part[0], part[1], rtol=1e-2)
            assert not torch.allclose(part[1], part[2], rtol=1e-2)

    @pytest.mark.parametrize("way", ["vmap then backward", "vmap of grad", "nested"])
    def test_a_full_frame_is_exact_for_each_task(self, way):
        rates, found = torch.tensor([0.1, 0.3], dtype=torch.float64), []
        for estimator in (ESJacobian(1000, RADIUS, generator=generator()), Reverse()):
            run = partial(self.run, estimator=estimator)
            over_tasks = vmap(grad(run, argnums=(0, 1, 2)), in_dims=(None, None, 0))
            if way == "vmap of grad":
                found.append(over_tasks(WEIGHTS, rates[0], INPUTS))
            elif way == "nested":
                found.append(vmap(over_tasks, in_dims=(None, 0, None))(WEIGHTS, rates, INPUTS))
            else:
                leaves = [x.clone().requires_grad_() for x in (WEIGHTS, rates[0], INPUTS)]
                value = vmap(run, in_dims=(None, None, 0))(*leaves).sum()
                found.append(torch.autograd.grad(value, leaves))
        assert relative_error(*found) < DIFFERENCE


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_generator_makes_it_reproducible(sampling):
    linear, before = Linear(), torch.get_rng_state()
    shared = generator(9)
    first, second = (linear.gradient(ESJacobian(2, 0.1, sampling, generator=shared)) for _ in range(2))
    again = linear.gradient(ESJacobian(2, 0.1, sampling, generator=generator(9)))
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    torch.manual_seed(9)
    assert torch.equal(linear.gradient(ESJacobian(2, 0.1, sampling)), first), "without one it is the global one"


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "float64"), ("float64", "float32")])
def test_dtypes_are_kept(dtypes):
    params, rate = (getattr(torch, name) for name in dtypes)
    w = torch.tensor([0.5, -1.0], dtype=params, requires_grad=True)
    lr = torch.tensor(0.1, dtype=rate, requires_grad=True)
    x, found = torch.tensor([[1.0, 2.0], [0.5, -0.3]], dtype=params), []
    for estimator in (ESJacobian(1000, 5e-3, generator=generator()), Reverse()):
        options = {"optimizer": diffopt.SGD(lr), "steps": 3, "estimator": estimator}
        solution = diffopt.solve(lambda w, x: (x @ w - 1).square().sum(), w, x, **options)
        found.append(torch.autograd.grad(solution.params.square().sum(), [w, lr]))
    assert [g.dtype for g in found[0]] == [params, rate]
    assert relative_error(*found) < 1e-2, "radius**2 of third derivatives, and 1e-7 / radius"


def test_the_number_of_gradients():
    for antithetic, runs in ((True, 2 * 5), (False, 5)):
        w = torch.ones(8, dtype=torch.float64, requires_grad=True)
        estimator = ESJacobian(5, 1e-3, antithetic=antithetic)
        loss = lambda w: w.square().sum()  # noqa: E731
        solution = diffopt.solve(loss, w, optimizer=diffopt.SGD(0.1), steps=STEPS, estimator=estimator)
        solution.params.sum().backward()
        assert solution.counts.gradients == STEPS * (2 + runs)  # and one to check the loss
        assert solution.counts.products == 0
