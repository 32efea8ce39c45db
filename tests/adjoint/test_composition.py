"""Every way of composing ``solve`` with autograd and ``torch.func`` gives the numbers of a plain loop over tasks."""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS
from every_way import EXACT, STEPS, TASKS, Setting, TestEveryWay
from limits import sampled
from oracles import relative_error
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import ForwardMode, Reverse, Unrolled


@pytest.fixture(scope="module", params=sampled(OPTIMIZERS, 2), ids=lambda case: case.name)
def setting(request):
    return Setting(request.param)


@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_several_solves_in_one_outer_loss(estimator):
    setting = Setting(OPTIMIZERS[1])
    made, (*meta, data, query) = setting.leaves(setting.data, setting.query)
    first, second = (setting.run(estimator, *meta, data[i], query[i]) for i in (0, 1))
    got = torch.autograd.grad(first * second, made[:-2], retain_graph=True)
    expected = [second.detach() * a + first.detach() * b for a, b in zip(*setting.by_loops()[:2], strict=True)]
    assert relative_error(got, expected[:-2]) < TestEveryWay.round_off


@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(2), Unrolled(), ForwardMode()], ids=str)
def test_batches_per_step_under_vmap(estimator):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(STEPS, TASKS, 4, 2, generator=generator, dtype=torch.float64)  # tasks on axis 1
    y = torch.randn(STEPS, 4, dtype=torch.float64, generator=generator)  # shared by the tasks
    w = torch.randn(2, generator=generator, dtype=torch.float64)

    def loss(w, batch):
        return (torch.tanh(batch[0] @ w) - batch[1]).square().mean()

    def run(w, x, y):
        options = {
            "optimizer": diffopt.SGD(0.3, momentum=0.5),
            "steps": STEPS,
            "batches": (x, y),
            "estimator": estimator,
        }
        solution = diffopt.solve(loss, w, **options)
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
