"""``docs/errors.md`` has an entry for every error class of the library, and for no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from in_parts import error_classes

import diffopt
from diffopt import DiffoptError

ENTRY = re.compile(r"### `(\w+)`\n\nAlso an? `(\w+)`[.,] ?(.+?)\n\n\*Fix:\* (.+?)\n(?=\n#|\Z)", re.DOTALL)


@pytest.fixture(scope="module")
def classes() -> dict[str, type[DiffoptError]]:
    return error_classes()


@pytest.fixture(scope="module")
def page(checkout: Path) -> str:
    return (checkout / "docs" / "errors.md").read_text(encoding="utf-8")


def test_every_class_has_one_entry_with_cause_and_fix(classes: dict[str, type[DiffoptError]], page: str) -> None:
    headings = re.findall(r"^### `(\w+)`$", page, re.MULTILINE)
    assert sorted(headings) == sorted(classes)
    assert [entry[0] for entry in ENTRY.findall(page)] == headings, "an entry lacks its cause or its fix"


def test_the_page_names_the_built_in_exception(classes: dict[str, type[DiffoptError]], page: str) -> None:
    named = {name: base for name, base, _, _ in ENTRY.findall(page)}
    assert named == {name: kind.__bases__[-1].__name__ for name, kind in classes.items()}


def test_every_class_of_the_core_is_public(classes: dict[str, type[DiffoptError]]) -> None:
    core = {name for name, kind in classes.items() if kind.__module__ == "diffopt.errors"}
    assert core == {name for name in diffopt.errors.__all__ if name.endswith("Error")} - {"DiffoptError"}
