"""Functions of which autograd keeps the arguments only, and computes everything else again, to any order.

# NOTE [tasks in one recomputation]
A function under vmap becomes one of stacked tensors: the *forward* pass is batched, its derivatives are taken
outside (``derivatives.py``, NOTE [the one form of second derivative]). What is differentiated per task is
expanded first, as each task's gradient is its own; otherwise weights that tasks share stay shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from diffopt.errors import MissingDerivativeError
from diffopt.tensors import transforms
from diffopt.tensors.gate import gated

Dims: TypeAlias = "Sequence[int | None]"


class Repeatable(ABC):
    """A function of tensors that can be evaluated again: to the same bits, with a graph if grad mode is on."""

    @property
    @abstractmethod
    def apart(self) -> frozenset[int]:
        """Which of its arguments need an axis of tasks under vmap."""

    @abstractmethod
    def over(self, dims: Dims, size: int, mode: str) -> Repeatable:
        """The same for stacked tasks; ``dims`` are 0 or ``None``."""

    @abstractmethod
    def left_behind(self) -> Exception:
        """What to raise when something is differentiated that depends on its arguments and is not an output."""

    @abstractmethod
    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Its outputs."""


def recomputed(function: Repeatable, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)``, whose backward pass computes it again."""
    found: tuple[Tensor, ...] = transforms.apply(_Recomputed, function, *tensors)
    return found


@final
@dataclass(frozen=True)
class _Pulled(Repeatable):
    """The gradient of a function in its arguments ``wanted``: a function of them all and of the cotangents."""

    of: Repeatable
    count: int
    wanted: tuple[int, ...]
    cotangents: int

    @property
    def apart(self) -> frozenset[int]:
        return self.of.apart | {*self.wanted, *range(self.count, self.count + self.cotangents)}

    def over(self, dims: Dims, size: int, mode: str) -> Repeatable:
        return replace(self, of=self.of.over(dims[: self.count], size, mode))

    def left_behind(self) -> Exception:
        return self.of.left_behind()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given, weights = list(tensors[: self.count]), tensors[self.count :]
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            for i in range(self.count):
                if given[i].requires_grad and not again:  # each by itself: what nobody wants is not pulled back
                    (given[i],) = gated(self.left_behind, given[i])
                elif i in self.wanted and not given[i].requires_grad:
                    given[i] = given[i].detach().requires_grad_()
            leaves = [given[i] for i in self.wanted]
            outputs = self.of(*given)
            pairs = [(x, g) for x, g in zip(outputs, weights, strict=True) if x.requires_grad]
            if not pairs:
                return tuple([torch.zeros_like(x) for x in leaves])
            found = torch.autograd.grad(
                [x for x, _ in pairs], leaves, [g for _, g in pairs], create_graph=again, allow_unused=True
            )
        return tuple([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)])


class _Recomputed(torch.autograd.Function):
    """A function of tensors of which autograd keeps the arguments, and nothing else."""

    @staticmethod
    def forward(function: Repeatable, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _of_their_own(function(*tensors), tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        ctx.function = inputs[0]
        ctx.mark_non_differentiable(*[x for x in outputs if not (x.is_floating_point() or x.is_complex())])
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = tuple([i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed])
        pulled = _Pulled(ctx.function, len(tensors), wanted, len(cotangents))
        found = dict(zip(wanted, recomputed(pulled, *tensors, *cotangents), strict=True))
        return None, *[found.get(i) for i in range(len(tensors))]

    @staticmethod
    def jvp(ctx: Any, *rates: Any) -> Any:
        raise MissingDerivativeError(
            "a block that is to be computed again is differentiated in forward mode",
            "reverse mode",
            "leave checkpoint= out of diffopt.functional there",
        )

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], function: Repeatable, *tensors: Tensor) -> tuple[Any, Any]:
        size = info.batch_size
        stacked, new = transforms.stacked(tensors, dims[1:], size, function.apart)
        found = recomputed(function.over(new, size, info.randomness), *stacked)
        return found, (0,) * len(found)


def _of_their_own(outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs that share no memory with an argument: one is kept, and must not change when an output does."""
    storages = {transforms.storage(x) for x in tensors} - {0}
    known = set(map(id, tensors))
    return tuple([x.clone() if id(x) in known or transforms.storage(x) in storages else x for x in outputs])
