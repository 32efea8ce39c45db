"""What an experiment takes in and gives out: settings in words, rows as JSON, verdicts."""

from __future__ import annotations

import argparse

import pytest

from diffopt.experiments.framework.experiment import ExperimentError
from diffopt.experiments.framework.options import listed, one_of, whole, yes_or_no
from diffopt.experiments.framework.run_folder import json_row


@pytest.mark.parametrize("row", [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}, [1], None])
def test_rows_must_be_json(row):
    with pytest.raises(ExperimentError, match="JSON"):
        json_row("unit", row)


def test_rows_are_what_json_makes_of_them():
    assert json_row("unit", {"x": (1, 2.5)}) == {"x": [1, 2.5]}


def test_settings_of_words():
    assert one_of("a", "b")("b") == "b"
    assert (yes_or_no("yes"), yes_or_no("no")) == (True, False)
    assert listed(whole(1))("3, 4") == (3, 4)
    for parse, text in (
        (one_of("a", "b"), "c"),
        (yes_or_no, "true"),
        (listed(whole(1)), "3,,4"),
        (listed(whole(1)), ""),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            parse(text)
