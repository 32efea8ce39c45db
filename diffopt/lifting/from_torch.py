"""``from_torch``: a stateful optimizer class of PyTorch as a pure update rule."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError, LiftError, OptimizerError
from diffopt.lifting import verification
from diffopt.lifting.lifted_class import LiftedClass, TorchClass
from diffopt.lifting.options import defaults_of, taken_apart
from diffopt.optimizers.base import Optimizer
from diffopt.tensors import hints, tree

# the class -> why it cannot be lifted, and what to use instead
_REFUSED = {
    "LBFGS": ("it evaluates the loss itself, through a closure", "use SGD, or diffopt.implicit at its minimiser"),
    "SparseAdam": ("it takes sparse gradients, and inner gradients are dense", "use diffopt.Adam"),
    "Muon": ("it rounds to bfloat16 in every step, which leaves no useful derivative", "use diffopt.Muon"),
}
_SWITCHES = {
    "foreach": "the lifted step goes tensor by tensor",
    "fused": "a fused kernel has no derivative",
    "capturable": "nothing is captured in a CUDA graph",
    "differentiable": "the lifted step always is",
}


def from_torch(optimizer: type[torch.optim.Optimizer], /, **options: Any) -> Optimizer:
    """Lift an optimizer class of ``torch.optim``, or any other ``torch.optim.Optimizer``, into a pure update rule.

    An option that is a tensor, a tree shaped like ``params`` or a :class:`diffopt.Schedule` is a hyperparameter that
    can be learned; numbers and switches go to the class as they are. The class's own ``step`` runs, on cells in place
    of tensors (``cells.py``), so the rule is right wherever a :class:`diffopt.Optimizer` is: under every estimator and
    every transform. A root at zero has derivative 0, so a coordinate without gradient gives no NaN.

    The rule is compared with the class before it is returned: values over some steps, derivatives with central
    differences, a batch under ``vmap`` with a loop; and values again when it first meets params of new shapes. What
    differs is refused. A comparison is made once for each class and set of options, on the CPU.

    With an option that is a tree, each leaf of ``params`` gets an instance of the class of its own; otherwise all share
    one, in one param group.

    Cost: a hypergradient takes 1.2 to 1.8 times as long as by a native rule (``python -m benchmarks.lifted``); the
    check takes some 0.1 s. Use a native rule such as :class:`diffopt.Adam` where there is one.

    Args:
        optimizer: the class, such as ``torch.optim.NAdam``.
        options: what its constructor takes besides ``params``.

    Raises:
        LiftError: the class cannot be lifted, or came out different.
        HyperparameterError: the class refuses an option, or the option has no meaning here.
        OptimizerError: not an optimizer class.

    Example:
        NAdam, with a learning rate that is learned:

        >>> import torch, diffopt
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> optimizer = diffopt.from_torch(torch.optim.NAdam, lr=lr, momentum_decay=0.01)
        >>> optimizer
        from_torch(NAdam, lr=tensor(0.1000, requires_grad=True), momentum_decay=0.01)
        >>> solution = diffopt.solve(lambda w: w.square().sum(), torch.ones(2), optimizer=optimizer, steps=3)
        >>> solution.params.sum().backward()
        >>> bool(lr.grad < 0)
        True
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        kind = type(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else torch.optim.Adam
        raise OptimizerError(
            f"from_torch got {tree.describe(optimizer)}",
            "an optimizer class, and its options by name",
            f"write from_torch({hints.name_of_torch(kind)}, lr=0.1)",
        )
    _refuse_by_name(optimizer, options)
    defaults = defaults_of(cast("Any", optimizer))
    if "foreach" in defaults:
        options = {**options, "foreach": False}
    taken, learned = taken_apart(options, defaults)
    original = TorchClass(optimizer, taken)
    _check(original)
    return LiftedClass(original, learned)


def _refuse_by_name(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    for base in kind.__mro__:
        if base.__name__ in _REFUSED and base.__module__.startswith("torch.optim"):
            why, fix = _REFUSED[base.__name__]
            raise LiftError(f"{kind.__name__} cannot be lifted: {why}", "a class whose step can be followed", fix)
    for name, reason in _SWITCHES.items():
        if options.get(name):
            raise HyperparameterError(
                f"{kind.__name__}: {name}={tree.brief(options[name])} has no meaning here: {reason}",
                "it left out",
                "omit it",
            )
    if "params" in options:
        raise HyperparameterError(
            f"{kind.__name__}: params were given",
            "options only: params go to solve",
            "an option per leaf is a tree: lr={'w': 0.1, 'b': 0.2}",
        )


@functools.lru_cache(maxsize=256)
def _check(original: TorchClass) -> None:
    """Compare the rule with its class, once for each class and set of options."""
    verification.check(
        verification.Lift(
            original.name,
            original.advice,
            original.run,
            functools.partial(_lifted, original),
            original.options.samples(),
        )
    )


def _lifted(original: TorchClass, values: dict[str, Tensor]) -> LiftedClass:
    """The rule with these scalars as learned options."""
    leaves, learned = len(verification.FORM), original.options.learned()
    return LiftedClass(original, {k: [values[k]] * leaves if x.per_leaf else values[k] for k, x in learned.items()})
