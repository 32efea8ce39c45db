"""Constrained and sparse minimisers, found elsewhere, differentiated as fixed points, against closed forms."""

from __future__ import annotations

import pytest
import torch
from fields import CLOSED, DOUBLE, leaf, normal, number, soft
from oracles import relative_error
from sklearn.linear_model import ElasticNet, Lasso
from sklearn.svm import SVC
from torch import Tensor

import diffopt
from diffopt.linear_solve import GMRES, Dense

SPARSE = 1e-8  # scikit-learn's solutions, to which its own tolerance lets them be exact


Q = torch.eye(4, dtype=DOUBLE) + 0.3 * normal(15, 4, 4) @ normal(15, 4, 4).T
ROWS = normal(16, 2, 4)


def test_the_conditions_of_an_equality_constrained_program():
    """A saddle point: positive in ``x``, and in the multipliers neither."""
    q, right = leaf(normal(17, 4)), leaf(normal(18, 2))

    def conditions(z, q, right):
        x, multipliers = z
        return Q @ x - q + ROWS.T @ multipliers, ROWS @ x - right

    def solved(q, right):
        system = torch.cat([torch.cat([Q, ROWS.T], 1), torch.cat([ROWS, torch.zeros(2, 2, dtype=DOUBLE)], 1)])
        z = torch.linalg.solve(system, torch.cat([q, right]))
        return z[:4], z[4:]

    point = solved(q, right)
    for solver in (GMRES(30, rtol=1e-13), Dense()):
        x, multipliers = diffopt.implicit(diffopt.VectorField(conditions), point, q, right, solver=solver)
        got = torch.autograd.grad(x.square().sum() + multipliers.sum(), [q, right])
        answer = torch.autograd.grad(point[0].square().sum() + point[1].sum(), [q, right], retain_graph=True)
        assert relative_error(got, answer) < CLOSED


X, Y = normal(19, 30, 8), normal(20, 30) + normal(19, 30, 8)[:, :3].sum(1)


def shrunk(w, x, y, alpha, ratio):
    """One proximal step on scikit-learn's objective of the elastic net."""
    slope = x.T @ (x @ w - y) / len(y) + alpha * (1 - ratio) * w
    return soft(w - 0.3 * slope, 0.3 * alpha * ratio)


def on_the_active_set(w: Tensor, x: Tensor, y: Tensor, alpha: Tensor, ratio: Tensor) -> Tensor:
    """The solution as a function of all it depends on, where signs and zeros stay as they are."""
    active = w != 0
    part = x[:, active]
    matrix = part.T @ part / len(y) + alpha * (1 - ratio) * torch.eye(part.shape[1], dtype=DOUBLE)
    right = part.T @ y / len(y) - alpha * ratio * w[active].sign()
    return torch.zeros_like(w).index_put((active.nonzero()[:, 0],), torch.linalg.solve(matrix, right))


@pytest.mark.parametrize("kind", ["lasso", "elastic net"])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_a_sparse_solution_of_scikit_learn(kind, alpha):
    ratio = 1.0 if kind == "lasso" else 0.6
    options = {"fit_intercept": False, "tol": 1e-15, "max_iter": 100_000}
    model = Lasso(alpha, **options) if kind == "lasso" else ElasticNet(alpha, l1_ratio=ratio, **options)
    w = torch.from_numpy(model.fit(X.numpy(), Y.numpy()).coef_)
    assert 0 < int((w == 0).sum()) < 8
    made = [leaf(X), leaf(Y), number(alpha), number(ratio)]
    wanted = made[: 3 if kind == "lasso" else 4]
    found = diffopt.implicit(diffopt.fixed_point(shrunk), w, *made, solver=Dense())
    assert torch.equal(found.detach(), w)
    cost = normal(21, 8)
    got = torch.autograd.grad((cost * found).sum() + found.square().sum(), wanted)
    closed = on_the_active_set(w, *made)
    assert relative_error([closed], [w]) < SPARSE
    answer = torch.autograd.grad((cost * closed).sum() + closed.square().sum(), wanted)
    assert relative_error(got, answer) < SPARSE


def kernel(x: Tensor, width: Tensor) -> Tensor:
    return (-width * (x[:, None] - x[None]).square().sum(-1)).exp()


def dual(z, x, sides, limit, width):
    """A projected step of the support vector machine's dual, and the constraint of its intercept."""
    a, intercept = z
    slope = sides * (kernel(x, width) @ (sides * a)) - 1 + sides * intercept
    return a - (a - 0.1 * slope).clamp(0 * a, limit.expand_as(a)), sides @ a


def test_a_support_vector_machine_of_scikit_learn():
    x = normal(22, 24, 2)
    sides = (x[:, 0] + 0.7 * normal(23, 24) > 0).to(DOUBLE) * 2 - 1
    limit, width = number(1.5), number(0.8)
    model = SVC(C=1.5, gamma=0.8, tol=1e-13).fit(x.numpy(), sides.numpy())
    a = torch.zeros(24, dtype=DOUBLE)
    a[model.support_] = torch.from_numpy(model.dual_coef_[0]).abs()
    intercept = torch.tensor(model.intercept_[0], dtype=DOUBLE)
    free, bounded = (a > 1e-9) & (a < 1.5 - 1e-9), a >= 1.5 - 1e-9
    assert free.sum() > 2
    assert bounded.sum() > 2

    # the free ones and the intercept solve a linear system; those at the limit stay there
    matrix = sides[:, None] * kernel(x, width) * sides
    at_limit = limit * bounded.to(DOUBLE)
    rows = torch.cat([matrix[free][:, free], sides[free][:, None]], 1)
    system = torch.cat([rows, torch.cat([sides[free], torch.zeros(1, dtype=DOUBLE)])[None]])
    right = torch.cat([1 - matrix[free] @ at_limit, -(sides @ at_limit)[None]])
    solved = torch.linalg.solve(system, right)
    exact = at_limit.index_put((free.nonzero()[:, 0],), solved[:-1])
    # libsvm computes kernels in single precision
    assert relative_error([exact, solved[-1:]], [a, intercept[None]]) < 1e-6

    cost = normal(24, 24)
    answer = torch.autograd.grad((cost * exact).sum() + solved[-1], [limit, width])
    for point, tolerance in (((a, intercept), 1e-5), ((exact, solved[-1]), SPARSE)):
        found, offset = diffopt.implicit(diffopt.VectorField(dual), point, x, sides, limit, width, solver=Dense())
        got = torch.autograd.grad((cost * found).sum() + offset, [limit, width])
        assert relative_error(got, answer) < tolerance
