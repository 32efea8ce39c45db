"""What an experiment is: settings, work units, a summary beside the paper's values, and pictures.

An experiment is a module ``experiments/<name>.py`` (``-`` written ``_``) that defines ``EXPERIMENT``, listed by name in
``catalogue.NAMES``. It is made of the library's public parts: a problem, a list of estimators and a picture. All else
is the frame's: progress, seeds, ``metrics.jsonl``, exact resume, the budget, tables, ``results.json``.

**Settings** are one frozen dataclass, its fields made by ``options.option``. There are three instances: ``quick``
(some seconds, for CI), ``standard`` (what two CPU cores can do in an evening at most) and ``full`` (the paper's
scale). A user changes single fields by ``--set FIELD=VALUE``.

**Units** are what is resumed: ``units(settings)`` lists them in the order they are run. A unit is a pure function of
the settings and of :class:`Work`, which holds the seed. It returns a dictionary for JSON: finite numbers, texts, lists,
dictionaries with texts as keys, ``None`` (anything else is a typed error). It may return times too; nothing else may
depend on the clock. Rules:

- draw all random numbers from ``work.generator(label)``: units that ask for the same label get the same numbers, so
  that estimators are compared on the same tasks; never from torch's global generator;
- make units of seconds or minutes; one that takes longer is ``resumable``: it asks ``work.saved()`` where to go on,
  and calls ``work.step(...)`` once per iteration, which shows progress, saves, and stops the unit when Ctrl-C was
  heard or the budget is used up. A resumed unit must end where an uninterrupted one ends: put generators' states and
  the outer optimizer's ``state_dict`` into what is saved. ``outer_loop.train`` does all of this;
- where time is measured, use ``time.process_time()``: the machine may be shared;
- ``cost`` says how long a unit takes beside the others, in any unit of time: the frame learns from those that are
  done how much of the budget the next one needs.

**Starts**: ``starts(settings.seeds, units_of_one)`` makes the units once for every start, each with random numbers of
its own. A unit's ``keys`` say what it is of; with them ``claims.Finished`` makes one table of all rows, from which
``texts.asked`` answers claims, ``tables.listed`` makes a table and ``pictures.curves`` a picture.

**Words** stand in ``NAME.toml`` beside the module: the title, the papers' settings (which ``--list`` and the results
page set beside ours), the notes, and the claims of the papers; ``texts`` says how.

**The summary** is made from the units that are finished, which after a run out of time are not all: leave rows out and
answer claims by "not measured", never raise. An answer is drawn from the interval over starts and test episodes.

**Pictures** are PNG files written into the folder given; use ``pictures`` for colours and saving.

A minimal experiment::

    @final
    @dataclass(frozen=True)
    class Settings:
        steps: int = option(5, "inner steps", whole(1))
        seeds: int = option(3, "starts", whole(1))

    def unit(settings: Settings, order: int, work: Work) -> Row:
        start = torch.randn(3, generator=work.generator("start"))
        return {"error": ...}

    def units(s: Settings) -> list[Unit]:
        runs = [Unit(f"L={l}", partial(unit, s, l), keys={"L": l, "estimator": "binomial"}) for l in range(s.steps)]
        return starts(s.seeds, lambda: runs)

    def summary(settings: Settings, done: Finished) -> Summary:
        data = done.table(lambda row: [row])
        return Summary(listed("Errors", data, {"L": "L"}, {"error": "error"}), asked("mine", "errors", data))

    EXPERIMENT = described(
        "mine", quick=Settings(2), standard=Settings(), full=Settings(50),
        units=units, summary=summary, pictures=pictures,
    )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar, final

from diffopt.errors import DiffoptError
from diffopt.experiments.framework.unit_context import Work

Settings = TypeVar("Settings")
Row: TypeAlias = dict[str, Any]
"""What a unit returns: for JSON."""
Results: TypeAlias = Mapping[str, Row]
"""The rows of the finished units by the units' names, in the order of the units."""
Cell: TypeAlias = str | float | int | None
Answer: TypeAlias = Literal["yes", "no", "partly", "not decided", "not measured"]
STRIDE = 1000
"""From the seed of one start to that of the next, so that the starts of neighbouring seeds are not the same."""


class ExperimentError(DiffoptError, ValueError):
    """There is no such experiment, or one broke its contract."""


@final
@dataclass(frozen=True)
class Needs:
    """What an experiment needs at its standard settings.

    Attributes:
        data: files, or ``none``.
        minutes_cpu: on two CPU cores.
        minutes_gpu: on a GPU; ``None`` if it gains nothing from one, and ``--device`` is refused.
    """

    data: str
    minutes_cpu: float
    minutes_gpu: float | None


@final
@dataclass(frozen=True)
class Unit:
    """One piece of work that is done whole or not at all.

    Attributes:
        name: unique in the experiment.
        run: returns the row, see the module's description.
        cost: time beside the other units'.
        resumable: it calls ``work.step`` often, so that it may be begun with less time left than it needs.
        keys: what it is of, such as ``{"seed": 0, "K": 5}``: columns of the long table that claims are answered from.
    """

    name: str
    run: Callable[[Work], Row]
    cost: float = 1.0
    resumable: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)


def starts(seeds: int, units: Callable[[], Sequence[Unit]]) -> list[Unit]:
    """The units once for every start, each start with random numbers of its own; start 0 has those of the run's seed.

    The names are ``seed=1 ...``, and ``seed`` is one of the keys.
    """
    return [
        replace(unit, name=f"seed={seed} {unit.name}", run=of_start(unit.run, seed), keys={"seed": seed, **unit.keys})
        for seed in range(seeds)
        for unit in units()
    ]


def of_start(run: Callable[[Work], Row], number: int) -> Callable[[Work], Row]:
    """The same work with random numbers of its own: those of another seed; start 0 has the run's seed."""

    def begun(work: Work) -> Row:
        work.seed += STRIDE * number
        try:
            return run(work)
        finally:
            work.seed -= STRIDE * number

    return begun


@final
@dataclass(frozen=True)
class Table:
    """A table of the summary; put the paper's values in a column beside ours."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@final
@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and what was measured about it.

    Attributes:
        text: what is claimed.
        source: where, such as ``binomial paper, Fig. 3a``.
        answer: by measurement.
        evidence: the figures behind the answer.
        effect: how large it is, with its interval; empty where nothing is estimated.
        starts: how many the answer rests on.
        headline: it is among the answers that the results page begins with.
    """

    text: str
    source: str
    answer: Answer
    evidence: str
    effect: str = ""
    starts: int = 1
    headline: bool = False


@final
@dataclass(frozen=True)
class Summary:
    """What an experiment found.

    Attributes:
        tables: figures, ours beside the paper's.
        claims: of the papers.
        notes: where we differ from the paper and why, one sentence or more each; plain Markdown.
    """

    tables: tuple[Table, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Experiment(Generic[Settings]):
    """An experiment, see the module's description.

    Attributes:
        name: on the command line.
        title: what it is, in words.
        paper: which figures and tables of which paper.
        needs: at the standard settings.
        quick: settings for CI.
        standard: settings for two CPU cores.
        full: settings at the paper's scale.
        units: the work, in order.
        summarise: what the finished units say.
        draw: writes pictures of the finished units into a folder and returns their paths.
        papers: what the paper's settings are, by the name of ours; those it does not name are left out.
    """

    name: str
    title: str
    paper: str
    needs: Needs
    quick: Settings
    standard: Settings
    full: Settings
    units: Callable[[Settings], Sequence[Unit]]
    summarise: Callable[[Settings, Results], Summary]
    draw: Callable[[Settings, Results, Path], Sequence[Path]]
    papers: Mapping[str, str] = field(default_factory=dict)
