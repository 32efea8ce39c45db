"""The experiments by name, each loaded when it is asked for: their modules need optional packages."""

from __future__ import annotations

import importlib
from typing import Any

from diffopt.experiments.framework.experiment import Experiment, ExperimentError

NAMES = (
    "bounds",
    "sinusoid",
    "cost",
    "anil",
    "esj",
    "hyper-cleaning",
    "memory-reduced",
    "memory-rates",
    "few-shot",
    "meta-transfer",
    "attribution",
    "yardsticks",
    "maml",
    "hessian-free",
)


def experiment(name: str) -> Experiment[Any]:
    """The experiment called ``name``.

    Raises:
        ExperimentError: there is none; the message lists all.
    """
    if name not in NAMES:
        raise ExperimentError(f"there is no experiment {name!r}", f"one of {', '.join(NAMES)}")
    module = importlib.import_module(f"diffopt.experiments.{name.replace('-', '_')}")
    found: Experiment[Any] = module.EXPERIMENT
    return found
