"""The two parts of ``diffopt demo``, meta-training and a comparison of hypergradients, and their picture."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import diffopt
from diffopt.estimators import (
    Binomial,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.experiments.framework.console import plain_console
from diffopt.experiments.framework.few_shot_problem import (
    Adaptation,
    Evaluation,
    FewShot,
    Params,
    adapt,
    evaluate,
    meta_gradient,
    sinusoid,
)
from diffopt.experiments.framework.files import replacing
from diffopt.experiments.framework.penalties import STEPS, Penalties
from diffopt.linear_solve import ConjugateGradient
from diffopt.reports import table

ESTIMATORS = (
    Unrolled(),
    Reverse("graph"),
    Reverse(1),
    Reverse("sqrt"),
    ForwardMode(),
    Truncated(100),
    Truncated(30),
    FirstOrder(),
    Binomial(20),
    Krylov(10),
    Krylov(20),
    MultiStep(2),
    Implicit(ConjugateGradient(throw=False)),
)
ITERATIONS = 1200


def show(folder: Path) -> None:
    """Compute, print and draw both parts."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    console, began = plain_console(), time.perf_counter()
    console.print(f"1. MAML on sine waves: {ITERATIONS} outer iterations of 25 tasks, 5 inner steps each")
    problem, adaptation = _sine_waves()
    untrained = {name: value.detach().clone() for name, value in problem.params.items()}
    before = evaluate(problem, untrained, adaptation, 600)
    _meta_train(problem, adaptation)
    after = evaluate(problem, problem.params, adaptation, 600)
    console.print(f"Mean squared error on {after.episodes} new sine waves (+- 95 % confidence)")
    console.print(_error_table(before, after))

    console.print(
        f"2. Hypergradients of 30 penalties of a logistic regression on breast-cancer data, {STEPS} steps of SGD"
    )
    comparison = diffopt.compare(Penalties.breast_cancer(), ESTIMATORS, repeats=3)
    console.print(str(comparison), soft_wrap=True)

    path = folder / "demo.png"
    _draw(problem, untrained, adaptation, path)
    comparison.plot(folder / "estimators.png")
    console.print(f"Pictures: {path}, {folder / 'estimators.png'}", soft_wrap=True)
    console.print(f"{time.perf_counter() - began:.0f} seconds")


def _sine_waves() -> tuple[FewShot, Adaptation]:
    generator = torch.Generator().manual_seed(0)
    problem = sinusoid(shot=10, queries=10, generator=generator, device="cpu")
    return problem, Adaptation(diffopt.SGD(lr=0.02), steps=5)


def _meta_train(problem: FewShot, adaptation: Adaptation) -> None:
    """Train the problem's parameters in place, the step size falling to zero along a cosine."""
    generator = torch.Generator().manual_seed(1)
    outer = torch.optim.Adam(problem.params.values(), lr=0.003)
    for iteration in range(ITERATIONS):
        outer.param_groups[0]["lr"] = 0.003 * (1 + math.cos(math.pi * iteration / ITERATIONS)) / 2
        meta_gradient(problem, problem.params, adaptation, problem.training(25, generator))
        outer.step()


def _error_table(before: Evaluation, after: Evaluation) -> str:
    rows = [
        (name, *(f"{cell.mean:.2f} +- {cell.half_width:.2f}" for cell in (found.before, found.after)))
        for name, found in (("random", before), ("meta-trained", after))
    ]
    return table(("initial parameters", "as they are", "adapted to 10 points"), rows, align="lr")


def _draw(problem: FewShot, untrained: Params, adaptation: Adaptation, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    _draw_wave(figure.subplots(), problem, untrained, adaptation)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _draw_wave(axes: Axes, problem: FewShot, untrained: Params, adaptation: Adaptation) -> None:
    """One wave, its ten points, and what both initialisations make of them."""
    inputs = torch.linspace(-5, 5, 200)[:, None]
    points = torch.linspace(-4.5, 3.5, 10)[:, None]

    def wave(x: Tensor) -> Tensor:
        return 3.5 * torch.sin(x - 0.8)

    with torch.no_grad():
        for params, name, colour in (
            (untrained, "random", "tab:gray"),
            (problem.params, "meta-trained", "tab:orange"),
        ):
            adapted = adapt(problem, params, adaptation, points, wave(points))
            for state, label, style in ((params, "as it is", ":"), (adapted, "adapted", "-")):
                fit = problem.predict(state, inputs)
                axes.plot(inputs.flatten(), fit.flatten(), style, color=colour, label=f"{name} start, {label}")
    axes.plot(inputs.flatten(), wave(inputs).flatten(), "--", color="black", linewidth=1, label="true wave")
    axes.plot(points.flatten(), wave(points).flatten(), "o", color="black", label="10 support points")
    axes.set(xlabel="x", ylabel="y", title=f"A new sine wave after {adaptation.steps} inner steps", ylim=(-6.5, 5))
    axes.legend(ncols=2, fontsize="small", loc="lower center")
