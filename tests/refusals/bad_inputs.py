"""The list of bad inputs with the messages that answer them: ``python tests/refusals/bad_inputs.py``."""

from __future__ import annotations

import io
import itertools
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import bad_calls
import bad_derivatives
import bad_habits
import bad_losses
import bad_modules
import bad_options
import bad_solvers
import bad_tasks
import bad_trees
from bad_commands import CHECKPOINTS, COMMANDS, Command, train
from bad_row import Row

from diffopt.cli import main as command_line

TABLES = (
    bad_losses,
    bad_derivatives,
    bad_trees,
    bad_options,
    bad_calls,
    bad_solvers,
    bad_habits,
    bad_modules,
    bad_tasks,
)
ROWS: dict[str, Row] = {f"{row.family}: {name}": row for table in TABLES for name, row in table.refused.rows.items()}
COMMAND_LINES: dict[str, Command] = {
    **{f"command_{name}": command for name, command in COMMANDS.items()},
    **{f"checkpoint_{name}": command for name, command in CHECKPOINTS.items()},
}


def finished_run(folder: Path) -> None:
    """Make the run, in ``folder / "run"``, that bad command lines find."""
    code, error = answer(train(out="run")(folder))
    assert code == 0, error


def answer(argv: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what it wrote to stderr."""
    with redirect_stderr(io.StringIO()) as error, redirect_stdout(io.StringIO()):
        code = command_line(argv)
    return code, error.getvalue()


def main() -> None:
    """Print the list."""
    for family, rows in itertools.groupby(ROWS.items(), key=lambda item: item[1].family):
        print(f"\n{family}")
        for name, row in rows:
            print(f"  {name}\n    {message(row)}")
    print("\ncommand line and checkpoints: exit code 2 and one line")
    with TemporaryDirectory() as folder:
        finished_run(Path(folder))
        for name, command in COMMAND_LINES.items():
            print(f"  {name}\n    {told(command, Path(folder))}")
    print(f"\n{len(ROWS)} bad inputs and {len(COMMAND_LINES)} bad command lines")


def message(row: Row) -> str:
    """The error that a bad input is answered by."""
    try:
        row.call()
    except row.error as error:
        return f"{type(error).__name__}: {error}"
    return "accepted silently"


def told(command: Command, run: Path) -> str:
    """The line that a bad command line is answered by, its folder called DIR."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "run").symlink_to(run / "run")
        return answer(command.argv(Path(folder)))[1].strip().replace(folder, "DIR")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
