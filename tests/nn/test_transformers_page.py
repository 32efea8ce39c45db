"""The code of the section on transformers, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs `pip install torch-diffopt[transformers]`")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of transformers
def test_the_code_of_the_page_runs(checkout: Path) -> None:
    page = (checkout / "docs" / "large" / "transformers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    found = [names["of_weights"], names["of_mixture"], names["of_rates"], *names["of_initialisation"]]
    assert all(x.isfinite().all() and x.any() for x in found)
    assert len(names["params"]) == 2 * 2
