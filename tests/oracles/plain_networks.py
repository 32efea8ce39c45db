"""The layers of convolutional networks written out, and second derivatives task by task."""

from __future__ import annotations

import torch
from torch import nn


def shaken(params, generator):
    """Parameters in float64, away from the start's zeros and ones."""
    return {
        name: (x.double() + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).detach()
        for name, x in params.items()
    }


def pooled(x, how):
    """The ``how`` of each 2x2, what is left over at the edges passed over."""
    height, width = (2 * (size // 2) for size in x.shape[2:])
    return how(x[:, :, :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)), (3, 5))


def normalised(params, x, name, place):
    """The convolution at ``place`` of ``name``, and the normalisation behind it."""
    kernel, scale, shift = (
        params[f"{name}.{key}"] for key in (f"{place}.weight", f"{place + 1}.weight", f"{place + 1}.bias")
    )
    patches = nn.functional.unfold(x, kernel.shape[-1], padding=kernel.shape[-1] // 2)
    x = (kernel.flatten(1) @ patches).unflatten(2, x.shape[2:])
    mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]


def residual(params, x, name, layers, activation):
    """A residual block: its layers, and the shortcut, projected where there are parameters for it."""
    inner = x
    for layer in range(layers):
        inner = normalised(params, activation(inner) if layer else inner, f"{name}.residual", 3 * layer)
    projected = f"{name}.shortcut.0.weight" in params
    return activation(inner + (normalised(params, x, f"{name}.shortcut", 0) if projected else x))


def headed(params, features):
    """The linear layer on features ``[examples, channels]``."""
    return features @ params["head.weight"].T + params["head.bias"]


def products(gradients, tensors, vectors):
    """Hessian-vector products: the derivative of <gradients, vectors> by the tensors."""
    inner = sum((gradients[name] * vectors[name]).sum() for name in gradients)
    return dict(zip(tensors, torch.autograd.grad(inner, list(tensors.values())), strict=True))


def looped(loss, params, batch, vectors):
    """Hessian-vector products task by task, autograd twice and no vmap."""
    found = []
    for task, data in enumerate(zip(*batch, strict=True)):
        own = {name: value[task].detach().requires_grad_() for name, value in params.items()}
        values = torch.autograd.grad(loss(own, *data), list(own.values()), create_graph=True)
        vector = {name: value[task] for name, value in vectors.items()}
        found.append(products(dict(zip(own, values, strict=True)), own, vector))
    return {name: torch.stack([one[name] for one in found]) for name in params}


def assert_same(found, expected, tolerance):
    """Leaf by leaf, relative to its largest entry."""
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-3)
        assert error < tolerance, f"{name} is off by {float(error):.1e}"
