"""Pickles as Python 2 wrote them, protocol 2: strings are bytes, and so are the keys of dictionaries."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def python2_pickle(value: Any) -> bytes:
    """What ``cPickle.dumps(value, 2)`` gave under Python 2, without the memo (which a pickle may do without)."""
    return b"\x80\x02" + _piece(value) + b"."


def _piece(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_piece(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_piece, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_piece, value)) + b"t"
    if isinstance(value, (str, bytes)):
        raw = value.encode("latin-1") if isinstance(value, str) else value
        return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw
    if isinstance(value, bool) or value is None:
        return {True: b"\x88", False: b"\x89", None: b"N"}[value]
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, np.ndarray):
        code, order = value.dtype.str[1:], value.dtype.str[0]
        number = (
            b"cnumpy\ndtype\n" + _piece((code, 0, 1)) + b"R" + _piece((3, order, None, None, None, -1, -1, 0)) + b"b"
        )
        state = b"(" + _piece(1) + _piece(value.shape) + number + _piece(False) + _piece(value.tobytes()) + b"t"
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
            + _piece((0,))
            + _piece("b")
            + b"tR"
            + state
            + b"b"
        )
    raise TypeError(type(value))
