"""Bad inputs: what is no module, modules without parameters to train, and other names than a module's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bad_row import Refused
from torch import Tensor, nn

import diffopt
from diffopt import LeafError, StructureError

refused = Refused("module")
ONE = torch.ones(1, 2)
ALL_FROZEN = r"all 2 parameters of Linear are frozen .*expected one or more to train; call requires_grad_\(\)"
LAZY = "Sequential: '0.weight' is a UninitializedParameter, expected a tensor with a shape; call the lazy module once"


def linear() -> nn.Module:
    """A layer whose weights are not drawn: torch's generator stays where it is."""
    return nn.utils.skip_init(nn.Linear, 2, 2)


def half_frozen() -> nn.Module:
    net = nn.Sequential(linear(), linear())
    net[0].requires_grad_(False)
    return net


def with_lazy_buffer() -> nn.Module:
    return nn.Sequential(linear(), nn.LazyBatchNorm1d(affine=False))


@refused(LeafError, "module is function .*expected a torch.nn.Module", lambda: linear)
@refused(LeafError, r"expected a torch.nn.Module; make it, Linear\(2, 1\) for", lambda: nn.Linear)
@refused(LeafError, "module is generator .*expected a torch", lambda: linear().parameters())
@refused(LeafError, "ReLU has no parameters, expected one or more to train", nn.ReLU)
@refused(LeafError, ALL_FROZEN, lambda: linear().requires_grad_(False))
@refused(LeafError, LAZY, lambda: nn.Sequential(nn.LazyLinear(2)))
@refused(LeafError, "'1.running_mean' is a UninitializedBuffer, expected .*call the lazy module once", with_lazy_buffer)
def functional(make: Callable[[], Any]) -> None:
    diffopt.functional(make())


def one_more(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**own, "x": ONE}


def of_another_module(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"0.{name}": value for name, value in own.items()}


def with_a_frozen_one(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**own, "0.weight": torch.ones(2, 2)}


MISSING = r"params\['bias'\] is missing, expected the 2 names that functional\(\) returned"
BOTH_MISSING = (
    r"params\['weight'\] is missing, params\['bias'\] is missing, expected the 2 names .*: \['weight', 'bias'\]"
)
FROZEN = r"params\['0.weight'\] is a frozen parameter .*, expected the 2 names .*requires_grad_\(\) it before"


@refused(StructureError, MISSING, {"weight": ONE})
@refused(StructureError, r"params\['x'\] is unknown, expected the 2 names", one_more)
@refused(StructureError, BOTH_MISSING, of_another_module)
@refused(StructureError, r"params is list \[1\], expected the 2 names .*in a dictionary", [1])
@refused(StructureError, FROZEN, with_a_frozen_one, half_frozen)
def call(params: Any, module: Callable[[], nn.Module] = linear) -> None:
    """Call a module's function with ``params``, or with what they make of the right ones."""
    function, own = diffopt.functional(module())
    function(params(own) if callable(params) else params, ONE)


@refused(StructureError, r"'0.weight' requires grad, expected a parameter that is frozen.*call functional\(\) again")
def unfrozen_later() -> None:
    module = half_frozen()
    function, params = diffopt.functional(module)
    module.requires_grad_()
    function(params, ONE)
