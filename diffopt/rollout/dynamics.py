"""One inner problem as a dynamical system on stacked tensors: its loss, its gradient oracle, its update, its step.

# NOTE [a batch of tasks is one problem]
Tasks do not interact, so a batch of them is one inner problem whose parameters are the stacked ones and whose loss is
``vmap(loss).sum()``: its gradient, its Hessian-vector products and its updates are those of all tasks at once. Each
``torch.func.vmap`` that a call runs under becomes one :class:`Level` here, and one leading axis of every state tensor,
the outermost vmap's first. Only the loss runs under vmap; all else is plain arithmetic on plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

from torch import Tensor

from diffopt.errors import DeviceError, DiffoptError, LossError, OptimizerError
from diffopt.optimizers.base import Buffers
from diffopt.optimizers.binding import BoundOptimizer
from diffopt.tensors import hints, torch_errors, transforms, tree
from diffopt.tensors.captures import Given
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.saved_hooks import RecomputingAsBefore

Inputs: TypeAlias = tuple[Tensor, ...]
"""All tensors of a problem: the state's leaves (params, then buffers), then the extras."""


@final
@dataclass(frozen=True)
class Level:
    """One vmap around the problem.

    Attributes:
        dims: for each input, 0 if it has this level's axis, ``None`` if it is shared by the tasks of this level.
        size: how many tasks.
        randomness: what the vmap said of random numbers.
    """

    dims: tuple[int | None, ...]
    size: int
    randomness: str


@final
@dataclass(frozen=True)
class Dynamics:
    """The step ``s_{t+1} = Phi_t(s_t)`` of one inner problem; holds no tensors that are differentiated.

    The inputs of a problem are one flat tuple: the state's leaves, then the *extras*, which are whatever else a step
    reads: tensors of ``args``, of ``batches`` (one slice per step) and of the optimizer's fields.

    Attributes:
        loss: ``loss(params, *args)`` or ``loss(params, *args, batch)``.
        optimizer: the update rule with its tensors taken out.
        inner_steps: the number of update steps ``T``.
        params_structure: of the params tree, whose leaves are the first ``params_count`` inputs.
        buffers_layout: name and number of leaves of each buffer; they follow the params.
        args_leaves: the leaves of ``(args, batches)``; a tensor leaf holds the number of its extra.
        args_structure: of ``(args, batches)``.
        has_batches: whether the loss takes a batch.
        stepped: for each extra, whether its first own axis runs over steps.
        hyperparameters_start: the number of the first extra that belongs to the optimizer.
        levels: the vmaps around the problem, innermost first.
        window: how many updates in a row use one gradient; they then count as one step (derivations, section 5).
        compile: whether a step and its pullback are compiled where steps are taken one by one.
    """

    loss: Callable[..., Tensor]
    optimizer: BoundOptimizer
    inner_steps: int
    params_structure: tree.Structure
    params_count: int
    buffers_layout: tuple[tuple[str, int], ...]
    args_leaves: tuple[Any, ...]
    args_structure: tree.Structure
    has_batches: bool
    stepped: tuple[bool, ...]
    hyperparameters_start: int
    levels: tuple[Level, ...] = ()
    window: int = 1
    compile: bool = False

    @property
    def steps(self) -> int:
        """The number of steps of the system: one per gradient, ``T`` unless there are windows."""
        return -(-self.inner_steps // self.window)

    @property
    def state_count(self) -> int:
        """The number of state leaves, params and buffers."""
        return self.params_count + sum(count for _, count in self.buffers_layout)

    @property
    def tasks_shape(self) -> tuple[int, ...]:
        """The sizes of the leading axes that all state tensors have: one per vmap, the outermost first."""
        return tuple(level.size for level in reversed(self.levels))

    def batched(self, level: Level) -> Dynamics:
        """The same problem with one more vmap around it."""
        return replace(self, levels=(*self.levels, level))

    def split(self, state: Sequence[Tensor]) -> tuple[Leaves, Buffers]:
        """A flat state as params and named buffers."""
        buffers, start = {}, self.params_count
        for name, count in self.buffers_layout:
            buffers[name] = Leaves(state[start : start + count])
            start += count
        return Leaves(state[: self.params_count]), buffers

    def at_step(self, extras: Sequence[Tensor], step: int) -> tuple[Tensor, ...]:
        """The extras as step ``step`` (from 1) sees them: the slice of what runs over steps, the rest as it is."""
        return tuple(self.slice_at(i, extra, step) if self.stepped[i] else extra for i, extra in enumerate(extras))

    def slice_at(self, number: int, extra: Tensor, step: int) -> Tensor:
        """What step ``step`` sees of an extra that runs over steps: a view.

        A batch is the one its gradient is taken on. A hyperparameter of a window of several updates keeps its axis.
        """
        axis, first = self.step_axis(number), (step - 1) * self.window
        if self.window == 1 or number < self.hyperparameters_start:
            return extra.select(axis, first)
        return extra.narrow(axis, first, self.length(step))

    def length(self, step: int) -> int:
        """How many updates step ``step`` makes: the last window may be short."""
        return min(self.window, self.inner_steps - (step - 1) * self.window)

    def step_axis(self, number: int) -> int:
        """The axis of extra ``number`` that runs over steps, behind the axes of the levels that batch it."""
        return sum(level.dims[self.state_count + number] is not None for level in self.levels)

    def losses(self, params: Sequence[Tensor], current: Sequence[Tensor]) -> Tensor:
        """The inner losses of all tasks, one axis per level; ``current`` is :meth:`at_step` of the extras.

        # NOTE [a loss is given its own alias of what it reads]
        One that differentiates in an argument by itself (a gradient penalty) may call ``requires_grad_()`` on it, and
        means the partial derivative: not what reaches its params through the same tensor at earlier steps.
        """
        read = self.hyperparameters_start
        seen = [x.view_as(x) if x.requires_grad else x.detach() for x in current[:read]]
        dims = [(*level.dims[: self.params_count], *level.dims[self.state_count :][:read]) for level in self.levels]
        vmapped = self._vmap(self._loss_of_leaves, dims)
        try:
            with RecomputingAsBefore(self.functions, (*params, *seen)):
                losses: Tensor = vmapped(*params, *seen)
        except StopIteration as error:
            raise torch_errors.ended_iterator() from error
        except (RuntimeError, TypeError) as error:
            named = self._named(error, params, current)
            if named is None:
                raise
            raise named from error
        return losses

    def _named(self, error: Exception, params: Sequence[Tensor], current: Sequence[Tensor]) -> DiffoptError | None:
        """What was wrong with a loss that raised ``error``; ``None`` if only the loss itself can know."""
        if isinstance(error, DiffoptError):
            return None
        if torch_errors.is_in_place(error):
            return torch_errors.changed_in_place()
        if "saved tensor hooks" in str(error):
            return torch_errors.hooks_around_transforms()
        if torch_errors.is_missing_derivative(error):
            return torch_errors.missing_derivative(str(error).partition("\n")[0])
        mixed = torch_errors.mixed_error(
            error, "the inner loss", "make params and what the loss reads DTensors of one mesh (distribute_tensor)"
        )
        if mixed is not None:
            return mixed
        args, _ = tree.unflatten(self.args_structure, list(self.args_leaves))
        wrong: DiffoptError | None = torch_errors.signature_error(
            error,
            "the inner loss",
            self.loss,
            1 + len(args) + self.has_batches,
            "one for params, one for each of *args and, with batches, one for the batch",
        )
        if wrong is None and (self.levels or transforms.transforms_active()):
            wrong = torch_errors.vmap_error(error)
        given = dict(zip(self.names()[1], current, strict=True))
        return (
            wrong
            or torch_errors.device_error(error, params[0].device, given)
            or torch_errors.inference_error(error, given)
        )

    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a caller would call the params' leaves, and the extras."""
        paths = [path for path, leaf in self._read() if isinstance(leaf, ExtraSlot)]
        hypers = len(self.stepped) - self.hyperparameters_start
        own = f"a hyperparameter of {type(self.optimizer.template).__name__}"
        return tuple(f"params{path}" for path in tree.paths(self.params_structure)), (*paths, *[own] * hypers)

    def functions(self) -> tuple[object, ...]:
        """What may hold tensors besides those that are given: the loss, the update, arguments that are no tensors."""
        return self.loss, self.optimizer.template, Given(self.constants())

    def constants(self) -> dict[str, Any]:
        """What the loss is given that is no tensor, by the name that a caller would use."""
        return {path: leaf for path, leaf in self._read() if not isinstance(leaf, ExtraSlot)}

    def _read(self) -> list[tuple[str, Any]]:
        """The leaves that the loss is given besides the params, by name; their structure is that of (args, batches)."""
        return list(zip(names_of_read(self.args_structure), self.args_leaves, strict=True))

    def update(self, state: Sequence[Tensor], grads: Sequence[Tensor], current: Sequence[Tensor], step: int) -> Leaves:
        """The next state of all tasks, given their gradients."""
        return self.updates(state, grads, current, step, self.length(step))

    def updates(
        self, state: Sequence[Tensor], grads: Sequence[Tensor], current: Sequence[Tensor], step: Any, count: int
    ) -> Leaves:
        """The ``count`` updates of a step, whose number may be a tensor."""
        now, reused = Leaves(state), grads if count > 1 else ()
        versions = [transforms.version(x) for x in reused]
        for i in range(count):
            now = self._update_once(now, grads, self._hypers_of(current, i), (step - 1) * self.window + i + 1)
        if versions != [transforms.version(x) for x in reused]:
            raise torch_errors.changed_in_place()
        return now

    def update_once(
        self, state: Sequence[Tensor], grads: Sequence[Tensor], current: Sequence[Tensor], step: Any
    ) -> Leaves:
        """One update whose step has the number ``step``, which may be an object that stands for many numbers."""
        return self._update_once(Leaves(state), grads, self._hypers_of(current, 0), step)

    def _hypers_of(self, current: Sequence[Tensor], update: int) -> list[Tensor]:
        """The optimizer's tensors for one update of a window."""
        start = self.hyperparameters_start
        if self.window == 1:
            return list(current[start:])
        return [
            x.select(self.step_axis(start + i), update) if self.stepped[start + i] else x
            for i, x in enumerate(current[start:])
        ]

    def _update_once(self, state: Leaves, grads: Sequence[Tensor], hypers: Sequence[Tensor], step: int) -> Leaves:
        if not self.levels or self.optimizer.elementwise:
            return self._update(state, grads, [self._align(i, x) for i, x in enumerate(hypers)], step)
        own = (0,) * (self.state_count + self.params_count)
        start = self.state_count + self.hyperparameters_start
        vmapped = self._vmap(
            lambda *leaves: (
                self._update(
                    leaves[: self.state_count],
                    leaves[self.state_count : len(own)],
                    leaves[len(own) :],
                    step,
                ).tensors
            ),
            [own + level.dims[start:] for level in self.levels],
        )
        return Leaves(vmapped(*state, *grads, *hypers))

    def _vmap(self, function: Callable[..., Any], dims: Sequence[Sequence[int | None]]) -> Callable[..., Any]:
        """``function`` under the vmaps of all levels."""
        sizes, modes = [level.size for level in self.levels], [level.randomness for level in self.levels]
        return transforms.vmap(function, dims, sizes, modes)

    def _update(self, state: Sequence[Tensor], grads: Sequence[Tensor], hypers: Sequence[Tensor], step: int) -> Leaves:
        params, buffers = self.split(state)
        optimizer = self.optimizer.at(step, params, hypers)
        result = optimizer.update(params, Leaves(grads), buffers, step)
        if isinstance(step, int) and step == 1:
            self._check_update(result, state)
        params, buffers = result
        return Leaves([*params, *(leaf for name, _ in self.buffers_layout for leaf in buffers[name])])

    def _check_update(self, result: Any, state: Sequence[Tensor]) -> None:
        """Refuse an update that does not return a state like the one it got."""
        name = type(self.optimizer.template).__name__
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise OptimizerError(f"{name}.update returned {tree.describe(result)}, expected (params, buffers)")
        expected = {"params": self.params_count, **dict(self.buffers_layout)}
        got = {"params": result[0], **result[1]}
        if set(got) != set(expected):
            raise OptimizerError(
                f"{name}.update returned buffers {sorted(result[1])}, expected those that init made: "
                f"{sorted(dict(self.buffers_layout))}"
            )
        start = 0
        for part, count in expected.items():
            old, new = state[start : start + count], got[part]
            if not isinstance(new, Leaves) or [(x.shape, x.dtype) for x in new] != [(x.shape, x.dtype) for x in old]:
                raise OptimizerError(
                    f"{name}.update returned {tree.describe(new)} for {part}, expected the shapes and dtypes it got: "
                    f"{Leaves(old)}"
                )
            start += count

    def _align(self, number: int, value: Tensor) -> Tensor:
        """A hyperparameter with one leading axis per level, of length 1 where the tasks share it."""
        for axis, level in enumerate(reversed(self.levels)):
            if level.dims[self.state_count + self.hyperparameters_start + number] is None:
                value = value.unsqueeze(axis)
        return value

    def _loss_of_leaves(self, *leaves: Tensor) -> Tensor:
        params = tree.unflatten(self.params_structure, leaves[: self.params_count])
        extras = leaves[self.params_count :]
        args, batch = tree.unflatten(
            self.args_structure,
            [extras[x.index] if isinstance(x, ExtraSlot) else x for x in self.args_leaves],
        )
        loss = self.loss(params, *args, batch) if self.has_batches else self.loss(params, *args)
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            raise LossError(
                f"the inner loss returned {tree.describe(loss)}, expected one floating scalar tensor; "
                f"{hints.for_loss(loss)}"
            )
        if loss.device != leaves[0].device:
            raise DeviceError(
                f"the inner loss returned a number on {loss.device}, expected {leaves[0].device} as params; move data"
            )
        return loss


@final
@dataclass(frozen=True)
class ExtraSlot:
    """Stands, among the leaves of ``args``, for the extra with this number."""

    index: int


def names_of_read(structure: tree.Structure) -> list[str]:
    """What a caller would call the leaves of ``(args, batches)``."""
    return [
        f"args{path.removeprefix('[0]')}" if path.startswith("[0]") else f"batches{path.removeprefix('[1]')}"
        for path in tree.paths(structure)
    ]
