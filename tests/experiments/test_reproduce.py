"""``diffopt reproduce``: the frame, on a toy experiment."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import toy_experiment
from killed import killed_twice
from limits import PATIENCE
from toy_experiment import TOY

from diffopt.cli import main
from diffopt.experiments.framework import catalogue, reproduction, runner
from diffopt.experiments.framework import unit_context as work_module
from diffopt.experiments.framework.experiment import Unit
from diffopt.experiments.framework.unit_context import Work


@pytest.fixture
def toy(monkeypatch):
    """Makes the toy the only experiment there is."""
    monkeypatch.setattr(catalogue, "experiment", lambda name: TOY)
    monkeypatch.setattr(catalogue, "NAMES", ("toy",))


def reproduce(out: Path, *more: str) -> int:
    return main(["reproduce", "toy", "--out", str(out), *more])


def content(out: Path) -> list[object]:
    """The log without its times, and what was found."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    return [[(line["unit"], line["values"]) for line in lines], results["tables"], results["claims"]]


def finished(out: Path) -> list[str]:
    return [json.loads(line)["unit"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_files_and_tells_them(toy, tmp_path, capsys):
    assert reproduce(tmp_path, "--seed", "3") == 0
    told = capsys.readouterr().out
    assert "what was drawn" in told
    assert "it trains" in told
    assert "A note." in told
    assert "Left out" not in told
    assert finished(tmp_path) == ["draw 0", "draw 1", "draw 2", "train"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["command"] == "diffopt reproduce toy --seed 3 --threads 1"
    assert results["pictures"] == ["toy.png"]
    assert results["left_out"] == []
    assert str(tmp_path) not in json.dumps(results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "results.json", "run.json", "toy.png"]


def test_units_share_the_numbers_of_a_label_and_the_seed_decides_them(toy, tmp_path):
    for seed in ("0", "0", "1"):
        assert reproduce(tmp_path / f"{seed} {len(list(tmp_path.iterdir()))}", "--quick", "--seed", seed) == 0
    same, again, other = (dict(content(folder)[0])["draw 0"] for folder in sorted(tmp_path.iterdir()))
    assert same == again != other
    rows = [toy_experiment.draw(TOY.quick, number, Work(0)) for number in (0, 1)]
    assert rows[0]["shared"] == rows[1]["shared"]
    assert rows[0]["own"] != rows[1]["own"]


def test_settings_can_be_changed(toy, tmp_path, fails):
    assert reproduce(tmp_path, "--quick", "--set", "draws=2", "--set", "iterations=1") == 0
    assert finished(tmp_path) == ["draw 0", "draw 1", "train"]
    command = json.loads((tmp_path / "results.json").read_text())["command"]
    assert "--quick --set draws=2 --set iterations=1" in command
    out = ("toy", "--out", str(tmp_path / "other"))
    assert "expected SETTING=VALUE, with one of draws, iterations" in fails("reproduce", *out, "--set", "nonsense=1")
    assert "expected SETTING=VALUE" in fails("reproduce", *out, "--set", "draws")
    assert "--set draws=-1 does not fit (got '-1', expected an integer, 0 or more), expected a value of draws" in fails(
        "reproduce", *out, "--set", "draws=-1"
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    program = [*toy_experiment.program(), "reproduce", "toy", "--save-every", "0"]
    argv = [*program, "--set", "iterations=100", "--set", "seconds=0.01", "--out"]
    subprocess.run([*argv, str(tmp_path / "whole")], stdout=subprocess.DEVNULL, check=True)
    killed_twice([*argv, str(tmp_path / "killed")], tmp_path / "killed", (".jsonl", ".pt"), 0.5)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.pt"))


def test_a_line_cut_short_is_done_again(toy, tmp_path):
    assert reproduce(tmp_path / "whole") == 0
    assert reproduce(tmp_path / "cut") == 0
    log = tmp_path / "cut" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert reproduce(tmp_path / "cut", "--resume") == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


class Clock:
    """Time that passes only while something sleeps, so that a busy machine does not matter."""

    process_time = staticmethod(time.process_time)

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock of the frame and of the toy."""
    clock = Clock()
    for module in (runner, reproduction, work_module, toy_experiment):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_budget_is_kept_and_what_was_left_out_is_told(toy, clock, tmp_path, capsys):
    assert reproduce(tmp_path, "--set", "seconds=0.1", "--set", "draws=100", "--minutes", "0.05") == 0
    # a fifth of three seconds is kept for pictures; the last of the rest goes to the unit that can be stopped
    assert 2.4 <= clock.now - 1000 < 3
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Left out for want of time \(\d+\): draw 2\d, .*draw 99, train; go on with --resume", told)
    results = json.loads((tmp_path / "results.json").read_text())
    assert 20 < len(finished(tmp_path)) == 101 - len(results["left_out"])
    assert results["minutes"] == pytest.approx(0.1 * len(finished(tmp_path)) / 60, abs=0.006)


def test_a_long_unit_stops_in_time_and_goes_on_where_it_stopped(toy, clock, tmp_path):
    slow = ("--set", "seconds=0.02", "--set", "draws=0")
    assert reproduce(tmp_path / "whole", *slow) == 0
    out, began = tmp_path / "stopped", clock.now
    assert reproduce(out, *slow, "--minutes", "0.008") == 0
    assert clock.now - began < 0.008 * 60
    assert finished(out) == []
    assert json.loads((out / "results.json").read_text())["claims"][0]["answer"] == "not measured"
    (state,) = out.glob("train*.pt")
    assert 15 < len(Work(0, unit="train", store=state).saved()["losses"]) < 25
    assert reproduce(out, "--resume") == 0
    assert content(out) == content(tmp_path / "whole")
    assert not list(out.glob("*.pt"))
    times = [json.loads((folder / "metrics.jsonl").read_text())["seconds"] for folder in (out, tmp_path / "whole")]
    assert times == pytest.approx([0.8, 0.8], abs=0.002)  # forty times 0.02: the time before the stop counts


def test_a_unit_that_cannot_end_in_time_is_not_begun(toy, clock, tmp_path, monkeypatch):
    begun = []

    def sleep(number, work):
        begun.append(number)
        clock.sleep(0.4)
        return {"own": [], "shared": [0.0]}

    units = [Unit(str(number), lambda work, number=number: sleep(number, work), cost=1 + number) for number in range(3)]
    monkeypatch.setattr(catalogue, "experiment", lambda name: replace(TOY, units=lambda settings: units))
    assert reproduce(tmp_path, "--minutes", "0.02") == 0  # 0.96 s to work: 0.4, then 0.8 expected, which is too long
    assert begun == [0]


def test_ctrl_c_saves_and_says_how_to_go_on(toy, tmp_path):
    program = [*toy_experiment.program(), "reproduce", "toy", "--out", str(tmp_path)]
    argv = [*program, "--set", "iterations=2000", "--set", "seconds=0.01", "--save-every", "0"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert f"3 of 4 units are finished; continue with: diffopt reproduce toy --out {tmp_path} --resume" in error
    assert len(list(tmp_path.glob("*.pt"))) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--full"], "the scale is full, expected standard, with which the run to resume was started"),
        (["--seed", "1"], "--seed is 1, expected 0, with which"),
        (["--threads", "2"], "--threads is 2, expected 1, with which"),
        (["--set", "draws=1"], r"--set is .*draws=1.*, expected \(\), with which"),
    ],
)
def test_a_run_is_resumed_only_under_its_own_settings(toy, tmp_path, fails, given, message):
    assert reproduce(tmp_path) == 0
    assert re.search(message, fails("reproduce", "toy", "--out", str(tmp_path), "--resume", *given))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("torch", "1.0", "torch is .* here, expected 1.0 as in the run to resume"),
        ("settings", {"draws": 1}, "settings is .* here, expected .*'draws': 1.* as in"),
        ("device_name", "an abacus", "device_name is .* here, expected an abacus"),
        ("format", 99, "cannot be read by this version"),
        ("unknown", 1, "cannot be read by this version"),
    ],
)
def test_a_run_of_another_kind_is_not_resumed(toy, tmp_path, fails, name, value, message):
    assert reproduce(tmp_path) == 0
    header = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**header, name: value}))
    assert re.search(message, fails("reproduce", "toy", "--out", str(tmp_path), "--resume"))


def test_a_folder_with_a_run_is_not_overwritten_and_one_without_is_not_resumed(toy, tmp_path, fails):
    out = ("toy", "--out", str(tmp_path))
    assert "there is no run in" in fails("reproduce", *out, "--resume")
    assert reproduce(tmp_path) == 0
    assert "already holds a run, expected an unused folder; add --resume" in fails("reproduce", *out)


@pytest.mark.parametrize("damage", ["not json\n", '{"no": "unit"}\n', '{"unit": "of another version"}\n', "[]\n"])
def test_a_damaged_log(toy, tmp_path, fails, damage):
    assert reproduce(tmp_path) == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(damage)
    assert "start again in another --out" in fails("reproduce", "toy", "--out", str(tmp_path), "--resume")


def test_the_state_of_another_unit_or_a_damaged_one(tmp_path):
    work = Work(0, unit="a", store=tmp_path / "a.pt")
    assert work.saved() is None
    work.save({"x": 1})
    assert Work(0, unit="a", store=tmp_path / "a.pt").saved() == {"x": 1}
    with pytest.raises(Exception, match="was written by something else, expected the state of the unit b"):
        Work(0, unit="b", store=tmp_path / "a.pt").saved()
    (tmp_path / "a.pt").write_bytes(b"nothing")
    with pytest.raises(Exception, match="not a readable checkpoint"):
        work.saved()


def test_units_of_one_name_are_refused(toy, tmp_path, monkeypatch, fails):
    twice = replace(TOY, units=lambda settings: 2 * [Unit("same", lambda work: {})])
    monkeypatch.setattr(catalogue, "experiment", lambda name: twice)
    assert "or two of one name" in fails("reproduce", "toy", "--out", str(tmp_path))


def test_a_device_is_refused_where_only_the_processor_is_used(toy, tmp_path, fails):
    assert "--device is meta, expected cpu: toy runs on it only" in fails(
        "reproduce", "toy", "--out", str(tmp_path), "--device", "meta"
    )


def test_unknown_names_and_no_name(fails):
    known = ", ".join(catalogue.NAMES)
    assert f"there is no experiment 'nonsense', expected one of {known}" in fails("reproduce", "nonsense")
    assert f"no experiment is named, expected one of {known}" in fails("reproduce")
    assert "not allowed with argument" in fails("reproduce", "bounds", "--quick", "--full")
    assert "expected a number above 0" in fails("reproduce", "bounds", "--minutes", "0")


def test_the_list(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["reproduce", "--list"]) == 0
    told = capsys.readouterr().out
    for name in catalogue.NAMES:
        assert re.search(rf"^ *{name} ", told, flags=re.MULTILINE), name
