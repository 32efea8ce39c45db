"""What was wrong with a function of the caller's that raised an error: a loss, or what observes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from diffopt.distributed.sharded import BARE, shards
from diffopt.errors import DiffoptError
from diffopt.rollout.field import as_written
from diffopt.rollout.layout import Layout
from diffopt.tensors import torch_errors, transforms, tree
from diffopt.tensors.captures import everything_held


def named(
    error: Exception,
    layout: Layout,
    what: str,
    function: Callable[..., Any],
    params: Sequence[Tensor],
    read: Sequence[Tensor],
) -> DiffoptError | None:
    """The typed error for what ``function``, called ``what``, raised; ``None`` if only the function itself can know."""
    if isinstance(error, DiffoptError):
        return None
    if torch_errors.is_in_place(error):
        return torch_errors.changed_in_place()
    if "saved tensor hooks" in str(error):
        return torch_errors.hooks_around_transforms()
    if torch_errors.is_missing_derivative(error):
        return torch_errors.missing_derivative(str(error).partition("\n")[0])
    fix = "make params and what the loss reads DTensors of one mesh (distribute_tensor)"
    if shards(everything_held([function]).modules):
        fix = f"its hooks put a sharded module's own parameters in the place of the given ones: {BARE}"
    mixed = torch_errors.mixed_error(error, what, fix)
    if mixed is not None:
        return mixed
    args, _ = tree.unflatten(layout.args_structure, list(layout.args_leaves))
    wrong: DiffoptError | None = torch_errors.signature_error(
        error,
        what,
        as_written(function),
        1 + len(args) + layout.has_batches,
        "one for params, one for each of *args and, with batches, one for the batch",
    )
    if wrong is None and (layout.levels or transforms.transforms_active()):
        wrong = torch_errors.vmap_error(error)
    given = dict(zip(layout.names_of_step(), read, strict=True))
    return (
        wrong or torch_errors.device_error(error, params[0].device, given) or torch_errors.inference_error(error, given)
    )
