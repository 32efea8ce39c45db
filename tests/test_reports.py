"""Findings are data, both packages share one ``Report``, and one function prints all tables of text."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import unicodedata

import pytest
import torch
from torch import Tensor

import diffopt
import diffopt.testing
from diffopt import ConformanceError, DiffoptError, LossError, ShapeError
from diffopt.reports import Finding, Report, table

FIT = Finding("finite", "ok", "0.3")
WORTH_KNOWING = Finding("depends", "note", "all but b", fix="leave b out")
FAILED = Finding.of("scalar", LossError("a vector", "a scalar", "reduce it"))
SKIPPED = Finding("vmap", "skipped", "not asked for")
KEPT = Finding("exact", "ok", "1e-12", "<= 1e-9", "check signs")
BROKEN = Finding("linear", "FAIL", "0.5", "<= 1e-9", "check norms")
ALSO = Finding("repeats", "FAIL", "no", "yes", "check caches")


class QuietError(DiffoptError):
    """An error of a user's, which leaves the base's parts alone."""

    def __init__(self, code: int) -> None:
        self.code = code


def test_there_is_one_finding_and_one_report() -> None:
    assert diffopt.Finding is diffopt.testing.Finding is Finding
    assert diffopt.Report is diffopt.testing.Report is Report
    assert type(diffopt.check(lambda w: w.square().sum(), torch.ones(2))) is Report


def test_both_kinds_of_checks_return_it_with_the_names_of_before() -> None:
    checked = diffopt.check(lambda w: w.square().sum(), torch.ones(2))
    tested = diffopt.testing.check_optimizer(diffopt.SGD(0.1))
    for report in (checked, tested):
        assert report.ok
        assert report.failures == report.broken == ()
        for finding in report.findings:
            assert report[finding.check] is finding
            assert finding.claim == finding.check
            assert finding.mend == finding.look == finding.fix
            assert finding.held
            assert finding.measured
    assert tested.subject == "SGD(lr=0.1)"
    assert all(finding.expected for finding in tested.findings)


@pytest.mark.parametrize("error", [ShapeError("a", "b", "c"), LossError("a", "b"), LossError("a"), QuietError(7)])
def test_a_finding_takes_the_parts_of_an_error_as_they_are(error: DiffoptError) -> None:
    finding = Finding.of("it", error)
    assert (finding.expected, finding.fix, finding.error) == (error.expected, error.fix, error)
    assert finding.measured == (error.got or str(error))
    assert (finding.outcome, finding.held) == ("FAIL", False)


def test_a_text_that_looks_like_two_parts_stays_one() -> None:
    """Nothing is read out of a sentence: the user's own words may hold what ours are joined by."""
    error = LossError("'3, expected 4: no; 5' is a label", "a number", "do this: one; two")
    finding = Finding.of("it", error)
    assert (finding.measured, finding.expected, finding.fix) == (error.got, "a number", "do this: one; two")


def test_what_a_loss_says_in_its_own_error_reaches_the_finding_whole() -> None:
    def loss(w: Tensor) -> Tensor:
        raise ValueError("got 3, expected 4: look; there")

    finding = diffopt.check(loss, torch.ones(2)).failures[0]
    assert finding.measured == "the inner loss raised ValueError (got 3, expected 4: look; there)"
    assert finding.expected == "it to run as loss(params, *args)"
    assert finding.fix == "check its arguments' order, shapes and dtypes"


def test_the_first_failure_is_raised_by_its_own_error() -> None:
    Report((FIT, WORTH_KNOWING, SKIPPED)).raise_if_failed()
    with pytest.raises(LossError, match="a vector, expected a scalar; reduce it") as caught:
        Report((FIT, FAILED, BROKEN)).raise_if_failed()
    assert caught.value is FAILED.error


def test_claims_without_errors_of_their_own_are_raised_together() -> None:
    Report((KEPT,), "It()").raise_if_failed()
    report = Report((KEPT, BROKEN, ALSO), "It()")
    with pytest.raises(ConformanceError) as caught:
        report.raise_if_failed()
    assert str(caught.value).splitlines() == [
        "2 of 3 claims of It() are broken, expected none; each with its fix:",
        "linear: got 0.5, expected <= 1e-9; check norms",
        "repeats: got no, expected yes; check caches",
    ]
    assert caught.value.table == str(report)


def test_sentences_print_with_what_was_expected_and_the_fix_below() -> None:
    assert str(Report((FIT, FAILED, WORTH_KNOWING, SKIPPED))).splitlines() == [
        "check    outcome  measured",
        "--------------------------",
        "finite   ok       0.3",
        "scalar   FAIL     a vector",
        "    expected a scalar; fix: reduce it",
        "depends  note     all but b",
        "    fix: leave b out",
        "vmap     skipped  not asked for",
        "1 of 4 checks failed",
    ]


def test_claims_print_with_their_limits_beside_and_the_fix_of_those_that_broke_below() -> None:
    assert str(Report((KEPT, BROKEN), "It()")).splitlines() == [
        "It()",
        "check   outcome  measured  expected",
        "-----------------------------------",
        "exact   ok       1e-12     <= 1e-9",
        "linear  FAIL     0.5       <= 1e-9",
        "    fix: check norms",
        "1 of 2 checks failed",
    ]
    assert str(Report((KEPT,))).endswith("none of 1 checks failed")


def test_a_report_is_data() -> None:
    report = Report((FIT, WORTH_KNOWING, KEPT), "It()")
    assert pickle.loads(pickle.dumps(report)) == copy.deepcopy(report) == report
    assert dataclasses.asdict(report)["findings"][1]["fix"] == "leave b out"


# ------------------------------------------------------------------------------------------------------------ tables

COLUMNS = ("name", "n", "what")


def test_columns_go_to_their_sides() -> None:
    rows = [("a", "10", "x"), ("bcdef", "7", "long words")]
    assert table(COLUMNS, rows, align="lrl").splitlines() == [
        "name    n  what",
        "---------------",
        "a      10  x",
        "bcdef   7  long words",
    ]
    assert table(COLUMNS, rows, align="lr").splitlines()[2] == "a      10           x"
    assert table(COLUMNS, rows).splitlines()[3] == "bcdef  7   long words"
    assert table(COLUMNS, rows, align="r").splitlines()[2] == "    a  10           x"


def test_markdown_says_the_sides_too() -> None:
    rows = [("a", "10", "x")]
    assert table(COLUMNS, rows, "markdown", "lr").splitlines() == [
        "| name | n | what |",
        "|---|--:|--:|",
        "| a | 10 | x |",
    ]
    assert table(COLUMNS, rows, "markdown", "lrl").splitlines()[1] == "|---|--:|---|"
    assert table(COLUMNS, rows, "markdown").splitlines()[1] == "|---|---|---|"


@pytest.mark.parametrize("cell", ["a|b", "|", "`x | y`", "||a||", "a\nb|c"])
def test_a_pipe_ends_no_cell_in_markdown_and_stays_itself_in_text(cell: str) -> None:
    *_, line = table(("a|a", "b"), [(cell, "1")], "markdown").splitlines()
    bare = line.replace("\\|", "")
    assert bare.count("|") == 3
    assert line.count("\\|") == cell.count("|")
    assert cell.replace("\n", " ") in table(("a|a", "b"), [(cell, "1")]).splitlines()[-1]


@pytest.mark.parametrize("name", ["\u65e5\u672c", "e\u0301te\u0301", "\uff21", "\u00e9t\u00e9", "\u03bb", "plain"])
def test_letters_of_other_scripts_take_the_columns_that_a_terminal_gives_them(name: str) -> None:
    lines = table(("name", "n"), [(name, "1"), ("twelve chars", "22")], align="lr").splitlines()
    composed = unicodedata.normalize("NFC", lines[2])
    shown = sum(2 if unicodedata.east_asian_width(letter) == "W" or letter == "\uff21" else 1 for letter in composed)
    assert shown == len(lines[3])


def test_a_short_row_takes_the_rest_of_its_line_and_widens_no_column() -> None:
    rows = [("a", "1", "2"), ("b", "failed: out of memory, and much more"), ("    a remark that is long",)]
    assert table(("name", "n", "m"), rows, align="lr").splitlines() == [
        "name  n  m",
        "----------",
        "a     1  2",
        "b     failed: out of memory, and much more",
        "    a remark that is long",
    ]
    assert [line.count("|") for line in table(("name", "n", "m"), rows, "markdown").splitlines()] == [4] * 5


@pytest.mark.parametrize("cell", ["two\nlines", "two\r\nlines", "two\x0blines"])
@pytest.mark.parametrize("form", ["text", "markdown"])
def test_a_line_end_in_a_cell_ends_no_line(cell: str, form: str) -> None:
    text = table(("a", "b"), [(cell, "1"), ("c", "2")], form)  # type: ignore[arg-type]
    assert len(text.splitlines()) == 4
    assert "two lines" in text


def test_a_table_without_rows_is_its_header() -> None:
    assert table(("a", "b"), []) == "a  b\n----"
    assert table(("a", "b"), [], "markdown") == "| a | b |\n|---|---|"
