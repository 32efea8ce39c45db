"""What an experiment says in words, from the file ``NAME.toml`` beside its module: titles, claims, notes.

The file has ``title``, ``paper``, ``data``, ``minutes_cpu`` and perhaps ``minutes_gpu`` (see :class:`Needs`), and
``notes``; under ``[papers]`` the papers' settings, by the names of ours; and the claims, each group of which is asked
of one long table::

    [[claims.errors]]
    text = "at equal L, binomial's error is 1000 times smaller"
    source = "Fig. 3a"
    formula = "error: truncated / binomial >= 1e3 by lr"
    where = "K == 5 and L == 4"

The keys are the fields of :class:`Compare`, with a ``formula`` or a list of these, or of :class:`Every`, with a
``test``. What stands in braces is put in by whoever asks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from diffopt.experiments.framework.claims import Every, Finished, Frame, Question, ask
from diffopt.experiments.framework.experiment import Claim, Experiment, Needs, Results, Settings, Summary, Unit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]  (where no checker runs)


@lru_cache
def texts(name: str) -> dict[str, Any]:
    """The content of an experiment's file."""
    file = resources.files("diffopt.experiments") / f"{name.replace('-', '_')}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def asked(name: str, group: str, data: Frame, **values: object) -> tuple[Claim, ...]:
    """The claims of one group with their answers.

    Args:
        name: of the experiment.
        group: of claims.
        data: the long table.
        values: what is put in place of the braces.
    """
    entries = texts(name)["claims"][group]
    return tuple(_question({key: _filled(item, values) for key, item in each.items()}).answer(data) for each in entries)


def _filled(item: Any, values: dict[str, object]) -> Any:
    if isinstance(item, list):
        return tuple(_filled(part, values) for part in item)
    return item.format(**values) if isinstance(item, str) else item


def _question(fields: dict[str, Any]) -> Question:
    return ask(**fields) if "formula" in fields else Every(**fields)


def described(
    name: str,
    *,
    quick: Settings,
    standard: Settings,
    full: Settings,
    units: Callable[[Settings], Sequence[Unit]],
    summary: Callable[[Settings, Finished], Summary],
    pictures: Callable[[Settings, Finished, Path], Sequence[Path]],
) -> Experiment[Settings]:
    """The experiment that the file describes; its notes come before those that the summary adds."""
    said = texts(name)

    def summarise(settings: Settings, results: Results) -> Summary:
        found = summary(settings, Finished(units(settings), results))
        return replace(found, notes=tuple(" ".join(note.split()) for note in said["notes"]) + found.notes)

    return Experiment(
        name=name,
        title=said["title"],
        paper=said["paper"],
        needs=Needs(said["data"], said["minutes_cpu"], said.get("minutes_gpu")),
        quick=quick,
        standard=standard,
        full=full,
        units=units,
        summarise=summarise,
        draw=lambda settings, results, folder: pictures(settings, Finished(units(settings), results), folder),
        papers=said.get("papers", {}),
    )
