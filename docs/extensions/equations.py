"""Numbered equations: each gets an anchor, docstrings that cite "derivations (3.8)" get links, and tags render.

The numbers stand in the page itself (``\\tag{3.8}``), for docstrings and pages cite them and papers keep theirs.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

BLOCK = re.compile(r"^\$\$\n.*?^\$\$$", re.DOTALL | re.MULTILINE)
TAG = re.compile(r"\\tag\{([\w.]+)\}")
CITED = re.compile(
    r"(?P<word>[Dd]erivations)(?P<comma>,?\s+)(?P<numbers>(?:sections?\s+)?\(?\d[\w.()]*(?:(?:-|,\s+|\s+and\s+)\(?\d[\w.()]*)*)"
)
NUMBER = re.compile(r"\((?P<equation>\d+(?:\.\d+|[a-c]))\)|(?P<section>\d+(?:\.\d+)?)")


def equation_label(number: str) -> str:
    """The anchor of an equation: ``equation-3-8`` for (3.8)."""
    return f"equation-{number.replace('.', '-')}"


def add_anchors(app: Sphinx, name: str, source: list[str]) -> None:
    """Put an anchor before every numbered equation of the derivations."""
    if name == "derivations":
        source[0] = BLOCK.sub(_with_anchor, source[0])


def _with_anchor(block: re.Match[str]) -> str:
    anchors = "".join(f"({equation_label(number)})=\n" for number in TAG.findall(block[0]))
    return f"{anchors}{block[0]}" if anchors else block[0]


def keep_tags(app: Sphinx, document: nodes.document) -> None:
    """Wrap tagged equations whole: Sphinx would put those of several lines into ``split``, where no tag may stand."""
    for block in document.findall(nodes.math_block):
        if TAG.search(block.astext()):
            text = rf"\begin{{equation}}{block.astext().strip()}\end{{equation}}"
            block.children = [nodes.Text(text)]
            block["no-wrap"] = block["nowrap"] = True


def link_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Turn "derivations (3.8)" and "derivations, section 3.1" in a docstring into links."""
    lines[:] = CITED.sub(_with_links, "\n".join(lines)).split("\n")


def _with_links(cited: re.Match[str]) -> str:
    return f":ref:`{cited['word']} <derivations>`{cited['comma']}{NUMBER.sub(_link, cited['numbers'])}"


def _link(number: re.Match[str]) -> str:
    if number["equation"]:
        return f":ref:`({number['equation']}) <{equation_label(number['equation'])}>`"
    return f":ref:`{number['section']} <derivations-{number['section'].replace('.', '-')}>`"


def setup(app: Sphinx) -> dict[str, bool]:
    """Join Sphinx."""
    app.connect("source-read", add_anchors)
    app.connect("doctree-read", keep_tags)
    app.connect("autodoc-process-docstring", link_docstring, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
