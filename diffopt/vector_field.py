"""Vector fields that are made of something else: of a map with a fixed point, of the losses of a game."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffopt.errors import DisconnectedError, LossError, StructureError
from diffopt.rollout.field import VectorField as VectorField
from diffopt.rollout.field import leaves_like_params
from diffopt.tensors import derivatives, transforms, tree
from diffopt.tensors.arguments import check_function
from diffopt.tensors.torch_errors import signature_error


def fixed_point(m: Callable[..., Any]) -> VectorField:
    r"""The field :math:`z - m(z, *args)`, which is zero where ``m`` has a fixed point.

    In :func:`diffopt.implicit` it gives the derivative of a fixed point that was found by any means: of a deep
    equilibrium, of a proximal or projected step (and so of a solution with constraints or kinks), of an iteration of
    your own. In :func:`diffopt.solve`, ``SGD(lr)`` takes damped steps ``z + lr * (m(z) - z)``; with ``lr=1`` they are
    the iteration itself.

    .. math:: \frac{dz^\star}{d\theta} = \Big(I - \frac{\partial m}{\partial z}\Big)^{-1}
              \frac{\partial m}{\partial\theta}

    Args:
        m: ``m(z, *args)``, with ``batches`` ``m(z, *args, batch)``; returns a tree like ``z``.

    Raises:
        LossError: ``m`` is not a function; and, where it is evaluated:
        StructureError, ShapeError, DtypeError, DeviceError: it does not return a tree like ``z``.

    Example:
        Newton's iteration for a square root, ``z <- (z + a / z) / 2``. The derivative is ``1 / (2 sqrt(a))``.

        >>> import torch, diffopt
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> root = diffopt.fixed_point(lambda z, a: (z + a / z) / 2)
        >>> z = diffopt.implicit(root, torch.tensor(2.0), a)
        >>> torch.autograd.grad(z, a)
        (tensor(0.2500),)

    Reference: Bai, Kolter and Koltun (2019), "Deep Equilibrium Models", theorem 1. Derivations (6.1) and (6.6).
    """
    check_function("m", m, "a function m(z, *args)", LossError)
    return VectorField(_Residual(m))


@final
@dataclass(frozen=True)
class _Residual:
    """``z - m(z)``."""

    m: Callable[..., Any]

    def __call__(self, z: Any, *args: Any) -> Any:
        leaves, structure = tree.flatten(z)
        moved = leaves_like_params(self.m(z, *args), leaves, structure, "the map", "m")
        return tree.unflatten(structure, [x - y for x, y in zip(leaves, moved, strict=True)])


def game(*losses: Callable[..., Tensor]) -> VectorField:
    r"""The field of a game: every player descends a loss of its own, in its own entry of ``params``.

    .. math:: v(x_1, \dots, x_n) = \Big(\frac{\partial\ell_1}{\partial x_1}, \dots,
              \frac{\partial\ell_n}{\partial x_n}\Big)

    All players step at the same time. (For players that take turns, write one :func:`diffopt.solve` after the other.)
    The gradients are differentiable, also by what the other players do: an ``x.detach()`` in a loss would cut the
    game's hypergradient off there. Right for every layer, batch norm under vmap included.

    Args:
        losses: one for each player, called as ``loss(params, *args)``, with ``batches``
            ``loss(params, *args, batch)``, with all players' params, a tuple; each returns a floating scalar.

    Raises:
        LossError: there is no loss, or one is not a function; and, where it is evaluated, not one floating scalar.
        StructureError: ``params`` is not a tuple with one entry for each player.
        DisconnectedError: a player's loss does not depend on its own entry.

    Example:
        ``x`` minimises ``x**2 / 2 + x * y``, ``y`` maximises the latter with a cost ``y**2 / 2`` of its own.

        >>> import torch, diffopt
        >>> field = diffopt.game(
        ...     lambda xy, a: (xy[0] ** 2 / 2 + xy[0] * (xy[1] - a)).sum(),
        ...     lambda xy, a: (xy[1] ** 2 / 2 - xy[0] * xy[1]).sum(),
        ... )
        >>> a = torch.tensor(2.0, requires_grad=True)
        >>> x, y = diffopt.implicit(field, (torch.tensor(1.0), torch.tensor(1.0)), a)
        >>> torch.autograd.grad(x, a)  # the equilibrium is x = y = a / 2
        (tensor(0.5000),)
    """
    if not losses:
        raise LossError("game() was given no loss", "one for each player", "game(loss_of_first, loss_of_second)")
    for number, loss in enumerate(losses):
        check_function(f"game: loss {number}", loss, "a function loss(params, *args)", LossError)
    return VectorField(_Partials(losses))


@final
@dataclass(frozen=True)
class _Partials:
    """The gradient of each loss in its own entry."""

    losses: tuple[Callable[..., Tensor], ...]

    def __call__(self, params: Any, *args: Any) -> Any:
        players = len(self.losses)
        if not isinstance(params, tuple | list) or len(params) != players:
            raise StructureError(
                f"params of a game is {tree.describe(params)}",
                f"a tuple of {players}, one entry for each player",
                "pass solve(game(...), (params_of_first, params_of_second), ...)",
            )
        leaves, structure = tree.flatten((params, args))
        slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        sizes = [len(tree.flatten(entry)[0]) for entry in params]

        def loss_of(player: int, *tensors: Tensor) -> Tensor:
            given = list(leaves)
            for i, tensor in zip(slots, tensors, strict=True):
                given[i] = tensor
            return _scalar(self._called(player, _unpacked(tree.unflatten(structure, given))), player)

        found: list[Tensor] = []
        for player, size in enumerate(sizes):
            own = range(len(found), len(found) + size)
            gradient = _Gradient(partial(loss_of, player), own, sum(sizes), player)
            found += gradient.of([leaves[i] for i in slots])
        return tree.unflatten(tree.flatten(params)[1], found)

    def _called(self, player: int, given: tuple[Any, ...]) -> Any:
        """What a player's loss returns; one that does not take what it is given is named."""
        try:
            return self.losses[player](*given)
        except TypeError as error:
            expected = "a function loss(params, *args[, batch]) of all players' params"
            wrong = signature_error(error, f"player {player}'s loss", self.losses[player], len(given), expected)
            if wrong is None:
                raise
            raise wrong from error


def _unpacked(given: Any) -> tuple[Any, ...]:
    params, args = given
    return (params, *args)


def _scalar(loss: Any, player: int) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        raise LossError(
            f"the loss of player {player} returned {tree.describe(loss)}",
            "one floating scalar tensor",
            "sum it",
        )
    return loss


def _joined(param: Tensor, gradient: Tensor | None) -> Tensor:
    """A gradient, joined to what it is the gradient in: that of a linear loss has no graph, and need not have one."""
    if gradient is None:
        return 0 * param
    return gradient if gradient.requires_grad else gradient + 0 * param


class _Level(NamedTuple):
    """A vmap that has been left: which tensors it batches, its number of tasks, what it says of random numbers."""

    dims: tuple[int | None, ...]
    size: int
    randomness: str


@final
@dataclass(frozen=True)
class _Gradient:
    """The gradient of one player's loss, differentiable.

    # NOTE [a partial gradient is taken below vmap]
    A loss runs under the vmaps of a batch of tasks, where ``torch.autograd.grad`` does not, and where the derivative of
    ``torch.func.grad`` is silently wrong for batch norm. So the vmaps are left, the loss is vmapped anew, and its sum
    over all tasks is differentiated outside.

    Attributes:
        loss: of all tensors that the game is given.
        own: which of them are this player's.
        players: how many of them are params, which come first.
        number: the player's, for messages.
        levels: the vmaps that have been left, innermost first.
    """

    loss: Callable[..., Tensor]
    own: range
    players: int
    number: int
    levels: tuple[_Level, ...] = ()

    def of(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradient at these tensors."""
        vmap = transforms.innermost_vmap()
        if vmap is not None and transforms.are_batched(tensors):
            return transforms.below_vmap(self._below, vmap, tensors)
        function = self.loss
        if self.levels:
            dims, sizes, modes = zip(*self.levels, strict=True)
            function = transforms.vmap(self.loss, dims, sizes, modes)
        params, own = list(tensors), [tensors[i] for i in self.own]

        def of_own(*leaves: Tensor) -> Tensor:
            params[self.own.start : self.own.stop] = leaves
            return function(*params)

        if vmap is None and transforms.transforms_active():
            found, _ = transforms.functional_gradient(lambda *leaves: (of_own(*leaves),), tuple(own))
        else:
            found = self._recorded(of_own, own)
        if all(x is None for x in found):
            raise DisconnectedError(
                f"the loss of player {self.number} does not depend on its own params, params[{self.number}]",
                "a gradient for every player",
                "check the order of the losses: the first is that of params[0]",
            )
        return tuple([_joined(x, g) for x, g in zip(own, found, strict=True)])

    def _recorded(self, function: Callable[..., Tensor], own: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            roots = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in own]
            losses = function(*roots)
            if transforms.is_wrapped(losses):
                raise transforms.WrappedTensorError
            return derivatives.gradient(losses, roots, differentiable=True)

    def _below(self, vmap: transforms.Vmap, dims: tuple[int | None, ...], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The same outside the innermost vmap, where every task has params of its own."""
        stacked, new = transforms.stacked(tensors, dims, vmap.batch_size, set(range(self.players)))
        level = _Level(new, vmap.batch_size, vmap.randomness)
        return _Gradient(self.loss, self.own, self.players, self.number, (*self.levels, level)).of(stacked)
