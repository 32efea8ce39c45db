"""Every way of composing ``solve`` with autograd and ``torch.func``, each compared with a plain loop over tasks."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error, unrolled
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import ForwardMode, Reverse, Truncated, Unrolled

TASKS, STEPS = 3, 3
RULES = [Reverse("graph"), Reverse(1), Reverse(2), Unrolled(), ForwardMode(), Truncated(STEPS)]
ROUND_OFF = 1e-9  # as in test_estimators.py


class Setting:
    """Tasks that share the initial params, a loss argument and hyperparameters, and differ in data."""

    def __init__(self, case):
        g = torch.Generator().manual_seed(11)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.case = case
        self.params = [normal(2, 3), normal(3), normal(3, 1)]
        self.weights = normal(4)
        self.data = (normal(TASKS, 4, 2), normal(TASKS, 4, 1))
        self.query = (normal(TASKS, 5, 2), normal(TASKS, 5, 1))
        self.hypers = {k: torch.tensor(v, dtype=torch.float64) for k, v in case.learned.items()}

    @staticmethod
    def predict(p, x):
        return torch.tanh(x @ p[0] + p[1]) @ p[2]

    def loss(self, p, weights, data):
        x, y = data
        return (torch.sigmoid(weights) * (self.predict(p, x) - y).square().sum(-1)).mean()

    def outer(self, p, query):
        return (self.predict(p, query[0]) - query[1]).square().mean()

    def meta_loss(self, estimator):
        def of_one_task(params, weights, hypers, data, query):
            options = {"optimizer": self.case.optimizer(hypers), "steps": STEPS, "estimator": estimator}
            return self.outer(diffopt.solve(self.loss, params, weights, data, **options).params, query)

        return of_one_task

    def task(self, i):
        return (self.data[0][i], self.data[1][i]), (self.query[0][i], self.query[1][i])

    def leaves(self):
        made = [x.clone().requires_grad_() for x in [*self.params, self.weights, *self.hypers.values()]]
        return made, (made[:3], made[3], dict(zip(self.hypers, made[4:], strict=True)))

    def expected(self):
        """The gradient of each task's outer loss, by a plain loop."""
        rows = []
        for i in range(TASKS):
            leaves, (params, weights, hypers) = self.leaves()
            data, query = self.task(i)
            options, start = self.case.options(hypers), {"initial_buffers": self.case.buffers}
            loss = lambda p, w=weights, d=data: self.loss(p, w, d)  # noqa: E731
            final = unrolled(self.case.step, loss, params, STEPS, options, **start)
            rows.append(torch.autograd.grad(self.outer(final, query), leaves))
        return rows


def mean_over_tasks(rows):
    return [torch.stack(column).mean(0) for column in zip(*rows, strict=True)]


def flat(tree):
    params, weights, hypers = tree
    return [*params, weights, *hypers.values()]


@pytest.mark.parametrize("rule", RULES, ids=str)
class TestEveryWay:
    """Plain, transformed and mixed."""

    def test_loop_then_backward(self, setting, rule):
        leaves, meta = setting.leaves()
        loss = setting.meta_loss(rule)
        sum(loss(*meta, *setting.task(i)) for i in range(TASKS)).div(TASKS).backward()
        assert relative_error([x.grad for x in leaves], mean_over_tasks(setting.rows)) < ROUND_OFF

    def test_vmap_then_backward(self, setting, rule):
        leaves, meta = setting.leaves()
        loss = vmap(setting.meta_loss(rule), in_dims=(None, None, None, 0, 0))
        loss(*meta, setting.data, setting.query).mean().backward()
        assert relative_error([x.grad for x in leaves], mean_over_tasks(setting.rows)) < ROUND_OFF

    def test_func_grad_of_one_task(self, setting, rule):
        args = (setting.params, setting.weights, setting.hypers)
        got = grad(setting.meta_loss(rule), argnums=(0, 1, 2))(*args, *setting.task(1))
        assert relative_error(flat(got), setting.rows[1]) < ROUND_OFF

    def test_vmap_of_func_grad(self, setting, rule):
        args = (setting.params, setting.weights, setting.hypers)
        per_task = vmap(grad(setting.meta_loss(rule), argnums=(0, 1, 2)), in_dims=(None, None, None, 0, 0))
        got = flat(per_task(*args, setting.data, setting.query))
        for i in range(TASKS):
            assert relative_error([g[i] for g in got], setting.rows[i]) < ROUND_OFF

    def test_func_grad_of_vmap(self, setting, rule):
        def total(params, weights, hypers):
            per_task = vmap(setting.meta_loss(rule), in_dims=(None, None, None, 0, 0))
            return per_task(params, weights, hypers, setting.data, setting.query).mean()

        got = grad(total, argnums=(0, 1, 2))(setting.params, setting.weights, setting.hypers)
        assert relative_error(flat(got), mean_over_tasks(setting.rows)) < ROUND_OFF

    def test_nested_vmap_over_hyperparameters_and_tasks(self, setting, rule):
        # Outer vmap: two settings of every hyperparameter, the second the true one; inner vmap: tasks, not axis 0.
        hypers = {k: torch.stack([0.5 * v, v]) for k, v in setting.hypers.items()}
        data = tuple(x.movedim(0, 1) for x in setting.data)
        over_tasks = vmap(grad(setting.meta_loss(rule), argnums=(0, 1, 2)), in_dims=(None, None, None, 1, 0))
        over_both = vmap(over_tasks, in_dims=(None, None, 0, None, None))
        got = flat(over_both(setting.params, setting.weights, hypers, data, setting.query))
        for i in range(TASKS):
            assert relative_error([g[1, i] for g in got], setting.rows[i]) < ROUND_OFF

    def test_everything_batched(self, setting, rule):
        def repeat(x):
            return x.expand(TASKS, *x.shape)

        args = ([repeat(p) for p in setting.params], repeat(setting.weights))
        hypers = {k: repeat(v) for k, v in setting.hypers.items()}
        got = flat(vmap(grad(setting.meta_loss(rule), argnums=(0, 1, 2)))(*args, hypers, setting.data, setting.query))
        for i in range(TASKS):
            assert relative_error([g[i] for g in got], setting.rows[i]) < ROUND_OFF
