"""Whether what a checkpoint holds can be put back: looked at as a whole before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.tensors.plain_numbers import is_integer
from diffopt.tensors.tree import describe

MEND = "restore it from a copy, or start without --resume in another --out"


class CheckpointError(DiffoptError, ValueError):
    """A checkpoint or the log beside it is missing, damaged, or of another kind."""


def check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a checkpoint one of whose parts is not of its kind.

    Raises:
        CheckpointError: names the part.
    """
    kinds: dict[str, type[Any] | tuple[type[Any], ...]] = {
        "problem": str,
        "options": dict,
        "seconds": (int, float),
        "params": dict,
        "optimizer": dict,
        "generators": dict,
        "log": str,
    }
    for name, kind in kinds.items():
        if not isinstance(content.get(name, ""), kind):
            raise _wrong(path, name, describe(content[name]), f"a {getattr(kind, '__name__', 'number')}")
    for name in ("iteration", "lines"):
        if not is_integer(content[name]) or content[name] < 0:
            raise _wrong(path, name, describe(content[name]), "an integer, 0 or more")
    if set(content["optimizer"]) != {"state", "param_groups"}:
        raise _wrong(path, "optimizer", describe(content["optimizer"]), "the state_dict of an optimizer")
    for name in ("episodes", "torch"):
        state = content["generators"].get(name)
        if not isinstance(state, Tensor) or state.dtype != torch.uint8:
            raise _wrong(path, f"generators[{name!r}]", describe(state), "the state of a generator")


def check_params(path: Path, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are not those of this run.

    Raises:
        CheckpointError: names the first parameter that is missing, unknown, of another shape or dtype, or not finite.
    """
    for name in [*expected, *found]:
        own, other = expected.get(name), found.get(name)
        here = f"params[{name!r}]"
        if own is None or other is None:
            raise _wrong(path, here, "missing" if other is None else "unknown", f"those of {len(expected)} parameters")
        if not isinstance(other, Tensor) or (other.shape, other.dtype) != (own.shape, own.dtype):
            raise _wrong(path, here, describe(other), f"{own.dtype} of shape {tuple(own.shape)}")
        if not bool(other.isfinite().all()):
            raise _wrong(path, here, "NaN or infinite", "finite numbers")


def cannot_be_put_back(path: Path, what: str, error: Exception) -> CheckpointError:
    """The error for a part that torch refuses."""
    return _wrong(path, what, f"refused ({' '.join(str(error).split())[:60]})", "that of this problem and torch")


def _wrong(path: Path, part: str, got: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: its {part} is {got}", expected, MEND)
