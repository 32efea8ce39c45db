"""One inner problem as a dynamical system on stacked tensors: its loss, its gradient oracle, its update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast, final

from torch import Tensor

from diffopt.errors import DeviceError, LossError, OptimizerError
from diffopt.optimizers.binding import BoundOptimizer
from diffopt.rollout import loss_errors
from diffopt.rollout.along import Form, Observer
from diffopt.rollout.inputs import Level, Place
from diffopt.rollout.layout import Layout, Slot
from diffopt.tensors import derivatives, hints, torch_errors, transforms, tree
from diffopt.tensors.captures import Given
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.saved_hooks import RecomputingAsBefore


@final
@dataclass(frozen=True)
class Dynamics:
    """The step ``s_{t+1} = Phi_t(s_t)`` of one inner problem; holds no tensors that are differentiated.

    Attributes:
        layout: how its tensors lie.
        loss: ``loss(params, *args)`` or ``loss(params, *args, batch)``.
        optimizer: the update rule with its tensors taken out.
        compile: whether a step and its pullback are compiled where steps are taken one by one.
        aux: the form of what the loss returns besides; ``None``: it returns nothing else.
        observer: what looks at the params after every step; ``None``: nothing.
        micro_batches: in how many pieces of the batch gradients are taken; ``None``: whole.
    """

    layout: Layout
    loss: Callable[..., Tensor]
    optimizer: BoundOptimizer
    compile: bool = False
    aux: Form | None = None
    observer: Observer | None = None
    micro_batches: int | None = None

    @cached_property
    def own_update(self) -> bool:
        """Whether the update is one of this library's, which reads what it is given only, and makes new params."""
        return self.optimizer.own

    def batched(self, level: Level) -> Dynamics:
        """The same problem with one more vmap around it."""
        return replace(self, layout=self.layout.batched(level))

    @property
    def observed_count(self) -> int:
        """How many tensors are observed at every step, as far as one has been seen."""
        return 0 if self.observer is None else self.observer.form.count

    def until(self, steps: int) -> Dynamics:
        """The same problem, ended after so many steps."""
        layout = self.layout
        if steps == layout.steps:
            return self
        return replace(self, layout=replace(layout, inner_steps=min(steps * layout.window, layout.inner_steps)))

    def over(self, size: int, own: Iterable[Place] = ()) -> Dynamics:
        """The same with one more axis in front of every state tensor, and of the inputs at the places ``own``."""
        return replace(self, layout=self.layout.over(size, own))

    def over_steps(self, count: int) -> Dynamics:
        """The same for so many steps at once, each with a state of its own."""
        return replace(self, layout=self.layout.over_steps(count))

    def losses(
        self, params: Sequence[Tensor], read: Sequence[Tensor], step: int = 0, aux: list[Tensor] | None = None
    ) -> Tensor:
        """The inner losses of all tasks, one axis per level, of one step's slice of what the loss reads.

        ``step``, of which only checks take notice, is its number; to ``aux`` goes what the loss returns besides.

        # NOTE [a loss is given its own alias of what it reads]
        One that differentiates in an argument by itself (a gradient penalty) may call ``requires_grad_()`` on it, and
        means the partial derivative: not what reaches its params through the same tensor at earlier steps. (Under a
        transform it is a view, for ``detach`` would drop the tangent of ``torch.func.jvp``. Sparse tensors have none.)
        """
        transformed = transforms.transforms_active()
        views = [x.requires_grad or (transformed and not (x.is_nested or transforms.is_sparse(x))) for x in read]
        seen = [x.view_as(x) if view else x.detach() for x, view in zip(read, views, strict=True)]
        try:
            with RecomputingAsBefore(self.functions, params, seen):
                found = self._under_levels(self._loss, params, seen) if self.layout.levels else self._loss(params, seen)
                if self.aux is None:
                    return cast("Tensor", found)
                if aux is not None:
                    aux += [x.detach() for x in found[1:]]
                return cast("Tensor", found[0])
        except StopIteration as error:
            raise torch_errors.ended_iterator() from error
        except (RuntimeError, TypeError) as error:
            named = loss_errors.named(error, self.layout, "the inner loss", self.loss, params, read)
            if named is None:
                raise
            raise named from error

    def pieces(self, read: Sequence[Tensor]) -> list[tuple[list[Tensor], float]]:
        """What the loss reads, with each piece of its batch in turn, and the weight of each."""
        return self.layout.pieces(read, self.micro_batches or 1)

    def observed(self, params: Sequence[Tensor], read: Sequence[Tensor], step: int = 0) -> Sequence[Tensor]:
        """What the observer says of params, of all tasks, where a step has read this; nothing if there is none.

        ``step``, of which only checks take notice, is the step's number.
        """
        if self.observer is None:
            return ()
        try:
            if not self.layout.levels:
                return self._observed(params, read)
            found: Sequence[Tensor] = self._under_levels(self._observed, params, read)
            return found
        except (RuntimeError, TypeError) as error:
            named = loss_errors.named(error, self.layout, "observe", self.observer.function, params, read)
            if named is None:
                raise
            raise named from error

    def _observed(self, params: Sequence[Tensor], read: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the observer says of one task."""
        assert self.observer is not None
        inner, args = self._called_with(params, read)
        return tuple(self.observer.form.leaves(self.observer.function(inner, *args), params[0]))

    def _under_levels(
        self,
        function: Callable[[Sequence[Tensor], Sequence[Tensor]], Any],
        params: Sequence[Tensor],
        read: Sequence[Tensor],
    ) -> Any:
        count = len(params)
        return self._vmap(lambda *leaves: function(leaves[:count], leaves[count:]), self.layout.dims_of_loss)(
            *params, *read
        )

    def _called_with(self, params: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[Any, list[Any]]:
        """What the loss is given, as its caller made it: params, and what comes behind them."""
        layout = self.layout
        leaves = [read[x.index] if isinstance(x, Slot) else x for x in layout.args_leaves]
        args, batch = cast("tuple[list[Any], Any]", layout.args_structure.unflatten(leaves))
        return layout.params_structure.unflatten(params), [*args, batch] if layout.has_batches else args

    def _loss(self, params: Sequence[Tensor], read: Sequence[Tensor]) -> Any:
        """The loss of one task, called as its author wrote it; with ``aux``, and behind it what it returns besides."""
        inner, args = self._called_with(params, read)
        loss, besides = self.loss(inner, *args), ()
        if self.aux is not None:
            if not isinstance(loss, tuple) or len(loss) != 2:
                raise LossError(
                    f"has_aux=True: the inner loss returned {tree.describe(loss)}", "a pair (loss, aux)", ""
                )
            loss, besides = loss[0], self.aux.leaves(loss[1], params[0])
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            raise LossError(
                f"the inner loss returned {tree.describe(loss)}", "one floating scalar tensor", hints.for_loss(loss)
            )
        if loss.device != params[0].device:
            raise DeviceError(
                f"the inner loss returned a number on {loss.device}", f"{params[0].device} as params", "move data"
            )
        return loss if self.aux is None else (loss, *besides)

    def gradient(
        self, losses: Tensor, params: Sequence[Tensor], step: int = 0, *, differentiable: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradient of the sum of the losses; ``None`` for params that they do not depend on."""
        return derivatives.gradient(losses, params, differentiable=differentiable)

    def update(
        self, state: Sequence[Tensor], grads: Sequence[Tensor], hyperparameters: Sequence[Tensor], step: int
    ) -> Leaves:
        """The next state of all tasks, given their gradients."""
        if self.layout.window == 1:
            return self._update_once(state, grads, hyperparameters, self.layout.start + step)
        return self.updates(state, grads, hyperparameters, self.layout.first_update(step), self.layout.length(step))

    def updates(
        self,
        state: Sequence[Tensor],
        grads: Sequence[Tensor],
        hyperparameters: Sequence[Tensor],
        first: Any,
        count: int,
    ) -> Leaves:
        """The ``count`` updates of a step, the first of which has the number ``first``, which may be a tensor.

        (In double precision, which a leaf without axes would take over.)
        """
        now, reused = Leaves(state), grads if count > 1 else ()
        versions = [transforms.version(x) for x in reused]
        for i in range(count):
            after = self._update_once(now, grads, self._of_update(hyperparameters, i), first + i)
            now = after.cast(now) if isinstance(first, Tensor) else after
        if versions != [transforms.version(x) for x in reused]:
            raise torch_errors.changed_in_place()
        return now

    def update_of_any_step(
        self, state: Sequence[Tensor], grads: Sequence[Tensor], hyperparameters: Sequence[Tensor], step: Any
    ) -> Leaves:
        """One update whose step has the number ``step``, which may be an object that stands for many numbers."""
        return self._update_once(state, grads, self._of_update(hyperparameters, 0), step)

    def _of_update(self, hyperparameters: Sequence[Tensor], update: int) -> Sequence[Tensor]:
        """The optimizer's tensors for one update of a window."""
        layout = self.layout
        if layout.window == 1:
            return hyperparameters
        return [
            x.select(layout.step_axis(Place("hyperparameters", i)), update) if stepped else x
            for i, (x, stepped) in enumerate(zip(hyperparameters, layout.stepped.hyperparameters, strict=True))
        ]

    def _update_once(
        self, state: Sequence[Tensor], grads: Sequence[Tensor], hyperparameters: Sequence[Tensor], step: Any
    ) -> Leaves:
        levels = self.layout.levels
        if not levels or self.optimizer.elementwise:
            aligned = [self._aligned(i, x) for i, x in enumerate(hyperparameters)] if levels else hyperparameters
            return self._update(state, grads, aligned, step)
        first, second = self.layout.state_count, self.layout.state_count + self.layout.params_count
        vmapped = self._vmap(
            lambda *leaves: tuple(self._update(leaves[:first], leaves[first:second], leaves[second:], step)),
            self.layout.dims_of_update,
        )
        return Leaves(vmapped(*state, *grads, *hyperparameters))

    def _update(
        self, state: Sequence[Tensor], grads: Sequence[Tensor], hyperparameters: Sequence[Tensor], step: Any
    ) -> Leaves:
        params, buffers = self.layout.split(state)
        optimizer = self.optimizer.at(step, params, hyperparameters)
        result = optimizer.update(params, Leaves(grads), buffers, step)
        if isinstance(step, int) and step == self.layout.start + 1:
            self._refuse_other_state(result, state)
        params, buffers = result
        after = [*params]
        for name, _ in self.layout.buffers_layout:
            after += buffers[name]
        return Leaves(after)

    def _refuse_other_state(self, result: Any, state: Sequence[Tensor]) -> None:
        """Refuse an update that does not return a state like the one it got."""
        name, layout = self.layout.optimizer_name, self.layout.buffers_layout
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise OptimizerError(f"{name}.update returned {tree.describe(result)}", "(params, buffers)")
        expected = {"params": self.layout.params_count, **dict(layout)}
        got = {"params": result[0], **result[1]}
        if set(got) != set(expected):
            raise OptimizerError(
                f"{name}.update returned buffers {sorted(result[1])}", f"those that init made: {sorted(dict(layout))}"
            )
        start = 0
        for part, count in expected.items():
            old, new = tuple(state)[start : start + count], got[part]
            if not isinstance(new, Leaves) or [(x.shape, x.dtype) for x in new] != [(x.shape, x.dtype) for x in old]:
                raise OptimizerError(
                    f"{name}.update returned {tree.describe(new)} for {part}",
                    f"the shapes and dtypes it got: {Leaves(old)}",
                )
            start += count

    def _aligned(self, index: int, value: Tensor) -> Tensor:
        """A hyperparameter with one leading axis per level, of length 1 where the tasks share it."""
        for axis, level in enumerate(reversed(self.layout.levels)):
            if not level.own.hyperparameters[index]:
                value = value.unsqueeze(axis)
        return value

    def _vmap(self, function: Callable[..., Any], dims: Sequence[Sequence[int | None]]) -> Callable[..., Any]:
        """``function`` under the vmaps of all levels."""
        return transforms.vmap(function, dims, *self.layout.sizes_and_modes)

    def names_of_rows(self) -> list[str]:
        """What a caller would call the tensors that a step hands out: loss, what is observed, what comes besides."""
        forms = (None if self.observer is None else self.observer.form, self.aux)
        return ["the inner loss", *(name for form in forms if form is not None for name in form.names())]

    def functions(self) -> tuple[object, ...]:
        """What may hold tensors besides those that are given: functions, the update, arguments that are no tensors."""
        return (*self._own_functions, Given(self.layout.constants()))

    def without_names(self) -> tuple[object, ...]:
        """The same for whoever asks for no names, which take longer to find than what they name takes to look at."""
        return (*self._own_functions, tuple([x for x in self.layout.args_leaves if not isinstance(x, Slot)]))

    @property
    def _own_functions(self) -> tuple[object, ...]:
        observe = () if self.observer is None else (self.observer.function,)
        return self.loss, *observe, self.optimizer.template
