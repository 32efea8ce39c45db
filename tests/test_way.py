"""How long the way is from the call to the number, held loosely, and the map of the folders.

``python -m benchmarks.way`` prints the one, ``python -m benchmarks.house`` draws the other.
"""

from __future__ import annotations

from pathlib import Path

import pytest

way = pytest.importorskip("benchmarks.way", reason="the checkout, of which benchmarks are a part")
house = pytest.importorskip("benchmarks.house")

CALLS = {True: 420, False: 330}
"""Calls in the library's own files, of a solve of three steps and its backward pass, with checks and without."""


@pytest.mark.parametrize("check", [True, False])
def test_the_way_to_the_number_is_short(check: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # another test may have loaded torch's compiler, from when on every gradient is looked at for what it made
    monkeypatch.setattr("diffopt.tensors.derivatives._COMPILED", "not loaded")
    exact = way.ours(way.Reverse(), check)
    assert exact.calls <= 1.05 * CALLS[check]
    assert exact.depth <= 15
    assert exact.to_loss <= 9


@pytest.mark.parametrize("estimator", ["Reverse", "FirstOrder", "Binomial", "Implicit", "Unrolled"])
def test_without_checks_no_check_is_called(estimator: str) -> None:
    """Not one function of the files that hold them."""
    seen = way.ours(way.Binomial(2) if estimator == "Binomial" else getattr(way, estimator)(), False)
    checks = ("rollout/checks.py", "rollout/refusals.py", "rollout/hidden_state.py")
    names = {name for file, name, _ in seen.functions if file.endswith(checks)}
    assert names == set()


def test_the_map_is_drawn_from_the_imports(checkout: Path) -> None:
    """If it is not: ``python -m benchmarks.house``."""
    assert house.drawn(house.arrows()[1]) in (checkout / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_map_leaves_out_what_a_longer_way_says() -> None:
    folders = {"diffopt.top": {"diffopt.middle", "diffopt.ground", "diffopt"}, "diffopt.middle": {"diffopt.ground"}}
    assert house.needed(folders) == [("diffopt.middle", "diffopt.ground"), ("diffopt.top", "diffopt.middle")]


def test_folders_that_import_each_other_are_found() -> None:
    folders = {"diffopt.a": {"diffopt.b"}, "diffopt.b": {"diffopt.c"}, "diffopt.c": {"diffopt.a"}, "diffopt.d": set()}
    assert house.running_back(folders) == ["diffopt.a", "diffopt.b", "diffopt.c"]


def test_the_counts_count_what_they_say(tmp_path: Path) -> None:
    """A lambda in a text is none."""
    counts = pytest.importorskip("benchmarks.counts")
    assert counts.lambdas("a = lambda x: 'lambda'  # lambda\nb = [lambda: 1]\n") == 2
    (tmp_path / "faults.py").write_text("text = 'a b'\nFAULTS = text.split()\n")
    assert counts.planted(tmp_path / "faults.py") == 2
    assert counts.lines(tmp_path / "faults.py") == 2
