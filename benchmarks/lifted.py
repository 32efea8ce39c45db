"""What a lifted optimizer costs beside the native rule: ``python -m benchmarks.lifted``.

One hypergradient of a tanh network by ``Reverse("graph")``, float32, one thread: smallest processor time of five, in
milliseconds. Small: 2 layers of 20, 20 steps. Large: 3 layers of 256, 10 steps. Tasks: 16 small ones in one vmap.
The last line is the check that ``from_torch`` makes once for each class and set of options.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import diffopt
from diffopt.estimators import Reverse

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-2, "momentum": 0.9},
    "Adam": {"lr": 1e-2},
    "AdamW": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-2},
    "Adagrad": {"lr": 1e-2},
}


def network(layers: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for _ in range(layers) for shape in ((width, width), (width,))]
    return [torch.randn(shape, generator=generator).div(width**0.5).requires_grad_() for shape in shapes]


def loss(params: list[Tensor], x: Tensor) -> Tensor:
    for weight, bias in zip(params[::2], params[1::2], strict=True):
        x = torch.tanh(x @ weight + bias)
    return x.square().mean()


def milliseconds(run: Callable[[], Any], times: int = 5) -> float:
    run()
    seconds = []
    for _ in range(times):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return 1e3 * min(seconds)


def cost(optimizer: diffopt.Optimizer, layers: int, width: int, steps: int, tasks: int | None = None) -> float:
    """One hypergradient, of the initial parameters."""
    params = network(layers, width)
    inputs = torch.randn(32, width) if tasks is None else torch.randn(tasks, 32, width)

    def outer(x: Tensor) -> Tensor:
        solution = diffopt.solve(loss, params, x, optimizer=optimizer, steps=steps, estimator=Reverse("graph"))
        return solution.params[0].square().sum()

    return milliseconds(lambda: (outer if tasks is None else torch.func.vmap(outer))(inputs).sum().backward())


def lifted(name: str, options: dict[str, Any]) -> dict[str, diffopt.Optimizer]:
    found = {
        "native": getattr(diffopt, name)(**options),
        "lifted": diffopt.from_torch(getattr(torch.optim, name), **options),
    }
    if importlib.util.find_spec("torchopt") is not None:
        torchopt = importlib.import_module("torchopt")
        found["torchopt"] = diffopt.from_torchopt(getattr(torchopt, name.lower())(**options))
    return found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'optimizer':20s}{'small':>16s}{'large':>16s}{'tasks':>16s}")
    for name, options in OPTIMIZERS.items():
        native: list[float] = []
        for kind, optimizer in lifted(name, options).items():
            cells = [cost(optimizer, 2, 20, 20), cost(optimizer, 3, 256, 10), cost(optimizer, 2, 20, 20, tasks=16)]
            native = native or cells
            row = "".join(f"{cell:9.1f} ({cell / base:.2f})" for cell, base in zip(cells, native, strict=True))
            print(f"{name + ', ' + kind:20s}{row}", flush=True)
    start = time.process_time()
    diffopt.from_torch(torch.optim.Adam, lr=0.0123)
    print(f"one check: {1e3 * (time.process_time() - start):.0f} ms")


if __name__ == "__main__":
    main()
