"""The tests under four settings of the processor's arithmetic: ``make roundings``, or with arguments of pytest.

Each setting adds up in another order, or with other kernels, and so rounds otherwise; what a test asserts must hold
under each. A machine can only show the sets of instructions that it has, so the last two say most on one with AVX-512.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch

SETTINGS = {
    "the processor's own": {},
    "no vector instructions": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "matrix products alike on all processors": {"MKL_CBWR": "COMPATIBLE"},
}


def run(name: str, setting: dict[str, str], arguments: list[str]) -> str:
    """The row of one setting: how its tests went, and how long they took."""
    print(f"=== {name}: {' '.join(f'{key}={value}' for key, value in setting.items()) or 'nothing set'}", flush=True)
    inherited = {key: value for key, value in os.environ.items() if key not in ("ATEN_CPU_CAPABILITY", "MKL_CBWR")}
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "pytest", *arguments], env={**inherited, **setting}).returncode
    return f"{'passed' if code == 0 else 'FAILED':8}{time.monotonic() - start:7.0f} s   {name}"


def main() -> int:
    """Run every setting, whatever the others found; 1 if a test failed under any."""
    rows = [run(name, setting, sys.argv[1:]) for name, setting in SETTINGS.items()]
    print(f"=== on {torch.backends.cpu.get_cpu_capability()}", *rows, sep="\n")
    return int(any(row.startswith("FAILED") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
