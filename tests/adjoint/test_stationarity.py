"""Where ``implicit`` may be used: not at a kink, and not where only the loss's units make the gradient small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from implicit_problems import normal
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt import StationarityError
from diffopt.linear_solve import GMRES, Dense, Nystrom, Tasks

X, NOISE = normal(0, 30, 6), 0.01 * normal(1, 30)
Y = X[:, 0] + NOISE


def lasso(w: Tensor, penalty: Tensor, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return ((x.to(w) @ w - y.to(w)) ** 2).mean() / 2 + penalty * w.abs().sum()


def lasso_solution(penalty: float) -> Tensor:
    """By proximal gradient descent, written down here."""
    w, rate = torch.zeros(6, dtype=torch.float64), 0.2
    for _ in range(3000):
        w = w - rate * X.T @ (X @ w - Y) / len(Y)
        w = w.sign() * (w.abs() - rate * penalty).clamp(min=0)
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [0.3, 0.02, 0.003])
@pytest.mark.parametrize("style", ["plain", "grad", "vmap"])
def test_zeros_of_lasso_are_at_a_kink(penalty: float, dtype: torch.dtype, style: str) -> None:
    """Also where the penalty is so small that the gradient, which is at most the penalty there, would pass."""
    w, theta = lasso_solution(penalty).to(dtype), torch.tensor(penalty, dtype=dtype)
    assert 0 < int((w == 0).sum()) < len(w)

    def total(theta: Tensor) -> Tensor:
        return diffopt.implicit(lasso, w, theta).sum()

    styles: dict[str, Any] = {
        "plain": lambda: total(theta.requires_grad_()).backward(),
        "grad": lambda: grad(total)(theta),
        "vmap": lambda: vmap(grad(total))(theta.expand(2)),
    }
    with pytest.raises(StationarityError, match=r"params are at a kink of the loss.*expected a smooth") as caught:
        styles[style]()
    assert "Minimise further" not in str(caught.value)


def test_what_is_off_the_kink_has_the_derivative_of_lasso() -> None:
    """As the message advises: with the sign fixed, ``dw/dpenalty = -(X'X/n)^-1 sign(w)`` on the support."""
    w = lasso_solution(0.02)
    support = w != 0
    theta, x = torch.tensor(0.02, dtype=torch.float64, requires_grad=True), X[:, support]
    got = torch.autograd.grad(diffopt.implicit(lasso, w[support], theta, x, Y).sum(), theta)[0]
    expected = -torch.linalg.solve(x.T @ x / len(Y), w[support].sign()).sum()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def kinked_elsewhere(w: Tensor) -> Tensor:
    return (w - 1).abs().sum() + 0.5 * w.sum()


@pytest.mark.parametrize(
    ("loss", "at"),
    [
        (kinked_elsewhere, torch.ones(3)),
        (lambda w: torch.relu(1 - w).sum() + 0.2 * w.square().sum(), torch.ones(3)),
        (lambda w: w.norm() + 0.5 * w.sum() / 2, torch.zeros(4)),
    ],
)
def test_kinks_of_other_kinds_are_named(loss: Any, at: Tensor) -> None:
    with pytest.raises(StationarityError, match="params are at a kink"):
        diffopt.implicit(loss, at)


@pytest.mark.parametrize("curvature", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unfinished_smooth_problem_is_not_called_kinked(curvature: float, dtype: torch.dtype) -> None:
    scales = torch.tensor([curvature, 1.0, 0.1], dtype=dtype)
    with pytest.raises(StationarityError, match="minimise further"):
        diffopt.implicit(lambda w: (scales * w.square()).sum(), torch.tensor([1.0, 1.0, 0.0], dtype=dtype))


@pytest.mark.parametrize("off", [4, 32, 64])
@pytest.mark.parametrize("shape", ["square", "cosh", "fourth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_steep_smooth_problem_is_not_called_kinked(dtype: torch.dtype, shape: str, off: int) -> None:
    """Some roundings from its minimum, which the shortest step that is looked at leaps over."""
    eps = torch.finfo(dtype).eps
    losses: dict[str, Any] = {
        "square": lambda w: (w - 1).square().sum() / eps,
        "cosh": lambda w: ((w - 1) / eps / 100).cosh().sum() * eps * 1e4,
        "fourth": lambda w: ((w - 1) / eps).pow(4).sum() * eps,
    }
    with pytest.raises(StationarityError, match="minimise further"):
        diffopt.implicit(losses[shape], torch.tensor([1 + off * eps, 1.0], dtype=dtype))


@pytest.mark.parametrize("seed", range(4))
def test_a_network_of_kinks_with_zeros_among_its_params_is_taken(seed: int) -> None:
    """Biases that are zero, at a point whose gradient is round-off: ReLUs are no reason to refuse."""
    x, weight = normal(seed, 20, 3), normal(seed + 9, 3, 4).requires_grad_()

    def loss(p: dict[str, Tensor], target: Tensor) -> Tensor:
        hidden = torch.relu(x @ weight.detach() + p["bias"])
        return ((hidden @ p["out"] - target) ** 2).mean() + p["out"].square().sum() + p["bias"].square().sum()

    target = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    params = {"bias": torch.zeros(4, dtype=torch.float64), "out": torch.zeros(4, dtype=torch.float64)}
    diffopt.implicit(loss, params, target)["out"].sum().backward()
    assert target.grad is not None
    assert float(target.grad.norm()) > 0


UNITS = [1e-37, 1e-30, 1e-25, 1e-20, 1e20, 1e30]
MATRIX = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # of whose minimisers nothing is rounded


def quadratic(w: Tensor, theta: Tensor, unit: float) -> Tensor:
    return unit * (w @ MATRIX @ w / 2 - w @ theta)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("solver", [None, GMRES(), Dense()], ids=repr)
def test_no_unit_of_the_loss_makes_a_minimiser(unit: float, solver: Any) -> None:
    """In float32 the squares of 1e-25 are zero."""
    theta = torch.tensor([1.0, 3.0], requires_grad=True)
    with pytest.raises(StationarityError, match="expected at most"):
        diffopt.implicit(quadratic, torch.tensor([5.0, -5.0]), theta, unit, solver=solver).sum().backward()
    best = torch.linalg.solve(MATRIX, theta.detach())
    diffopt.implicit(quadratic, best, theta, unit, solver=solver).sum().backward()
    torch.testing.assert_close(theta.grad, torch.linalg.solve(MATRIX, torch.ones(2)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-25, 1e-3, 1e18, 1e30, 1e38])
def test_norms_of_any_size(size: float) -> None:
    tensors = diffopt.Leaves([(size * normal(1, 2, 3)).float(), (size * normal(2, 2)).float()])
    expected = torch.stack(
        [(tensors[0][i].double().square().sum() + tensors[1][i].double() ** 2).sqrt() for i in (0, 1)]
    )
    got, unit = Tasks(1).norm(tensors), Tasks(1).unit(tensors)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1.5e-45)
    torch.testing.assert_close(Tasks(1).norm(unit), torch.ones(2))


def test_norms_of_nothing_and_of_what_is_not_finite() -> None:
    for value in (0.0, float("inf"), float("nan")):
        got = Tasks(0).norm(diffopt.Leaves([torch.tensor([value, 0.0])]))
        torch.testing.assert_close(got, torch.tensor(value), equal_nan=True)


ROTATED = torch.block_diag(*[torch.tensor([[2.0, 3.0], [-3.0, 2.0]])] * 3).double()
NOT_SYMMETRIC = {
    "random": normal(3, 6, 6) + 4 * torch.eye(6),
    "triangular": torch.triu(normal(4, 6, 6)) + 3 * torch.eye(6),
    "rotated": ROTATED,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [2, 4, 6])
@pytest.mark.parametrize("name", NOT_SYMMETRIC)
def test_nystrom_does_not_claim_to_solve_what_is_not_symmetric(name: str, rank: int, dtype: torch.dtype) -> None:
    matrix = NOT_SYMMETRIC[name].to(dtype)
    found = Nystrom(rank, 1.0, throw=False).solve(lambda x: matrix @ x, normal(5, 6).to(dtype))
    assert not bool(found.converged)
    assert bool(found.breakdown)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_nystrom_takes_what_is_symmetric_up_to_round_off(rank: int, dtype: torch.dtype, scale: float) -> None:
    half = normal(6, 6, 2)
    matrix = scale * (half @ half.T + torch.diag(torch.tensor([0, 0, 0, 0, 0, 1e-4])))
    found = Nystrom(rank, scale, throw=False).solve(lambda x: matrix.to(dtype) @ x, normal(7, 6).to(dtype))
    assert not bool(found.breakdown)


@pytest.mark.parametrize("at", [0.0, 1e-30, -1e-30, 1e-200])
def test_a_kink_beside_a_tiny_param_is_named(at: float) -> None:
    lasso = torch.tensor(5e-3, dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor, strength: Tensor) -> Tensor:
        return (w - 1e-3).square().sum() + strength * w.abs().sum()

    with pytest.raises(StationarityError, match="kink"):
        diffopt.implicit(loss, torch.tensor([at], dtype=torch.float64), lasso).sum().backward()
