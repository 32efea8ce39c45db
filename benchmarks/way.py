"""How far it is from the call to the number: ``python -m benchmarks.way``.

The way: a solve of three steps (gradient descent with momentum on three numbers) and its backward pass under a profiler
that counts what happens in the files of one package: files entered, functions, calls, changes of file, the deepest
stack, and the frames between the call and the user's loss. Comprehensions count as calls where Python makes them so.
How the house is laid out, :mod:`benchmarks.house` says.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import diffopt
from diffopt.estimators import Binomial, FirstOrder, Implicit, Reverse, Unrolled

ROOT = Path(diffopt.__file__).resolve().parent.parent


@dataclass
class Way:
    """What a profiler saw of one package.

    Attributes:
        inside: whether a file belongs to the package.
        to_loss: frames of the package on the stack when the user's loss is first called.
    """

    inside: Callable[[str], bool]
    files: set[str] = field(default_factory=set)
    functions: set[tuple[str, str, int]] = field(default_factory=set)
    calls: int = 0
    changes: int = 0
    depth: int = 0
    to_loss: int = 0

    def watch(self, work: Callable[[], Any], loss: Callable[..., Any]) -> Way:
        """Count while ``work`` runs."""
        before = ""

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal before
            if event != "call":
                return
            code = frame.f_code
            if code is loss.__code__:
                self.to_loss = self.to_loss or _depth(frame, self.inside)
            if not self.inside(code.co_filename):
                return
            self.calls += 1
            self.changes += code.co_filename != before
            before = code.co_filename
            self.files.add(code.co_filename)
            self.functions.add(
                (
                    code.co_filename,
                    code.co_qualname if sys.version_info >= (3, 11) else code.co_name,
                    code.co_firstlineno,
                )
            )
            self.depth = max(self.depth, _depth(frame, self.inside))

        sys.setprofile(profile)
        try:
            work()
        finally:
            sys.setprofile(None)
        return self


def _depth(frame: FrameType | None, inside: Callable[[str], bool]) -> int:
    depth = 0
    while frame is not None:
        depth += inside(frame.f_code.co_filename)
        frame = frame.f_back
    return depth


def quadratic(w: Tensor) -> Tensor:
    """The inner loss."""
    return (w * w).sum()


def ours(estimator: Any, check: bool) -> Way:
    """The way through this library, after a first call that fills what is cached."""
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    optimizer = diffopt.SGD(lr=0.1, momentum=0.9)

    def work() -> None:
        solution = diffopt.solve(quadratic, w, optimizer=optimizer, steps=3, estimator=estimator, check=check)
        solution.params.sum().backward()

    work()
    folders = tuple(str((ROOT / name).resolve()) for name in ("diffopt", "estimators"))
    return Way(lambda name: name.startswith(folders)).watch(work, quadratic)


def through_higher() -> Way | None:
    """The same through ``higher``, if it is installed."""
    if importlib.util.find_spec("higher") is None:
        return None
    import higher

    class Point(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    point = Point()
    optimizer = torch.optim.SGD(point.parameters(), lr=0.1, momentum=0.9)

    def work() -> None:
        with higher.innerloop_ctx(point, optimizer) as (inner, inner_optimizer):
            for _ in range(3):
                inner_optimizer.step(quadratic(inner.w))
            inner.w.sum().backward()

    work()
    folder = str(Path(higher.__file__).parent)
    return Way(lambda name: name.startswith(folder)).watch(work, quadratic)


def main() -> None:
    """Print the table."""
    print(f"{'three steps and their backward pass':38s} files functions calls changes depth to the loss")
    rows: list[tuple[str, Way | None]] = [
        ("Reverse(), check=True", ours(Reverse(), True)),
        ("Reverse(), check=False", ours(Reverse(), False)),
        ("FirstOrder(), check=False", ours(FirstOrder(), False)),
        ("Binomial(2), check=True", ours(Binomial(2), True)),
        ("Implicit(), check=False", ours(Implicit(), False)),
        ("Unrolled(), check=True", ours(Unrolled(), True)),
        ("higher 0.2.1", through_higher()),
    ]
    for name, way in rows:
        if way is not None:
            print(
                f"{name:38s}{len(way.files):6d}{len(way.functions):10d}{way.calls:6d}{way.changes:8d}{way.depth:6d}"
                f"{way.to_loss:12d}"
            )


if __name__ == "__main__":
    main()
