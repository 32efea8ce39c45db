"""``check_optimizer`` on optimizers of optimizers: what is right passes, and what is broken within is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from stateless import Stateless

import diffopt
from diffopt import EMA, SGD, Adam, Clip, Groups, Lookahead, Muon, Proximal
from diffopt.prox import L1, Box, GroupL1, L2Ball, Prox, Simplex
from diffopt.testing import check_optimizer


def params(**shapes: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


RIGHT = [
    (Clip(SGD(0.05, 0.9, weight_decay=0.1), max_norm=2.0), None),
    (Clip(Adam(0.05, eps=0.05), value=1.3), None),
    (Groups({"a": SGD(0.05, 0.5), "b": Adam(0.05, eps=0.05), "c": Clip(SGD(0.1), max_norm=0.4)}), None),
    (Groups(lambda path: "x" if path == "a" else "y", {"x": Muon(0.05, momentum=0.8), "y": SGD(0.05, 0.5)}), None),
    (Proximal(Groups({"a": SGD(0.05, 0.5), "b": SGD(0.1), "c": SGD(0.05)}), L1(0.7)), None),
    (Proximal(SGD(0.05, 0.5), Box(-0.4, 0.6)), None),
    (Proximal(SGD(0.05), GroupL1(0.7, 0)), params(a=(2, 3), b=(3,))),
    (Proximal(SGD(0.05), Simplex()), params(a=(2, 3), b=(3,))),
    (Proximal(SGD(0.05), L2Ball(1.0)), None),
    (EMA(Lookahead(Clip(SGD(0.05, 0.5), value=1.3), 2, 0.4), 0.7), None),
    (Muon(0.05, momentum=0.8), params(a=(2, 3), b=(3, 2), c=(1, 2))),
]


@pytest.mark.parametrize(("optimizer", "own"), RIGHT, ids=lambda x: type(x).__name__)
def test_those_of_the_library_pass(optimizer, own):
    assert check_optimizer(optimizer, params=own).broken == ()


def test_every_number_within_is_looked_at():
    report = check_optimizer(Clip(Groups({"a": SGD(0.05, 0.5), "b": SGD(0.1), "c": SGD(0.1)}), max_norm=2.0))
    named = {finding.claim.removesuffix(": derivative") for finding in report.findings}
    assert {"max_norm", "optimizer.optimizers['a'].lr", "optimizer.optimizers['a'].momentum"} <= named
    assert {"optimizer.optimizers['c'].weight_decay"} <= named


@dataclass(frozen=True)
class Outer(diffopt.Optimizer):
    """Holds one that may be broken."""

    optimizer: diffopt.Optimizer
    elementwise = True

    def init(self, params):
        return self.optimizer.init(params)

    def update(self, params, grads, buffers, step):
        return self.optimizer.update(params, grads, buffers, step)


@dataclass(frozen=True)
class Cut(Stateless):
    """Forgets the derivative in its rate."""

    lr: Any
    elementwise = True

    def update(self, params, grads, buffers, step):
        rate = self.lr if isinstance(self.lr, float) else self.lr.map(torch.Tensor.detach)
        return params - rate * grads, buffers


@dataclass(frozen=True)
class Mixing(Stateless):
    """Claims to be elementwise, and divides by a norm."""

    lr: Any
    elementwise = True

    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(lambda g: g / (1 + g.square().sum())), buffers


@dataclass(frozen=True)
class Rounded(Prox):
    """A prox whose strength is a number."""

    strength: Any
    elementwise = True

    def apply(self, params, step_size):
        shrink = self.strength if isinstance(self.strength, float) else float(self.strength[0].detach())
        return params / (1 + step_size * shrink)


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (Outer(Cut(0.1)), r"optimizer\.lr: derivative"),
        (EMA(Outer(Cut(0.1)), 0.5), r"optimizer\.optimizer\.lr: derivative"),
        (Groups({"a": Cut(0.1), "b": SGD(0.1), "c": SGD(0.1)}), r"optimizers\['a'\]\.lr: derivative"),
        (Outer(Mixing(0.1)), "vmap over params: as in a loop"),
        (Proximal(SGD(0.1), Rounded(0.5)), r"prox\.strength: derivative"),
    ],
    ids=str,
)
def test_what_is_broken_within_is_named(optimizer, match):
    with pytest.raises(diffopt.ConformanceError, match=match):
        check_optimizer(optimizer)
