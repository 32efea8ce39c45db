"""Intervals over starts and episodes against scipy and against simulation; claims that answer themselves."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diffopt.experiments.framework import pictures
from diffopt.experiments.framework.claims import Every, Finished, ask
from diffopt.experiments.framework.experiment import Unit, starts
from diffopt.experiments.framework.statistics import Effect, differences, judged, together, two_level
from diffopt.experiments.framework.tables import listed
from diffopt.experiments.framework.unit_context import Work


class TestIntervals:
    def test_one_number_per_start_is_students(self):
        values = [1.0, 2.5, 0.5, 3.0]
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        found = two_level([[x] for x in values])
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert (found.mean, found.starts) == (1.75, 4)

    def test_episodes_of_each_start_alone_are_in_the_means_of_the_starts(self):
        rows = np.random.default_rng(0).normal(size=(5, 30)).tolist()
        expected = stats.ttest_1samp([np.mean(row) for row in rows], 0).confidence_interval(0.95)
        assert two_level(rows).low == pytest.approx(expected.low)

    def test_pairs_are_scipys(self):
        first, second = np.random.default_rng(1).normal(size=(2, 6)).tolist()
        expected = stats.ttest_rel(first, second).confidence_interval(0.95)
        found = two_level(differences([[x] for x in first], [[x] for x in second]))
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))

    def test_pairs_of_logarithms(self):
        assert differences([[8.0]], [[2.0]], logarithms=True) == [[pytest.approx(math.log(4))]]
        assert two_level(differences([[8.0], [8.0]], [[2.0], [2.0]], logarithms=True)).exponential().mean == (
            pytest.approx(4)
        )

    @pytest.mark.parametrize(("of_starts", "of_episodes"), [(1.0, 3.0), (0.0, 3.0), (1.0, 0.0)])
    def test_crossed_intervals_hold_the_mean_as_often_as_they_say(self, of_starts, of_episodes):
        random, held = np.random.default_rng(2), 0
        for _ in range(400):
            own, common = of_starts * random.normal(size=(4, 1)), of_episodes * random.normal(size=(1, 12))
            found = two_level((own + common + random.normal(size=(4, 12))).tolist(), crossed=True)
            held += found.low <= 0 <= found.high
        assert held >= 0.92 * 400  # 95 %, deviation 1.1 %; never too short, too long where one part is zero

    def test_the_means_of_starts_alone_would_be_too_short_where_episodes_are_shared(self):
        rows = (np.random.default_rng(3).normal(size=(1, 20)) * 5 + np.zeros((3, 1))).tolist()
        assert two_level(rows).half_width == pytest.approx(0, abs=1e-9)
        assert two_level(rows, crossed=True).half_width > 1

    def test_from_one_start_there_is_none(self):
        found = two_level([[1.0, 2.0, 3.0]], crossed=True)
        assert (found.mean, found.low, found.high, found.half_width) == (2.0, -math.inf, math.inf, None)
        assert str(found) == "2 (no interval)"

    def test_what_diverged(self):
        assert two_level([[math.inf], [math.inf]]) == Effect(math.inf, math.inf, math.inf, 2)
        assert two_level([[math.inf], [1.0]]).half_width is None
        assert two_level(differences([[math.inf]], [[math.inf]])).half_width is None
        with pytest.raises(ValueError, match="without values"):
            two_level([[1.0], []])


@pytest.mark.parametrize(
    ("low", "high", "wanted", "margin", "zero", "answer"),
    [
        (0.1, 2, "above", 0, 0, "yes"),
        (-2, -0.1, "above", 0, 0, "no"),
        (-1, 1, "above", 0, 0, "not decided"),
        (0, 0, "above", 0, 0, "no"),
        (0, 0, "at least", 0, 0, "yes"),
        (-2, -0.1, "below", 0, 0, "yes"),
        (1, 1, "at most", 1, 1, "yes"),
        (-0.9, 0.5, "at least", -1, 0, "yes"),
        (-1.5, 0.5, "at least", -1, 0, "not decided"),  # zero and the margin within
        (-1.5, -0.5, "at least", -1, 0, "not decided"),
        (-3, -1.5, "at least", -1, 0, "no"),
        (200, 2000, "at least", 1000, 1, "partly"),  # larger, but so much?
        (0.5, 2000, "at least", 1000, 1, "not decided"),
        (2, 500, "at least", 1000, 1, "no"),
        (1.5, 3, "at most", 2, 1, "not decided"),
        (-math.inf, math.inf, "above", 0, 0, "not decided"),
        (-0.9, 0.9, "within", 1, 0, "yes"),
        (-0.9, 1.1, "within", 1, 0, "not decided"),
        (-3, -1.1, "within", 1, 0, "no"),
        (0.6, 1.9, "within", 2, 1, "yes"),
        (0.1, 0.4, "within", 2, 1, "no"),
    ],
)
def test_judgements(low, high, wanted, margin, zero, answer):
    assert judged(Effect((low + high) / 2, low, high, 3), wanted, margin, zero) == answer


@pytest.mark.parametrize(
    ("found", "every", "order"),
    [
        ([], "not measured", "not measured"),
        (["not measured"], "not measured", "not measured"),
        (["yes", "yes"], "yes", "yes"),
        (["yes", "no"], "partly", "partly"),
        (["yes", "not decided"], "partly", "yes"),
        (["no", "not decided"], "no", "no"),
        (["not decided", "not decided"], "not decided", "not decided"),
        (["partly", "not decided"], "partly", "yes"),
    ],
)
def test_answers_of_several_settings(found, every, order):
    assert (together(found), together(found, order=True)) == (every, order)


def table(**estimators):
    """Three starts of two draws at two step sizes; each estimator's numbers are a factor times those of ``a``."""
    numbers = [1.0, 1.1, 0.9, 1.2, 1.0, 0.8]
    return pd.DataFrame(
        {"estimator": estimator, "lr": lr, "L": 1, "seed": i // 2, "draw": i % 2, "error": x * factor * (1 + 0.01 * i)}
        for estimator, factor in {"a": 1.0, **estimators}.items()
        for lr in (0.1, 0.2)
        for i, x in enumerate(numbers)
    )


class TestClaims:
    def answer(self, formula, data, **options):
        return ask("it is so", "a paper", formula, **options).answer(data)

    def test_ratios_of_the_same_start_and_draw(self):
        claim = self.answer("error: a / b, twice >= 1.9 by lr", table(**{"b, twice": 0.5}))
        assert (claim.answer, claim.starts) == ("yes", 3)
        assert claim.effect == "2 to 2 in 2 settings"
        assert "yes in 2 of 2 settings; 2 (2 to 2) (lr=0.1)" in claim.evidence
        assert self.answer("error: a / b >= 2.1", table(b=0.5)).answer == "no"

    def test_differences_and_numbers_by_themselves(self):
        assert self.answer("error: a - b > 0", table(b=1.5)).answer == "no"
        assert self.answer("error: b [lr == 0.1] - a > 0.3", table(b=1.5)).answer == "yes"
        assert self.answer("error: * < 2", table(b=1.5)).answer == "yes"
        assert self.answer("error: b < 1.1", table(b=1.5)).answer == "no"
        assert self.answer("error: b < 1.5", table(b=1.5)).answer == "not decided"

    def test_where_one_setting_shows_it(self):
        data = table(b=0.5)
        data.loc[(data["estimator"] == "b") & (data["lr"] == 0.2), "error"] *= 4
        assert self.answer("error: b / a < 1 by lr", data).answer == "partly"
        assert self.answer("error: b / a < 1 by lr", data, where="lr == 0.1").answer == "yes"
        both = self.answer(("error: b / a < 1 by lr", "error: a / b > 1 by lr"), data)
        assert "(error: b / a, lr=0.2)" in both.evidence
        assert "of 4 settings" in both.evidence
        more = ("error: b / a < 1", "L: b / a < 2")  # of two columns between the same estimators
        assert "in 2 of 2 settings" in self.answer(more, table(b=0.5)).evidence

    def test_settings_of_the_first_side_only(self):
        data = table(b=0.5)
        more = data[data["estimator"] == "b"].assign(L=2, error=9.0)
        claim = self.answer("error: b - a < 0 by lr; L", pd.concat([data, more]))
        assert claim.answer == "partly"
        assert "of 4 settings" in claim.evidence

    def test_one_start_decides_nothing(self):
        claim = self.answer("error: a / b >= 1.9", table(b=0.5).query("seed == 0"))
        assert (claim.answer, claim.starts) == ("not decided", 1)
        assert "one start" in claim.evidence

    def test_nothing_is_measured(self):
        for data in (pd.DataFrame(), table()):
            claim = self.answer("error: c / a > 1 by lr", data)
            assert (claim.answer, claim.effect) == ("not measured", "")

    def test_what_is_no_formula(self):
        with pytest.raises(ValueError, match="no formula"):
            self.answer("error is small", table())

    def test_statements_about_every_row(self):
        data = table(b=0.5)
        claims = [
            Every("t", "s", test, "estimator == 'b'", "error") for test in ("error < 2", "error < 0.5", "error < 0")
        ]
        found = [claim.answer(data) for claim in claims]
        assert [claim.answer for claim in found] == ["yes", "partly", "no"]
        assert found[0].evidence.startswith("in 12 of 12 cases; error: 0.42 to 0.6")
        assert Every("t", "s", "error < 2", "estimator == 'c'").answer(data).answer == "not measured"


def test_a_table_has_a_row_for_each_setting_and_a_column_for_each_place():
    found = listed(
        "title",
        table(b=0.5),
        {"estimator": "estimator"},
        {"mean": "error", "half": ("error", "+-"), "most": ("error", "max"), "none": "absent"},
        across="lr",
        cell=("error", "median"),
        label=lambda lr: f"lr={lr:g}",
        paper=lambda at: "said" if at["estimator"] == "b" else None,
    )[0]
    assert found.columns == ("estimator", "mean", "half", "most", "none", "lr=0.1", "lr=0.2", "the paper")
    first, second = found.rows
    assert first[:2] == ("a", pytest.approx(6.145 / 6))
    assert first[3:] == (pytest.approx(1.236), None, *[pytest.approx(1.025, rel=2e-2)] * 2, None)
    assert (second[0], second[-1]) == ("b", "said")
    assert listed("title", pd.DataFrame(), {"estimator": "estimator"}, {}) == ()


def test_curves_are_means_over_starts_and_draws(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure) or path)
    data = pd.concat([table(b=0.5), table(b=0.5).assign(L=2, error=7.0)])
    look = {"x": "L", "y": "error", "hue": "estimator", "panel": "lr"}
    assert pictures.curves(data, tmp_path / "x.png", **look, scales={"error": "log"}) == [tmp_path / "x.png"]
    first, second = drawn[0].axes
    assert (first.get_title(), second.get_title(), first.get_yscale()) == ("lr=0.1", "lr=0.2", "log")
    assert [line.get_label() for line in first.lines] == ["a", "b"]
    assert list(first.lines[1].get_xdata()) == [1, 2]
    assert list(first.lines[1].get_ydata()) == pytest.approx([6.145 / 12, 7.0])
    range_of_starts = first.collections[1].get_paths()[0].get_extents()
    assert (range_of_starts.ymin, range_of_starts.ymax) == pytest.approx((0.42, 7.0))
    assert pictures.curves(pd.DataFrame(), tmp_path / "x.png", **look) == []


def test_units_of_several_starts_differ_in_their_random_numbers_alone():
    def draw(work):
        return {"x": work.generator("x").initial_seed(), "seed": work.seed}

    units = starts(2, lambda: [Unit("a", draw, keys={"K": 5})])
    assert [unit.name for unit in units] == ["seed=0 a", "seed=1 a"]
    work = Work(3)
    first, second = (unit.run(work) for unit in units)
    assert first == draw(Work(3))
    assert (second["seed"], work.seed) == (1003, 3)
    assert first["x"] != second["x"]
    results = {"seed=1 a": {"values": [1.0, 2.0]}}
    rows = Finished(units, results).table(lambda row: [{"value": x} for x in row["values"]])
    assert rows.to_dict("records") == [{"seed": 1, "K": 5, "value": 1.0}, {"seed": 1, "K": 5, "value": 2.0}]
