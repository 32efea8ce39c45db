"""What the commands print is what was written: no bracket is taken for markup, and names can be copied."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
from toy_experiment import TOY

from diffopt.cli import main
from diffopt.commands import demo_parts
from diffopt.comparing.comparison import _HEADERS
from diffopt.estimators import Reverse
from diffopt.experiments.framework import catalogue, listing, report
from diffopt.experiments.framework.options import option
from diffopt.experiments.framework.progress import reporter


@pytest.fixture
def wide(monkeypatch):
    """A terminal on which no line is broken."""
    monkeypatch.setenv("COLUMNS", "400")


@pytest.mark.usefixtures("wide")
def test_the_demo_prints_the_table_that_compare_returns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_parts, "ITERATIONS", 2)
    monkeypatch.setattr(demo_parts, "ESTIMATORS", (Reverse(1),))
    demo_parts.show(tmp_path / "a [b]")
    told = capsys.readouterr().out
    assert "  ".join(_HEADERS[-2:]) == "time [ms]  peak [MB]"
    assert "time [ms]  peak [MB]\n" in told
    assert f"Pictures: {tmp_path}/a [b]/demo.png" in told


@pytest.mark.usefixtures("wide")
def test_a_report_prints_brackets_and_colons(capsys):
    written = ["a [title]", "peak [MB]", "unit [k]", "it [trains]", "p. [3]", "[evidence] :x:", "a [note]", "out [1]"]
    title, column, cell, claim, source, evidence, note, unit = written
    results = {
        "tables": [{"title": title, "columns": [column, "n"], "rows": [[cell, 1]]}],
        "claims": [{"text": claim, "source": source, "answer": "yes", "evidence": evidence}],
        "notes": [note],
        "left_out": [unit],
        "pictures": ["[picture].png"],
        "minutes": 1,
        "processor_minutes": 1,
    }
    report.show(results, Path("[folder]"))
    told = capsys.readouterr().out
    assert [text for text in [*written, "[folder]/[picture].png"] if text not in told] == []


@dataclass(frozen=True)
class Bracketed:
    draws: int = option(3, "how many [each]")


@pytest.mark.usefixtures("wide")
def test_the_settings_of_an_experiment_print_brackets(capsys):
    settings = Bracketed()
    listing.list_one(
        replace(
            TOY, title="A [toy]", quick=settings, standard=settings, full=settings, units=lambda _: TOY.units(TOY.quick)
        )
    )
    told = capsys.readouterr().out
    assert "A [toy]" in told
    assert "how many [each]" in told


def test_a_bar_prints_brackets(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    with reporter(2) as report:
        report.update(1, "loss [nats]")
        report.say("saved [here]")
    told = capsys.readouterr().out
    assert "loss [nats]" in told
    assert "saved [here]" in told


def test_names_in_a_list_that_is_piped_can_be_copied(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")  # what is taken where there is no terminal
    assert main(["reproduce", "--list"]) == 0
    words = capsys.readouterr().out.split()
    assert [name for name in catalogue.NAMES if name not in words] == []
    name = catalogue.NAMES[-1]
    assert main(["reproduce", name, "--list"]) == 0
    words = capsys.readouterr().out.split()
    assert [item.name for item in fields(catalogue.experiment(name).standard) if item.name not in words] == []
