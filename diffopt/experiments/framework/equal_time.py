"""Runs of a training beside the exact method's: accuracy after equal outer iterations, and in equal time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from diffopt.experiments.framework.claims import Frame
from diffopt.experiments.framework.experiment import Row
from diffopt.experiments.framework.outer_loop import smoothed
from diffopt.experiments.framework.tables import Value

TIMED = "in equal time"
"""Validation accuracy when the fastest method of the group had finished, between two looks on a straight line."""

COLUMNS: dict[str, Value] = {
    "accuracy [%]": "accuracy",
    "+- (95 %)": ("accuracy", "+-"),
    "minus exact": "minus exact",
    "+- of that": ("minus exact", "+-"),
    "seconds": "seconds",
    "of exact's": "share",
    "in equal time [%]": TIMED,
}
"""What a table says of each method."""


def validated(row: Row) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The processor seconds of training after which a run was validated, and its accuracies then."""
    return tuple(row["seconds"][after - 1] if after else 0.0 for after in row["after"]), tuple(row["validation"])


LABELS = {
    "after": "outer iteration",
    "clock": "processor time of training [s]",
    "validation": "validation accuracy [%]",
    "iteration": "outer iteration",
    "loss": "outer training loss",
}
"""The axes of :func:`looks`, for :func:`pictures.curves`."""


def looks(row: Row) -> Iterator[Row]:
    """The validation accuracies of a run over iterations and time, and its smoothed loss, as rows of a long table."""
    if "each" in row:
        for at, (after, clock, value) in enumerate(zip(row["after"], *validated(row), strict=True)):
            yield {"after": after, "clock": clock, "validation": value, "at": at}
        for at, loss in enumerate(smoothed(row["losses"], 31)):
            yield {"iteration": at + 1, "loss": loss, "at": at}


def episodes(row: Row, count: int) -> Iterator[Row]:
    """One row for each of so many test episodes of a run."""
    diverged = "each" not in row
    seconds, looks = (None, ((0.0,), (0.0,))) if diverged else (row["seconds"][-1], validated(row))
    for draw, accuracy in enumerate([0.0] * count if diverged else row["each"]):
        yield {"draw": draw, "accuracy": accuracy, "seconds": seconds, "looks": looks, "diverged": int(diverged)}


def beside_exact(data: Frame, exact: Sequence[str], group: Sequence[str] = ()) -> Frame:
    """Set every row beside the exact method's of the same start and episode, within each group of settings.

    The accuracy in equal time is the run's, the same for every episode.
    """
    time, same = data.groupby(["seed", *group])["seconds"].transform("min"), ["seed", "draw", *group]
    data[TIMED] = [_between(t, *looks) for t, looks in zip(time, data.pop("looks"), strict=True)]
    of_exact = data[data["method"].isin(exact)][[*same, "accuracy", "seconds"]]
    data = data.merge(of_exact, on=same, how="left", suffixes=("", " of exact"))
    data["minus exact"] = data["accuracy"] - data["accuracy of exact"]
    return data.assign(share=data["seconds"] / data["seconds of exact"])


def _between(time: float, times: Sequence[float], values: Sequence[float]) -> float:
    """The value at a time, on a straight line between its neighbours; NaN before the first."""
    return float(np.interp(time, times, values, left=math.nan))
