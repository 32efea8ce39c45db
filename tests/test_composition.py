"""Every way of composing ``solve`` with autograd and ``torch.func`` gives the numbers of a plain loop over tasks."""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS
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
            solution = diffopt.solve(
                self.loss,
                params,
                weights,
                data,
                optimizer=self.case.optimizer(hypers),
                steps=STEPS,
                estimator=estimator,
            )
            return self.outer(solution.params, query)

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
            options, start = self.case.options(hypers), self.case.buffers
            final = unrolled(
                self.case.step,
                lambda p, w=weights, d=data: self.loss(p, w, d),
                params,
                STEPS,
                options,
                initial_buffers=start,
            )
            rows.append(torch.autograd.grad(self.outer(final, query), leaves))
        return rows


def mean_over_tasks(rows):
    return [torch.stack(column).mean(0) for column in zip(*rows, strict=True)]


def flat(tree):
    params, weights, hypers = tree
    return [*params, weights, *hypers.values()]


@pytest.fixture(scope="module", params=OPTIMIZERS, ids=lambda case: case.name)
def setting(request):
    made = Setting(request.param)
    made.rows = made.expected()
    return made


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


MOMENTUM = OPTIMIZERS[1]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_several_solves_in_one_outer_loss(rule):
    setting = Setting(MOMENTUM)
    rows = setting.expected()
    leaves, meta = setting.leaves()
    loss = setting.meta_loss(rule)
    (loss(*meta, *setting.task(0)) * loss(*meta, *setting.task(1))).backward()
    with torch.no_grad():
        values = [float(loss(*meta, *setting.task(i))) for i in (0, 1)]
    expected = [values[1] * a + values[0] * b for a, b in zip(rows[0], rows[1], strict=True)]
    assert relative_error([x.grad for x in leaves], expected) < ROUND_OFF


@pytest.mark.parametrize("rule", [Reverse("graph"), Reverse(2), Unrolled(), ForwardMode()], ids=str)
def test_batches_per_step_under_vmap(rule):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(STEPS, TASKS, 4, 2, generator=generator, dtype=torch.float64)  # tasks on axis 1
    y = torch.randn(STEPS, 4, dtype=torch.float64, generator=generator)  # shared by the tasks
    w = torch.randn(2, generator=generator, dtype=torch.float64)

    def loss(w, batch):
        return (torch.tanh(batch[0] @ w) - batch[1]).square().mean()

    def run(w, x, y):
        solution = diffopt.solve(
            loss, w, optimizer=diffopt.SGD(0.3, momentum=0.5), steps=STEPS, batches=(x, y), estimator=rule
        )
        return solution.params.square().sum()

    got = vmap(grad(run, argnums=(0, 1, 2)), in_dims=(None, 1, None))(w, x, y)
    for i in range(TASKS):
        leaves = [t.clone().requires_grad_() for t in (w, x[:, i], y)]
        now, velocity = leaves[0], 0.0
        for t in range(STEPS):
            (g,) = torch.autograd.grad(loss(now, (leaves[1][t], leaves[2][t])), now, create_graph=True)
            velocity = 0.5 * velocity + g
            now = now - 0.3 * velocity
        assert relative_error([g[i] for g in got], torch.autograd.grad(now.square().sum(), leaves)) < 1e-12


def test_a_solve_shared_by_all_tasks_of_a_vmap_rolls_out_once():
    w = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    q = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = []

    def run(q):
        solution = diffopt.solve(lambda w: w.pow(4).sum(), w, optimizer=diffopt.SGD(0.1), steps=4, estimator=Reverse())
        kept.append(solution)
        return (q @ solution.params).square()

    vmap(run)(q).sum().backward()
    assert (kept[0].counts.gradients, kept[0].kept.checkpoint) == (4, "graph")
    now = w
    for _ in range(4):
        now = now - 0.4 * now**3
    assert relative_error([w.grad], torch.autograd.grad((q @ now).square().sum(), w)) < 1e-12
