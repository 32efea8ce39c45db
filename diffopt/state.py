"""``State``: where an inner optimizer stands, to look at and to go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor

from diffopt.errors import OptimizerError
from diffopt.lifting import live, live_writing
from diffopt.optimizers.base import Optimizer
from diffopt.tensors import tree
from diffopt.tensors.arguments import check_integer

Params = TypeVar("Params")


@final
@dataclass(frozen=True, eq=False)
class State(Generic[Params]):
    """Where an inner optimizer stands: what its next step starts from.

    :func:`diffopt.solve` takes one in place of ``params`` and goes on from it exactly: ``a + b`` steps are ``a`` steps
    and then ``b`` from the state after them, values and hypergradients. It unpacks as ``params, buffers``, and is a
    branch of any tree, whose leaves are its tensors: it can be returned from ``vmap`` and given to another call.

    Attributes:
        params: the parameters, a tree of floating tensors.
        buffers: the optimizer's buffers by name: trees like ``params``, or tuples of tensors.
        step: how many updates led here, an integer; Adam's bias correction and a :class:`diffopt.Schedule` count on
            from it. To a transform it is a constant.
    """

    params: Params
    buffers: dict[str, Any]
    step: int = 0

    def __post_init__(self) -> None:
        """Refuse a ``step`` that is no count."""
        if type(self.step) is not int or self.step < 0:
            object.__setattr__(self, "step", check_integer("State: step", self.step, 0))

    def __iter__(self) -> Iterator[Any]:
        """``params, buffers``, which it unpacks as."""
        return iter((self.params, self.buffers))

    def detach(self) -> State[Params]:
        """The same numbers without their history: hypergradients end here, as in truncated back-propagation."""
        return self._map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> State[Params]:
        """The same on another device or in another precision: what ``Tensor.to`` takes, for every tensor."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def _map(self, function: Callable[[Tensor], Tensor]) -> State[Params]:
        leaves, structure = tree.flatten(self)
        mapped: State[Params] = tree.unflatten(structure, [function(x) if isinstance(x, Tensor) else x for x in leaves])
        return mapped

    def state_dict(self) -> dict[str, Any]:
        """Its three parts by name, detached: for ``torch.save``.

        ``torch.load(..., weights_only=True)`` reads it where ``params`` is made of dicts, lists, tuples and tensors.
        """
        state = self.detach()
        return {"params": state.params, "buffers": state.buffers, "step": state.step}

    @staticmethod
    def from_state_dict(state_dict: Mapping[str, Any]) -> State[Any]:
        """The state that :meth:`state_dict` was taken of.

        Raises:
            OptimizerError: it is no such dictionary.
        """
        found = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else tree.describe(state_dict)
        if found != ["buffers", "params", "step"] or not isinstance(state_dict["buffers"], Mapping):
            raise OptimizerError(
                f"State.from_state_dict got {found}",
                "a dict with 'params', 'buffers' and 'step'",
                "it reads what State.state_dict makes",
            )
        return State(state_dict["params"], dict(state_dict["buffers"]), state_dict["step"])

    def into(self, torch_optimizer: torch.optim.Optimizer, params: Any = None) -> None:
        """Write this state, in place, into a live ``torch.optim`` optimizer and its parameters, which go on from it.

        Numbers are cast to the dtype and device of the optimizer's own. The buffers must be those that it keeps with
        its options, by name: a state of ``SGD`` with momentum is refused by ``Adam``. Names do not tell a plain
        ``RMSprop`` (a mean of squares) from ``Adagrad`` (their sum): which of the two a state is of you must know. Of a
        lifted class whose number of steps is not in ``state[p]["step"]`` this number is not written.

        Args:
            torch_optimizer: SGD, Adam, AdamW, RMSprop, Adagrad; or a subclass or a class that was lifted, after its
                first step.
            params: its parameters as a tree like ``self.params``; ``None``: in the order in which they are there, which
                is looked up by name if the optimizer knows names, and must agree in every shape.

        Raises:
            OptimizerError, StructureError, ShapeError: the optimizer has other parameters, or keeps other buffers;
                nothing is written then.
        """
        live_writing.write(self.params, self.buffers, self.step, torch_optimizer, params)


def state_of(torch_optimizer: torch.optim.Optimizer, params: Params, like: Optimizer | None = None) -> State[Params]:
    """The state of a live ``torch.optim`` optimizer, for inner steps that go on where training stands.

    The tensors are copies without history. ``SGD`` does not count its steps: ``step`` is then 1 if it has made any,
    which is all that :class:`diffopt.SGD` asks (with a :class:`diffopt.Schedule` give the number by
    ``dataclasses.replace(state, step=...)``).

    Args:
        torch_optimizer: SGD, Adam, AdamW, RMSprop, Adagrad; or any class, with ``like``.
        params: its parameters (the objects that it holds, or some of them) as the tree that the inner loss takes.
        like: the diffopt optimizer that is to go on, whose buffers' names count, as
            ``diffopt.from_torch(torch.optim.NAdam)``.

    Raises:
        OptimizerError: it is no ``torch.optim`` optimizer, does not hold ``params``, has taken different numbers of
            steps on them, or keeps other state than ``like``.

    Example:
        >>> import torch, diffopt
        >>> w = torch.ones(2, requires_grad=True)
        >>> training = torch.optim.Adam([w], lr=0.1)
        >>> w.square().sum().backward()
        >>> training.step()
        >>> state = diffopt.state_of(training, {"w": w})
        >>> state.step, sorted(state.buffers)
        (1, ['mean', 'square'])
        >>> ahead = diffopt.solve(lambda p: p["w"].square().sum(), state, optimizer=diffopt.Adam(0.1), steps=1)
        >>> ahead.state.step
        2
    """
    return State(*live.read(torch_optimizer, params, like))


def _made(step: int, children: Iterable[Any]) -> State[Any]:
    params, buffers = children
    return State(params, buffers, step)


tree.register_branch(State, lambda state: ((state.params, state.buffers), state.step), _made)
