"""Names of the buffers of optimizers within others, apart from those of the others."""

from __future__ import annotations

from diffopt.optimizers.base import Buffers


def named_apart(name: str, buffers: Buffers) -> Buffers:
    """The buffers under ``name.`` and what they are called."""
    return {f"{name}.{key}": buffer for key, buffer in buffers.items()}


def of_name(name: str, buffers: Buffers) -> Buffers:
    """Those under ``name.``, as they are called where they belong."""
    start = f"{name}."
    return {key[len(start) :]: buffer for key, buffer in buffers.items() if key.startswith(start)}
