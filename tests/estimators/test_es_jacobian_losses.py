"""Evolution-strategy Jacobians of losses that draw random numbers, or that have no second derivative."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from differences import DIFFERENCE, INPUTS, RADIUS, STEPS, WEIGHTS, close, generator
from oracles import relative_error
from torch.func import grad, vmap
from torch.nn import functional

import diffopt
from diffopt.estimators import ESJacobian, Reverse


class TestCommonRandomNumbers:
    """With other numbers in the perturbed runs, the estimate would be noise over the radius."""

    @staticmethod
    def gradient(x, w, estimator, seed):
        def loss(w, x):
            return (functional.dropout(x, 0.4) @ torch.tanh(w) - 1).square().mean() + 0.1 * w.pow(4).sum()

        w, x = w.clone().requires_grad_(), x.clone().requires_grad_()
        torch.manual_seed(seed)
        solution = diffopt.solve(loss, w, x, optimizer=diffopt.SGD(0.1), steps=STEPS, estimator=estimator)
        torch.rand(5)  # what is drawn in between does not matter
        return torch.autograd.grad(solution.params.pow(3).sum(), [w, x])

    @pytest.mark.parametrize("antithetic", [True, False])
    def test_dropout(self, antithetic):
        estimator = ESJacobian(1000, 1e-6, antithetic=antithetic, generator=generator())
        got, other = (self.gradient(INPUTS[0], WEIGHTS, estimator, seed) for seed in (1, 2))
        # forward differences: 1e-6 of second derivatives, round-off 1e-16 / 1e-6
        assert close(got, self.gradient(INPUTS[0], WEIGHTS, Reverse(), 1))
        assert not close(got, other, 1e-2), "the masks matter"

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_dropout_under_vmap(self, randomness):
        def run(w, x, estimator):
            def loss(w, x):
                mask = functional.dropout(torch.ones_like(w), 0.4)
                return (x @ torch.tanh(mask * w) - 1).square().mean() + 0.1 * w.pow(4).sum()

            solution = diffopt.solve(loss, w, x, optimizer=diffopt.SGD(0.1), steps=STEPS, estimator=estimator)
            return solution.params.pow(3).sum()

        found = []
        for estimator in (ESJacobian(1000, 1e-6, generator=generator()), Reverse()):
            torch.manual_seed(5)
            derivative = grad(partial(run, estimator=estimator), argnums=(0, 1))
            found.append(vmap(derivative, in_dims=(None, 0), randomness=randomness)(WEIGHTS, INPUTS))
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

    def gradients(cube, estimator):
        leaves = [start.clone().requires_grad_(), b.clone().requires_grad_()]
        loss = lambda w, b: (cube(w - b) * (w - b)).sum()  # noqa: E731
        solution = diffopt.solve(loss, *leaves, optimizer=diffopt.SGD(0.02), steps=3, estimator=estimator)
        return torch.autograd.grad(solution.params.square().sum(), leaves)

    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradients(Cube.apply, Reverse())
    estimator = ESJacobian(1000, RADIUS, generator=generator())
    assert close(gradients(Cube.apply, estimator), gradients(lambda x: x**3, Reverse()))


def test_kinks():
    g = generator(6)
    images, kernel = torch.randn(2, 1, 6, 6, generator=g), torch.randn(2, 1, 3, 3, generator=g)

    def loss(p, x):
        return (functional.max_pool2d(functional.relu(functional.conv2d(x, p)), 2) - 1).square().mean()

    found = []
    for estimator in (ESJacobian(1000, 1e-6, generator=generator()), Reverse()):
        leaves = [kernel.double().requires_grad_(), images.double().requires_grad_()]
        solution = diffopt.solve(loss, *leaves, optimizer=diffopt.SGD(0.1), steps=STEPS, estimator=estimator)
        found.append(torch.autograd.grad(solution.params.square().sum(), leaves))
    assert close(*found)


def as_real(tensors):
    """A complex number as two real ones."""
    return [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in tensors]


class TestComplexArguments:
    """A complex number is two real ones: each part has directions of its own."""

    Z = torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128)

    @staticmethod
    def outer(w, z, estimator):
        def loss(w, z):
            return (z * w - 1).abs().square().sum() + (z * w).imag.sum()

        solution = diffopt.solve(loss, w, z, optimizer=diffopt.SGD(0.05), steps=STEPS, estimator=estimator)
        return solution.params.pow(3).sum()

    def gradients(self, estimator, w, z, end):
        w, z = w.clone().requires_grad_(), z.clone().requires_grad_()
        return torch.autograd.grad(end(w, z, estimator), [w, z])

    def check(self, w, z, end, tolerance=DIFFERENCE):
        got = self.gradients(ESJacobian(100, RADIUS, generator=generator()), w, z, end)
        expected = self.gradients(Reverse(), w, z, end)
        assert close(as_real(got), as_real(expected), tolerance)

    @pytest.mark.filterwarnings("error:Casting complex")
    def test_beside_real_ones(self):
        for w in (WEIGHTS, WEIGHTS[:1]):  # an odd number of real ones in front, too
            self.check(w, self.Z, self.outer)

    def test_as_a_conjugate_view(self):
        self.check(WEIGHTS, self.Z, lambda w, z, estimator: self.outer(w, z.conj(), estimator))

    @pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)])
    def test_shared_by_tasks_or_a_task_s_own(self, dims):
        def summed(w, z, estimator):
            return vmap(partial(self.outer, estimator=estimator), in_dims=dims, randomness="different")(w, z).sum()

        given = zip((WEIGHTS, self.Z), dims, strict=True)
        self.check(*(x if dim is None else torch.stack([x, -x, 2 * x]) for x, dim in given), summed)

    def test_as_many_directions_as_real_numbers_are_a_full_frame(self):
        few, full = (ESJacobian(count, RADIUS, generator=generator()) for count in (2, 4))
        z = self.Z.clone().requires_grad_()
        found = [torch.autograd.grad(self.outer(WEIGHTS, z, estimator), z) for estimator in (few, full, Reverse())]
        assert relative_error(found[1], found[2]) < 10 * DIFFERENCE
        assert relative_error(found[0], found[2]) > 0.01
