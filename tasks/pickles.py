"""Reading the pickles that data sets are published in, without running anything they name.

A pickle is a program: it may name any function and call it. It is read here by the standard library's unpickler,
cut down: of its opcodes only those are left that data needs, and a name, if it is one of the few that numpy's
arrays are pickled with, is written down, never looked up. Nothing is ever called: an array is put together from its
shape, its kind of number and its bytes, once these fit together. Any other name, any other opcode, and any mismatch
is a :class:`diffopt.tasks.errors.DataError`.

Memory is bounded by the size of the file: no length that a pickle claims is believed beyond the bytes there
are, and no opcode copies what the file holds once.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, final

import numpy as np

from diffopt.tasks.archives import tar_members
from diffopt.tasks.data import open_file, whole
from diffopt.tasks.errors import DataError
from diffopt.tasks.pickled_arrays import Array, PickledArray, PickledNumber, shown

# What the standard library raises on a pickle that is broken, or on an archive that ends within it.
_BROKEN = (
    *(pickle.UnpicklingError, struct.error, ValueError, LookupError, AttributeError, OverflowError, DeprecationWarning),
    *(OSError, EOFError, zlib.error, tarfile.TarError),
)


def load_pickle(path: Path, limit: int) -> Any:
    """What is pickled in a file; see :func:`read_pickle`.

    Raises:
        DataError: the file is missing or larger than ``limit`` bytes, or as for :func:`read_pickle`.
    """
    file, size = open_file(path, limit)
    with file:
        return read_pickle(file, size, str(path))


def archived_pickles(path: Path, wanted: Mapping[str, int], limit: int) -> dict[str, Any]:
    """What is pickled in members of a tar; see :func:`read_pickle` and, for the arguments, :func:`tar_members`.

    Raises:
        DataError: as both.
    """
    members = tar_members(path, wanted, limit)
    return {member.name: read_pickle(member.stream, member.size, f"{path}: {member.name}") for member in members}


def read_pickle(stream: BinaryIO, size: int, name: str) -> Any:
    """What is pickled in the next ``size`` bytes of a stream.

    Plain values come out as themselves, but a ``bytearray`` as ``bytes``; byte strings of Python 2 as ``bytes``, so
    the keys of its dictionaries too (see :func:`entry`); numpy arrays as :class:`PickledArray`. Protocols 0 to 5.

    Raises:
        DataError: the pickle names anything but numpy's arrays, is cut short or broken.
    """
    reader = _Reader(stream, size, name)
    with whole(f"{name} cannot be read", "a whole pickle", _BROKEN):
        value = reader.load()
    if reader.stack or reader.metastack:
        count = 1 + sum(map(len, (reader.stack, *reader.metastack)))
        raise DataError(f"{name} leaves {count} values and {len(reader.metastack)} marks", "one value")
    return value


def entry(table: Any, key: str, name: str) -> Any:
    """The entry of a pickled dictionary under ``key``, written by Python 3 or, as ``bytes``, by Python 2.

    Raises:
        DataError: ``table`` is no dictionary or has no such key.
    """
    if not isinstance(table, dict):
        raise DataError(f"{name} holds a {type(table).__name__}", f"a dictionary with the key {key!r}")
    for spelled in (key, key.encode()):
        if spelled in table:
            return table[spelled]
    keys = ", ".join(shown(one) for one in list(table)[:8]) or "none"
    raise DataError(f"{name} has the keys {keys}", f"{key!r} among them", "this is another file")


def array(value: Any, name: str) -> Array:
    """A pickled array, or a pickled list of integers, as a numpy array.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, PickledArray):
        return value.numpy(name)
    if isinstance(value, list) and all(type(one) is int and -(2**63) <= one < 2**63 for one in value):
        return np.array(value, dtype=np.int64)
    raise DataError(f"{name} is a {type(value).__name__}", "a numpy array")


# NOTE [which names and opcodes are let in]
# A pickle is refused for whatever is not listed here. By these opcodes the standard library puts plain values, tuples,
# lists and names on its stack and into its memo; what the reader does in its own way instead ends the reader.
_NAMES = """
    numpy.ndarray numpy.dtype numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar
    numpy.core.numeric._frombuffer _codecs.encode builtins.bytes
"""
_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT
    BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL
"""
# NOTE [why keys are strings or small integers]
# Tuples within tuples take any time to hash, and so does a large integer that is a key many times. Large integers can
# also be chosen to have one hash all, which makes a dictionary slow: hence the limit for numbers in the memo, too.
_LARGE = 2**63
_DANGER = "nothing of it was run: do not open this file with pickle"


@final
@dataclass(frozen=True)
class _Named:
    """A name that a pickle mentions."""

    spelled: str


def _described(value: Any) -> str:
    return value.spelled if isinstance(value, _Named) else f"a {type(value).__name__}"


def _refuse(opcode: str, reader: _Reader) -> None:
    raise DataError(f"{reader.name} uses the opcode {opcode}", "those that data needs", _DANGER)


@final
class _Reader(pickle._Unpickler):
    """The standard library's unpickler, without its means to call, to build objects and to take memory on trust.

    It is the one written in Python, whose table of opcodes can be cut down and whose memo is a dictionary. The one
    in C fills a memo as long as the largest index in it, and looks extension codes up past ``find_class``.
    """

    stack: list[Any]
    metastack: list[list[Any]]
    memo: dict[int, Any]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: BinaryIO, size: int, name: str) -> None:
        super().__init__(_Window(stream, size), encoding="bytes")
        self.name, self._unencoded = name, size

    def find_class(self, module: str, name: str) -> _Named:
        """The name, as it was before numpy 2 and is in Python 3."""
        usual = f"{module.replace('numpy._core', 'numpy.core').replace('__builtin__', 'builtins')}.{name}"
        if usual not in _NAMES.split():
            given = shown(f"{module}.{name}")
            raise DataError(f"{self.name} names {given}", "numpy arrays and plain values only", _DANGER)
        return _Named(usual)

    def _reduce(self) -> None:
        """What the call of a known name stands for; nothing is called."""
        arguments, function = self.stack.pop(), self.stack.pop()
        match function, arguments:
            case _Named("numpy.core.multiarray._reconstruct"), (_Named("numpy.ndarray"), _, _):
                value: Any = PickledArray()
            case _Named("numpy.dtype"), (str() | bytes() as code, *_):
                value = PickledNumber(code)
            case _Named("numpy.core.numeric._frombuffer"), (data, number, shape, order):
                value = PickledArray(shape, number, order == "F", data)
            case _Named("numpy.core.multiarray.scalar"), (number, data):
                value = PickledArray((), number, False, data).numpy(self.name).item()
            case _Named("_codecs.encode"), (str() as decoded, "latin1"):
                # One string encoded again and again would take any memory; a true pickle encodes each of its own once.
                self._unencoded -= len(decoded)
                if self._unencoded < 0:
                    raise ValueError("it encodes more than it holds")
                value = decoded.encode("latin-1")
            case _Named("builtins.bytes"), ():
                value = b""
            case _:
                got = f"{self.name} calls {_described(function)} in another way"
                raise DataError(got, "one in which numpy's arrays are pickled")
        self.stack.append(value)

    def _build(self) -> None:
        """An array, or a kind of number, told its state."""
        state, subject = self.stack.pop(), self.stack[-1]
        match subject, state:
            case PickledArray(), (_, shape, number, columns_first, data):
                subject.shape, subject.number, subject.columns_first, subject.data = shape, number, columns_first, data
            case PickledNumber(), (_, order, None, None, None, _, _, _, *_):
                subject.order = order
            case PickledNumber(), _:
                raise DataError(f"{self.name} holds an array of records", "plain numbers")
            case _:
                got = f"{self.name} gives a state to {_described(subject)}"
                raise DataError(got, "only numpy arrays to have one")

    def _dict(self) -> None:
        values = self.pop_mark()
        self.stack.append({})
        self._fill(values)

    def _setitem(self) -> None:
        self._fill([self.stack.pop(-2), self.stack.pop()])

    def _setitems(self) -> None:
        self._fill(self.pop_mark())

    def _fill(self, values: list[Any]) -> None:
        table, keys = self.stack[-1], values[::2]
        if not isinstance(table, dict):
            raise ValueError(f"entries for a {type(table).__name__}")
        if not all(isinstance(key, (str, bytes)) or (isinstance(key, int) and abs(key) < _LARGE) for key in keys):
            raise DataError(f"{self.name} has a dictionary with other keys", "strings and integers of 64 bits")
        table.update(zip(keys, values[1::2], strict=True))

    def _put(self) -> None:
        index = int(self.readline())
        if not 0 <= index < _LARGE:
            raise ValueError("a place in the memo that no pickle needs")
        self.memo[index] = self.stack[-1]

    dispatch: ClassVar[dict[int, Any]] = {
        **{ord(one.code): partial(_refuse, one.name) for one in pickletools.opcodes},
        **{code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, one)[0] for one in _OPCODES.split())},
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.PUT[0]: _put,
        # The standard library's takes as many bytes as are claimed before it reads any.
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],
    }


@final
class _Window:
    """The next ``size`` bytes of a stream, and no length believed beyond them."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, if there are so many."""
        content = self._stream.read(size) if size <= self._left else b""
        if len(content) != size:
            raise EOFError("it ends within a value")
        self._left -= size
        return content

    def readline(self) -> bytes:
        """The next line, if it is whole."""
        content = self._stream.readline(self._left)
        if not content.endswith(b"\n"):
            raise EOFError("it ends within a line")
        self._left -= len(content)
        return content
