"""The first step of a solve whose loss communicates: whether all ranks solve one problem, and solve it rightly.

# NOTE [which naive collectives are recognised]
(a) One in place, such as torch.distributed.all_reduce(loss), of which torch has no derivative. It says so in a warning
    when a gradient passes by, and in no other case: a copy that is averaged for a log does no harm.
(b) One of torch's own that is differentiable, whose backward pass sums over the ranks once more, if the loss behind it
    is the same on all of them. (If each has a loss of its own, with statistics of all data in it, that is right.)
(c) ``summed`` without ``copied``. Ranks that hold the same params and get the same loss need the same gradient. Losses
    that differ are each rank's own (tasks over ranks), params that differ are shards, as may be params that start equal
    and are summed in the midst of a model: nothing is said of these. The value of a vector field is the same on all
    ranks with or without ``copied``, so that a product with its Jacobian is compared as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from diffopt.distributed import groups, replicas
from diffopt.distributed.collectives import is_summed
from diffopt.distributed.sharded import refuse_wrong_means
from diffopt.errors import RanksError
from diffopt.rollout.field import entries_behind
from diffopt.rollout.ranks import reaches_a_sum
from diffopt.tensors import autograd_graph, derivatives
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.spread import is_spread
from diffopt.tensors.tasks import Tasks

_FIX = (
    "write summed(local_loss(copied(params), batch)), both of diffopt.distributed, with copied() around all that the "
    "ranks share"
)


@final
class FirstStep:
    """What is looked at while the ranks of this process's groups take a first step.

    Attributes:
        copied_to: the groups that share the solve: something is copied to them, and their params are the same.
        shards: whether each rank holds its own part of the params: they are summed over ranks without being copied.
        evaluates: whether a loss is being evaluated.
    """

    @staticmethod
    def here() -> FirstStep | None:
        """For this process; ``None`` if it is alone."""
        known = groups.groups_of_this_rank() if groups.is_running() else ()
        return FirstStep(known) if known else None

    def __init__(self, known: Sequence[groups.Group]) -> None:
        """Take note of how many collectives each of the groups that are known has been asked for."""
        self._before = {group: groups.collectives_so_far(group) for group in known}
        self._done = self._updated = self.evaluates = False
        self.copied_to: list[groups.Group] = []
        self.shards = False
        self._pulled: list[Tensor] = []
        self._sums = True

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluate a loss: what is copied in it is compared, the first time."""
        self.evaluates = True
        try:
            if self._done:
                yield
                return
            with replicas.watching(self.copied_to):
                yield
        finally:
            self.evaluates = False

    def gradient(self, losses: Tensor, params: Sequence[Tensor], *, differentiable: bool) -> tuple[Tensor | None, ...]:
        """A gradient; the first one is refused if it passes by a collective in place, or is not that of one problem."""
        if self._done:
            return derivatives.gradient(losses, params, differentiable=differentiable)
        self._done = True
        if is_spread(losses):
            refuse_wrong_means(losses)
        elif self._used():
            self._pulled = _pulled_through_field(losses, params)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            grads = derivatives.gradient(losses, params, differentiable=differentiable)
        for warning in heard:
            said = str(warning.message)
            if "c10d::" in said and "autograd kernel was not registered" in said:
                raise _in_place(said.partition("c10d::")[2].partition(":")[0].rstrip("_"))
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        self._refuse(losses, grads, params)
        return grads

    def _refuse(self, losses: Tensor, grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
        """Refuse a loss and gradients that cannot be those of one problem.

        (All decisions are made from what all ranks know, for they must go the same way.)
        """
        used = self._used()
        self._sums = any([is_summed(node) for node in autograd_graph.nodes([losses.grad_fn])])
        found = [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(grads, params, strict=True)]
        if not used or any(map(is_spread, (*params, losses))):
            return
        self.shards = reaches_a_sum(losses, params)
        for group in used:
            same = replicas.agree(params, group)
            if self._sums and not same:  # shards: what they share can be copied to them, and their states differ
                self.copied_to = [x for x in self.copied_to if x is not group]
            if not replicas.agree([losses], group):
                continue
            naive = _sums_twice(losses)
            if naive:
                raise _twice(naive, group)
            if not same:
                continue
            apart = max(replicas.deviations(found, group))
            alike = apart <= replicas.tolerance(found)
            if not alike and _sums_a_scalar(losses):
                raise _other_gradients(apart, group)
            if alike and self._pulled:  # (of shards the fields differ)
                apart = max(replicas.deviations(self._pulled, group))
                if apart > replicas.tolerance(self._pulled):
                    raise _other_gradients(apart, group, "vector field, but Jacobians")

    def _used(self) -> list[groups.Group]:
        """The groups that have communicated since."""
        return [group for group, count in self._before.items() if groups.collectives_so_far(group) != count]

    def compares_update(self) -> bool:
        """Whether the next update is the one to be compared, which it is once."""
        first, self._updated = not self._updated and bool(self.copied_to), True
        return first

    def refuse_other_updates(self, state: Sequence[Tensor]) -> None:
        """Refuse updates that lead from one state, by one gradient, to different ones."""
        for group in self.copied_to:
            apart = max(replicas.deviations(state, group))
            if apart > replicas.tolerance(state):
                raise RanksError(
                    f"the first update leads the ranks to states that differ by {apart:.1e} of their norm",
                    "one state on all ranks",
                    self._fix_of_updates(),
                )

    def _fix_of_updates(self) -> str:
        if not self._sums:
            return "of tasks of each rank, copy what they share outside: solve(loss, params, copied(penalty))"
        if self.shards:
            return f"{_FIX}; if params are shards that start equal, check=False"
        return "give all ranks the same optimizer: its numbers, a learned rate, the buffers of a State"


def _in_place(name: str) -> RanksError:
    return RanksError(
        f"the inner loss goes through {name}, a collective in place, of which torch has no derivative",
        "collectives that can be differentiated twice",
        f"{_FIX} (for a log, communicate a detached copy)",
    )


def _twice(name: str, group: Any) -> RanksError:
    ranks = torch.distributed.get_world_size(group)
    return RanksError(
        f"the inner loss, which is the same on all {ranks} ranks, goes through torch's {name}, whose backward pass "
        f"sums over ranks once more: its gradient is not that of the loss, but up to {ranks} times that",
        "collectives whose derivative is that of the loss",
        _FIX,
    )


def _pulled_through_field(losses: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """What the first field's Jacobian, transposed, makes of a direction that all ranks know; nothing without a field.

    The field itself, which is used where a gradient is, can be the same on all ranks and its derivative each rank's
    own.
    """
    entries = [x for x in entries_behind(losses) if x.requires_grad]
    if not entries:
        return []
    directions = Tasks(0).start(Leaves(entries))
    try:
        found = torch.autograd.grad(entries, params, list(directions), retain_graph=True, allow_unused=True)
    except RuntimeError:  # a field without a derivative, of which whoever needs it says more
        return []
    return [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(found, params, strict=True)]


def _other_gradients(apart: float, group: Any, what: str = "inner loss, but gradients") -> RanksError:
    ranks = torch.distributed.get_world_size(group)
    return RanksError(
        f"the {ranks} ranks hold the same params and get the same {what} that differ by {apart:.0%}",
        "the same gradient on all ranks",
        f"{_FIX}; if params are shards, check=False",
    )


def _sums_twice(losses: Tensor) -> str:
    """The name of a collective of torch's own behind a loss, not looking behind what ``summed`` has summed."""
    summed = {node for node in autograd_graph.nodes([losses.grad_fn]) if is_summed(node)}
    for node in autograd_graph.nodes([losses.grad_fn], set(summed)):
        name = type(node).__name__
        if name in _OWN or "c10d_functional" in name:
            return name.removeprefix("_").partition("Backward")[0]
    return ""


_OWN = {f"{name}Backward" for name in ("_AllReduce", "_AllGather", "_AllGatherBase", "_Reduce_Scatter", "_Reduce")}
"""Nodes of ``torch.distributed.nn.functional``."""


def _sums_a_scalar(losses: Tensor) -> bool:
    """Whether all that is summed over ranks is one number (of each task).

    (A penalty of params that are shards is, too, beside a sum of predictions, which is not.)
    """
    nodes = [node for node in autograd_graph.nodes([losses.grad_fn]) if is_summed(node)]
    return bool(nodes) and all(size == losses.numel() for node in nodes for size in node.sizes)
