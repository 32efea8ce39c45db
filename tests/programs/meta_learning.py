"""Few-shot and meta-learning: a learned start, learned step sizes, statistics and losses on the way."""

from __future__ import annotations

import torch
from programs.problems import Fit, Params, adam_loop, grad, learned, loop
from programs.table import program
from torch import Tensor, nn
from torch.func import vmap

import diffopt
from diffopt import SGD, Adam, Groups, Preconditioned, solve
from diffopt.estimators import FirstOrder, Reptile


@program("higher", "a start and example weights through five steps with momentum", Fit)
def start(p):
    found = solve(p.loss, p.params, p.weights, optimizer=SGD(0.1, momentum=0.9), steps=5)
    return grad(p.outer(found.params), p.weights, p.params)


@start.answered_by("higher")
def start_there(p):
    import higher

    optimizer = torch.optim.SGD(p.net.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(p.net, optimizer, copy_initial_weights=False) as (net, inner):
        for _ in range(5):
            inner.step(p.weighted(net(p.x), p.weights))
        return grad(p.judged(net(p.query_x)), p.weights, list(p.net.parameters()))


@program("higher", "multi-step loss: the query loss after every step, weighted", Fit)
def multi_step(p):
    found = solve(
        p.loss, p.params, p.weights, optimizer=SGD(0.1), steps=5, observe=lambda params, weights: p.outer(params)
    )
    return grad((torch.arange(1.0, 6.0) * found.observed).sum(), p.weights, p.params)


@multi_step.answered_by("higher")
def multi_step_there(p):
    import higher

    total = 0
    optimizer = torch.optim.SGD(p.net.parameters(), lr=0.1)
    with higher.innerloop_ctx(p.net, optimizer, copy_initial_weights=False) as (net, inner):
        for i in range(5):
            inner.step(p.weighted(net(p.x), p.weights))
            total = total + (i + 1) * p.judged(net(p.query_x))
        return grad(total, p.weights, list(p.net.parameters()))


@program("higher", "step sizes of two layers, learned (parameter groups, override)", Fit)
def groups(p):
    first, second = learned(0.1), learned(0.03)
    found = solve(p.loss, p.params, p.weights, optimizer=Groups({"0": SGD(first), "2": SGD(second)}), steps=4)
    return grad(p.outer(found.params), first, second)


@groups.answered_by("higher")
def groups_there(p):
    import higher

    rates = [learned(0.1), learned(0.03)]
    optimizer = torch.optim.SGD([{"params": p.net[0].parameters()}, {"params": p.net[2].parameters()}], lr=1.0)
    with higher.innerloop_ctx(p.net, optimizer, override={"lr": rates}) as (net, inner):
        for _ in range(4):
            inner.step(p.weighted(net(p.x), p.weights))
        return grad(p.judged(net(p.query_x)), rates)


@program("higher", "first order: a gradient where the peer's users find None", Fit)
def first_order(p):
    found = solve(p.loss, p.params, p.weights, optimizer=SGD(0.1), steps=5, estimator=FirstOrder())
    return grad(p.outer(found.params), p.params)


@first_order.answered_by("higher")
def first_order_there(p):
    import higher

    optimizer = torch.optim.SGD(p.net.parameters(), lr=0.1)
    with higher.innerloop_ctx(p.net, optimizer, track_higher_grads=False) as (net, inner):
        for _ in range(5):
            inner.step(p.weighted(net(p.x), p.weights))
        end = [x.detach().requires_grad_() for x in net.parameters()]
        return grad(p.judged(net(p.query_x, params=end)), end)


@program("higher", "the head alone is adapted, of a network with a frozen body", Fit)
def frozen(p):
    p.net[0].requires_grad_(False)
    p.function, head = diffopt.functional(p.net)
    found = solve(p.loss, head, p.weights, optimizer=SGD(0.1, momentum=0.5), steps=5)
    return grad(p.outer(found.params), p.weights, head)


@frozen.answered_by("higher")
def frozen_there(p):
    import higher

    p.net[0].requires_grad_(False)
    optimizer = torch.optim.SGD(p.net[2].parameters(), lr=0.1, momentum=0.5)
    with higher.innerloop_ctx(p.net, optimizer, copy_initial_weights=False) as (net, inner):
        for _ in range(5):
            inner.step(p.weighted(net(p.x), p.weights))
        return grad(p.judged(net(p.query_x)), p.weights, list(p.net[2].parameters()))


def tied() -> Fit:
    """The same with one matrix in two layers."""
    p = Fit()
    p.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    p.net[2].weight = p.net[0].weight
    p.function, p.params = diffopt.functional(p.net)
    return p


@program("higher", "tied weights move together and are one in the gradient", tied)
def shared(p):
    found = solve(p.loss, p.params, p.weights, optimizer=SGD(0.2), steps=4)
    return grad(p.outer(found.params), p.params, p.weights)


@shared.answered_by("higher")
def shared_there(p):
    import higher

    optimizer = torch.optim.SGD(p.net.parameters(), lr=0.2)
    with higher.innerloop_ctx(p.net, optimizer, copy_initial_weights=False) as (net, inner):
        for _ in range(4):
            inner.step(p.weighted(net(p.x), p.weights))
        return grad(p.judged(net(p.query_x)), list(p.net.parameters()), p.weights)


class Tasks(Fit):
    """Four tasks for one network."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = torch.randn(4, 6, 3), torch.randn(4, 6, 2), torch.randn(4, 5, 3), torch.randn(4, 5, 2)

    def squares(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a task."""
        return (self.function(params, x) - y).square().mean()

    def by_loop(self, adapt):
        """The mean query loss, one task after the other; ``adapt(loss)`` gives a task's parameters."""
        losses = [self.squares(adapt(lambda w, t, x=x, y=y: self.squares(w, x, y)), a, b) for x, y, a, b in self.each()]
        return sum(losses) / len(losses)

    def each(self):
        """The tasks, one by one."""
        return list(zip(*self.tasks, strict=True))


@program("learn2learn", "MAML over a batch of tasks", Tasks)
def maml(p):
    def task(params, x, y, query_x, query_y):
        adapted = solve(p.squares, params, x, y, optimizer=SGD(0.1), steps=5).params
        return p.squares(adapted, query_x, query_y)

    return grad(vmap(task, (None, 0, 0, 0, 0))(p.params, *p.tasks).mean(), p.params)


@maml.answered_by("autograd")
def maml_there(p):
    return grad(p.by_loop(lambda loss: loop(loss, p.params, 5, lr=0.1)), p.params)


@program("learn2learn", "Meta-SGD: a learned step size for every weight", Tasks)
def meta_sgd(p):
    rates = {name: torch.full_like(value, 0.1, requires_grad=True) for name, value in p.params.items()}

    def task(params, rates, x, y, query_x, query_y):
        adapted = solve(p.squares, params, x, y, optimizer=SGD(rates), steps=3).params
        return p.squares(adapted, query_x, query_y)

    return grad(vmap(task, (None, None, 0, 0, 0, 0))(p.params, rates, *p.tasks).mean(), p.params, rates)


@meta_sgd.answered_by("autograd")
def meta_sgd_there(p):
    rates = [torch.full_like(value, 0.1, requires_grad=True) for value in p.params.values()]
    return grad(p.by_loop(lambda loss: loop(loss, p.params, 3, lr=lambda i, t: rates[i])), p.params, rates)


@program("learn2learn", "ANIL: the head is adapted, head and body are learned", Tasks)
def anil(p):
    def loss(head, body, x, y):
        return p.squares({**body, **head}, x, y)

    def task(head, body, x, y, query_x, query_y):
        return loss(solve(loss, head, body, x, y, optimizer=SGD(0.1), steps=5).params, body, query_x, query_y)

    body, head = ({k: v for k, v in p.params.items() if k.startswith(layer)} for layer in "02")
    return grad(vmap(task, (None, None, 0, 0, 0, 0))(head, body, *p.tasks).mean(), body, head)


@anil.answered_by("autograd")
def anil_there(p):
    body, head = ({k: v for k, v in p.params.items() if k.startswith(layer)} for layer in "02")

    def adapt(loss):
        return {**body, **loop(lambda w, t: loss({**body, **w}, t), head, 5, lr=0.1)}

    return grad(p.by_loop(adapt), body, head)


@program("learn2learn", "Adam within MAML, whose loss counts every step (asked for, open)", Tasks)
def maml_adam(p):
    weights = torch.tensor([0.2, 0.3, 0.5])

    def loss(params, support, query):
        return p.squares(params, *support)

    def query_loss(params, support, query):
        return p.squares(params, *query)

    def task(params, support, query):
        adam = Adam(0.05, eps=1e-3)
        found = solve(loss, params, support, query, optimizer=adam, steps=3, observe=query_loss)
        return (weights * found.observed).sum()

    return grad(vmap(task, (None, 0, 0))(p.params, p.tasks[:2], p.tasks[2:]).mean(), p.params)


@maml_adam.answered_by("autograd")
def maml_adam_there(p):
    total, weights = 0, (0.2, 0.3, 0.5)
    for x, y, a, b in p.each():
        seen = []
        adam_loop(
            lambda w, t, x=x, y=y: p.squares(w, x, y),
            p.params,
            3,
            lr=0.05,
            eps=1e-3,
            each=lambda w, t, _, a=a, b=b, seen=seen: seen.append(p.squares(w, a, b)),
        )
        total = total + sum(w * loss for w, loss in zip(weights, seen, strict=True)) / 4
    return grad(total, p.params)


@program("learn2learn", "a learned matrix that transforms the gradient (meta-curvature)", Fit)
def curvature(p):
    matrices = {k: (torch.eye(len(v)) + 0.1).requires_grad_() for k, v in p.params.items()}
    factors = {k: (m, None) if p.params[k].ndim == 2 else (m,) for k, m in matrices.items()}
    found = solve(p.loss, p.params, p.weights, optimizer=Preconditioned(0.1, factors=factors), steps=3)
    return grad(p.outer(found.params), matrices)


@curvature.answered_by("autograd")
def curvature_there(p):
    matrices = [(torch.eye(len(v)) + 0.1).requires_grad_() for v in p.params.values()]

    def transformed(grads):
        return [m @ g for m, g in zip(matrices, grads, strict=True)]

    return grad(p.outer(loop(lambda w, t: p.loss(w, p.weights), p.params, 3, lr=0.1, clip=transformed)), matrices)


@program("learn2learn", "Reptile: towards the adapted parameters", Fit)
def reptile(p):
    found = solve(p.loss, p.params, p.weights, optimizer=SGD(0.1), steps=5, estimator=Reptile())
    return grad(sum(value.sum() for value in found.params.values()), p.params)


@reptile.answered_by("closed form")
def reptile_there(p):
    end = loop(lambda params, t: p.loss(params, p.weights), p.params, 5, lr=0.1)
    return [a - b for a, b in zip(p.params.values(), end.values(), strict=True)]
