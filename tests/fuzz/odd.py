"""Odd objects: things that no argument should be, each made anew."""

from __future__ import annotations

import decimal
import enum
import fractions
import types
import weakref
from collections import UserDict, UserList
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class Untold:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise ValueError("no repr")


class Level(enum.IntEnum):
    """An integer by inheritance."""

    LOW = 1


class Text(str):
    """A text by inheritance."""


class Weird:
    """Compares with nothing, has no truth and no length."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no ==")

    def __bool__(self) -> bool:
        raise RuntimeError("no bool")


def _itself(kind: type[Any]) -> Any:
    held = kind()
    held.append(held) if isinstance(held, list) else held.__setitem__("self", held)
    return held


def _deep() -> Any:
    held: Any = []
    for _ in range(3000):
        held = [held]
    return held


def _generator() -> Any:
    yield 1


def _inference() -> Any:
    with torch.inference_mode():
        return torch.ones(2)


def _nested() -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def _quantized() -> Any:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def _fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(2)


def _raises(*args: Any, **options: Any) -> Any:
    raise DeprecationWarning("raised by the caller's own code")


class Subclass(torch.Tensor):
    """A subclass of tensors."""


OBJECTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "true": lambda: True,
    "text": lambda: "adam",
    "bytes": lambda: b"x",
    "text_subclass": lambda: Text("x"),
    "float": lambda: 2.5,
    "negative": lambda: -1,
    "zero": lambda: 0,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "minus_infinity": lambda: float("-inf"),
    "huge_integer": lambda: 10**400,
    "beyond_64_bits": lambda: 2**64,
    "complex": lambda: 1 + 2j,
    "fraction": lambda: fractions.Fraction(1, 3),
    "decimal": lambda: decimal.Decimal("0.1"),
    "int_enum": lambda: Level.LOW,
    "numpy_float": lambda: np.float64(0.5),
    "numpy_float32": lambda: np.float32(0.5),
    "numpy_integer": lambda: np.int64(2),
    "numpy_bool": lambda: np.bool_(True),
    "numpy_array": lambda: np.ones(2),
    "numpy_objects": lambda: np.array([None, "x"], dtype=object),
    "numpy_zero_d": lambda: np.array(0.5),
    "list_of_text": lambda: ["x", "y"],
    "empty_list": list,
    "empty_dict": dict,
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset({1}),
    "range": lambda: range(3),
    "slice": lambda: slice(0, 2),
    "ellipsis": lambda: Ellipsis,
    "not_implemented": lambda: NotImplemented,
    "object": object,
    "type": lambda: int,
    "lambda": lambda: lambda *a, **k: 0.1,
    "raising_function": lambda: _raises,
    "builtin": lambda: len,
    "generator": _generator,
    "iterator": lambda: iter([1, 2]),
    "dict_keys": lambda: {"a": 1}.keys(),
    "mapping_proxy": lambda: types.MappingProxyType({"a": 1}),
    "user_dict": lambda: UserDict(a=torch.ones(2)),
    "user_list": lambda: UserList([torch.ones(2)]),
    "weak_reference": lambda: weakref.ref(Untold),
    "list_in_itself": lambda: _itself(list),
    "dict_in_itself": lambda: _itself(dict),
    "deep_list": _deep,
    "mixed_keys": lambda: {1: torch.ones(2), "a": torch.ones(2), None: 0.1},
    "no_repr": Untold,
    "weird": Weird,
    "module": lambda: torch.nn.Linear(2, 1),
    "module_class": lambda: torch.nn.Linear,
    "lazy_module": lambda: torch.nn.LazyLinear(2),
    "lazy_parameters": lambda: dict(torch.nn.LazyLinear(2).named_parameters()),
    "parameters": lambda: torch.nn.Linear(2, 1).parameters(),
    "named_parameters": lambda: torch.nn.Linear(2, 1).named_parameters(),
    "torch_optimizer": lambda: torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1),
    "torch_optimizer_class": lambda: torch.optim.Adam,
    "scheduler": lambda: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)], lr=0.1), 1),
    "data_loader": lambda: torch.utils.data.DataLoader([torch.ones(2)] * 3),
    "list_of_batches": lambda: [torch.ones(2)] * 3,
    "device": lambda: torch.device("cpu"),
    "dtype": lambda: torch.float32,
    "torch_size": lambda: torch.Size([3]),
    "torch_generator": torch.Generator,
    "storage": lambda: torch.ones(2).untyped_storage(),
    "bool_tensor": lambda: torch.tensor(True),
    "int_tensor": lambda: torch.tensor(2),
    "float_tensor": lambda: torch.tensor(0.5),
    "nan_tensor": lambda: torch.tensor(float("nan")),
    "infinite_tensor": lambda: torch.tensor(float("inf")),
    "complex_tensor": lambda: torch.tensor(1 + 2j),
    "vector": lambda: torch.ones(7),
    "empty_tensor": lambda: torch.empty(0),
    "half_tensor": lambda: torch.tensor(0.5, dtype=torch.float16),
    "float8_tensor": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "uint16_tensor": lambda: torch.ones(2).to(torch.uint16),
    "sparse_tensor": lambda: torch.eye(2).to_sparse(),
    "csr_tensor": lambda: torch.eye(2).to_sparse_csr(),
    "nested_tensor": _nested,
    "jagged_tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "meta_tensor": lambda: torch.ones(2, device="meta"),
    "quantized_tensor": _quantized,
    "fake_tensor": _fake,
    "inference_tensor": _inference,
    "tensor_subclass": lambda: torch.ones(2).as_subclass(Subclass),
    "mkldnn_tensor": lambda: torch.ones(2).to_mkldnn(),
    "wrapped_tensor": lambda: _escaped(),
    "solution": lambda: _solution(),
}


def _escaped() -> Any:
    """A tensor that has left the transform that it belongs to."""
    held: list[Any] = []
    torch.func.vmap(lambda x: (held.append(x), x)[1])(torch.ones(2, 2))
    return held[0]


def _solution() -> Any:
    import diffopt

    return diffopt.solve(lambda w: w.square().sum(), torch.ones(2), optimizer=diffopt.SGD(0.1), steps=1)
