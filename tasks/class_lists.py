"""Which classes belong to which split, as their authors published it; facts, kept in ``classes.json``."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Literal, TypeAlias

from diffopt.tasks.data import Split

Named: TypeAlias = Literal["cifar-fs", "fc100", "mini-imagenet"]


def class_list(data_set: Named, split: Split) -> tuple[str, ...]:
    """The names of a split's classes, sorted.

    CIFAR-FS: Bertinetto et al. (2019), "Meta-learning with differentiable closed-form solvers". FC100, split by
    superclass: Oreshkin et al. (2018), "TADAM: Task dependent adaptive metric for improved few-shot learning".
    miniImageNet, by WordNet identifiers: Ravi, Larochelle (2017), "Optimization as a model for few-shot learning".
    """
    chosen = _lists()[data_set][split]
    if data_set == "fc100":
        chosen = [name for superclass in chosen for name in superclasses()[superclass]]
    return tuple(sorted(chosen))


def superclasses() -> dict[str, list[str]]:
    """The 20 superclasses of CIFAR-100, each with its five classes."""
    return _lists()["cifar-100"]


@functools.cache
def _lists() -> dict[str, dict[str, list[str]]]:
    content: dict[str, dict[str, list[str]]] = json.loads(
        (files("diffopt.tasks") / "classes.json").read_text(encoding="utf-8")
    )
    return content
