"""From a module to a function of its parameters, which is what ``solve`` takes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from threading import RLock
from typing import Any, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffopt.distributed.sharded import refuse_wrapper
from diffopt.errors import LeafError, StructureError
from diffopt.tensors import hints, transforms
from diffopt.tensors.checkpointed_blocks import recomputing
from diffopt.tensors.tree import describe

Params: TypeAlias = dict[str, Tensor]

_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""A call puts other tensors into its module for a while, which two threads must not do at once; so does a block."""


class ModuleFunction(Protocol):
    """What :func:`functional` makes of a module: its ``forward`` as a function of the parameters as well."""

    def __call__(self, params: Params, /, *inputs: Any, **named_inputs: Any) -> Any:
        """Call the module with these parameters."""
        ...


Blocks: TypeAlias = "str | nn.Module | Iterable[str | nn.Module] | Callable[[str], bool]"


def functional(module: nn.Module, checkpoint: Blocks = ()) -> tuple[ModuleFunction, Params]:
    """A module as a function of its parameters, and the parameters to start from.

    ``function(params, *inputs, **inputs)`` is ``module(*inputs, **inputs)`` with exactly these parameters: a name that
    is missing or unknown raises. ``function`` and ``params`` are what :func:`diffopt.solve` needs: call the one in the
    loss, and pass the other, or a part of it, as ``params``.

    - *Trainable parameters* are copied into ``params``. Calls neither read nor change the module's own.
    - *Frozen parameters* (``requires_grad=False``) are not in ``params``, as ``torch.optim`` leaves them alone: each
      call reads them from the module, as constants, without a copy. Freeze or unfreeze before you call ``functional``.
    - *Tied weights* are in ``params`` once, under their first name, and move together.
    - *Buffers* are copied now, and each call reads a fresh copy. What a layer writes into them (running statistics) is
      dropped, and under ``torch.func.vmap`` raises: use layers without running statistics there.
    - ``module.train()`` and ``module.eval()`` act on later calls.

    ``checkpoint`` names parts whose forward pass is computed again in every backward pass, with these parameters, the
    same random numbers, autocast and kernels. Of such a block only what it is given is kept, in second derivatives,
    too: the memory of a deep model is that of one block and of what goes from block to block. A gradient costs one more
    forward pass of the blocks, a second derivative two and a gradient. Results are the same, to round-off,
    also under ``torch.func.vmap``. It is right where ``torch.utils.checkpoint`` within the module is not: that computes
    again with the module's own weights. A block reads its inputs, its weights and nothing else that requires grad.
    What it returns shares no memory with its inputs. What else depends on them and is left behind (an attribute, a
    buffer, what a hook keeps) raises when it is differentiated. So does a block that gives other
    numbers the second time, as one does with a generator of its own or an attribute that has changed.

    Args:
        module: any module. A lazy one must have been called once, on data.
        checkpoint: blocks, each a name as in ``module.named_modules()``, or the module inside ``module`` itself; or a
            function that says so of a name. A ``ModuleList`` or ``ModuleDict`` stands for its entries:
            ``checkpoint="transformer.h"``.

    Returns:
        ``function``, and ``params``: each trainable parameter's name with a detached copy that requires grad.

    Raises:
        LeafError: it is no module, or has no parameter to train, or is a lazy module before its first call.
        RanksError: it is wrapped by ``DistributedDataParallel`` or ``fully_shard``: give it the bare module.
        StructureError: ``checkpoint`` names what is not there. From ``function``: ``params`` has other names; or a
            parameter that was frozen no longer is.
        CapturedTensorError: from ``function``: a block of ``checkpoint`` reads a tensor that requires grad from
            elsewhere.
        HiddenStateError: from ``function``: a block of ``checkpoint`` is given an object that holds tensors, such as a
            cache, which it may change; or it leaves behind what is to be differentiated, other than by returning it;
            or it gives other numbers when it is computed again.
        InPlaceError: from ``function``: a block of ``checkpoint`` changes in place what it is given.

    Example:
        >>> import torch
        >>> function, params = functional(torch.nn.Linear(2, 1))
        >>> sorted(params)
        ['bias', 'weight']
        >>> params = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}
        >>> function(params, torch.tensor([[1.0, 1.0]]))
        tensor([[6.]])
    """
    named, frozen = _parameters(module)
    refuse_wrapper(module)
    blocks = _blocks(module, checkpoint)
    params = {name: parameter.detach().clone().requires_grad_() for name, parameter in named.items()}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    lock = _LOCKS.setdefault(module, RLock())

    # NOTE [which names a module's function takes]
    # named_parameters gives each tied weight once, under its first name, and functional_call fills in its other names.
    # So the names are compared here: a strict functional_call would also ask for the frozen parameters, which stay the
    # module's own objects (a copy would cost their memory, and some quantised classes lose what they know in a copy).
    def function(params: Params, /, *inputs: Any, **named_inputs: Any) -> Any:
        if not isinstance(params, Mapping) or params.keys() != named.keys():
            raise _other_names(params, named, frozen)
        if any(parameter.requires_grad for parameter in frozen.values()):
            raise _no_longer_frozen(frozen)
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        with nullcontext() if torch.compiler.is_compiling() else lock:
            if not blocks:
                return transforms.functional_call(module, {**params, **fresh}, inputs, named_inputs)
            with recomputing(blocks, lock):
                return transforms.functional_call(module, {**params, **fresh}, inputs, named_inputs)

    return function, params


def _parameters(module: Any) -> tuple[Params, Params]:
    """The parameters of a module by name: those that are to be trained, and the frozen ones."""
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise LeafError(f"module is {describe(module)}", "a torch.nn.Module", "make it, Linear(2, 1) for Linear")
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise LeafError(f"{kind}: {name!r} is {describe(value)}", "a tensor with a shape", hints.for_params(value))
    named = dict(module.named_parameters())
    trained: Params = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not named:
        raise LeafError(f"{kind} has no parameters", "one or more to train", "a module without is a function")
    if not trained:
        raise LeafError(
            f"all {len(named)} parameters of {kind} are frozen (requires_grad=False)",
            "one or more to train",
            "call requires_grad_() on those",
        )
    return trained, {name: parameter for name, parameter in named.items() if name not in trained}


def _blocks(module: nn.Module, checkpoint: Any) -> dict[str, nn.Module]:
    """The modules that ``checkpoint`` names, by name."""
    inside = {name: block for name, block in module.named_modules() if name}
    if isinstance(checkpoint, str | nn.Module | type):
        checkpoint = [checkpoint]
    if callable(checkpoint):
        names = [name for name in inside if checkpoint(name)]
        if not names:
            raise StructureError("checkpoint is a function that says no to every name", f"one of {_shown(inside)}")
    elif isinstance(checkpoint, Iterable):
        names = [_name(block, inside) for block in checkpoint]
    else:
        raise StructureError(f"checkpoint is {describe(checkpoint)}", "names of blocks", f"such as {_shown(inside)}")
    found: dict[str, nn.Module] = {}
    for name in names:
        found.update(_entries(name, inside[name]))
    return found


def _entries(name: str, block: nn.Module) -> dict[str, nn.Module]:
    """A block by its name; of a list or a dictionary, which nobody calls, the entries, to any depth."""
    if not isinstance(block, nn.ModuleList | nn.ModuleDict) or _has_forward(block):
        return {name: block}
    return {k: b for key, entry in block.named_children() for k, b in _entries(f"{name}.{key}", entry).items()}


def _has_forward(block: nn.Module) -> bool:
    return type(block).forward is not nn.Module.forward


def _name(block: Any, inside: Mapping[str, nn.Module]) -> str:
    """The name of a block that is given by it, or as a module."""
    if isinstance(block, str) and block in inside:
        return block
    name = next((name for name, module in inside.items() if module is block), None)
    if name is not None:
        return name
    near = difflib.get_close_matches(str(block), list(inside), n=3, cutoff=0.4) if isinstance(block, str) else []
    raise StructureError(
        f"checkpoint names {block!r}" if isinstance(block, str) else f"checkpoint holds {describe(block)}",
        "a name of module.named_modules(), or a module inside it",
        f"the closest are {', '.join(map(repr, near))}" if near else f"names are such as {_shown(inside)}",
    )


def _shown(inside: Mapping[str, nn.Module]) -> str:
    return ", ".join([repr(name) for name in inside][:4]) + (" ..." if len(inside) > 4 else "")


def _other_names(params: Any, names: Params, frozen: Params) -> StructureError:
    expected = f"the {len(names)} names that functional() returned"
    if not isinstance(params, Mapping):
        return StructureError(f"params is {describe(params)}", f"{expected}, in a dictionary from name to tensor")
    unknown = [name for name in params if name not in names]
    for name in unknown:
        if name in frozen:
            return StructureError(
                f"params[{name!r}] is a frozen parameter of the module",
                expected,
                "the frozen ones are read from the module; requires_grad_() it before you call functional() to have it "
                "among them",
            )
    odd = [f"params[{name!r}] is missing" for name in names if name not in params]
    odd += [f"params[{name!r}] is unknown" for name in unknown]
    return StructureError(", ".join(odd[:2]), f"{expected}: {list(names)[:2]} ...")


def _no_longer_frozen(frozen: Params) -> StructureError:
    name = next(name for name, parameter in frozen.items() if parameter.requires_grad)
    return StructureError(
        f"{name!r} requires grad",
        "a parameter that is frozen, as it was when functional() was called",
        "call functional() again to train it, or freeze it with requires_grad_(False)",
    )
