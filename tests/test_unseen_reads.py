"""What an outer loss reads of which no change can be seen: no program is made; and what looks like it and is none."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffopt
from diffopt.tensors.reads import Reads

STREAM = iter([1.0, 2.0])
STREAMS = [itertools.count()]
FILE = io.StringIO("1.0")
BOX = {"scale": 1.0}


def numbers() -> Iterator[float]:
    yield 1.0


def from_file(w: Tensor) -> Tensor:
    with open("settings.json") as file:  # noqa: PTH123
        return w * float(json.load(file)["scale"])


def helper() -> float:
    return float(Path("scale.txt").read_text())


class Trainer:
    """Its loss reads no stream; what else it does is its own affair."""

    def __init__(self) -> None:
        self.stream, self.log, self.network = iter([1.0]), io.StringIO(), torch.nn.Linear(2, 1)
        self.fixed = 2.0

    def train(self) -> float:
        self.log.write(Path("log").read_text())
        return next(self.stream)

    def loss(self, w: Tensor) -> Tensor:
        return self.scaled(w) * self.fixed

    def scaled(self, w: Tensor) -> Tensor:
        return 2 * w

    def reading_loss(self, w: Tensor) -> Tensor:
        return w * self.of_stream()

    def of_stream(self) -> float:
        return next(self.stream)

    @property
    def scale(self) -> float:
        return next(self.stream)

    def property_loss(self, w: Tensor) -> Tensor:
        return w * self.scale


class Callable:
    def __init__(self) -> None:
        self.stream = numbers()

    def __call__(self, w: Tensor) -> Tensor:
        return w * next(self.stream)


def around(value: Any) -> Any:
    return lambda w: w * next(value)


READING = {
    "STREAM": lambda w: w * next(STREAM),
    "STREAMS": lambda w: w * next(STREAMS[0]),
    "FILE": lambda w: w * float(FILE.read()),
    "value": around(numbers()),
    "open": from_file,
    "read_text": lambda w: w * helper(),
    "os.environ": lambda w: w * float(os.environ["SCALE"]),
    "os.getenv": lambda w: w * float(os.getenv("SCALE", "1")),
    "np.load": lambda w: w * float(np.load("scale.npy")),
    "torch.load": lambda w: w * torch.load("scale.pt"),
    "globals": lambda w: w * globals()["BOX"]["scale"],
    "stream": Trainer().reading_loss,
    " stream": Trainer().property_loss,
    "  stream": Callable(),
}


@pytest.mark.parametrize("name", READING)
def test_what_is_read_and_cannot_be_looked_at_is_named(name: str) -> None:
    assert Reads([READING[name]]).unseen == name.strip()


def importing(w: Tensor) -> Tensor:
    import os

    return w * float(os.environ["SCALE"])


def test_what_a_function_imports_itself_is_looked_into() -> None:
    assert Reads([importing]).unseen == "os.environ"


NOT_READING = {
    "a module's first parameter": lambda w: w * next(Trainer().network.parameters()).sum(),
    "the first of some values": lambda w: w * next(iter(BOX.values())),
    "what goes through lists": lambda w: sum(x * y for x, y in zip(w, map(float, [1, 2]), strict=True)),
    "numbers in a row": lambda w: w * sum([i for i, _ in enumerate(range(3))]),
    "numpy and os, but no file": lambda w: w * np.pi * len(os.path.join("a", "b")),  # noqa: PTH118
    "another method's stream and file": Trainer().loss,
    "a global": lambda w: w * BOX["scale"],
    "a method that is called eval": lambda w: torch.nn.Linear(2, 1).double().eval()(w),
    "an attribute that is called input": lambda w: w * Trainer().input if w is None else w,
    "attributes within a function within": lambda w: (lambda x: x.open)(None) if w is None else w,
    "a method that is called load": lambda w: torch.nn.Linear(2, 1).double().load_state_dict({}, strict=False) or w,
}


@pytest.mark.parametrize("name", NOT_READING)
def test_what_can_be_looked_at_is_not_refused(name: str) -> None:
    assert Reads([NOT_READING[name]]).unseen is None


def test_iterators_that_are_given_are_read() -> None:
    assert Reads([lambda w, numbers: w * next(numbers), iter([1.0])]).unseen == "an argument"


def test_an_outer_loss_that_reads_a_file_runs_plainly_and_sees_every_change(tmp_path: Path) -> None:
    path, w = tmp_path / "scale", torch.tensor([1.0, -2.0], dtype=torch.float64)

    def outer(w: Tensor) -> Tensor:
        scale = float(path.read_text())
        return scale * diffopt.solve(lambda w: w.square().sum(), w, optimizer=diffopt.SGD(0.1), steps=1).params.sum()

    program, found = diffopt.compiled(outer), []
    path.write_text("1.0")
    with pytest.warns(diffopt.CompileWarning, match=r"of `read_text` no change can be seen; pass what it gives"):
        found.append(program.value_and_grad(w)[0])
    for scale in (2.0, 3.0, 4.0, 5.0):
        path.write_text(str(scale))
        found.append(program.value_and_grad(w)[0] / scale)
    torch.testing.assert_close(found, [found[0]] * 5)
