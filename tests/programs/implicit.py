"""Implicit differentiation: minimisers found by anything, linear solvers, constraints and kinks."""

from __future__ import annotations

import torch
from programs.problems import Ridge, grad, implicit_function, learned, newton
from programs.table import program
from torch.func import vmap

import diffopt
from diffopt import SGD, Proximal, implicit, prox, solve
from diffopt.estimators import Implicit, Truncated
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom

EXACT = ConjugateGradient(rtol=1e-12)


@program("TorchOpt", "implicit gradients of a ridge solution by conjugate gradients (custom_root)", Ridge)
def ridge(p):
    w = implicit(p.loss, p.minimiser(p.penalty.detach()), p.penalty, solver=EXACT)
    return grad(p.outer(w), p.penalty)


@ridge.answered_by("torchopt")
def ridge_there(p):
    import torchopt

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(p.loss, argnums=0), argnums=1, solve=torchopt.linear_solve.solve_cg(maxiter=50, rtol=1e-12)
    )
    def solver(start, penalty):
        return p.minimiser(penalty.detach())

    return grad(p.outer(solver(torch.zeros(4), p.penalty)), p.penalty)


@program("TorchOpt", "a scalar root (where the peer returns 0)", lambda: learned(3.0))
def scalar(a):
    return grad(implicit(lambda w, a: w**4 / 4 - a * w, a.detach() ** (1 / 3), a), a)


@scalar.answered_by("closed form")
def scalar_there(a):
    return grad(a ** (1 / 3), a)


@program("hypertorch", "conjugate gradients after descent to the end (CG)", Ridge)
def after_descent(p):
    rule = Implicit(EXACT)
    found = solve(p.loss, torch.zeros(4), p.penalty, optimizer=SGD(0.5), steps=400, estimator=rule)
    return grad(p.outer(found.params), p.penalty)


@after_descent.answered_by("closed form")
def after_descent_there(p):
    return p.answer()


@program("hypertorch", "seven terms of the fixed-point iteration (fixed_point)", Ridge)
def fixed_point_terms(p):
    found = solve(
        p.loss, p.minimiser(p.penalty.detach()), p.penalty, optimizer=SGD(0.2), steps=9, estimator=Truncated(7)
    )
    return grad(p.outer(found.params), p.penalty)


@fixed_point_terms.answered_by("closed form")
def fixed_point_terms_there(p):
    w = p.minimiser(p.penalty.detach()).requires_grad_()
    (outer,) = grad(p.outer(w), w)
    step = torch.eye(4) - 0.2 * p.gram(p.penalty.detach())
    multiplier = sum(torch.matrix_power(step, k) @ outer for k in range(7))
    return -0.2 * multiplier * w


@program("hypertorch", "a Neumann series until it converges", Ridge)
def neumann(p):
    solver = Neumann(500, step_size=0.5, rtol=1e-12)
    return grad(p.outer(implicit(p.loss, p.minimiser(p.penalty.detach()), p.penalty, solver=solver)), p.penalty)


@neumann.answered_by("closed form")
def neumann_there(p):
    return p.answer()


def logistic(w, penalty, x, y):
    """Log-loss with a penalty for each weight."""
    return torch.nn.functional.softplus(-y * (x @ w)).mean() + (penalty * w.square()).sum() / 2


@program("jaxopt", "L-BFGS finds the minimiser (LBFGS)", Ridge, tolerance=1e-6)
def by_lbfgs(p):
    w = torch.zeros(4, requires_grad=True)
    data = p.x, p.y.sign()
    lbfgs = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-13, tolerance_change=0)

    def closure():
        lbfgs.zero_grad()
        loss = logistic(w, p.penalty.detach(), *data)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return grad(p.outer(implicit(logistic, w, p.penalty, *data, solver=Dense())), p.penalty)


@by_lbfgs.answered_by("closed form")
def by_lbfgs_there(p):
    def gradient(w, penalty):
        return torch.func.grad(logistic)(w, penalty, p.x, p.y.sign())

    w = newton(lambda w: gradient(w, p.penalty.detach()), torch.zeros(4)).requires_grad_()
    return implicit_function(gradient, w, p.penalty, *grad(p.outer(w), w))


@program("jaxopt", "a path of four penalties at once (vmap of a solver)", Ridge)
def path(p):
    factors = torch.tensor([0.1, 0.5, 1.0, 3.0])

    def fitted(factor, penalty):
        found = p.minimiser(factor * penalty.detach())
        return p.outer(implicit(p.loss, found, factor * penalty, solver=EXACT))

    return grad(vmap(fitted, (0, None))(factors, p.penalty).sum(), p.penalty)


@path.answered_by("closed form")
def path_there(p):
    return grad(sum(p.outer(p.minimiser(f * p.penalty)) for f in (0.1, 0.5, 1.0, 3.0)), p.penalty)


class Lasso(Ridge):
    """Squares with a penalty on absolute values: two of eight weights are not zero."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.x, self.query_x = (torch.randn(n, 8, generator=generator) for n in (20, 9))
        self.y = self.x[:, 1] - 2 * self.x[:, 5] + 0.1 * torch.randn(20, generator=generator)
        self.strength = learned(0.4)

    def squares(self, w, x):
        """The smooth part."""
        return (x @ w - self.y).square().mean() / 2

    def solution(self):
        """Coordinate descent, as scikit-learn does it."""
        w = torch.zeros(8)
        for i in list(range(8)) * 200:
            w[i] = 0
            column = self.x[:, i]
            w[i] = torch.nn.functional.softshrink(column @ (self.y - self.x @ w) / 20, 0.4) / column.square().mean()
        return w

    def on_support(self):
        """The hypergradient by the formula on the weights that are not zero."""
        kept = self.solution() != 0
        assert 2 <= kept.sum() < 8
        x, sign = self.x[:, kept], self.solution()[kept].sign()
        w = torch.zeros(8)
        w[kept] = torch.linalg.solve(x.T @ x / 20, x.T @ self.y / 20 - self.strength * sign)
        return grad(self.outer(w), self.strength)


@program("jaxopt", "Lasso by proximal gradient, through all of its steps (ProximalGradient, unrolled)", Lasso)
def lasso_unrolled(p):
    optimizer = Proximal(SGD(0.3), prox.L1(p.strength))
    found = solve(p.squares, torch.zeros(8), p.x, optimizer=optimizer, steps=300)
    return grad(p.outer(found.params), p.strength)


@lasso_unrolled.answered_by("closed form")
def lasso_unrolled_there(p):
    return p.on_support()


@program("jaxopt", "Lasso found elsewhere, differentiated where it stands (custom_fixed_point)", Lasso)
def lasso_in_place(p):
    def step(w, strength):
        return prox.L1(strength)(w - 0.3 * p.x.T @ (p.x @ w - p.y) / 20, 0.3)

    w = implicit(diffopt.fixed_point(step), p.solution(), p.strength, solver=GMRES(rtol=1e-12))
    return grad(p.outer(w), p.strength)


@lasso_in_place.answered_by("closed form")
def lasso_in_place_there(p):
    return p.on_support()


@program("jaxopt", "weights on the simplex, by projected descent (ProjectedGradient)", Ridge)
def simplex(p):
    p.y = 3 * p.y
    optimizer = Proximal(SGD(0.3), prox.Simplex())
    found = solve(p.loss, torch.full((4,), 0.25), p.penalty, optimizer=optimizer, steps=600)
    return grad(p.outer(found.params), p.penalty)


@simplex.answered_by("closed form")
def simplex_there(p):
    """Sum one, on the support, which is three of four: the conditions of Karush, Kuhn and Tucker as a linear system."""
    matrix = torch.ones(4, 4)
    matrix[:3, :3], matrix[3, 3] = p.gram(p.penalty)[:3, :3], 0
    right = torch.cat([3 * (p.x.T @ p.y / 12)[:3], torch.ones(1)])
    w = torch.cat([torch.linalg.solve(matrix, right)[:3], torch.zeros(1)])
    slope = (p.gram(p.penalty) @ w - 3 * p.x.T @ p.y / 12).detach()
    assert (w[:3] > 0).all()
    assert slope[3] > slope[0]
    p.y = 3 * p.y
    return grad(p.outer(w), p.penalty)


@program("jaxopt", "nonnegative least squares with a learned bound from above (box)", Ridge)
def box(p):
    high = learned(0.15)
    optimizer = Proximal(SGD(0.3), prox.Box(0.0, high))
    return grad(p.outer(solve(p.loss, torch.zeros(4), p.penalty, optimizer=optimizer, steps=600).params), high)


@box.answered_by("closed form")
def box_there(p):
    """Which weights stand at a bound is found by trying all of 3**4; then it is a linear system in the others."""
    high, right = learned(0.15), p.x.T @ p.y / 12
    gram = p.gram(p.penalty.detach())
    for places in torch.cartesian_prod(*[torch.arange(3)] * 4):
        free, at_top = places == 1, (places == 2).to(gram.dtype)
        w = high * at_top
        inside = torch.linalg.solve(gram[free][:, free], (right - gram @ w)[free])
        w = w.index_put((free.nonzero()[:, 0],), inside)
        slope = gram @ w - right
        signs = (slope[places == 0] >= 0).all() and (slope[places == 2] <= 0).all()
        if signs and (inside >= 0).all() and (inside <= high).all():
            return grad(p.outer(w), high)
    raise AssertionError


@program("Betty", "a damped approximation of Nystrom's, of full rank", Ridge)
def nystrom(p):
    solver = Nystrom(rank=4, damping=0.1)
    return grad(p.outer(implicit(p.loss, p.minimiser(p.penalty.detach()), p.penalty, solver=solver)), p.penalty)


@nystrom.answered_by("closed form")
def nystrom_there(p):
    w = p.minimiser(p.penalty.detach()).requires_grad_()
    damped = p.gram(p.penalty.detach()) + 0.1 * torch.eye(4)
    return -torch.linalg.solve(damped, grad(p.outer(w), w)[0]) * w


@program("optimistix", "iMAML, whose published recipe gives zero there (an open issue)", Ridge)
def imaml(p):
    start = learned(0.3, -0.2, 0.5, 0.1)

    def loss(w, start, penalty):
        return p.loss(w, penalty) + (w - start).square().sum()

    found = solve(loss, start.detach(), start, p.penalty, optimizer=SGD(0.2), steps=400, estimator=Implicit(EXACT))
    return grad(p.outer(found.params), start, p.penalty)


@imaml.answered_by("closed form")
def imaml_there(p):
    start = learned(0.3, -0.2, 0.5, 0.1)
    w = torch.linalg.solve(p.gram(p.penalty) + 2 * torch.eye(4), p.x.T @ p.y / 12 + 2 * start)
    return grad(p.outer(w), start, p.penalty)
