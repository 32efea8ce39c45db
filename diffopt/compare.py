"""``compare``: several estimators on one problem, side by side: error, cost, depth, time and memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, cast, final, runtime_checkable

import torch
from torch import Tensor

from diffopt.allocations import peak_bytes
from diffopt.arguments import check_whole
from diffopt.diagnostics import Stationarity, curvature_number, solves_behind, stationarity
from diffopt.errors import DisconnectedError, EstimatorError, LossError
from diffopt.estimator import Estimator
from diffopt.faults import signature_error
from diffopt.graph import leaves_behind
from diffopt.reverse import Reverse
from diffopt.tree import describe, flatten


@runtime_checkable
class Comparable(Protocol):
    """A problem that :func:`compare` can run by itself, such as those of ``diffopt.tasks``."""

    def compare_loss(self, estimator: Estimator) -> Tensor:
        """The outer loss, differentiable in the problem's meta-parameters by ``estimator``."""
        ...


@final
@dataclass(frozen=True)
class Row:
    """One estimator's line.

    Attributes:
        estimator: the call that makes it, defaults left out.
        relative_error: ``|g - exact| / |exact|`` over all meta-parameters together.
        cosine: of the angle between ``g`` and the exact hypergradient.
        gradients: inner gradients evaluated, per task (``None``: not counted).
        products: curvature products (HVPs), per task.
        depth: batches of products that waited for one another.
        states: states stored in the rollout.
        seconds: processor time of forward and backward, median.
        megabytes: peak of torch's allocator above the start (``None`` where the caller is profiling).
        stationarity: how near the inner problem is to its fixed point, where the rule is one that relies on it.
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
    """

    rows: tuple[Row, ...]
    curvature: float | None
    notes: tuple[str, ...]

    def cells(self) -> list[tuple[str, ...]]:
        """The table's cells as text, header first."""
        return [_HEADERS, *(_cells(row) for row in self.rows)]

    def __str__(self) -> str:
        """A table for the terminal."""
        cells = self.cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(_HEADERS))]
        lines = []
        for name, *numbers in cells:
            columns = (f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True))
            lines.append("  ".join([f"{name:{widths[0]}}", *columns]))
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *self.notes])

    def to_markdown(self) -> str:
        """The table in Markdown."""
        header, *rows = (f"| {' | '.join(row)} |" for row in self.cells())
        return "\n".join(
            [header, "|---" + "|--:" * (len(_HEADERS) - 1) + "|", *rows, *(f"\n{note}" for note in self.notes)]
        )

    def plot(self, path: str | Path) -> Path:
        """Save a picture of error against time and against memory; needs matplotlib."""
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatterSciNotation, NullFormatter

        figure = Figure(figsize=(10, 6), layout="constrained")
        colors: Any = mpl.colormaps["tab10"]
        exact = min([row.relative_error for row in self.rows if row.relative_error > 0], default=1.0) / 10
        columns = [("seconds", "processor time [s]"), ("megabytes", "peak memory above start [MB]")]
        for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), columns, strict=True):
            for i, row in enumerate(self.rows):
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


def _cells(row: Row) -> tuple[str, ...]:
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
    options = [(field, getattr(value, field.name)) for field in fields(value)]
    shown = [
        f"{field.name}={brief(option)}"
        for field, option in options
        if _differs(option, field.default_factory() if field.default_factory is not MISSING else field.default)
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def _differs(option: Any, default: Any) -> bool:
    """Whether an option is not at its default; no default is a tensor, and a tensor has no one truth to its ``!=``."""
    return any(isinstance(x, Tensor) for x in flatten(option)[0]) or bool(option != default)


def compare(
    problem: Callable[[Estimator], Tensor] | Comparable,
    estimators: Sequence[Estimator],
    *,
    exact: Estimator | None = None,
    repeats: int = 3,
) -> Comparison:
    r"""Run every estimator on one problem and set its hypergradient beside the exact one.

    .. math:: \text{error} = \frac{\|\hat\nabla - \nabla\|}{\|\nabla\|},\qquad
              \cos = \frac{\hat\nabla^\top\nabla}{\|\hat\nabla\|\,\|\nabla\|}

    over all leaf tensors that require grad and that the outer loss depends on, together.

    Args:
        problem: ``problem(estimator)`` returns the outer loss; it must be the same problem at every call. Or a problem
            of ``diffopt.tasks``.
        estimators: what to compare.
        exact: what to compare with; default :class:`diffopt.estimators.Reverse`.
        repeats: runs per estimator, of which the median time counts; a run before them is not timed.

    Returns:
        A :class:`Comparison`. Time is processor time and includes the outer loss; memory is the peak of torch's
        allocator above the start of the call, tensors of the problem itself not counted.

    Raises:
        EstimatorError: ``exact`` or an entry of ``estimators`` is not one.
        LossError: ``problem`` is not a function of an estimator, or does not return a scalar.
        HyperparameterError: ``repeats`` is not an integer >= 1.
        DisconnectedError: the outer loss depends on no tensor that requires grad, or its exact gradient is zero.

    Example:
        >>> import torch, diffopt
        >>> from diffopt.estimators import FirstOrder, Truncated
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> def problem(estimator):
        ...     solution = diffopt.solve(
        ...         lambda w: w.square().sum(), w, optimizer=diffopt.SGD(0.1), steps=3, estimator=estimator
        ...     )
        ...     return solution.params.square().sum()
        >>> first_order, truncated = diffopt.compare(problem, [FirstOrder(), Truncated(3)]).rows
        >>> round(first_order.relative_error, 4), round(truncated.relative_error, 4)  # 1 / 0.8**3 - 1
        (0.9531, 0.0)
    """
    run, reference_rule = _checked(problem, estimators, exact, repeats)
    loss = _outer_loss(run, reference_rule)
    # what is made anew in every call is no meta-parameter
    lasting = {id(leaf) for leaf in leaves_behind(run(reference_rule))}
    leaves = [leaf for leaf in leaves_behind(loss) if id(leaf) in lasting]
    if not leaves:
        raise DisconnectedError(
            "the outer loss depends on no tensor that requires grad and outlives a call, expected one: nothing to "
            "compare. Make the meta-parameters once, outside the function"
        )
    nodes = solves_behind(loss)
    known = [number for number in map(_curvature, nodes) if number is not None]
    curvature = max(known, default=None)
    reference = _flat(torch.autograd.grad(loss, leaves, materialize_grads=True))
    if float(reference.norm()) == 0:
        raise DisconnectedError(
            "the exact hypergradient is zero, expected one to compare with: choose another start or outer loss"
        )
    rows = tuple(_row(run, estimator, leaves, reference, repeats) for estimator in estimators)
    return Comparison(rows, curvature, _notes(rows, curvature))


def _checked(
    problem: Any, estimators: Any, exact: Any, repeats: Any
) -> tuple[Callable[[Estimator], Tensor], Estimator]:
    """The problem as a function and the rule to compare with, once all arguments are found right."""
    if not isinstance(estimators, list | tuple):
        raise EstimatorError(f"estimators is {describe(estimators)}, expected a list of them; put it in [ ]")
    for i, estimator in enumerate(estimators):
        if not isinstance(estimator, Estimator):
            raise EstimatorError(f"estimators[{i}] is {describe(estimator)}, expected a diffopt.estimators object")
    if exact is not None and not isinstance(exact, Estimator):
        raise EstimatorError(f"exact is {describe(exact)}, expected None or a diffopt.estimators object")
    check_whole("compare: repeats", repeats, 1)
    if isinstance(problem, Comparable):
        return problem.compare_loss, exact or Reverse()
    if not callable(problem):
        raise LossError(f"problem is {describe(problem)}, expected a function of an estimator; see the example")
    return cast("Callable[[Estimator], Tensor]", problem), exact or Reverse()


def _outer_loss(run: Callable[[Estimator], Tensor], rule: Estimator) -> Tensor:
    """What a problem returns, once it is found to be a scalar."""
    try:
        loss = run(rule)
    except TypeError as error:
        wrong = signature_error(error, "the problem", run, 1, "one argument, the estimator")
        if wrong is None:
            raise
        raise wrong from error
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        raise LossError(f"the problem returned {describe(loss)}, expected one floating scalar tensor; reduce it")
    return loss


def _curvature(node: Any) -> float | None:
    """The curvature number of one solve; ``None`` where its loss cannot be evaluated for many steps at once."""
    call, saved = node.call, node.saved_tensors
    try:
        return curvature_number(call.dynamics, saved[: len(saved) - call.state_count])
    except RuntimeError:  # random numbers, or what vmap cannot run
        return None


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _row(
    run: Callable[[Estimator], Tensor], estimator: Estimator, leaves: list[Tensor], reference: Tensor, repeats: int
) -> Row:
    loss = run(estimator)
    nodes = solves_behind(loss)
    found = _flat(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    records = [node.call.record for node in nodes]
    del loss, nodes
    times = []
    for _ in range(repeats):
        start = time.process_time()
        torch.autograd.grad(run(estimator), leaves, allow_unused=True)
        times.append(time.process_time() - start)

    def total(name: str) -> int | None:
        return sum(getattr(record.counts, name) for record in records) if records else None

    norms = found.norm() * reference.norm()
    peak = peak_bytes(lambda: torch.autograd.grad(run(estimator), leaves, allow_unused=True))
    return Row(
        estimator=brief(estimator),
        relative_error=float((found - reference).norm() / reference.norm()),
        cosine=float(found @ reference / norms) if float(norms) > 0 else 0.0,
        gradients=total("gradients"),
        products=total("products"),
        depth=total("depth"),
        states=sum(record.states_stored for record in records) if records else None,
        seconds=statistics.median(times),
        megabytes=None if peak is None else peak / 1e6,
        stationarity=stationarity(records),
    )


def _notes(rows: Sequence[Row], curvature: float | None) -> tuple[str, ...]:
    """What the numbers say about the problem, in words."""
    notes = []
    if curvature is not None:
        notes.append(f"curvature over the rollout, T * lr * lambda_max or its like: {curvature:.2g}")
        if curvature > 1 and any(row.estimator.startswith("Binomial") for row in rows):
            notes.append(
                f"Binomial: the terms of its series grow up to an order near {curvature:.0f}: distrust lower orders; "
                "Krylov has no such limit"
            )
    notes += [
        f"{row.estimator}: drops terms that matter here (error {row.relative_error:.0%}, cosine {row.cosine:+.2f})"
        for row in rows
        if row.estimator.startswith(("Truncated", "FirstOrder")) and row.relative_error > 0.5
    ]
    notes += [_fixed_point_note(row, row.stationarity) for row in rows if row.stationarity is not None]
    return tuple(notes)


def _fixed_point_note(row: Row, at: Stationarity) -> str:
    """Whether an implicit rule's condition holds: judged by the inner problem, not by the error."""
    left = f"one more step would move the params by {at.distance:.1e}, {at.share:.1%} of the average step"
    if at.share > 0.1:
        return (
            f"{row.estimator}: the inner problem is far from its fixed point: {left} (error {row.relative_error:.0%})"
        )
    note = f"{row.estimator}: the inner problem is at its fixed point: {left}"
    if row.relative_error <= 0.1:
        return note
    return (
        f"{note}; but the error is {row.relative_error:.0%}: a fixed point does not depend on the start or on step "
        "sizes, or the linear system was not solved"
    )


__all__ = ["Comparable", "Comparison", "Row", "compare"]
