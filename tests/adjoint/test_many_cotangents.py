"""Many cotangents of one solve: Jacobians, one replay for all of them, and the same numbers as one by one."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error

from diffopt import SGD, Schedule, solve
from diffopt.estimators import FirstOrder, ForwardMode, Krylov, Reverse, Truncated

STEPS = 4
ESTIMATORS = [
    Reverse("graph"),
    Reverse(1),
    Reverse(2),
    Truncated(2),
    Truncated(2, checkpoint=1),
    FirstOrder(),
    Krylov(2),
]


def problem(size):
    """A solve of ``size`` numbers whose end is looked at in three ways; everything that it reads is differentiated."""
    w = torch.linspace(-1, 1, size, dtype=torch.float64)
    slope, batches = torch.tensor(0.7, dtype=torch.float64), torch.linspace(1, 2, STEPS, dtype=torch.float64)
    lr = torch.linspace(0.1, 0.2, STEPS, dtype=torch.float64)

    def loss(w, slope, batch):
        return (slope * batch * w).sin().square().sum() + (w.sum() * slope) ** 2 / size**2

    def outer(estimator, counts, w, slope, batches, lr):
        optimizer = SGD(Schedule(lr), momentum=0.5)
        solution = solve(loss, w, slope, batches=batches, optimizer=optimizer, steps=STEPS, estimator=estimator)
        counts.append(solution.counts)
        final = solution.params
        return torch.stack([final.sum(), final[: size // 2].square().sum(), final[-1] * slope])

    return outer, [w, slope, batches, lr]


@pytest.mark.parametrize("size", [50, 40_000], ids=["stacked", "one by one"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_many_cotangents_give_what_each_gives(size, estimator):
    outer, values = problem(size)
    leaves = [x.requires_grad_() for x in values]
    value = outer(estimator, [], *leaves)
    rows = [torch.autograd.grad(x, leaves, retain_graph=True, materialize_grads=True) for x in value]
    expected = [torch.stack(column) for column in zip(*rows, strict=True)]
    assert all(x.abs().max() > 1e-3 for x in expected[: 1 if isinstance(estimator, FirstOrder) else 4])
    found = torch.autograd.grad(
        outer(estimator, [], *leaves), leaves, torch.eye(3).double(), is_grads_batched=True, materialize_grads=True
    )
    assert relative_error(found, expected) < 1e-10
    plain = [x.detach() for x in values]
    found = torch.func.jacrev(lambda *x: outer(estimator, [], *x), argnums=(0, 1, 2, 3))(*plain)
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize(
    ("estimator", "gradients"), [(Reverse("graph"), 4), (Reverse(1), 8), (Truncated(2, checkpoint=1), 6)]
)
def test_a_large_problem_takes_its_steps_again_once(estimator, gradients):
    """Counted per task: as many gradients as for one cotangent, and three times the products."""
    outer, values = problem(40_000)
    leaves, counts = [x.requires_grad_() for x in values], []
    value = outer(estimator, counts, *leaves)
    torch.autograd.grad(value, leaves, torch.eye(3).double(), is_grads_batched=True)
    assert counts[0].gradients == gradients
    assert counts[0].products == 3 * (2 if isinstance(estimator, Truncated) else 4)


def test_under_a_vmap_around_it_all_is_stacked():
    outer, (w, slope, batches, lr) = problem(40_000)
    slopes = torch.stack([slope, 1.5 * slope])

    def row(slope):
        return torch.func.jacrev(lambda s: outer(Reverse(), [], w, s, batches, lr))(slope)

    expected = torch.stack([row(s) for s in slopes])
    assert relative_error([torch.func.vmap(row)(slopes)], [expected]) < 1e-10


def test_forward_mode_has_no_steps_to_share():
    outer, values = problem(20)
    leaves = [values[1].requires_grad_()]
    value = outer(ForwardMode(), [], values[0], leaves[0], *values[2:])
    rows = [torch.autograd.grad(x, leaves, retain_graph=True)[0] for x in value]
    value = outer(ForwardMode(), [], values[0], leaves[0], *values[2:])
    found = torch.autograd.grad(value, leaves, torch.eye(3).double(), is_grads_batched=True)
    assert relative_error(found, [torch.stack(rows)]) < 1e-10
