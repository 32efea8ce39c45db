"""The methods of few-shot classification by name: how each adapts, in training and in tests, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import diffopt
from diffopt.estimators import Binomial, FirstOrder, Implicit, Krylov, MultiStep, Reptile, Reverse, Truncated
from diffopt.experiments.few_shot_reptile import outer_steps
from diffopt.experiments.framework.few_shot_problem import Adaptation
from diffopt.experiments.framework.tables import levelled
from diffopt.linear_solve import ConjugateGradient


def keys_of(name: str) -> dict[str, Any]:
    """A method's estimator and level, and the group that it belongs to."""
    kind, level = levelled(name)
    group = "momentum" if name.startswith(("momentum", "multi-step")) else "plain"
    return {"estimator": kind, "L": level, "group": group}


def turn(keys: Mapping[str, Any]) -> int:
    """When a unit has its turn, so that a run that is cut short has whole starts of the main methods.

    These come first; in the first start with first order, Reptile and the other windows, of which further starts come
    next. Last are iMAML, hybrid and the further levels.
    """
    if keys["estimator"] in ("iMAML", "hybrid") or (keys["group"] == "plain" and keys["L"] > 1):
        return 2
    second = keys["estimator"] in ("Reptile", "momentum: first-order") or (
        keys["estimator"] == "multi-step" and keys["L"] != 4
    )
    return int(second and keys["seed"] > 0)


def work_of(name: str, adaptation: Adaptation) -> float:
    """How long an iteration takes, about, in gradients."""
    product = 0 if name in ("FOMAML", "Reptile", "momentum: first-order") else 1
    passes = adaptation.steps
    if isinstance(adaptation.estimator, MultiStep):
        passes = -(-adaptation.steps // adaptation.estimator.window)
    return passes * (1.0 + 2 * product) + 2


def methods(settings: Any) -> dict[str, Adaptation]:
    """The inner optimizers and estimators by name: plain gradient descent first, then momentum."""
    s, plain = settings, diffopt.SGD(settings.lr)
    heavy = diffopt.SGD(s.momentum_lr, momentum=0.9, weight_decay=1e-4)
    pulled = diffopt.ProximalGD(s.lr, strength=s.pull)

    def scaled(level: int) -> float:
        return min(level / s.steps, 1.0) if s.scale == "paper" else 1.0

    first = {"MAML": Reverse("graph"), "FOMAML": FirstOrder()}
    found = {name: Adaptation(plain, s.steps, estimator) for name, estimator in first.items()}
    found["Reptile"] = Adaptation(diffopt.SGD(s.reptile_lr), s.reptile_steps, Reptile(), batched=True)
    for level in s.levels:
        solver = ConjugateGradient(max_iterations=level, rtol=0.0, throw=False)
        found[f"iMAML {level}"] = Adaptation(pulled, s.steps, Implicit(solver))
        found[f"truncated {level}"] = Adaptation(plain, s.steps, Truncated(level, "graph"))
        found[f"binomial {level}"] = Adaptation(plain, s.steps, Binomial(level, scale=scaled(level)))
        found[f"krylov {level}"] = Adaptation(plain, s.steps, Krylov(level))
    if s.steps > 2:
        found["hybrid 1"] = Adaptation(plain, s.steps, Binomial(1, window=s.steps - 1, scale=scaled(1)))
    found["momentum: MAML"] = Adaptation(heavy, s.momentum_steps, Reverse("graph"))
    found["momentum: first-order"] = Adaptation(diffopt.SGD(s.first_order_lr), s.momentum_steps, FirstOrder())
    for window in s.windows:
        found[f"multi-step {window}"] = Adaptation(heavy, s.momentum_steps, MultiStep(window, Reverse("graph")))
    return found


def in_tests(settings: Any, name: str, adaptation: Adaptation) -> Adaptation:
    """How a method adapts in tests: as in training, by the first group's number of steps there; by the support set."""
    if name == "Reptile":
        return replace(adaptation, steps=settings.reptile_test_steps, batched=False)
    momentum = name.startswith(("momentum", "multi-step"))
    return replace(adaptation, steps=adaptation.steps if momentum else settings.test_steps)


def outer_optimizer(settings: Any, name: str, params: Mapping[str, Tensor], tasks: int) -> torch.optim.Optimizer:
    """Adam; for Reptile its own step."""
    if name == "Reptile":
        return outer_steps(params.values(), settings.reptile_meta_lr, tasks)
    return torch.optim.Adam(params.values(), lr=settings.meta_lr)
