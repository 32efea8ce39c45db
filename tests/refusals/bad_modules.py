"""Bad inputs: what is no module, modules without parameters to train, and other names than a module's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bad_row import Row
from torch import nn

import diffopt

ONE = torch.ones(1, 2)


def linear() -> nn.Module:
    """A layer whose weights are not drawn: torch's generator stays where it is."""
    return nn.utils.skip_init(nn.Linear, 2, 2)


def half_frozen() -> nn.Module:
    net = nn.Sequential(linear(), linear())
    net[0].requires_grad_(False)
    return net


def call(params: Any, module: Callable[[], nn.Module] = linear) -> Any:
    """Call a module's function with ``params``, or with what they make of the right ones."""
    function, own = diffopt.functional(module())
    return function(params(own) if callable(params) else params, ONE)


def unfrozen_later() -> Any:
    module = half_frozen()
    function, params = diffopt.functional(module)
    module.requires_grad_()
    return function(params, ONE)


# name -> the call, what the message says
MODULES: dict[str, tuple[Callable[[], Any], str]] = {
    "a_function": (lambda: diffopt.functional(lambda x: x), "module is function .*expected a torch.nn.Module"),
    "a_class": (lambda: diffopt.functional(nn.Linear), r"expected a torch.nn.Module; make it, Linear\(2, 1\) for"),
    "parameters": (lambda: diffopt.functional(linear().parameters()), "module is generator .*expected a torch"),
    "no_parameters": (lambda: diffopt.functional(nn.ReLU()), "ReLU has no parameters, expected one or more to train"),
    "all_frozen": (
        lambda: diffopt.functional(linear().requires_grad_(False)),
        r"all 2 parameters of Linear are frozen .*expected one or more to train; call requires_grad_\(\)",
    ),
    "lazy": (
        lambda: diffopt.functional(nn.Sequential(nn.LazyLinear(2))),
        "Sequential: '0.weight' is a UninitializedParameter, expected a tensor with a shape; call the lazy module once",
    ),
    "lazy_buffer": (
        lambda: diffopt.functional(nn.Sequential(linear(), nn.LazyBatchNorm1d(affine=False))),
        "'1.running_mean' is a UninitializedBuffer, expected .*call the lazy module once",
    ),
}
NAMES: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (
        lambda: call({"weight": ONE}),
        r"params\['bias'\] is missing, expected the 2 names that functional\(\) returned",
    ),
    "unknown": (lambda: call(lambda own: {**own, "x": ONE}), r"params\['x'\] is unknown, expected the 2 names"),
    "of_another_module": (
        lambda: call(lambda own: {f"0.{name}": value for name, value in own.items()}),
        r"params\['weight'\] is missing, params\['bias'\] is missing, expected the 2 names .*: \['weight', 'bias'\]",
    ),
    "a_list": (lambda: call([1]), r"params is list \[1\], expected the 2 names .*in a dictionary"),
    "a_frozen_one": (
        lambda: call(lambda own: {**own, "0.weight": torch.ones(2, 2)}, half_frozen),
        r"params\['0.weight'\] is a frozen parameter .*, expected the 2 names .*requires_grad_\(\) it before",
    ),
    "unfrozen_later": (
        unfrozen_later,
        r"'0.weight' requires grad, expected a parameter that is frozen.*call functional\(\) again",
    ),
}
ROWS: dict[str, Row] = {
    **{f"module_{name}": Row("module", call, diffopt.LeafError, says) for name, (call, says) in MODULES.items()},
    **{f"names_{name}": Row("module", call, diffopt.StructureError, says) for name, (call, says) in NAMES.items()},
}
