"""Bad inputs: losses of a wrong kind, what they captured, and what they change in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from bad_row import Refused, backward, both, pair, product, solve, square, tensor
from torch import Tensor, nn
from torch.func import grad, vmap

import diffopt
from diffopt import CapturedTensorError, DisconnectedError, InPlaceError, LossError, NonFiniteLossError
from diffopt.estimators import FirstOrder, ForwardMode, Unrolled

refused = Refused("loss")
SCALAR = "expected one floating scalar tensor; (return|reduce|end|keep|make|take)"
WITHOUT = r"does not depend on params, expected a gradient; check that the loss uses the params.*\.item\(\)"
NOT_FINITE = "at the initial params, expected a finite number; "


@refused(LossError, rf"float64 tensor of shape \(2,\).*{SCALAR}", lambda w: w**2, name="vector")
@refused(LossError, rf"shape \(1,\).*{SCALAR}", lambda w: w.sum()[None], name="one_entry")
@refused(LossError, rf"shape \(0,\).*{SCALAR}", lambda w: w[:0], name="no_entry")
@refused(LossError, rf"float 3\.0, {SCALAR}", lambda w: 3.0, name="number")
@refused(LossError, SCALAR, lambda w: np.float64(3), name="numpy")
@refused(LossError, f"NoneType None, {SCALAR}", lambda w: None, name="none")
@refused(LossError, f"str 'x', {SCALAR}", lambda w: "x", name="string")
@refused(LossError, f"returned tuple .*{SCALAR}", lambda w: (w.sum(), w), name="pair")
@refused(LossError, f"returned dict .*{SCALAR}", lambda w: {"loss": w.sum()}, name="dict")
@refused(LossError, rf"int64 tensor of shape \(\).*{SCALAR}", lambda w: torch.tensor(3), name="integer")
@refused(LossError, rf"bool tensor of shape \(\).*{SCALAR}", lambda w: w.sum() > 0, name="bool")
@refused(LossError, f"complex128 tensor.*{SCALAR}", lambda w: (w * 1j).sum(), name="complex")
@refused(NonFiniteLossError, f"is nan {NOT_FINITE}check the data and the", lambda w: (w * torch.nan).sum(), name="nan")
@refused(NonFiniteLossError, f"is inf {NOT_FINITE}", lambda w: (w / 0).sum(), name="inf")
@refused(DisconnectedError, WITHOUT, lambda w: torch.tensor(1.0), name="constant")
@refused(DisconnectedError, WITHOUT, lambda w: w.detach().sum(), name="detached")
@refused(DisconnectedError, WITHOUT, lambda w: torch.tensor(w.sum().item()), name="item")
@refused(DisconnectedError, WITHOUT, torch.no_grad()(square), name="no_grad")
def of_params(loss: Any) -> None:
    solve(loss)


for name, row in list(refused.rows.items()):
    (loss,) = row.call.args  # type: ignore[attr-defined]
    if name != "item":  # which vmap refuses by itself
        refused.add(f"{name}_vmap", partial(vmap(partial(solve, loss)), torch.ones(4, 2).double()), row.error, row.says)
    if name in ("vector", "nan", "constant"):
        for estimator in (FirstOrder, ForwardMode, Unrolled):
            refused.add(
                f"{name}_{estimator.__name__}", partial(solve, loss, estimator=estimator()), row.error, row.says
            )


@refused(LossError, "loss is float 3.0, expected a function loss", 3.0)
@refused(
    LossError,
    r"takes \(w\) and was given 2 arguments \(too many.*expected one for params, one for each of \*args",
    lambda w: w.sum(),
    tensor(1),
)
@refused(LossError, r"takes \(w, x, y\).*'y'", lambda w, x, y: w.sum(), tensor(1))
def with_arguments(loss: Any, *args: Tensor) -> None:
    solve(loss, None, *args)


@refused(LossError, "with batches, one for the batch; change its arguments")
def no_place_for_the_batch() -> None:
    solve(lambda w: w.sum(), batches=torch.ones(3, 2))


@refused(diffopt.DeviceError, "returned a number on meta, expected cpu as params; move data")
def another_device() -> None:
    solve(lambda w: (0 * w).sum().to("meta"))


@refused(NonFiniteLossError, rf"nan {NOT_FINITE}params\['b'\] is not finite itself", path="params['b']")
def nan_params() -> None:
    solve(both, {**pair(), "b": tensor(float("nan"))})


@refused(NonFiniteLossError, f"inf {NOT_FINITE}.* is not finite itself", path="args[0]['d']")
def infinite_argument() -> None:
    solve(lambda w, x: product(w, x["d"]), None, {"d": tensor(1, float("inf"))})


# --------------------------------------------------------------------------- captured tensors

CAPTURED = r"without being given it: it captured it, .*expected among the arguments; pass it in \*args"
OF_A_TRANSFORM = r"a tensor of a torch.func transform .*captured it, expected among the arguments; pass it in \*args"
IF_A_MODULES = r"; if it is a module's, pass and call what diffopt\.functional\(module\) returns"


def leaf() -> Tensor:
    return tensor(0.5, 0.3).requires_grad_()


def distance(w: Tensor, c: Tensor) -> Tensor:
    return (w - c).square().sum()


@refused(CapturedTensorError, rf"{CAPTURED}.*requires_grad_\(False", path="`target`")
def captured_leaf() -> None:
    target = leaf()
    solve(lambda w: distance(w, target))


@refused(CapturedTensorError, rf"{CAPTURED}.*requires_grad_\(False", path="`twice`")
def captured_non_leaf() -> None:
    twice = 2 * leaf()
    solve(lambda w: distance(w, twice))


@refused(CapturedTensorError, rf"{CAPTURED}.*requires_grad_\(False", path="`held['x'][0]`")
def captured_in_a_container() -> None:
    held = {"x": [leaf()]}
    solve(lambda w: distance(w, held["x"][0]))


@refused(CapturedTensorError, CAPTURED + IF_A_MODULES, path="`net.bias`, `net.weight`", moves=True)
def captured_module() -> None:
    net = nn.Linear(2, 1).double()
    solve(lambda w: net(w).square().sum())


@refused(CapturedTensorError, rf"{CAPTURED}.*requires_grad_\(False", path="`c`")
def captured_partial() -> None:
    solve(partial(distance, c=leaf()))


@refused(CapturedTensorError, OF_A_TRANSFORM)
def captured_vmapped() -> None:
    vmap(lambda c: solve(lambda w: distance(w, c)))(torch.ones(3, 2, dtype=torch.float64))


@refused(CapturedTensorError, OF_A_TRANSFORM)
def captured_differentiated() -> None:
    grad(lambda c: solve(lambda w: distance(w, c)).sum())(tensor(1, 2))


# --------------------------------------------------------------------------- changes in place


def in_place(w: Tensor, *args: Any) -> Tensor:
    return w.mul_(2).sum()


@refused(
    InPlaceError, "changes a tensor it was given, .* in place, expected functions without side effects; write x = x"
)
def params_in_place() -> None:
    solve(in_place)


@refused(InPlaceError, "write x = x")
def params_in_place_unrolled() -> None:
    backward(loss=in_place, estimator=Unrolled())


@refused(InPlaceError, "update .or code between solve and backward. changes a tensor .* in place, .* write x = x")
def constant_in_place_before_backward() -> None:
    """Written into is what the graph of the steps has saved."""
    constant = tensor(1, 2)
    backward(lambda w: square(w) + 0 * constant.add_(1), lambda w: (w * constant).square().sum())


@refused(InPlaceError, "has changed .* in place, expected it to stay as it was; write x = x", path="args[0]['n']")
def argument_in_place() -> None:
    args = tensor(1, 2), {"n": tensor(1, 2)}
    diffopt.solve(lambda w, x: product(w, x["n"].add_(1)), *args, optimizer=diffopt.SGD(0.1), steps=2)


@refused(InPlaceError, "has changed .* in place", path="args[0]")
def argument_in_place_vmap() -> None:
    def run(w: Tensor, x: Tensor) -> Tensor:
        return diffopt.solve(lambda w, x: product(w, x.add_(1)), w, x, optimizer=diffopt.SGD(0.1), steps=2).params

    vmap(run)(torch.ones(2, 3), torch.ones(2, 3))
