"""The files of a run: damage is refused, nothing left over is overwritten, and one process writes at a time."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_experiment import TOY

from diffopt.cli import main
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.checkpoint import MetricsLog
from diffopt.experiments.framework.files import CheckpointError, load_tensors, replacing, save_tensors
from diffopt.experiments.framework.unit_context import Work

TRAIN = [
    *("train", "sinusoid", "--iterations", "6", "--eval-every", "4", "--eval-episodes", "2", "--tasks", "1"),
    *("--steps", "1", "--eval-steps", "1", "--threads", "1", "--log-every", "1"),
]
CONTENT = {"numbers": torch.arange(12.0), "words": ["one", "two"], "more": {"half": torch.ones(3, dtype=torch.half)}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert main([*TRAIN, "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture
def toy(monkeypatch):
    """Makes the toy the only experiment there is; returns a way to run it."""
    monkeypatch.setattr(catalogue, "experiment", lambda name: TOY)
    monkeypatch.setattr(catalogue, "NAMES", ("toy",))
    return lambda out, *more: main(["reproduce", "toy", "--out", str(out), *more])


@pytest.fixture
def refused(capsys):
    """Runs a command on a folder that it must refuse, in one line and without a change; returns the line."""

    def run(out: Path, *argv: str) -> str:
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        capsys.readouterr()
        assert main([*argv, "--out", str(out)]) == 2
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        error = capsys.readouterr().err
        assert re.fullmatch(r"diffopt[^\n]*: error: [^\n]+\n", error), error
        return error

    return run


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def same(content: object) -> bool:
    assert isinstance(content, dict)
    tensors = [(content["numbers"], CONTENT["numbers"]), (content["more"]["half"], CONTENT["more"]["half"])]
    return content["words"] == CONTENT["words"] and all(torch.equal(a, b) for a, b in tensors)


def number_changed(path: Path, line: int) -> None:
    """Change the last digit but one of a line."""
    lines = path.read_text().splitlines(keepends=True)
    found = list(re.finditer(r"\d", lines[line].partition('"checksum"')[0]))[-1].start()
    lines[line] = lines[line][:found] + str((int(lines[line][found]) + 5) % 10) + lines[line][found + 1 :]
    path.write_text("".join(lines))


# --------------------------------------------------------------------------- damage


def test_a_sealed_file_is_read_by_torch_and_comes_back_the_same(tmp_path):
    save_tensors(CONTENT, tmp_path / "a.pt")
    assert same(load_tensors(tmp_path / "a.pt"))
    assert same(torch.load(tmp_path / "a.pt", weights_only=True))


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    save_tensors(CONTENT, tmp_path / "a.pt")
    content, bits = (tmp_path / "a.pt").read_bytes(), random.Random(0)
    for place in range(len(content)):
        (tmp_path / "a.pt").write_bytes(flipped(content, place, bits.randrange(8)))
        with pytest.raises(CheckpointError, match=r"not a readable checkpoint .*expected a whole one"):
            load_tensors(tmp_path / "a.pt")


def test_a_file_cut_short_or_grown_is_refused(tmp_path):
    save_tensors(CONTENT, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    for other in [*(content[:size] for size in range(0, len(content), 7)), content[:-79], content + b"\0"]:
        (tmp_path / "a.pt").write_bytes(other)
        with pytest.raises(CheckpointError, match="not a readable checkpoint"):
            load_tensors(tmp_path / "a.pt")


def test_a_flipped_bit_in_a_file_of_an_earlier_version_is_refused_or_harmless(tmp_path):
    """Such a file has no seal; its members' own checksums are looked at, which torch does not."""
    packed, bits, refused = io.BytesIO(), random.Random(1), 0
    torch.save(CONTENT, packed)
    content = packed.getvalue()
    (tmp_path / "a.pt").write_bytes(content)
    assert same(load_tensors(tmp_path / "a.pt"))
    for place in range(len(content)):
        (tmp_path / "a.pt").write_bytes(flipped(content, place, bits.randrange(8)))
        try:
            assert same(load_tensors(tmp_path / "a.pt"))  # between the members lie bytes that mean nothing
        except CheckpointError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02}q\x00.", b"PK\x05\x06" + bytes(18), b"\0" * 1000])
def test_what_is_no_checkpoint_at_all(copy, refused, content):
    (copy / "checkpoint.pt").write_bytes(content)
    error = refused(copy, "train", "sinusoid", "--resume")
    assert "is not a readable checkpoint" in error
    assert "delete" not in error  # who does, and starts anew in the same folder, would lose the log


def test_one_flipped_bit_of_a_parameter_is_not_resumed(copy, refused):
    path = copy / "checkpoint.pt"
    weights = next(iter(torch.load(path, weights_only=True)["params"].values()))
    content = path.read_bytes()
    path.write_bytes(flipped(content, content.index(weights.numpy().tobytes()) + 3, 0))
    assert "checksum does not fit" in refused(copy, "train", "sinusoid", "--resume")


@pytest.mark.parametrize("line", [0, 3, -1])
def test_a_changed_number_in_the_log_of_a_training_is_not_resumed(copy, refused, line):
    number_changed(copy / "metrics.jsonl", line)
    assert "metrics.jsonl has been changed" in refused(copy, "train", "sinusoid", "--resume")


def test_the_log_of_another_training_is_not_resumed(copy, refused, tmp_path):
    assert main([*TRAIN, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    shutil.copy(tmp_path / "other" / "metrics.jsonl", copy / "metrics.jsonl")
    assert "metrics.jsonl has been changed" in refused(copy, "train", "sinusoid", "--resume")


def test_a_training_of_an_earlier_version_is_resumed(copy):
    """Its checkpoint has neither a seal nor the checksum of the log."""
    content = torch.load(copy / "checkpoint.pt", weights_only=True)
    del content["log"]
    torch.save(content, copy / "checkpoint.pt")
    assert main(["train", "sinusoid", "--resume", "--out", str(copy)]) == 0


# --------------------------------------------------------------------------- what a reproduction was computed under


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"threads": 2}, {"seed": "0"}, {"threads": -4}, {"threads": 10**6}, {"scale": "x"}, {"changed": [1]}],
    ids=str,
)
def test_a_changed_header_is_not_resumed(toy, refused, tmp_path, change):
    assert toy(tmp_path) == 0
    header = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**header, **change}))
    assert "run.json" in refused(tmp_path, "reproduce", "toy", "--resume")
    changed = {**header, **change}
    del changed["checksum"]  # as if of an earlier version; the lines know better
    (tmp_path / "run.json").write_text(json.dumps(changed))
    assert "run.json" in refused(tmp_path, "reproduce", "toy", "--resume")


@pytest.mark.parametrize("change", [{"seed": 1}, {"threads": 2}, {"seed": 7, "threads": 3}], ids=str)
def test_a_changed_header_is_not_resumed_before_any_unit_is_finished(toy, refused, tmp_path, change):
    assert toy(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text("")
    header = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**header, **change}))
    assert "run.json has been changed since the run was started" in refused(tmp_path, "reproduce", "toy", "--resume")
    (tmp_path / "run.json").write_text(json.dumps(dict(reversed(header.items())), indent=3))  # laid out anew: the same
    assert toy(tmp_path, "--resume") == 0


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_files_of_two_runs_are_not_mixed(toy, refused, tmp_path, name):
    assert toy(tmp_path / "a") == toy(tmp_path / "b", "--seed", "1") == 0
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    assert "computed under another run.json" in refused(tmp_path / "a", "reproduce", "toy", "--resume")


@pytest.mark.parametrize("line", [0, 2, 3])
def test_a_changed_number_in_the_log_of_a_reproduction_is_not_resumed(toy, refused, tmp_path, line):
    assert toy(tmp_path) == 0
    number_changed(tmp_path / "metrics.jsonl", line)
    assert f"line {line + 1}, has another checksum: it was changed" in refused(tmp_path, "reproduce", "toy", "--resume")


@pytest.mark.parametrize("lost", ["unit", "values", "seconds", "processor_seconds", "checksum"])
def test_a_line_that_lost_a_part_is_not_resumed(toy, refused, tmp_path, lost):
    assert toy(tmp_path) == 0
    log = tmp_path / "metrics.jsonl"
    row = json.loads(log.read_text().splitlines()[0])
    del row[lost]
    log.write_text(json.dumps(row) + "\n")
    assert "line 1, " in refused(tmp_path, "reproduce", "toy", "--resume")


def test_a_reproduction_of_an_earlier_version_is_resumed(toy, tmp_path):
    """Neither its header nor its lines have checksums; a line that cannot be one is refused as ever."""
    assert toy(tmp_path) == 0
    header, log = tmp_path / "run.json", tmp_path / "metrics.jsonl"
    bare = [{k: v for k, v in json.loads(line).items() if k != "checksum"} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(row) + "\n" for row in bare[:2]))
    header.write_text(json.dumps({k: v for k, v in json.loads(header.read_text()).items() if k != "checksum"}))
    assert toy(tmp_path, "--resume") == 0
    assert len(log.read_text().splitlines()) == 4
    log.write_text('{"unit": "draw 0", "seconds": 1}\n')
    assert toy(tmp_path, "--resume") == 2


def test_the_state_of_another_run_is_not_gone_on_from(tmp_path):
    Work(0, unit="a", store=tmp_path / "a.pt", run="x").save({"x": 1})
    assert Work(0, unit="a", store=tmp_path / "a.pt", run="x").saved() == {"x": 1}
    with pytest.raises(CheckpointError, match=r"by a run with another run\.json, expected one of this run; delete it"):
        Work(0, unit="a", store=tmp_path / "a.pt", run="y").saved()
    save_tensors({"unit": "a", "seconds": "x", "state": {}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="expected the state of a unit"):
        Work(0, unit="a", store=tmp_path / "a.pt").saved()


# --------------------------------------------------------------------------- nothing is overwritten


@pytest.mark.parametrize("kept", ["all of it", "a part of a line"])
def test_a_log_without_a_checkpoint_is_not_overwritten(copy, refused, kept):
    (copy / "checkpoint.pt").unlink()
    if kept != "all of it":
        (copy / "metrics.jsonl").write_text('{"kind": "tr')
    assert "metrics.jsonl is left of a run" in refused(copy, *TRAIN, "--seed", "5")


@pytest.mark.parametrize("left", ["metrics.jsonl", "results.json"])
def test_what_is_left_of_a_reproduction_is_not_overwritten(toy, refused, tmp_path, left):
    assert toy(tmp_path) == 0
    for name in {"run.json", "metrics.jsonl", "results.json"} - {left}:
        (tmp_path / name).unlink()
    assert f"{left} is left of a run" in refused(tmp_path, "reproduce", "toy")


def test_an_empty_log_is_the_trace_of_a_kill_and_no_loss(toy, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").touch()
    assert main([*TRAIN, "--out", str(tmp_path / "a")]) == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").touch()
    assert toy(tmp_path / "b") == 0


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(error: BaseException) -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise error

    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")):
        with pytest.raises(type(error)) as caught:
            fail(error)
        assert [item.name for item in tmp_path.iterdir()] == ["a.json"]
        assert path.read_text() == "old"
        assert getattr(caught.value, "filename", str(path)) == str(path)
    os.mkfifo(tmp_path / "a.json.partial")  # to open it would wait for ever
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"


# --------------------------------------------------------------------------- one process at a time


def test_while_one_process_writes_another_is_refused(toy, refused, copy, tmp_path):
    assert toy(tmp_path / "toy") == 0
    for folder, argv in (
        (copy, ["train", "sinusoid", "--resume"]),
        (tmp_path / "toy", ["reproduce", "toy", "--resume"]),
    ):
        log = MetricsLog(folder / "metrics.jsonl", new=False)
        assert "another process is writing" in refused(folder, *argv)
        log.close()
        assert main([*argv, "--out", str(folder)]) == 0
    (tmp_path / "new").mkdir()
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl", new=True)
    assert "another process is writing" in refused(tmp_path / "new", *TRAIN)
    assert "another process is writing" in refused(tmp_path / "new", "reproduce", "toy")
    log.close()


def test_a_refused_command_leaves_no_lock(copy, refused):
    for _ in range(2):
        assert "--seed is 3, expected 0" in refused(copy, "train", "sinusoid", "--resume", "--seed", "3")
    assert main(["train", "sinusoid", "--resume", "--out", str(copy)]) == 0


@pytest.mark.parametrize(("rank", "allowed"), [("1", False), ("7", False), ("0", True), ("", True), ("first", True)])
def test_only_the_first_process_of_a_job_runs(toy, capsys, monkeypatch, tmp_path, rank, allowed):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "8")
    codes = [main([*TRAIN, "--out", str(tmp_path / "a")]), toy(tmp_path / "b")]
    assert codes == ([0, 0] if allowed else [2, 2])
    if not allowed:
        assert f"RANK is {rank}: this command is one process of several" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint.pt"])
def test_a_pipe_in_the_folder_of_a_run_is_not_waited_for(copy, refused, name, tmp_path):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert main(["train", "sinusoid", "--resume", "--out", str(copy)]) == 2
    (tmp_path / "new").mkdir()
    os.mkfifo(tmp_path / "new" / name)
    assert main([*TRAIN, "--out", str(tmp_path / "new")]) == 2


# --------------------------------------------------------------------------- a full disk

FULL = """
import resource, signal, sys
from diffopt.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for number, limit in enumerate(map(int, sys.argv[2].split(","))):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    assert main([*sys.argv[3:], "--out", f"{sys.argv[1]}/{number}"]) == 2
"""


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on_when_there_is_room(trained, tmp_path):
    """No file can grow beyond a limit: it holds no checkpoint, one without moments, any checkpoint but no picture."""
    checkpoint, picture = ((trained / name).stat().st_size for name in ("checkpoint.pt", "curve.png"))
    assert picture > checkpoint + 1000
    limits = {"checkpoint.pt": 100, "checkpoint.pt ": checkpoint - 1, "curve.png": checkpoint + 1000}
    argv = [sys.executable, "-c", FULL, str(tmp_path), ",".join(map(str, limits.values())), *TRAIN, "--save-every", "0"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, name in zip(done.stderr.splitlines(), limits, strict=True):
        assert re.search(rf"error: .*{name.strip()} cannot be written .*expected room for it; make room, then", line)
    assert not list(tmp_path.rglob("*.partial"))
    assert main([*TRAIN, "--out", str(tmp_path / "0")]) == 0  # nothing but an empty log was left
    for number in (1, 2):
        assert main(["train", "sinusoid", "--resume", "--out", str(tmp_path / str(number))]) == 0
    expected = torch.load(trained / "checkpoint.pt", weights_only=True)["params"]
    for out in tmp_path.iterdir():
        params = torch.load(out / "checkpoint.pt", weights_only=True)["params"]
        assert all(torch.equal(params[name], value) for name, value in expected.items())


FULL_TOY = """
import resource, signal, sys
import toy_experiment
from diffopt.cli import main
from diffopt.experiments.framework import catalogue
catalogue.experiment = lambda name: toy_experiment.TOY
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(["reproduce", "toy", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_a_full_disk_stops_a_reproduction_within_a_line_and_it_goes_on(toy, tmp_path):
    assert toy(tmp_path / "whole") == 0
    log = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    header = (tmp_path / "whole" / "run.json").stat().st_size
    limit = len(log) - 100
    assert limit > header
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for name, size in (("none", header - 1), ("part", limit)):
        argv = [sys.executable, "-c", FULL_TOY, str(size), "--out", str(tmp_path / name)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 2
        assert re.fullmatch(r"diffopt: error: \S+ cannot be written [^\n]+\n", done.stderr), done.stderr
    assert not (tmp_path / "none" / "run.json").exists()
    assert toy(tmp_path / "none") == 0
    cut = (tmp_path / "part" / "metrics.jsonl").read_bytes()
    assert cut
    assert not cut.endswith(b"\n")
    assert toy(tmp_path / "part", "--resume") == 0
    values = [
        [json.loads(line)["values"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "part", "none")
    ]
    assert values[0] == values[1] == values[2]
