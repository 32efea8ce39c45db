"""Hyperparameter optimisation: penalties, data cleaning, augmented losses, levels in levels."""

from __future__ import annotations

import torch
from programs.problems import Fit, Ridge, adam_loop, grad, implicit_function, learned, loop, newton
from programs.table import program
from torch.nn.functional import cross_entropy, softplus

import diffopt
from diffopt import SGD, Adam, implicit, implicit_gradients, solve
from diffopt.estimators import ForwardMode, Implicit, Reverse
from diffopt.linear_solve import ConjugateGradient, Dense, Neumann


class Logistic(Ridge):
    """Two classes, one penalty (its logarithm) for each weight."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.query_y = self.y.sign(), self.query_y.sign()
        self.logs = learned(-1.0, -2.0, -0.5, -1.5)

    def loss(self, w, logs):
        """Log-loss and penalties."""
        return softplus(-self.y * (self.x @ w)).mean() + (logs.exp() * w.square()).sum() / 2

    def outer(self, w):
        """Log-loss on other data."""
        return softplus(-self.query_y * (self.query_x @ w)).mean()

    def minimiser(self, logs):
        """By Newton's method."""
        return newton(lambda w: torch.func.grad(self.loss)(w, logs.detach()), torch.zeros(4))

    def answer(self):
        """By the implicit function theorem."""
        w = self.minimiser(self.logs).requires_grad_()
        return implicit_function(torch.func.grad(self.loss), w, self.logs, *grad(self.outer(w), w))


@program("benchmark_bilevel", "a penalty for every feature of a logistic regression", Logistic)
def penalties(p):
    rule = Implicit(ConjugateGradient(rtol=1e-12))
    found = solve(p.loss, torch.zeros(4), p.logs, optimizer=SGD(1.0, momentum=0.5), steps=500, estimator=rule)
    return grad(p.outer(found.params), p.logs)


@penalties.answered_by("closed form")
def penalties_there(p):
    return p.answer()


@program("benchmark_bilevel", "SOBA: one step each for weights, multiplier and penalties", Logistic)
def soba(p):
    logs, w, multiplier = p.logs.detach(), torch.zeros(4), torch.zeros(4)
    for _ in range(30):
        (outer,) = grad(p.outer(w.requires_grad_()), w)
        solver = Neumann(1, step_size=0.5, rtol=None)
        found = implicit_gradients(p.loss, w, logs, cotangent=outer, start=multiplier, solver=solver)
        w = solve(p.loss, w, logs, optimizer=SGD(0.5), steps=1).params.detach()
        logs, multiplier = logs - 0.3 * found.args[0], found.multiplier
    return logs, w


@soba.answered_by("closed form")
def soba_there(p):
    """With the Hessian in full."""
    logs, w, multiplier = p.logs.detach(), torch.zeros(4), torch.zeros(4)
    for _ in range(30):
        outer, slope = torch.func.grad(p.outer)(w), torch.func.grad(p.loss)(w, logs)
        hessian = torch.func.jacrev(torch.func.grad(p.loss))(w, logs)
        multiplier = multiplier + 0.5 * (outer - hessian @ multiplier)
        logs, w = logs + 0.3 * logs.exp() * w * multiplier, w - 0.5 * slope
    return logs, w


class Cleaning(Fit):
    """Labels, of which some are wrong; the weight of each example is the sigmoid of a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.labels, self.query_labels = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([1, 1, 0, 0, 1, 0])
        self.start, self.logits = torch.zeros(3, 2), torch.linspace(-1, 1, 6).requires_grad_()

    def loss(self, w, logits):
        """Weighted log-loss and a penalty."""
        each = cross_entropy(self.x @ w, self.labels, reduction="none")
        return (logits.sigmoid() * each).mean() + 0.1 * w.square().sum()

    def outer(self, w):
        """Log-loss on clean examples."""
        return cross_entropy(self.query_x @ w, self.query_labels)


@program("benchmark_bilevel", "data cleaning by softmax regression, through all steps", Cleaning)
def cleaning(p):
    found = solve(p.loss, p.start, p.logits, optimizer=SGD(0.5, momentum=0.9), steps=20, estimator=Reverse("sqrt"))
    return grad(p.outer(found.params), p.logits)


@cleaning.answered_by("autograd")
def cleaning_there(p):
    start = p.start.requires_grad_()
    return grad(p.outer(loop(lambda w, t: p.loss(w, p.logits), start, 20, lr=0.5, momentum=0.9)), p.logits)


@program("benchmark_bilevel", "stocBiO: minibatches in the steps, a Neumann series of another", Logistic)
def stocbio(p):
    rows = torch.arange(12).reshape(4, 3)

    def batch_loss(w, logs, rows):
        return softplus(-p.y[rows] * (p.x[rows] @ w)).mean() + (logs.exp() * w.square()).sum() / 2

    w = solve(batch_loss, torch.zeros(4), p.logs, batches=rows, optimizer=SGD(0.5), steps=4).params.detach()
    solver = Neumann(6, step_size=0.4, rtol=None)
    w = implicit(batch_loss, w, p.logs, rows[1], solver=solver, stationarity=None)
    return grad(p.outer(w), p.logs)


@stocbio.answered_by("autograd")
def stocbio_there(p):
    def batch_loss(w, logs, t):
        rows = slice(3 * t, 3 * t + 3)
        return softplus(-p.y[rows] * (p.x[rows] @ w)).mean() + (logs.exp() * w.square()).sum() / 2

    w = loop(lambda w, t: batch_loss(w, p.logs, t), torch.zeros(4).requires_grad_(), 4, lr=0.5)
    w = w.detach().requires_grad_()
    (term,) = grad(p.outer(w), w)
    gradient = torch.autograd.grad(batch_loss(w, p.logs, 1), w, create_graph=True)[0]
    total = 0
    for _ in range(6):
        total = total + 0.4 * term
        term = term - 0.4 * torch.autograd.grad(gradient, w, term, retain_graph=True)[0]
    return [-torch.autograd.grad(gradient, p.logs, total)[0]]


@program("hypertorch", "forward mode for few hyperparameters", Fit)
def forward(p):
    lr, momentum = learned(0.1), learned(0.7)
    found = solve(p.loss, p.params, p.weights, optimizer=SGD(lr, momentum), steps=8, estimator=ForwardMode())
    return grad(p.outer(found.params), lr, momentum)


@forward.answered_by("autograd")
def forward_there(p):
    rule = {"lr": learned(0.1), "momentum": learned(0.7)}
    return grad(p.outer(loop(lambda w, t: p.loss(w, p.weights), p.params, 8, **rule)), list(rule.values()))


@program("hypertorch", "reverse mode from stored states, with momentum (reverse)", Fit)
def stored(p):
    rule = Reverse(1)
    found = solve(p.loss, p.params, p.weights, optimizer=SGD(0.1, momentum=0.9), steps=8, estimator=rule)
    return grad(p.outer(found.params), p.weights)


@stored.answered_by("autograd")
def stored_there(p):
    return grad(p.outer(loop(lambda w, t: p.loss(w, p.weights), p.params, 8, lr=0.1, momentum=0.9)), p.weights)


@program("Betty", "three levels: the outermost learns the step size of the middle one", lambda: Fit(2))
def levels(p):
    lr = learned(0.5)

    def middle(weights, params):
        trained = solve(p.loss, params, weights, optimizer=SGD(0.2), steps=2, estimator=diffopt.estimators.Unrolled())
        return p.outer(trained.params)

    found = solve(middle, p.weights, p.params, optimizer=SGD(lr), steps=2, estimator=diffopt.estimators.Unrolled())
    return grad(found.params.square().sum(), lr, p.params)


@levels.answered_by("autograd")
def levels_there(p):
    lr = learned(0.5)

    def middle(weights, t):
        return p.outer(loop(lambda w, t: p.loss(w, weights), p.params, 2, lr=0.2))

    return grad(loop(middle, p.weights, 2, lr=lr).square().sum(), lr, p.params)


@program("Betty", "learned shares of two losses, by the implicit gradient (Neumann)", Logistic)
def shares(p):
    logits = learned(0.3, -0.4)

    def loss(w, logits):
        first, second = torch.softmax(logits, 0)
        return first * p.loss(w, p.logs.detach()) + second * (p.x @ w - p.y).square().mean()

    w = newton(lambda w: torch.func.grad(loss)(w, logits.detach()), torch.zeros(4))
    return grad(p.outer(implicit(loss, w, logits, solver=Neumann(2000, rtol=1e-12))), logits)


@shares.answered_by("closed form")
def shares_there(p):
    logits = learned(0.3, -0.4)

    def loss(w, logits):
        first, second = torch.softmax(logits, 0)
        return first * p.loss(w, p.logs.detach()) + second * (p.x @ w - p.y).square().mean()

    w = newton(lambda w: torch.func.grad(loss)(w, logits.detach()), torch.zeros(4)).requires_grad_()
    return implicit_function(torch.func.grad(loss), w, logits, *grad(p.outer(w), w))


@program("benchmark_bilevel", "the value's gradient of the public quadratics", Ridge)
def quadratics(p):
    """Inner and outer functions quadratic in both variables; the outer one reads its own directly, too."""
    cross = torch.outer(torch.linspace(1, 2, 4), torch.linspace(-1, 1, 3))

    def inner(z, x):
        return z @ p.gram(p.penalty.detach()) @ z / 2 + z @ cross @ x

    x = learned(0.5, -1.0, 2.0)
    z = implicit(inner, torch.linalg.solve(p.gram(p.penalty.detach()), -cross @ x.detach()), x, solver=Dense())
    return grad((z - 1).square().sum() + x.square().sum(), x)


@quadratics.answered_by("closed form")
def quadratics_there(p):
    cross = torch.outer(torch.linspace(1, 2, 4), torch.linspace(-1, 1, 3))
    x = learned(0.5, -1.0, 2.0)
    z = torch.linalg.solve(p.gram(p.penalty.detach()), -cross @ x)
    return grad((z - 1).square().sum() + x.square().sum(), x)


@program("Betty", "a learned loss: a network of the prediction and the target", Fit)
def learned_loss(p):
    theta = torch.linspace(-1, 1, 8).reshape(4, 2).requires_grad_()

    def loss(params, theta):
        error = p.function(params, p.x) - p.y
        return (softplus(error @ theta[:2]) @ theta[2:]).square().mean() + error.square().mean()

    found = solve(loss, p.params, theta, optimizer=Adam(0.05, eps=1e-3), steps=4)
    return grad(p.outer(found.params), theta)


@learned_loss.answered_by("autograd")
def learned_loss_there(p):
    theta = torch.linspace(-1, 1, 8).reshape(4, 2).requires_grad_()

    def loss(params, t):
        error = p.function(params, p.x) - p.y
        return (softplus(error @ theta[:2]) @ theta[2:]).square().mean() + error.square().mean()

    return grad(p.outer(adam_loop(loss, p.params, 4, lr=0.05, eps=1e-3)), theta)
