"""An optimizer for every group of parameters, with hyperparameters of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from diffopt.errors import HyperparameterError, StructureError
from diffopt.optimizers.base import GROUPS, PLACING, Buffers, Grouping, Optimizer, Part
from diffopt.optimizers.checks import check_optimizer_field
from diffopt.optimizers.naming import named_apart, of_name
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tree import brief, describe

_SHOWN = 3
"""How many leaves a message names."""


@final
@dataclass(frozen=True)
class Groups(Grouping):
    r"""An optimizer for every group of leaves, each with hyperparameters of its own.

    .. math:: (\phi_k^+, b_k^+) = U_k(\phi_k, b_k, g_k; \eta_k) \quad\text{for every group } k

    ``Groups({"body": SGD(0.1), "head": Adam(1e-3)})`` takes the leaves whose path begins with the group's name.
    ``Groups(function, {"body": ..., "head": ...})`` takes those for which ``function(path)`` returns it. A path is the
    keys from the root of ``params`` to the leaf, joined by dots: ``"layers.0.weight"``, whether ``params`` is nested or
    has such keys itself, as ``dict(module.named_parameters())``. ``"layers.1"`` does not begin ``"layers.10.weight"``.

    A hyperparameter of a group's optimizer is a float, a scalar tensor, a ``Schedule`` or a tree. A tree looks like
    ``params``, of which the entries of other groups are not read; or like the group's part of them: without the entries
    of other groups (a list or tuple that lacks some is then a dict by position), or the branch of that which has all of
    the group's leaves. Of ``{"body": {"w": ..., "b": ...}, "head": ...}`` the body's is ``{"w": ..., "b": ...}``.

    Norms and the like are of the group alone: ``Clip(Groups(...), max_norm=1)`` clips by the norm of all gradients,
    ``Groups({"body": Clip(..., max_norm=1), ...})`` by that of the body's. In a group may be ``Groups`` again; paths
    stay those from the root.

    Args:
        by: a function of a path that returns the name of a group; ``None``, or left out: names are beginnings of paths.
        optimizers: the optimizers by the name of their group.

    The buffers are named after the group: ``"body.velocity"``; in ``solution.state`` they are tuples of the
    group's leaves. Elementwise if all optimizers are. No cost of its own.

    Raises:
        HyperparameterError: ``optimizers`` is no dict from names to optimizers, or a name begins another, so that a
            leaf would be in two groups.
        OptimizerError: an entry is no optimizer.
        StructureError: by ``solve``: a leaf is in no group, or a group has no leaf.

    Example:
        >>> import torch, diffopt
        >>> params = {"body": torch.ones(2), "head": torch.ones(1)}
        >>> optimizer = diffopt.Groups({"body": diffopt.SGD(0.1), "head": diffopt.SGD(0.5)})
        >>> solution = diffopt.solve(
        ...     lambda p: p["body"].sum() + p["head"].sum(), params, optimizer=optimizer, steps=1
        ... )
        >>> solution.params
        {'body': tensor([0.9000, 0.9000]), 'head': tensor([0.5000])}
    """

    by: Callable[[str], str] | Mapping[str, Optimizer] | None = field(metadata=PLACING)
    optimizers: Any = field(default=None, metadata=GROUPS)

    def __post_init__(self) -> None:
        """Sort the two forms, and refuse what is no dict of optimizers."""
        by, optimizers = self.by, self.optimizers
        if optimizers is None:
            by, optimizers = None, by
        if not isinstance(optimizers, Mapping) or not optimizers:
            raise HyperparameterError(
                f"Groups: got {describe(optimizers)}",
                "a dict from names to optimizers",
                'write Groups({"body": SGD(0.1), "head": Adam(1e-3)}), or Groups(function_of_path, {...})',
            )
        if by is not None and not callable(by):
            raise HyperparameterError(f"Groups: by is {describe(by)}", "a function of a path, or a dict alone")
        for name, optimizer in optimizers.items():
            if not isinstance(name, str):
                raise HyperparameterError(f"Groups: {describe(name)} names a group", "a string")
            check_optimizer_field(self, f"optimizers[{name!r}]", optimizer)
        self._refuse_names_in_names(sorted(optimizers))
        object.__setattr__(self, "by", by)
        object.__setattr__(self, "optimizers", {name: optimizers[name] for name in sorted(optimizers)})

    @staticmethod
    def _refuse_names_in_names(names: Sequence[str]) -> None:
        for name in names:
            longer = [other for other in names if other.startswith(f"{name}.")]
            if longer:
                raise HyperparameterError(
                    f"Groups: the name {name!r} begins {longer[0]!r}",
                    "names of which none begins another",
                    "a parameter would be in both: use Groups in a group, or a function of the path and other names",
                )

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """Whether all optimizers are."""
        return all([_optimizer(x).elementwise for x in self.optimizers.values()])

    @property
    def proximal_step_size(self) -> Any:
        """That of each leaf; ``None`` if an optimizer has none."""
        parts = self.optimizers.values()
        if any([_optimizer(part).proximal_step_size is None for part in parts]):
            return None
        sizes = {i: size for part in parts if isinstance(part, Part) for i, size in _sizes(part)}
        return tuple([sizes[i] for i in range(len(sizes))])

    def places(self, paths: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Which leaves each group has."""
        found: dict[str, list[int]] = {name: [] for name in self.optimizers}
        for i, path in enumerate(paths):
            found[self._group(path)].append(i)
        empty = [name for name, places in found.items() if not places]
        if empty:
            shown = ", ".join(map(repr, paths[:_SHOWN])) + (", ..." if len(paths) > _SHOWN else "")
            raise StructureError(
                f"Groups: no parameter is in group {empty[0]!r}",
                "every group to have some",
                f"check its name: the paths of params are {shown}",
            )
        return {name: tuple(places) for name, places in found.items()}

    def _group(self, path: str) -> str:
        if self.by is None:
            begun = [name for name in self.optimizers if path == name or path.startswith(f"{name}.")]
            name = begun[0] if begun else None
        else:
            name = self.by(path)  # type: ignore[operator]
        if name is None:
            raise StructureError(
                f"Groups: the parameter {path!r} is in none of the groups {', '.join(map(repr, self.optimizers))}",
                "every parameter in one group",
                "add a group for it, of SGD(0.0) if it is to stay as it is",
            )
        if not isinstance(name, str) or name not in self.optimizers:
            known = f"one of {list(self.optimizers)}"
            raise StructureError(f"Groups: the function returned {brief(name)} for {path!r}", known)
        return name

    def init(self, params: Leaves) -> Buffers:
        """The buffers of every group, named after it."""
        found: Buffers = {}
        for name, part in self.optimizers.items():
            found |= named_apart(name, part.optimizer.init(part.of(params)))
        return found

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step of every group."""
        after: list[Tensor] = [*params]
        new: Buffers = {}
        for name, part in self.optimizers.items():
            own = of_name(name, buffers)
            moved, kept = part.optimizer.update(part.of(params), part.of(grads), own, step)
            for i, leaf in zip(part.places, moved, strict=True):
                after[i] = leaf
            new |= named_apart(name, kept)
        return Leaves(after), new


def _optimizer(entry: Any) -> Optimizer:
    """The optimizer of a group, which is wrapped in a ``Part`` once it is ready."""
    optimizer: Optimizer = entry.optimizer if isinstance(entry, Part) else entry
    return optimizer


def _sizes(part: Part) -> list[tuple[int, Any]]:
    """The place and the step size of each leaf of a part."""
    size = part.optimizer.proximal_step_size
    each = size if isinstance(size, tuple) else (size,) * len(part.places)  # Leaves are a tuple
    return list(zip(part.places, each, strict=True))
