"""The command line: ``diffopt COMMAND`` or ``python -m diffopt COMMAND``.

A command is a module ``commands/<command>.py`` whose ``add_command`` adds its flags and says which function runs it.
Such a module imports at its top only what is always installed; what needs optional packages is imported when it runs.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import torch

import diffopt
from diffopt.commands.compare import add_command as add_compare
from diffopt.commands.demo import add_command as add_demo
from diffopt.commands.reproduce import add_command as add_reproduce
from diffopt.commands.train import add_command as add_train
from diffopt.errors import DiffoptError

OPTIONAL_PACKAGES = {
    "einops": "einops",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "sklearn": "scikit-learn",
}
FAILED, INTERRUPTED = 2, 130
TRACEBACK = "DIFFOPT_TRACEBACK"
"""The environment variable that lets errors through as they are."""
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; by default those of this process.

    Returns:
        The exit code: 0; 2 after an error, printed in one line on stderr; 130 after Ctrl-C.
    """
    parser = build_parser()
    try:
        options = parser.parse_args(argv)
        if options.run is None:
            parser.print_help()
            return 0
        code: int = options.run(options)
        print(end="", flush=True)  # a full disk, or a reader that has ended, shows now and not at the end
        return code
    except SystemExit as stop:  # argparse: --help, --version, or an error that it has printed; rich: nobody reads
        return FAILED if stop.code else 0
    except KeyboardInterrupt:
        print("diffopt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        if isinstance(error, BrokenPipeError):
            _leave_standard_output()
        print(f"diffopt: error: {_one_line(str(_explained(error)))}", file=sys.stderr)
        return FAILED


def _explained(error: Exception) -> DiffoptError:
    """What was got, what was expected and what to do, for any error."""
    package = OPTIONAL_PACKAGES.get((getattr(error, "name", None) or "").partition(".")[0])
    reason = f"{type(error).__name__}: {_one_line(str(error))[:200]}"
    if isinstance(error, DiffoptError):
        return error
    if isinstance(error, ModuleNotFoundError) and package is not None:
        return DiffoptError(
            f"the package {package} is not installed",
            "it for this command",
            f"pip install {package}, or install the library with its extra [cli]",
        )
    if isinstance(error, BrokenPipeError):
        return DiffoptError("what reads standard output has ended", "it to read on", "send the output to a file")
    if isinstance(error, OSError):
        where = "a file" if error.filename is None else error.filename
        why = error.strerror or str(error)
        if error.errno in FULL:
            fix = "make room, then continue with --resume"
            return DiffoptError(f"{where} cannot be written ({why})", "room for it", fix)
        return DiffoptError(f"{where} cannot be used ({why})", "a path to write to", "check --out")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        fix = "take fewer tasks, images or steps"
        return DiffoptError(f"there is not enough memory ({reason})", "a smaller problem", fix)
    return DiffoptError(reason, "no such error", f"set {TRACEBACK}=1 to see where it comes from, and report it")


def _leave_standard_output() -> None:
    """Keep Python from writing what is left to a pipe that nobody reads, when it ends."""
    with suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="diffopt", description="Bilevel optimisation and gradient-based meta-learning in PyTorch.")
    parser.add_argument("--version", action="version", version=f"diffopt {diffopt.__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    add_compare(commands)
    add_demo(commands)
    add_reproduce(commands)
    add_train(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Prints an error in one line; ``error`` is the method that argparse means to be replaced."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: error: {_one_line(message)}; see {self.prog} --help\n")


def _one_line(message: str) -> str:
    return " ".join(message.split())
