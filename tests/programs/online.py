"""Going on: live optimizers, windows of a long training, lookaheads, statistics that are carried along."""

from __future__ import annotations

import torch
from oracles import sgd_step
from programs.problems import Fit, adam_loop, grad, learned, loop
from programs.table import program
from torch import nn

from diffopt import SGD, Adam, Schedule, solve, state_of


class Live(Fit):
    """The same in training: three steps of ``torch.optim`` have been made."""

    def __init__(self, kind: type = torch.optim.SGD, **options) -> None:
        super().__init__()
        self.params = dict(self.net.named_parameters())
        self.training = kind(self.net.parameters(), **(options or {"lr": 0.1, "momentum": 0.9}))
        for _ in range(3):
            self.train()

    def train(self, weights=1.0):
        """One more step of the training."""
        self.training.zero_grad()
        self.weighted(self.net(self.x), weights).backward()
        self.training.step()

    def buffers(self, **names):
        """The optimizer's buffers, for the loops."""
        return [{ours: self.training.state[q][name] for ours, name in names.items()} for q in self.params.values()]


@program("higher", "lookahead from a live optimizer, its momentum included", Live)
def ahead(p):
    state = state_of(p.training, p.params)
    found = solve(p.loss, state, p.weights, optimizer=SGD(0.1, momentum=0.9), steps=2)
    return grad(p.outer(found.params), p.weights)


@ahead.answered_by("higher")
def ahead_there(p):
    import higher

    with higher.innerloop_ctx(p.net, p.training) as (net, inner):
        for _ in range(2):
            inner.step(p.weighted(net(p.x), p.weights))
        return grad(p.judged(net(p.query_x)), p.weights)


def adam() -> Live:
    """In training by Adam."""
    return Live(torch.optim.Adam, lr=0.05, eps=1e-3)


@program("torch.optim", "Adam looks two steps ahead, each step with a learned step size", adam)
def adam_ahead(p):
    rates = torch.full((5,), 0.05, requires_grad=True)  # by the number of the step; the first three are history
    state = state_of(p.training, p.params)
    found = solve(p.loss, state, p.weights, optimizer=Adam(Schedule(rates), eps=1e-3), steps=2)
    return grad(p.outer(found.params), rates, p.weights)


@adam_ahead.answered_by("autograd")
def adam_ahead_there(p):
    rates = torch.full((5,), 0.05, requires_grad=True)
    end = adam_loop(
        lambda w, t: p.loss(w, p.weights),
        p.params,
        2,
        start=3,
        buffers=p.buffers(m="exp_avg", s="exp_avg_sq"),
        lr=lambda i, t: rates[t],
        eps=1e-3,
    )
    return grad(p.outer(end), rates, p.weights)


@program("torch.optim", "inner steps are written back, and the training goes on from them", adam)
def written_back(p):
    found = solve(p.loss, state_of(p.training, p.params), torch.ones(6), optimizer=Adam(0.05, eps=1e-3), steps=4)
    found.state.into(p.training)
    p.train()
    return list(p.params.values())


@written_back.answered_by("torch.optim")
def written_back_there(p):
    for _ in range(5):
        p.train()
    return list(p.params.values())


@program("torch.optim", "hypergradient descent: the step size learns while the training runs", Fit)
def hypergradient_descent(p):
    lr, state = learned(0.05), p.params
    for _ in range(6):
        found = solve(p.loss, state, p.weights.detach(), optimizer=SGD(lr), steps=1)
        (slope,) = grad(p.loss(found.params, p.weights.detach()), lr)
        lr, state = (lr - 0.002 * slope).detach().requires_grad_(), found.state.detach()
    return lr, list(state.params.values())


@hypergradient_descent.answered_by("closed form")
def hypergradient_descent_there(p):
    """The derivative is minus the product of two gradients in a row."""
    lr, w = torch.tensor(0.05), list(p.params.values())

    def gradient(w):
        return grad(p.loss(dict(zip(p.params, w, strict=True)), p.weights.detach()), w)

    before = gradient(w)
    for _ in range(6):
        w = [(x - lr * g).detach().requires_grad_() for x, g in zip(w, before, strict=True)]
        after = gradient(w)
        lr = lr + 0.002 * sum((a * b).sum() for a, b in zip(after, before, strict=True))
        before = after
    return lr, w


class WeightNet(Live):
    """A network gives each example its weight, of its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.linspace(-1, 1, 9).reshape(3, 3).requires_grad_()

    def weighed(self, params, theta):
        """The mean loss, each weighed by the network."""
        losses = (self.function(params, self.x) - self.y).square().mean(1)
        weights = (torch.tanh(losses.detach()[:, None] * theta[0] + theta[1]) @ theta[2]).sigmoid()
        return (weights * losses).mean()


@program("Betty", "Meta-Weight-Net: one step ahead of the live training", WeightNet)
def weight_net(p):
    found = solve(p.weighed, state_of(p.training, p.params), p.theta, optimizer=SGD(0.1, momentum=0.9), steps=1)
    return grad(p.outer(found.params), p.theta)


@weight_net.answered_by("autograd")
def weight_net_there(p):
    end = loop(
        lambda w, t: p.weighed(w, p.theta),
        p.params,
        1,
        start=3,
        buffers=p.buffers(v="momentum_buffer"),
        lr=0.1,
        momentum=0.9,
    )
    return grad(p.outer(end), p.theta)


class Search(Live):
    """A mixture of three activations in one layer; its shares are searched for."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = learned(0.1, -0.2, 0.3)

    def mixed(self, params, shares):
        """The loss of the mixture."""
        hidden = self.x @ params["0.weight"].T + params["0.bias"]
        mixed = torch.stack([hidden.tanh(), hidden.sin(), hidden.sigmoid()], -1) @ shares.softmax(0)
        return (mixed @ params["2.weight"].T + params["2.bias"] - self.y).square().mean()

    def outer(self, params, shares):
        """On other examples: it reads the shares directly, too."""
        self.x, self.y, kept = self.query_x, self.query_y, (self.x, self.y)
        loss = self.mixed(params, shares)
        self.x, self.y = kept
        return loss


@program("Betty", "DARTS, second order: training and shares step in turn, both go on", Search)
def darts(p):
    state, shares = state_of(p.training, p.params), p.shares
    optimizer = SGD(0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        ahead = solve(p.mixed, state, shares, optimizer=optimizer, steps=1)
        (slope,) = grad(p.outer(ahead.params, shares), shares)
        shares = (shares - 0.5 * slope).detach().requires_grad_()
        state = solve(p.mixed, state, shares.detach(), optimizer=optimizer, steps=1).state.detach()
    return shares, list(state.params.values())


@darts.answered_by("autograd")
def darts_there(p):
    rule = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    w, shares, buffers = p.params, p.shares, p.buffers(v="momentum_buffer")
    for t in range(4):
        copies = [dict(b) for b in buffers]
        ahead = loop(lambda w, t: p.mixed(w, shares), w, 1, start=t + 3, buffers=copies, **rule)  # noqa: B023
        (slope,) = grad(p.outer(ahead, shares), shares)
        shares = (shares - 0.5 * slope).detach().requires_grad_()
        w = loop(lambda w, t: p.mixed(w, shares.detach()), w, 1, start=t + 3, buffers=buffers, **rule)  # noqa: B023
        w = {name: x.detach().requires_grad_() for name, x in w.items()}
        buffers = [{"v": b["v"].detach()} for b in buffers]
    return shares, list(w.values())


@program("higher", "windows of three steps, cut by detach, with the momentum kept", Fit)
def windows(p):
    state, total, optimizer = p.params, 0, SGD(0.1, momentum=0.9)
    for _ in range(3):
        found = solve(p.loss, state, p.weights, optimizer=optimizer, steps=3)
        total, state = total + p.outer(found.params), found.state.detach()
    return grad(total, p.weights)


@windows.answered_by("higher")
def windows_there(p):
    import higher

    total, optimizer = 0, torch.optim.SGD(p.net.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(p.net, optimizer) as (net, inner):
        for _ in range(3):
            for _ in range(3):
                inner.step(p.weighted(net(p.x), p.weights))
            total = total + p.judged(net(p.query_x))
            net.update_params([x.detach().requires_grad_() for x in net.parameters()])
            for buffers in inner.state[0].values():
                buffers["momentum_buffer"] = buffers["momentum_buffer"].detach()
        return grad(total, p.weights)


@program("TorchOpt", "one training, two futures of it (extract and recover the state)", Fit)
def futures(p):
    common = solve(p.loss, p.params, p.weights, optimizer=Adam(0.05, eps=1e-2), steps=2).state
    ends = [solve(p.loss, common, f * p.weights, optimizer=Adam(0.05, eps=1e-2), steps=2).params for f in (1, 3)]
    return grad(p.outer(ends[0]) - p.outer(ends[1]), p.weights, p.params)


@futures.answered_by("torchopt")
def futures_there(p):
    import torchopt

    initial, ends = list(p.net.parameters()), []
    inner = torchopt.MetaAdam(p.net, lr=0.05, eps=1e-2)
    for _ in range(2):
        inner.step(p.weighted(p.net(p.x), p.weights))
    net, state = torchopt.extract_state_dict(p.net), torchopt.extract_state_dict(inner)
    for factor in (1, 3):
        torchopt.recover_state_dict(p.net, net)
        torchopt.recover_state_dict(inner, state)
        for _ in range(2):
            inner.step(p.weighted(p.net(p.x), factor * p.weights))
        ends.append(p.judged(p.net(p.query_x)))
    return grad(ends[0] - ends[1], p.weights, initial)


class Normed(Fit):
    """A network with batch norm, whose statistics are kept for each step and used at the end (MAML++)."""

    def __init__(self) -> None:
        super().__init__()
        self.params = {
            "in": torch.randn(4, 3).requires_grad_(),
            "scale": (1 + 0.1 * torch.randn(4)).requires_grad_(),
            "out": torch.randn(2, 4).requires_grad_(),
        }

    def forward(self, params, x, statistics):
        """The prediction by these statistics, and those of the batch mixed in."""
        hidden = x @ params["in"].T
        now = torch.stack([hidden.mean(0), hidden.var(0)]).detach()
        mean, var = statistics = 0.7 * statistics + 0.3 * now
        normed = (hidden - mean) / (var + 0.1).sqrt() * params["scale"]
        return torch.tanh(normed) @ params["out"].T, statistics

    def with_statistics(self, params, statistics):
        """The inner loss, and the statistics that it leaves."""
        out, statistics = self.forward(params, self.x, statistics)
        return (out - self.y).square().mean(), statistics

    def outer(self, params, statistics):
        """The query loss by the statistics that were left."""
        return self.judged(self.forward(params, self.query_x, statistics)[0])


@program("learn2learn", "batch-norm statistics as inner state: one-step solves that go on", Normed)
def statistics(p):
    state, statistics = p.params, torch.tensor([[0.0], [1.0]]).expand(2, 4)
    for _ in range(5):
        found = solve(p.with_statistics, state, statistics, optimizer=SGD(0.2, momentum=0.9), steps=1, has_aux=True)
        state, statistics = found.state, found.aux[0]
    return grad(p.outer(state.params, statistics), p.params)


@statistics.answered_by("autograd")
def statistics_there(p):
    kept = [torch.tensor([[0.0], [1.0]]).expand(2, 4)]

    def loss(w, t):
        value, left = p.with_statistics(w, kept[-1])
        kept.append(left)
        return value

    return grad(p.outer(loop(loss, p.params, 5, lr=0.2, momentum=0.9), kept[-1]), p.params)


@program("higher", "the running statistics of torch's batch norm, after the inner loop", Fit)
def running(p):
    """The layer's buffers are arguments, and what it writes into a copy of them comes back as ``aux``."""
    net, state = normed(), None
    params, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(params, buffers):
        fresh = {name: value.clone() for name, value in buffers.items()}
        out = torch.func.functional_call(net, {**params, **fresh}, (p.x,))
        return (out - p.y).square().mean(), fresh

    for _ in range(3):
        found = solve(loss, state or params, buffers, optimizer=SGD(0.1, momentum=0.9), steps=1, has_aux=True)
        state, buffers = found.state, {name: value[0] for name, value in found.aux.items()}
    out = torch.func.functional_call(net.eval(), {**state.params, **buffers}, (p.query_x,))
    return grad(p.judged(out), params), buffers


def normed() -> nn.Module:
    """With batch norm."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


@running.answered_by("autograd")
def running_there(p):
    net = normed()
    params, buffers = dict(net.named_parameters()), {k: v.clone() for k, v in net.named_buffers()}

    def loss(w, t):
        return (torch.func.functional_call(net, {**w, **buffers}, (p.x,)) - p.y).square().mean()

    end = loop(loss, params, 3, sgd_step, lr=0.1, momentum=0.9)
    out = torch.func.functional_call(net.eval(), {**end, **buffers}, (p.query_x,))
    return grad(p.judged(out), params), buffers


@program("TorchOpt", "a chain of solves that never starts anew, and all of its losses", Fit)
def chain(p):
    state, losses = p.params, []
    for steps in (2, 1, 4):
        found = solve(p.loss, state, p.weights, optimizer=Adam(0.05, eps=1e-2), steps=steps)
        state, losses = found.state, [*losses, found.losses]
    return grad(p.outer(state.params) + torch.cat(losses).prod(), p.weights, p.params)


@chain.answered_by("torchopt")
def chain_there(p):
    import torchopt

    initial, losses = list(p.net.parameters()), []
    inner = torchopt.MetaAdam(p.net, lr=0.05, eps=1e-2)
    for _ in range(7):
        losses.append(p.weighted(p.net(p.x), p.weights))
        inner.step(losses[-1])
    return grad(p.judged(p.net(p.query_x)) + torch.stack(losses).prod(), p.weights, initial)
