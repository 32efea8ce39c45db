"""Write ``docs/results.md`` from the files in ``results/``: ``python docs/make_results.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.listing import differing
from diffopt.experiments.framework.report import shown, started
from diffopt.reports import table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
HEAD = """\
# Results

What the papers claim, and what `diffopt reproduce` measures. Each section is one command and one committed file,
`results/NAME.json`, or `results/NAME+SETTING.json` where an experiment was run at other settings too; this page is
written from those files by `python docs/make_results.py`, and a test holds it to them. `diffopt reproduce --list` says
what each experiment needs. Every command also draws pictures, beside its `results.json` in the folder it names.
"""
HEADLINES = 2
"""Claims of an experiment on the first screen, where its results do not say which."""
ANSWERS = """\
An answer is drawn from the interval over starts and test episodes together: **not decided** says that it reaches to
both sides of what is claimed, or that there is one start only. Results that were run before intervals were taken show
none; their answers come from the mean alone.
"""
SOURCES = """\
## The papers

- **binomial**: "Binomial Gradient-Based Meta-Learning for Enhanced Meta-Gradient Estimation" (2026), arXiv 2604.13263
- **multi-step**: Kim, Park and Choi (2020), "Multi-step Estimation for Gradient-based Meta-learning", arXiv 2006.04298
- **memory-reduced**: Yang, Ma and Yu (2024), "Memory-Reduced Meta-Learning with Guaranteed Convergence", arXiv
  2412.12030
- **slides**: Liang, "Model-Agnostic Meta-Learning from Optimization Perspective"; on ANIL: Ji, Lee, Liang and Poor
  (2020), "Convergence of Meta-Learning with Task-Specific Adaptation over Partial Parameters"; on ESJ: Sow, Ji and
  Liang (2022), "On the Convergence Theory for Hessian-Free Bilevel Algorithms"
- **yardsticks**: Vicol, Metz and Sohl-Dickstein (2021), "Unbiased Gradient Estimation in Unrolled Computation Graphs
  with Persistent Evolution Strategies"; Shen and Chen (2023), "On Penalty-based Bilevel Gradient Descent Method";
  Dagréou, Ablin, Vaiter and Moreau (2022), "A Framework for Bilevel Optimization that Enables Stochastic and Global
  Variance Reduction Algorithms"
"""


def page(folder: Path) -> str:
    """The whole page, from the results in ``folder``."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    unknown = sorted(name for name in found if experiment_of(name) not in catalogue.NAMES)
    if unknown:
        raise SystemExit(f"{folder} holds results of unknown experiments: {', '.join(unknown)}")
    known = {each: found[each] for name in catalogue.NAMES for each in sorted(found) if experiment_of(each) == name}
    missing = [name for name in catalogue.NAMES if name not in map(experiment_of, found)]
    sections = [HEAD, _answers(known), _claims_in_short(known), *(section(*pair) for pair in known.items())]
    if missing:
        sections.append(f"## Not run yet\n\n{', '.join(f'`{name}`' for name in missing)}.\n")
    return "\n".join([*sections, SOURCES])


def experiment_of(name: str) -> str:
    """Of results of that name: without the setting."""
    return name.partition("+")[0]


def _answers(found: dict[str, dict[str, Any]]) -> str:
    """One screen: the claims that say most of each experiment."""
    rows = [
        (name, claim["text"], f"**{claim['answer']}**", *_effect(results, claim))
        for name, results in found.items()
        for claim in _headlines(results["claims"])
    ]
    columns = ("experiment", "claim", "measured", "effect (95 % interval)", "starts")
    return "\n".join(["## The answers\n", _table(columns, rows), "", ANSWERS])


def _headlines(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that the experiment marks; the first ones of results that were written before there were marks."""
    return [claim for claim in claims if claim.get("headline")] or claims[:HEADLINES]


def _effect(results: dict[str, Any], claim: dict[str, Any]) -> tuple[str, str]:
    count = started(results, claim)
    return claim.get("effect") or "-", f"{count} start{'s' if count > 1 else ''}"


def _claims_in_short(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        (name, claim["text"], claim["source"], f"**{claim['answer']}**")
        for name, results in found.items()
        for claim in results["claims"]
    ]
    return "\n".join(
        ["## Every claim and its answer\n", _table(("experiment", "claim", "source", "measured"), rows), ""]
    )


def section(name: str, results: dict[str, Any]) -> str:
    """The section of one experiment at one setting."""
    lines = [f"## {name}: {results['title']}\n", f"Paper: {results['paper']}.\n"]
    lines += ["```sh", results["command"], "```\n", _conditions(results)]
    if results["left_out"]:
        lines += [f"Left out for want of time: {', '.join(results['left_out'])}.\n"]
    for found in results["tables"]:
        lines += [f"**{found['title']}**\n", _table(found["columns"], found["rows"]), ""]
    claims = [
        (
            claim["text"],
            claim["source"],
            f"**{claim['answer']}**",
            _effect(results, claim)[1],
            claim["evidence"],
        )
        for claim in results["claims"]
    ]
    lines += ["**Claims**\n", _table(("claim", "source", "measured", "starts", "evidence"), claims), ""]
    settings = differing(catalogue.experiment(results["experiment"]), results["settings"])
    if settings:
        lines += ["**Settings: ours and the paper's**\n", _table(("setting", "ours", "the paper"), settings), ""]
    if results["notes"]:
        lines += ["**Where we differ, and why**\n", *(f"- {note}" for note in results["notes"]), ""]
    return "\n".join(lines)


def _conditions(results: dict[str, Any]) -> str:
    threads = f"{results['threads']} thread{'s' if results['threads'] > 1 else ''}"
    return (
        f"{results['date']}, {results['processor_minutes']:g} minutes of processor time ({results['minutes']:g} by the "
        f"clock) on {results['device']}, {threads}; torch {results['torch']}, seed {results['seed']}; "
        f"data: {results['data']}.\n"
    )


def _table(columns: Any, rows: Any) -> str:
    return table(columns, [tuple(map(shown, row)) for row in rows], "markdown")


if __name__ == "__main__":
    PAGE.write_text(page(ROOT / "results"), encoding="utf-8")
