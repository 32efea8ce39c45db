"""What a solve hands out along the way: inner losses, what is observed, what a loss returns besides; and when it ends.

# NOTE [sources of the adjoint]
An outer loss may depend on what happens on the way, ``F(s_{T+1}) + sum_t f_t(s_{t+1}) + sum_t c_t loss_t``. Each term
is an output of its step beside the next state, so that its cotangent enters the adjoint where the step is pulled back
(derivations (13.1)): one mechanism for the inner losses, which cost nothing more, and for whatever is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import LossError
from diffopt.tensors import torch_errors, tree
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.plain_numbers import plain
from diffopt.tensors.spread import placed_alike
from diffopt.tensors.tasks import Tasks


@final
@dataclass(eq=False)
class Form:
    """How a tree of tensors is made up that a user's function returns at every step: the first one says it.

    Attributes:
        what: whose tree it is, for messages.
        structure: of the tree; ``None``: none has been seen yet.
    """

    what: str
    structure: tree.Structure | None = None

    @property
    def count(self) -> int:
        """The number of leaves."""
        return 0 if self.structure is None else self.structure.num_leaves

    def names(self) -> list[str]:
        """What a caller would call the leaves."""
        return [] if self.structure is None else [f"{self.what}{path}" for path in tree.paths(self.structure)]

    def leaves(self, value: Any, like: Tensor) -> list[Tensor]:
        """The leaves of one such tree; numbers become tensors, on the device and in the precision of ``like``.

        Raises:
            LossError: a leaf is neither, or the tree is not made up as the first one was.
        """
        leaves, structure = tree.flatten(value)
        if self.structure is None:
            self.structure = structure
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, int | float):
                dtype = like.dtype if type(leaf) is float else None
                leaves[i] = torch.tensor(leaf, dtype=dtype, device=like.device)
            elif not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
                place = f"{self.what}{tree.paths(structure)[i]}"
                raise LossError(f"{place} is {tree.describe(leaf)}", "dense tensors and numbers", "leave it out")
        if structure != self.structure:
            raise LossError(
                f"{self.what} is {tree.describe(value)}", f"at every step the form of the first: {self.structure}"
            )
        return leaves

    def tree(self, leaves: Sequence[Tensor]) -> Any:
        """Leaves of all steps, as the tree; ``None`` if no step has been made, which could say how it is made up."""
        if self.structure is None or len(leaves) != self.count:
            return None
        return tree.unflatten(self.structure, list(leaves))


@final
@dataclass(frozen=True)
class Observer:
    """A function ``observe(params, *args[, batch])`` of the params after every step, and how its trees are made up."""

    function: Callable[..., Any]
    form: Form = field(default_factory=lambda: Form("what observe returned"))


@final
class Tables:
    """What every step has handed out, one tensor for each quantity, ``[..., T, ...]``: steps run behind the tasks.

    # NOTE [one tensor for all steps]
    A small one per step, kept between the large ones that come and go, leaves the C allocator with holes that nothing
    fits into, and the process grows by a state per step. (Where a step hands out its losses only, those of a few steps
    wait for each other, and are written in one operation.)
    """

    def __init__(self, axis: int, steps: int) -> None:
        """Steps run along ``axis``."""
        self._axis, self._steps = axis, steps
        self._waiting: list[Tensor] = []
        self._tensors: list[Tensor] = []

    def write(self, step: int, rows: Sequence[Tensor], names: Callable[[], Sequence[str]]) -> None:
        """What step ``step`` has handed out."""
        if len(rows) == 1:
            self._waiting.append(rows[0])
            if step == self._steps or len(self._waiting) == _TOGETHER:
                self._write_waiting(step)
            return
        self._make(rows)
        for number, (table, row) in enumerate(zip(self._tensors, rows, strict=True)):
            place = table.select(self._axis, step - 1)
            if place.dtype != row.dtype:  # what began as an integer may go on as another number
                wide = torch.promote_types(place.dtype, row.dtype)
                table = self._tensors[number] = table.to(wide)
                place = table.select(self._axis, step - 1)
            if place.shape != row.shape:
                raise LossError(
                    f"{names()[number]} has shape {tuple(row.shape[self._axis :])} at step {step}",
                    f"{tuple(place.shape[self._axis :])}, as at the first",
                    "pad it, or return a summary",
                )
            place.copy_(row)

    def _make(self, rows: Sequence[Tensor]) -> None:
        """Tables for rows such as these, if there are none."""
        if not self._tensors:
            axis, steps = self._axis, self._steps
            self._tensors = [x.new_empty(*x.shape[:axis], steps, *x.shape[axis:]) for x in rows]

    def _write_waiting(self, last: int) -> None:
        """Write the losses that have waited, up to those of step ``last``."""
        waiting = self._waiting if type(self._waiting[0]) is Tensor else placed_alike(self._waiting)
        count, self._waiting, rows = len(waiting), [], torch.stack(waiting, self._axis)
        if count == self._steps:
            self._tensors = [rows]
            return
        self._make([rows.select(self._axis, 0)])
        if self._tensors[0].dtype != rows.dtype:
            self._tensors[0] = self._tensors[0].to(torch.promote_types(self._tensors[0].dtype, rows.dtype))
        self._tensors[0].narrow(self._axis, last - count, count).copy_(rows)

    def until(self, step: int) -> list[Tensor]:
        """What the steps up to ``step`` have handed out."""
        if self._waiting:
            self._write_waiting(max(step, 1))
        if step == self._steps:
            return self._tensors
        return [x.narrow(self._axis, 0, step).clone() for x in self._tensors]


_TOGETHER = 16


@final
@dataclass(frozen=True)
class Running:
    """The cotangents of what was handed out along the way.

    Attributes:
        losses: of the inner losses, ``[..., T]``; ``None``: zero.
        observed: of each leaf that was observed, ``[..., T, ...]``; ``None``: zero.
        axis: the axis that steps run along.
    """

    losses: Tensor | None
    observed: tuple[Tensor | None, ...]
    axis: int

    def at(self, step: int) -> list[Tensor | None]:
        """Those of step ``step``: of its loss, and of what was observed after it."""
        return [None if x is None else x.select(self.axis, step - 1) for x in (self.losses, *self.observed)]


@final
@dataclass(frozen=True)
class Stop:
    """What may end a rollout before its last step.

    Attributes:
        tol: a step is not made where the gradient's norm is at most this, for every task.
        on_step: is told the number of every step that was made and its loss; returns ``True`` to make no more.
    """

    tol: float | None = None
    on_step: Callable[[int, float], Any] | None = None

    def reached(self, grads: Sequence[Tensor], levels: int) -> Tensor | None:
        """Whether each task's gradient is small enough; ``None``: nobody asks."""
        return None if self.tol is None else Tasks(levels).norm(Leaves([x.detach() for x in grads])) <= self.tol

    def told(self, step: int, loss: Tensor) -> bool:
        """Tell of a step; whether to make no more."""
        if self.on_step is None:
            return False
        try:
            answer = plain(self.on_step(step, float(loss)))
        except TypeError as error:
            named = torch_errors.signature_error(error, "on_step", self.on_step, 2, "the step's number and its loss")
            if named is None:
                raise
            raise named from error
        if isinstance(answer, Tensor) and answer.dtype is torch.bool and answer.ndim == 0:
            return bool(answer)
        return answer is True


NEVER = Stop()
"""Every step is made, and nobody is told."""
