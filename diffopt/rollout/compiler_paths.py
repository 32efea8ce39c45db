"""Why torch's compiler cannot run: it does not quote every path that it is given, so one with a space comes apart."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch


class _Place(NamedTuple):
    """A folder that stands on the compiler's command lines, and what to do if it has a space."""

    name: str
    path: str
    fix: str


def _places() -> list[_Place]:
    """The folders that have a space; the one in which Python runs is not among them, and may have one."""
    anew = "make the environment anew at a path without one"
    places = [
        _Place("torch stands in", str(Path(torch.__file__).parent), anew),
        _Place("Python's library stands in", str(sysconfig.get_config_var("LIBDIR") or ""), anew),
        _Place("temporary files go to", tempfile.gettempdir(), "set TMPDIR to a path without one"),
        # last: torch sets it, too, to a folder among the temporary files
        _Place(
            "TORCHINDUCTOR_CACHE_DIR is", os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""), "set it to a path without one"
        ),
    ]
    return [place for place in places if len(place.path.split()) > 1]


def any_space() -> bool:
    """Whether torch's compiler would meet a path with a space."""
    return bool(_places())


def explanation(error: BaseException) -> str | None:
    """One sentence that names the path at which the compiler's command line came apart, and the fix.

    ``None`` if that is not what stopped it: another version of torch may quote its paths, and stumble over something
    else where there is a space.
    """
    words = [str(word) for failed in _commands(error) for word in failed.cmd]
    for place in _places():
        if any(word.endswith(place.path.split()[0]) for word in words):  # the first piece, up to the space
            return f"torch's compiler cannot read a path with a space, and {place.name} {place.path!r}: {place.fix}"
    return None


def _commands(error: BaseException | None) -> Iterator[subprocess.CalledProcessError]:
    """The commands whose failure led to an error."""
    while error is not None:
        if isinstance(error, subprocess.CalledProcessError) and isinstance(error.cmd, list | tuple):
            yield error
        error = error.__cause__ or error.__context__
