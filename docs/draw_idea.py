"""The pictures of the page "The idea": one step taken apart, and the terms that every estimator keeps, as measured."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import diffopt
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    Estimator,
    FirstOrder,
    ForwardMode,
    MultiStep,
    Reverse,
    Truncated,
)

STEPS = 5
FORWARD, BACKWARD, DROPPED = "#37474f", "#c62828", "#d6dadd"
ESTIMATORS: dict[str, tuple[Estimator, str]] = {
    "Reverse()": (Reverse(), "every path"),
    "ForwardMode()": (ForwardMode(), "every path, summed from the left"),
    "Truncated(2)": (Truncated(2), "curvature of the last 2 steps,\nwhatever its order"),
    "Binomial(2)": (Binomial(2), "at most 2 factors of curvature,\nfrom any step"),
    "Binomial(2, window=3)": (Binomial(2, window=3), "at most 2 factors,\nfrom the last 3 steps"),
    "FirstOrder()": (FirstOrder(), "no curvature"),
    "MultiStep(2)": (MultiStep(2), "one gradient for 2 steps:\ntwice as much of every other H"),
    "ESJacobian(1, 1e-4)": (ESJacobian(1, 1e-4), "every path, seen through\nrandom directions"),
}


def subsets(steps: int) -> Iterator[tuple[int, ...]]:
    """All sets of steps, the empty one first."""
    return chain.from_iterable(combinations(range(1, steps + 1), size) for size in range(steps + 1))


def terms(estimator: Estimator, steps: int = STEPS) -> dict[tuple[int, ...], float]:
    r"""How much of every term an estimator's hypergradient holds: 1 is all of it, 0 nothing.

    On ``h_t w**2 / 2`` with step size 1 the exact derivative of the last state in the first is
    ``prod_t (1 - h_t) = sum_S prod_{t in S} (-h_t)``, one term for every set ``S`` of steps at which the path goes
    through the curvature. The estimator runs for every ``h`` in ``{0, 1}**T``; inclusion and exclusion give its terms.
    """
    curvatures = torch.tensor([[float(t in s) for t in range(1, steps + 1)] for s in subsets(steps)]).double()
    values: dict[tuple[int, ...], float] = {}
    for h, s in zip(curvatures, subsets(steps), strict=True):
        start = torch.ones((), dtype=torch.float64, requires_grad=True)
        solution = diffopt.solve(
            lambda w, x: x * w.square() / 2,
            start,
            optimizer=diffopt.SGD(1.0),
            steps=steps,
            batches=h,
            estimator=estimator,
        )
        values[s] = float(torch.autograd.grad(solution.params, start)[0])
    return {s: sum((-1) ** len(r) * value for r, value in values.items() if set(r) <= set(s)) for s in subsets(steps)}


def draw_terms(axes: Axes, found: dict[tuple[int, ...], float], title: str, text: str) -> None:
    """The paths from the last state (right) to the first (left): level goes straight on, up goes through curvature."""
    for kept in (False, True):
        for s, amount in found.items():
            if (abs(amount) > 1e-3) != kept:
                continue
            order = 0
            for t in range(STEPS, 0, -1):
                up = order + (t in s)
                width = 0.9 + 0.9 * kept + 1.6 * (abs(amount) > 1.5 and t in s)
                axes.plot([t, t - 1], [order, up], color=BACKWARD if kept else DROPPED, linewidth=width, zorder=kept)
                order = up
    axes.scatter([STEPS], [0], color=FORWARD, s=22, zorder=3)
    count = sum(abs(amount) > 1e-3 for amount in found.values())
    axes.set_title(title, family="monospace", fontsize=9.5)
    axes.set_xlabel(f"{text}\n({count} of {len(found)} terms)" if count < len(found) else f"{text}\n", fontsize=8)
    axes.set(xlim=(-0.3, STEPS + 0.3), ylim=(-0.5, STEPS + 0.3), xticks=range(STEPS + 1), yticks=range(STEPS + 1))
    axes.tick_params(labelsize=7, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def estimators() -> Figure:
    """All estimators, by what they do to a problem of one parameter."""
    figure, grid = plt.subplots(2, 4, figsize=(11, 6.4), layout="constrained")
    for axes, (title, (estimator, text)) in zip(grid.flat, ESTIMATORS.items(), strict=True):
        draw_terms(axes, terms(estimator), title, text)
    for axes in grid[:, 0]:
        axes.set_ylabel("factors of curvature", fontsize=8)
    return figure


def _box(axes: Axes, x: float, y: float, text: str, width: float = 1.7, height: float = 0.9) -> None:
    style = "round,pad=0.02,rounding_size=0.15"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor="#eceff1", edgecolor=FORWARD))
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = FORWARD) -> None:
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def _label(axes: Axes, x: float, y: float, text: str, color: str = BACKWARD) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=11, color=color)


def step() -> Figure:
    """One step as a diagram: what it reads, and the derivative along every arrow."""
    figure, axes = plt.subplots(figsize=(10, 4.6), layout="constrained")
    axes.set(xlim=(-0.6, 10.6), ylim=(-1.9, 3.9))
    axes.axis("off")
    _box(axes, 0.5, 0, "$s_t$\nparams, buffers", 1.9)
    _box(axes, 3.6, 1.9, "gradient of the loss\n$g_t=\\nabla\\ell_t(Ps_t,\\theta)$\nexpensive", 2.7, 1.3)
    _box(axes, 6.7, 0, "update rule\n$U(s_t,g_t;\\eta)$\ncheap, elementwise", 2.5, 1.3)
    _box(axes, 9.7, 0, "$s_{t+1}$", 1.1)
    _box(axes, 3.6, 3.5, "$\\theta$: data, penalties, meta-networks", 3.7, 0.6)
    _box(axes, 6.7, 1.9, "$\\eta$: lr, momentum", 1.9, 0.6)
    _arrow(axes, (1.47, 0), (5.43, 0))
    _label(axes, 3.4, 0.25, "$C_t=\\partial U/\\partial s$")
    _arrow(axes, (0.9, 0.47), (2.22, 1.6))
    _label(axes, 1.15, 1.2, "$H_tP$")
    _arrow(axes, (4.97, 1.4), (5.75, 0.68))
    _label(axes, 5.0, 0.85, "$E_t$")
    _arrow(axes, (3.6, 3.18), (3.6, 2.57))
    _label(axes, 3.95, 2.87, "$M_t$")
    _arrow(axes, (6.7, 1.58), (6.7, 0.68))
    _label(axes, 7.05, 1.12, "$D_t$")
    _arrow(axes, (7.97, 0), (9.13, 0))
    _arrow(axes, (9.7, -1.15), (0.5, -1.15), BACKWARD)
    adjoint = "$\\Lambda_{t-1}=C_t^\\top\\Lambda_t+P^\\top H_tE_t^\\top\\Lambda_t$"
    _label(axes, 5.1, -0.85, adjoint)
    gathered = "gathered on the way:  $M_t^\\top E_t^\\top\\Lambda_t$ for $\\theta$,  $D_t^\\top\\Lambda_t$ for $\\eta$"
    _label(axes, 5.1, -1.5, gathered)
    return figure


def main() -> None:
    """Save the pictures that the README shows."""
    folder = Path(__file__).parent / "_static"
    for name, figure in (("step", step()), ("rules", estimators())):
        figure.savefig(folder / f"{name}.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
