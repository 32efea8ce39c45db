"""Where a planted fault stands: a function is found by its name, whatever file it has moved to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from faults import Fault

FOLDERS = ("diffopt", "estimators", "tasks")


class Place(NamedTuple):
    """A part of a file, from one character to another."""

    file: Path
    first: int
    end: int


class Places:
    """All functions, methods, classes and constants of a checkout, by name."""

    def __init__(self, checkout: Path) -> None:
        """Read the library."""
        self._places: dict[str, list[Place]] = {}
        self._texts: dict[Path, str] = {}
        for file in sorted(file for folder in FOLDERS for file in (checkout / folder).rglob("*.py")):
            if not any(part.is_symlink() for part in (file, *file.parents)):
                self._texts[file] = file.read_text(encoding="utf-8")
                for name, first, end in _named(self._texts[file]):
                    self._places.setdefault(name, []).append(Place(file, first, end))

    def found(self, fault: Fault) -> list[Place]:
        """Where the text of the fault stands, which should be one place."""
        return [
            Place(file, at, at + len(fault.old))
            for file, first, end in self._places.get(fault.where, [])
            for at in _every(self._texts[file], fault.old, first, end)
        ]

    def planted(self, place: Place, fault: Fault) -> str:
        """The text of the file with the fault in its place."""
        text = self._texts[place.file]
        return text[: place.first] + fault.new + text[place.end :]


def _every(text: str, part: str, first: int, end: int) -> Iterator[int]:
    at = text.find(part, first, end)
    while at >= 0:
        yield at
        at = text.find(part, at + 1, end)


def _named(text: str) -> Iterator[tuple[str, int, int]]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in ast.parse(text).body:
        for name, part in _parts(node):
            decorators = [x.lineno for x in getattr(part, "decorator_list", [])]
            assert part.end_lineno is not None
            yield name, starts[min([part.lineno, *decorators]) - 1], starts[part.end_lineno]


def _parts(node: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name, node
    if isinstance(node, ast.ClassDef):
        yield from ((f"{node.name}.{part.name}", part) for part in node.body if isinstance(part, ast.FunctionDef))
    if isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                yield target.id, node
