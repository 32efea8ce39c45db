"""The tables of the page "Verification": measured anew, and read from the tests, whenever the site is built."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import diffopt
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.linear_solve import GMRES, ConjugateGradient
from diffopt.reports import table
from diffopt.testing import Finding, check_estimator, check_optimizer

ROOT = Path(__file__).resolve().parents[1]
TESTS, RESULTS = ROOT / "tests", ROOT / "docs" / "_build" / "tests"
ESTIMATORS = {
    'Reverse("graph")': Reverse("graph"),
    "Reverse(1)": Reverse(1),
    'Reverse("sqrt")': Reverse("sqrt"),
    "ForwardMode()": ForwardMode(),
    "Unrolled()": Unrolled(),
    "Truncated(2)": Truncated(2),
    "Binomial(2)": Binomial(2),
    "Binomial(2, window=3)": Binomial(2, window=3),
    "Krylov(2)": Krylov(2),
    "MultiStep(2)": MultiStep(2),
    "MultiStep(2, Binomial(1))": MultiStep(2, Binomial(1)),
    "Implicit(ConjugateGradient())": Implicit(ConjugateGradient()),
    "Implicit(GMRES())": Implicit(GMRES()),
    "ESJacobian(16, 1e-3)": ESJacobian(16, 1e-3, generator=torch.Generator().manual_seed(0)),
    "FirstOrder()": FirstOrder(),
    "Reptile()": Reptile(),
}
OPTIMIZERS: dict[str, tuple[diffopt.Optimizer, Any]] = {
    "SGD, momentum, dampening, decay": (
        diffopt.SGD(0.05, 0.9, 0.4, 0.1),
        lambda p: torch.optim.SGD(p, 0.05, 0.9, 0.4, 0.1),
    ),
    "SGD, Nesterov": (
        diffopt.SGD(0.05, 0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True),
    ),
    "Adam": (diffopt.Adam(0.05), lambda p: torch.optim.Adam(p, 0.05)),
    "AdamW, AMSGrad": (diffopt.AdamW(0.05, amsgrad=True), lambda p: torch.optim.AdamW(p, 0.05, amsgrad=True)),
    "RMSprop, centered": (
        diffopt.RMSprop(0.02, centered=True),
        lambda p: torch.optim.RMSprop(p, 0.02, centered=True),
    ),
    "Adagrad": (diffopt.Adagrad(0.1, 0.3), lambda p: torch.optim.Adagrad(p, 0.1, 0.3)),
}


def _cell(findings: Sequence[Finding], claim: str) -> str:
    found = [f for f in findings if f.claim.startswith(claim)]
    limit = found[0].expected.replace("<= ", "\u2264\u00a0").replace(".0e", "e") if found else ""
    return f"{found[0].measured} ({limit})" if found else "not claimed"


def estimators() -> str:
    """Every estimator through the public battery; raises where a claim is broken."""
    rows = []
    for name, estimator in ESTIMATORS.items():
        findings = check_estimator(estimator).findings
        held = f"{sum(f.held for f in findings)} of {len(findings)}"
        rows.append((f"`{name}`", held, *(_cell(findings, claim) for claim in ("exact", "vmap of grad", "linear"))))
    header = ("estimator", "claims that hold", "exact", "`vmap` beside a loop", "linear in the outer gradient")
    return table(header, rows, "markdown")


def optimizers() -> str:
    """Every optimizer through the public battery, beside ``torch.optim``."""
    rows = []
    for name, (optimizer, reference) in OPTIMIZERS.items():
        findings = check_optimizer(optimizer, reference=reference, steps=8).findings
        steps = next(f for f in findings if f.claim.startswith("the steps of"))
        derivatives = [float(f.measured) for f in findings if f.claim.endswith("derivative")]
        rows.append((name, f"{len(findings)}", f"{steps.measured}", f"{max(derivatives):.1e} of {len(derivatives)}"))
    header = ("optimizer", "claims that hold", "8 steps beside `torch.optim`", "worst derivative beside differences")
    return table(header, rows, "markdown")


def tolerances(tree: ast.Module) -> list[float]:
    """The small numbers that a test file holds errors below, from tight to loose."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt | ast.LtE):
            found |= {c.value for c in node.comparators if isinstance(c, ast.Constant) and isinstance(c.value, float)}
        if isinstance(node, ast.keyword) and node.arg in {"rtol", "atol", "rel", "abs"}:
            found |= {node.value.value} if isinstance(node.value, ast.Constant) else set()
    return sorted(x for x in found if isinstance(x, float) and 0 < x < 0.05)


def files_of_tests(folder: Path = TESTS, results: Path = RESULTS) -> str:
    """Every test file: what it holds, how many tests, within which tolerances, and how the last recorded run went."""
    outcome = last_run(results)
    header = ("tests", "what they hold", "functions", "tolerances", *(["passed", "skipped"] if outcome else []))
    rows = []
    for path in sorted(folder.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(folder).with_suffix("").as_posix()
        count = sum(isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in ast.walk(tree))
        used = tolerances(tree)
        limits = "" if not used else f"{used[0]:.0e}" if len(used) == 1 else f"{used[0]:.0e} to {used[-1]:.0e}"
        text = re.sub(r"``(.*?)``", r"`\1`", " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split()))
        run = outcome.get(name.replace("/", "."), Counter())
        ran = [str(run["passed"]), str(run["skipped"])] if outcome else []
        rows.append((f"`{name}`", text, str(count), limits, *ran))
    return table(header, rows, "markdown")


def last_run(folder: Path) -> dict[str, Counter[str]]:
    """How many tests of each file passed and were skipped, by the records of a run in pieces; empty if there are none.

    A test that one piece skipped and another passed has passed.

    Raises:
        ValueError: a recorded run has failures.
    """
    passed: dict[tuple[str, str], bool] = {}
    for path in sorted(folder.glob("*.xml")):
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            name, test = str(case.get("classname")).removeprefix("tests."), str(case.get("name"))
            if case.find("failure") is not None or case.find("error") is not None:
                raise ValueError(f"{path}: {case.get('classname')}.{test} failed: no page is made of that")
            passed[name, test] = passed.get((name, test), False) or case.find("skipped") is None
    found: dict[str, Counter[str]] = {}
    for (name, _), well in passed.items():
        found.setdefault(name, Counter())["passed" if well else "skipped"] += 1
    return found
