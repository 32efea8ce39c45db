"""``cite``, its data, and that papers are named in one place."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_origin

import pytest
import torch

import diffopt
import diffopt.estimators
import diffopt.linear_solve
import diffopt.prox
from diffopt import EstimatorError, cite
from diffopt.estimators import Binomial, Implicit, MultiStep, Reverse, Truncated, Unrolled
from diffopt.linear_solve import GMRES, Neumann

BIB = Path(diffopt.__file__).parent / "references.bib"


def keys(text: str) -> list[str]:
    return re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)


GROUPS = diffopt.Groups({"a": diffopt.Muon(), "b": diffopt.Clip(diffopt.Adam(), 1.0)})
PAPERS = [
    (Truncated(3), ["shaban2019"]),
    (Reverse(1), ["lecun1988", "franceschi2017"]),
    (Implicit(GMRES()), ["saad1986", "rajeswaran2019", "grazzi2020"]),
    (MultiStep(2, Binomial(2)), ["binomgbml2026", "kim2020"]),
    (Neumann, ["lorraine2020"]),
    (diffopt.Adam(0.1), ["kingma2015"]),
    (diffopt.implicit, ["pedregosa2016"]),
    (diffopt.SGD(0.1), []),
    (diffopt.Proximal(diffopt.SGD(0.1), diffopt.prox.Simplex()), ["parikh2014", "duchi2008"]),
    (GROUPS, ["kingma2015", "pascanu2013", "jordan2024", "liu2025"]),
]


@pytest.mark.parametrize(("subject", "expected"), PAPERS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_subject_brings_its_papers_and_the_library(subject, expected):
    assert keys(cite(subject)) == ["diffopt", *expected]


def test_several_subjects_bring_each_paper_once():
    assert keys(cite(Truncated(3), Truncated(4), Binomial(2))) == ["diffopt", "shaban2019", "binomgbml2026"]
    assert keys(cite()) == ["diffopt"]


MADE_WITH = [(Truncated(2), ["shaban2019"]), (MultiStep(2, Truncated(1)), ["shaban2019", "kim2020"])]


@pytest.mark.parametrize(("estimator", "expected"), MADE_WITH, ids=str)
def test_a_solution_remembers_what_it_was_made_with(estimator, expected):
    w = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(3)}
    options = {"optimizer": diffopt.AdamW(0.1), "steps": 4, "estimator": estimator}
    solution = diffopt.solve(lambda w: w["a"].square().sum() + w["b"].sum(), w, **options)
    assert keys(cite(solution)) == ["diffopt", *expected, "loshchilov2019"]


@pytest.mark.parametrize(("estimator", "learned"), [(Reverse(), False), (Unrolled(), True)], ids=str)
def test_a_solution_that_does_not_remember_is_refused(estimator, learned):
    w = torch.ones(2, requires_grad=learned)
    solution = diffopt.solve(lambda w: w.square().sum(), w, optimizer=diffopt.SGD(0.1), steps=2, estimator=estimator)
    with pytest.raises(EstimatorError, match=r"do not remember an estimator.*give cite the estimator itself"):
        cite(solution)


def test_an_estimator_of_ones_own_brings_the_library_alone():
    class Truncated(Reverse.__base__):  # type: ignore[misc, name-defined]  # the name of a shipped estimator
        pass

    assert keys(cite(Truncated)) == ["diffopt"]


def test_every_estimator_and_every_solver_has_a_paper():
    bases = (diffopt.estimators.Estimator, diffopt.linear_solve.LinearSolver)
    for module in (diffopt.estimators, diffopt.linear_solve):
        values = {name: getattr(module, name) for name in module.__all__}
        classes = {name: x for name, x in values.items() if inspect.isclass(x) and get_origin(x) is None}
        for name, kind in classes.items():
            if issubclass(kind, bases) and not kind.__abstractmethods__:
                assert len(keys(cite(kind))) > 1 or name == "Dense", name


def test_the_data_name_what_exists():
    text = BIB.read_text(encoding="utf-8")
    known = {
        name for module in (diffopt, diffopt.estimators, diffopt.linear_solve, diffopt.prox) for name in module.__all__
    }
    used = {name for names in re.findall(r"usedby = \{(.*?)\}", text) for name in names.split(", ")}
    assert used <= known
    assert "usedby" not in cite(*(getattr(diffopt.estimators, name) for name in diffopt.estimators.__all__))
    assert len(keys(text)) == len(set(keys(text))) == text.count("\n@") > 25
    for entry in text.split("\n\n")[1:]:
        assert entry.count("{") == entry.count("}"), entry


def test_the_papers_are_named_once(checkout: Path):
    link = checkout / "docs" / "references.bib"
    assert link.is_symlink()
    assert link.resolve() == (checkout / "diffopt" / "references.bib")


def test_the_entry_of_the_library_is_its_citation_file(checkout: Path):
    citation = (checkout / "CITATION.cff").read_text(encoding="utf-8")
    own = cite()
    for field in ("title", "version", "license"):
        stated = re.search(rf'^{field}: "?(.*?)"?$', citation, re.MULTILINE)
        assert stated is not None
        assert f"{field} = {{{stated[1]}}}" in own.replace("{PyTorch}", "PyTorch")
    assert f"version = {{{diffopt.__version__}}}" in own


def test_the_derivations_cite_papers_that_are_in_the_data(checkout: Path):
    page = (checkout / "docs" / "derivations.md").read_text(encoding="utf-8").split("## References")[1]
    titles = [re.sub(r"[^a-z]", "", title.lower()) for title in re.findall(r"\)\. \*(.*?)\.?\*", page)]
    plain = BIB.read_text(encoding="utf-8").replace('{\\"o}', "o")
    known = {re.sub(r"[^a-z]", "", t.lower()) for t in re.findall(r"^  title = \{(.*)\},$", plain, re.MULTILINE)}
    assert len(titles) == page.count("\n* ") > 15
    assert {title.replace("nystrm", "nystrom") for title in titles} <= known
