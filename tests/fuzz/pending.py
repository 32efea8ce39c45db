"""What is known to fall short and is being put right: taken out of the counts, one line each; empty is the goal."""

from __future__ import annotations

CALLS: dict[str, str] = {}
UNROLLED_ACCEPTS: set[str] = set()
OBJECTS: set[str] = set()
SLOTS: set[str] = set()
