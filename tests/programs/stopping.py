"""Stopping, and looking on: tolerances, callbacks, what a loss returns besides, curves."""

from __future__ import annotations

import torch
from programs.problems import Fit, Ridge, grad, learned, loop
from programs.table import program
from torch.func import vmap

from diffopt import SGD, solve
from diffopt.estimators import Implicit
from diffopt.linear_solve import ConjugateGradient


@program("jaxopt", "descent until the gradient is small, then implicit (maxiter, tol)", Ridge)
def until_small(p):
    rule = Implicit(ConjugateGradient(rtol=1e-12))
    found = solve(p.loss, torch.zeros(4), p.penalty, optimizer=SGD(0.5), steps=2000, tol=1e-12, estimator=rule)
    return grad(p.outer(found.params), p.penalty)


@until_small.answered_by("closed form")
def until_small_there(p):
    return p.answer()


@program("jaxopt", "descent until the gradient is small, through its steps", Ridge)
def unrolled_until_small(p):
    found = solve(p.loss, torch.zeros(4), p.penalty, optimizer=SGD(0.5), steps=2000, tol=1e-3)
    return grad(p.outer(found.params), p.penalty), found.steps


@unrolled_until_small.answered_by("autograd")
def unrolled_until_small_there(p):
    w, right, steps = torch.zeros(4), p.x.T @ p.y / 12, 0
    while (slope := p.gram(p.penalty) @ w - right).norm() > 1e-3:
        w, steps = w - 0.5 * slope, steps + 1
    return grad(p.outer(w), p.penalty), steps


@program("optimistix", "a solver that did not get there says so (max_steps, throw=False)", Ridge)
def not_there(p):
    found = solve(p.loss, torch.zeros(4), p.penalty, optimizer=SGD(0.5), steps=5, tol=1e-9)
    return found.params, found.steps, float(found.diagnostics["converged"])


@not_there.answered_by("closed form")
def not_there_there(p):
    """Descent on a quadratic is a power of a matrix."""
    end = p.minimiser(p.penalty)
    return end - torch.matrix_power(torch.eye(4) - 0.5 * p.gram(p.penalty), 5) @ end, 5, 0


@program("optimistix", "residuals beside the loss, of every step (has_aux)", Ridge)
def residuals(p):
    def loss(w, penalty):
        residual = p.x @ w - p.y
        return residual.square().mean() / 2 + (penalty * w.square()).sum() / 2, residual.abs().max()

    found = solve(loss, torch.zeros(4), p.penalty, optimizer=SGD(0.5), steps=4, has_aux=True)
    return grad(p.outer(found.params), p.penalty), found.aux


@residuals.answered_by("autograd")
def residuals_there(p):
    largest = [p.y.abs().max()]
    end = loop(
        lambda w, t: p.loss(w, p.penalty),
        torch.zeros(4).requires_grad_(),
        4,
        each=lambda w, t, _: largest.append((p.x @ w - p.y).abs().max()),
        lr=0.5,
    )
    return grad(p.outer(end), p.penalty), largest[:4]


@program("theseus", "a callback ends the steps (end_iter_callback)", Fit)
def callback(p):
    told = []

    def on_step(step, loss):
        told.append(loss)
        return step > 1 and told[-2] - told[-1] < 0.15

    found = solve(p.loss, p.params, p.weights, optimizer=SGD(0.05), steps=50, on_step=on_step)
    return grad(p.outer(found.params), p.weights), told


@callback.answered_by("autograd")
def callback_there(p):
    w, losses = p.params, []
    while len(losses) < 2 or losses[-2] - losses[-1] >= 0.15:
        w = loop(lambda w, t: p.loss(w, p.weights), w, 1, each=lambda w, t, x: losses.append(x.detach()), lr=0.05)
    assert 2 < len(losses) < 20
    return grad(p.outer(w), p.weights), losses


@program("higher", "the best of the steps by another loss (early stopping)", Fit)
def best(p):
    def plain(params, weights):
        return p.loss(params, 1.0)

    found = solve(p.loss, p.params, p.weights, optimizer=SGD(0.05, momentum=0.9), steps=12, observe=plain)
    return grad(found.observed.min(), p.weights, p.params)


@best.answered_by("higher")
def best_there(p):
    import higher

    seen, optimizer = [], torch.optim.SGD(p.net.parameters(), lr=0.05, momentum=0.9)
    with higher.innerloop_ctx(p.net, optimizer, copy_initial_weights=False) as (net, inner):
        for _ in range(12):
            inner.step(p.weighted(net(p.x), p.weights))
            seen.append(p.weighted(net(p.x), 1.0))
        assert 1 < int(torch.stack(seen).argmin()) < 11
        return grad(torch.stack(seen).min(), p.weights, list(p.net.parameters()))


@program("higher", "a different batch in every step", Fit)
def batches(p):
    found = solve(p.batch_loss, p.params, batches=p.batches, optimizer=SGD(0.1, momentum=0.9), steps=5)
    return grad(p.outer(found.params), p.params)


@batches.answered_by("higher")
def batches_there(p):
    import higher

    optimizer = torch.optim.SGD(p.net.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(p.net, optimizer, copy_initial_weights=False) as (net, inner):
        for x, y in zip(p.batches["x"], p.batches["y"], strict=True):
            inner.step((net(x) - y).square().mean())
        return grad(p.judged(net(p.query_x)), list(p.net.parameters()))


@program("jaxopt", "several problems stop together, when the last has got there (vmap, tol)", Ridge)
def together(p):
    factors = torch.tensor([1.0, 2.0, 0.5])

    def one(factor, penalty):
        return solve(p.loss, torch.zeros(4), factor * penalty, optimizer=SGD(0.4), steps=500, tol=1e-2)

    found = vmap(lambda *x: torch.stack([p.outer(one(*x).params), one(*x).losses.sum()]), (0, None))
    return grad(found(factors, p.penalty).sum(), p.penalty)


@together.answered_by("autograd")
def together_there(p):
    total, right = 0, p.x.T @ p.y / 12
    for factor in (1.0, 2.0, 0.5):
        w, penalty = torch.zeros(4), p.penalty
        gram = p.gram(factor * penalty)
        for _ in range(longest(p, right)):
            total = total + p.loss(w, factor * penalty)
            w = w - 0.4 * (gram @ w - right)
        total = total + p.outer(w)
    return grad(total, p.penalty)


def longest(p, right):
    """How many steps the slowest problem takes."""
    found = []
    for factor in (1.0, 2.0, 0.5):
        w, gram, steps = torch.zeros(4), p.gram(factor * p.penalty.detach()), 0
        while (slope := gram @ w - right).norm() > 1e-2:
            w, steps = w - 0.4 * slope, steps + 1
        found.append(steps)
    assert len(set(found)) > 1
    return max(found)


@program("TorchOpt", "the inner losses in the outer loss (meta-learned speed)", Fit)
def speed(p):
    lr = learned(0.05)
    found = solve(p.loss, p.params, p.weights, optimizer=SGD(lr), steps=6)
    return grad(found.losses.mean() + p.outer(found.params), lr, p.params)


@speed.answered_by("torchopt")
def speed_there(p):
    import torchopt

    lr, initial, losses = learned(0.05), list(p.net.parameters()), []
    inner = torchopt.MetaSGD(p.net, lr=lr)
    for _ in range(6):
        losses.append(p.weighted(p.net(p.x), p.weights))
        inner.step(losses[-1])
    return grad(sum(losses) / 6 + p.judged(p.net(p.query_x)), lr, initial)
