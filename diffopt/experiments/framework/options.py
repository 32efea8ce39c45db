"""The options of a command as one dataclass: its fields are the flags, their defaults and their help."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffopt.errors import DiffoptError

Options = TypeVar("Options")
Parse = Callable[[str], Any]

MOST_THREADS = 1024
"""More than any processor has; torch ends the process where the system refuses it a thread."""
MOST = 10_000
"""Of what one iteration keeps in memory at a time: more tasks, images or channels are a slip of the hand."""
LARGEST = 1e30
"""Of real numbers: single precision ends at 3.4e38, and what computes with one must have room above it."""


class OptionError(DiffoptError, ValueError):
    """An option of the command line cannot be used as it was given."""


def option(default: Any, text: str, parse: Parse = str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is a flag of the command line; ``None`` as ``default`` shows none in the help."""
    return field(default=default, metadata={"help": text, "parse": parse, "choices": choices})


def whole(low: int, high: int | None = None) -> Parse:
    """Parses an integer of at least ``low`` and at most ``high``."""

    def parse(text: str) -> int:
        if not (text.removeprefix("-").isdecimal() and len(text) < 19 and int(text) >= low):
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected an integer, {low} or more")
        if high is not None and int(text) > high:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from {low} to {high}")
        return int(text)

    return parse


def real(low: float, above: bool = True) -> Parse:
    """Parses a number above ``low``, or, with ``above=False``, of at least ``low``, that single precision has."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        bound = f"above {low:g}" if above else f"of {low:g} or more"
        if not (value > low or (value == low and not above)) or math.isinf(value):
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected a number {bound}")
        if value > LARGEST:
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected a number {bound}, {LARGEST:g} at most")
        return value

    return parse


def listed(parse: Parse) -> Parse:
    """Parses one or more values between commas into a tuple."""
    return lambda text: tuple(parse(part.strip()) for part in text.split(","))


def one_of(*known: str) -> Parse:
    """Parses one of several words."""

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(known)}")
        return text

    return parse


def expanded(path: str) -> Path:
    """A path to write to, with its leading ``~`` replaced.

    Raises:
        OptionError: the system knows no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(f"--out is {path[:80]} ({error})", "a path", "write it without ~") from error


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


def add_flags(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """Add one flag for each field of the dataclass ``kind``; a flag that is not given leaves no trace."""
    for item in fields(kind):
        text = f"{item.metadata['help']}{_shown(item)}"
        if isinstance(item.default, bool):
            yes_or_no = argparse.BooleanOptionalAction
            parser.add_argument(flag(item.name), action=yes_or_no, default=argparse.SUPPRESS, help=text)
            continue
        parser.add_argument(
            flag(item.name),
            type=item.metadata["parse"],
            choices=item.metadata["choices"],
            default=argparse.SUPPRESS,
            help=text,
            metavar=item.name.rpartition("_")[2].upper() if item.metadata["choices"] is None else None,
        )


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def read(kind: type[Options], given: argparse.Namespace, stored: dict[str, Any] | None) -> Options:
    """The options: what was given, else what was ``stored`` by the run that is resumed, else the default.

    Raises:
        OptionError: an option is given with another value than the run that is resumed was started with, and is
            not one of those whose metadata says that it may change.
    """
    names = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    explicit = {name: value for name, value in vars(given).items() if name in names}
    if stored is None:
        return kind(**explicit)
    for name, value in explicit.items():
        if name in stored and stored[name] != value:
            raise OptionError(
                f"{flag(name)} is {_plain(value)}",
                f"{_plain(stored[name])}, with which the run to resume was started",
                f"leave {flag(name)} out, or start a new run in another --out",
            )
    return kind(**{**{name: stored[name] for name in names if name in stored}, **explicit})


def check_stored(kind: type[Any], stored: dict[str, Any], free: Sequence[str]) -> None:
    """Refuse stored options that are not those of ``kind``, or that its flags would refuse.

    Raises:
        OptionError: names the first one.
    """
    own = {item.name: item for item in fields(kind) if item.name not in free}
    for name in [*own, *stored]:
        if name not in own or name not in stored:
            state = "missing" if name in own else "unknown"
            raise OptionError(f"the stored option {name!r} is {state}", "those of this version", "start a new run")
        item, value = own[name], stored[name]
        choices = item.metadata["choices"]
        try:
            if isinstance(item.default, bool) != isinstance(value, bool) or (choices and value not in choices):
                raise ValueError("of another kind")
            if not isinstance(value, bool) and value is not None:
                item.metadata["parse"](str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise OptionError(
                f"the stored option {name!r} is {_plain(value)[:40]} ({str(error)[:70]})",
                f"one that {flag(name)} takes",
                "start a new run",
            ) from error


def to_store(options: Any, free: Sequence[str]) -> dict[str, Any]:
    """The options that a resumed run has to share: all but those named in ``free``."""
    return {name: value for name, value in asdict(options).items() if name not in free}


def _plain(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _shown(item: Field[Any]) -> str:
    return "" if item.default in (None, MISSING) else f" (default: {_plain(item.default)})"
