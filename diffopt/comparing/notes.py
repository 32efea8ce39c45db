"""What the numbers of a comparison say about the problem and the estimators, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffopt.comparing.comparison import Row
from diffopt.comparing.curvature import Stationarity


def notes(rows: Sequence[Row], curvature: float | None) -> tuple[str, ...]:
    """Those on the problem, then those on each estimator."""
    return (*_problem_notes(rows, curvature), *(f"{row.estimator}: {text}" for row in rows for text in _row_notes(row)))


def _problem_notes(rows: Sequence[Row], curvature: float | None) -> Iterator[str]:
    if curvature is None:
        return
    yield f"curvature over the rollout, T * lr * lambda_max or its like: {curvature:.2g}"
    if curvature > 1:
        said = {type(row.rule).__name__: row.rule.if_curved(curvature) for row in rows if row.rule is not None}
        yield from (f"{name}: {text}" for name, text in said.items() if text)


def _row_notes(row: Row) -> Iterator[str]:
    if row.failure is not None:
        yield f"failed with {row.failure}"
        return
    if not row.used:
        yield "the problem ran no solve with it, so these are numbers of another estimator"
    if row.random:
        yield "one random draw, of which another has another error"
    if row.stationarity is not None:
        yield _fixed_point_note(row, row.stationarity)
    elif row.rule is not None and row.rule.if_wrong and row.relative_error > 0.5:
        yield f"{row.rule.if_wrong}{_size(row, ': ')}"
    elif row.relative_error >= 1:
        yield _size(row)
    if row.residual is not None and row.residual > 0.01:
        fix = row.rule.if_unsolved if row.rule is not None else ""
        yield f"its own residual is {row.residual:.2g}; trust it below 0.01{', or ' * bool(fix)}{fix}"


def _size(row: Row, before: str = "") -> str:
    """How wrong a row is; ``before`` leads to the judgement that nothing at all would do as well, where that is so."""
    judgement = f"{before}no nearer to the exact hypergradient than zero is" if row.relative_error >= 1 else ""
    return f"{judgement} (error {_percent(row.relative_error)}, cosine {row.cosine:+.2f})"


def _percent(error: float) -> str:
    return f"{error:.0%}" if error < 10 else f"{error:.1e}"


def _fixed_point_note(row: Row, at: Stationarity) -> str:
    """Whether an implicit estimator's condition holds: judged by the inner problem, not by the error."""
    left = f"one more step would move the params by {at.distance:.1e}, {at.share:.1%} of the average step"
    if at.share > 0.1:
        return f"the inner problem is far from its fixed point: {left}{_size(row, '; ')}"
    note = f"the inner problem is at its fixed point: {left}"
    if row.relative_error <= 0.1:
        return note
    return (
        f"{note}; but the error is {_percent(row.relative_error)}: a fixed point does not depend on the start or on "
        "step sizes, or the linear system was not solved"
    )
