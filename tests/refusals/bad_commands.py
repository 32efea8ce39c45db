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


def plain(*argv: str) -> Callable[[Path], list[str]]:
    return lambda _: list(argv)


def resume(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], list[str]]:
    """Continue a run from a checkpoint of which something was changed."""

    def argv(folder: Path) -> list[str]:
        shutil.copytree(folder / "run", folder / "copy")
        path = folder / "copy" / "checkpoint.pt"
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
        return train("--resume", out="copy")(folder)

    return argv


def resume_files(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """Continue a run in a folder of which something was changed."""

    def argv(folder: Path) -> list[str]:
        shutil.copytree(folder / "run", folder / "copy")
        change(folder / "copy")
        return train("--resume", out="copy")(folder)

    return argv


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set one entry of a checkpoint; the name ``first`` stands for the first parameter's."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        last = next(iter(content)) if keys[-1] == "first" else keys[-1]
        content[last] = value(content[last]) if callable(value) else value

    return change


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    """Remove one entry of a checkpoint."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[next(iter(content)) if keys[-1] == "first" else keys[-1]]

    return change


def device(path: Path) -> Path:
    """A path at which there is something that is no file."""
    path.symlink_to("/dev/null")
    return path


def flip(folder: Path) -> None:
    """Turn one bit over, in the middle of the checkpoint."""
    content = bytearray((folder / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "checkpoint.pt").write_bytes(content)


WHOLE = r"expected an integer, \d or more; see diffopt .* --help"
COPY = "restore it from a copy, or start without --resume in another --out"
COMMANDS: dict[str, Command] = {
    "unknown_command": Command(plain("fly"), "invalid choice: 'fly' .choose from .*see diffopt --help"),
    "unknown_flag": Command(train("--wibble", "1"), "unrecognized arguments: --wibble 1; see diffopt --help"),
    "abbreviated_flag": Command(train("--inner", "1"), "unrecognized arguments: --inner 1"),
    "flag_without_value": Command(plain("train", "sinusoid", "--steps"), "--steps: expected one argument"),
    "no_problem": Command(plain("train"), "arguments are required: PROBLEM"),
    "unknown_problem": Command(plain("train", "mnist"), "'mnist' .choose from 'omniglot', 'images', 'sinusoid'"),
    "steps_zero": Command(train("--steps", "0"), f"--steps: got '0', {WHOLE}"),
    "steps_fraction": Command(train("--steps", "1.5"), f"--steps: got '1.5', {WHOLE}"),
    "steps_endless": Command(train("--steps", "9" * 5000), f"--steps: got '9{{40}}', {WHOLE}"),
    "seed_negative": Command(train("--seed", "-1"), f"--seed: got '-1', {WHOLE}"),
    "seed_endless": Command(train("--seed", "1" + 30 * "0"), f"--seed: got '10+', {WHOLE}"),
    "threads_zero": Command(train("--threads", "0"), f"--threads: got '0', {WHOLE}"),
    "threads_countless": Command(train("--threads", "1000000"), "got '1000000', expected an integer from 1 to 1024"),
    "tasks_countless": Command(train("--tasks", "1000000000000"), "--tasks: got '10+', expected an integer from 1 to"),
    "filters_countless": Command(plain("train", "images", "--filters", "100000"), "expected an integer from 1 to 1024"),
    "reproduce_threads": Command(plain("reproduce", "bounds", "--threads", "9999"), "expected an integer from 1 to"),
    "one_episode": Command(train("--eval-episodes", "1"), f"--eval-episodes: got '1', {WHOLE}"),
    "rate_negative": Command(train("--inner-lr", "-1"), "--inner-lr: got '-1', expected a number above 0"),
    "rate_nan": Command(train("--meta-lr", "nan"), "--meta-lr: got 'nan', expected a number above 0"),
    "rate_beyond_single_precision": Command(
        train("--inner-lr", "1e308"), "got '1e308', expected a number above 0, 1e.30 at most"
    ),
    "meta_rate_beyond_single_precision": Command(
        train("--meta-lr", "1e300"), "expected a number above 0, 1e.30 at most"
    ),
    "momentum_beyond_single_precision": Command(
        train("--inner-momentum", "1e39"), "a number of 0 or more, 1e.30 at most"
    ),
    "minutes_nan": Command(train("--minutes", "nan"), "got 'nan', expected a number above 0"),
    "momentum_infinite": Command(train("--inner-momentum", "inf"), "got 'inf', expected a number of 0 or more"),
    "no_minutes": Command(train("--minutes", "0"), "--minutes: got '0', expected a number above 0"),
    "unknown_decay": Command(train("--meta-lr-decay", "linear"), "invalid choice: 'linear' .choose from"),
    "unknown_device": Command(
        train("--device", "toaster"), "'toaster' cannot be used here .*expected one that can; try cpu"
    ),
    "device_of_a_package": Command(
        train("--device", "hpu"), "'hpu' cannot be used here .*expected one that can; try cpu"
    ),
    "empty_device": Command(train("--device", ""), "'' cannot be used here .*expected one that can; try cpu"),
    "unknown_estimator": Command(train("--estimator", "magic"), "no estimator 'magic', expected one of reverse, "),
    "estimator_without_number": Command(train("--estimator", "truncated"), "lacks its argument, expected truncated:K"),
    "estimator_with_a_word": Command(train("--estimator", "krylov:x"), "the argument 'x', expected krylov:K"),
    "estimator_too_long": Command(
        train("--estimator", "truncated:9"), "expected at most 1; the inner problem has only"
    ),
    "divergence": Command(
        train("--inner-lr", "1e30"), "NaN or infinite, expected finite numbers.*take fewer or smaller steps"
    ),
    "folder_is_a_file": Command(
        lambda folder: train(out="run/curve.png/x")(folder), "curve.png/x cannot be used .Not a dir.*, expected a path"
    ),
    "out_of_nobody": Command(
        lambda folder: ["train", "sinusoid", *SMALL, "--out", "~no such user/x"],
        "--out is ~no such .*write it without ~",
    ),
    "out_is_a_file": Command(
        lambda folder: ["train", "sinusoid", *SMALL, "--out", str(folder / "run" / "curve.png")],
        "curve.png cannot be used .File exists.*, expected a path",
    ),
    "demo_out_is_a_file": Command(
        lambda folder: ["demo", "--out", str(folder / "run" / "curve.png")], "cannot be used .*, expected a path"
    ),
    "run_in_the_way": Command(train(out="run"), "already holds a run, expected an unused folder; add --resume"),
    "omniglot_no_folder": Command(
        lambda folder: ["train", "omniglot", "--data-dir", str(folder / "none"), "--out", str(folder / "new")],
        "there is no such folder, expected omniglot_28.npz or .*--data-dir",
    ),
    "omniglot_one_class": Command(plain("train", "omniglot", "--way", "1"), f"--way: got '1', {WHOLE}"),
    "omniglot_split": Command(
        plain("train", "omniglot", "--split", "x"), "invalid choice: 'x' .choose from 'official'"
    ),
    "compare_nothing": Command(plain("compare"), "arguments are required: task"),
    "compare_unknown": Command(plain("compare", "nothing"), "'nothing' .choose from 'penalties', 'quadratic'"),
    "compare_no_name": Command(
        plain("compare", "quadratic", "--estimators", "reverse,,"), "no estimator '', expected one"
    ),
    "compare_too_long": Command(
        plain("compare", "quadratic", "--estimators", "truncated:99"), "steps is 99, expected at most 20; the inner"
    ),
    "compare_repeats": Command(plain("compare", "quadratic", "--repeats", "0"), f"--repeats: got '0', {WHOLE}"),
    "compare_picture": Command(
        plain("compare", "quadratic", "--out", "x.foo"), "'x.foo', expected a name that ends in .png"
    ),
    "compare_picture_is_a_device": Command(
        lambda folder: ["compare", "quadratic", "--out", str(device(folder / "x.png"))],
        "x.png' is there and is no file, expected a path to write to",
    ),
    "compare_picture_of_nobody": Command(plain("compare", "quadratic", "--out", "~no such user/x.png"), "without ~"),
    "demo_flag": Command(plain("demo", "--wibble"), "unrecognized arguments: --wibble"),
    "nothing_to_resume": Command(
        train("--resume"), "there is no checkpoint .*expected one; check --out, or start without"
    ),
    "resume_other_option": Command(
        lambda folder: [*train("--resume", out="run")(folder), "--inner-lr", "0.5"],
        "--inner-lr is 0.5, expected 0.01, with which the run to resume was started; leave --inner-lr out",
    ),
    "resume_other_problem": Command(
        lambda folder: ["train", "omniglot", "--out", str(folder / "run"), "--resume"],
        "is of diffopt train sinusoid, expected omniglot; check --out",
    ),
}
CHECKPOINTS: dict[str, Command] = {
    "empty": Command(
        resume_files(lambda p: (p / "checkpoint.pt").write_bytes(b"")), f"readable .*expected a whole one; {COPY[:20]}"
    ),
    "cut_short": Command(
        resume_files(lambda p: (p / "checkpoint.pt").write_bytes((p / "checkpoint.pt").read_bytes()[:-1000])),
        "is not a readable checkpoint .*expected a whole one",
    ),
    "a_text": Command(
        resume_files(lambda p: (p / "checkpoint.pt").write_bytes(b"hello")), "not a readable .*a whole one"
    ),
    "flipped_bit": Command(
        resume_files(flip), rf"not a readable checkpoint .*its checksum does not fit.*, expected a whole one; {COPY}"
    ),
    "another_log": Command(
        resume_files(lambda p: (p / "metrics.jsonl").write_bytes(b"{}\n" * 9)),
        "metrics.jsonl has been changed since .*expected the same lines; restore it from a copy, or start again",
    ),
    "runs_code": Command(
        resume_files(lambda p: torch.save({"format": 1, "params": Path}, p / "checkpoint.pt")),
        "is not a readable checkpoint",
    ),
    "a_tensor": Command(
        resume_files(lambda p: torch.save(torch.ones(2), p / "checkpoint.pt")),
        "not written by diffopt train, expected one",
    ),
    "other_version": Command(
        resume(put("format", value=99)), "another version of diffopt, expected format 1; resume with"
    ),
    "no_format": Command(resume(drop("format")), "not written by diffopt train, expected one"),
    "part_missing": Command(resume(drop("params")), "by another version of diffopt, expected format 1"),
    "other_problem": Command(resume(put("problem", value="x")), "is of diffopt train x, expected sinusoid"),
    "params_list": Command(resume(put("params", value=[1])), rf"its params is list \[1\], expected a dict; {COPY}"),
    "param_missing": Command(resume(drop("params", "first")), r"its params\['.*'\] is missing, expected those of 6"),
    "param_unknown": Command(resume(put("params", "x", value=1)), r"its params\['x'\] is unknown, expected those of 6"),
    "param_shape": Command(
        resume(put("params", "first", value=torch.zeros(7))),
        rf"its params\['.*'\] is .*\(7,\).*expected .*\(40, 1\); {COPY}",
    ),
    "param_dtype": Command(
        resume(put("params", "first", value=torch.Tensor.double)), "float64 .*expected torch.float32"
    ),
    "param_nan": Command(
        resume(put("params", "first", value=lambda x: x / 0)), "is NaN or infinite, expected finite numbers"
    ),
    "no_generator": Command(
        resume(drop("generators", "torch")), r"generators\['torch'\] is NoneType None, expected the state"
    ),
    "generator_of_another_torch": Command(
        resume(put("generators", "torch", value=torch.zeros(3, dtype=torch.uint8))),
        "generators is refused .*expected that of",
    ),
    "optimizer_empty": Command(
        resume(put("optimizer", value={})), "its optimizer is dict .*expected the state_dict of an opt"
    ),
    "optimizer_of_another": Command(
        resume(put("optimizer", "param_groups", value=[])), "its optimizer is refused .*expected"
    ),
    "iteration_negative": Command(resume(put("iteration", value=-1)), "its iteration is int -1, expected an integer"),
    "lines_word": Command(resume(put("lines", value="x")), "its lines is str 'x', expected an integer"),
    "seconds_none": Command(resume(put("seconds", value=None)), "its seconds is NoneType None, expected a number"),
    "options_empty": Command(
        resume(put("options", value={})), "the stored option '.*' is missing, expected those of this"
    ),
    "option_unknown": Command(
        resume(put("options", "x", value=1)), "the stored option 'x' is unknown, expected those of this"
    ),
    "option_out_of_range": Command(
        resume(put("options", "steps", value=0)),
        "the stored option 'steps' is 0 .*expected one that --steps takes; start a new",
    ),
    "log_cut_short": Command(
        resume_files(lambda p: (p / "metrics.jsonl").write_bytes(b"")),
        "has 0 lines, expected [1-9] as when the checkpoint .*",
    ),
    "log_gone": Command(
        resume_files(lambda p: (p / "metrics.jsonl").unlink()), "metrics.jsonl cannot be used .No such file"
    ),
    "log_not_json": Command(
        resume_files(lambda p: (p / "metrics.jsonl").write_bytes(b"{bad\n{}\n")),
        "a line that is no JSON .*expected the log of",
    ),
}
