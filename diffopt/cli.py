"""The command line: ``diffopt COMMAND`` or ``python -m diffopt COMMAND``.

A command is a module ``commands/<command>.py`` whose ``add_command`` adds its flags and says which function runs it.
Such a module imports at its top only what is always installed; what needs optional packages is imported when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; by default those of this process.

    Returns:
        The exit code: 0; 2 after an error, told in one line on stderr; 130 after Ctrl-C.
    """
    parser = build_parser()
    try:
        options = parser.parse_args(argv)
        if options.run is None:
            parser.print_help()
            return 0
        code: int = options.run(options)
        return code
    except SystemExit as stop:  # argparse: --help, --version, or an error that it has told
        return stop.code if isinstance(stop.code, int) else FAILED
    except DiffoptError as error:
        return _tell(str(error))
    except OSError as error:
        where = "a file" if error.filename is None else error.filename
        return _tell(f"{where} cannot be used ({error.strerror or error}), expected a path to write to: check --out")
    except ModuleNotFoundError as error:
        package = OPTIONAL_PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        return _tell(
            f"this command needs the package {package}, which is not installed: pip install {package}, "
            "or install the library with its extra [cli]"
        )
    except KeyboardInterrupt:
        print("diffopt: interrupted", file=sys.stderr)
        return INTERRUPTED


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
    """Tells an error in one line; ``error`` is the method that argparse means to be replaced."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: error: {_one_line(message)}; see {self.prog} --help\n")


def _tell(message: str) -> int:
    print(f"diffopt: error: {_one_line(message)}", file=sys.stderr)
    return FAILED


def _one_line(message: str) -> str:
    return " ".join(message.split())
