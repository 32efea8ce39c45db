"""Every experiment of ``diffopt reproduce`` in its quick form, and what each declares."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from diffopt.cli import main
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.texts import texts

SLOW = {
    "attribution", "bounds", "cost", "esj", "few-shot", "hyper-cleaning", "memory-rates", "memory-reduced",
    "meta-transfer", "sinusoid", "yardsticks",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in catalogue.NAMES]
)
def test_quickly(name, tmp_path, capsys):
    """It runs at its quick settings, from nothing to pictures, and answers every claim."""
    assert main(["reproduce", name, "--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["left_out"] == []
    assert results["pictures"]
    for picture in results["pictures"]:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for table in results["tables"]:
        assert table["rows"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert {claim["answer"] for claim in results["claims"]} <= {"yes", "no", "partly", "not decided", "not measured"}
    assert all(claim["evidence"] and claim["starts"] >= 1 for claim in results["claims"])
    assert 1 <= sum(claim["headline"] for claim in results["claims"]) <= 4
    assert str(Path.home()) not in json.dumps(results)


@pytest.mark.parametrize("name", catalogue.NAMES)
class TestEveryExperiment:
    def test_what_it_says_when_nothing_is_finished(self, name, tmp_path):
        experiment = catalogue.experiment(name)
        summary = experiment.summarise(experiment.standard, {})
        assert {claim.answer for claim in summary.claims} <= {"not measured"}
        assert list(experiment.draw(experiment.standard, {}, tmp_path)) == []

    def test_every_claim_of_its_file_is_asked(self, name):
        experiment = catalogue.experiment(name)
        asked = {claim.text for claim in experiment.summarise(experiment.standard, {}).claims}
        assert not any("{" in text for text in asked)
        written = [claim["text"] for group in texts(name).get("claims", {}).values() for claim in group]
        forms = [re.sub(r"\\{.*?\\}", ".*", re.escape(text)) for text in written]
        assert [form for form in forms if not any(re.fullmatch(form, text) for text in asked)] == []
        assert set(texts(name).get("papers", {})) <= {item.name for item in fields(experiment.standard)}

    def test_its_declaration(self, name, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "200")
        assert main(["reproduce", name, "--list"]) == 0
        told, experiment = capsys.readouterr().out, catalogue.experiment(name)
        assert experiment.name == name
        for item in fields(experiment.standard):
            assert item.name in told
        assert {item.name for item in fields(experiment.standard)} >= {"seeds", *experiment.papers}
        for scale in (experiment.quick, experiment.standard, experiment.full):
            units = experiment.units(scale)
            assert len({unit.name for unit in units}) == len(units) > 0
            assert all(unit.cost > 0 for unit in units)
