"""Roots, fixed points, least squares and optimality conditions."""

from __future__ import annotations

import torch
from programs.problems import Ridge, grad, implicit_function, learned, newton
from programs.table import program
from torch.func import jacrev

import diffopt
from diffopt import SGD, VectorField, implicit, solve
from diffopt.estimators import Implicit, Reverse
from diffopt.linear_solve import GMRES, Dense

EXACT = GMRES(rtol=1e-12)


def system(z, theta):
    """Two equations whose Jacobian is not symmetric."""
    return torch.stack([z[0] ** 3 + z[1] - theta[0], z[1].exp() - z[0] * theta[1] - 1])


@program("optimistix", "a root of two equations (root_find)", lambda: learned(2.0, 0.7))
def root(theta):
    z = newton(lambda z: system(z, theta.detach()), torch.ones(2))
    return grad(implicit(VectorField(system), z, theta, solver=EXACT).prod(), theta)


@root.answered_by("closed form")
def root_there(theta):
    z = newton(lambda z: system(z, theta.detach()), torch.ones(2))
    return implicit_function(system, z, theta, z.flip(0))


@program("optimistix", "a fixed point of a map (fixed_point)", lambda: learned(0.8))
def cosine(a):
    z = torch.tensor(0.5)
    for _ in range(200):
        z = (a.detach() * z).cos()
    return grad(implicit(diffopt.fixed_point(lambda z, a: (a * z).cos()), z, a, solver=EXACT), a)


@cosine.answered_by("closed form")
def cosine_there(a):
    z = torch.tensor(0.5)
    for _ in range(200):
        z = (a.detach() * z).cos()
    sine = (a * z).sin().detach()
    return -z * sine / (1 + a.detach() * sine)


class Curve:
    """Points near a curve with two parameters; the weights of the points are learned."""

    def __init__(self) -> None:
        self.t = torch.linspace(0, 2, 7)
        self.y = 2 * torch.exp(-0.8 * self.t) + 0.05 * torch.sin(9 * self.t)
        self.weights = torch.linspace(0.5, 1.5, 7).requires_grad_()

    def residual(self, z, weights):
        """What is to be small, point by point."""
        return weights * (z[0] * torch.exp(-z[1] * self.t) - self.y)

    def loss(self, z, weights):
        """Half the sum of squares."""
        return self.residual(z, weights).square().sum() / 2

    def gauss_newton(self, z, weights):
        """The step that Gauss and Newton would take back."""
        residual, jacobian = self.residual(z, weights), jacrev(self.residual)(z, weights)
        return torch.linalg.solve(jacobian.T @ jacobian, jacobian.T @ residual)

    def solution(self):
        """Found by the steps above."""
        z = torch.tensor([1.0, 1.0])
        for _ in range(100):
            z = z - self.gauss_newton(z, self.weights.detach())
        return z

    def answer(self):
        """By the implicit function theorem."""
        z = self.solution()
        return implicit_function(torch.func.grad(self.loss), z, self.weights, z.flip(0))


@program("optimistix", "nonlinear least squares with learned weights (least_squares)", Curve)
def least_squares(p):
    return grad(implicit(p.loss, p.solution(), p.weights, solver=Dense()).prod(), p.weights)


@least_squares.answered_by("closed form")
def least_squares_there(p):
    return p.answer()


@program("theseus", "least squares through the steps of Gauss and Newton (UNROLL)", Curve)
def gauss_newton(p):
    field = VectorField(p.gauss_newton)
    found = solve(field, torch.tensor([1.0, 1.0]), p.weights, optimizer=SGD(1.0), steps=60)
    return grad(found.params.prod(), p.weights)


@gauss_newton.answered_by("closed form")
def gauss_newton_there(p):
    return p.answer()


@program("theseus", "least squares through the last three steps only (TRUNCATED)", Curve)
def truncated(p):
    field = VectorField(p.gauss_newton)
    state = solve(field, torch.tensor([1.0, 1.0]), p.weights, optimizer=SGD(0.7), steps=4).state
    found = solve(field, state.detach(), p.weights, optimizer=SGD(0.7), steps=3)
    return grad(found.params.prod(), p.weights)


@truncated.answered_by("autograd")
def truncated_there(p):
    z = torch.tensor([1.0, 1.0])
    for t in range(7):
        z = z.detach() if t == 4 else z
        z = z - 0.7 * p.gauss_newton(z, p.weights)
    return grad(z.prod(), p.weights)


@program("theseus", "least squares where the steps have ended (IMPLICIT)", Curve)
def implicit_end(p):
    field = VectorField(p.gauss_newton)
    rule = Implicit(EXACT)
    found = solve(field, torch.tensor([1.0, 1.0]), p.weights, optimizer=SGD(1.0), steps=60, estimator=rule)
    return grad(found.params.prod(), p.weights)


@implicit_end.answered_by("closed form")
def implicit_end_there(p):
    return p.answer()


class Equilibrium:
    """A layer that is applied until nothing moves."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.matrix = (0.15 * torch.randn(5, 5)).requires_grad_()
        self.x = torch.randn(4, 5)

    def layer(self, z, matrix):
        """One application, of a batch."""
        return torch.tanh(z @ matrix.T + self.x)

    def end(self):
        """After many."""
        z = torch.zeros(4, 5)
        for _ in range(300):
            z = self.layer(z, self.matrix.detach())
        return z


@program("hypertorch", "a deep equilibrium: the weights of a layer's fixed point", Equilibrium)
def equilibrium(p):
    z = implicit(diffopt.fixed_point(p.layer), p.end(), p.matrix, solver=GMRES(60, rtol=1e-12))
    return grad(z.square().sum(), p.matrix)


@equilibrium.answered_by("autograd")
def equilibrium_there(p):
    z = torch.zeros(4, 5)
    for _ in range(300):
        z = p.layer(z, p.matrix)
    return grad(z.square().sum(), p.matrix)


@program("optimistix", "a layer's 60 applications (RecursiveCheckpointAdjoint)", Equilibrium)
def checkpointed(p):
    field, rule = diffopt.fixed_point(p.layer), Reverse("sqrt")
    found = solve(field, torch.zeros(4, 5), p.matrix, optimizer=SGD(1.0), steps=60, estimator=rule)
    return grad(found.params.square().sum(), p.matrix)


@checkpointed.answered_by("autograd")
def checkpointed_there(p):
    z = torch.zeros(4, 5)
    for _ in range(60):
        z = p.layer(z, p.matrix)
    return grad(z.square().sum(), p.matrix)


@program("jaxopt", "a quadratic program and its multipliers (EqualityConstrainedQP)", Ridge)
def kkt(p):
    matrix, b = torch.tensor([[1.0, 1, 1, 1], [1, -1, 0, 0]]), learned(1.0, 0.3)

    def conditions(z, penalty, b):
        w, multiplier = z["w"], z["multiplier"]
        slope = torch.func.grad(p.loss)(w, penalty)
        return {"w": slope + matrix.T @ multiplier, "multiplier": matrix @ w - b}

    z = dict(zip(("w", "multiplier"), saddle(p, matrix, p.penalty, b), strict=True))
    z = implicit(VectorField(conditions), {k: v.detach() for k, v in z.items()}, p.penalty, b, solver=EXACT)
    return grad(p.outer(z["w"]) + z["multiplier"].prod(), p.penalty, b)


def saddle(p, matrix, penalty, b):
    """Solution and multipliers as a linear system."""
    upper = torch.cat([p.gram(penalty), matrix.T], 1)
    lower = torch.cat([matrix, torch.zeros(2, 2)], 1)
    found = torch.linalg.solve(torch.cat([upper, lower]), torch.cat([p.x.T @ p.y / 12, b]))
    return found.split([4, 2])


@kkt.answered_by("closed form")
def kkt_there(p):
    matrix, b = torch.tensor([[1.0, 1, 1, 1], [1, -1, 0, 0]]), learned(1.0, 0.3)
    w, multiplier = saddle(p, matrix, p.penalty, b)
    return grad(p.outer(w) + multiplier.prod(), p.penalty, b)
