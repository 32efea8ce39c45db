"""Small networks for few-shot learning, and the step from a module to a function of its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffopt.tasks.errors import ProblemError
from diffopt.tasks.layers import BatchStatisticsNorm2d, convolution, linear
from diffopt.tensors.arguments import check_generator, check_integer
from diffopt.tensors.tree import describe

Params: TypeAlias = dict[str, Tensor]


def functional(module: nn.Module) -> tuple[Callable[[Params, Tensor], Tensor], Params]:
    """A module as a pure function, and the parameters to start it from.

    ``apply(params, inputs)`` calls the module with exactly these parameters: a missing or unknown name raises
    :class:`ProblemError`. A weight that is tied to another appears in ``params`` once, under its first
    name, and moves both.

    The module's own parameters are neither read nor changed by ``apply``. Its buffers are copied now, and
    each call reads a fresh copy: what a layer writes into them (running statistics) is dropped, and under
    ``torch.func.vmap`` raises. Use layers without running statistics, such as :class:`BatchStatisticsNorm2d`.

    Returns:
        ``apply``, and ``params``: each parameter's name with a detached copy that requires grad.

    Example:
        >>> import torch
        >>> apply, params = functional(torch.nn.Linear(2, 1))
        >>> sorted(params)
        ['bias', 'weight']
        >>> params = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}
        >>> apply(params, torch.tensor([[1.0, 1.0]]))
        tensor([[6.]])
    """
    if not isinstance(module, nn.Module):
        raise ProblemError(f"module is {describe(module)}; expected a torch.nn.Module, made: Linear(2, 1), not Linear")
    named = module.named_parameters()
    params = {name: parameter.detach().clone().requires_grad_() for name, parameter in named}
    if not params:
        raise ProblemError(f"{type(module).__name__} has no parameters; expected one or more to optimise")
    names = frozenset(params)
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    # NOTE [tied weights under a strict call]
    # named_parameters gives each tied weight once, under its first name, and functional_call fills in its
    # other names (tie_weights is on by default) before it checks that none is missing. With all names, as
    # state_dict gives them, it would raise. Buffers have to be passed too: a strict call misses them
    # otherwise.
    def apply(params: Params, inputs: Tensor) -> Tensor:
        if not isinstance(params, Mapping) or params.keys() != names:
            raise ProblemError(_other_names(params, names))
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        output: Tensor = functional_call(module, (params, fresh), (inputs,), strict=True)
        return output

    return apply, params


def _other_names(params: Any, names: frozenset[str]) -> str:
    if not isinstance(params, Mapping):
        return f"params is {describe(params)}; expected a dictionary from name to tensor, such as functional() returns"
    odd = [f"params[{name!r}] is missing" for name in sorted(names - params.keys())]
    odd += [f"params[{name!r}] is unknown" for name in sorted(params.keys() - names)]
    return f"{', '.join(odd[:2])}; expected the {len(names)} names that functional() returned: {sorted(names)[:2]} ..."


@final
class MLP(nn.Module):
    """Linear layers with an activation between them, none after the last.

    Args:
        sizes: of the input, each hidden layer and the output, such as ``(1, 40, 40, 1)``.
        activation: an elementwise function; one that is twice differentiable (``torch.tanh``) where second
            derivatives are compared with finite differences.
        generator: draws the initial weights from torch's default distribution; by default torch's global one.

    Raises:
        ProblemError: fewer than two sizes, or one below 1.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Callable[[Tensor], Tensor] = torch.relu,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build the layers and draw their weights."""
        super().__init__()
        if not isinstance(sizes, Sequence) or len(sizes) < 2:
            raise ProblemError(f"sizes is {describe(sizes)}; expected two or more integers, such as (1, 40, 1)")
        sizes = [check_integer(f"sizes[{i}]", size, 1, kind=ProblemError) for i, size in enumerate(sizes)]
        if not callable(activation):
            raise ProblemError(f"activation is {describe(activation)}; expected a function, such as torch.tanh")
        if generator is not None:
            check_generator("generator", generator, ProblemError)
        self.activation = activation
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList(linear(inputs, outputs, generator) for inputs, outputs in pairs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``[..., sizes[0]]`` to ``[..., sizes[-1]]``."""
        hidden = inputs
        for layer in self.layers[:-1]:
            hidden = self.activation(layer(hidden))
        outputs: Tensor = self.layers[-1](hidden)
        return outputs


@final
class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, normalisation, ReLU and 2x2 max-pooling; then a linear layer.

    The normalisation is :class:`BatchStatisticsNorm2d`.

    The convolutions have no bias: the normalisation that follows would subtract it again, leaving directions
    in which the loss is flat. Through the statistics the examples of one batch influence each other's logits
    (transductive prediction).

    Reference: Vinyals et al. (2016), "Matching Networks for One Shot Learning", section 4.1.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        way: number of classes.
        filters: channels of every block.
        image_size: height and width of the images, 16 or more.
        generator: draws the initial weights from torch's default distribution; by default torch's global one.

    Raises:
        ProblemError: a size is too small.
    """

    def __init__(
        self,
        in_channels: int,
        way: int,
        filters: int = 64,
        image_size: int = 28,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build the blocks and draw their weights."""
        super().__init__()
        counts = {"in_channels": in_channels, "way": way, "filters": filters}
        in_channels, way, filters = (check_integer(name, x, 1, kind=ProblemError) for name, x in counts.items())
        image_size = check_integer("image_size (halved four times)", image_size, 16, kind=ProblemError)
        if generator is not None:
            check_generator("generator", generator, ProblemError)
        inputs = (in_channels, filters, filters, filters)
        blocks = [_block(channels, filters, generator) for channels in inputs]
        self.features = nn.Sequential(*blocks, nn.Flatten())
        self.head = linear(filters * (image_size // 16) ** 2, way, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[examples, in_channels, image_size, image_size]`` to logits ``[examples, way]``."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


def _block(in_channels: int, filters: int, generator: torch.Generator | None) -> nn.Sequential:
    """Convolution, normalisation, ReLU, pooling: half the height and width, rounded down."""
    layer = convolution(in_channels, filters, 3, generator)
    return nn.Sequential(layer, BatchStatisticsNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2))
