"""The long form: ``python tests/fuzz/run.py 3000 [SEED] [--compiled]`` makes so many calls and prints what they gave.

A third of them have a loss or an argument that is to be refused. Of each kind of finding the smallest call is shown.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "oracles"))

import torch
from fuzz.calls import Call, calls
from fuzz.odd import OBJECTS
from fuzz.refused import Case, cases, fault_of
from fuzz.slots import SLOTS, fault_of_argument
from fuzz.verdict import Tally, Verdict, judge
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy


def main(count: int, start: int, compiled: bool) -> int:
    """Make the calls; the exit code says whether there was a finding."""
    torch.set_num_threads(1)
    tally, began = Tally(), time.monotonic()

    def judged(call: Call) -> None:
        verdict = judge(call)
        key = (call.mode, call.estimator.name, *sorted(call.loss.specials)[:1]) if not verdict.error else ()
        tally.add(f"mode {call.mode}", verdict, call, key)
        tally.by_estimator[call.estimator.name, verdict.outcome] += 1

    def refused(case: Case) -> None:
        tally.add(f"loss {case.name}", _refused(fault_of(case), case), case, (case.name,))

    modes = {"modes": ("autograd", "func", "grad_vmap", "vmap_grad", "backward")} if compiled else {}
    _visit(calls(**modes), judged if not compiled else lambda call: judged(_compiled(call)), count - count // 3, start)
    if not compiled:
        _visit(cases(), refused, count // 6, start)
        _arguments(tally, count // 6, start)
    print(tally.table())
    for place, (call, verdict) in tally.findings.items():
        print("\n", place, "\n", verdict, "\n", call)
    print(f"{time.monotonic() - began:.0f} s")
    return int(bool(tally.findings))


def _compiled(call: Call) -> Call:
    return Call(**{**vars(call), "compiled": True})


def _visit(drawn: SearchStrategy[Any], visit: Callable[[Any], None], count: int, start: int) -> None:
    """Show ``count`` examples to a function."""
    options: dict[str, Any] = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}

    @seed(start)
    @settings(max_examples=count, phases=[Phase.generate], **options)
    @given(drawn)
    def each(example: Any) -> None:
        visit(example)

    each()


def _arguments(tally: Tally, count: int, start: int) -> None:
    """Odd arguments, at random."""
    drawn = random.Random(start)
    for _ in range(count):
        slot, odd = drawn.choice(sorted(SLOTS)), drawn.choice(sorted(OBJECTS))
        fault = fault_of_argument(slot, odd)
        verdict = Verdict("raw error" if fault.startswith("raw") else fault, fault) if fault else Verdict("refused")
        tally.add(f"argument of {slot.split('(')[0]}", verdict, (slot, odd), (slot, odd))


def _refused(fault: str, case: Case) -> Verdict:
    if not fault:
        return Verdict("refused")
    return Verdict("raw error" if fault.startswith("raw") else "not refused", fault, fault[:60])


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    sys.exit(main(numbers[0] if numbers else 300, [*numbers, 0, 0][1], "--compiled" in sys.argv))
