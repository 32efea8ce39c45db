"""Binomial beside Krylov at equal numbers of orders: ``python -m benchmarks.orders``.

Sine regression by an MLP 1-40-40-1 with ReLU, 10 points, float64; the relative error of the initial parameters'
hypergradient, median over four tasks, for orders 0 to 9.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

import diffopt
from diffopt.estimators import Binomial, Estimator, Krylov, Reverse
from diffopt.tasks import MLP, Sinusoid, functional

SETTINGS: list[tuple[str, diffopt.Optimizer, int]] = [
    *((f"GD lr .01, T={steps}", diffopt.SGD(0.01), steps) for steps in (5, 10, 20, 50)),
    ("momentum .9, lr .001, T=20", diffopt.SGD(0.001, momentum=0.9), 20),
    ("momentum .9, lr .005, T=20", diffopt.SGD(0.005, momentum=0.9), 20),
    ("Adam lr .01, eps .01, T=20", diffopt.Adam(0.01, eps=0.01), 20),
]
ORDERS, TASKS = 10, 4


def errors(optimizer: diffopt.Optimizer, steps: int, estimators: list[Estimator]) -> list[float]:
    """The median relative error of each estimator."""
    generator = torch.Generator().manual_seed(0)
    apply, params = functional(MLP((1, 40, 40, 1), generator=generator).double())
    waves = Sinusoid().sample(TASKS, generator, dtype=torch.float64)

    def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return (apply(params, inputs) - targets).square().mean()

    def hypergradient(estimator: Estimator, task: int) -> Tensor:
        x, y, query_x, query_y = (part[task] for part in waves)
        found = diffopt.solve(loss, params, x, y, optimizer=optimizer, steps=steps, estimator=estimator).params
        gradients = torch.autograd.grad(loss(found, query_x, query_y), list(params.values()))
        return torch.cat([g.flatten() for g in gradients])

    exact = [hypergradient(Reverse(), task) for task in range(TASKS)]
    return [
        statistics.median(
            float((hypergradient(estimator, task) - exact[task]).norm() / exact[task].norm()) for task in range(TASKS)
        )
        for estimator in estimators
    ]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{'dynamics':28s}{'estimator':11s}" + "".join(f"{f'L={order}':>9s}" for order in range(ORDERS)))
    for name, optimizer, steps in SETTINGS:
        orders = range(min(ORDERS, steps + 1))
        for kind, make in (("Binomial", Binomial), ("Krylov", Krylov)):
            row = errors(optimizer, steps, [make(order) for order in orders])
            print(f"{name:28s}{kind:11s}" + "".join(f"{error:9.1e}" for error in row), flush=True)


if __name__ == "__main__":
    main()
