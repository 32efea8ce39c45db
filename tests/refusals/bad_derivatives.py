"""Bad inputs: missing second derivatives, gradients and states that are not finite, random numbers, vmap."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from bad_row import Refused, backward, product, solve, square, tensor
from check_cases import OnceOnly, Slot
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt import SGD, DivergenceError, HiddenStateError, MissingDerivativeError, RandomnessError, VmapError
from diffopt.estimators import Binomial, Implicit, Krylov, Reverse, Unrolled

refused = Refused("derivative")


def quartic(w: Tensor) -> Tensor:
    return w.pow(4).sum()


# --------------------------------------------------------------------------- numbers that are not finite

NAN_BATCH = "loss of step 3 of 3 is not finite, expected finite numbers; .* is not finite itself"
NAN_OUTER = "NaN or infinite, expected finite numbers. .* is not finite itself: check that loss. Check for roots"
NAN_RATE = "step 1 of 3 .*expected finite numbers; a hyperparameter of SGD is not finite itself"
DIVERGED = r"diverged: the (loss of|state after) step [0-9]+ of 20 is not finite, .*check the learning rate, or clip"


@refused(DivergenceError, NAN_BATCH, path="batches['x'] at step 3")
def nan_in_a_later_batch() -> None:
    solve(lambda w, b: product(w, b["x"]), batches={"x": tensor(1, 1, float("nan"))})


@refused(DivergenceError, NAN_RATE)
def nan_learning_rate() -> None:
    solve(optimizer=SGD(torch.tensor(float("nan"))))


@refused(DivergenceError, DIVERGED)
def divergence() -> None:
    solve(quartic, optimizer=SGD(1e3), steps=20)


@refused(DivergenceError, DIVERGED)
def divergence_vmap() -> None:
    vmap(partial(solve, quartic, optimizer=SGD(1e3), steps=20))(torch.eye(2))


@refused(diffopt.NonFiniteGradientError, NAN_OUTER)
def gradient_of_outer() -> None:
    backward(lambda w: (0 * w).sqrt())


@refused(diffopt.NonFiniteGradientError, "is finite. Check for roots, norms or logarithms at zero")
def gradient_of_inner() -> None:
    backward(loss=lambda w: w.abs().pow(1.5).sum(), start=tensor(0, 1))


# --------------------------------------------------------------------------- missing second derivatives

SECOND = "has no second derivative .*expected operations that can be differentiated twice; "
MATH = r"run it under diffopt.nn.second_order_attention\(\) or sdpa_kernel\(\[SDPBackend.MATH\]\)"
ELEMENTARY = r"write it in elementary operations, or use FirstOrder\(\) or ESJacobian"
AGAIN = r"differentiated again, expected once; .*first derivatives only; use estimator=diffopt.estimators.Unrolled\(\)"
TANGENT = "carries a tangent of forward-mode differentiation, expected none; .*Use backward"


@refused(MissingDerivativeError, SECOND + MATH, path="flash_attention")
def attention() -> None:
    def loss(w: Tensor) -> Tensor:
        q = w.float().view(1, 1, 2, 1)
        return F.scaled_dot_product_attention(q, q, q).square().sum()

    backward(loss=loss)


@refused(MissingDerivativeError, SECOND + ELEMENTARY, path="_ctc_loss_backward")
def ctc() -> None:
    def loss(w: Tensor) -> Tensor:
        log_probabilities = w.view(2, 1, 1).expand(2, 1, 2).log_softmax(-1)
        return F.ctc_loss(log_probabilities, torch.tensor([[1]]), (2,), (1,))

    backward(loss=loss)


@refused(MissingDerivativeError, SECOND, Reverse(1), path="multi_margin_loss_backward")
@refused(MissingDerivativeError, SECOND, Unrolled(), path="multi_margin_loss_backward")
def multi_margin(estimator: Any) -> None:
    backward(loss=lambda w: F.multi_margin_loss(w[None], torch.tensor([0])), estimator=estimator)


@refused(MissingDerivativeError, SECOND, path="_embedding_bag_backward")
def embedding_bag() -> None:
    backward(loss=lambda w: F.embedding_bag(torch.tensor([[0, 1]]), w.view(2, 1)).square().sum())


@refused(MissingDerivativeError, SECOND + "write the function's backward in", path="once_differentiable")
def once_differentiable() -> None:
    backward(loss=lambda w: OnceOnly.apply(w).square().sum())


@refused(MissingDerivativeError, SECOND + "pass use_reentrant=False", path="use_reentrant")
def reentrant_checkpoint() -> None:
    backward(loss=lambda w: checkpoint(torch.sin, w, use_reentrant=True).sum())


@refused(diffopt.SecondDerivativeError, AGAIN)
def differentiated_twice() -> None:
    def slope(w: Tensor) -> Tensor:
        return grad(lambda w: solve(quartic, w).sum())(w).sum()

    grad(slope)(tensor(1, 2) / 9)


@refused(MissingDerivativeError, TANGENT)
def forward_mode_outside() -> None:
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore")  # torch's own
        solve(square, torch.autograd.forward_ad.make_dual(tensor(1, 2), tensor(1, 1)))


@refused(MissingDerivativeError, TANGENT)
def forward_mode_of_functions() -> None:
    jvp(partial(solve, square), (tensor(1, 2),), (tensor(1, 1),))


# --------------------------------------------------------------------------- what cannot run under vmap


def branch(w: Tensor) -> Tensor:
    return w.sum() if w.sum() > 0 else -w.sum()


def item(w: Tensor) -> Tensor:
    return w.sum() * w[0].item()


def mask(w: Tensor) -> Tensor:
    return w[w > 0].sum()


def dropout(w: Tensor) -> Tensor:
    return F.dropout(w).square().sum()


NO_BRANCH = r"cannot run under vmap \(.*data-dependent.*expected code that can; write torch.where"
NO_NOISE = "random numbers under vmap, expected none; say randomness='different'"


@refused(VmapError, NO_BRANCH, branch)
@refused(VmapError, r"\.item\(\).*keep the value a tensor", item)
@refused(VmapError, "dynamic shape.*torch.where for an index by a mask", mask)
@refused(RandomnessError, NO_NOISE, dropout)
def vmapped(loss: Any) -> None:
    vmap(partial(solve, loss))(torch.ones(2, 3))


@refused(VmapError, "running_mean.*track_running_stats=False")
def vmapped_batch_norm() -> None:
    norm = nn.BatchNorm1d(2, affine=False)
    vmap(partial(solve, lambda w: norm(w).sum()))(torch.ones(2, 3, 2))


@refused(VmapError, "Batching rule not implemented.*loop over the tasks", moves=True)
def vmapped_recurrent_network() -> None:
    net = nn.GRU(2, 2).requires_grad_(False)
    vmap(partial(solve, lambda w: net(w)[0].sum()))(torch.ones(2, 3, 1, 2))


# --------------------------------------------------------------------------- what comes out differently again

CHANGED = r"step 1 came out differently .*expected the same number; .*reads what changed since the solve"
OWN_GENERATOR = "draws from a generator of its own, expected torch's global one; .*Pass them in batches"
OF_NUMPY = "loss of step . came out differently .*expected the same number; .*Draw from torch's global generator"
ENDED = "asks an iterator for more .*expected a loss that reads its arguments only; pass the data of all steps in"
MOVING = r"keeps a state, .*, that its evaluations move and read, expected the same .*Use Reverse\('graph'\)"
OTHER_WEIGHTS = "a checkpoint in the inner loss reads .* expected what its forward pass read.*Pass the weights to it"


@refused(RandomnessError, CHANGED, "scale", 2.0)
@refused(RandomnessError, CHANGED, "net", nn.Dropout(0.5).eval(), moves=True)
def changed_since(name: str, value: Any) -> None:
    """Something that the loss reads is rebound between the solve and the backward pass."""
    held = {"scale": 1.0, "net": nn.Dropout(0.5) if name == "net" else nn.Identity()}

    def loss(w: Tensor) -> Tensor:
        return (held["net"](w) * held["scale"]).square().sum()

    backward(lambda w: held.update({name: value}) or square(w), loss, estimator=Reverse(3))


@refused(RandomnessError, "draws random numbers, expected .*use Reverse", Binomial(1), moves=True)
@refused(RandomnessError, "draws random numbers, expected .*use Reverse", Krylov(1), moves=True)
@refused(RandomnessError, "draws random numbers, expected .*use Reverse", Implicit(), moves=True)
def dropout_of(estimator: Any) -> None:
    backward(loss=dropout, estimator=estimator, steps=9)


@refused(RandomnessError, r"a vmap that the solve did not run under \(jacrev\?\), expected the same", moves=True)
def jacobian_of_dropout() -> None:
    jacrev(partial(solve, dropout))(torch.ones(9))


@refused(RandomnessError, OWN_GENERATOR)
def own_generator() -> None:
    generator = torch.Generator().manual_seed(0)
    backward(loss=lambda w: product(w, torch.rand(2, generator=generator)) ** 2, estimator=Reverse(1))


@refused(RandomnessError, OF_NUMPY)
def own_numpy_generator() -> None:
    generator = np.random.default_rng(0)
    backward(loss=lambda w: square(w) * float(generator.random()), estimator=Reverse(1))


@refused(HiddenStateError, ENDED)
def ended_iterator() -> None:
    ended: Any = iter([])
    solve(lambda w: product(w, next(ended)) ** 2)


@refused(HiddenStateError, MOVING, path="_u`", moves=True)
def spectral_norm() -> None:
    """The loss takes one step of the power iteration at every call."""
    torch.manual_seed(0)
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)).double().requires_grad_(False)
    net.parametrizations.weight[0]._v.copy_(tensor(1, 0))  # from where it has some way to go
    backward(lambda w: w.sum(), lambda w: net(w).square().sum(), tensor(1, 2), estimator=Reverse(1))


@refused(diffopt.RecomputationError, OTHER_WEIGHTS, moves=True)
def hidden_checkpoint() -> None:
    """A checkpoint that, when it recomputes, reads other weights than those that it was given."""
    slot = Slot(nn.Linear(2, 1, bias=False).double())

    def loss(w: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(slot.module, {"weight": w[None]}):
            return checkpoint(lambda x: slot.module(x).tanh(), tensor(1, 2), use_reentrant=False).square().sum()

    backward(lambda w: w.sum(), loss, tensor(1, 2))
