"""All programs, family by family."""

from __future__ import annotations

from programs import meta_learning, optimizers
from programs.table import Program

FAMILIES = (meta_learning, optimizers)
TABLE = [row for family in FAMILIES for row in vars(family).values() if isinstance(row, Program)]
