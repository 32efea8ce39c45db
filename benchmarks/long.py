"""Long rollouts in little memory: ``python -m benchmarks.long`` prints the table of docs/large/memory.md.

Each row is measured in a process of its own: the growth of its peak resident memory over the moment before the solve,
its whole peak, the peak of torch's own allocations (of the rows whose steps are few enough to log), the processor's
time and the clock's, the states stored, the steps taken again and the least that is possible with so many states.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import diffopt
from diffopt.estimators import Reverse
from diffopt.rollout import schedules
from diffopt.tensors.memory import peak_bytes


class Block(nn.Module):
    """A transformer's block, with attention that can be differentiated twice."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, width]`` to the same."""
        q, k, v = self.into(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Language(nn.Module):
    """Four blocks over 256 tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(4)])
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[batch, sequence]`` to ``[batch, sequence, 256]``."""
        found: Tensor = self.head(self.blocks(self.tokens(tokens)))
        return found


def transformer(steps: int, width: int, batch: int = 16, **options: Any) -> diffopt.Solution[Any]:
    """Momentum on a 4-block transformer; the weight of every example is differentiated."""
    model, params = diffopt.functional(Language(width))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (8 * batch, 65), generator=generator)
    weights = torch.ones(len(tokens), requires_grad=True)

    def loss(params: Any, weights: Tensor, chosen: Tensor) -> Tensor:
        logits = model(params, tokens[chosen, :-1])
        losses = functional.cross_entropy(logits.flatten(0, 1), tokens[chosen, 1:].flatten(), reduction="none")
        return (weights[chosen] * losses.view(len(chosen), -1).mean(1)).mean()

    batches = [torch.randperm(len(tokens), generator=generator)[:batch] for _ in range(steps)]
    solution = diffopt.solve(
        loss,
        params,
        weights,
        optimizer=diffopt.SGD(0.1, momentum=0.9),
        steps=steps,
        batches=torch.stack(batches),
        **options,
    )
    loss(solution.params, weights.detach(), batches[0]).backward()
    return solution


def layer(steps: int, width: int, momentum: float = 0.9, **options: Any) -> diffopt.Solution[Any]:
    """One layer of ``width**2`` parameters; they and the scale of its inputs are differentiated."""
    torch.manual_seed(0)
    start = (torch.randn(width, width) / width**0.5).requires_grad_()
    x, scale = torch.randn(8, width), torch.tensor(1.0, requires_grad=True)

    def loss(w: Tensor, scale: Tensor) -> Tensor:
        return (x * scale @ w).tanh().square().mean()

    optimizer = diffopt.SGD(0.1, momentum=momentum)
    solution = diffopt.solve(loss, start, scale, optimizer=optimizer, steps=steps, **options)
    loss(solution.params, scale).backward()
    return solution


def plain(steps: int, width: int, **options: Any) -> diffopt.Solution[Any]:
    """The same without momentum."""
    return layer(steps, width, momentum=0.0, **options)


def small(steps: int, width: int, **options: Any) -> diffopt.Solution[Any]:
    """``width`` parameters of a quartic bowl; how often the loss is evaluated is counted."""
    start, scale = torch.linspace(-1, 1, width).requires_grad_(), torch.tensor(1.0, requires_grad=True)
    taken = [0]

    def loss(w: Tensor, scale: Tensor) -> Tensor:
        taken[0] += 1
        return (w * scale).tanh().square().mean()

    solution = diffopt.solve(loss, start, scale, optimizer=diffopt.SGD(0.1), steps=steps, check=False, **options)
    value = loss(solution.params, scale)
    taken[0] = 0
    value.backward()
    if taken[0] != solution.counts.extra_steps:
        raise RuntimeError(f"{taken[0]} steps were taken again, and {solution.counts.extra_steps} counted")
    return solution


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        problem, width: the solve and its backward pass.
        estimator: its options of :class:`Reverse`.
        goal: what is to hold, in words.
        logged: whether torch's allocations are logged.
    """

    problem: Callable[..., Any]
    width: int
    steps: int
    estimator: dict[str, Any]
    goal: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    logged: bool = False

    @property
    def name(self) -> str:
        """How it is called in the table."""
        options = [repr(self.estimator["checkpoint"])] if "checkpoint" in self.estimator else []
        options += [f"{key}={value!r}" for key, value in self.estimator.items() if key != "checkpoint"]
        more = "".join(f", {key}={value}" for key, value in self.more.items())
        return (
            f"{self.problem.__name__} of width {self.width:,}, T = {self.steps:,}, Reverse({', '.join(options)}){more}"
        )


ROWS = [
    Row(transformer, 128, 36, {"checkpoint": 1}, logged=True),
    Row(transformer, 128, 36, {"checkpoint": "sqrt"}, "270 MB; 1.6 of the time of Reverse(1)", logged=True),
    Row(transformer, 128, 36, {"checkpoint": "sqrt"}, "110 MB", {"micro_batches": 4}, logged=True),
    *(
        Row(layer, 1000, 100, {"memory": f"{size}MB"}, "within 10 %, least steps", logged=True)
        for size in (100, 200, 400)
    ),
    Row(layer, 1000, 5_000, {"checkpoint": "sqrt"}),
    Row(layer, 1000, 5_000, {"checkpoint": "log"}, "150 MB; 2.3 of the time of 'sqrt'"),
    Row(layer, 1000, 5_000, {"memory": "150MB"}, "150 MB; 2.3 of the time of 'sqrt'"),
    Row(small, 1000, 100_000, {"checkpoint": "log"}, "33 states, least steps"),
    Row(plain, 1000, 10_000, {"checkpoint": "sqrt", "offload": "disk"}, "400 MB in all"),
    Row(plain, 1000, 10_000, {"checkpoint": "log"}, "400 MB in all"),
]


def resident() -> float:
    """This process's largest resident memory so far, in MB of 10**6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(row: Row) -> dict[str, Any]:
    """Run one row in this process."""
    torch.set_num_threads(1)
    options = {"estimator": Reverse(**row.estimator), **row.more}
    # loads what torch loads late, on a problem that takes no memory
    offload = row.estimator.get("offload", False)
    row.problem(9, 32, estimator=Reverse(row.estimator.get("checkpoint", "log"), offload=offload), **row.more)
    before, start, clock = resident(), time.process_time(), time.perf_counter()
    solution = row.problem(row.steps, row.width, **options)
    slots = solution.kept.slots
    seconds = time.process_time() - start, time.perf_counter() - clock
    memory = resident() - before, resident()
    peak = peak_bytes(lambda: row.problem(row.steps, row.width, **options)) if row.logged else None
    return {
        "growth": memory[0],
        "whole": memory[1],
        "allocated": None if peak is None else peak / 1e6,
        "seconds": seconds,
        "kept": solution.kept.states,
        "again": solution.counts.extra_steps,
        "least": None if slots is None else schedules.least_steps(row.steps, slots) + 1,
    }


def line(row: Row, found: dict[str, Any]) -> str:
    """One row of the table."""
    allocated = "-" if found["allocated"] is None else f"{found['allocated']:.0f}"
    least = "-" if found["least"] is None else f"{found['least']:,}"
    processor, clock = found["seconds"]
    cells = [row.name, f"{found['growth']:.0f}", f"{found['whole']:.0f}", allocated, f"{processor:.1f}", f"{clock:.1f}"]
    return " | ".join(["", *cells, str(found["kept"]), f"{found['again']:,}", least, row.goal, ""]).strip()


HEAD = """\
| solve | MB above the start | MB in all | MB allocated | processor s | clock s | states | again | least | goal |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Print the table, or measure the one row that is asked for by number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument(
        "--divide", type=int, default=1, help="of the steps of rows of 1,000 or more take one in this many"
    )
    parser.add_argument("--row", type=int, help="print what this row measures in this process, as JSON")
    given = parser.parse_args()
    rows = [replace(row, steps=row.steps // given.divide) if row.steps >= 1000 else row for row in ROWS]
    if given.row is not None:
        print(json.dumps(measure(rows[given.row])))
        return
    print(HEAD)
    for number, row in enumerate(rows):
        if given.only in row.name:
            command = [sys.executable, "-m", "benchmarks.long", "--row", str(number), "--divide", str(given.divide)]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            print(line(row, json.loads(out)), flush=True)


if __name__ == "__main__":
    main()
