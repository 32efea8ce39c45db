"""Solves within the losses of others, second derivatives, and Jacobians."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import FirstOrder, ForwardMode, Reverse, Unrolled


class TestNesting:
    """A solve inside the loss of another: three levels."""

    @staticmethod
    def innermost(v, u):
        return (v - u).square().sum() + 0.1 * v.pow(4).sum()

    def middle(self, estimator):
        def loss(u, z):
            inner = diffopt.solve(self.innermost, 0.5 * u, u, optimizer=diffopt.SGD(0.1), steps=2, estimator=estimator)
            return inner.params.square().sum() + (u - z).square().sum()

        return loss

    def middle_by_hand(self, u, z):
        v = 0.5 * u
        for _ in range(2):
            v = v - 0.1 * (2 * (v - u) + 0.4 * v**3)
        return v.square().sum() + (u - z).square().sum()

    def expected(self, z):
        u = torch.full_like(z, 0.3).requires_grad_()
        for _ in range(2):
            (g,) = torch.autograd.grad(self.middle_by_hand(u, z), u, create_graph=True)
            u = u - 0.1 * g
        return u.square().sum()

    def outer(self, z, inner_estimator, outer_estimator):
        options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "estimator": outer_estimator}
        end = diffopt.solve(self.middle(inner_estimator), torch.full_like(z, 0.3), z, **options).params
        return end.square().sum()

    @pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(1), Unrolled(), ForwardMode()], ids=str)
    @pytest.mark.parametrize("way", ["backward", "grad", "vmap then backward", "vmap of grad"])
    def test_three_levels(self, estimator, way):
        z = torch.tensor([[1.0, -0.5], [0.2, 0.9]], dtype=torch.float64)
        leaf = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(self.expected(leaf[0]) + self.expected(leaf[1]), leaf)

        def run(z):
            return self.outer(z, Unrolled(), estimator)

        leaf = z.clone().requires_grad_()
        if way == "backward":
            (got,) = torch.autograd.grad(run(leaf[0]) + run(leaf[1]), leaf)
        elif way == "grad":
            got = torch.stack([grad(run)(z[0]), grad(run)(z[1])])
        elif way == "vmap then backward":
            (got,) = torch.autograd.grad(vmap(run)(leaf).sum(), leaf)
        else:
            got = vmap(grad(run))(z)
        assert relative_error([got], [expected]) < 1e-12

    def test_a_first_derivative_estimator_inside_needs_an_outer_estimator_without_second_derivatives(self):
        z = torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True)
        outer = self.outer(z, Reverse(), FirstOrder())
        with torch.no_grad():
            assert abs(float(outer) - float(self.outer(z, Unrolled(), Unrolled()))) < 1e-12
        with pytest.raises(diffopt.SecondDerivativeError, match="Unrolled"):
            self.outer(z, Reverse(), Reverse()).backward()


def test_second_derivatives_of_unrolled_are_exact():
    # w_3 = w (1 - 2 a)^2 for l = a w^2, lr = 1: F = w_3, d2F/da2 = 8 w.
    a, w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), torch.tensor(1.7, dtype=torch.float64)

    def final(a):
        solution = diffopt.solve(lambda w, a: a * w**2, w, a, optimizer=diffopt.SGD(1.0), steps=2, estimator=Unrolled())
        return solution.params

    (first,) = torch.autograd.grad(final(a), a, create_graph=True)
    (second,) = torch.autograd.grad(first, a)
    assert abs(float(second) - 8 * 1.7) < 1e-12
    assert abs(float(grad(grad(final))(a.detach())) - 8 * 1.7) < 1e-12
    assert (vmap(grad(grad(final)))(a.detach().expand(2)) - 8 * 1.7).abs().max() < 1e-12
    assert abs(float(torch.func.jacrev(torch.func.jacrev(final))(a.detach())) - 8 * 1.7) < 1e-12


def quartic(w, estimator):
    return diffopt.solve(lambda w: w.pow(4).sum(), w, optimizer=diffopt.SGD(0.05), steps=3, estimator=estimator).params


def quartic_by_hand(w):
    for _ in range(3):
        w = w - 0.2 * w**3
    return w


@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(1), Unrolled(), ForwardMode()], ids=str)
def test_jacobians_and_repeated_backward_passes(estimator):
    w = torch.tensor([0.4, -0.8, 1.1], dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(quartic_by_hand, w)
    leaf = w.clone().requires_grad_()
    out = quartic(leaf, estimator)
    rows = [torch.autograd.grad(out[i], leaf, retain_graph=True)[0] for i in range(3)]
    assert relative_error([torch.stack(rows)], [expected]) < 1e-12
    assert relative_error([torch.func.jacrev(quartic)(w, estimator)], [expected]) < 1e-12


@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(1), ForwardMode()], ids=str)
def test_a_jacobian_of_many_tasks(estimator):
    w = torch.tensor([[0.4, -0.8], [1.1, 0.3]], dtype=torch.float64)
    got = vmap(torch.func.jacrev(lambda w: quartic(w, estimator)))(w)
    expected = [torch.autograd.functional.jacobian(quartic_by_hand, task) for task in w]
    assert relative_error(list(got), expected) < 1e-12
