"""Which layers can be differentiated twice, over tasks and over steps, on the torch that is installed.

``python docs/layer_table.py`` prints the table of the page "Which layers are safe"; the page itself runs this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffopt
from diffopt.estimators import Binomial, Reverse

STEPS = 2
AGREES = 1e-6  # two ways to one number in float64; a wrong derivative is off by percents


@dataclass(frozen=True)
class Case:
    """One layer in a small loss: a module, its input, and what to do where a column is not ok."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    mend: str = ""
    context: Callable[[], Any] = nullcontext
    integers: int = 0
    """Inputs are whole numbers below this, if it is not zero."""


@dataclass(frozen=True)
class Row:
    """What was measured of one case: ``"ok"``, a number in words, or the name of the error."""

    name: str
    twice: str
    tasks: str
    steps: str
    mend: str


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
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """``g cos x``."""
        return g * ctx.saved_tensors[0].cos()


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

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        return self.inner(x)[0]


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        return self.second(self.first(x).tanh())


def followed(*layers: Callable[[], nn.Module], first: Callable[[], nn.Module] = partial(nn.Linear, 6, 6)) -> Any:
    """A weight before the layers, so that what they do is differentiated."""
    return lambda: nn.Sequential(first(), *(make() for make in layers))


def conv() -> nn.Module:
    """The weight before what reads pictures."""
    return nn.Conv2d(2, 4, 3, padding=1)


def _branch(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y.sin() if y.sum() > 0 else y.cos()


def _masked(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y[y > 0].square().sum().reshape(1)


def _bag(x: Tensor, w: Tensor) -> Tensor:
    return F.embedding_bag(x, w).sin()


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
    Case("AdaptiveAvgPool2d, Upsample", followed(partial(nn.AdaptiveAvgPool2d, 3), partial(nn.Upsample, scale_factor=2), first=conv), PICTURES),  # noqa: E501
    Case("Embedding", lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh()), (5,), integers=7),
    Case("EmbeddingBag", lambda: Wrapped(_bag, 7, 4), (3, 2), "`FirstOrder()`, or `Embedding` and a mean", integers=7),
    Case("LayerNorm", followed(nn.Tanh, partial(nn.LayerNorm, 6)), VECTORS),
    Case("RMSNorm", followed(nn.Tanh, partial(nn.RMSNorm, 6)), VECTORS),
    Case("GroupNorm", followed(partial(nn.GroupNorm, 2, 4), nn.Tanh, first=conv), PICTURES),
    Case("InstanceNorm2d", followed(partial(nn.InstanceNorm2d, 4), nn.Tanh, first=conv), PICTURES),
    Case("BatchNorm2d, batch statistics", followed(partial(nn.BatchNorm2d, 4, track_running_stats=False), nn.Tanh, first=conv), PICTURES),  # noqa: E501
    Case("BatchNorm2d, running statistics, training", followed(partial(nn.BatchNorm2d, 4), nn.Tanh, first=conv), PICTURES, "`track_running_stats=False`, or `GroupNorm`"),  # noqa: E501
    Case("BatchNorm2d, running statistics, `.eval()`", lambda: followed(partial(nn.BatchNorm2d, 4), nn.Tanh, first=conv)().eval(), PICTURES),  # noqa: E501
    Case("Dropout", followed(nn.Dropout, nn.Tanh), VECTORS, "tasks: `vmap(..., randomness=\"different\")`; steps: draw masks outside and pass them in `batches`"),  # noqa: E501
    Case("scaled_dot_product_attention", lambda: Attention(False), SEQUENCES, KERNEL),
    Case("the same, `SDPBackend.MATH`", lambda: Attention(False), SEQUENCES, context=MATH),
    Case("MultiheadAttention, `need_weights=True`", lambda: Attention(True), SEQUENCES),
    Case("TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), SEQUENCES, KERNEL),  # noqa: E501
    Case("the same, `SDPBackend.MATH`", lambda: nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), SEQUENCES, context=MATH),  # noqa: E501
    Case("RNN", lambda: Recurrent(nn.RNN), (2, 3, 4), RECURRENT),
    Case("LSTM", lambda: Recurrent(nn.LSTM), (2, 3, 4), RECURRENT),
    Case("GRU", lambda: Recurrent(nn.GRU), (2, 3, 4), RECURRENT),
    Case("tied weights", Tied, (5, 4)),
    Case("weight_norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), VECTORS, "write `g * v / v.norm(dim=1, keepdim=True)` in the loss"),  # noqa: E501
    Case("weight norm, written out", lambda: Wrapped(lambda x, v: x @ (v / v.norm(dim=0, keepdim=True)), 6, 4), VECTORS),  # noqa: E501
    Case("spectral_norm, training", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), VECTORS, "its power iteration writes buffers; call `.eval()`"),  # noqa: E501
    Case("spectral_norm, `.eval()`", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)).eval(), VECTORS),
    Case("orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)), VECTORS),
    Case("mse_loss", lambda: Wrapped(lambda x, w: F.mse_loss((x @ w).tanh(), x), 6, 6), VECTORS),
    Case("cross_entropy", lambda: Wrapped(lambda x, w: F.cross_entropy(x @ w, x.softmax(1)), 6, 6), VECTORS),
    Case("huber_loss, smooth_l1_loss", lambda: Wrapped(lambda x, w: F.huber_loss(x @ w, x) + F.smooth_l1_loss(x @ w, -x), 6, 6), VECTORS),  # noqa: E501
    Case("cdist", lambda: Wrapped(lambda x, w: torch.cdist(x, w), 4, 6), VECTORS, "`(x[:, None] - y).square().sum(-1).sqrt()`"),  # noqa: E501
    Case("ctc_loss", lambda: Wrapped(_ctc, 6, 5), (4, 2, 6), "`FirstOrder()`"),
    Case("multi_margin_loss", lambda: Wrapped(lambda x, w: F.multi_margin_loss(x @ w, torch.tensor([0, 1, 2, 3, 0])), 6, 4), VECTORS, "write the margin with `clamp`"),  # noqa: E501
    Case("grid_sample", lambda: Wrapped(lambda x, w: F.grid_sample(w, x.tanh()), 3, 2, 5, 5), (3, 4, 4, 2)),
    Case("linalg.solve, cholesky, slogdet", lambda: Wrapped(_linalg, 6, 4), VECTORS),
    Case("linalg.norm of zero", lambda: Wrapped(lambda x, w: (0 * x @ w).norm(dim=1), 6, 4), VECTORS, "`(x.square().sum() + 1e-12).sqrt()`"),  # noqa: E501
    Case("`if` on a tensor's value", lambda: Wrapped(_branch, 6, 4), VECTORS, "`torch.where`, which takes both branches"),
    Case("`y[y > 0]`", lambda: Wrapped(_masked, 6, 4), VECTORS, "`torch.where(y > 0, y, 0)`"),
    Case("an autograd.Function without second derivative", lambda: Wrapped(lambda x, w: OwnBackward.apply(x @ w), 6, 4), VECTORS, "make its backward of torch operations, with `setup_context` and `generate_vmap_rule = True`"),  # noqa: E501
]  # fmt: skip


def _ctc(x: Tensor, w: Tensor) -> Tensor:
    lengths = torch.full((2,), 4), torch.full((2,), 2)
    return F.ctc_loss((x @ w).log_softmax(-1), torch.tensor([[1, 2], [2, 3]]), *lengths).reshape(1)


def _linalg(x: Tensor, w: Tensor) -> Tensor:
    gram = w.T @ w + torch.eye(4, dtype=w.dtype)
    return torch.linalg.solve(gram, (x @ w).T) + torch.linalg.cholesky(gram).sum() + torch.linalg.slogdet(gram)[1]


@dataclass(frozen=True)
class Problem:
    """The case as an inner problem: a loss of the parameters and an input, for two tasks."""

    loss: Callable[..., Tensor]
    params: dict[str, Tensor]
    inputs: Tensor

    def outer(self, estimator: Any, params: dict[str, Tensor], x: Tensor) -> Tensor:
        """The loss elsewhere after a few steps of gradient descent."""
        sgd = diffopt.SGD(0.1)
        found = diffopt.solve(self.loss, params, x, optimizer=sgd, steps=STEPS, estimator=estimator).params
        return sum((leaf.sin().sum() for leaf in found.values()), torch.zeros((), dtype=torch.float64))


def problem(case: Case) -> Problem:
    """Build a case, the same at every call."""
    torch.manual_seed(0)
    module = case.make().double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases start at zero, where something may vanish
    params = {name: p.detach() for name, p in module.named_parameters()}
    shape = (2, *case.shape)
    inputs = torch.randint(case.integers, shape) if case.integers else torch.randn(shape).double()

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        with case.context():
            y = functional_call(module, params, (x,))
            return (y - 0.3).square().mean() + y.sin().mean()

    return Problem(loss, params, inputs)


def _outcome(work: Callable[[], str]) -> str:
    try:
        return work()
    except diffopt.DiffoptError as error:
        return f"`{type(error).__name__}`"


def _agreement(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """``"ok"``, or how far apart two trees of derivatives are."""
    pairs = [(found[name], expected[name]) for name in expected]
    error = max(float((a - b).norm() / (b.norm() + 1e-300)) for a, b in pairs)
    return "ok" if error < AGREES else f"**wrong: {error:.0%}**"


def measure(case: Case) -> Row:
    """The three columns of one case."""
    p = problem(case)
    finding = diffopt.check(p.loss, p.params, p.inputs[0], vmap=False)["second derivative"]
    if isinstance(finding.error, diffopt.WrongDerivativeError):
        return Row(case.name, *["**wrong**"] * 3, case.mend)  # batched, it is as wrong as it is alone

    def over_tasks() -> str:
        one = grad(partial(p.outer, Reverse(1)))
        single = [one(p.params, x) for x in p.inputs]
        batched = vmap(one, in_dims=(None, 0))(p.params, p.inputs)
        return _agreement(batched, {name: torch.stack([g[name] for g in single]) for name in batched})

    def over_steps() -> str:
        together, alone = (
            grad(partial(p.outer, rule))(p.params, p.inputs[0]) for rule in (Binomial(1), Binomial(1, chunk_size=1))
        )
        return _agreement(together, alone)

    twice = {"ok": "ok", "FAIL": f"`{type(finding.error).__name__}`"}.get(finding.outcome, "not comparable")
    found = Row(case.name, twice, _outcome(over_tasks), _outcome(over_steps), case.mend)
    return replace(found, mend="") if _columns(found)[1:] == ("ok",) * 3 else found


def _columns(row: Row) -> tuple[str, str, str, str]:
    return row.name, row.twice, row.tasks, row.steps


def rows() -> Iterator[Row]:
    """Every case, measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on what it does not batch well or finds old
        yield from map(measure, CASES)


def markdown() -> str:
    """The table."""
    lines = ["| layer | second derivative | many tasks | many steps at once | mend |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join((*_columns(row), row.mend))} |" for row in rows())])


if __name__ == "__main__":
    print(f"torch {torch.__version__}\n\n{markdown()}")
