"""Bad inputs: the command line, and checkpoints that cannot be continued from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SMALL = [
    *("--tasks", "1", "--steps", "1", "--eval-steps", "1", "--eval-episodes", "2", "--threads", "1"),
    *("--iterations", "1"),
]


@dataclass(frozen=True)
class Command:
    """One bad command line: given a folder that holds a finished run in ``run``, its arguments."""

    argv: Callable[[Path], list[str]]
    says: str


def train(*more: str, out: str = "new") -> Callable[[Path], list[str]]:
    return lambda folder: ["train", "sinusoid", "--out", str(folder / out), *SMALL, *more]


def continued(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """Continue a run in a folder of which something was changed."""

    def argv(folder: Path) -> list[str]:
        shutil.copytree(folder / "run", folder / "copy")
        change(folder / "copy")
        return train("--resume", out="copy")(folder)

    return argv


COMMANDS: dict[str, Command] = {}
CHECKPOINTS: dict[str, Command] = {}


def line(says: str, *argv: str) -> None:
    """A row: these arguments."""
    COMMANDS[" ".join(argv)[:60]] = Command(lambda folder: list(argv), says)


def trained(says: str, *argv: str) -> None:
    """A row: these arguments for a short training of sinusoids."""
    COMMANDS["train sinusoid " + " ".join(argv)[:45]] = Command(train(*argv), says)


def command(says: str) -> Callable[[Any], Any]:
    """A row: the arguments that this function makes of the folder."""

    def add(argv: Callable[[Path], list[str]]) -> Any:
        COMMANDS[argv.__name__] = Command(argv, says)
        return argv

    return add


def damaged(says: str) -> Callable[[Any], Any]:
    """A row: a run to be continued whose folder this function has changed."""

    def add(change: Callable[[Path], object]) -> Any:
        CHECKPOINTS[change.__name__] = Command(continued(change), says)
        return change

    return add


def _rewritten(says: str, name: str, keys: tuple[str, ...], change: Callable[[Any, str], object]) -> None:
    """A row: a run to be continued of whose checkpoint one entry was changed; ``first`` is the first parameter's."""

    def rewrite(folder: Path) -> None:
        content = torch.load(folder / "checkpoint.pt", weights_only=True)
        entries = content
        for key in keys[:-1]:
            entries = entries[key]
        change(entries, next(iter(entries)) if keys[-1] == "first" else keys[-1])
        torch.save(content, folder / "checkpoint.pt")

    CHECKPOINTS[f"{name} {'.'.join(keys)}"] = Command(continued(rewrite), says)


def put(says: str, *keys: str, value: Any) -> None:
    """A row: this entry has another value, or what a function makes of its own."""

    def change(entries: Any, key: str) -> None:
        entries[key] = value(entries[key]) if callable(value) else value

    name = f"put {getattr(value, '__name__', '') or ' '.join(repr(value).split())[:20]} into"
    _rewritten(says, name, keys, change)


def drop(says: str, *keys: str) -> None:
    """A row: this entry is missing."""
    _rewritten(says, "drop", keys, lambda entries, key: entries.pop(key))


WHOLE = r"expected an integer, \d or more; see diffopt .* --help"
LARGEST = "expected an integer from 1 to"
ABOVE = "expected a number above 0"
SINGLE = "a number above 0, 1e.30 at most"
DEVICE = "cannot be used here .*expected one that can; try cpu"

line("invalid choice: 'fly' .choose from .*see diffopt --help", "fly")
line("--steps: expected one argument", "train", "sinusoid", "--steps")
line("arguments are required: PROBLEM", "train")
line("'mnist' .choose from 'omniglot', 'images', 'sinusoid'", "train", "mnist")
line("expected an integer from 1 to 1024", "train", "images", "--filters", "100000")
line(LARGEST, "reproduce", "bounds", "--threads", "9999")
line(f"--way: got '1', {WHOLE}", "train", "omniglot", "--way", "1")
line("invalid choice: 'x' .choose from 'official'", "train", "omniglot", "--split", "x")
line("arguments are required: task", "compare")
line("'nothing' .choose from 'penalties', 'quadratic'", "compare", "nothing")
line("no estimator '', expected one", "compare", "quadratic", "--estimators", "reverse,,")
line("steps is 99, expected at most 20; the inner", "compare", "quadratic", "--estimators", "truncated:99")
line(f"--repeats: got '0', {WHOLE}", "compare", "quadratic", "--repeats", "0")
line("'x.foo', expected a name that ends in .png", "compare", "quadratic", "--out", "x.foo")
line("without ~", "compare", "quadratic", "--out", "~no such user/x.png")
line("unrecognized arguments: --wibble", "demo", "--wibble")

trained("unrecognized arguments: --wibble 1; see diffopt --help", "--wibble", "1")
trained("unrecognized arguments: --inner 1", "--inner", "1")
trained(f"--steps: got '0', {WHOLE}", "--steps", "0")
trained(f"--steps: got '1.5', {WHOLE}", "--steps", "1.5")
trained(f"--steps: got '9{{40}}', {WHOLE}", "--steps", "9" * 5000)
trained(f"--seed: got '-1', {WHOLE}", "--seed", "-1")
trained(f"--seed: got '10+', {WHOLE}", "--seed", "1" + 30 * "0")
trained(f"--threads: got '0', {WHOLE}", "--threads", "0")
trained("got '1000000', expected an integer from 1 to 1024", "--threads", "1000000")
trained(f"--tasks: got '10+', {LARGEST}", "--tasks", "1000000000000")
trained(f"--eval-episodes: got '1', {WHOLE}", "--eval-episodes", "1")
trained(f"--inner-lr: got '-1', {ABOVE}", "--inner-lr", "-1")
trained(f"--meta-lr: got 'nan', {ABOVE}", "--meta-lr", "nan")
trained(f"got '1e308', expected {SINGLE}", "--inner-lr", "1e308")
trained(f"expected {SINGLE}", "--meta-lr", "1e300")
trained("a number of 0 or more, 1e.30 at most", "--inner-momentum", "1e39")
trained("got 'inf', expected a number of 0 or more", "--inner-momentum", "inf")
trained(f"got 'nan', {ABOVE}", "--minutes", "nan")
trained(f"--minutes: got '0', {ABOVE}", "--minutes", "0")
trained("invalid choice: 'linear' .choose from", "--meta-lr-decay", "linear")
trained(f"'toaster' {DEVICE}", "--device", "toaster")
trained(f"'hpu' {DEVICE}", "--device", "hpu")
trained(f"'' {DEVICE}", "--device", "")
trained("no estimator 'magic', expected one of reverse, ", "--estimator", "magic")
trained("lacks its argument, expected truncated:K", "--estimator", "truncated")
trained("the argument 'x', expected krylov:K", "--estimator", "krylov:x")
trained("expected at most 1; the inner problem has only", "--estimator", "truncated:9")
trained("NaN or infinite, expected finite numbers.*take fewer or smaller steps", "--inner-lr", "1e30")
trained("there is no checkpoint .*expected one; check --out, or start without", "--resume")


@command("curve.png/x cannot be used .Not a dir.*, expected a path")
def out_in_a_file(folder: Path) -> list[str]:
    return train(out="run/curve.png/x")(folder)


@command("--out is ~no such .*write it without ~")
def out_of_nobody(folder: Path) -> list[str]:
    return ["train", "sinusoid", *SMALL, "--out", "~no such user/x"]


@command("curve.png cannot be used .File exists.*, expected a path")
def out_is_a_file(folder: Path) -> list[str]:
    return train(out="run/curve.png")(folder)


@command("cannot be used .*, expected a path")
def demo_out_is_a_file(folder: Path) -> list[str]:
    return ["demo", "--out", str(folder / "run" / "curve.png")]


@command("already holds a run, expected an unused folder; add --resume")
def run_in_the_way(folder: Path) -> list[str]:
    return train(out="run")(folder)


@command("there is no such folder, expected omniglot_28.npz or .*--data-dir")
def omniglot_no_folder(folder: Path) -> list[str]:
    return ["train", "omniglot", "--data-dir", str(folder / "none"), "--out", str(folder / "new")]


@command("x.png' is there and is no file, expected a path to write to")
def compare_picture_is_a_device(folder: Path) -> list[str]:
    (folder / "x.png").symlink_to("/dev/null")
    return ["compare", "quadratic", "--out", str(folder / "x.png")]


@command("--inner-lr is 0.5, expected 0.01, with which the run to resume was started; leave --inner-lr out")
def resume_other_option(folder: Path) -> list[str]:
    return [*train("--resume", out="run")(folder), "--inner-lr", "0.5"]


@command("is of diffopt train sinusoid, expected omniglot; check --out")
def resume_other_problem(folder: Path) -> list[str]:
    return ["train", "omniglot", "--out", str(folder / "run"), "--resume"]


# --------------------------------------------------------------------------- damaged runs

COPY = "restore it from a copy, or start without --resume in another --out"
UNREADABLE = "is not a readable checkpoint"
FLIPPED = rf"not a readable checkpoint .*its checksum does not fit.*, expected a whole one; {COPY}"


@damaged(f"readable .*expected a whole one; {COPY[:20]}")
def empty(run: Path) -> None:
    (run / "checkpoint.pt").write_bytes(b"")


@damaged(f"{UNREADABLE} .*expected a whole one")
def cut_short(run: Path) -> None:
    (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:-1000])


@damaged("not a readable .*a whole one")
def a_text(run: Path) -> None:
    (run / "checkpoint.pt").write_bytes(b"hello")


@damaged(FLIPPED)
def flipped_bit(run: Path) -> None:
    """In the middle of the checkpoint."""
    content = bytearray((run / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (run / "checkpoint.pt").write_bytes(content)


@damaged("metrics.jsonl has been changed since .*expected the same lines; restore it from a copy, or start again")
def another_log(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"{}\n" * 9)


@damaged(UNREADABLE)
def runs_code(run: Path) -> None:
    torch.save({"format": 1, "params": Path}, run / "checkpoint.pt")


@damaged("not written by diffopt train, expected one")
def a_tensor(run: Path) -> None:
    torch.save(torch.ones(2), run / "checkpoint.pt")


@damaged("has 0 lines, expected [1-9] as when the checkpoint .*")
def log_cut_short(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"")


@damaged("metrics.jsonl cannot be used .No such file")
def log_gone(run: Path) -> None:
    (run / "metrics.jsonl").unlink()


@damaged("a line that is no JSON .*expected the log of")
def log_not_json(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"{bad\n{}\n")


def divided(x: torch.Tensor) -> torch.Tensor:
    return x / 0


VERSION = "another version of diffopt, expected format 1"
OTHER_STATE = torch.zeros(3, dtype=torch.uint8)
drop("not written by diffopt train, expected one", "format")
drop(f"by {VERSION}", "params")
drop(r"its params\['.*'\] is missing, expected those of 6", "params", "first")
drop(r"generators\['torch'\] is NoneType None, expected the state", "generators", "torch")
put(f"{VERSION}; resume with", "format", value=99)
put("is of diffopt train x, expected sinusoid", "problem", value="x")
put(rf"its params is list \[1\], expected a dict; {COPY}", "params", value=[1])
put(r"its params\['x'\] is unknown, expected those of 6", "params", "x", value=1)
put(rf"its params\['.*'\] is .*\(7,\).*expected .*\(40, 1\); {COPY}", "params", "first", value=torch.zeros(7))
put("float64 .*expected torch.float32", "params", "first", value=torch.Tensor.double)
put("is NaN or infinite, expected finite numbers", "params", "first", value=divided)
put("generators is refused .*expected that of", "generators", "torch", value=OTHER_STATE)
put("its optimizer is dict .*expected the state_dict of an opt", "optimizer", value={})
put("its optimizer is refused .*expected", "optimizer", "param_groups", value=[])
put("its iteration is int -1, expected an integer", "iteration", value=-1)
put("its lines is str 'x', expected an integer", "lines", value="x")
put("its seconds is NoneType None, expected a number", "seconds", value=None)
put("the stored option '.*' is missing, expected those of this", "options", value={})
put("the stored option 'x' is unknown, expected those of this", "options", "x", value=1)
put("the stored option 'steps' is 0 .*expected one that --steps takes; start a new", "options", "steps", value=0)
