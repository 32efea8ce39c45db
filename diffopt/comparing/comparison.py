"""What a comparison of estimators found: its rows, as a table, as Markdown, as a picture, and in words."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from diffopt.adjoint.estimator import Estimator
from diffopt.comparing.curvature import Stationarity
from diffopt.comparing.worth import Worth
from diffopt.errors import EstimatorError
from diffopt.reports import table
from diffopt.tensors.tree import flatten


@final
@dataclass(frozen=True)
class Row:
    """One estimator's line; where it failed, its counts are ``None`` and its other numbers NaN.

    Attributes:
        estimator: the call that makes it, defaults left out.
        relative_error: ``|g - exact| / |exact|`` over all meta-parameters together.
        cosine: of the angle between ``g`` and the exact hypergradient.
        gradients: inner gradients evaluated, per task (``None``: not counted).
        products: curvature products (HVPs), per task.
        depth: batches of products that waited for one another.
        states: states stored in the rollout.
        seconds: processor time of forward and backward, median; on a GPU the time between two events of its stream.
        megabytes: peak of torch's allocator above the start (``None`` where the caller is profiling).
        stationarity: how near the inner problem is to its fixed point, where the estimator is one that relies on it.
        residual: what a Krylov estimator reports of its own system, worst task (``None``: it is another estimator).
        random: whether the estimator draws random numbers of its own, so that another call has another error.
        used: whether the problem ran a solve with this estimator.
        failure: the error that stopped it, such as ``"VmapError: ..."``; ``None``: none did.
        rule: the estimator itself, whose ``if_wrong`` and the like the notes quote.
    """

    estimator: str
    relative_error: float
    cosine: float
    gradients: int | None
    products: int | None
    depth: int | None
    states: int | None
    seconds: float
    megabytes: float | None
    stationarity: Stationarity | None = None
    residual: float | None = None
    random: bool = False
    used: bool = True
    failure: str | None = None
    rule: Estimator | None = field(default=None, repr=False, compare=False)


_HEADERS = ("estimator", "rel. error", "cosine", "gradients", "HVPs", "depth", "states", "time [ms]", "peak [MB]")


@final
@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns; ``print`` it, :meth:`to_markdown` it or :meth:`plot` it.

    Attributes:
        rows: one per estimator, in the order given.
        curvature: ``T`` times the spectral radius of one step's curvature term (``T * lr * lambda_max`` for gradient
            descent), the larger over the solves; ``None`` if it cannot be computed.
        notes: what to beware of on this problem.
        worth: what the exact hypergradient itself is worth, if ``compare`` was given ``directions``.
    """

    rows: tuple[Row, ...]
    curvature: float | None
    notes: tuple[str, ...]
    worth: Worth | None = None

    def cells(self) -> list[tuple[str, ...]]:
        """The table's cells as text, header first."""
        return [_HEADERS, *(_cells(row) for row in self.rows)]

    def __str__(self) -> str:
        """A table for the terminal."""
        header, *body = self.cells()
        rows = [cells[: 2 if row.failure else None] for cells, row in zip(body, self.rows, strict=True)]
        return "\n".join([table(header, rows, align="lr"), *self.notes])

    def to_markdown(self) -> str:
        """The table in Markdown."""
        header, *rows = self.cells()
        return "\n".join([table(header, rows, "markdown", "lr"), *(f"\n{note}" for note in self.notes)])

    def _repr_markdown_(self) -> str:
        """How a notebook shows it."""
        return self.to_markdown()

    def complete(self) -> tuple[Row, ...]:
        """The rows, once no estimator is found to have failed.

        Raises:
            EstimatorError: one has.
        """
        for row in self.rows:
            if row.failure is not None:
                raise EstimatorError(f"{row.estimator} failed", "a row of numbers", row.failure)
        return self.rows

    def plot(self, path: str | Path) -> Path:
        """Save a picture of error against time and against memory, without what failed; needs matplotlib."""
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatterSciNotation, NullFormatter

        figure = Figure(figsize=(10, 6), layout="constrained")
        colors: Any = mpl.colormaps["tab10"]
        rows = [row for row in self.rows if row.failure is None]
        exact = min([row.relative_error for row in rows if row.relative_error > 0], default=1.0) / 10
        columns = [("seconds", "processor time [s]"), ("megabytes", "peak memory above start [MB]")]
        for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), columns, strict=True):
            for i, row in enumerate(rows):
                marker = {"color": colors(i % 10), "marker": "os^vDP*"[i // 10 % 7], "linestyle": ""}
                value = getattr(row, name)
                axes.plot(
                    math.nan if value is None else value,
                    row.relative_error or exact,
                    markersize=9,
                    label=row.estimator,
                    **marker,
                )
            axes.axhline(exact, color="0.7", linewidth=1, zorder=0)
            axes.set(xscale="log", yscale="log", xlabel=label)
            axes.xaxis.set_major_formatter(LogFormatterSciNotation())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("relative error of the hypergradient (line: exactly 0)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        return Path(path)


def failed_row(estimator: Estimator, error: Exception) -> Row:
    """The line of an estimator that an error has stopped."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    nothing = math.nan
    return Row(brief(estimator), nothing, nothing, None, None, None, None, nothing, None, failure=text, rule=estimator)


def _cells(row: Row) -> tuple[str, ...]:
    if row.failure is not None:
        return (row.estimator, f"failed: {row.failure.partition(':')[0]}", *["-"] * (len(_HEADERS) - 2))
    counts = ("-" if value is None else str(value) for value in (row.gradients, row.products, row.depth, row.states))
    return (
        row.estimator,
        f"{row.relative_error:.1e}",
        f"{row.cosine:+.4f}",
        *counts,
        f"{1e3 * row.seconds:.1f}",
        "-" if row.megabytes is None else f"{row.megabytes:.2f}",
    )


def brief(value: Any) -> str:
    """The call that makes an estimator or a solver, options at their default left out."""
    if not is_dataclass(value):
        return repr(value)
    options = [(one, getattr(value, one.name)) for one in fields(value)]
    shown = [
        f"{one.name}={brief(option)}"
        for one, option in options
        if _differs(option, one.default_factory() if one.default_factory is not MISSING else one.default)
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def _differs(option: Any, default: Any) -> bool:
    """Whether an option is not at its default; no default is a tensor, and a tensor has no one truth to its ``!=``."""
    return any(isinstance(x, Tensor) for x in flatten(option)[0]) or bool(option != default)
