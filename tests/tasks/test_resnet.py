"""ResNet-12 against its definition, its published size, a loop over tasks and finite differences."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error
from torch import nn
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from diffopt.tasks import ProblemError, ResNet12, functional

SMALL = (2, 3, 3, 4)


def small(generator, way=3):
    """A network of few filters in float64, scales and shifts away from one and zero, as a function of its params."""
    apply, params = functional(ResNet12(2, way, SMALL, generator=generator).double())
    return apply, {
        name: value.detach() + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in params.items()
    }


def test_it_is_its_definition(generator):
    apply, params = small(generator)
    images = torch.randn(5, 2, 35, 50, generator=generator, dtype=torch.float64)

    def normal(x, name):
        mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), correction=0, keepdim=True)
        scale, shift = (params[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def convolved(x, name):
        kernel = params[f"{name}.weight"]
        size = kernel.shape[-1]
        patches = nn.functional.unfold(x, size, padding=size // 2)
        return (kernel.flatten(1) @ patches).unflatten(2, x.shape[2:])

    def leaky(x):
        return torch.where(x > 0, x, 0.1 * x)

    hidden = images
    for block in range(4):
        name = f"blocks.{block}"
        inner = hidden
        for place in (0, 3, 6):
            inner = normal(convolved(inner, f"{name}.residual.{place}"), f"{name}.residual.{place + 1}")
            inner = leaky(inner) if place < 6 else inner
        shortcut = normal(convolved(hidden, f"{name}.shortcut.0"), f"{name}.shortcut.1")
        hidden = leaky(inner + shortcut)
        height, width = 2 * (hidden.shape[2] // 2), 2 * (hidden.shape[3] // 2)
        hidden = hidden[:, :, :height, :width].unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax(dim=(3, 5))
    expected = hidden.mean(dim=(2, 3)) @ params["head.weight"].T + params["head.bias"]
    torch.testing.assert_close(apply(params, images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("filters", "published"),
    [
        ((64, 160, 320, 640), 12_424_320),  # the extractor of MetaOptNet; "12 M" in the papers that use it
        ((64, 128, 256, 512), 7_996_800),  # the narrower one of TADAM; "8 M"
    ],
)
def test_the_number_of_parameters_is_the_published_one(filters, published):
    module = ResNet12(3, 5, filters)
    counts = {name: value.numel() for name, value in module.named_parameters()}
    head = counts.pop("head.weight") + counts.pop("head.bias")
    assert sum(counts.values()) == published
    assert head == 5 * (filters[-1] + 1)
    convolutions = [one for one in module.modules() if isinstance(one, nn.Conv2d)]
    assert sorted(one.kernel_size[0] for one in convolutions) == [1] * 4 + [3] * 12, "twelve layers and four shortcuts"
    assert list(module.buffers()) == []


@pytest.mark.parametrize(("height", "width", "channels"), [(84, 84, 3), (32, 32, 3), (28, 28, 1), (16, 17, 3)])
def test_shapes(height, width, channels, generator):
    module = ResNet12(channels, 5, (4, 6, 8, 10), generator=generator)
    images = torch.randn(3, channels, height, width, generator=generator)
    assert module(images).shape == (3, 5)
    features = module.blocks(images)
    assert features.shape == (3, 10, height // 16, width // 16)


def test_a_full_network_runs_forward_and_backward(generator):
    module = ResNet12(3, 5, generator=generator)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    cross_entropy(module(images), torch.tensor([0, 4])).backward()
    for name, value in module.named_parameters():
        assert value.grad.isfinite().all(), name
        assert value.grad.abs().max() > 0, name


def test_weights_are_drawn_as_published_and_from_the_generator(generator):
    state = torch.get_rng_state()
    first, again = (ResNet12(3, 2, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), again.parameters(), strict=True))
    for layer in first.modules():
        if isinstance(layer, nn.Conv2d):
            filters, _, size, _ = layer.weight.shape
            expected = (2 / (filters * size**2)) ** 0.5
            spread = 5 / (2 * layer.weight.numel()) ** 0.5  # five standard deviations of a standard deviation
            assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=spread)


@pytest.fixture
def tasks(generator):
    """Two tasks of four images, each with params and a direction of its own."""
    apply, params = small(generator)

    def loss(params, images, labels):
        return cross_entropy(apply(params, images), labels)

    stacked = {name: torch.stack([value, 1.1 * value]) for name, value in params.items()}
    images = torch.randn(2, 4, 2, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, 0], [2, 1, 1, 0]])
    vectors = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in stacked.items()}
    return loss, stacked, images, labels, vectors


def product(loss, params, images, labels, vectors):
    """The Hessian of one task's loss times a vector, by autograd twice and no transform."""
    own = {name: value.detach().requires_grad_() for name, value in params.items()}
    gradients = torch.autograd.grad(loss(own, images, labels), list(own.values()), create_graph=True)
    inner = sum((g * v).sum() for g, v in zip(gradients, vectors.values(), strict=True))
    return torch.autograd.grad(inner, list(own.values()))


def one_task(values, task):
    return {name: value[task] for name, value in values.items()}


def test_vmap_over_tasks_is_a_loop_over_them(tasks):
    loss, params, images, labels, vectors = tasks

    def inner(params, vectors, images, labels):
        gradients = grad(loss)(params, images, labels)
        return sum((gradients[name] * vectors[name]).sum() for name in gradients)

    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    forward = vmap(loss)(leaves, images, labels)
    first = torch.autograd.grad(forward.sum(), list(leaves.values()), create_graph=True)
    paired = sum((g * v).sum() for g, v in zip(first, vectors.values(), strict=True))
    by_autograd = torch.autograd.grad(paired, list(leaves.values()))
    by_transforms = vmap(grad(inner))(params, vectors, images, labels)
    for task in range(2):
        own = (one_task(params, task), images[task], labels[task])
        torch.testing.assert_close(forward[task], loss(*own), rtol=1e-12, atol=0)
        expected = product(loss, *own, one_task(vectors, task))
        assert relative_error([one[task] for one in by_autograd], expected) < 1e-9  # rounding through twelve norms
        assert relative_error([one[task] for one in by_transforms.values()], expected) < 1e-9


def test_second_derivatives_are_finite_differences(tasks):
    loss, params, images, labels, vectors = tasks
    start, direction = one_task(params, 0), one_task(vectors, 0)
    step = 1e-6  # no leaky ReLU and no maximum changes sides within it, or the error would be of order one
    sides = []
    for sign in (-1, 1):
        moved = {name: (value + sign * step * direction[name]).requires_grad_() for name, value in start.items()}
        sides.append(torch.autograd.grad(loss(moved, images[0], labels[0]), list(moved.values())))
    expected = [(after - before) / (2 * step) for before, after in zip(*sides, strict=True)]
    # Truncation about step^2 times a third derivative, rounding 1e-16 / step times the size of gradients.
    assert relative_error(product(loss, start, images[0], labels[0], direction), expected) < 1e-6


def test_errors_name_the_fault(generator):
    with pytest.raises(ProblemError, match=r"way 0, filters \(64, 160, 320, 640\), expected 1 or more of each"):
        ResNet12(3, 0)
    with pytest.raises(ProblemError, match=r"filters \(4, 4, 4\), .* four numbers of filters"):
        ResNet12(3, 5, (4, 4, 4))
    with pytest.raises(ProblemError, match=r"filters .*0.*, expected 1 or more"):
        ResNet12(3, 5, (4, 4, 0, 4))
    with pytest.raises(ProblemError, match="images are 16x15, expected 16 pixels or more each way"):
        ResNet12(3, 5, SMALL, generator=generator)(torch.zeros(2, 3, 16, 15))
