"""Losses for ``diffopt.check``: one row per fault, with the check that must find it; and losses that are fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.nn import utils
from torch.utils import checkpoint

import diffopt
from diffopt.tasks import MLP, Conv4, functional


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def learned(value: float | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of its own that requires grad."""
    return torch.as_tensor(value, dtype=dtype).clone().requires_grad_()


def w() -> Tensor:
    return numbers(4).double()


class OnceOnly(torch.autograd.Function):
    """A square whose backward reads what it has saved as a constant: autograd then finds no curvature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return 2 * cotangents[0] * ctx.saved_tensors[0]


def of_module(module: nn.Module, inputs: Tensor, pick: Callable[[Any], Tensor] = lambda out: out) -> tuple[Any, ...]:
    """A loss over a module's parameters, with what it is given."""
    params = {name: value.detach().clone() for name, value in module.named_parameters()}
    return lambda p, x: pick(functional_call(module, p, (x,))).pow(2).mean(), params, inputs


def normed(kind: Callable[[nn.Module], Any]) -> tuple[Any, ...]:
    torch.manual_seed(0)
    return of_module(kind(nn.Linear(3, 2)), numbers(5, 3))


def attention() -> tuple[Any, ...]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return of_module(layer, numbers(2, 3, 4))


@dataclass(frozen=True)
class Fault:
    """A loss that is at fault, what it is given, the check that fails, the error's class, and what it says."""

    make: Callable[[], tuple[Any, ...]]
    check: str
    error: type[Exception]
    says: str


FAULTS: dict[str, Fault] = {}


def fault(check: str, error: type[Exception], says: str, *given: Any) -> Callable[[Any], Any]:
    """The loss that follows is at fault where it is given this; if nothing, :func:`w`."""

    def add(loss: Any) -> Any:
        FAULTS[loss.__name__] = Fault(lambda: (loss, *(given or [w()])), check, error, says)
        return loss

    return add


def fault_of(check: str, error: type[Exception], says: str) -> Callable[[Any], Any]:
    """What follows makes a loss that is at fault, with what it is given."""

    def add(make: Callable[[], tuple[Any, ...]]) -> Any:
        FAULTS[make.__name__] = Fault(make, check, error, says)
        return make

    return add


# --------------------------------------------------------------------------- no scalar, or none of the params

PARTS = {"a": torch.zeros(2), "b": torch.ones(2)}


@fault("scalar, finite", diffopt.LossError, r"shape \(4,\)")
def vector(w: Tensor) -> Tensor:
    return w


@fault("scalar, finite", diffopt.LossError, "raised RuntimeError .*check its arguments", w(), torch.ones(3).double())
def raising(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x).sum()


@fault_of("scalar, finite", diffopt.LossError, "loss is float")
def not_callable() -> tuple[Any, ...]:
    return 3.0, w()


@fault("scalar, finite", diffopt.NonFiniteLossError, "is (inf|nan)")
def infinite(w: Tensor) -> Tensor:
    return (w / 0).sum()


@fault("scalar, finite", diffopt.LeafError, r"params\['n'\] is int 3", {"n": 3})
def of_a_number(w: Tensor) -> Tensor:
    return w


@fault("scalar, finite", diffopt.LeafError, "diffopt.functional", nn.Linear(1, 1))
def of_a_module_itself(w: Tensor) -> Tensor:
    return w


@fault("depends on params", diffopt.DisconnectedError, "does not depend on params")
def detached(w: Tensor) -> Tensor:
    return w.detach().sum()


@fault("depends on params", diffopt.NonFiniteGradientError, r"NaN or infinite in params\['a'\]", PARTS)
def root_at_zero(p: dict[str, Tensor]) -> Tensor:
    return (p["a"].abs().sqrt() + p["b"]).sum()


@fault("depends on params", diffopt.MissingDerivativeError, "use_reentrant=False")
def reentrant(w: Tensor) -> Tensor:
    return checkpoint.checkpoint(torch.sin, w, use_reentrant=True).sum()


class Slot:
    """Holds a module where nobody finds it."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module


ELSEWHERE = "reads .+ in the backward pass only, expected what its forward pass read.*functional_call"


@fault_of("depends on params", diffopt.RecomputationError, ELSEWHERE)
def checkpointed_elsewhere() -> tuple[Any, ...]:
    slot = Slot(nn.Linear(4, 1, bias=False).double())

    def loss(w: Tensor) -> Tensor:
        with nn.utils.stateless._reparametrize_module(slot.module, {"weight": w[None]}):
            part = checkpoint.checkpoint(lambda x: slot.module(x).tanh(), 1 + w.detach(), use_reentrant=False)
        return part.square().sum()

    return loss, w()


# --------------------------------------------------------------------------- captures, changes and states


@fault_of("nothing captured", diffopt.CapturedTensorError, "captured `target`")
def captured() -> tuple[Any, ...]:
    target = torch.ones(4, dtype=torch.float64, requires_grad=True)
    return lambda w: (w - 2 * target).square().sum(), w()


@fault_of("nothing captured", diffopt.CapturedTensorError, r"captured `m\.bias`, `m\.weight`")
def captured_module() -> tuple[Any, ...]:
    m = nn.Linear(4, 1).double()
    return lambda w: m(w).sum().square(), w()


@fault("changes nothing", diffopt.InPlaceError, r"changes args\[0\]\['n'\] in place", w(), {"n": torch.ones(4)})
def argument_changed(w: Tensor, x: dict[str, Tensor]) -> Tensor:
    return (w * x["n"].add_(0)).sum().square()


TRACKED = "changes module.1.num_batches_tracked.*track_running_stats=False"


@fault_of("changes nothing", diffopt.InPlaceError, TRACKED)
def running_statistics() -> tuple[Any, ...]:
    return of_module(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), numbers(5, 3), lambda x: x[0] ** 3)


@fault_of("deterministic", diffopt.RandomnessError, "the same params again")
def iterated() -> tuple[Any, ...]:
    calls = itertools.count(1)
    return lambda w: w.square().sum() * next(calls), w()


@fault_of("deterministic", diffopt.RandomnessError, "torch's global one")
def own_generator() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return lambda w: (w * torch.rand(4, generator=generator)).sum().square(), w()


@fault_of("deterministic", diffopt.HiddenStateError, "keeps a state, in a number or another object")
def counted() -> tuple[Any, ...]:
    calls: list[int] = []

    def loss(w: Tensor) -> Tensor:
        calls.append(1)
        return w.square().sum() * len(calls)

    return loss, w()


class Average(nn.Module):
    """Moves a loss by a billionth of a running average of it."""

    def __init__(self) -> None:
        super().__init__()
        self.average = torch.ones((), dtype=torch.float64)

    def forward(self, w: Tensor) -> Tensor:
        loss = w.square().sum() + 1e-9 * self.average * w.sum()
        self.average.mul_(0.9).add_(0.1 * loss.detach())
        return loss


@fault_of("deterministic", diffopt.HiddenStateError, "keeps a state, `held.average`")
def averaged() -> tuple[Any, ...]:
    held = Average()
    return lambda w: held(w), w()


# --------------------------------------------------------------------------- second derivatives

WEIGHT_NORM = r"off finite differences, most in params\['parametrizations.weight.*weight_norm"
MATH = r"flash_attention.*sdpa_kernel\(\[SDPBackend.MATH\]\)"
ONCE = "once_differentiable.*write the function's backward"


@fault_of("second derivative", diffopt.WrongDerivativeError, WEIGHT_NORM)
def weight_normed() -> tuple[Any, ...]:
    return normed(utils.parametrizations.weight_norm)


fault_of("second derivative", diffopt.MissingDerivativeError, MATH)(attention)


@fault("second derivative", diffopt.MissingDerivativeError, r"multi_margin.*FirstOrder\(\)")
def multi_margin(w: Tensor) -> Tensor:
    return F.multi_margin_loss(w.view(2, 2), torch.tensor([0, 1]))


@fault("second derivative", diffopt.WrongDerivativeError, "off finite differences, most in params")
def half_detached(w: Tensor) -> Tensor:
    return w.pow(3).sum() * w.detach().sum()


@fault("second derivative", diffopt.WrongDerivativeError, "100% off")
def once_only(w: Tensor) -> Tensor:
    return OnceOnly.apply(w).sum()


@fault("second derivative", diffopt.MissingDerivativeError, ONCE)
def once_only_and_more(w: Tensor) -> Tensor:
    return OnceOnly.apply(w).square().sum()


@fault("second derivative", diffopt.WrongDerivativeError, r"most in args\[0\]", w(), w().requires_grad_())
def argument_cut_off(w: Tensor, a: Tensor) -> Tensor:
    return (w * a).sum() ** 2 + (w * a.detach()).sum() ** 3


@fault("second derivative", diffopt.NonFiniteGradientError, "norms or logarithms at zero", torch.zeros(3))
def norm_at_zero(w: Tensor) -> Tensor:
    return w.norm() + (w - 1).square().sum()


# --------------------------------------------------------------------------- what differs, or fails, under vmap

OFF = "under vmap the (loss|gradient of params) is .* off that of a loop, expected the same numbers"


@fault("safe under vmap", diffopt.VmapError, OFF)
def other_numbers_in_batches(w: Tensor) -> Tensor:
    return w.square().sum() * (1.0 + torch._C._functorch.is_batchedtensor(w))


@fault("safe under vmap", diffopt.VmapError, "data-dependent.*torch.where")
def branch(w: Tensor) -> Tensor:
    return w.sum() ** 2 if w.sum() > 0 else w.sum() ** 4


@fault("safe under vmap", diffopt.VmapError, "dynamic shape.*torch.where")
def mask(w: Tensor) -> Tensor:
    return w[w > 0].sum() ** 2


@fault_of("safe under vmap", diffopt.VmapError, "Batching rule not implemented.*loop over the tasks")
def gru() -> tuple[Any, ...]:
    return of_module(nn.GRU(3, 2), numbers(4, 2, 3), lambda out: out[0])


def weight_norm(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """By its formula, which autograd differentiates right."""
    return (x @ (p["g"] * p["v"] / p["v"].norm(dim=1, keepdim=True)).T).square().mean()


def of_network(module: nn.Module, distance: Any, inputs: Tensor, targets: Tensor) -> tuple[Any, ...]:
    apply, params = functional(module)
    return lambda p, x, y: distance(apply(p, x), y), params, inputs, targets


FIT: dict[str, Callable[[], tuple[Any, ...]]] = {
    "square": lambda: (lambda w: w.square().sum(), w()),
    "linear": lambda: (lambda w: w.sum(), w()),
    "float32": lambda: (lambda w: w.square().sum(), numbers(4)),
    "half": lambda: (lambda w: w.square().sum(), numbers(4).half()),
    "mixed": lambda: (lambda p: p[0].square().sum() + p[1].square().sum(), [numbers(2), numbers(2).double()]),
    "arguments_of_every_kind": lambda: (
        lambda w, a, n: (w - a[n]).pow(4).sum(),
        w(),
        {"x": (2 * w() + 1).requires_grad_()},
        "x",
    ),
    "relu": lambda: of_network(MLP((1, 9, 9, 1)), F.mse_loss, numbers(5, 1), numbers(5, 1).sin()),
    "convolutions": lambda: of_network(Conv4(1, 3, 4, 16), F.cross_entropy, numbers(6, 1, 16, 16), torch.arange(6) % 3),
    "weight_norm": lambda: (weight_norm, {"v": numbers(2, 3), "g": numbers(2, 1)}, numbers(5, 3)),
    "constants_in_single": lambda: (lambda c: (lambda w: (c @ w).square().sum(), numbers(4)))(numbers(3, 4)),
    "frozen_module": lambda: (lambda m: (lambda w: m(w).square().sum(), numbers(3)))(
        nn.Linear(3, 2).requires_grad_(False)
    ),
    "layer_norm": lambda: of_module(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), numbers(5, 3), lambda x: x[0]),
    "batch_norm": lambda: of_module(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)), numbers(5, 3), lambda x: x[0]
    ),
}
