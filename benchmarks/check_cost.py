"""What the checks of ``solve`` cost, as a share of a small hypergradient: ``python -m benchmarks.check_cost``.

Sine regression by an MLP 1-40-40-1 from 10 support points, 5 steps, float32; the hypergradient of the initial
parameters and of the step size. With ``check=True`` and ``check=False`` in turn, each pair in random order; the
figure is the median of the pairs' ratios of processor time, so that what else the machine does falls on both alike.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import diffopt
from diffopt.estimators import Estimator, FirstOrder, Reverse
from diffopt.tasks import MLP, Sinusoid, functional

ESTIMATORS: dict[str, Estimator] = {
    "Reverse()": Reverse(),
    "Reverse(1)": Reverse(1),
    "FirstOrder()": FirstOrder(),
}


def hypergradient(estimator: Estimator) -> Callable[[bool], None]:
    """The work to be timed, as a function of ``check``."""
    generator = torch.Generator().manual_seed(0)
    apply, params = functional(MLP((1, 40, 40, 1), generator=generator))
    x, y, query_x, query_y = (part[0] for part in Sinusoid(shots=10).sample(1, generator))
    lr = torch.tensor(0.01, requires_grad=True)

    def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return (apply(params, inputs) - targets).square().mean()

    def work(check: bool) -> None:
        solution = diffopt.solve(
            loss, params, x, y, optimizer=diffopt.SGD(lr), steps=5, estimator=estimator, check=check
        )
        torch.autograd.grad(loss(solution.params, query_x, query_y), [*params.values(), lr])

    return work


def seconds(work: Callable[[bool], None], check: bool) -> float:
    """Processor time of one run."""
    start = time.process_time()
    work(check)
    return time.process_time() - start


def main(pairs: int = 1000) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    order = random.Random(0)
    print(f"{'rule':14s}{'unchecked':>12s}{'checked':>12s}{'checks cost':>14s}   (medians of {pairs} pairs)")
    for name, estimator in ESTIMATORS.items():
        work, times = hypergradient(estimator), {True: list[float](), False: list[float]()}
        for pair in range(-50, pairs):  # the first fifty are not counted
            for check in order.sample([True, False], 2):
                taken = seconds(work, check)
                if pair >= 0:
                    times[check].append(taken)
        ratio = statistics.median(with_ / without for with_, without in zip(times[True], times[False], strict=True))
        without, with_ = (1e3 * statistics.median(times[check]) for check in (False, True))
        print(f"{name:14s}{without:9.2f} ms{with_:9.2f} ms{100 * (ratio - 1):12.1f} %", flush=True)


if __name__ == "__main__":
    main(*(int(pairs) for pairs in sys.argv[1:]))
