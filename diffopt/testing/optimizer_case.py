"""An optimizer under test: its steps one by one, and the hypergradient of everything through all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError
from diffopt.optimizers.base import Buffers, Optimizer
from diffopt.optimizers.binding import bind
from diffopt.solve import solve
from diffopt.tensors import tree
from diffopt.tensors.leaves import Leaves
from diffopt.testing.hyperparameters import numbers, with_forms

Inputs: TypeAlias = dict[str, Tensor]
"""The leaves of the params (``init0``, ...), the target that the loss reads, and every hyperparameter, by name."""


@final
@dataclass(frozen=True)
class Trial:
    """What is tested: an optimizer, params that it is for, and how many steps are taken."""

    optimizer: Optimizer
    params: Any
    steps: int
    reference: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None

    @cached_property
    def hyperparameters(self) -> Inputs:
        """Every number in the fields that the optimizer takes as a tensor."""
        return {name: x for name, x in numbers(self.optimizer).items() if not self.refuses(name, x)}

    def refuses(self, name: str, value: Any) -> bool:
        """Whether the optimizer says, by a typed error, that a number may not have this form."""
        try:
            with_forms(self.optimizer, {name: value})
        except HyperparameterError:
            return True
        return False

    @property
    def inputs(self) -> Inputs:
        """Everything that a hypergradient is taken of, as it is."""
        leaves = {f"init{i}": x.detach() for i, x in enumerate(tree.flatten(self.params)[0])}
        return {**leaves, "target": torch.tensor(0.7, dtype=torch.float64), **self.hyperparameters}

    def final(self, inputs: Mapping[str, Tensor], loss: Callable[..., Tensor] | None = None) -> list[Tensor]:
        """The final params, by ``solve``."""
        leaves, structure = tree.flatten(self.params)
        start = [inputs[f"init{i}"] for i in range(len(leaves))]
        solution = solve(
            loss or wavy,
            tree.unflatten(structure, start),
            inputs["target"],
            optimizer=with_forms(self.optimizer, inputs),
            steps=self.steps,
            check=False,
        )
        return tree.flatten(solution.params)[0]

    def value(self, inputs: Mapping[str, Tensor], loss: Callable[..., Tensor] | None = None) -> Tensor:
        """An outer loss that is nonlinear in every final param."""
        return torch.stack(
            [(x.double() + 0.3 * x.double().sin()).square().sum() for x in self.final(inputs, loss)]
        ).sum()

    def gradient(self, inputs: Inputs, loss: Callable[..., Tensor] | None = None) -> Inputs:
        """The hypergradient of everything."""
        made = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        found = torch.autograd.grad(self.value(made, loss), list(made.values()), materialize_grads=True)
        return dict(zip(made, found, strict=True))

    def walk(self) -> Iterator[Step]:
        """The steps, by plain calls of ``update``."""
        leaves, structure = tree.flatten(self.params)
        bound = bind(self.optimizer, leaves, structure, self.steps)
        params, buffers = Leaves(x.detach() for x in leaves), None
        for t in range(1, self.steps + 1):
            tensors = [x[t - 1] if s else x for x, s in zip(bound.tensors, bound.scheduled, strict=True)]
            ready = bound.at(t, params, tensors)
            buffers = ready.init(params) if buffers is None else buffers
            roots = [p.detach().requires_grad_() for p in params]
            grads = Leaves(torch.autograd.grad(wavy(roots, self.inputs["target"]), roots))
            step = Step(t, ready, params, grads, buffers)
            yield step
            params, buffers = ready.update(params, grads, buffers, t)


@final
@dataclass(frozen=True)
class Step:
    """What one call of ``update`` gets."""

    number: int
    ready: Optimizer
    params: Leaves
    grads: Leaves
    buffers: Buffers

    def taken(self) -> tuple[Leaves, Buffers]:
        """The result of the call."""
        return self.ready.update(self.params, self.grads, self.buffers, self.number)

    def tensors(self) -> list[Tensor]:
        """All that the call may not change."""
        return [*self.params, *self.grads, *(x for name in sorted(self.buffers) for x in self.buffers[name])]


def wavy(params: Any, target: Tensor) -> Tensor:
    """A loss whose gradient changes sign on the way and couples the leaves."""
    leaves = [x.double() for x in tree.flatten(params)[0]]
    parts = [0.5 * (x - target).square().sum() + (3 * x).cos().sum() for x in leaves]
    return torch.stack(parts).sum() + torch.stack([x.sum() for x in leaves]).sum().sin()
