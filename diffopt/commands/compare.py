"""``diffopt compare TASK``: estimators side by side on a built-in problem, in a table and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import diffopt
from diffopt.commands.estimator_names import KNOWN_NAMES, estimator
from diffopt.estimators import Estimator
from diffopt.experiments.framework.options import MOST, OptionError, expanded, whole

Commands: TypeAlias = "argparse._SubParsersAction[Any]"
Problem: TypeAlias = Callable[[Estimator], Tensor]

DEFAULT = (
    "reverse:graph,reverse:1,reverse:sqrt,unrolled,truncated:5,first-order,binomial:2,binomial:5,krylov:2,krylov:5"
)


PICTURES = (".png", ".svg", ".pdf")


def add_command(commands: Commands) -> None:
    """Add ``compare``."""
    text = "Compare estimators on a problem: error, cosine, cost, depth, time and memory."
    parser = commands.add_parser("compare", help=text, description=text, allow_abbrev=False)
    parser.add_argument("task", choices=sorted(TASKS), help="the problem")
    parser.add_argument("--estimators", default=DEFAULT, help=f"comma-separated; known: {KNOWN_NAMES}")
    parser.add_argument("--repeats", type=whole(1, MOST), default=3, help="timed runs of each (default: 3)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--out", type=picture, help="save a picture there: error against time and memory")
    parser.set_defaults(run=run)


def picture(text: str) -> Path:
    """For ``argparse``: the path of a picture in a format that can be drawn."""
    try:
        path = expanded(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected a name that ends in {', '.join(PICTURES)}")
    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is there and is no file, expected a path to write to")
    return path


def run(given: argparse.Namespace) -> int:
    """Run the comparison."""
    estimators = [estimator(name.strip()) for name in given.estimators.split(",")]
    torch.set_num_threads(1)
    comparison = diffopt.compare(TASKS[given.task](), estimators, repeats=given.repeats)
    print(comparison.to_markdown() if given.markdown else comparison)
    if given.out is not None:
        print(f"Picture: {comparison.plot(given.out)}")
    return 0


def _penalties() -> Problem:
    from diffopt.experiments.framework.penalties import Penalties

    return Penalties.breast_cancer().compare_loss


def _sinusoid() -> Problem:
    """MAML on four sine waves: the initial weights of an MLP 1-40-40-1 and its step size, 10 steps."""
    from diffopt.tasks import MLP, Sinusoid, functional

    generator = torch.Generator().manual_seed(0)
    waves = Sinusoid().sample(4, generator, dtype=torch.float64)
    apply, params = functional(MLP((1, 40, 40, 1), generator=generator).double())
    lr = torch.tensor(0.005, dtype=torch.float64, requires_grad=True)

    def loss(params: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        errors: Tensor = apply(params, inputs) - targets
        return errors.square().mean()

    def problem(estimator: Estimator) -> Tensor:
        def one(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
            adapted = diffopt.solve(loss, params, x, y, optimizer=diffopt.SGD(lr), steps=10, estimator=estimator)
            return loss(adapted.params, query_x, query_y)

        return torch.func.vmap(one)(*waves).mean()

    return problem


def _quadratic() -> Problem:
    """A random positive definite quadratic of 20 dimensions, 20 steps of momentum: start, linear term, step size."""
    from diffopt.tasks import Quadratic

    generator = torch.Generator().manual_seed(0)
    quadratic = Quadratic.random(20, definite=True, generator=generator)
    start, linear = (torch.randn(20, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def problem(estimator: Estimator) -> Tensor:
        optimizer = diffopt.SGD(lr, momentum=0.5)
        solution = diffopt.solve(quadratic.loss, start, linear, optimizer=optimizer, steps=20, estimator=estimator)
        return quadratic.outer_loss(solution.params)

    return problem


TASKS: dict[str, Callable[[], Problem]] = {
    "penalties": _penalties,
    "quadratic": _quadratic,
    "sinusoid": _sinusoid,
}
