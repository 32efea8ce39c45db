"""Programs of the kinds that users of other libraries write, each against an answer that is not this library's."""

from __future__ import annotations

import pytest
from programs.families import TABLE
from programs.table import INSTALLED, Program

pytestmark = [pytest.mark.usefixtures("float64_by_default"), pytest.mark.filterwarnings("ignore:.*:FutureWarning")]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_program_gives_the_answer(row: Program, request: pytest.FixtureRequest):
    if row.by in INSTALLED:
        pytest.importorskip(row.by)
    if row.gap:
        request.applymarker(pytest.mark.xfail(strict=True, reason=row.gap))
    assert row.error() < row.tolerance
