"""Which instructions of a processor's torch's compiler may write, known without trying each of them out."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def known_to_gcc() -> Iterator[None]:
    """While a program is lowered: what g++ has known since version 11 is not tried out.

    Whether g++ can write the newer instructions (of bfloat16, VNNI, AMX) that a processor has, torch looks up by two
    processes for each of them, half a second together, three seconds in all: a seventh of a first call.
    """
    sets: Any = importlib.import_module("torch._inductor.cpu_vec_isa").VecISA
    with _alone:  # (of two that put back what they have found, the later one would put back what is the other's)
        before = getattr(sets, "check_build", None)
        if before is None or not _is_known_gcc():
            yield
            return
        known = _known()
        sets.check_build = lambda own, code: code in known or before(own, code)
        try:
            yield
        finally:
            sets.check_build = before


_alone = threading.RLock()


def _is_known_gcc() -> bool:
    builder: Any = importlib.import_module("torch._inductor.cpp_builder")
    if not all([hasattr(builder, name) for name in ("get_cpp_compiler", "_is_gcc", "_is_gcc_version_less_than")]):
        return False
    compiler = builder.get_cpp_compiler()
    # (of a version that torch cannot read it says that it is less than none)
    least = [builder._is_gcc_version_less_than(compiler, version) for version in (11, 1000)]
    return bool(builder._is_gcc(compiler)) and least == [False, True]


def _known() -> list[str]:
    """The code by which torch tries them out."""
    sets: Any = importlib.import_module("torch._inductor.cpu_vec_isa")
    names = (("VecAVX512", "_avx512_bf16_code"), ("VecAVX512VNNI", "_avx512_vnni_code"), ("VecAMX", "_amx_code"))
    found = [getattr(getattr(sets, kind, None), name, None) for kind, name in names]
    return [code for code in found if code is not None]
