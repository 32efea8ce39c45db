"""Params that are DTensors: every estimator is that of one process, or a typed error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks_in import cases


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), cases("sharded"))
def test_sharded_params(outcomes: Callable[..., dict[str, str]], name: str, world: int) -> None:
    found = outcomes("sharded", world, world > 2)
    said = found.get(name, found.get("", "not run"))
    assert said == "", said
