"""The layers of the page "Which layers are safe", each in a form small enough to be measured in a moment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Case:
    """One layer in a small loss: a module, its input, and what to do where a column is not ok."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fix: str = ""
    context: Callable[[], Any] = nullcontext
    integers: int = 0
    """Inputs are whole numbers below this, if it is not zero."""


class Wrapped(nn.Module):
    """A module of one weight around a function of ``(input, weight)``."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape) / 2), function

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.function(x, self.weight)


class OwnBackward(torch.autograd.Function):
    """A sine whose backward is not differentiable, as many a hand-written one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """``sin x``."""
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        """The cosine times the cotangent."""
        return cotangents[0] * ctx.saved_tensors[0].cos()


class Attention(nn.Module):
    """Multi-head attention of a sequence with itself."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.inner, self.need_weights = nn.MultiheadAttention(8, 2, batch_first=True), need_weights

    def forward(self, x: Tensor) -> Tensor:
        """Without the weights, unless they are computed anyway."""
        return self.inner(x, x, x, need_weights=self.need_weights)[0]


class Recurrent(nn.Module):
    """The outputs of a recurrent layer, without its states."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.inner = kind(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        return self.inner(x)[0]


class Looped(nn.Module):
    """A recurrent cell run over a sequence by a loop."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.inner = kind(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """The last output."""
        state: Any = None
        for entry in x.unbind(1):
            state = self.inner(entry, state)
        return state[0] if isinstance(state, tuple) else state


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        return self.second(self.first(x).tanh())


def dense() -> nn.Module:
    """The weight before what reads vectors."""
    return nn.Linear(6, 6)


def conv() -> nn.Module:
    """The weight before what reads pictures."""
    return nn.Conv2d(2, 4, 3, padding=1)


def followed(*layers: Callable[[], nn.Module], first: Callable[[], nn.Module] = dense) -> Callable[[], nn.Module]:
    """A weight before the layers, so that what they do is differentiated."""
    return lambda: nn.Sequential(first(), *(make() for make in layers))


def _branch(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y.sin() if y.sum() > 0 else y.cos()


def _masked(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y[y > 0].square().sum().reshape(1)


def _bag(x: Tensor, w: Tensor) -> Tensor:
    return F.embedding_bag(x, w).sin()


def _ctc(x: Tensor, w: Tensor) -> Tensor:
    lengths = torch.full((2,), 4), torch.full((2,), 2)
    return F.ctc_loss((x @ w).log_softmax(-1), torch.tensor([[1, 2], [2, 3]]), *lengths).reshape(1)


def _linalg(x: Tensor, w: Tensor) -> Tensor:
    gram = w.T @ w + torch.eye(4, dtype=w.dtype)
    return torch.linalg.solve(gram, (x @ w).T) + torch.linalg.cholesky(gram).sum() + torch.linalg.slogdet(gram)[1]


MATH = partial(sdpa_kernel, [SDPBackend.MATH])
RECURRENT = "loop over the tasks; on a GPU also `torch.backends.cudnn.flags(enabled=False)`"
KERNEL = "run under `sdpa_kernel([SDPBackend.MATH])`"
PICTURES, VECTORS, SEQUENCES = (3, 2, 6, 6), (5, 6), (2, 4, 8)

CASES = [
    Case("Linear, Tanh", followed(nn.Tanh), VECTORS),
    Case("ReLU, GELU, SiLU, Softplus", followed(nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus), VECTORS),
    Case("Softmax, LogSoftmax", followed(partial(nn.Softmax, -1), partial(nn.LogSoftmax, -1)), VECTORS),
    Case("Bilinear", lambda: Wrapped(lambda x, w: F.bilinear(x, x, w), 3, 6, 6), VECTORS),
    Case("Conv2d", followed(nn.Tanh, partial(nn.Conv2d, 4, 2, 3), first=conv), PICTURES),
    Case("ConvTranspose2d", followed(nn.Tanh, partial(nn.ConvTranspose2d, 4, 2, 3), first=conv), PICTURES),
    Case("MaxPool2d, AvgPool2d", followed(partial(nn.MaxPool2d, 2), partial(nn.AvgPool2d, 3), first=conv), PICTURES),
    Case(
        "AdaptiveAvgPool2d, Upsample",
        followed(partial(nn.AdaptiveAvgPool2d, 3), partial(nn.Upsample, scale_factor=2), first=conv),
        PICTURES,
    ),
    Case("Embedding", lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh()), (5,), integers=7),
    Case("EmbeddingBag", lambda: Wrapped(_bag, 7, 4), (3, 2), "`FirstOrder()`, or `Embedding` and a mean", integers=7),
    Case("LayerNorm", followed(nn.Tanh, partial(nn.LayerNorm, 6)), VECTORS),
    Case("RMSNorm", followed(nn.Tanh, partial(nn.RMSNorm, 6)), VECTORS),
    Case("GroupNorm", followed(partial(nn.GroupNorm, 2, 4), nn.Tanh, first=conv), PICTURES),
    Case("InstanceNorm2d", followed(partial(nn.InstanceNorm2d, 4), nn.Tanh, first=conv), PICTURES),
    Case(
        "BatchNorm2d, batch statistics",
        followed(partial(nn.BatchNorm2d, 4, track_running_stats=False), nn.Tanh, first=conv),
        PICTURES,
    ),
    Case(
        "BatchNorm2d, running statistics, training",
        followed(partial(nn.BatchNorm2d, 4), nn.Tanh, first=conv),
        PICTURES,
        "`track_running_stats=False`, or `GroupNorm`",
    ),
    Case(
        "BatchNorm2d, running statistics, `.eval()`",
        lambda: followed(partial(nn.BatchNorm2d, 4), nn.Tanh, first=conv)().eval(),
        PICTURES,
    ),
    Case(
        "Dropout",
        followed(nn.Dropout, nn.Tanh),
        VECTORS,
        'tasks: `vmap(..., randomness="different")`; steps: draw masks outside and pass them in `batches`',
    ),
    Case("scaled_dot_product_attention", lambda: Attention(False), SEQUENCES, KERNEL),
    Case("scaled_dot_product_attention, `SDPBackend.MATH`", lambda: Attention(False), SEQUENCES, context=MATH),
    Case("MultiheadAttention, `need_weights=True`", lambda: Attention(True), SEQUENCES),
    Case(
        "TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), SEQUENCES, KERNEL
    ),
    Case(
        "TransformerEncoderLayer, `SDPBackend.MATH`",
        lambda: nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True),
        SEQUENCES,
        context=MATH,
    ),
    Case("RNN", lambda: Recurrent(nn.RNN), (2, 3, 4), RECURRENT),
    Case("LSTM", lambda: Recurrent(nn.LSTM), (2, 3, 4), RECURRENT),
    Case("GRU", lambda: Recurrent(nn.GRU), (2, 3, 4), f"`GRUCell`; or {RECURRENT}"),
    Case("LSTMCell, in a loop", lambda: Looped(nn.LSTMCell), (2, 3, 4), "write its gates; or loop over the tasks"),
    Case("GRUCell, in a loop", lambda: Looped(nn.GRUCell), (2, 3, 4)),
    Case("tied weights", Tied, (5, 4)),
    Case(
        "weight_norm",
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
        VECTORS,
        "write `g * v / v.norm(dim=1, keepdim=True)` in the loss",
    ),
    Case(
        "weight norm, written out", lambda: Wrapped(lambda x, v: x @ (v / v.norm(dim=0, keepdim=True)), 6, 4), VECTORS
    ),
    Case(
        "spectral_norm, training",
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)),
        VECTORS,
        "its power iteration writes buffers; call `.eval()`",
    ),
    Case("spectral_norm, `.eval()`", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)).eval(), VECTORS),
    Case("orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)), VECTORS),
    Case("mse_loss", lambda: Wrapped(lambda x, w: F.mse_loss((x @ w).tanh(), x), 6, 6), VECTORS),
    Case("cross_entropy", lambda: Wrapped(lambda x, w: F.cross_entropy(x @ w, x.softmax(1)), 6, 6), VECTORS),
    Case(
        "huber_loss, smooth_l1_loss",
        lambda: Wrapped(lambda x, w: F.huber_loss(x @ w, x) + F.smooth_l1_loss(x @ w, -x), 6, 6),
        VECTORS,
    ),
    Case(
        "cdist",
        lambda: Wrapped(lambda x, w: torch.cdist(x, w), 4, 6),
        VECTORS,
        "`(x[:, None] - y).square().sum(-1).sqrt()`",
    ),
    Case("ctc_loss", lambda: Wrapped(_ctc, 6, 5), (4, 2, 6), "`FirstOrder()`"),
    Case(
        "multi_margin_loss",
        lambda: Wrapped(lambda x, w: F.multi_margin_loss(x @ w, torch.tensor([0, 1, 2, 3, 0])), 6, 4),
        VECTORS,
        "write the margin with `clamp`",
    ),
    Case("grid_sample", lambda: Wrapped(lambda x, w: F.grid_sample(w, x.tanh()), 3, 2, 5, 5), (3, 4, 4, 2)),
    Case("linalg.solve, cholesky, slogdet", lambda: Wrapped(_linalg, 6, 4), VECTORS),
    Case(
        "linalg.norm of zero",
        lambda: Wrapped(lambda x, w: (0 * x @ w).norm(dim=1), 6, 4),
        VECTORS,
        "`(x.square().sum() + 1e-12).sqrt()`",
    ),
    Case(
        "`if` on a tensor's value", lambda: Wrapped(_branch, 6, 4), VECTORS, "`torch.where`, which takes both branches"
    ),
    Case("`y[y > 0]`", lambda: Wrapped(_masked, 6, 4), VECTORS, "`torch.where(y > 0, y, 0)`"),
    Case(
        "an autograd.Function without second derivative",
        lambda: Wrapped(lambda x, w: OwnBackward.apply(x @ w), 6, 4),
        VECTORS,
        "make its backward of torch operations, with `setup_context` and `generate_vmap_rule = True`",
    ),
]
