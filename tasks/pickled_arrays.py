"""What a pickle says of a numpy array, believed only where it fits together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt

from diffopt.tasks.errors import DataError

Array: TypeAlias = npt.NDArray[Any]

_LONGEST = 1000
_MOST_AXES = 8
_KINDS = {f"{kind}{size}" for kind, sizes in {"u": "1248", "i": "1248", "f": "248", "b": "1"}.items() for size in sizes}


def text(value: Any) -> str:
    """A string of Python 3, or of Python 2 and hence pickled as bytes; of anything else, its type.

    Cut after 1,000 characters, more than any name has: a file may name one long string many times.
    """
    if isinstance(value, bytes):
        return value[:_LONGEST].decode("latin-1")
    return value[:_LONGEST] if isinstance(value, str) else type(value).__name__


def shown(value: Any) -> str:
    """A value from a file as a message may show it: short, and never by running anything of it."""
    return repr(text(value)[:60])


@final
@dataclass
class PickledNumber:
    """What a pickle says of a kind of number: ``code`` such as ``u1``, and the order of its bytes."""

    code: Any
    order: Any = "="

    def dtype(self, name: str) -> np.dtype[Any]:
        """The numpy dtype.

        Raises:
            DataError: it is none of the plain kinds: booleans, integers and floats of a fixed size.
        """
        code, order = text(self.code), text(self.order)
        if code not in _KINDS or order not in ("=", "|", "<", ">"):
            raise DataError(f"{name} holds an array of {shown(order + code)}", "plain numbers, such as u1")
        return np.dtype(code).newbyteorder("=" if order == "|" else order)  # type: ignore[arg-type]


@final
@dataclass
class PickledArray:
    """What a pickle says of an array; :meth:`numpy` believes it only where it fits together."""

    shape: Any = ()
    number: Any = None
    columns_first: Any = False
    data: Any = b""

    def numpy(self, name: str) -> Array:
        """The array, in this machine's byte order; a view of the pickled bytes where they are in it.

        Raises:
            DataError: shape, kind of number and number of bytes contradict each other.
        """
        if not isinstance(self.number, PickledNumber) or not isinstance(self.data, (bytes, bytearray)):
            raise DataError(f"{name} holds an array of other things", "plain numbers")
        dtype = self.number.dtype(name)
        shape = self.shape
        if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in shape[: _MOST_AXES + 1]):
            raise DataError(f"{name} holds an array with a shape of other things", "a shape of integers")
        if len(shape) > _MOST_AXES:
            raise DataError(f"{name} holds an array of {len(shape)} axes", f"{_MOST_AXES} at most")
        if math.prod(shape) * dtype.itemsize != len(self.data):
            raise DataError(
                f"{name} holds an array {shape} of {dtype} in {len(self.data):,} bytes", "as many as that takes"
            )
        flat = np.frombuffer(self.data, dtype=dtype).astype(dtype.newbyteorder("="), copy=False)
        return flat.reshape(shape, order="F" if self.columns_first else "C")
