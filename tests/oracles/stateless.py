"""What the optimizers that tests write for themselves begin with."""

from __future__ import annotations

from typing import Any

import diffopt


class Stateless(diffopt.Optimizer):
    """An optimizer that keeps no buffers."""

    def init(self, params: diffopt.Leaves) -> dict[str, Any]:
        return {}
