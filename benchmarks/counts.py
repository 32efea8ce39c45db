"""How much of everything there is: ``python -m benchmarks.house --counts``.

Counted: lines of the parts of the checkout, lambdas, planted faults and collected cases of the tests; claims, tables
and pictures of the committed results. With ``--of REVISION`` it also says how long the test files are that stood at a
revision of git, then and now, wherever they have moved.
"""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from benchmarks.house import ROOT

ALIKE = "-M40%"
"""A test file that git finds again: this much of it is as it was."""


def counted() -> Iterator[tuple[str, int]]:
    """What is counted, by name."""
    parts = {
        "product": [*_python("diffopt"), *_python("estimators")],
        "experiments": _python("diffopt/experiments"),
        "tasks": _python("tasks"),
        "tests": _python("tests"),
    }
    parts["product"] = [path for path in parts["product"] if path not in parts["experiments"]]
    for name, paths in parts.items():
        yield f"lines of {name}", sum(map(lines, paths))
    yield "lambdas in tests", sum(lambdas(path.read_text(encoding="utf-8")) for path in parts["tests"])
    yield "planted faults", planted(ROOT / "tests" / "faults.py")
    yield "test cases", collected()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results").glob("*.json")]
    yield "claims in results", sum(len(result["claims"]) for result in results)
    yield "tables in results", sum(len(result["tables"]) for result in results)
    yield "pictures in results", sum(len(result["pictures"]) for result in results)


def _python(folder: str) -> list[Path]:
    """The Python files below a folder, each where it really stands."""
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if path.resolve() == path]


def lines(path: Path) -> int:
    """The number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def lambdas(source: str) -> int:
    """The number of lambdas in a source; the word in a text or a comment is none."""
    return sum(token.string == "lambda" for token in tokenize.generate_tokens(io.StringIO(source).readline))


def planted(path: Path) -> int:
    """The number of faults in the list of them."""
    return len(runpy.run_path(str(path))["FAULTS"])


def collected() -> int:
    """The number of test cases that pytest collects below ``tests``."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    found = re.search(r"^(\d+)(?:/\d+)? tests? collected", said, re.MULTILINE)
    if found is None:
        raise SystemExit(f"pytest collected nothing: {said[-2000:]}")
    return int(found.group(1))


def since(revision: str) -> tuple[int, int]:
    """Lines of the test files that stood at ``revision``: then, and now, wherever commits have moved them."""
    then = [name for name in _git("ls-tree", "-r", "--name-only", revision, "tests") if name.endswith(".py")]
    now = {name: name for name in then}
    log = ("log", "--reverse", "--topo-order", "--format=", "--name-status", ALIKE, "-l9999", "--diff-filter=R")
    for change in _git(*log, f"{revision}..HEAD", "--", "tests"):
        _, old, new = change.split("\t")
        now = {first: new if name == old else name for first, name in now.items()}
    before = sum(len(_git("show", f"{revision}:{name}")) for name in then)
    return before, sum(lines(ROOT / name) for name in now.values() if (ROOT / name).exists())


def _git(*arguments: str) -> list[str]:
    said = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return said.stdout.splitlines()


def main(revision: str | None = None) -> None:
    """Print the counts."""
    for name, number in counted():
        print(f"{number:7,}  {name}")
    if revision is not None:
        before, now = since(revision)
        print(f"{now:7,}  lines of the test files that stood at {revision}; they were {before:,}")
