"""Bad inputs: missing second derivatives, gradients and states that are not finite, random numbers, vmap."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from bad_row import Row, backward, solve, square, tensor
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt.estimators import Binomial, Implicit, Krylov, Reverse, Unrolled


def attention(w: Tensor) -> Tensor:
    q = w.float().view(1, 1, 2, 1)
    return F.scaled_dot_product_attention(q, q, q).square().sum()


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return 2 * cotangents[0] * ctx.saved_tensors[0]


def embedding_bag(w: Tensor) -> Tensor:
    return F.embedding_bag(torch.tensor([[0, 1]]), w.view(2, 1)).square().sum()


CHANGED = r"step 1 came out differently .*expected the same number; .*reads what changed since the solve"


ENDED = iter([])


def changed_since(name: str, value: Any) -> None:
    """Rebind something that the loss reads between the solve and the backward pass."""
    held = {"scale": 1.0, "net": nn.Dropout(0.5) if name == "net" else nn.Identity()}

    def loss(w: Tensor) -> Tensor:
        return (held["net"](w) * held["scale"]).square().sum()

    backward(lambda w: held.update({name: value}) or square(w), loss, estimator=Reverse(3))


def spectral_norm() -> Any:
    """A loss that takes one step of the power iteration at every call."""
    torch.manual_seed(0)
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)).double().requires_grad_(False)
    net.parametrizations.weight[0]._v.copy_(tensor(1, 0))  # from where it has some way to go
    return lambda w: net(w).square().sum()


class Slot:
    """Holds a module where nobody finds it."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def hidden_checkpoint() -> Any:
    """A loss whose checkpoint, when it recomputes, reads other weights than those that it was given."""
    slot = Slot(nn.Linear(2, 1, bias=False).double())

    def loss(w: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(slot.module, {"weight": w[None]}):
            return checkpoint(lambda x: slot.module(x).tanh(), tensor(1, 2), use_reentrant=False).square().sum()

    return loss


GENERATOR = torch.Generator().manual_seed(0)
NUMPY = np.random.default_rng(0)
SECOND = "has no second derivative .*expected operations that can be differentiated twice; "


def with_tangent() -> None:
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore")  # torch's own
        solve(square, torch.autograd.forward_ad.make_dual(tensor(1, 2), tensor(1, 1)))


ROWS: dict[str, Row] = {
    "nan_in_a_later_batch": Row(
        "divergence",
        lambda: solve(lambda w, b: (w * b["x"]).sum(), batches={"x": tensor(1, 1, float("nan"))}),
        diffopt.DivergenceError,
        "loss of step 3 of 3 is not finite, expected finite numbers; .* is not finite itself",
        "batches['x'] at step 3",
    ),
    "nan_learning_rate": Row(
        "divergence",
        lambda: solve(optimizer=diffopt.SGD(torch.tensor(float("nan")))),
        diffopt.DivergenceError,
        "step 1 of 3 .*expected finite numbers; a hyperparameter of SGD is not finite itself",
    ),
    "divergence": Row(
        "divergence",
        lambda: solve(lambda w: w.pow(4).sum(), optimizer=diffopt.SGD(1e3), steps=20),
        diffopt.DivergenceError,
        r"diverged: the (loss of|state after) step [0-9]+ of 20 is not finite, .*check the learning rate, or clip",
    ),
    "divergence_vmap": Row(
        "divergence",
        lambda: vmap(partial(solve, lambda w: w.pow(4).sum(), optimizer=diffopt.SGD(1e3), steps=20))(torch.eye(2)),
        diffopt.DivergenceError,
        r"diverged: the (loss of|state after) step [0-9]+ of 20 is not finite",
    ),
    "gradient_of_outer": Row(
        "gradient",
        lambda: backward(lambda w: (0 * w).sqrt()),
        diffopt.NonFiniteGradientError,
        "NaN or infinite, expected finite numbers. .* is not finite itself: check that loss. Check for roots",
    ),
    "gradient_of_inner": Row(
        "gradient",
        lambda: backward(loss=lambda w: w.abs().pow(1.5).sum(), start=tensor(0, 1)),
        diffopt.NonFiniteGradientError,
        "is finite. Check for roots, norms or logarithms at zero",
    ),
    "attention": Row(
        "second derivative",
        lambda: backward(loss=attention),
        diffopt.MissingDerivativeError,
        SECOND + r"run it under diffopt.nn.second_order_attention\(\) or sdpa_kernel\(\[SDPBackend.MATH\]\)",
        "flash_attention",
    ),
    "ctc": Row(
        "second derivative",
        lambda: backward(
            loss=lambda w: F.ctc_loss(w.view(2, 1, 1).expand(2, 1, 2).log_softmax(-1), torch.tensor([[1]]), (2,), (1,))
        ),
        diffopt.MissingDerivativeError,
        SECOND + r"write it in elementary operations, or use FirstOrder\(\) or ESJacobian",
        "_ctc_loss_backward",
    ),
    "multi_margin_states": Row(
        "second derivative",
        lambda: backward(loss=lambda w: F.multi_margin_loss(w[None], torch.tensor([0])), estimator=Reverse(1)),
        diffopt.MissingDerivativeError,
        SECOND,
        "multi_margin_loss_backward",
    ),
    "multi_margin_unrolled": Row(
        "second derivative",
        lambda: backward(loss=lambda w: F.multi_margin_loss(w[None], torch.tensor([0])), estimator=Unrolled()),
        diffopt.MissingDerivativeError,
        SECOND,
        "multi_margin_loss_backward",
    ),
    "embedding_bag": Row(
        "second derivative",
        lambda: backward(loss=embedding_bag),
        diffopt.MissingDerivativeError,
        SECOND,
        "_embedding_bag_backward",
    ),
    "once_differentiable": Row(
        "second derivative",
        lambda: backward(loss=lambda w: OnceOnly.apply(w).square().sum()),
        diffopt.MissingDerivativeError,
        SECOND + "write the function's backward in differentiable operations",
        "once_differentiable",
    ),
    "reentrant_checkpoint": Row(
        "second derivative",
        lambda: backward(loss=lambda w: checkpoint(torch.sin, w, use_reentrant=True).sum()),
        diffopt.MissingDerivativeError,
        SECOND + "pass use_reentrant=False",
        "use_reentrant",
    ),
    "differentiated_twice": Row(
        "second derivative",
        lambda: grad(lambda w: grad(lambda w: solve(lambda w: w.pow(4).sum(), w).sum())(w).sum())(tensor(1, 2) / 9),
        diffopt.SecondDerivativeError,
        r"differentiated again, expected once; .*first derivatives only; use estimator=diffopt.estimators.Unrolled\(\)",
    ),
    "forward_mode_outside": Row(
        "second derivative",
        with_tangent,
        diffopt.MissingDerivativeError,
        "carries a tangent of forward-mode differentiation, expected none; .*Use backward",
    ),
    "forward_mode_of_functions": Row(
        "second derivative",
        lambda: jvp(partial(solve, square), (tensor(1, 2),), (tensor(1, 1),)),
        diffopt.MissingDerivativeError,
        "carries a tangent of forward-mode differentiation, expected none; .*Use backward",
    ),
    "branch_vmap": Row(
        "vmap",
        lambda: vmap(partial(solve, lambda w: w.sum() if w.sum() > 0 else -w.sum()))(torch.ones(2, 3)),
        diffopt.VmapError,
        r"cannot run under vmap \(.*data-dependent.*expected code that can; write torch.where",
    ),
    "item_vmap": Row(
        "vmap",
        lambda: vmap(partial(solve, lambda w: w.sum() * w[0].item()))(torch.ones(2, 3)),
        diffopt.VmapError,
        r"\.item\(\).*keep the value a tensor",
    ),
    "mask_vmap": Row(
        "vmap",
        lambda: vmap(partial(solve, lambda w: w[w > 0].sum()))(torch.ones(2, 3)),
        diffopt.VmapError,
        "dynamic shape.*torch.where for an index by a mask",
    ),
    "batch_norm_vmap": Row(
        "vmap",
        lambda: (lambda norm: vmap(partial(solve, lambda w: norm(w).sum()))(torch.ones(2, 3, 2)))(
            nn.BatchNorm1d(2, affine=False)
        ),
        diffopt.VmapError,
        "running_mean.*track_running_stats=False",
    ),
    "recurrent_vmap": Row(
        "vmap",
        lambda: (lambda net: vmap(partial(solve, lambda w: net(w)[0].sum()))(torch.ones(2, 3, 1, 2)))(
            nn.GRU(2, 2).requires_grad_(False)
        ),
        diffopt.VmapError,
        "Batching rule not implemented.*loop over the tasks",
        moves=True,
    ),
    "dropout_vmap": Row(
        "random numbers",
        lambda: vmap(partial(solve, lambda w: F.dropout(w).sum()))(torch.ones(2, 3)),
        diffopt.RandomnessError,
        "random numbers under vmap, expected none; say randomness='different'",
    ),
    "changed_since": Row(
        "random numbers",
        lambda: changed_since("scale", 2.0),
        diffopt.RandomnessError,
        CHANGED,
    ),
    "evaluated_since": Row(
        "random numbers",
        lambda: changed_since("net", nn.Dropout(0.5).eval()),
        diffopt.RandomnessError,
        CHANGED,
        moves=True,
    ),
    "own_generator": Row(
        "random numbers",
        lambda: backward(loss=lambda w: (w * torch.rand(2, generator=GENERATOR)).sum() ** 2, estimator=Reverse(1)),
        diffopt.RandomnessError,
        "draws from a generator of its own, expected torch's global one; .*Pass them in batches",
    ),
    "own_numpy_generator": Row(
        "random numbers",
        lambda: backward(loss=lambda w: (w.square() * float(NUMPY.random())).sum(), estimator=Reverse(1)),
        diffopt.RandomnessError,
        "loss of step . came out differently .*expected the same number; .*Draw from torch's global generator",
    ),
    "ended_iterator": Row(
        "computed again",
        lambda: solve(lambda w: (w * next(ENDED)).sum() ** 2),
        diffopt.HiddenStateError,
        "asks an iterator for more .*expected a loss that reads its arguments only; pass the data of all steps in",
    ),
    "spectral_norm": Row(
        "computed again",
        lambda: backward(lambda w: w.sum(), spectral_norm(), tensor(1, 2), estimator=Reverse(1)),
        diffopt.HiddenStateError,
        r"keeps a state, .*, that its evaluations move and read, expected the same .*Use Reverse\('graph'\)",
        "_u`",
        moves=True,
    ),
    "hidden_checkpoint": Row(
        "computed again",
        lambda: backward(lambda w: w.sum(), hidden_checkpoint(), tensor(1, 2)),
        diffopt.RecomputationError,
        "a checkpoint in the inner loss reads .* expected what its forward pass read.*Pass the weights to it",
        moves=True,
    ),
    **{
        f"dropout_{type(rule).__name__}": Row(
            "random numbers",
            partial(backward, loss=lambda w: F.dropout(w).square().sum(), estimator=rule, steps=9),
            diffopt.RandomnessError,
            "draws random numbers, expected .*use Reverse",
            moves=True,
        )
        for rule in (Binomial(1), Krylov(1), Implicit())
    },
    "jacobian_of_dropout": Row(
        "random numbers",
        lambda: torch.func.jacrev(partial(solve, lambda w: F.dropout(w).square().sum()))(torch.ones(9)),
        diffopt.RandomnessError,
        r"under a vmap that the solve did not run under \(jacrev\?\), expected the same",
        moves=True,
    ),
}
