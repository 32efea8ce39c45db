"""An option of a command, or a setting of an experiment: a field of a dataclass, and what it is parsed by."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import torch

from diffopt.errors import DiffoptError

Parse = Callable[[str], Any]

MOST_THREADS = 1024
"""More than any processor has; torch ends the process where the system refuses it a thread."""
MOST = 10_000
"""Of what one iteration keeps in memory at a time: more tasks, images or channels are a slip of the hand."""
LARGEST = 1e30
"""Of real numbers: single precision ends at 3.4e38, and what computes with one must have room above it."""


class OptionError(DiffoptError, ValueError):
    """An option of the command line cannot be used as it was given."""


def option(default: Any, text: str, parse: Parse | None = str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is a flag of the command line; ``None`` as ``default`` shows none in the help.

    Without ``parse`` the command makes its flags for it, and messages call it ``text``.
    """
    return field(default=default, metadata={"help": text, "parse": parse, "choices": choices})


def whole(low: int, high: int | None = None) -> Parse:
    """Parses an integer of at least ``low`` and at most ``high``."""

    def parse(text: str) -> int:
        number = int(text) if text.removeprefix("-").isdecimal() and len(text) < 19 else low - 1
        if number < low:
            raise _refused(text, f"an integer, {low} or more")
        if high is not None and number > high:
            raise _refused(text, f"an integer from {low} to {high}")
        return number

    return parse


def real(low: float, above: bool = True) -> Parse:
    """Parses a number above ``low``, or, with ``above=False``, of at least ``low``, that single precision has."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        expected = f"a number above {low:g}" if above else f"a number of {low:g} or more"
        if not (low < value < math.inf or (value == low and not above)):
            raise _refused(text, expected)
        if value > LARGEST:
            raise _refused(text, f"{expected}, {LARGEST:g} at most")
        return value

    return parse


def listed(parse: Parse) -> Parse:
    """Parses values between commas, each by ``parse``."""
    return lambda text: tuple(parse(part.strip()) for part in text.split(","))


def one_of(*known: str) -> Parse:
    """Parses one of several words."""

    def parse(text: str) -> str:
        if text not in known:
            raise _refused(text, f"one of {', '.join(known)}")
        return text

    return parse


def yes_or_no(text: str) -> bool:
    """Parses ``yes`` or ``no``."""
    return bool(one_of("no", "yes")(text) == "yes")


def device(name: str) -> str:
    """Parses the name of a torch device, such as ``cpu`` or ``cuda:1``, and tries it."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:  # some devices are packages of their own
        reason = str(error).partition("\n")[0][:80]
        raise argparse.ArgumentTypeError(
            f"{name[:40]!r} cannot be used here ({reason}), expected one that can; try cpu"
        ) from error
    return name


def _refused(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"got {text[:40]!r}, expected {expected}")


def expanded(path: str) -> Path:
    """A path to write to, with its leading ``~`` replaced.

    Raises:
        OptionError: the system knows no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(f"--out is {path[:80]} ({error})", "a path", "write it without ~") from error
