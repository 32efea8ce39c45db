"""Inner optimizers: their learned hyperparameters, schedules, clipping, and other libraries' own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from oracles import adam_step, rmsprop_step
from programs.problems import Fit, adam_loop, grad, learned, loop
from programs.table import program

import diffopt
from diffopt import EMA, SGD, Adam, AdamW, Clip, Schedule, solve
from diffopt.estimators import Unrolled
from diffopt.optimizers import TREE


@program("higher", "a learned step size and momentum (override)", Fit)
def override(p):
    lr, momentum = learned(0.1), learned(0.8)
    found = solve(p.loss, p.params, p.weights, optimizer=SGD(lr, momentum), steps=5)
    return grad(p.outer(found.params), lr, momentum)


@override.answered_by("higher")
def override_there(p):
    import higher

    lr, momentum = learned(0.1), learned(0.8)
    optimizer = torch.optim.SGD(p.net.parameters(), lr=1.0, momentum=0.5)
    given = {"lr": [lr], "momentum": [momentum]}
    with higher.innerloop_ctx(p.net, optimizer, override=given) as (net, inner):
        for _ in range(5):
            inner.step(p.weighted(net(p.x), p.weights))
        return grad(p.judged(net(p.query_x)), lr, momentum)


@program("higher", "gradients clipped by their norm (grad_callback)", Fit)
def clipped(p):
    found = solve(p.loss, p.params, p.weights, optimizer=Clip(SGD(0.3, 0.9), max_norm=0.5), steps=5)
    return grad(p.outer(found.params), p.weights, p.params)


@clipped.answered_by("higher")
def clipped_there(p):
    import higher

    def clip(grads):
        norm = torch.cat([g.flatten() for g in grads]).norm()
        return [g * torch.clamp(0.5 / (norm + 1e-6), max=1) for g in grads]

    optimizer = torch.optim.SGD(p.net.parameters(), lr=0.3, momentum=0.9)
    with higher.innerloop_ctx(p.net, optimizer, copy_initial_weights=False) as (net, inner):
        for _ in range(5):
            inner.step(p.weighted(net(p.x), p.weights), grad_callback=clip)
        return grad(p.judged(net(p.query_x)), p.weights, list(p.net.parameters()))


@program("higher", "a schedule of step sizes, all learned", Fit)
def schedule(p):
    rates = learned(0.2, 0.15, 0.1, 0.05)
    found = solve(p.loss, p.params, p.weights, optimizer=SGD(Schedule(rates), momentum=0.9), steps=4)
    return grad(p.outer(found.params), rates)


@schedule.answered_by("higher")
def schedule_there(p):
    import higher

    rates, optimizer = learned(0.2, 0.15, 0.1, 0.05), torch.optim.SGD(p.net.parameters(), lr=1.0, momentum=0.9)
    with higher.innerloop_ctx(p.net, optimizer) as (net, inner):
        for t in range(4):
            inner.step(p.weighted(net(p.x), p.weights), override={"lr": [rates[t]]})
        return grad(p.judged(net(p.query_x)), rates)


@program("higher", "AdamW with a learned decay (refused by the peer)", Fit)
def decay(p):
    weight_decay = learned(0.3)
    found = solve(p.loss, p.params, p.weights, optimizer=AdamW(0.05, weight_decay=weight_decay, eps=1e-3), steps=5)
    return grad(p.outer(found.params), weight_decay)


@decay.answered_by("autograd")
def decay_there(p):
    rule = {"lr": 0.05, "weight_decay": learned(0.3), "eps": 1e-3, "decoupled": True}
    return grad(p.outer(adam_loop(lambda w, t: p.loss(w, p.weights), p.params, 5, **rule)), rule["weight_decay"])


@dataclass(frozen=True)
class Learned(diffopt.Optimizer):
    """A small network makes a step of each gradient and of its running mean (a learned optimizer)."""

    theta: Any = field(metadata=TREE)
    elementwise: ClassVar[bool] = False

    def init(self, params):
        return {"mean": 0 * params}

    def update(self, params, grads, buffers, step):
        mean = 0.8 * buffers["mean"] + 0.2 * grads
        return params - grads.map(lambda g, m: move(self.theta, g, m), mean), {"mean": mean}


def move(theta, g, m):
    """The step of a leaf: what the learned optimizer makes of its gradient and mean."""
    return 0.1 * torch.tanh(torch.stack([g, m], -1) @ theta[:2]) @ theta[2]


@program("higher", "a learned optimizer, judged by the sum of all losses (asked for, open)", Fit)
def learned_optimizer(p):
    theta = (torch.randn(3, 2, 2)).requires_grad_()
    found = solve(p.loss, p.params, p.weights, optimizer=Learned(theta[:, :, 0] + theta[:, :, 1]), steps=6)
    return grad(found.losses.sum() + p.loss(found.params, p.weights), theta)


@learned_optimizer.answered_by("autograd")
def learned_optimizer_there(p):
    theta = (torch.randn(3, 2, 2)).requires_grad_()
    losses, net = [], theta[:, :, 0] + theta[:, :, 1]

    def step(w, g, b, t):
        b["mean"] = 0.8 * b.get("mean", 0 * g) + 0.2 * g
        return w - move(net, g, b["mean"])

    end = loop(lambda w, t: p.loss(w, p.weights), p.params, 6, step, lambda w, t, loss: losses.append(loss))
    return grad(sum(losses) + p.loss(end, p.weights), theta)


@program("TorchOpt", "MetaAdam, and the start is learned", Fit)
def meta_adam(p):
    found = solve(p.loss, p.params, p.weights, optimizer=Adam(0.05, eps=1e-2), steps=5)
    return grad(p.outer(found.params), p.weights, p.params)


@meta_adam.answered_by("torchopt")
def meta_adam_there(p):
    import torchopt

    initial = list(p.net.parameters())
    inner = torchopt.MetaAdam(p.net, lr=0.05, eps=1e-2)
    for _ in range(5):
        inner.step(p.weighted(p.net(p.x), p.weights))
    return grad(p.judged(p.net(p.query_x)), p.weights, initial)


@program("TorchOpt", "its own functional RMSprop, taken as it is", Fit)
def functional_pair(p):
    import torchopt

    optimizer = diffopt.from_torchopt(torchopt.rmsprop, lr=0.02, alpha=0.9, eps=1e-2)
    found = solve(p.loss, p.params, p.weights, optimizer=optimizer, steps=4)
    return grad(p.outer(found.params), p.weights, p.params)


@functional_pair.answered_by("torchopt")
def functional_pair_there(p):
    import torchopt

    rule = torchopt.rmsprop(0.02, alpha=0.9, eps=1e-2)
    now, state = tuple(p.params.values()), rule.init(tuple(p.params.values()))
    for _ in range(4):
        value = p.loss(dict(zip(p.params, now, strict=True)), p.weights)
        grads = torch.autograd.grad(value, now, create_graph=True)
        updates, state = rule.update(grads, state, params=now, inplace=False)
        now = torchopt.apply_updates(now, updates, inplace=False)
    return grad(p.outer(dict(zip(p.params, now, strict=True))), p.weights, p.params)


@program("TorchOpt", "a chain of clipping and descent (the peer drops the norm's derivative)", Fit)
def chain(p):
    found = solve(p.loss, p.params, p.weights, optimizer=Clip(SGD(0.2, 0.9), max_norm=0.7), steps=4)
    return grad(p.outer(found.params), p.weights, p.params)


@chain.answered_by("autograd")
def chain_there(p):
    def clip(grads):
        norm = torch.cat([g.flatten() for g in grads]).norm()
        return [g * torch.clamp(0.7 / (norm + 1e-6), max=1) for g in grads]

    end = loop(lambda w, t: p.loss(w, p.weights), p.params, 4, lr=0.2, momentum=0.9, clip=clip)
    return grad(p.outer(end), p.weights, p.params)


@program("TorchOpt", "a step size that decays by a polynomial", Fit)
def polynomial(p):
    rates = [0.1 * (1 - min(t, 10) / 10) ** 2 for t in range(5)]
    found = solve(p.loss, p.params, p.weights, optimizer=SGD(Schedule(rates)), steps=5)
    return grad(p.outer(found.params), p.weights, p.params)


@polynomial.answered_by("torchopt")
def polynomial_there(p):
    import torchopt

    initial = list(p.net.parameters())
    decay = torchopt.schedule.polynomial_schedule(0.1, 0.0, power=2.0, transition_steps=10)
    inner = torchopt.MetaSGD(p.net, lr=decay)
    for _ in range(5):
        inner.step(p.weighted(p.net(p.x), p.weights))
    return grad(p.judged(p.net(p.query_x)), p.weights, initial)


@program("TorchOpt", "the Hessian of the outer loss in the example weights", lambda: Fit(3))
def hessian(p):
    def outer(weights):
        found = solve(p.loss, p.params, weights, optimizer=SGD(0.1), steps=3, estimator=Unrolled())
        return p.outer(found.params)

    return torch.autograd.functional.hessian(outer, p.weights)


@hessian.answered_by("torchopt")
def hessian_there(p):
    import torchopt

    def outer(weights):
        rule = torchopt.sgd(0.1)
        now, state = tuple(p.params.values()), rule.init(tuple(p.params.values()))
        for _ in range(3):
            value = p.loss(dict(zip(p.params, now, strict=True)), weights)
            grads = torch.autograd.grad(value, now, create_graph=True)
            updates, state = rule.update(grads, state, params=now, inplace=False)
            now = torchopt.apply_updates(now, updates, inplace=False)
        return p.outer(dict(zip(p.params, now, strict=True)))

    return torch.autograd.functional.hessian(outer, p.weights)


@program("torch.optim", "NAdam, lifted, with a learned step size", Fit, tolerance=1e-6)
def nadam(p):
    lr = learned(0.05)
    optimizer = diffopt.from_torch(torch.optim.NAdam, lr=lr)
    return grad(p.outer(solve(p.loss, p.params, p.weights, optimizer=optimizer, steps=5).params), lr)


@nadam.answered_by("differences")
def nadam_there(p):
    """The peer cannot: central differences of trainings by ``torch.optim.NAdam`` itself."""
    found = []
    for lr in (0.05 + 1e-5, 0.05 - 1e-5):
        p = Fit()
        optimizer = torch.optim.NAdam(p.net.parameters(), lr=lr)
        for _ in range(5):
            optimizer.zero_grad()
            p.weighted(p.net(p.x), p.weights.detach()).backward()
            optimizer.step()
        found.append(p.judged(p.net(p.query_x)))
    return (found[0] - found[1]) / 2e-5


@program("torch.optim", "RMSprop with a learned smoothing", Fit)
def rmsprop(p):
    alpha = learned(0.9)
    found = solve(p.loss, p.params, p.weights, optimizer=diffopt.RMSprop(0.01, alpha, eps=1e-3), steps=5)
    return grad(p.outer(found.params), alpha)


@rmsprop.answered_by("autograd")
def rmsprop_there(p):
    rule = {"lr": 0.01, "alpha": learned(0.9), "eps": 1e-3}
    return grad(p.outer(loop(lambda w, t: p.loss(w, p.weights), p.params, 5, rmsprop_step, **rule)), rule["alpha"])


@program("torch.optim", "a mean teacher: the average of the iterates is judged", Fit)
def teacher(p):
    decay = learned(0.7)
    found = solve(p.loss, p.params, p.weights, optimizer=EMA(Adam(0.05, eps=1e-3), decay), steps=5)
    return grad(p.outer(found.state.buffers["average"]), decay, p.weights)


@teacher.answered_by("autograd")
def teacher_there(p):
    decay, average = learned(0.7), list(p.params.values())

    def step(w, g, b, t):
        b["average"] = b.get("average", w)
        after = adam_step(w, g, b, t, lr=0.05, eps=1e-3)
        b["average"] = decay * b["average"] + (1 - decay) * after
        return after

    buffers = [{} for _ in average]
    loop(lambda w, t: p.loss(w, p.weights), p.params, 5, step, buffers=buffers)
    average = dict(zip(p.params, [b["average"] for b in buffers], strict=True))
    return grad(p.outer(average), decay, p.weights)
