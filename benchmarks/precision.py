"""What single and half precision cost in accuracy: ``python -m benchmarks.precision``.

The relative error of the initial parameters' hypergradient against the same computation in float64, median over tasks:

- *float32*: everything in single precision.
- *autocast*: the params, the states, the updates and the adjoints in float32; the inner loss (and so its derivatives)
  under ``torch.autocast(dtype=torch.bfloat16)``, in the rollout and wherever the backward pass evaluates it again.
- *bfloat16*: everything in half precision.

``start`` is the error of a plain gradient at the initial parameters, without an inner loop: what the precision of the
loss itself costs. Then one column per number of inner steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import diffopt
from diffopt.tasks import MLP, Conv4, Sinusoid, functional

Params: TypeAlias = dict[str, Tensor]
Optimizers: TypeAlias = Callable[[float], diffopt.Optimizer]
TASKS, STEPS = 4, (0, 1, 5, 20, 50)
OPTIMIZERS: dict[str, Optimizers] = {
    "GD": diffopt.SGD,
    "momentum .9": lambda lr: diffopt.SGD(lr / 5, momentum=0.9),
    "Adam, eps .01": lambda lr: diffopt.Adam(lr / 5, eps=0.01),
}
PRECISIONS = {"float32": (torch.float32, False), "autocast": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}


@dataclass(frozen=True)
class Problem:
    """A network, what its outputs are held to, and tasks (support and query inputs and targets), all in float64."""

    model: nn.Module
    metric: Callable[[Tensor, Tensor], Tensor]
    tasks: tuple[Tensor, ...]
    lr: float

    def hypergradients(self, make: Optimizers, steps: int, dtype: torch.dtype, *, autocast: bool) -> list[Tensor]:
        """Of the initial parameters, flat and in float64, for every task."""
        apply, start = functional(self.model)

        def loss(params: Params, inputs: Tensor, targets: Tensor) -> Tensor:
            return self.metric(apply(params, inputs), targets)

        found = []
        for task in zip(*self.tasks, strict=True):
            x, y, query_x, query_y = (part.to(dtype) if part.is_floating_point() else part for part in task)
            params = {key: leaf.detach().to(dtype).requires_grad_() for key, leaf in start.items()}
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                if steps:
                    end = diffopt.solve(loss, params, x, y, optimizer=make(self.lr), steps=steps).params
                outer_loss = loss(end if steps else params, query_x, query_y)
            gradients = torch.autograd.grad(outer_loss, list(params.values()))
            found.append(torch.cat([leaf.flatten().double() for leaf in gradients]))
        return found


def sine_waves() -> Problem:
    """Regression of sine waves: 10 support and 10 query points."""
    generator = torch.Generator().manual_seed(0)
    model = MLP((1, 40, 40, 1), generator=generator).double()
    return Problem(model, mse_loss, tuple(Sinusoid().sample(TASKS, generator, dtype=torch.float64)), 0.02)


def images() -> Problem:
    """Five classes of random 28 x 28 images: one support and three query images of each, with noise."""
    generator = torch.Generator().manual_seed(0)
    model = Conv4(1, way=5, filters=16, generator=generator).double()
    classes = torch.rand(TASKS, 5, 1, 28, 28, generator=generator, dtype=torch.float64)
    query = classes.repeat(1, 3, 1, 1, 1)
    query = query + 0.3 * torch.randn(query.shape, generator=generator, dtype=torch.float64)
    labels = torch.arange(5).expand(TASKS, 5)
    return Problem(model, cross_entropy, (classes, labels, query, labels.repeat(1, 3)), 0.1)


def rows(problem: Problem, make: Optimizers) -> Iterator[tuple[str, list[float]]]:
    """The relative errors by number of steps, for each precision."""
    exact = [problem.hypergradients(make, steps, torch.float64, autocast=False) for steps in STEPS]
    for name, (dtype, autocast) in PRECISIONS.items():
        errors = []
        for steps, expected in zip(STEPS, exact, strict=True):
            found = problem.hypergradients(make, steps, dtype, autocast=autocast)
            errors.append(
                statistics.median(float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))
            )
        yield name, errors


def main() -> None:
    """Print one table per problem."""
    torch.set_num_threads(1)
    head = "".join(f"{f'T={steps}' if steps else 'start':>10}" for steps in STEPS)
    for title, problem in (("Sine waves, MLP 1-40-40-1", sine_waves()), ("Images, Conv4 of 16 filters", images())):
        print(f"{title}\n{'dynamics':16}{'precision':12}{head}")
        for name, make in OPTIMIZERS.items():
            for precision, errors in rows(problem, make):
                print(f"{name:16}{precision:12}" + "".join(f"{error:10.1e}" for error in errors), flush=True)
        print()


if __name__ == "__main__":
    main()
