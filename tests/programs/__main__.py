"""``PYTHONPATH=tests:tests/oracles python -m programs``: run all programs and print the table."""

from __future__ import annotations

import torch
from programs import families
from programs.table import markdown

torch.set_default_dtype(torch.float64)
print(markdown(families.TABLE))
