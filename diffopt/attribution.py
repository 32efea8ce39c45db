"""``attribute``: how much every training example moves what is measured at the end of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import DisconnectedError, GradModeError, LeafError, LossError
from diffopt.rollout.refusals import refuse_non_finite
from diffopt.tensors import transforms
from diffopt.tensors.arguments import check_function, check_measured
from diffopt.tensors.leaves import all_finite
from diffopt.tensors.torch_errors import forward_mode_error
from diffopt.tensors.tree import describe


def attribute(train: Callable[[Tensor], Any], metric: Callable[[Any], Tensor], weights: Tensor) -> Tensor:
    r"""The derivative of what is measured of a trained model with respect to the weights it was trained with.

    .. math:: a_{ji} = \frac{\partial M_j(s_{T+1}(w))}{\partial w_i}

    With ``w_i`` the weight of example (group, token) ``i`` in the inner loss and ``w = 1``, ``-a_i`` predicts how the
    metric changes when ``i`` is left out. One exact hypergradient (or as exact as the estimator in ``train``), not one
    training for each example; for many metrics the steps of a large solve by ``Reverse`` or ``Truncated`` are taken
    again once for all, and small ones are pulled back as one batch of problems, with the memory of so many.

    Args:
        train: ``train(weights)``, usually a :func:`diffopt.solve` whose loss gets ``weights`` through its arguments;
            returns whatever ``metric`` takes.
        metric: ``metric(trained)``, a scalar, or a vector ``[m]`` such as one loss for each test example.
        weights: a floating tensor of any shape, usually ``torch.ones(n)``; it is left as it is.

    Returns:
        A tensor of shape ``metric.shape + weights.shape``, detached.

    Raises:
        LeafError: ``weights`` is no floating tensor, or is empty.
        LossError: ``train`` or ``metric`` is no function, or the metric is no floating scalar or vector.
        DisconnectedError: the metric does not depend on ``weights``.
        NonFiniteGradientError: the derivative is not finite.
        GradModeError: called under a ``torch.func`` transform or in ``torch.inference_mode``.

    Example:
        The mean of two numbers, trained to the minimum of ``sum w_i (p - x_i)**2 / 2``: ``(x_i - mean) / 2``.

        >>> import torch, diffopt
        >>> x = torch.tensor([1.0, 3.0])
        >>> def train(weights):
        ...     def loss(p, weights):
        ...         return (weights * (p - x) ** 2).sum() / 2
        ...     sgd = diffopt.SGD(0.25)
        ...     return diffopt.solve(loss, torch.tensor(0.0), weights, optimizer=sgd, steps=40).params
        >>> diffopt.attribute(train, lambda p: p, torch.ones(2))
        tensor([-0.5000,  0.5000])
    """
    check_function("attribute: train", train, "a function train(weights)", LossError)
    check_function("attribute: metric", metric, "a function of what train returns", LossError)
    _refuse_mode()
    if not isinstance(weights, Tensor) or not weights.is_floating_point() or weights.numel() == 0:
        raise LeafError(f"attribute: weights is {describe(weights)}", "a floating tensor", "write torch.ones(n)")
    if transforms.has_tangent([weights]):
        raise forward_mode_error("attribute: weights")
    root = weights.detach().clone().requires_grad_()
    with torch.enable_grad():
        measured = check_measured("attribute: metric", metric(train(root)))
    if not measured.requires_grad:
        raise _disconnected()
    result = _rows(measured, root)
    if not all_finite([result]):
        refuse_non_finite(())
    return result.detach()


def _refuse_mode() -> None:
    if transforms.transforms_active() or torch.is_inference_mode_enabled():
        raise GradModeError(
            "attribute was called under a torch.func transform, or in torch.inference_mode",
            "plain code",
            "it differentiates by itself; call it outside",
        )


def _rows(measured: Tensor, root: Tensor) -> Tensor:
    """The derivative of every number of ``measured``, in one backward pass if torch can."""
    if measured.numel() == 1:
        (found,) = torch.autograd.grad(measured.sum(), root, allow_unused=True)
        return _connected(found).reshape((*measured.shape, *root.shape))
    basis = torch.eye(len(measured), dtype=measured.dtype, device=measured.device)
    try:
        (found,) = torch.autograd.grad(
            measured, root, basis, is_grads_batched=True, allow_unused=True, retain_graph=True
        )
    except RuntimeError:  # something that cannot be batched; what else is wrong is raised again
        rows = [torch.autograd.grad(measured, root, row, allow_unused=True, retain_graph=True)[0] for row in basis]
        return torch.stack([_connected(row) for row in rows])
    return _connected(found)


def _connected(found: Tensor | None) -> Tensor:
    if found is None:
        raise _disconnected()
    return found


def _disconnected() -> DisconnectedError:
    return DisconnectedError(
        "attribute: the metric does not depend on weights",
        "a derivative",
        "pass weights in the *args of solve, use them in its loss, and measure solution.params without detaching them",
    )
