"""Errors of the tasks: data that cannot be used, and problems that cannot be posed."""

from __future__ import annotations

from diffopt.errors import DiffoptError


class DataError(DiffoptError, ValueError):
    """Data is missing, is not the file it should be, or holds too few classes or images."""


class ProblemError(DiffoptError, ValueError):
    """A problem or model cannot be built as described, or does not have the answer it was asked for."""
