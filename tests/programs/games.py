"""Updates that are no gradient of one function: players, opponents, values that are bootstrapped."""

from __future__ import annotations

import torch
from oracles import sgd_step
from programs.problems import grad, learned
from programs.table import program

from diffopt import SGD, VectorField, game, implicit, solve
from diffopt.linear_solve import GMRES


class Players:
    """A quadratic game of two players, and what an observer learns."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.matrix, self.a = torch.randn(3, 2), learned(0.5, -1.0, 0.3)
        self.start = (torch.ones(3), -torch.ones(2))

    def first(self, players, a):
        """What the first player pays."""
        x, y = players
        return x.square().sum() / 2 + x @ self.matrix @ y - a @ x

    def second(self, players, a):
        """And the second, who wants the opposite of the common term."""
        x, y = players
        return y.square().sum() - x @ self.matrix @ y + a[0] * y.sum()

    def equilibrium(self, a):
        """Where no player moves, as a linear system."""
        upper = torch.cat([torch.eye(3), self.matrix], 1)
        lower = torch.cat([-self.matrix.T, 2 * torch.eye(2)], 1)
        right = torch.cat([a, -a[0] * torch.ones(2)])
        return torch.linalg.solve(torch.cat([upper, lower]), right)


@program("Betty", "two players step at the same time, with momentum; both are differentiated", Players)
def simultaneous(p):
    found = solve(game(p.first, p.second), p.start, p.a, optimizer=SGD(0.1, momentum=0.5), steps=6)
    x, y = found.params
    return grad(x.square().sum() + y.prod(), p.a)


@simultaneous.answered_by("autograd")
def simultaneous_there(p):
    players, buffers = [x.requires_grad_() for x in p.start], [{}, {}]
    for t in range(6):
        losses = p.first(players, p.a), p.second(players, p.a)
        grads = [torch.autograd.grad(loss, x, create_graph=True)[0] for loss, x in zip(losses, players, strict=True)]
        players = [sgd_step(x, g, b, t + 1, 0.1, momentum=0.5) for x, g, b in zip(players, grads, buffers, strict=True)]
    return grad(players[0].square().sum() + players[1].prod(), p.a)


@program("jaxopt", "the equilibrium of a game, by the implicit function theorem", Players)
def equilibrium(p):
    point = p.equilibrium(p.a.detach()).split([3, 2])
    x, y = implicit(game(p.first, p.second), point, p.a, solver=GMRES(rtol=1e-12))
    return grad(x.square().sum() + y.prod(), p.a)


@equilibrium.answered_by("closed form")
def equilibrium_there(p):
    x, y = p.equilibrium(p.a).split([3, 2])
    return grad(x.square().sum() + y.prod(), p.a)


@program("Betty", "players take turns: each steps from where the other has just gone", Players)
def turns(p):
    x, y = p.start
    for _ in range(3):
        x = solve(lambda x, y, a: p.first((x, y), a), x, y, p.a, optimizer=SGD(0.2), steps=1).params
        y = solve(lambda y, x, a: p.second((x, y), a), y, x, p.a, optimizer=SGD(0.2), steps=2).params
    return grad(x.square().sum() + y.prod(), p.a)


@turns.answered_by("autograd")
def turns_there(p):
    x, y = (z.requires_grad_() for z in p.start)
    for _ in range(3):
        x = x.view_as(x)  # of which y was not made: a partial gradient is meant
        x = x - 0.2 * torch.autograd.grad(p.first((x, y), p.a), x, create_graph=True)[0]
        for _ in range(2):
            y = y.view_as(y)
            y = y - 0.2 * torch.autograd.grad(p.second((x, y), p.a), y, create_graph=True)[0]
    return grad(x.square().sum() + y.prod(), p.a)


@program("TorchOpt", "LOLA: a player's gradient through the opponent's next step", Players)
def lola(p):
    x, y = p.start[0].requires_grad_(), p.start[1]
    after = solve(lambda y, x, a: p.second((x, y), a), y, x, p.a.detach(), optimizer=SGD(0.3), steps=1).params
    return grad(p.first((x, after), p.a), x)


@lola.answered_by("torchopt")
def lola_there(p):
    import torchopt

    (x, y), inner = (z.requires_grad_() for z in p.start), torchopt.FuncOptimizer(torchopt.sgd(0.3))
    (after,) = inner.step(p.second((x, y), p.a.detach()), (y,))
    return grad(p.first((x, after), p.a), x)


class Values:
    """A chain of states with features; the value of each is learned from the next one's."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.now, self.next, self.reward = torch.randn(8, 3), torch.randn(8, 3), torch.randn(8)
        self.discount, self.goal = learned(0.7), torch.randn(8)

    def step(self, w, discount):
        """Temporal differences: the target is no function of ``w`` to the update, but to the derivative it is."""
        error = self.now @ w - self.reward - discount * self.next @ w
        return self.now.T @ error / 8

    def outer(self, w):
        """What the values should have been."""
        return (self.now @ w - self.goal).square().mean()


@program("TorchOpt", "a learned discount through steps of temporal differences (meta-gradient RL)", Values)
def discount(p):
    found = solve(VectorField(p.step), torch.zeros(3), p.discount, optimizer=SGD(0.2, momentum=0.5), steps=8)
    return grad(p.outer(found.params), p.discount)


@discount.answered_by("torchopt")
def discount_there(p):
    import torchopt

    rule = torchopt.sgd(0.2, momentum=0.5)
    w, state = (torch.zeros(3),), rule.init((torch.zeros(3),))
    for _ in range(8):
        updates, state = rule.update((p.step(w[0], p.discount),), state, params=w, inplace=False)
        w = torchopt.apply_updates(w, updates, inplace=False)
    return grad(p.outer(w[0]), p.discount)


@program("optimistix", "the values that temporal differences tend to, as a root", Values)
def fixed_values(p):
    def field(w, discount):
        return p.step(w, discount) + 0.5 * w

    system = p.now.T @ (p.now - p.discount.detach() * p.next) / 8 + 0.5 * torch.eye(3)
    w = torch.linalg.solve(system, p.now.T @ p.reward / 8)
    return grad(p.outer(implicit(VectorField(field), w, p.discount, solver=GMRES(rtol=1e-12))), p.discount)


@fixed_values.answered_by("closed form")
def fixed_values_there(p):
    system = p.now.T @ (p.now - p.discount * p.next) / 8 + 0.5 * torch.eye(3)
    return grad(p.outer(torch.linalg.solve(system, p.now.T @ p.reward / 8)), p.discount)


@program("Betty", "sharpness-aware steps: the gradient is taken where the loss is worse", Players)
def sharpness(p):
    def loss(w, a):
        return (a * w.square()).sum() / 2 + w.sin().sum()

    def field(w, a, radius):
        gradient = torch.func.grad(loss)(w, a)
        return torch.func.grad(loss)(w + radius * gradient / gradient.norm(), a)

    radius = learned(0.1)
    found = solve(VectorField(field), torch.ones(3), p.a, radius, optimizer=SGD(0.3), steps=5)
    return grad(found.params.square().sum(), p.a, radius)


@sharpness.answered_by("autograd")
def sharpness_there(p):
    """The gradients of the loss by hand: ``a w + cos w``."""
    w, radius = torch.ones(3), learned(0.1)
    for _ in range(5):
        gradient = p.a * w + w.cos()
        there = w + radius * gradient / gradient.norm()
        w = w - 0.3 * (p.a * there + there.cos())
    return grad(w.square().sum(), p.a, radius)
