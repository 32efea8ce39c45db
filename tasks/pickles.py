"""Reading the pickles that data sets are published in, without running anything they name.

A pickle is a program: it may name any function and call it. So nothing here unpickles. The opcodes are taken
apart by the standard library's ``pickletools`` and followed by a small interpreter of our own that knows plain
values, containers, byte strings of Python 2, and the few names numpy's arrays are pickled with. Those names
are never looked up or called: an array is put together from its shape, its kind of number and its bytes, once
these fit together. Any other name, any other opcode, and any mismatch is a
:class:`diffopt.tasks.errors.DataError`.

Memory is bounded by the size of the file: no length that a pickle claims is believed beyond the bytes there
are, and no opcode copies.
"""

from __future__ import annotations

import pickletools
import tarfile
import zlib
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np

from diffopt.tasks.data import open_file
from diffopt.tasks.errors import DataError
from diffopt.tasks.pickled_arrays import Array, PickledArray, PickledNumber, shown, text

# What the standard library raises on a pickle that is broken, or on an archive that ends within it.
_BROKEN = (ValueError, LookupError, OverflowError, OSError, EOFError, zlib.error, tarfile.TarError)


def load_pickle(path: Path, limit: int) -> Any:
    """What is pickled in a file; see :func:`read_pickle`.

    Raises:
        DataError: the file is missing or larger than ``limit`` bytes, or as for :func:`read_pickle`.
    """
    file, size = open_file(path)
    with file:
        if size > limit:
            raise DataError(f"{path} has {size:,} bytes", f"{limit:,} at most", "this is another file")
        return read_pickle(file, size, str(path))


def read_pickle(stream: BinaryIO, size: int, name: str) -> Any:
    """What is pickled in the next ``size`` bytes of a stream.

    Plain values come out as themselves; byte strings of Python 2 as ``bytes``, so the keys of its dictionaries
    too (see :func:`entry`); numpy arrays as :class:`PickledArray`. Protocols 0 to 5.

    Raises:
        DataError: the pickle names anything but numpy's arrays, is cut short or broken.
    """
    machine = _Machine(name)
    try:
        for opcode, argument, _ in pickletools.genops(_Window(stream, size)):  # type: ignore[arg-type]
            machine.follow(opcode.name, argument)
        return machine.result()
    except DataError:
        raise
    except _BROKEN as error:
        raise DataError(
            f"{name} cannot be read ({error})",
            "a whole pickle",
            "the download was cut short or damaged: download it again",
        ) from error


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


class _Name(Enum):
    """The names that a pickle may mention; none of them is ever looked up."""

    RECONSTRUCT = "numpy.core.multiarray _reconstruct"
    SCALAR = "numpy.core.multiarray scalar"
    FROM_BUFFER = "numpy.core.numeric _frombuffer"
    ARRAY = "numpy ndarray"
    NUMBER = "numpy dtype"
    ENCODE = "_codecs encode"
    BYTES = "builtins bytes"


_RENAMED = {"numpy._core": "numpy.core", "__builtin__ ": "builtins "}

_NUMBERS = frozenset(["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"])
_STRINGS = frozenset(["UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"])
_BYTES = frozenset(["BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"])
_VALUES = _NUMBERS | _STRINGS | _BYTES
_PYTHON_2_STRINGS = frozenset(["STRING", "BINSTRING", "SHORT_BINSTRING"])
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = frozenset(["PUT", "BINPUT", "LONG_BINPUT"])
_GET = frozenset(["GET", "BINGET", "LONG_BINGET"])
_PASSED_OVER = frozenset(["PROTO", "FRAME", "STOP"])


@final
class _Machine:
    """The stack and memo of one pickle."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        """The one value left at the end."""
        if len(self.stack) != 1 or self.marks:
            raise DataError(f"{self.name} leaves {len(self.stack)} values", "one, as of a whole pickle")
        return self.stack[0]

    def follow(self, opcode: str, argument: Any) -> None:
        """Do what one opcode says, or refuse it. The frequent ones come first."""
        stack = self.stack
        if opcode in _PUT:
            self.memo[argument] = stack[-1]
        elif opcode in _GET:
            stack.append(self.memo[argument])
        elif opcode in _VALUES:
            stack.append(argument)
        elif opcode in _PYTHON_2_STRINGS:
            stack.append(argument.encode("latin-1"))
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif opcode == "MARK":
            self.marks.append(len(stack))
        elif opcode in _TUPLES:
            self._tuple(len(stack) - _TUPLES[opcode])
        elif opcode == "TUPLE":
            self._tuple(self.marks.pop())
        elif opcode in ("REDUCE", "BUILD"):
            state, subject = stack.pop(), stack.pop()
            stack.append(self._called(subject, state) if opcode == "REDUCE" else self._built(subject, state))
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            spelled = argument if opcode == "GLOBAL" else " ".join(map(text, reversed([stack.pop(), stack.pop()])))
            stack.append(self._named(spelled))
        elif opcode not in _PASSED_OVER:
            self._fill(opcode)

    def _tuple(self, start: int) -> None:
        if start < 0 or (self.marks and start < self.marks[-1]):
            raise IndexError("a tuple of more values than there are")
        self.stack[start:] = [tuple(self.stack[start:])]

    def _fill(self, opcode: str) -> None:
        """Lists and dictionaries, empty, full or in parts."""
        stack = self.stack
        if opcode in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if opcode == "EMPTY_LIST" else {})
            return
        if opcode in ("LIST", "DICT", "APPENDS", "SETITEMS"):
            start = self.marks.pop()
        elif opcode in ("APPEND", "SETITEM"):
            start = len(stack) - (1 if opcode == "APPEND" else 2)
        else:
            raise DataError(
                f"{self.name} uses the opcode {opcode}",
                "those that data needs",
                "nothing of it was run: do not open this file with pickle",
            )
        values = stack[start:]
        del stack[start:]
        if opcode in ("LIST", "DICT"):
            stack.append([] if opcode == "LIST" else {})
        filled = stack[-1]
        if opcode in ("LIST", "APPENDS", "APPEND") and isinstance(filled, list):
            filled.extend(values)
        elif opcode in ("DICT", "SETITEMS", "SETITEM") and isinstance(filled, dict) and len(values) % 2 == 0:
            keys = values[::2]
            if not all(isinstance(key, (str, bytes, int)) for key in keys):
                raise DataError(f"{self.name} has a dictionary with other keys", "strings and integers")
            filled.update(zip(keys, values[1::2], strict=True))
        else:
            raise ValueError(f"{opcode} on a {type(filled).__name__}")

    def _named(self, spelled: str) -> _Name:
        usual = spelled
        for new, old in _RENAMED.items():
            usual = old + usual[len(new) :] if usual.startswith(new) else usual
        try:
            return _Name(usual)
        except ValueError:
            raise DataError(
                f"{self.name} names {shown(spelled.replace(' ', '.'))}",
                "numpy arrays and plain values only",
                "nothing of it was run: do not open this file with pickle",
            ) from None

    def _called(self, function: Any, arguments: Any) -> Any:
        """What the call of a known name stands for; nothing is called."""
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        if function is _Name.RECONSTRUCT and len(values) == 3 and values[0] is _Name.ARRAY:
            return PickledArray()
        if function is _Name.NUMBER and values and isinstance(values[0], (str, bytes)):
            return PickledNumber(text(values[0]))
        if function is _Name.FROM_BUFFER and len(values) == 4:
            data, number, shape, order = values
            return PickledArray(shape, number, order == "F", data)
        if function is _Name.SCALAR and len(values) == 2:
            return PickledArray((), values[0], False, values[1]).numpy(self.name).item()
        if function is _Name.ENCODE and len(values) == 2 and isinstance(values[0], str) and values[1] == "latin1":
            return values[0].encode("latin-1")
        if function is _Name.BYTES and values == ():
            return b""
        raise DataError(
            f"{self.name} calls {_described(function)} in another way", "one in which numpy's arrays are pickled"
        )

    def _built(self, subject: Any, state: Any) -> Any:
        """An array, or a kind of number, told its state."""
        if isinstance(subject, PickledArray) and isinstance(state, tuple) and len(state) == 5:
            _, subject.shape, subject.number, subject.columns_first, subject.data = state
        elif isinstance(subject, PickledNumber) and isinstance(state, tuple) and 8 <= len(state) <= 9:
            if state[2:5] != (None, None, None):
                raise DataError(f"{self.name} holds an array of records", "plain numbers")
            subject.order = text(state[1])
        else:
            raise DataError(f"{self.name} gives a state to {_described(subject)}", "only numpy arrays to have one")
        return subject


def _described(value: Any) -> str:
    return value.value.replace(" ", ".") if isinstance(value, _Name) else f"a {type(value).__name__}"


@final
class _Window:
    """The next ``size`` bytes of a stream, whatever lengths are asked for: all that ``pickletools`` needs of a file."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; the request never reaches beyond those that are left."""
        content = self._stream.read(min(size, self._left))
        self._left -= len(content)
        return content

    def readline(self) -> bytes:
        """The next line."""
        content = self._stream.readline(self._left)
        self._left -= len(content)
        return content
