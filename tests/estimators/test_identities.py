"""Identities between estimators, and between one and another method: derivations, sections 3.3, 3.4, 6.2 and 8."""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS, hypergradient, small_network
from hypothesis import given
from hypothesis import strategies as st
from implicit_problems import normal
from oracles import relative_error
from torch.func import vmap

import diffopt
from diffopt.estimators import Binomial, FirstOrder, Krylov, Reverse, Truncated
from diffopt.tasks import Quadratic

STEPS, ROUND_OFF = 6, 1e-9  # as in test_estimators.py


@pytest.mark.parametrize("order", range(STEPS + 1))
def test_a_window_as_long_as_the_order_is_truncation_for_gradient_descent(order):
    problem, case = small_network(81, STEPS), OPTIMIZERS[0]
    hybrid = hypergradient(problem, case, STEPS, Binomial(order, window=order))
    truncated = hypergradient(problem, case, STEPS, Truncated(order))
    params_and_loss = len(problem.params) + 3
    assert relative_error(hybrid[:params_and_loss], truncated[:params_and_loss]) < ROUND_OFF
    if order < STEPS:  # the step size acts in the steps before, too, which truncation drops
        assert relative_error(hybrid[params_and_loss:], truncated[params_and_loss:]) > 1e-3


def test_the_papers_scale_at_order_one_takes_the_mean_hessian():
    hessians, g = normal(84, STEPS, 3, 3), normal(85, 3)
    hessians = hessians + hessians.mT
    w = normal(86, 3).requires_grad_()
    options = {"optimizer": diffopt.SGD(0.1), "steps": STEPS, "batches": hessians}
    end = diffopt.solve(lambda w, h: w @ h @ w / 2, w, estimator=Binomial(1, scale=1 / STEPS), **options).params
    (got,) = torch.autograd.grad(end @ g, w)
    assert relative_error([got], [g - 0.1 * hessians.mean(0) @ g]) < 1e-12


@given(seed=st.integers(0, 2**31), order=st.integers(0, 8), strength=st.floats(1.0, 1.8))
def test_orders_of_a_long_proximal_run_are_the_neumann_series_of_implicit_maml(seed, order, strength):
    """``sum over l <= L of (-H / lambda)**l v`` for the center; the start itself is forgotten."""
    quadratic = Quadratic.random(4, definite=False, generator=torch.Generator().manual_seed(seed))
    start = normal(seed, 4).requires_grad_()
    # lr * strength is at least a half: what is left of the start at order 8 is below 0.5**72 times 80 choose 8, 1e-11
    optimizer = diffopt.ProximalGD(0.5, strength)
    options = {"optimizer": optimizer, "steps": 80, "estimator": Binomial(order)}
    solution = diffopt.solve(lambda w: w @ quadratic.hessian @ w / 2, start, **options)
    v = normal(seed + 1, 4)
    (got,) = torch.autograd.grad(solution.params @ v, start)
    terms = [torch.linalg.matrix_power(-quadratic.hessian / strength, power) @ v for power in range(order + 1)]
    # powers that cancel: the largest of them, times the round-off of 80 steps
    size = max(float(term.norm()) for term in terms)
    assert float((got - sum(terms)).norm()) < 1e-9 * size


class TestOnlyTheHeadIsAdapted:
    """ANIL: the inner problem is that of the head; the body is an argument of its loss, and of the outer one."""

    HEAD, BODY = normal(87, 3), normal(88, 2, 3)
    SUPPORT, QUERY = (normal(89, 3, 5, 2), normal(90, 3, 5)), (normal(91, 3, 6, 2), normal(92, 3, 6))

    @staticmethod
    def loss(head, body, x, y):
        return (torch.tanh(x @ body) @ head - y).square().mean()

    def meta_loss(self, head, body, estimator, optimizer):
        def one(x, y, query_x, query_y):
            options = {"optimizer": optimizer, "steps": STEPS, "estimator": estimator}
            return self.loss(diffopt.solve(self.loss, head, body, x, y, **options).params, body, query_x, query_y)

        return vmap(one)(*self.SUPPORT, *self.QUERY).mean()

    def gradients(self, value_of):
        head, body = (x.clone().requires_grad_() for x in (self.HEAD, self.BODY))
        return torch.autograd.grad(value_of(head, body), [head, body])

    @pytest.mark.parametrize("momentum", [0.0, 0.6])
    @pytest.mark.parametrize("estimator", [Reverse(), Binomial(STEPS), Krylov(STEPS), Truncated(STEPS)], ids=str)
    def test_exact_estimators_are_plain_autograd(self, estimator, momentum):
        def unrolled(head, body):
            total = 0.0
            for x, y, query_x, query_y in zip(*self.SUPPORT, *self.QUERY, strict=True):
                now, velocity = head, 0.0
                for _ in range(STEPS):
                    (g,) = torch.autograd.grad(self.loss(now, body, x, y), now, create_graph=True)
                    velocity = momentum * velocity + g
                    now = now - 0.2 * velocity
                total = total + self.loss(now, body, query_x, query_y) / len(self.SUPPORT[0])
            return total

        optimizer = diffopt.SGD(0.2, momentum=momentum)
        got = self.gradients(lambda head, body: self.meta_loss(head, body, estimator, optimizer))
        assert relative_error(got, self.gradients(unrolled)) < 1e-12

    @pytest.mark.parametrize("estimator", [FirstOrder(), Binomial(0), Krylov(0)], ids=str)
    def test_without_curvature_the_body_gets_its_explicit_term_only(self, estimator):
        optimizer = diffopt.SGD(0.2)

        def cut_off(head, body):
            total = 0.0
            for x, y, query_x, query_y in zip(*self.SUPPORT, *self.QUERY, strict=True):
                end = diffopt.solve(self.loss, head.detach(), body.detach(), x, y, optimizer=optimizer, steps=STEPS)
                adapted = end.params.detach() + head - head.detach()
                total = total + self.loss(adapted, body, query_x, query_y) / len(self.SUPPORT[0])
            return total

        got = self.gradients(lambda head, body: self.meta_loss(head, body, estimator, optimizer))
        assert relative_error(got, self.gradients(cut_off)) < 1e-12
