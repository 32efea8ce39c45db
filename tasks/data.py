"""Where data lies, and whether a file is the one it claims to be."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from diffopt.tasks.errors import DataError

ENVIRONMENT_VARIABLE = "DIFFOPT_DATA"
HOW_TO_SET = f"say where the data is with --data-dir, the argument `folder` or the variable {ENVIRONMENT_VARIABLE}"


def data_folder(folder: str | Path | None = None) -> Path:
    """The folder that data is read from; nothing is created and nothing is downloaded.

    The first of: ``folder``; the environment variable ``DIFFOPT_DATA`` if it is set and not empty;
    ``diffopt`` in the user's cache directory (``XDG_CACHE_HOME``, else ``~/.cache``). A leading ``~`` is
    expanded.
    """
    if folder is not None:
        return Path(folder).expanduser()
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffopt"


@final
@dataclass(frozen=True)
class KnownFile:
    """A file whose every byte is known.

    Attributes:
        name: the file's name.
        size: in bytes.
        sha256: in hexadecimal.
    """

    name: str
    size: int
    sha256: str

    def read(self, folder: Path) -> bytes:
        """The content of this file in ``folder``, once its size and SHA-256 are found right.

        Raises:
            DataError: the file is not there or cannot be read, or its size or SHA-256 is wrong.
        """
        path = folder / self.name
        try:
            size = path.stat().st_size
            if size != self.size:
                raise DataError(f"{path} has {size:,} bytes; expected {self.size:,}. {_DAMAGED}")
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; {HOW_TO_SET}") from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise DataError(f"{path} has SHA-256 {digest}; expected {self.sha256}. {_DAMAGED}")
        return content


_DAMAGED = "The download was cut short or this is another file: delete it and download it again"
