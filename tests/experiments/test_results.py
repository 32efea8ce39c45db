"""The committed results and the page made of them."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest

from diffopt.experiments.framework import catalogue


@pytest.fixture
def script(checkout):
    spec = importlib.util.spec_from_file_location("make_results", checkout / "docs" / "make_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(checkout, script):
    written = (checkout / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == script.page(checkout / "results"), "run: python docs/make_results.py"


def test_a_changed_result_changes_the_page(checkout, script, tmp_path):
    paths, first_screen = sorted((checkout / "results").glob("*.json")), 0
    for path in paths:
        results = json.loads(path.read_text(encoding="utf-8"))
        claims = results["claims"]
        claims[0]["answer"] = "perhaps"
        first_screen += claims[0].get("headline", not any(claim.get("headline") for claim in claims))
        (tmp_path / path.name).write_text(json.dumps(results))
    page = script.page(tmp_path)
    assert page.count("**perhaps**") == 2 * len(paths) + first_screen > 0
    assert page.partition("## Every claim")[0].count("**perhaps**") == first_screen


def test_the_first_screen_has_what_is_marked_with_its_interval_and_starts(checkout, script, tmp_path):
    results = json.loads((checkout / "results" / "sinusoid.json").read_text(encoding="utf-8"))
    new = {"text": "marked", "effect": "2 (1 to 3)", "starts": 3, "headline": True}
    old = {key: value for key, value in results["claims"][0].items() if key not in new or key == "text"}
    results["claims"] = [old, {**old, **new}]
    results["settings"].pop("seeds", None)
    (tmp_path / "sinusoid.json").write_text(json.dumps(results))
    page = script.page(tmp_path)
    screen = page.partition("## The answers")[2].partition("## Every claim")[0]
    (line,) = (line for line in screen.splitlines() if line.startswith("| sinusoid"))
    assert "| marked |" in line
    assert line.endswith("| 2 (1 to 3) | 3 starts |")
    assert "| 1 start |" in page.partition("**Claims**")[2]  # the claim of an earlier version, which does not say
    assert "| seeds |" not in page  # a setting that the run did not have
    assert "| hidden | 40 |" in page.partition("**Settings: ours and the paper's**")[2]


def test_unknown_results_are_refused_and_missing_ones_named(script, tmp_path):
    assert f"`{catalogue.NAMES[0]}`" in script.page(tmp_path)
    (tmp_path / "nonsense.json").write_text("{}")
    with pytest.raises(SystemExit, match="unknown experiments: nonsense"):
        script.page(tmp_path)


def test_an_experiment_may_have_results_at_other_settings_too(checkout, script, tmp_path):
    results = json.loads((checkout / "results" / "few-shot.json").read_text(encoding="utf-8"))
    for name in ("few-shot+20-way", "few-shot", "bounds+wide"):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    page = script.page(tmp_path)
    heads = re.findall(r"^## (\S+): ", page, re.MULTILINE)
    assert heads == ["bounds+wide", "few-shot", "few-shot+20-way"]  # in the order of the experiments
    for part in ("## The answers", "## Every claim"):
        assert "| few-shot+20-way |" in page.partition(part)[2].partition("\n## ")[0]
    assert "`bounds`" not in page.partition("## Not run yet")[2]
    (tmp_path / "nonsense+bounds.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"unknown experiments: nonsense\+bounds"):
        script.page(tmp_path)


def test_committed_results_are_whole_and_say_where_they_come_from(checkout):
    paths = sorted((checkout / "results").glob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        results = json.loads(text)
        assert results["experiment"] == path.stem.partition("+")[0]
        assert results["scale"] != "quick", "results of a quick run say nothing"
        assert results["command"].startswith(f"diffopt reproduce {results['experiment']}")
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", results["date"])
        assert results["device"]
        assert not re.search(r"/(home|root|tmp|work|Users)/", text), "a path of some machine"
        assert path.stat().st_size < 100_000
