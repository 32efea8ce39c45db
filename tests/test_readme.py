"""The README's program runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def test_the_first_program_lowers_the_validation_loss(checkout: Path):
    blocks = re.findall(r"```python\n(.*?)```", (checkout / "README.md").read_text(), flags=re.DOTALL)
    program = blocks[0].replace("outer_loss.backward()", "outer_loss.backward(); losses.append(outer_loss.item())")
    names: dict[str, Any] = {"losses": []}
    exec(compile(program, "README.md", "exec"), names)
    assert len(names["losses"]) == 30
    assert names["losses"][-1] < 0.8 * names["losses"][0]
    assert names["log_penalty"].grad.isfinite().all()
