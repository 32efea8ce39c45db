"""Optimizers that break their contract, each beside the finding that must say so."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from stateless import Stateless

import diffopt
from diffopt import Leaves

BROKEN: dict[str, tuple[diffopt.Optimizer, Any, str]] = {}
"""By name: an optimizer, its reference in torch, and the finding that must say what is wrong with it."""


def broken(finding, *args, reference=None):
    """What follows is broken: the class, made with these arguments."""

    def add(kind):
        BROKEN[kind.__name__] = (kind(*args), reference, finding)
        return kind

    return add


def torch_sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def torch_dampened(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.5, dampening=0.3)


@dataclass(frozen=True)
class Descent(Stateless):
    """Gradient descent, in the ways that follow not quite."""

    lr: Any = 0.1

    def update(self, params, grads, buffers, step):
        return params - self.lr * grads, buffers


@broken("the steps of SGD: got", reference=torch_sgd)
class Ascending(Descent):
    def update(self, params, grads, buffers, step):
        return params + self.lr * grads, buffers


@broken("target: derivative: got 1.0e+00")
class Detached(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(torch.Tensor.detach), buffers


@broken("init0: derivative")
class DetachedParams(Descent):
    def update(self, params, grads, buffers, step):
        return params.map(torch.Tensor.detach) - self.lr * grads, buffers


@broken("lr: derivative: got 1.0e+00")
class DetachedLr(Descent):
    def update(self, params, grads, buffers, step):
        lr = self.lr.map(torch.Tensor.detach) if isinstance(self.lr, Leaves) else self.lr
        return params - lr * grads, buffers


@broken("changes nothing that it is given: got no")
class InPlace(Descent):
    def update(self, params, grads, buffers, step):
        for x in grads:
            with torch.no_grad():
                x.mul_(1.0)
        return params - self.lr * grads, buffers


COUNTER = itertools.count(1)


@broken("repeats itself: got no")
class Stateful(Descent):
    def update(self, params, grads, buffers, step):
        return params - (1 + 1 / next(COUNTER)) * (self.lr * grads), buffers


@broken("repeats itself: got no")
class Noisy(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(lambda x: x + 0.1 * torch.randn(x.shape, dtype=x.dtype)), buffers


@broken("dtypes: got OptimizerError, expected no error; ")
class Widening(Descent):
    def update(self, params, grads, buffers, step):
        return (params - self.lr * grads).map(torch.Tensor.double), buffers


@broken("float32 stays float32: got {'torch.float64'}")
class WideningLater(Descent):
    def update(self, params, grads, buffers, step):
        after = params - self.lr * grads
        return (after if step == 1 else after.map(torch.Tensor.double)), buffers


@broken("float32: the numbers of float64")
class Halving(Descent):
    def update(self, params, grads, buffers, step):
        rounded = grads.map(lambda x: x.half().to(x.dtype) if x.dtype == torch.float32 else x)
        return params - 5 * self.lr * rounded, buffers


@broken("vmap over params: as in a loop")
class Norms(Descent):
    """Mixes coordinates, and says it does not."""

    elementwise: ClassVar[bool] = True

    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(lambda x: x / (1 + x.square().sum())), buffers


@broken("finite where one coordinate has no gradient: got no")
class Roots(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(lambda x: x / ((x * x).sqrt() + 0.1)), buffers


@broken("finite where nothing has no gradient: got no")
class Quotients(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(lambda x: x / (x * x).sum().sqrt()), buffers


@broken("lr: the same in every form (tree")
class NumbersOnly(Descent):
    def update(self, params, grads, buffers, step):
        return params - grads.map(lambda x: (self.lr if isinstance(self.lr, float) else self.lr[0]) * x), buffers


@broken("states that differ in structure")
class Growing(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads, {f"gradient{step}": grads}


@broken("states that differ in structure from the first: got")
class GrowingLater(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads, buffers if step < 3 else {"late": grads}


@broken("step 1 takes and returns: got {'list'}")
class Lists(Descent):
    def update(self, params, grads, buffers, step):
        return [*(params - self.lr * grads)], buffers


@broken("changes nothing that it is given: got no")
class Impure(Descent):
    def init(self, params):
        return {"velocity": params.zeros()}

    def update(self, params, grads, buffers, step):
        for v, g in zip(buffers["velocity"], grads, strict=True):
            with torch.no_grad():
                v.add_(g)
        return params - self.lr * buffers["velocity"], buffers


@broken("is a frozen dataclass: got no")
@dataclass
class Thawed(Stateless):
    lr: Any = 0.1

    def update(self, params, grads, buffers, step):
        return params - self.lr * grads, buffers


@broken("check step 1, the first that differs", 0.1, 0.5, 0.3, reference=torch_dampened)
@dataclass(frozen=True)
class Undampened(diffopt.Optimizer):
    """Momentum whose first step lacks the dampening's exception."""

    lr: Any
    momentum: Any
    dampening: Any

    def init(self, params):
        return {"velocity": params.zeros()}

    def update(self, params, grads, buffers, step):
        velocity = self.momentum * buffers["velocity"] + (1 - self.dampening) * grads
        return params - self.lr * velocity, {"velocity": velocity}


@broken("betas[0]: derivative")
@dataclass(frozen=True)
class DropsMomentum(diffopt.Optimizer):
    """The velocity's history gets no derivative, as in torch.optim's differentiable SGD."""

    lr: Any = 0.1
    betas: tuple[Any, Any] = field(default=(0.8, 0.9), metadata=diffopt.optimizers.EACH)

    def init(self, params):
        return {"velocity": params.zeros()}

    def update(self, params, grads, buffers, step):
        velocity = self.betas[0] * buffers["velocity"].map(torch.Tensor.detach) + grads
        return params - self.lr * velocity - 0.001 * self.betas[1] * params, {"velocity": velocity}


@dataclass(frozen=True)
class AdaBelief(diffopt.Optimizer):
    """Not broken: a rule that is smooth in ``eps`` only above zero, so that a small one cannot be moved far."""

    lr: Any
    eps: Any
    elementwise: ClassVar[bool] = True

    def init(self, params):
        return {"mean": params.zeros(), "square": params.zeros()}

    def update(self, params, grads, buffers, step):
        mean = 0.9 * buffers["mean"] + 0.1 * grads
        apart = grads - mean
        square = 0.999 * buffers["square"] + 0.001 * apart * apart + self.eps
        root = (square / (1 - 0.999**step)).sqrt() + self.eps
        return params - self.lr * (mean / (1 - 0.9**step) / root), {"mean": mean, "square": square}


@broken("eps: derivative: got 1.0e+00", 0.05, 1e-8)
class DetachedEps(AdaBelief):
    def update(self, params, grads, buffers, step):
        eps = self.eps.map(torch.Tensor.detach) if isinstance(self.eps, Leaves) else self.eps
        return AdaBelief(self.lr, eps).update(params, grads, buffers, step)
