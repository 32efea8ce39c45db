"""``diffopt demo``: what the library does, in under a minute, on one core and without a download."""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

from diffopt.experiments.framework.options import expanded

OUT = "runs/demo"

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def add_command(commands: Commands) -> None:
    """Add ``demo``."""
    text = "Meta-train on sine waves and compare hypergradients on real data; under a minute, no download."
    demo = commands.add_parser("demo", help=text, description=text, allow_abbrev=False)
    demo.add_argument("--out", default=OUT, help=f"folder for the picture (default: {OUT})")
    demo.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run the demo."""
    from diffopt.commands.demo_parts import show  # needs optional packages

    show(expanded(given.out))
    return 0
