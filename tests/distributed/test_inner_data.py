"""Inner data over ranks: values, derivatives and hypergradients of one process, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks_in import cases


@pytest.mark.parametrize(("name", "world"), cases("inner_data"))
def test_inner_data_over_ranks(outcomes: Callable[..., dict[str, str]], name: str, world: int) -> None:
    found = outcomes("inner_data", world, world > 2)
    said = found.get(name, found.get("", "not run"))
    assert said == "", said
