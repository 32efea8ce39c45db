"""``Batches``: the batches of a data set as a function of the step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from diffopt.errors import BatchesError
from diffopt.tensors.arguments import check_function, check_integer
from diffopt.tensors.tree import describe


@final
@dataclass(frozen=True, eq=False)
class Batches:
    r"""The batches of a map-style data set, each a function of the number of the step.

    .. math:: batch(i) = collate\big(\{data[\pi_e(j)] : b\,r \le j < b\,(r + 1)\}\big),\qquad
              e = \lfloor i / m \rfloor,\quad r = i \bmod m,\quad m = \lfloor n / b \rfloor

    for ``n`` samples and batches of ``b``: every epoch ``e`` of ``m`` steps goes through a permutation of its own, made
    from ``(seed, e)``. So step ``i`` gets the same batch whenever it is asked for, by a replay, from a saved state, in
    another thread or process. The ``n - m * b`` samples that are left over at the end of an epoch are dropped, so that
    all batches have one size; which ones they are changes with the permutation. Torch's global generators are not used.

    Pass it as ``batches=`` to :func:`diffopt.solve`. What is learned of each sample (its weight) is an argument of the
    loss, which the batch indexes: let the data set return its index too.

    Args:
        dataset: has ``len(dataset)`` and ``dataset[i]``; must return the same sample for the same ``i`` (draw
            augmentations inside the loss). Of a :class:`torch.utils.data.TensorDataset` tensors are indexed at once.
        batch_size: ``b``, at most ``n``.
        seed: an integer >= 0; other seeds are other permutations.
        collate_fn: makes a batch of a list of samples; default: :func:`torch.utils.data.default_collate`.

    Raises:
        BatchesError: the data set has no length or no index (an iterable one, a loader), is a tuple or a dict of
            tensors, or is smaller than a batch; ``batch_size`` or ``seed`` is out of range.

    Example:
        >>> import torch, diffopt
        >>> data = torch.utils.data.TensorDataset(torch.arange(4.0), torch.arange(4))
        >>> batches = diffopt.Batches(data, batch_size=2)
        >>> x, index = batches(7)
        >>> bool((x == index).all()), len(x), batches.per_epoch
        (True, 2, 2)
    """

    dataset: Any
    batch_size: int
    seed: int = 0
    collate_fn: Callable[[list[Any]], Any] | None = None
    _latest: list[tuple[int, Tensor]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check all of them."""
        _refuse_no_dataset(self.dataset)
        check_integer("Batches: batch_size", self.batch_size, 1, kind=BatchesError)
        check_integer("Batches: seed", self.seed, 0, kind=BatchesError)
        if self.collate_fn is not None:
            check_function("Batches: collate_fn", self.collate_fn, "a function of a list of samples", BatchesError)
        if len(self.dataset) < self.batch_size:
            raise BatchesError(
                f"Batches: batch_size is {self.batch_size}, and there are {len(self.dataset)} samples",
                "at least one whole batch",
                "take a smaller batch_size",
            )

    @property
    def per_epoch(self) -> int:
        """How many steps go once through the data."""
        return int(len(self.dataset) // self.batch_size)

    def __call__(self, step: int) -> Any:
        """The batch of step ``step``, counted from 0."""
        step = check_integer("Batches: the step", step, 0, kind=BatchesError)
        epoch, at = divmod(step, self.per_epoch)
        chosen = self._order(epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        data: Any = self.dataset
        if type(data) is TensorDataset and self.collate_fn is None:
            return [x[chosen] for x in data.tensors]
        together = getattr(data, "__getitems__", None)
        numbers = chosen.tolist()
        samples = [data[i] for i in numbers] if together is None else together(numbers)
        return default_collate(samples) if self.collate_fn is None else self.collate_fn(samples)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the permutation, which is made again."""
        return Batches, (self.dataset, self.batch_size, self.seed, self.collate_fn)

    def _order(self, epoch: int) -> Tensor:
        """The permutation of an epoch; the latest one is kept, whole, so that any thread finds it right."""
        for known, order in self._latest[:]:
            if known == epoch:
                return order
        key = hashlib.blake2b(f"{self.seed} {epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "big") >> 1)
        order = torch.randperm(len(self.dataset), generator=generator, device="cpu")
        self._latest[:] = [(epoch, order)]
        return order


def _refuse_no_dataset(value: Any) -> None:
    """Refuse what cannot be asked for a sample by its number, and what is likely data that is not a set of samples."""
    fix = ""
    if isinstance(value, DataLoader):
        fix = "pass its data set: diffopt.Batches(loader.dataset, batch_size)"
    elif isinstance(value, IterableDataset | Iterator) or not (hasattr(value, "__getitem__") and _has_length(value)):
        fix = "read it into a list of samples first, or write a data set with __len__ and __getitem__"
    elif isinstance(value, Mapping) or (isinstance(value, tuple) and any(isinstance(x, Tensor) for x in value)):
        fix = "tensors that run over samples: torch.utils.data.TensorDataset(*tensors)"
    if fix:
        raise BatchesError(f"Batches: dataset is {describe(value)}", "a map-style data set of samples", fix)


def _has_length(value: Any) -> bool:
    try:
        return len(value) >= 0
    except TypeError:
        return False
