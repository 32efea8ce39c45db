"""Bad inputs: losses of a wrong kind, what they captured, and what they change in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from bad_row import Row, backward, both, pair, solve, square, tensor
from torch import Tensor, nn
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import FirstOrder, ForwardMode, Unrolled

SCALAR = "expected one floating scalar tensor; (return|reduce|end|keep|make|take)"
WITHOUT = r"does not depend on params, expected a gradient; check that the loss uses the params.*\.item\(\)"
# name -> loss, error, what it says
LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "vector": (lambda w: w**2, diffopt.LossError, rf"float64 tensor of shape \(2,\).*{SCALAR}"),
    "one_entry": (lambda w: w.sum()[None], diffopt.LossError, rf"shape \(1,\).*{SCALAR}"),
    "no_entry": (lambda w: w[:0], diffopt.LossError, rf"shape \(0,\).*{SCALAR}"),
    "number": (lambda w: 3.0, diffopt.LossError, rf"float 3\.0, {SCALAR}"),
    "numpy": (lambda w: np.float64(3), diffopt.LossError, SCALAR),
    "none": (lambda w: None, diffopt.LossError, f"NoneType None, {SCALAR}"),
    "string": (lambda w: "x", diffopt.LossError, f"str 'x', {SCALAR}"),
    "pair": (lambda w: (w.sum(), w), diffopt.LossError, f"returned tuple .*{SCALAR}"),
    "dict": (lambda w: {"loss": w.sum()}, diffopt.LossError, f"returned dict .*{SCALAR}"),
    "integer": (lambda w: torch.tensor(3), diffopt.LossError, rf"int64 tensor of shape \(\).*{SCALAR}"),
    "bool": (lambda w: w.sum() > 0, diffopt.LossError, rf"bool tensor of shape \(\).*{SCALAR}"),
    "complex": (lambda w: (w * 1j).sum(), diffopt.LossError, f"complex128 tensor.*{SCALAR}"),
    "nan": (
        lambda w: (w * float("nan")).sum(),
        diffopt.NonFiniteLossError,
        "is nan at the initial params, expected a finite number; check the data and the initialisation",
    ),
    "inf": (lambda w: (w / 0).sum(), diffopt.NonFiniteLossError, "is inf at the initial params, expected a finite"),
    "constant": (lambda w: torch.tensor(1.0), diffopt.DisconnectedError, WITHOUT),
    "detached": (lambda w: w.detach().sum(), diffopt.DisconnectedError, WITHOUT),
    "item": (lambda w: torch.tensor(w.sum().item()), diffopt.DisconnectedError, WITHOUT),
    "no_grad": (torch.no_grad()(square), diffopt.DisconnectedError, WITHOUT),
}


def with_leaf(run: Any) -> Any:
    """Give a function a tensor that requires grad, to capture."""
    return run(tensor(0.5, 0.3).requires_grad_())


def distance(w: Tensor, c: Tensor) -> Tensor:
    return (w - c).square().sum()


def in_place(w: Tensor, *args: Any) -> Tensor:
    return w.mul_(2).sum()


def written_since(constant: Tensor) -> None:
    """Write into what the graph of the steps has saved."""
    backward(lambda w: square(w) + 0 * constant.add_(1), lambda w: (w * constant).square().sum())


CAPTURED_MODULE = (
    r"without being given it: it captured it, .*expected among the arguments; pass it in \*args; if it is a module's, "
    r"pass and call what diffopt\.functional\(module\) returns"
)
CAPTURED = (
    r"without being given it: it captured it, .*expected among the arguments; pass it in \*args.*requires_grad_\(False"
)
OTHERS = {
    "not_a_function": Row("loss", lambda: solve(3.0), diffopt.LossError, "loss is float 3.0, expected a function loss"),
    "too_many_arguments": Row(
        "loss",
        lambda: solve(lambda w: w.sum(), None, tensor(1)),
        diffopt.LossError,
        r"takes \(w\) and was given 2 arguments \(too many.*expected one for params, one for each of \*args",
    ),
    "too_few_arguments": Row(
        "loss", lambda: solve(lambda w, x, y: w.sum(), None, tensor(1)), diffopt.LossError, r"takes \(w, x, y\).*'y'"
    ),
    "no_place_for_the_batch": Row(
        "loss",
        lambda: solve(lambda w: w.sum(), batches=torch.ones(3, 2)),
        diffopt.LossError,
        "with batches, one for the batch; change its arguments",
    ),
    "another_device": Row(
        "loss",
        lambda: solve(lambda w: (0 * w).sum().to("meta")),
        diffopt.DeviceError,
        "returned a number on meta, expected cpu as params; move data",
    ),
    "nan_params": Row(
        "loss",
        lambda: solve(both, {**pair(), "b": tensor(float("nan"))}),
        diffopt.NonFiniteLossError,
        r"nan at the initial params, expected a finite number; params\['b'\] is not finite itself",
        "params['b']",
    ),
    "infinite_argument": Row(
        "loss",
        lambda: solve(lambda w, x: (w * x["d"]).sum(), None, {"d": tensor(1, float("inf"))}),
        diffopt.NonFiniteLossError,
        "inf at the initial params, expected a finite number; .* is not finite itself",
        "args[0]['d']",
    ),
    "captured_leaf": Row(
        "captured",
        lambda: with_leaf(lambda target: solve(lambda w: distance(w, target))),
        diffopt.CapturedTensorError,
        CAPTURED,
        "`target`",
    ),
    "captured_non_leaf": Row(
        "captured",
        lambda: with_leaf(lambda c: (lambda twice: solve(lambda w: distance(w, twice)))(2 * c)),
        diffopt.CapturedTensorError,
        CAPTURED,
        "`twice`",
    ),
    "captured_in_a_container": Row(
        "captured",
        lambda: with_leaf(lambda c: (lambda held: solve(lambda w: distance(w, held["x"][0])))({"x": [c]})),
        diffopt.CapturedTensorError,
        CAPTURED,
        "`held['x'][0]`",
    ),
    "captured_module": Row(
        "captured",
        lambda: (lambda net: solve(lambda w: net(w).square().sum()))(nn.Linear(2, 1).double()),
        diffopt.CapturedTensorError,
        CAPTURED_MODULE,
        "`net.bias`, `net.weight`",
        moves=True,
    ),
    "captured_partial": Row(
        "captured",
        lambda: with_leaf(lambda c: solve(partial(distance, c=c))),
        diffopt.CapturedTensorError,
        CAPTURED,
        "`c`",
    ),
    "captured_vmapped": Row(
        "captured",
        lambda: vmap(lambda c: solve(lambda w: distance(w, c)))(torch.ones(3, 2, dtype=torch.float64)),
        diffopt.CapturedTensorError,
        r"a tensor of a torch.func transform .*captured it, expected among the arguments; pass it in \*args",
    ),
    "captured_differentiated": Row(
        "captured",
        lambda: grad(lambda c: solve(lambda w: distance(w, c)).sum())(tensor(1, 2)),
        diffopt.CapturedTensorError,
        r"a tensor of a torch.func transform .*; pass it in \*args",
    ),
    "params_in_place": Row(
        "in place",
        lambda: solve(in_place),
        diffopt.InPlaceError,
        "changes a tensor it was given, .* in place, expected functions without side effects; write x = x",
    ),
    "params_in_place_unrolled": Row(
        "in place", lambda: backward(loss=in_place, estimator=Unrolled()), diffopt.InPlaceError, "write x = x"
    ),
    "constant_in_place_before_backward": Row(
        "in place",
        lambda: written_since(tensor(1, 2)),
        diffopt.InPlaceError,
        "update .or code between solve and backward. changes a tensor .* in place, expected .* write x = x",
    ),
    "argument_in_place": Row(
        "in place",
        lambda: diffopt.solve(
            lambda w, x: (w * x["n"].add_(1)).sum(),
            tensor(1, 2),
            {"n": tensor(1, 2)},
            optimizer=diffopt.SGD(0.1),
            steps=2,
        ),
        diffopt.InPlaceError,
        "has changed .* in place, expected it to stay as it was; write x = x",
        "args[0]['n']",
    ),
    "argument_in_place_vmap": Row(
        "in place",
        lambda: vmap(
            lambda w, x: (
                diffopt.solve(lambda w, x: (w * x.add_(1)).sum(), w, x, optimizer=diffopt.SGD(0.1), steps=2).params
            )
        )(torch.ones(2, 3), torch.ones(2, 3)),
        diffopt.InPlaceError,
        "has changed .* in place",
        "args[0]",
    ),
}


ROWS: dict[str, Row] = {
    **{f"loss_{name}": Row("loss", partial(solve, loss), error, says) for name, (loss, error, says) in LOSSES.items()},
    **{
        f"loss_{name}_vmap": Row("loss", partial(vmap(partial(solve, loss)), torch.ones(4, 2).double()), error, says)
        for name, (loss, error, says) in LOSSES.items()
        if name != "item"  # which vmap refuses by itself
    },
    **{
        f"loss_{name}_{rule.__name__}": Row(
            "loss", partial(solve, LOSSES[name][0], estimator=rule()), *LOSSES[name][1:]
        )
        for name in ("vector", "nan", "constant")
        for rule in (FirstOrder, ForwardMode, Unrolled)
    },
    **OTHERS,
}
