"""Claims that compute their own answer, evidence and interval from one long table.

A long table has one row per measured thing: ``seed`` says of which start, ``draw`` of which episode or batch (if any),
the other columns what was measured and where. A claim says in a formula what is claimed, and of which rows::

    ask("at equal L, binomial's error is 1000 times smaller", "Fig. 3a",
        "error: truncated / binomial >= 1e3 by lr", "K == 5 and L == 4")

A formula is ``COLUMN: ESTIMATOR / ESTIMATOR >= NUMBER by COLUMNS; COLUMNS``. The rows of an estimator are those whose
column ``estimator`` says so, or all for ``*``; ``ESTIMATOR [QUERY]`` takes some of these. Between two stands ``/`` or
``-``, which compare numbers of the same start and draw; one alone is judged by itself. ``~`` in the place of ``>=``
claims that a difference is as small as that, or a ratio or a number within such a factor of 1. The claim is about each
setting that the columns make; those after ``;`` are of the first estimator only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, final

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.framework.experiment import Answer, Claim, Results, Row, Unit
from diffopt.experiments.framework.statistics import Effect, Wanted, differences, judged, together, two_level

Frame: TypeAlias = Any
"""A table of pandas, which has no types of its own."""
MOST_TOLD = 5
"""Settings whose effects are written out one by one."""
FORMULA = re.compile(
    r"(?P<value>[^:]+): (?P<first>.+?)(?: (?P<sign>[-/]) (?P<second>.+?))? "
    r"(?P<wanted>>=|<=|>|<|~) (?P<margin>[-+.e\d]+)(?: by (?P<cases>[^;]*)(?:; (?P<each>.+))?)?"
)
SIDE = re.compile(r"(?P<estimator>[^\[]+?) ?(?:\[(?P<query>.+)\])?")
WANTED: dict[str, Wanted] = {">": "above", ">=": "at least", "<": "below", "<=": "at most", "~": "within"}
UNFINISHED = "no unit that tests it is finished"


@final
@dataclass(frozen=True)
class Finished:
    """The units of an experiment at its settings, and what is finished of them."""

    units: Sequence[Unit]
    results: Results

    def table(self, records: Callable[[Row], Iterable[Row] | None], **keys: Any) -> Frame:
        """The long table: the rows of the finished units, each with the unit's keys.

        Args:
            records: the rows that a unit's result holds; ``None``: the unit is of another kind.
            keys: only of units with these keys.
        """
        rows = [
            {**unit.keys, **record}
            for unit in self.units
            if unit.name in self.results and all(unit.keys.get(key) == value for key, value in keys.items())
            for record in records(self.results[unit.name]) or ()
        ]
        return pd.DataFrame(rows)


class Question(Protocol):
    """What can be asked of a long table."""

    def answer(self, data: Frame) -> Claim:
        """The claim with its answer."""
        ...


@final
@dataclass(frozen=True)
class Formula:
    """One formula, taken apart."""

    text: str

    def effects(self, data: Frame, *, crossed: bool) -> dict[str, tuple[Effect, Answer]]:
        """The effect and the answer in each setting.

        Raises:
            ValueError: it is no formula.
        """
        part = FORMULA.fullmatch(self.text)
        if part is None:
            raise ValueError(f"{self.text!r} is no formula, expected one such as 'error: a / b >= 2 by K, lr'")
        cases, each = (re.findall(r"[^,]+", (part[name] or "").replace(", ", ",")) for name in ("cases", "each"))
        value, ratio, paired = part["value"], part["sign"] == "/", part["second"] is not None
        rivals, margin, found = _rows(data, part["second"] or "*"), float(part["margin"]), {}
        for key, group in _groups(_rows(data, part["first"]), [*cases, *each]):
            if paired:
                here = rivals
                for column in cases:
                    here = here[here[column] == key[column]]
                both = group.merge(here, on=["seed", "draw"], suffixes=("", " of the other"))
                pair = (_by_start(both, value), _by_start(both, f"{value} of the other"))
                values = differences(*pair, logarithms=ratio)
            else:
                values = _by_start(group.dropna(subset=[value]), value)
            if values:
                effect = two_level(values, crossed=crossed)
                effect = effect.exponential() if ratio else effect
                zero = float(ratio) if paired else margin
                found[_words(key, data)] = effect, judged(effect, WANTED[part["wanted"]], margin, zero)
        return found

    @property
    def words(self) -> str:
        """What is compared."""
        return re.split(" [<>~]", self.text)[0]


@final
@dataclass(frozen=True)
class Compare:
    """Numbers, or differences or ratios of numbers, on one side of a margin.

    Attributes:
        text: the claim.
        source: of the claim.
        formulas: what is claimed; several are all claimed.
        where: which rows, as a query of pandas; all if empty.
        crossed: every start is tested on the same episodes.
        order: it is enough that nothing speaks against it and something for it.
        unit: of the effect, in words.
        note: what else is to be known about the evidence.
        headline: see :class:`Claim`.
    """

    text: str
    source: str
    formulas: tuple[Formula, ...]
    where: str = ""
    crossed: bool = False
    order: bool = False
    unit: str = ""
    note: str = ""
    headline: bool = False

    def effects(self, data: Frame) -> dict[str, tuple[Effect, Answer]]:
        """The effect and the answer in each setting of each formula."""
        if not len(data):
            return {}
        data = data.query(self.where) if self.where else data
        data = data.assign(draw=0) if "draw" not in data else data
        found = {}
        for formula in self.formulas:
            label = formula.words if len(self.formulas) > 1 else ""
            for name, pair in formula.effects(data, crossed=self.crossed).items():
                found[", ".join(filter(None, (label, name)))] = pair
        return found

    def answer(self, data: Frame) -> Claim:
        """The claim with its answer: drawn from the intervals of all settings."""
        found = self.effects(data)
        effects: list[Effect] = [effect for effect, _ in found.values()]
        answers: list[Answer] = [answer for _, answer in found.values()]
        starts = min((effect.starts for effect in effects), default=1)
        parts = [] if found else [UNFINISHED]
        if len(found) > 1:
            counts = ", ".join(f"{answer} in {answers.count(answer)}" for answer in dict.fromkeys(answers))
            parts.append(f"{counts} of {len(found)} settings")
        if found and (len(found) <= MOST_TOLD or len(self.formulas) > 1):
            parts.append(
                ", ".join(f"{effect}{self.unit}{name and f' ({name})'}" for name, (effect, _) in found.items())
            )
        elif found:
            parts.append(_in_short(effects, self.unit))
        parts += ["from one start nothing is decided"] * (bool(found) and starts == 1)
        told = "; ".join([*parts, *[self.note] * bool(self.note)])
        answer, short = together(answers, order=self.order), _in_short(effects, self.unit)
        return Claim(self.text, self.source, answer, told, short, starts, self.headline)


def ask(text: str, source: str, formula: str | tuple[str, ...], where: str = "", **options: Any) -> Compare:
    """The claim that a formula makes, or that several make; ``options`` are the other fields of :class:`Compare`."""
    formulas = (formula,) if isinstance(formula, str) else formula
    return Compare(text, source, tuple(map(Formula, formulas)), where, **options)


@final
@dataclass(frozen=True)
class Every:
    """A statement that holds in each row or does not: counts, bounds, orders of exact numbers.

    Attributes:
        text: the claim.
        source: of the claim.
        test: the statement, as an expression of pandas.
        where: which rows, as a query; all if empty.
        shown: a column whose range is shown.
        theorem: one counterexample refutes it, so that it never holds ``partly``.
        note: what else is to be known about the evidence.
        headline: see :class:`Claim`.
    """

    text: str
    source: str
    test: str
    where: str = ""
    shown: str = ""
    theorem: bool = False
    note: str = ""
    headline: bool = False

    def answer(self, data: Frame) -> Claim:
        """The claim with its answer: in all rows, in none, in some."""
        rows = data.query(self.where) if len(data) and self.where else data
        if not len(rows):
            return Claim(self.text, self.source, "not measured", UNFINISHED, headline=self.headline)
        flags = [bool(flag) for flag in rows.eval(self.test)]
        parts = [f"in {sum(flags)} of {len(flags)} cases"]
        if self.shown:
            low, high = rows[self.shown].min(), rows[self.shown].max()
            parts.append(f"{self.shown}: {low:.3g}" + (f" to {high:.3g}" if high != low else ""))
        answer: Answer = "yes" if all(flags) else "partly" if any(flags) and not self.theorem else "no"
        starts = rows["seed"].nunique() if "seed" in rows else 1
        told = "; ".join([*parts, *[self.note] * bool(self.note)])
        return Claim(self.text, self.source, answer, told, parts[0], starts, self.headline)


def side_by_side(data: Frame, value: str, index: Sequence[str]) -> Frame:
    """One row per setting, with a column for the value of each estimator."""
    if not len(data):
        return data
    return data.pivot_table(index=list(index), columns="estimator", values=value).reset_index()


def _rows(data: Frame, side: str) -> Frame:
    """The rows of one side of a formula."""
    found = SIDE.fullmatch(side)
    assert found is not None
    data = data if found["estimator"] == "*" else data[data["estimator"] == found["estimator"]]
    return data.query(found["query"]) if found["query"] else data


def _groups(data: Frame, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], Frame]]:
    """The rows of each setting, with its values of the columns."""
    if not columns:
        if len(data):
            yield {}, data
        return
    for key, group in data.groupby(list(columns), sort=False):
        yield dict(zip(columns, key, strict=True)), group


def _by_start(data: Frame, column: str) -> list[list[float]]:
    return [[float(x) for x in group.sort_values("draw")[column]] for _, group in data.groupby("seed")]


def _words(key: Mapping[str, Any], data: Frame) -> str:
    """A setting in words; what is the same in all of them is left out."""
    told = {name: value for name, value in key.items() if data[name].nunique() > 1}
    return ", ".join(value if isinstance(value, str) else f"{name}={value:g}" for name, value in told.items())


def _in_short(effects: Sequence[Effect], unit: str) -> str:
    if len(effects) < 2:
        return "".join(f"{effect}{unit}" for effect in effects)
    means = [effect.mean for effect in effects]
    return f"{min(means):.3g} to {max(means):.3g}{unit} in {len(effects)} settings"
