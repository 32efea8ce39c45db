"""What :func:`diffopt.solve` is given, checked before anything runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import (
    BatchesError,
    DeviceError,
    GradModeError,
    LeafError,
    StepsError,
)
from diffopt.tensors import hints, transforms, tree
from diffopt.tensors.arguments import check_integer
from diffopt.tensors.usable import DTYPES, refuse_unusable

MOST_STEPS = 2**31 - 1


def checked_steps(steps: Any) -> int:
    """The number of steps; what is not one is refused."""
    hint = "write int(steps)" if isinstance(steps, float | Tensor) else ""
    return int(
        check_integer("steps", steps, 0, high=MOST_STEPS + 1, kind=StepsError, note=" (and below 2**31)", fix=hint)
    )


def params_leaves(params: Any) -> tuple[list[Tensor], tree.Structure]:
    """The leaves of the parameters, each one that can be optimised."""
    if isinstance(params, torch.nn.Module):
        raise LeafError(f"params is the module {type(params).__name__}", "a tree of tensors", hints.for_params(params))
    leaves, structure = tree.flatten(params)
    if not leaves:
        raise LeafError("params is an empty tree", "at least one floating tensor")
    device = getattr(leaves[0], "device", None)
    if all([type(leaf) is Tensor and _is_usable(leaf) and leaf.device == device for leaf in leaves]):
        return leaves, structure
    for path, leaf in zip(tree.paths(structure), leaves, strict=True):
        if not _is_dense_floating(leaf):
            fix = hints.for_params(leaf)
            raise LeafError(f"params{path} is {tree.describe(leaf)}", "a dense floating tensor", fix)
        if leaf.is_nested:
            raise LeafError(f"params{path} is a nested tensor", "a dense floating one", "pass a list of tensors")
        refuse_unusable(leaf, lambda path=path: f"params{path}")  # type: ignore[misc]
        if leaf.dtype not in DTYPES:
            raise LeafError(
                f"params{path} is {tree.describe(leaf)}",
                "a dtype that can be calculated with",
                "convert it with .to(torch.float32)",
            )
        if leaf.is_inference():
            raise GradModeError(
                f"params{path} was made in torch.inference_mode",
                "a tensor that can be differentiated",
                f"clone() it, or make it under torch.no_grad(){hints.in_inference_mode()}",
            )
        if leaf.numel() == 0:
            raise LeafError(f"params{path} has shape {tuple(leaf.shape)}: it is empty", "at least one number")
        if leaf.device != leaves[0].device:
            raise DeviceError(f"params{path} is on {leaf.device}", f"{leaves[0].device} as the first leaf", "move it")
        if leaf.device.type == "meta":
            raise DeviceError(f"params{path} is on meta", "a device that holds numbers", "to_empty() and fill it")
    return leaves, structure


def _is_usable(leaf: Tensor) -> bool:
    """What is so of almost every parameter, so that nothing else need be looked at."""
    ordinary = leaf.layout is torch.strided and leaf.dtype in DTYPES and not leaf.is_nested and leaf.numel() > 0
    return ordinary and not (transforms.is_wrapped(leaf) or leaf.is_inference() or leaf.device.type == "meta")


def _is_dense_floating(leaf: Any) -> bool:
    lazy = torch.nn.parameter.is_lazy(leaf)
    return isinstance(leaf, Tensor) and not lazy and leaf.is_floating_point() and leaf.layout == torch.strided


def refuse_frozen(leaves: Sequence[Tensor], structure: tree.Structure) -> None:
    """Refuse frozen parameters of a module among others: ``torch.optim`` leaves them alone, ``solve`` would not."""
    if set(map(type, leaves)) == {Tensor}:
        return
    parameters = [isinstance(leaf, torch.nn.Parameter) for leaf in leaves]
    if any(own and leaf.requires_grad for own, leaf in zip(parameters, leaves, strict=True)):
        for path, own, leaf in zip(tree.paths(structure), parameters, leaves, strict=True):
            if own and not leaf.requires_grad:
                raise LeafError(
                    f"params{path} is a frozen parameter (requires_grad=False) among others that are not",
                    "what is to be trained",
                    "solve trains all of params. diffopt.functional(module) leaves frozen ones out; or pass them "
                    "in *args; or .detach() it to train it from a constant start",
                )


def check_batches(batches: Any, steps: int) -> None:
    """Refuse batches that do not have one entry per step, or may have been meant as a list of one batch per step.

    # NOTE [a list of batches]
    ``[(x1, y1), (x2, y2)]`` is a tree as well, and if the size of a batch is the number of steps nothing shows that its
    tensors do not run over steps. So what looks like one batch per step is refused, whatever the sizes: ``steps``
    entries that are trees of one form, or, in a list, tensors of one shape. A tuple of tensors, such as ``(xs, ys)``,
    is how stacked data is written, and stays that. Trees of one form whose tensors differ in shape, in a tuple, are no
    batches, which have one shape: ``((x_train, y_train), (x_test, y_test))``.
    """
    leaves, structure = tree.flatten(batches)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        fix = hints.for_batches(batches, steps)
        raise BatchesError(f"batches is {tree.describe(batches)}", f"a tree of tensors with {steps} entries each", fix)
    for path, leaf in zip(tree.paths(structure), leaves, strict=True):
        if isinstance(leaf, Tensor):
            refuse_unusable(leaf, lambda path=path: f"batches{path}")  # type: ignore[misc]
        if not _runs_over(leaf, steps):
            raise BatchesError(
                f"batches{path} is {tree.describe(leaf)}",
                f"a tensor whose first axis has length steps = {steps}, one entry per inner step",
                hints.for_batches(batches, steps),
            )
    if _is_one_batch_per_step(batches, steps):
        raise BatchesError(
            f"batches is a {type(batches).__name__} of {steps} alike, perhaps one batch for each step",
            "a tree of tensors that run over steps",
            f"Batches: {hints.stacked(batches, steps)}. Tensors that run over steps: put them into a tuple or a dict",
        )


def _runs_over(leaf: Any, steps: int) -> bool:
    """Whether it is a tensor with so many entries; what has no one shape has none."""
    if not isinstance(leaf, Tensor) or torch.nn.parameter.is_lazy(leaf) or leaf.is_nested:
        return False
    return leaf.ndim > 0 and len(leaf) == steps


def _is_one_batch_per_step(batches: Any, steps: int) -> bool:
    """See NOTE [a list of batches]."""
    if type(batches) not in (list, tuple, deque) or len(batches) != steps:
        return False
    flat = [tree.flatten(entry) for entry in batches]
    if any(structure != flat[0][1] for _, structure in flat):
        return False
    shapes = [[x.shape for x in leaves] for leaves, _ in flat]
    alike, listed = shapes.count(shapes[0]) == steps, not isinstance(batches, tuple)
    return listed and alike and steps > 1 if isinstance(batches[0], Tensor) else listed or alike
