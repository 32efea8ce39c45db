"""Numbers of numpy's types as Python's own, which is what options are calculated with.

# NOTE [why numpy's numbers are converted]
``rng.integers(1, 9)`` and a grid's ``lr`` are numpy scalars, and nobody means anything else by them than the number.
But they are no ``int`` or ``float`` to torch's scalar arguments, and an ``np.uint8`` wraps around where an ``int``
grows. So they are converted where they come in. Numpy need not be installed: without it there are none.
"""

from __future__ import annotations

import math
import sys
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from diffopt.tensors import tree

_PLAIN = (type(None), bool, int, float, str, Tensor)


def is_integer(value: Any) -> bool:
    """Whether it is an integer; ``True`` and ``False`` are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_float(value: Any) -> float:
    """A Python number as torch would take it: NaN if it is none, and infinite beyond all floats."""
    if not (isinstance(value, float) or is_integer(value)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def plain(value: Any) -> Any:
    """A scalar of numpy, or its array without axes, as a Python number; anything else as it is."""
    if type(value) in _PLAIN:
        return value
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.generic | numpy.ndarray) or value.ndim:
        return value
    return float(value) if isinstance(value, numpy.longdouble) else value.item()


def plain_tree(value: Any) -> Any:
    """The same for every leaf of a tree, which is the same object if there is no such number in it."""
    if type(value) in _PLAIN:
        return value
    leaves, structure = tree.flatten(value)
    numbers = [plain(leaf) for leaf in leaves]
    changed = any(new is not old for new, old in zip(numbers, leaves, strict=True))
    return tree.unflatten(structure, numbers) if changed else value


def plain_list(value: Any) -> Any:
    """A numpy array of one axis as a list of Python numbers; anything else as :func:`plain_tree` gives it."""
    numpy: Any = sys.modules.get("numpy")
    listed = numpy is not None and isinstance(value, numpy.ndarray) and value.ndim == 1 and value.dtype.kind in "iuf"
    return [float(x) for x in value] if listed else plain_tree(value)


def make_plain(options: Any) -> None:
    """Convert numpy's numbers in the fields of a frozen dataclass that is being made."""
    for field in fields(options) if is_dataclass(options) else ():
        value = getattr(options, field.name)
        converted = plain_tree(value)
        if converted is not value:
            object.__setattr__(options, field.name, converted)
