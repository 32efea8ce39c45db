"""Biased rules: under every composition with ``torch.func`` the numbers of the same rule called task by task."""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS, small_network
from oracles import relative_error
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import Binomial, FirstOrder, Implicit, Krylov, MultiStep, Reptile, Reverse, Truncated
from diffopt.linear_solve import GMRES

TASKS, STEPS = 3, 4
# A task alone stops at its own rtol, one in a batch when all are within it: the rest is 1e-12 times a condition number.
BINOMIAL = [Binomial(2), Binomial(2, window=3, chunk_size=2)]
OTHERS = [Krylov(2), Truncated(1), FirstOrder(), Reptile(), MultiStep(2), MultiStep(2, Binomial(1))]
RULES = [*BINOMIAL, *OTHERS, Implicit(GMRES(30, rtol=1e-12, throw=False))]
# Sums in another order; GMRES at 13 parameters and a condition number of some hundred; floor 1e-6 of relative_error.
ROUND_OFF = 1e-8


class Setting:
    """Tasks that share the start, a loss argument, one of two data tensors and the hyperparameters."""

    def __init__(self, name):
        self.case = next(case for case in OPTIMIZERS if case.name == name)
        self.problem = small_network(seed=61, steps=1)
        g = torch.Generator().manual_seed(62)
        self.data = torch.randn(TASKS, 4, 2, generator=g, dtype=torch.float64)
        self.query = torch.randn(TASKS, 5, 2, generator=g, dtype=torch.float64)
        self.batches = torch.randn(STEPS, TASKS, 4, 2, generator=g, dtype=torch.float64)
        self.hypers = {k: torch.tensor(v, dtype=torch.float64) for k, v in self.case.learned.items()}
        self.meta = (self.problem.params, self.problem.weights, self.hypers)

    def run(self, rule, params, weights, hypers, data, query):
        """The outer loss of one task; ``data`` is one batch of inputs, or with one more axis, one per step."""
        targets, stepped = self.problem.batches[1][0], data.ndim == 3
        inputs = (params, weights, targets, *([] if stepped else [data]))
        options = {"optimizer": self.case.optimizer(hypers), "batches": data if stepped else None}
        loss = lambda p, w, y, x: self.problem.loss(p, w, (x, y))  # noqa: E731
        solution = diffopt.solve(loss, *inputs, steps=STEPS, estimator=rule, **options)
        difference = self.problem.predict(solution.params, query) - self.problem.query[1]
        return difference.square().mean()

    def alone(self, rule, i, data):
        """The gradient of task ``i``, by plain autograd on a plain call: the reference."""
        made = [x.detach().clone().requires_grad_() for x in [*flat(self.meta), data, self.query[i]]]
        self.run(rule, *self.tree(made[:-2]), *made[-2:]).backward()
        return [x.grad for x in made]

    def tree(self, leaves):
        return list(leaves[:3]), leaves[3], dict(zip(self.hypers, leaves[4:], strict=True))


def flat(tree):
    params, weights, hypers, *rest = tree
    return [*params, weights, *hypers.values(), *rest]


@pytest.fixture(scope="module", params=["momentum", "adam", "diagonal"])
def setting(request):
    return Setting(request.param)


@pytest.fixture(scope="module", params=RULES, ids=str)
def rule(request):
    return request.param


@pytest.fixture(scope="module")
def rows(setting, rule):
    """Each task's gradients."""
    return [setting.alone(rule, i, setting.data[i]) for i in range(TASKS)]


DIMS = (None, None, None, 0, 0)


def test_vmap_then_backward(setting, rule, rows):
    leaves = [x.clone().requires_grad_() for x in [*flat(setting.meta), setting.data, setting.query]]
    per_task = vmap(lambda *inputs: setting.run(rule, *inputs), in_dims=DIMS)
    per_task(*setting.tree(leaves[:-2]), *leaves[-2:]).sum().backward()
    columns = list(zip(*rows, strict=True))
    expected = [*(torch.stack(c).sum(0) for c in columns[:-2]), *(torch.stack(c) for c in columns[-2:])]
    assert relative_error([x.grad for x in leaves], expected) < ROUND_OFF


def test_vmap_of_grad(setting, rule, rows):
    derivative = grad(lambda *inputs: setting.run(rule, *inputs), argnums=(0, 1, 2, 3, 4))
    got = flat(vmap(derivative, in_dims=DIMS)(*setting.meta, setting.data, setting.query))
    for i in range(TASKS):
        assert relative_error([g[i] for g in got], rows[i]) < ROUND_OFF


def test_grad_of_vmap(setting, rule, rows):
    def total(*inputs):
        return vmap(lambda *each: setting.run(rule, *each), in_dims=DIMS)(*inputs).sum()

    got = flat(grad(total, argnums=(0, 1, 2))(*setting.meta, setting.data, setting.query))
    expected = [torch.stack(c).sum(0) for c in list(zip(*rows, strict=True))[:-2]]
    assert relative_error(got, expected) < ROUND_OFF


def test_nested_vmap_with_partly_batched_inputs(setting, rule, rows):
    """Outside two values of one hyperparameter and of one params leaf, on their last axis; inside tasks, not first."""
    first = next(iter(setting.hypers))
    hypers = {**setting.hypers, first: torch.stack([0.5 * setting.hypers[first], setting.hypers[first]])}
    params = [torch.stack([-setting.meta[0][0], setting.meta[0][0]], dim=-1), *setting.meta[0][1:]]
    derivative = grad(lambda *inputs: setting.run(rule, *inputs), argnums=(0, 1, 2, 3, 4))
    inner = vmap(derivative, in_dims=(None, None, None, 1, 0))
    dims = ([-1, None, None], None, {k: 0 if k == first else None for k in hypers}, None, None)
    got = flat(vmap(inner, in_dims=dims)(params, setting.meta[1], hypers, setting.data.movedim(0, 1), setting.query))
    for i in range(TASKS):
        assert relative_error([g[1, i] for g in got], rows[i]) < ROUND_OFF


def test_batches_per_step_on_any_axis(setting, rule):
    derivative = grad(lambda *inputs: setting.run(rule, *inputs), argnums=(0, 1, 2, 3, 4))
    for axis in (1, 2):
        batches = setting.batches.movedim(1, axis)
        got = flat(vmap(derivative, in_dims=(None, None, None, axis, 0))(*setting.meta, batches, setting.query))
        for i in range(TASKS):
            assert relative_error([g[i] for g in got], setting.alone(rule, i, setting.batches[:, i])) < ROUND_OFF


def test_unused_outputs(setting, rule):
    """An outer loss that reads one leaf of three, of some tasks only, and none of the buffers."""

    def run(params, data):
        loss = lambda p, w, x, y: setting.problem.loss(p, w, (x, y))  # noqa: E731
        inputs = (params, setting.problem.weights, data, setting.problem.batches[1][0])
        optimizer = setting.case.optimizer(setting.hypers)
        solution = diffopt.solve(loss, *inputs, optimizer=optimizer, steps=STEPS, estimator=rule)
        return solution.params[1].square().sum()

    def leaves():
        return [p.clone().requires_grad_() for p in setting.meta[0]]

    together, separate = leaves(), leaves()
    vmap(run, in_dims=(None, 0))(together, setting.data)[:2].sum().backward()
    for i in range(2):
        run(separate, setting.data[i]).backward()
    if isinstance(rule, Reptile):  # it moves towards every task's solution, whatever the outer loss makes of it
        run(separate, setting.data[2]).backward()
    assert relative_error([x.grad for x in together], [x.grad for x in separate]) < ROUND_OFF


@pytest.mark.parametrize("wanted", ["params", "weights", "hypers", "data", "one leaf"])
def test_subsets_of_inputs(setting, rule, rows, wanted):
    """The other terms are not asked for, and these are the same."""
    names = ["params", "params", "one leaf", "weights", *["hypers"] * len(setting.hypers), "data", "query"]
    chosen = [i for i, name in enumerate(names) if name == wanted or (wanted == "params" and i < 3)]
    made = [
        x.detach().clone().requires_grad_(i in chosen)
        for i, x in enumerate([*flat(setting.meta), setting.data[0], setting.query[0]])
    ]
    value = setting.run(rule, *setting.tree(made[:-2]), *made[-2:])
    got = torch.autograd.grad(value, [made[i] for i in chosen], materialize_grads=True)
    assert relative_error(got, [rows[0][i] for i in chosen]) < ROUND_OFF


PRODUCTS = [
    (Binomial(2), 2 * (STEPS - 1), 2 * (STEPS - 1)),  # the mixed products are by-products
    (Krylov(2), STEPS + STEPS - 1, STEPS + STEPS - 1 + STEPS),  # one more level
    *((Truncated(1), 1, 1), (FirstOrder(), 0, 0), (Reptile(), 0, 0), (MultiStep(2, Reverse("graph")), 2, 2)),
]


@pytest.mark.parametrize(("rule", "alone", "with_weights"), PRODUCTS, ids=str)
def test_unwanted_terms_cost_nothing(rule, alone, with_weights):
    setting, counts = Setting("momentum"), []
    for learned in (False, True):
        params = [p.clone().requires_grad_() for p in setting.meta[0]]
        weights, x, y = setting.meta[1].clone(), setting.data[0], setting.problem.batches[1][0]
        loss = lambda p, w, x, y: setting.problem.loss(p, w, (x, y))  # noqa: E731
        inputs = (params, weights.requires_grad_(learned), x, y)
        optimizer = diffopt.SGD(0.1, momentum=0.5)
        solution = diffopt.solve(loss, *inputs, optimizer=optimizer, steps=STEPS, estimator=rule)
        sum(p.square().sum() for p in solution.params).backward()
        assert (weights.grad is not None) == learned
        counts.append(solution.counts.products)
    assert counts == [alone, with_weights]
