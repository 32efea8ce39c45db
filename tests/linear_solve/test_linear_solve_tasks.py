"""The linear solvers on many tasks at once: every task as if it were alone."""

from __future__ import annotations

import pytest
import torch
from linear_systems import SIZE, SOLVERS, Product, changed, damped, definite, error, identity, name, normal
from torch import Tensor

from diffopt.linear_solve import GMRES, Tasks
from diffopt.tensors.leaves import Leaves

BATCH_SOLVERS = [changed(s, throw=False, rtol=1e-10, max_iterations=12) for s in SOLVERS]


def four_tasks() -> tuple[Tensor, Tensor]:
    """A system that every solver solves, one that is solved at the start, an indefinite one, and a slow one.

    Of no condition number at which round-off, and so the processor, would decide after how many products a residual is
    below 1e-6 of b: of seven numbers, the seventh product of conjugate gradients takes the slow one from 1e-2 to 1e-12.
    """
    matrices = torch.stack([definite(20, 1.05), definite(21), definite(22) - 0.5 * identity(), definite(23, 30.0)])
    b = normal(24, 4, SIZE)
    b[1] = 0
    return matrices, b


@pytest.mark.parametrize("how", ["vmap", "nested vmap", "stacked"])
@pytest.mark.parametrize("solver", BATCH_SOLVERS, ids=name)
def test_every_task_is_as_if_alone(solver, how):
    solver, (matrices, b) = changed(solver, rtol=1e-6), four_tasks()
    if how == "stacked":
        got = solver.run(lambda x: Leaves([(matrices @ x[0][..., None])[..., 0]]), Leaves([b]), Tasks(1), None)
        got = got._replace(value=got.value[0])
    else:
        one = torch.func.vmap(lambda a, b: tuple(solver.solve(lambda x: a @ x, b)))
        if how == "vmap":
            out = one(matrices, b)
        else:
            out = [x.flatten(0, 1) for x in torch.func.vmap(one)(matrices.unflatten(0, (2, 2)), b.unflatten(0, (2, 2)))]
        got = type(solver.solve(Product(matrices[0]), b[0]))(*out)
    for i in range(4):
        alone = solver.solve(Product(matrices[i]), b[i])
        # after as many products, of systems with condition numbers up to 30, only round-off is left
        assert float((got.value[i] - alone.value).norm()) <= 1e-6 * float(alone.value.norm())
        if not isinstance(solver, GMRES):  # whose products are taken for all tasks together
            assert int(got.iterations[i]) == int(alone.iterations)
            # what is far below the residual asked for is round-off, and may differ as a whole
            assert float(got.residual[i]) == pytest.approx(float(alone.residual), rel=1e-3, abs=1e-8)
        assert bool(got.converged[i]) == bool(alone.converged)
        assert bool(got.breakdown[i]) == bool(alone.breakdown)


@pytest.mark.parametrize("solver", BATCH_SOLVERS, ids=name)
@pytest.mark.parametrize("batched", ["matrix", "b"])
def test_tasks_may_share_the_matrix_or_the_right_hand_side(solver, batched):
    solver = changed(solver, max_iterations=7 if isinstance(solver, GMRES) else 300)
    matrices, b = torch.stack([definite(25), definite(26)]), normal(27, 2, SIZE)
    dims = (0, None) if batched == "matrix" else (None, 0)
    arguments = (matrices, b[0]) if batched == "matrix" else (matrices[0], b)
    got = torch.func.vmap(lambda a, b: solver.solve(lambda x: a @ x, b).value, dims)(*arguments)
    full = matrices if batched == "matrix" else matrices[:1].expand(2, SIZE, SIZE)
    right = b[:1].expand(2, SIZE) if batched == "matrix" else b
    expected = torch.linalg.solve(damped(solver, full), right)
    assert error(got, expected) < 1e-8


@pytest.mark.parametrize("solver", BATCH_SOLVERS, ids=name)
def test_one_bad_task_does_not_spoil_the_others(solver):
    matrices, b = torch.stack([definite(28), definite(29)]), normal(30, 2, SIZE)
    matrices[1, 0, 0] = float("nan")
    got = torch.func.vmap(lambda a, b: tuple(solver.solve(lambda x: a @ x, b)))(matrices, b)
    alone = solver.solve(Product(matrices[0]), b[0])
    assert error(got[0][0], alone.value) < 1e-8
    assert [bool(x) for x in got[3]] == [bool(alone.converged), False]
