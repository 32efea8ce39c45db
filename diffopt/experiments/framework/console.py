"""Where the commands print: what they say appears as it is written."""

from __future__ import annotations

from rich.console import Console


def plain_console() -> Console:
    """A console for which brackets are no markup (``time [ms]``), colons no emoji, and numbers nothing to colour."""
    return Console(highlight=False, markup=False, emoji=False)
