"""Optimizers that break their contract, each with the finding that must say so."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

import diffopt
from diffopt import Leaves


@dataclass(frozen=True)
class Descent(diffopt.Optimizer):
    """Gradient descent, in the ways that follow not quite."""

    lr: Any = 0.1

    def init(self, params):
        return {}

    def update(self, params, grads, buffers, step):
        return params - self.lr * grads, buffers


class Ascending(Descent):
    def update(self, params, grads, buffers, step):
        return params + self.lr * grads, buffers


class Detached(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(torch.Tensor.detach), buffers


class DetachedParams(Descent):
    def update(self, params, grads, buffers, step):
        return params.map(torch.Tensor.detach) - self.lr * grads, buffers


class DetachedLr(Descent):
    def update(self, params, grads, buffers, step):
        lr = self.lr.map(torch.Tensor.detach) if isinstance(self.lr, Leaves) else self.lr
        return params - lr * grads, buffers


class InPlace(Descent):
    def update(self, params, grads, buffers, step):
        for x in grads:
            with torch.no_grad():
                x.mul_(1.0)
        return params - self.lr * grads, buffers


COUNTER = itertools.count(1)


class Stateful(Descent):
    def update(self, params, grads, buffers, step):
        return params - (1 + 1 / next(COUNTER)) * (self.lr * grads), buffers


class Noisy(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(lambda x: x + 0.1 * torch.randn(x.shape, dtype=x.dtype)), buffers


class Widening(Descent):
    def update(self, params, grads, buffers, step):
        return (params - self.lr * grads).map(torch.Tensor.double), buffers


class WideningLater(Descent):
    def update(self, params, grads, buffers, step):
        after = params - self.lr * grads
        return (after if step == 1 else after.map(torch.Tensor.double)), buffers


class Halving(Descent):
    def update(self, params, grads, buffers, step):
        rounded = grads.map(lambda x: x.half().to(x.dtype) if x.dtype == torch.float32 else x)
        return params - 5 * self.lr * rounded, buffers


class Norms(Descent):
    """Mixes coordinates, and says it does not."""

    elementwise: ClassVar[bool] = True

    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(lambda x: x / (1 + x.square().sum())), buffers


class Roots(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(lambda x: x / ((x * x).sqrt() + 0.1)), buffers


class Quotients(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(lambda x: x / (x * x).sum().sqrt()), buffers


class NumbersOnly(Descent):
    def update(self, params, grads, buffers, step):
        return params - grads.map(lambda x: (self.lr if isinstance(self.lr, float) else self.lr[0]) * x), buffers


class Growing(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads, {f"gradient{step}": grads}


class GrowingLater(Descent):
    def update(self, params, grads, buffers, step):
        return params - self.lr * grads, buffers if step < 3 else {"late": grads}


class Lists(Descent):
    def update(self, params, grads, buffers, step):
        return [*(params - self.lr * grads)], buffers


class Impure(Descent):
    def init(self, params):
        return {"velocity": params.zeros()}

    def update(self, params, grads, buffers, step):
        for v, g in zip(buffers["velocity"], grads, strict=True):
            with torch.no_grad():
                v.add_(g)
        return params - self.lr * buffers["velocity"], buffers


@dataclass
class Thawed(diffopt.Optimizer):
    lr: Any = 0.1

    def init(self, params):
        return {}

    def update(self, params, grads, buffers, step):
        return params - self.lr * grads, buffers


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


class DetachedEps(AdaBelief):
    def update(self, params, grads, buffers, step):
        eps = self.eps.map(torch.Tensor.detach) if isinstance(self.eps, Leaves) else self.eps
        return AdaBelief(self.lr, eps).update(params, grads, buffers, step)


def torch_sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def torch_dampened(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.5, dampening=0.3)


BROKEN: dict[str, tuple[diffopt.Optimizer, Any, str]] = {
    "wrong sign": (Ascending(), torch_sgd, "the steps of SGD: got"),
    "wrong first step": (Undampened(0.1, 0.5, 0.3), torch_dampened, "check step 1, the first that differs"),
    "detached gradient": (Detached(), None, "target: derivative: got 1.0e+00"),
    "detached params": (DetachedParams(), None, "init0: derivative"),
    "detached step size": (DetachedLr(), None, "lr: derivative: got 1.0e+00"),
    "detached small number": (DetachedEps(0.05, 1e-8), None, "eps: derivative: got 1.0e+00"),
    "detached buffer": (DropsMomentum(), None, "betas[0]: derivative"),
    "in place on gradients": (InPlace(), None, "changes nothing that it is given: got no"),
    "in place on buffers": (Impure(), None, "changes nothing that it is given: got no"),
    "stateful": (Stateful(), None, "repeats itself: got no"),
    "random": (Noisy(), None, "repeats itself: got no"),
    "wrong dtype": (Widening(), None, "dtypes: got OptimizerError, expected no error; "),
    "wrong dtype later": (WideningLater(), None, "float32 stays float32: got {'torch.float64'}"),
    "half precision": (Halving(), None, "float32: the numbers of float64"),
    "mixes tasks": (Norms(), None, "vmap over params: as in a loop"),
    "NaN at a zero coordinate": (Roots(), None, "finite where one coordinate has no gradient: got no"),
    "NaN where nothing has a gradient": (Quotients(), None, "finite where nothing has no gradient: got no"),
    "numbers only": (NumbersOnly(), None, "lr: the same in every form (tree"),
    "new buffers": (Growing(), None, "states that differ in structure"),
    "new buffers later": (GrowingLater(), None, "states that differ in structure from the first: got"),
    "lists": (Lists(), None, "step 1 takes and returns: got {'list'}"),
    "not frozen": (Thawed(), None, "is a frozen dataclass: got no"),
}
