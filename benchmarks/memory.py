"""Peak memory of one hypergradient against the number of inner steps, for every rule: ``python -m benchmarks.memory``.

Each cell runs in a process of its own and reports the growth of its peak resident memory over the moment before the
call. The problem: 200,000 float32 parameters (0.8 MB), a quartic bowl with one matrix-vector product of width 447.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

STEPS = (10, 100, 1000)
ESTIMATORS = (
    "FirstOrder()",
    "Reptile()",
    "ForwardMode()",
    "Truncated(10, 1)",
    "Reverse('log')",
    "Reverse('sqrt')",
    "Reverse(1)",
    "Reverse('graph')",
    "Unrolled()",
)


def peak_megabytes() -> float:
    """This process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, steps: int) -> None:
    """One cell: prints megabytes above the start and seconds of processor time."""
    import torch

    import diffopt
    from diffopt import estimators

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(447, 447) / 447**0.5
    inputs = torch.randn(8, 447)
    log_decay = torch.tensor(-3.0, requires_grad=True)
    initial = weight.clone() if name.startswith("Forward") else weight.clone().requires_grad_()

    def loss(w: torch.Tensor, log_decay: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (x @ w).tanh().square().mean() + log_decay.exp() * w.square().sum()

    estimator = eval(name, vars(estimators))

    def run(count: int) -> None:
        solution = diffopt.solve(
            loss, initial, log_decay, inputs, optimizer=diffopt.SGD(0.1), steps=count, estimator=estimator
        )
        loss(solution.params, log_decay, inputs).backward()

    run(10)  # loads what torch loads late
    before, start = peak_megabytes(), time.process_time()
    run(steps)
    print(json.dumps({"megabytes": peak_megabytes() - before, "seconds": time.process_time() - start}))


def main() -> None:
    """Print the table."""
    print(f"{'rule':20s}" + "".join(f"{f'T = {steps}':>22s}" for steps in STEPS))
    for estimator in ESTIMATORS:
        cells = []
        for steps in STEPS:
            command = [sys.executable, "-m", "benchmarks.memory", estimator, str(steps)]
            out = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            cells.append(f"{out['megabytes']:10.1f} MB {out['seconds']:6.2f} s")
        print(f"{estimator:20s}" + "".join(f"{cell:>22s}" for cell in cells), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        main()
