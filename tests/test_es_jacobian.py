"""Evolution-strategy Jacobians: exact with a full frame, unbiased else, with the stated variance and no Hessian."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, expected_hypergradient, hypergradient, small_network
from oracles import relative_error
from torch.func import grad, vmap
from torch.nn import functional

import diffopt
from diffopt.estimators import Binomial, ESJacobian, Implicit, Krylov, Reverse

STEPS = 3
# Central differences: radius**2 = 1e-8 times third derivatives, which are of order 1 to 100 here, and round-off
# 1e-16 / 1e-4; some derivatives are a thousand times smaller than the largest.
RADIUS, DIFFERENCE = 1e-4, 1e-4
SAMPLINGS = ["gaussian", "rademacher", "sphere", "orthonormal"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(got, expected, tolerance=DIFFERENCE):
    """All meta-parameters as one vector: directions mix them, and so their errors."""
    got, expected = (torch.cat([x.detach().reshape(-1) for x in tensors]) for tensors in (got, expected))
    return float((got - expected).norm()) < tolerance * float(expected.norm())


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

    def gradient(self, rule, momentum=0.0):
        w, b = self.w.clone().requires_grad_(), self.b.clone().requires_grad_()
        optimizer = diffopt.SGD(0.2, momentum=momentum)
        solution = diffopt.solve(self.loss, w, b, optimizer=optimizer, steps=4, estimator=rule)
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


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_mean_and_variance(sampling):
    linear, directions, samples = Linear(), 2, 200
    p, exact = linear.p, linear.gradient(Reverse())
    relative = {"gaussian": (p + 1) / 2, "rademacher": (p - 1) / 2, "sphere": (p - 1) / 2, "orthonormal": p / 2 - 1}
    rule = ESJacobian(directions, 0.1, sampling, generator=generator(3))
    found = torch.stack([linear.gradient(rule) for _ in range(samples)])
    variance = relative[sampling] * float(exact.square().sum())
    # the seed is fixed; five standard errors of the mean, and a quarter of the variance, whose own error is a tenth
    assert float((found.mean(0) - exact).norm()) < 5 * math.sqrt(variance / samples)
    assert float((found - exact).square().sum(-1).mean()) == pytest.approx(variance, rel=0.25)


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_differences_error_is_of_second_or_first_order_in_the_radius(antithetic):
    case, problem = OPTIMIZERS[1], small_network(seed=52, steps=STEPS)
    exact = torch.cat([x.reshape(-1) for x in expected_hypergradient(problem, case, STEPS)])
    sizes = []
    for radius in (4e-3, 1e-3):
        rule = ESJacobian(1000, radius, antithetic=antithetic, generator=generator())  # the same frame
        got = torch.cat([x.reshape(-1) for x in hypergradient(problem, case, STEPS, rule)])
        sizes.append(float((got - exact).norm()))
    assert sizes[0] / sizes[1] == pytest.approx(16 if antithetic else 4, rel=0.05)


class TestTasks:
    DATA = generator(4)
    X = torch.randn(3, 4, 2, generator=DATA, dtype=torch.float64)
    W = torch.randn(2, generator=DATA, dtype=torch.float64)

    @staticmethod
    def run(w, lr, x, rule):
        def loss(w, x):
            return (torch.tanh(x @ w) - 1).square().mean()

        solution = diffopt.solve(loss, w, x, optimizer=diffopt.SGD(lr, momentum=0.5), steps=STEPS, estimator=rule)
        return solution.params.square().sum()

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_each_task_draws_directions_of_its_own(self, sampling):
        rule = ESJacobian(1, RADIUS, sampling, generator=generator())
        x, lr = self.X[:1].expand(3, 4, 2), torch.tensor(0.3, dtype=torch.float64)  # three times the same task
        got = vmap(grad(lambda w, x: self.run(w, lr, x, rule), argnums=(0, 1)), in_dims=(None, 0))(self.W, x)
        for part in got:
            assert not torch.allclose(part[0], part[1], rtol=1e-2)
            assert not torch.allclose(part[1], part[2], rtol=1e-2)

    @pytest.mark.parametrize("way", ["vmap then backward", "vmap of grad", "nested"])
    def test_a_full_frame_is_exact_for_each_task(self, way):
        rates, found = torch.tensor([0.1, 0.3], dtype=torch.float64), []
        for rule in (ESJacobian(1000, RADIUS, generator=generator()), Reverse()):
            run = partial(self.run, rule=rule)
            over_tasks = vmap(grad(run, argnums=(0, 1, 2)), in_dims=(None, None, 0))
            if way == "vmap of grad":
                found.append(over_tasks(self.W, rates[0], self.X))
            elif way == "nested":
                found.append(vmap(over_tasks, in_dims=(None, 0, None))(self.W, rates, self.X))
            else:
                leaves = [x.clone().requires_grad_() for x in (self.W, rates[0], self.X)]
                value = vmap(run, in_dims=(None, None, 0))(*leaves).sum()
                found.append(torch.autograd.grad(value, leaves))
        assert relative_error(*found) < DIFFERENCE


class TestCommonRandomNumbers:
    """With other numbers in the perturbed runs, the estimate would be noise over the radius."""

    X = TestTasks.X

    @staticmethod
    def gradient(x, w, rule, seed):
        def loss(w, x):
            return (functional.dropout(x, 0.4) @ torch.tanh(w) - 1).square().mean() + 0.1 * w.pow(4).sum()

        w, x = w.clone().requires_grad_(), x.clone().requires_grad_()
        torch.manual_seed(seed)
        solution = diffopt.solve(loss, w, x, optimizer=diffopt.SGD(0.1), steps=STEPS, estimator=rule)
        torch.rand(5)  # what is drawn in between does not matter
        return torch.autograd.grad(solution.params.pow(3).sum(), [w, x])

    @pytest.mark.parametrize("antithetic", [True, False])
    def test_dropout(self, antithetic):
        rule = ESJacobian(1000, 1e-6, antithetic=antithetic, generator=generator())
        got, other = (self.gradient(self.X[0], TestTasks.W, rule, seed) for seed in (1, 2))
        # forward differences: 1e-6 of second derivatives, round-off 1e-16 / 1e-6
        assert close(got, self.gradient(self.X[0], TestTasks.W, Reverse(), 1))
        assert not close(got, other, 1e-2), "the masks matter"

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_dropout_under_vmap(self, randomness):
        def run(w, x, rule):
            def loss(w, x):
                mask = functional.dropout(torch.ones_like(w), 0.4)
                return (x @ torch.tanh(mask * w) - 1).square().mean() + 0.1 * w.pow(4).sum()

            solution = diffopt.solve(loss, w, x, optimizer=diffopt.SGD(0.1), steps=STEPS, estimator=rule)
            return solution.params.pow(3).sum()

        found = []
        for rule in (ESJacobian(1000, 1e-6, generator=generator()), Reverse()):
            torch.manual_seed(5)
            derivative = grad(partial(run, rule=rule), argnums=(0, 1))
            found.append(vmap(derivative, in_dims=(None, 0), randomness=randomness)(TestTasks.W, self.X))
        assert relative_error(*found) < DIFFERENCE


class Cube(torch.autograd.Function):
    """``x**3``, with a derivative that refuses to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        return CubePullback.apply(*ctx.saved_tensors, cotangent)


class CubePullback(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, cotangent):
        return 3 * x**2 * cotangent

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        raise NotImplementedError("there is no second derivative")


def test_no_second_derivative_is_taken():
    start, b = torch.tensor([[0.3, -0.5], [1.0, 2.0]], dtype=torch.float64)

    def gradients(cube, rule):
        leaves = [start.clone().requires_grad_(), b.clone().requires_grad_()]
        loss = lambda w, b: (cube(w - b) * (w - b)).sum()  # noqa: E731
        solution = diffopt.solve(loss, *leaves, optimizer=diffopt.SGD(0.02), steps=3, estimator=rule)
        return torch.autograd.grad(solution.params.square().sum(), leaves)

    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradients(Cube.apply, Reverse())
    rule = ESJacobian(1000, RADIUS, generator=generator())
    assert close(gradients(Cube.apply, rule), gradients(lambda x: x**3, Reverse()))


def test_kinks():
    g = generator(6)
    images, kernel = torch.randn(2, 1, 6, 6, generator=g), torch.randn(2, 1, 3, 3, generator=g)

    def loss(p, x):
        return (functional.max_pool2d(functional.relu(functional.conv2d(x, p)), 2) - 1).square().mean()

    found = []
    for rule in (ESJacobian(1000, 1e-6, generator=generator()), Reverse()):
        leaves = [kernel.double().requires_grad_(), images.double().requires_grad_()]
        solution = diffopt.solve(loss, *leaves, optimizer=diffopt.SGD(0.1), steps=STEPS, estimator=rule)
        found.append(torch.autograd.grad(solution.params.square().sum(), leaves))
    assert close(*found)


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
    for rule in (ESJacobian(1000, 5e-3, generator=generator()), Reverse()):
        solution = diffopt.solve(
            lambda w, x: (x @ w - 1).square().sum(), w, x, optimizer=diffopt.SGD(lr), steps=3, estimator=rule
        )
        found.append(torch.autograd.grad(solution.params.square().sum(), [w, lr]))
    assert [g.dtype for g in found[0]] == [params, rate]
    assert relative_error(*found) < 1e-2, "radius**2 of third derivatives, and 1e-7 / radius"


def test_the_number_of_gradients():
    for antithetic, runs in ((True, 2 * 5), (False, 5)):
        w = torch.ones(8, dtype=torch.float64, requires_grad=True)
        rule = ESJacobian(5, 1e-3, antithetic=antithetic)
        loss = lambda w: w.square().sum()  # noqa: E731
        solution = diffopt.solve(loss, w, optimizer=diffopt.SGD(0.1), steps=STEPS, estimator=rule)
        solution.params.sum().backward()
        assert (solution.counts.gradients, solution.counts.products) == (
            STEPS * (2 + runs),
            0,
        )  # and one to check the loss


@pytest.mark.parametrize("rule", [ESJacobian(2, 1e-3), Binomial(1), Krylov(2), Implicit(), Reverse(1)], ids=str)
def test_a_loss_with_random_numbers_of_its_own_is_refused_by_every_rule_that_evaluates_it_again(rule):
    own = np.random.default_rng(0)
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def loss(w):
        return (torch.from_numpy(own.random(4)) * w).square().sum()

    solution = diffopt.solve(loss, w, optimizer=diffopt.SGD(0.1), steps=4, estimator=rule)
    with pytest.raises(diffopt.RandomnessError, match="came out differently"):
        solution.params.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, 0.1), "directions is 0, expected an integer >= 1"),
        ((1.5, 0.1), "directions is 1.5"),
        ((True, 0.1), "directions is True"),
        ((1, 0.0), "radius is 0.0, expected a number > 0"),
        ((1, -1), "radius is -1"),
        ((1, math.inf), "radius is inf"),
        ((1, math.nan), "radius is nan"),
        ((1, "0.1"), "radius is '0.1'"),
        ((1, True), "radius is True"),
        ((1, 0.1, "normal"), "sampling is 'normal', expected one of gaussian, rademacher, sphere, orthonormal"),
        ((1, 0.1, "sphere", True, 3), "generator is 3"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(diffopt.HyperparameterError, match=message):
        ESJacobian(*options)
