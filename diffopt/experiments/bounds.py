r"""The error bounds of the binomial paper beside measured errors on random and on adversarial Hessians.

``K`` steps of gradient descent on ``w' H_k w / 2``, one Hessian per step, and the hypergradient of the start. With
``x = lr * H``, ``H`` the curvature bound, the errors are operator norms: the worst outer gradient of norm 1 counts.
Derivations, section 4, has the bounds and their proofs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

import diffopt
from diffopt.estimators import Binomial, Estimator, FirstOrder, Reverse, Truncated
from diffopt.experiments import bounds_decay
from diffopt.experiments.bounds_report import pictures, summary
from diffopt.experiments.framework.experiment import Row, Unit, starts
from diffopt.experiments.framework.options import listed, option, real, whole
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work

LR = 0.25
"""A power of two: ``x / LR`` times ``LR`` is ``x`` again."""
ANGLES = 64


@final
@dataclass(frozen=True)
class Settings:
    """What is measured."""

    steps: tuple[int, ...] = option((5, 10), "numbers of inner steps K", listed(whole(2)))
    curvatures: tuple[float, ...] = option((0.1, 0.3, 0.7, 1.0), "x = lr * curvature bound, at most 1", listed(real(0)))
    convexity: float = option(0.5, "theorem 3.10: lowest curvature of the last steps, as a share of x", real(0))
    dimension: int = option(4, "parameters", whole(2))
    draws: int = option(300, "random sequences of Hessians", whole(1))
    turning_steps: tuple[int, ...] = option((2, 3, 5, 10, 20), "K of the counterexamples", listed(whole(2)))
    turning_curvatures: int = option(40, "values of x between 0 and 1 for the counterexamples", whole(2))
    decay_steps: tuple[int, ...] = option((20, 40), "K of the decay in L", listed(whole(6)))
    decay_curvatures: tuple[float, ...] = option((0.01, 0.03, 0.1, 0.3), "x of the decay in L", listed(real(0)))
    seeds: int = option(3, "starts: other random Hessians", whole(1))


def units(settings: Settings) -> list[Unit]:
    """One per start, theorem, steps and curvature; one of counterexamples per number of steps; the decay in L."""

    def of_one_start() -> list[Unit]:
        return [
            Unit(
                f"{name} K={steps} x={x:g}",
                partial(measure, settings, name, steps, x),
                steps**2,
                keys={"theorem": name, "K": steps, "x": x},
            )
            for name in ("bounded", "convex", "ending convex")
            for steps in settings.steps
            for x in settings.curvatures
        ]

    turning = [
        Unit(f"turning K={steps}", partial(turn, settings, steps), steps, keys={"theorem": "turning", "K": steps})
        for steps in settings.turning_steps
    ]
    decays = [
        Unit(
            f"decay K={steps} x={x:g}",
            partial(decay, settings, steps, x),
            cost=steps**2,
            keys={"theorem": "decay", "K": steps, "x": x},
        )
        for steps in settings.decay_steps
        for x in settings.decay_curvatures
    ]
    return starts(settings.seeds, of_one_start) + turning + decays


def decay(settings: Settings, steps: int, x: float, work: Work) -> Row:
    """Errors over the orders, for the slope of their decay."""
    lows = torch.zeros(steps, dtype=torch.float64)
    return bounds_decay.measure(steps, x, partial(random_hessians, settings, lows, x), errors, work)


def measure(settings: Settings, theorem: str, steps: int, x: float, work: Work) -> Row:
    """Errors of the three estimators and their bounds at every level ``L``."""
    y = settings.convexity * x
    levels = []
    for level in range(steps + 1):
        generator = work.generator(f"{theorem} {steps}")  # the same sequences at every level
        low = {"bounded": -x, "convex": 0.0, "ending convex": -x}[theorem]
        lows = torch.full((steps,), low, dtype=torch.float64)
        if theorem == "ending convex":
            lows[steps - level :] = y
        random = errors(random_hessians(settings, lows, x, generator), level)
        worst = errors(adversarial(theorem, steps, level, x, y), level)
        levels.append(
            {
                "level": level,
                "bound": bounds(theorem, steps, level, x, y),
                "random": {name: float(error.max()) for name, error in random.items()},
                "median": {name: float(error.median()) for name, error in random.items()},
                "adversarial": {name: float(error.max()) for name, error in worst.items()},
                "binomial better": float((random["binomial"] < random["truncated"]).double().mean()),
            }
        )
    # entries of the products grow up to (1 + x)**steps; each of the products rounds
    return {"levels": levels, "round-off": 1e-15 * steps * (1 + x) ** steps}


def turn(settings: Settings, steps: int, work: Work) -> Row:
    """First order's error on Hessians of rank one that turn by equal angles, the worst angle, over ``x``."""
    curvatures = torch.linspace(0, 1, settings.turning_curvatures + 1, dtype=torch.float64)[1:]
    found = [float(errors(turning_hessians(steps, float(x)), 0)["first-order"].max()) for x in curvatures]
    return {
        "curvatures": curvatures.tolist(),
        "error": found,
        "claimed (12a)": [1 - (1 - x) ** steps for x in curvatures.tolist()],
        "proposition 4.1": [dropped_steps(steps, x) for x in curvatures.tolist()],
    }


def errors(hessians: Tensor, level: int) -> dict[str, Tensor]:
    """Norms of the error matrices of three estimators, ``[sequences]``, from ``[sequences, steps, size, size]``."""
    estimators = {"first-order": FirstOrder(), "truncated": Truncated(level), "binomial": Binomial(level)}
    exact = hypergradients(hessians, Reverse())
    return {
        name: torch.linalg.matrix_norm(hypergradients(hessians, estimator) - exact, 2)
        for name, estimator in estimators.items()
    }


def hypergradients(hessians: Tensor, estimator: Estimator) -> Tensor:
    """The hypergradient of the start for every unit vector as outer gradient: ``[sequences, size, size]``."""
    size = hessians.shape[-1]

    def outer_loss(w: Tensor, sequence: Tensor, outer_gradient: Tensor) -> Tensor:
        solution = diffopt.solve(
            lambda w, h: w @ h @ w / 2,
            w,
            optimizer=diffopt.SGD(LR),
            steps=len(sequence),
            batches=sequence,
            estimator=estimator,
        )
        return solution.params @ outer_gradient

    start = torch.full((size,), 0.3, dtype=torch.float64)
    rows = torch.func.vmap(torch.func.grad(outer_loss), in_dims=(None, None, 0))
    eye = torch.eye(size, dtype=start.dtype)
    found: Tensor = torch.func.vmap(rows, in_dims=(None, 0, None))(start, hessians, eye)
    return found


def random_hessians(settings: Settings, lows: Tensor, x: float, generator: torch.Generator) -> Tensor:
    """Eigenvectors that do not commute; eigenvalues of ``LR * H`` in ``[low, x]``, a third at each end."""
    shape = (settings.draws, len(lows), settings.dimension)
    low = lows[:, None]
    inside = low + (x - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    end = torch.rand(shape, generator=generator, dtype=torch.float64)
    values = torch.where(end < 1 / 3, low, torch.where(end < 2 / 3, x, inside)) / LR
    basis = torch.linalg.qr(torch.randn(*shape, settings.dimension, generator=generator, dtype=torch.float64))[0]
    hessians: Tensor = (basis * values[..., None, :]) @ basis.mT
    return hessians


def adversarial(theorem: str, steps: int, level: int, x: float, y: float) -> Tensor:
    """Sequences for which the bounds are, or should be, attained."""
    plane = torch.eye(2, dtype=torch.float64) / LR
    ending = torch.arange(steps) >= steps - level
    if theorem == "bounded":
        return (-x * plane).expand(1, steps, 2, 2)
    if theorem == "ending convex":
        values = torch.tensor([y if late else -x for late in ending], dtype=torch.float64)
        return (values[:, None, None] * plane)[None]
    constant = (x * plane).expand(1, steps, 2, 2)
    stopped = constant * ~ending[:, None, None]
    turning = turning_hessians(steps, x)
    return torch.cat([constant, stopped, turning, turning * ~ending[:, None, None]])


def turning_hessians(steps: int, x: float) -> Tensor:
    """``x (I - v_k v_k')`` in the plane, ``v_k`` turned by equal angles: ``[angles, steps, 2, 2]``."""
    angles = torch.linspace(0, math.pi / 2, ANGLES + 1, dtype=torch.float64)[1:, None] * torch.arange(steps)
    if steps > 1:  # turned by half a circle in all, the angle that tends to the error 2
        half = torch.arange(steps, dtype=torch.float64)[None] * math.pi / (steps - 1)
        angles = torch.cat([angles, half])
    lines = torch.stack([angles.cos(), angles.sin()], dim=-1)
    projections = torch.eye(2, dtype=torch.float64) - lines[..., :, None] * lines[..., None, :]
    return x / LR * projections


def bounds(theorem: str, steps: int, level: int, x: float, y: float) -> dict[str, float]:
    """The bounds by the numbers of the derivations; (12a), (12b) and (34a) are reconstructed, two of them false."""
    kept, dropped = (1 - y) ** level, steps - level
    if theorem == "bounded":
        return {
            "(11a)": (1 + x) ** steps - 1,
            "(11b)": ((1 + x) ** dropped - 1) * (1 + x) ** level,
            "(11c)": _terms(steps, level + 1, x),
        }
    if theorem == "convex":
        return {
            "(12a)": 1 - (1 - x) ** steps,
            "(12b)": 1 - (1 - x) ** dropped,
            "(12c)": math.comb(steps, level + 1) * x ** (level + 1),
            "4.1, first order": dropped_steps(steps, x),
            "4.1, truncated": dropped_steps(dropped, x),
        }
    late = sum(math.comb(k, level) * (1 - y) ** (steps - 1 - k) for k in range(dropped, steps))
    return {
        "(34a)": 1 + (1 + x) ** dropped * kept,
        "(34b)": ((1 + x) ** dropped - 1) * kept,
        "(34c)": kept * _terms(dropped, level + 1, x) + x ** (level + 1) * late,
    }


def dropped_steps(steps: int, x: float) -> float:
    """Proposition 4.1: what leaving out ``steps`` convex steps can cost."""
    return 2 * steps * x / (2 + (steps - 1) * x)


def _terms(steps: int, first: int, x: float) -> float:
    """The binomial series of ``(1 + x)**steps`` from the power ``first`` on."""
    return sum(math.comb(steps, power) * x**power for power in range(first, steps + 1))


EXPERIMENT = described(
    "bounds",
    quick=Settings((3,), (0.3, 1.0), 0.5, 4, 10, (2, 4), 5, (8,), (0.1,), seeds=2),
    standard=Settings(),
    full=Settings((5, 10, 20), (0.05, 0.1, 0.3, 0.7, 1.0), draws=1000, seeds=5),
    units=units,
    summary=summary,
    pictures=pictures,
)
