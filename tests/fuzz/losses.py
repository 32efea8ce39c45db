"""A grammar of losses: expressions over the parameters, the arguments and a batch, as vectors of one length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt.estimators import Unrolled

Expression = tuple[Any, ...]


@dataclass
class Scope:
    """What an expression can read: the parameters in a row, named tensors, and whether the library may be used."""

    flat: Tensor
    named: dict[str, Tensor] = field(default_factory=dict)
    solving: bool = False


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sin": torch.sin,
    "softplus": F.softplus,
    "gauss": lambda x: torch.exp(-x * x),
    "root": lambda x: torch.sqrt(1 + x * x),
    "logarithm": lambda x: torch.log1p(x * x),
    "softmax": lambda x: torch.softmax(x, 0),
    "cumsum": lambda x: 0.5 * torch.cumsum(x, 0),
    "roll": lambda x: torch.roll(x, 1, 0),
    "flip": lambda x: x.flip(0),
    "norm": lambda x: x / torch.sqrt(1 + (x * x).sum()),
    "layer_norm": lambda x: F.layer_norm(x, (len(x),), eps=0.1),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "outer": lambda x: torch.outer(torch.tanh(x), x).mean(0),
    "solve": lambda x: torch.linalg.solve(_eye(x) + 0.1 * torch.outer(torch.tanh(x), torch.sin(x)), x),
    "cholesky": lambda x: torch.linalg.cholesky(_eye(x) + torch.outer(torch.tanh(x), torch.tanh(x))).sum(0),
    "convolved": lambda x: F.conv1d(x[None, None], x.new_tensor([[[0.2, 0.5, 0.3]]]), padding=1)[0, 0],
    "half_and_half": lambda x: torch.cat([x[: len(x) // 2].sin(), x[len(x) // 2 :].cos()]),
    "where": lambda x: torch.where(x > 0, x * x, 0.5 * x),
    "stacked": lambda x: torch.stack([x, 2 * x]).mean(0),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plus": torch.add,
    "minus": torch.sub,
    "times": lambda x, y: torch.tanh(x) * y,
    "over": lambda x, y: x / (1 + y * y),
    "weighed": lambda x, y: torch.sigmoid(y) * x,
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_square": lambda x: x.square().mean(),
    "smooth_absolute": lambda x: torch.sqrt(0.1 + x * x).mean(),
    "logsumexp": lambda x: torch.logsumexp(x, 0),
    "pseudo_huber": lambda x: F.softplus(x).mean(),
    # About half the mean: the variance of one number is zero whatever the number, and so is its gradient, of which
    # rules that divide by the size of gradients (RMSprop) may make anything.
    "variance": lambda x: (x - 0.5 * x.mean()).square().mean(),
    "cross_entropy": lambda x: F.cross_entropy(torch.stack([x, x.sin(), -x], -1), torch.arange(len(x)) % 3),
    "mse": lambda x: F.mse_loss(x, torch.ones_like(x)),
}


def _eye(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=x.dtype)


def _gradient_penalty(x: Tensor, s: Scope) -> Tensor:
    """A gradient inside the loss, with respect to what the loss computed itself."""
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(torch.sin(y).sum() + y.pow(3).sum() / 6, y, create_graph=True)[0]


def _nested(x: Tensor, s: Scope) -> Tensor:
    """A solve within the loss: two steps of gradient descent towards a point that depends on the parameters."""
    goal, start = torch.tanh(x), 0.3 * torch.sin(x)
    if s.solving:
        return diffopt.solve(
            lambda u, goal: (u - goal).square().sum(),
            start,
            goal,
            optimizer=diffopt.SGD(0.2),
            steps=2,
            estimator=Unrolled(),
        ).params
    for _ in range(2):
        start = start - 0.2 * 2 * (start - goal)
    return start


# The names are the kinds of special terms; ``x`` is the value of an expression.
SPECIAL: dict[str, Callable[[Tensor, Scope], Tensor]] = {
    "gradient_penalty": _gradient_penalty,
    "func_grad": lambda x, s: torch.func.grad(lambda y: (torch.tanh(y) * x).sum())(x),
    "func_jvp": lambda x, s: torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1],
    # (of a copy: torch gives an expanded tensor no tangent)
    "func_jacfwd": lambda x, s: torch.func.jacfwd(lambda y: torch.tanh(y) * y)(x.clone()).sum(0),
    "func_hessian": lambda x, s: torch.func.hessian(lambda y: torch.tanh(y).pow(2).sum())(x.clone()).sum(0),
    "func_vmap": lambda x, s: torch.func.vmap(lambda y: torch.sin(y) * y)(x),
    "checkpoint": lambda x, s: checkpoint(lambda y: torch.tanh(y).sin(), x, use_reentrant=False),
    "nested": _nested,
    "dropout": lambda x, s: F.dropout(x, 0.4),
    "noise": lambda x, s: x * torch.rand(len(x), dtype=x.dtype),
    "branch": lambda x, s: torch.sin(x) if int(s.named["number"]) % 2 else x * x,
    "masked": lambda x, s: torch.where(s.named["mask"], x, torch.sin(x)),
    "indexed": lambda x, s: x[s.named["index"]],
    "boolean_index": lambda x, s: F.pad(x[s.named["mask"]], (0, int((~s.named["mask"]).sum()))),
    "complex": lambda x, s: (s.named["complex"] * x).abs().square() + (s.named["complex"] * x).real,
    "meta_network": lambda x, s: F.linear(torch.tanh(F.linear(x[:, None], s.named["hidden"])), s.named["last"])[:, 0],
}
NEEDS = {
    "branch": ("number",),
    "masked": ("mask",),
    "boolean_index": ("mask",),
    "indexed": ("index",),
    "complex": ("complex",),
    "meta_network": ("hidden", "last"),
}
RANDOM, NEEDS_VALUES = {"dropout", "noise"}, {"branch", "boolean_index"}
"""Terms that draw, and those that ask a tensor for its value."""
NO_VMAP = {"gradient_penalty", "checkpoint"}
"""Terms that torch cannot run under vmap."""


def value(expression: Expression, scope: Scope) -> Tensor:
    """An expression's value, a vector."""
    kind, *rest = expression
    if kind == "flat":
        return scope.flat
    if kind == "named":
        held = scope.named[rest[0]]
        return held if held.shape == scope.flat.shape else held.reshape(-1)[0].expand_as(scope.flat)
    if kind == "unary":
        return UNARY[rest[0]](value(rest[1], scope))
    if kind == "special":
        return SPECIAL[rest[0]](value(rest[1], scope), scope)
    return BINARY[rest[0]](value(rest[1], scope), value(rest[2], scope))


@dataclass(frozen=True)
class Loss:
    """A sum of terms, each a reduction of an expression, and a penalty that ties it to the parameters."""

    terms: tuple[tuple[str, Expression], ...]

    def at(self, scope: Scope) -> Tensor:
        total = 0.25 * scope.flat.square().sum()
        for reduction, expression in self.terms:
            total = total + REDUCTIONS[reduction](value(expression, scope))
        return total

    @property
    def specials(self) -> set[str]:
        return {kind for _, expression in self.terms for kind in _specials(expression)}

    @property
    def names(self) -> set[str]:
        """The named tensors that are read."""
        read = {name for _, expression in self.terms for name in _named(expression)}
        return read.union(*(NEEDS.get(kind, ()) for kind in self.specials))


def _specials(expression: Expression) -> set[str]:
    own = {expression[1]} if expression[0] == "special" else set()
    return own.union(*(_specials(part) for part in expression if isinstance(part, tuple)))


def _named(expression: Expression) -> set[str]:
    own = {expression[1]} if expression[0] == "named" else set()
    return own.union(*(_named(part) for part in expression if isinstance(part, tuple)))


def losses(vectors: tuple[str, ...], specials: tuple[str, ...]) -> st.SearchStrategy[Loss]:
    """Losses that read the vectors of these names, with special terms of these kinds."""
    flat = st.just(("flat",))
    leaf = st.one_of(flat, flat, st.sampled_from(vectors).map(lambda name: ("named", name)))

    def grown(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        unary = st.tuples(st.just("unary"), st.sampled_from(sorted(UNARY)), inner)
        binary = st.tuples(st.just("binary"), st.sampled_from(sorted(BINARY)), inner, inner)
        special = st.tuples(st.just("special"), st.sampled_from(specials), inner) if specials else unary
        return st.one_of(unary, binary, special)

    expression = st.recursive(leaf, grown, max_leaves=4)
    term = st.tuples(st.sampled_from(sorted(REDUCTIONS)), expression)
    return st.lists(term, min_size=1, max_size=2).map(lambda terms: Loss(tuple(terms)))
