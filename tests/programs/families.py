"""All programs, family by family."""

from __future__ import annotations

from programs import games, hyperparameters, implicit, meta_learning, online, optimizers, roots, stopping
from programs.table import Program

FAMILIES = (meta_learning, optimizers, hyperparameters, implicit, roots, games, online, stopping)
TABLE = [row for family in FAMILIES for row in vars(family).values() if isinstance(row, Program)]
