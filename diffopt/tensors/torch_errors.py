"""What torch refuses inside a loss, said in this library's words: which operation it is, and the fix for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import (
    DeviceError,
    DiffoptError,
    GradModeError,
    HiddenStateError,
    InPlaceError,
    LossError,
    MissingDerivativeError,
    RandomnessError,
    VmapError,
)
from diffopt.tensors import hints, tree

# a part of the operation's name, or of torch's message -> what to do about it
_SECOND_DERIVATIVES = {
    "attention": "run it under diffopt.nn.second_order_attention() or sdpa_kernel([SDPBackend.MATH])",
    "rnn": "run it under torch.backends.cudnn.flags(enabled=False)",
    "once_differentiable": "write the function's backward in differentiable operations",
    "use_reentrant": "pass use_reentrant=False to torch.utils.checkpoint, or leave it out and use Reverse('sqrt')",
    "for sparse tensors": "write sparse=False for the sparse=True of embeddings",
    "aot_autograd": "call what was given to torch.compile (module._orig_mod); solve has compile=True",
    "with respect to argument 'weight'": "(w[y] * cross_entropy(..., reduction='none')).sum() / w[y].sum()",
}
_FIRST = "is not differentiable with respect to"
_MISSING = (
    "is not implemented",
    "use_reentrant=True",
    "aot_autograd does not",
    _FIRST,
)
"""Parts of what torch says where a derivative is missing."""
_OTHERWISE = "write it in elementary operations, or use FirstOrder() or ESJacobian(...)"
_VMAP = {
    "running_mean": "batch norm cannot keep running statistics there: track_running_stats=False, module.eval() or "
    "GroupNorm",
    "in-place": "write x = x + y for x += y",
    "inplace": "write x = x + y for x += y",
    ".item()": "keep the value a tensor",
    "accessing `data`": "write x.detach() for x.data",
    "data-dependent": "write torch.where for an if that asks a tensor",
    "escaped from inside": "take torch.utils.checkpoint out of it, which recomputes when vmap has ended, and use "
    "Reverse('sqrt') or diffopt.functional(module, checkpoint=blocks)",
    "requires_grad_()": "differentiate by torch.func.grad there, which vmap can batch",
    "does not require grad and does not have": "differentiate by torch.func.grad there, which vmap can batch",
    "dynamic shape": "write torch.where for an index by a mask",
    "autograd.Function": "give the function a setup_context and generate_vmap_rule = True",
    "does not have vmap support": "give the function generate_vmap_rule = True, or a vmap of its own",
    "have storage": "keep it a tensor: no .numpy()",
    "is unsupported for Sparse": "pass it dense, or loop over the tasks",
    "Batching rule not implemented": "write the operation in elementary ones, or loop over the tasks",
    "vmap:": "write the operation in elementary ones, or loop over the tasks",
}


# parts of what torch says where a tensor that autograd or a transform looks after is written to
_IN_PLACE = (
    "leaf Variable",
    "being modified inplace",
    "been modified inplace",
    "modified by an inplace operation",
    "attempted to call in-place operation",
    "functions with out=",
    "out; the fallback path doesn't",  # mul.out, sum.IntList_out; torch says the same of views, such as _neg_view
)


def is_in_place(error: Exception) -> bool:
    """Whether torch raised ``error`` because something was changed in place."""
    return any(part in str(error) for part in _IN_PLACE)


def changed_in_place() -> InPlaceError:
    """The error for a loss or an update that changes what it was given."""
    return InPlaceError(
        "the inner loss or the optimizer's update (or code between solve and backward) changes a tensor it was "
        "given, or one that its gradient needs, in place",
        "functions without side effects",
        "write x = x + y for x += y, x.add(y) for x.add_(y); no out=",
    )


def is_missing_derivative(error: Exception) -> bool:
    """Whether torch raised ``error`` because an operation has no (second) derivative."""
    return any(part in str(error).partition("\n")[0] for part in _MISSING)


def missing_derivative(what: str) -> MissingDerivativeError:
    """The error for an operation of which torch has no second derivative; ``what`` holds its name."""
    fix = next((fix for part, fix in _SECOND_DERIVATIVES.items() if part in what), _OTHERWISE)
    which, room = "derivative" if _FIRST in what else "second derivative", min(110, 160 - len(fix))
    return MissingDerivativeError(
        f"an operation in the inner loss has no {which} ({what[:room]})",
        "operations that can be differentiated twice",
        fix,
    )


def hooks_around_transforms() -> GradModeError:
    """The error for ``torch.func`` where saved-tensor hooks are set."""
    return GradModeError(
        "torch.func and saved-tensor hooks (torch.utils.checkpoint, save_on_cpu) meet in the inner loss or around it, "
        "which torch refuses",
        "one without the other",
        "take a checkpoint out of the loss (diffopt.functional(module, checkpoint=blocks) needs none, Reverse('sqrt') "
        "stores less around it); hooks around the solve are kept "
        "out by estimators such as Reverse()",
    )


def ended_iterator() -> HiddenStateError:
    """The error for a loss that asks an ended iterator for more."""
    return HiddenStateError(
        "the inner loss asks an iterator for more (next(...)), and it has ended: evaluations move it on, and "
        "estimators may compute a step again",
        "a loss that reads its arguments only",
        "pass the data of all steps in batches, stacked",
    )


def forward_mode_error(what: str = "an input of solve") -> MissingDerivativeError:
    """The error for a solve that is differentiated in forward mode."""
    return MissingDerivativeError(
        f"{what} carries a tangent of forward-mode differentiation",
        "none",
        "no adjoint rule passes it on. Use backward(), torch.func.grad or jacrev (for forward mode inside, "
        "estimator=ForwardMode())",
    )


def no_tangent_error(error: Exception) -> MissingDerivativeError | None:
    """The error for an inner gradient that torch does not differentiate in forward mode, if ``error`` is of that."""
    said = str(error).partition("\n")[0]
    if "forward AD" not in said and "ZeroTensors" not in said:
        return None
    return MissingDerivativeError(
        f"torch has no forward mode of the inner gradient ({said[:70]})",
        "operations that have one",
        "write (a - b).square().mean() for F.mse_loss(a, b), or use backward() or jacrev",
    )


def name_of_broken(node: Any) -> str:
    """What autograd says when it reaches this node, whose derivative was declared missing."""
    for inputs in range(1, 9):  # a node says how many it takes by refusing any other number
        with suppress(TypeError):
            said = _said_by(node, inputs)
            if said:
                return said
    return str(node.name()).rpartition("::")[2]


def _said_by(node: Any, inputs: int) -> str:
    try:
        node(*[torch.zeros(())] * inputs)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def signature_error(
    error: Exception, what: str, function: Callable[..., Any], count: int, expected: str
) -> LossError | None:
    """The error for a function that cannot take ``count`` arguments; ``None`` if it can."""
    if not isinstance(error, TypeError):
        return None
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function that does not say what it takes
        return _refused_by_itself(error, what, function, expected)
    try:
        signature.bind(*[None] * count)
    except TypeError as mismatch:
        return LossError(
            f"{what} takes {str(signature)[:80]} and was given {count} arguments ({mismatch})",
            expected,
            "change its arguments",
        )
    return _refused_by_itself(error, what, function, expected)


def _refused_by_itself(error: TypeError, what: str, function: Callable[..., Any], expected: str) -> LossError | None:
    """The error for what is no Python function, and refuses what it is given before any line of the caller's runs."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not str(last.tb_frame.f_globals.get("__name__")).startswith("diffopt."):
        return None
    return LossError(
        f"{what} is {tree.describe(function)}, which refuses its arguments ({str(error)[:80]})",
        expected,
        "wrap it in a function that calls it rightly",
    )


def device_error(
    error: Exception, device: torch.device, given: Mapping[str, Tensor], model: str = "params"
) -> DeviceError | None:
    """The error for a loss that was given tensors on other devices; ``None`` if that is not why it failed."""
    elsewhere = [name for name, x in given.items() if x.device != device]
    if not elsewhere or not any(word in str(error) for word in ("device", "meta")):
        return None
    name = elsewhere[0]
    return DeviceError(f"{name} is on {given[name].device}", f"{device} as {model}", "move it with .to()")


def inference_error(
    error: Exception, given: Mapping[str, Tensor], what: str = "the inner loss"
) -> GradModeError | None:
    """The error for a loss that autograd cannot record; ``None`` if what it was given is not why."""
    made = [name for name, x in given.items() if x.is_inference()]
    if not made or "nference tensor" not in str(error):
        return None
    return GradModeError(
        f"{made[0]} was made in torch.inference_mode, and {what} needs it for its gradient",
        "an ordinary tensor",
        f"clone() it, or make it under torch.no_grad(){hints.in_inference_mode()}",
    )


def mixed_error(error: Exception, what: str, fix: str) -> DeviceError | None:
    """The error for operations between distributed and ordinary tensors; ``None`` if ``error`` is of another kind."""
    if "mixed torch.Tensor and DTensor" not in str(error):
        return None
    return DeviceError(f"{what} computes with a DTensor and an ordinary tensor at once", "one kind", fix)


def vmap_error(error: Exception, what: str = "the inner loss") -> DiffoptError | None:
    """The error for what ``torch.func.vmap`` refused in a loss; ``None`` if the error is of another kind."""
    said = str(error)
    if "randomness error mode" in said:
        return RandomnessError(
            f"{what} draws random numbers under vmap",
            "none",
            "say randomness='different' (to vmap, or to mean_over_tasks) for numbers of each task's own, or 'same'",
        )
    for part, fix in _VMAP.items():
        if part in said:
            first = " ".join(said.removeprefix("vmap: ").split())[:110].rsplit(" ", 1)[0]
            return VmapError(f"{what} cannot run under vmap ({first} ...)", "code that can", fix)
    return None
