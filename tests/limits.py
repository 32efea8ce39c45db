"""How long a test waits for what should take seconds, and what part of many cases runs every time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

# A limit is there so that what hangs ends at last, never to say how fast something is: on a busy machine everything may
# take thirty times as long. The limit of a whole test, `timeout` in pyproject.toml, is larger.
PATIENCE = 1200.0


def sampled(values: Iterable[Any], every: int) -> list[Any]:
    """Cases of a test: one in ``every`` runs each time, the others where the slow tests run."""
    return [value if i % every == 0 else pytest.param(value, marks=pytest.mark.slow) for i, value in enumerate(values)]
