"""Every way of composing ``solve`` with autograd and ``torch.func``, each compared with one task after the other."""

from __future__ import annotations

import pytest
import torch
from cases import small_network
from oracles import relative_error, unrolled
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import ForwardMode, Reverse, Truncated, Unrolled

TASKS, STEPS = 3, 4
EXACT = [Reverse("graph"), Reverse(1), Reverse(2), Unrolled(), ForwardMode(), Truncated(STEPS)]
DIMS = (None, None, None, 0, 0)


class Setting:
    """Tasks that share the start, a loss argument, targets and the hyperparameters, and differ in data."""

    def __init__(self, case):
        self.case, self.problem = case, small_network(seed=61, steps=1)
        g = torch.Generator().manual_seed(62)
        self.data = torch.randn(TASKS, 4, 2, generator=g, dtype=torch.float64)
        self.query = torch.randn(TASKS, 5, 2, generator=g, dtype=torch.float64)
        self.batches = torch.randn(STEPS, TASKS, 4, 2, generator=g, dtype=torch.float64)
        self.hypers = {k: torch.tensor(v, dtype=torch.float64) for k, v in case.learned.items()}
        self.meta = (self.problem.params, self.problem.weights, self.hypers)
        self.targets = self.problem.batches[1][0]

    def loss(self, params, weights, targets, inputs):
        return self.problem.loss(params, weights, (inputs, targets))

    def outer(self, params, query):
        return (self.problem.predict(params, query) - self.problem.query[1]).square().mean()

    def run(self, estimator, params, weights, hypers, data, query):
        """The outer loss of one task; ``data`` is one batch of inputs, or with one more axis, one per step."""
        inputs, batches = ((), data) if data.ndim == 3 else ((data,), None)
        options = {"optimizer": self.case.optimizer(hypers), "steps": STEPS, "batches": batches, "estimator": estimator}
        return self.outer(diffopt.solve(self.loss, params, weights, self.targets, *inputs, **options).params, query)

    def leaves(self, data, query):
        """New leaves of everything, and the same as the arguments of a run."""
        made = [x.detach().clone().requires_grad_() for x in [*flat(self.meta), data, query]]
        return made, (made[:3], made[3], dict(zip(self.hypers, made[4:-2], strict=True)), *made[-2:])

    def alone(self, estimator, i, data):
        """The gradient of task ``i``, by plain autograd on a plain call."""
        made, given = self.leaves(data, self.query[i])
        return torch.autograd.grad(self.run(estimator, *given), made, materialize_grads=True)

    def by_loops(self):
        """The gradient of each task, by a plain loop."""
        rows = []
        for i in range(TASKS):
            made, (params, weights, hypers, data, query) = self.leaves(self.data[i], self.query[i])
            loss = lambda p, w=weights, x=data: self.loss(p, w, self.targets, x)  # noqa: E731
            options, start = self.case.options(hypers), {"initial_buffers": self.case.buffers}
            final = unrolled(self.case.step, loss, params, STEPS, options, **start)
            rows.append(torch.autograd.grad(self.outer(final, query), made))
        return rows


def flat(tree):
    params, weights, hypers, *rest = tree
    return [*params, weights, *hypers.values(), *rest]


def summed(rows):
    """The gradient of the sum over tasks: what they share is summed, what is their own stacked."""
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return [*(column.sum(0) for column in columns[:-2]), *columns[-2:]]


class EveryWay:
    """Plain, transformed and mixed; ``rows`` are the gradients of each task alone."""

    round_off = 1e-9  # as in test_estimators.py

    def derivative(self, setting, estimator):
        return grad(lambda *inputs: setting.run(estimator, *inputs), argnums=(0, 1, 2, 3, 4))

    def agree(self, found, expected):
        assert relative_error(found, expected) < self.round_off

    def agree_by_task(self, found, rows):
        for i, row in enumerate(rows):
            self.agree([g[i] for g in found], row)

    def test_loop_then_backward(self, setting, estimator, rows):
        made, (*meta, data, query) = setting.leaves(setting.data, setting.query)
        total = sum(setting.run(estimator, *meta, data[i], query[i]) for i in range(TASKS))
        self.agree(torch.autograd.grad(total, made, materialize_grads=True), summed(rows))

    def test_vmap_then_backward(self, setting, estimator, rows):
        made, given = setting.leaves(setting.data, setting.query)
        total = vmap(lambda *inputs: setting.run(estimator, *inputs), in_dims=DIMS)(*given).sum()
        self.agree(torch.autograd.grad(total, made, materialize_grads=True), summed(rows))

    def test_grad_of_one_task(self, setting, estimator, rows):
        got = self.derivative(setting, estimator)(*setting.meta, setting.data[1], setting.query[1])
        self.agree(flat(got), rows[1])

    def test_vmap_of_grad(self, setting, estimator, rows):
        per_task = vmap(self.derivative(setting, estimator), in_dims=DIMS)
        self.agree_by_task(flat(per_task(*setting.meta, setting.data, setting.query)), rows)

    def test_grad_of_vmap(self, setting, estimator, rows):
        def total(*inputs):
            return vmap(lambda *each: setting.run(estimator, *each), in_dims=DIMS)(*inputs).sum()

        got = grad(total, argnums=(0, 1, 2, 3, 4))(*setting.meta, setting.data, setting.query)
        self.agree(flat(got), summed(rows))

    def test_nested_vmap_over_hyperparameters_and_tasks(self, setting, estimator, rows):
        """Outside two values of one or of all hyperparameters and of one params leaf, on its last axis; inside tasks.

        The second values are the true ones; tasks are not first.
        """
        inner = vmap(self.derivative(setting, estimator), in_dims=(None, None, None, 1, 0))
        (first, *others), weights, hypers = setting.meta
        params, data = [torch.stack([-first, first], dim=-1), *others], setting.data.movedim(0, 1)
        for some in (list(hypers)[:1], list(hypers)):
            stacked = {k: torch.stack([0.5 * v, v]) if k in some else v for k, v in hypers.items()}
            dims = ([-1, None, None], None, {k: 0 if k in some else None for k in hypers}, None, None)
            got = flat(vmap(inner, in_dims=dims)(params, weights, stacked, data, setting.query))
            self.agree_by_task([g[1] for g in got], rows)

    def test_everything_batched(self, setting, estimator, rows):
        shared = [x.expand(TASKS, *x.shape) for x in flat(setting.meta)]
        meta = (shared[:3], shared[3], dict(zip(setting.hypers, shared[4:], strict=True)))
        self.agree_by_task(flat(vmap(self.derivative(setting, estimator))(*meta, setting.data, setting.query)), rows)


@pytest.mark.parametrize("estimator", EXACT, ids=str)
class TestEveryWay(EveryWay):
    """Of exact estimators, against plain loops; runs where it is imported, for the fixture ``setting`` there."""

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, setting):
        return setting.by_loops()
