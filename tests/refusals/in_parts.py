"""Which parts of the library hand over an error's message in parts, as ``SomeError(got, expected, fix)``."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import traceback
from collections.abc import Iterator
from pathlib import Path

import diffopt
from diffopt import DiffoptError

ROOT = Path(diffopt.__file__).resolve().parents[1]

IN_PARTS = ("diffopt", "estimators", "tasks")
"""Files and folders."""


def modules() -> dict[str, ast.Module]:
    """Those of :data:`IN_PARTS`, parsed, by their path in the checkout."""
    places = [ROOT / part for part in IN_PARTS]
    files = [file for place in places for file in ([place] if place.suffix else place.rglob("*.py"))]
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(files)}


def error_classes() -> dict[str, type[DiffoptError]]:
    """Every error class in any module of the library, by name."""
    for module in pkgutil.walk_packages(diffopt.__path__, "diffopt."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, pending = {}, [DiffoptError]
    while pending:
        for kind in pending.pop().__subclasses__():
            if kind.__module__.startswith("diffopt."):
                found[kind.__name__] = kind
                pending.append(kind)
    return found


def calls(module: ast.Module, names: set[str]) -> Iterator[ast.Call]:
    """The calls that make an error of one of these names."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in names:
            yield node


def lacks_a_part(call: ast.Call) -> bool:
    """Whether a call leaves out what was got or what was expected."""
    named = {keyword.arg for keyword in call.keywords}
    return len(call.args) + len(named & {"got", "expected"}) < 2


def is_a_sentence(call: ast.Call) -> bool:
    """Whether a part holds the next one too, or begins with what stands between two."""
    texts = [part for part in call.args if isinstance(part, ast.Constant | ast.JoinedStr)]
    parts = [ast.unparse(text).lstrip("rf").strip("'\"") for text in texts]
    return any(", expected " in part or "; expected " in part or part.startswith((";", ":", ",")) for part in parts)


def was_raised_there(error: BaseException) -> bool:
    """Whether the line that raised an error is in one of :data:`IN_PARTS`."""
    line = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(line.is_relative_to(ROOT / part) for part in IN_PARTS)
