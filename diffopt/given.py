"""What :func:`diffopt.solve` is given, checked before anything runs and again after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import autodiff, transforms, tree
from diffopt.errors import (
    BatchesError,
    DeviceError,
    EstimatorError,
    GradModeError,
    InPlaceError,
    LeafError,
    StepsError,
)
from diffopt.estimator import Estimator, Outcome, Problem
from diffopt.plain_numbers import plain

MOST_STEPS = 2**31 - 1


def checked_steps(steps: Any) -> int:
    """The number of steps; what is not one is refused."""
    steps = plain(steps)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= MOST_STEPS:
        hint = "; write int(steps)" if isinstance(steps, float | Tensor) else ""
        raise StepsError(f"steps is {tree.describe(steps)}, expected an integer >= 0 (and below 2**31){hint}")
    return steps


def check_estimator(estimator: Any) -> None:
    """Refuse what is not an estimator."""
    if not isinstance(estimator, Estimator):
        hint = "; call it: estimator=Reverse()" if isinstance(estimator, type) else ""
        raise EstimatorError(f"estimator is {tree.describe(estimator)}, expected a diffopt.estimators object{hint}")


def params_leaves(params: Any) -> tuple[list[Tensor], tree.Structure]:
    """The leaves of the parameters, each one that can be optimised."""
    if isinstance(params, torch.nn.Module):
        raise LeafError(
            f"params is the module {type(params).__name__}, expected a tree of tensors: pass "
            "dict(module.named_parameters()) and call the module in the loss by torch.func.functional_call"
        )
    leaves, structure = tree.flatten(params)
    if not leaves:
        raise LeafError("params is an empty tree, expected at least one floating tensor")
    for path, leaf in zip(tree.paths(structure), leaves, strict=True):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.layout != torch.strided:
            raise LeafError(f"params{path} is {tree.describe(leaf)}, expected a dense floating tensor")
        if leaf.is_nested:
            raise LeafError(f"params{path} is a nested tensor, expected a dense floating one; pass a list of tensors")
        if leaf.is_inference():
            raise GradModeError(
                f"params{path} was made in torch.inference_mode, expected a tensor that can be differentiated: clone() "
                "it, or make it under torch.no_grad()"
            )
        if leaf.numel() == 0:
            raise LeafError(f"params{path} has shape {tuple(leaf.shape)}: it is empty, expected at least one number")
        if leaf.device != leaves[0].device:
            raise DeviceError(
                f"params{path} is on {leaf.device}, expected {leaves[0].device} as the first leaf: move it"
            )
        if leaf.device.type == "meta":
            raise DeviceError(f"params{path} is on meta, expected a device that holds numbers: to_empty() and fill it")
    return leaves, structure


def refuse_frozen(leaves: Sequence[Tensor], structure: tree.Structure) -> None:
    """Refuse frozen parameters of a module among others: ``torch.optim`` leaves them alone, ``solve`` would not."""
    parameters = [isinstance(leaf, torch.nn.Parameter) for leaf in leaves]
    if any(own and leaf.requires_grad for own, leaf in zip(parameters, leaves, strict=True)):
        for path, own, leaf in zip(tree.paths(structure), parameters, leaves, strict=True):
            if own and not leaf.requires_grad:
                raise LeafError(
                    f"params{path} is a frozen parameter (requires_grad=False) among others that are not, expected "
                    "what is to be trained: solve trains all of params. Pass the frozen ones in *args, or .detach() it "
                    "to train it from a constant start"
                )


def check_batches(batches: Any, steps: int) -> None:
    """Refuse batches that do not have one entry per step."""
    leaves, structure = tree.flatten(batches)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise BatchesError(f"batches is {tree.describe(batches)}, expected a tree of tensors with {steps} entries each")
    for path, leaf in zip(tree.paths(structure), leaves, strict=True):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != steps:
            raise BatchesError(
                f"batches{path} is {tree.describe(leaf)}, expected a tensor whose first axis has length "
                f"steps = {steps}, one entry per inner step"
            )


def run(rule: Estimator, problem: Problem) -> Outcome:
    """Run a rule on a problem; where checks are on, refuse a loss that has changed in place what it was given."""
    params = problem.state[: problem.dynamics.params_count]
    given = (*params, *problem.extras) if problem.check else ()
    before = [transforms.version(x) for x in given]
    with autodiff.named_in_place_changes():
        outcome = rule.run(problem)
    after = [transforms.version(x) for x in given]
    if after != before:
        names = [name for part in problem.dynamics.names() for name in part]
        changed = next(name for name, old, new in zip(names, before, after, strict=True) if old != new)
        raise InPlaceError(
            f"the inner loss (or the optimizer) has changed {changed} in place, expected it to stay as it was: write "
            "x = x + y for x += y; of a batch norm's buffers pass clones, or use track_running_stats=False"
        )
    return outcome
