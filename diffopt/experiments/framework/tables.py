"""The one way in which tables of a summary are made from a long table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from diffopt.experiments.framework.claims import Frame
from diffopt.experiments.framework.experiment import Cell, Table
from diffopt.experiments.framework.statistics import two_level

Value: TypeAlias = "str | tuple[str, str]"
"""A column, of which the mean is shown, or a column and what: ``median``, ``max``, ``+-`` over starts and episodes."""


def listed(
    title: str,
    data: Frame,
    index: Mapping[str, str],
    values: Mapping[str, Value],
    *,
    across: str = "",
    cell: Value = "",
    label: Callable[[Any], str] = str,
    paper: Callable[[Mapping[str, Any]], Cell] | None = None,
    said: str = "the paper",
) -> tuple[Table, ...]:
    """A table with one row for each setting, its numbers over starts and draws; none if there are no rows.

    Args:
        title: above it.
        data: the long table.
        index: the columns that make a setting, by their heads.
        values: the columns that are shown, by their heads.
        across: a column whose values become columns of the table.
        cell: what is shown in these.
        label: the heads of these columns.
        paper: what the paper says, given a setting's values.
        said: the head of that column.
    """
    if not len(data):
        return ()
    beyond = list(dict.fromkeys(data[across])) if across else []
    rows = []
    for key, group in data.groupby(list(index.values()), sort=False):
        setting = dict(zip(index.values(), key, strict=True))
        cells = [_plain(x) for x in key] + [_number(group, value) for value in values.values()]
        cells += [_number(group[group[across] == at], cell) for at in beyond]
        rows.append((*cells, paper(setting)) if paper else tuple(cells))
    heads = (*index, *values, *(label(at) for at in beyond), *[said] * (paper is not None))
    return (Table(title, heads, tuple(rows)),)


def levelled(name: str) -> tuple[str, int]:
    """An estimator's name without its level, and the level; 0 where it has none."""
    kind, _, level = name.rpartition(" ")
    return (kind, int(level)) if level.isdecimal() else (name, 0)


def _number(group: Frame, value: Value) -> Cell:
    column, how = (value, "mean") if isinstance(value, str) else value
    if column not in group or not len(found := group[column].dropna()):
        return None
    if how == "+-":
        rows = [list(each[column]) for _, each in group.groupby("seed")]
        return two_level(rows, crossed="draw" in group and len({len(row) for row in rows}) == 1).half_width
    if not isinstance(found.iloc[0], str):
        return _plain(getattr(found, how)())
    return str(found.iloc[0])


def _plain(value: Any) -> Cell:
    """A number of Python: whole ones without a point, and nothing for what is not finite."""
    if isinstance(value, str):
        return value
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 1e6 else number
