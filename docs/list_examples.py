"""What the page "Examples" shows: every program in ``examples/``, in its own words."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "examples"


def markdown(folder: Path = FOLDER) -> str:
    """All examples by name: the first sentence, and the program, folded."""
    return "\n\n".join(map(_entry, sorted(folder.glob("*.py"))))


def _entry(path: Path) -> str:
    source = path.read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(source)) or ""
    first = " ".join(said.split("\n\n")[0].split())
    program = f"<details><summary>{path.name}</summary>\n\n```python\n{source.rstrip()}\n```\n\n</details>"
    return f"**{path.stem.replace('_', ' ')}**: {first.replace('``', '`')}\n\n{program}"
