"""What the tests of ``compare`` share."""

from __future__ import annotations

from typing import Any

import pytest
from compared import quadratic_problem


@pytest.fixture
def problem() -> Any:
    return quadratic_problem()
