"""The options of a command as one dataclass: its fields are the flags, their defaults and their help."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import Any, TypeVar

from diffopt.experiments.framework.options import MOST_THREADS, OptionError, device, option, real, whole

Options = TypeVar("Options")

FREE = ("out", "data_dir", "minutes", "save_every")
"""Options that a resumed run may change: they say where, until when and how safely it runs, not what it computes."""


@dataclass(frozen=True)
class RunOptions:
    """What all commands share that run for long and can be resumed."""

    out: str = option("", "folder of the run")
    minutes: float | None = option(None, "stop in time to be done after so many minutes in all", real(0))
    save_every: float = option(10.0, "seconds between two saves of the state", real(0, above=False))
    seed: int = option(0, "of all random numbers", whole(0))
    threads: int | None = option(None, "CPU threads; default: torch's choice", whole(1, MOST_THREADS))
    device: str = option("cpu", "where to compute, such as cpu or cuda", device)


def add_flags(parser: argparse.ArgumentParser, kind: type[RunOptions]) -> None:
    """Add one flag for each field of ``kind``, and ``--resume``; a flag that is not given leaves no trace."""
    for item in fields(kind):
        text, choices = f"{item.metadata['help']}{_shown(item)}", item.metadata["choices"]
        if isinstance(item.default, bool):
            yes_or_no = argparse.BooleanOptionalAction
            parser.add_argument(_name(item), action=yes_or_no, default=argparse.SUPPRESS, help=text)
        elif item.metadata["parse"] is not None:
            parser.add_argument(
                _name(item),
                type=item.metadata["parse"],
                choices=choices,
                default=argparse.SUPPRESS,
                help=text,
                metavar=item.name.rpartition("_")[2].upper() if choices is None else None,
            )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out, with its options; those given again must be the same, but for --data-dir, "
        "--minutes and --save-every",
    )


def read(kind: type[Options], given: argparse.Namespace, stored: Mapping[str, Any] | None = None) -> Options:
    """The options: what was given, else what was ``stored`` by the run that is resumed, else the default.

    Raises:
        OptionError: an option is given with another value than the run that is resumed was started with.
    """
    own = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    before = {name: value for name, value in (stored or {}).items() if name in own}
    explicit = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items() if name in own
    }
    for name, value in explicit.items():
        if name in before and before[name] != value:
            called = _name(own[name])
            raise OptionError(
                f"{called} is {_plain(value)}",
                f"{_plain(before[name])}, with which the run to resume was started",
                f"leave {called} out, or start a new run in another --out",
            )
    return kind(**{**before, **explicit})


def check_stored(kind: type[Any], stored: Mapping[str, Any]) -> None:
    """Refuse stored options that are not those of ``kind``, or that its flags would refuse.

    Raises:
        OptionError: names the first one.
    """
    own = {item.name: item for item in fields(kind) if item.name not in FREE}
    for name in [*own, *stored]:
        if name not in own or name not in stored:
            state = "missing" if name in own else "unknown"
            raise OptionError(f"the stored option {name!r} is {state}", "those of this version", "start a new run")
        try:
            _check_value(own[name], stored[name])
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise OptionError(
                f"the stored option {name!r} is {_plain(stored[name])[:40]} ({str(error)[:70]})",
                f"one that {_name(own[name])} takes",
                "start a new run",
            ) from error


def to_store(options: Any) -> dict[str, Any]:
    """The options that a resumed run has to share: all but the free ones."""
    return {name: value for name, value in asdict(options).items() if name not in FREE}


def _check_value(item: Field[Any], value: Any) -> None:
    """Refuse what is not just what the command line makes of the same words."""
    parse, choices = item.metadata["parse"], item.metadata["choices"]
    if choices is not None or parse is None or isinstance(item.default, bool):
        right = item.default is None or (type(value) is type(item.default) and (choices is None or value in choices))
    else:
        right = value is item.default is None or parse(str(value)) == value
    if not right:
        raise ValueError("of another kind")


def _name(item: Field[Any]) -> str:
    """What a field is called on the command line."""
    return "--" + item.name.replace("_", "-") if item.metadata["parse"] else str(item.metadata["help"])


def _plain(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _shown(item: Field[Any]) -> str:
    return "" if item.default in (None, "", MISSING) else f" (default: {_plain(item.default)})"
