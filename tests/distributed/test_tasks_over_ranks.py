"""Tasks over ranks: the recipes are one process's numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks_in import names_of


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", names_of("tasks_over_ranks"))
def test_tasks_over_ranks(outcomes: Callable[..., dict[str, str]], name: str, world: int) -> None:
    found = outcomes("tasks_over_ranks", world, True)
    said = found.get(name, found.get("", "not run"))
    assert said == "", said
