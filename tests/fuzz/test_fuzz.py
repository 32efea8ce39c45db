"""A short fuzz of the public interface; ``DIFFOPT_FUZZ=3000`` makes it long (and ``tests/fuzz/run.py`` counts)."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import answers
from fuzz.calls import MODES, Call, calls
from fuzz.odd import OBJECTS
from fuzz.refused import TABLE, Case, cases, fault_of
from fuzz.slots import SLOTS, fault_of_argument
from fuzz.verdict import Tally, judge
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

LONG = int(os.environ.get("DIFFOPT_FUZZ", "0"))
COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
OPTIONS = {**COMMON, "phases": [Phase.generate, Phase.shrink]} if LONG else {**COMMON, "derandomize": True}


def examples(short: int) -> int:
    """How many calls a test makes."""
    return LONG or short


@pytest.mark.timeout(300 + LONG)
@settings(max_examples=examples(75), **OPTIONS)
@given(calls())
def test_a_call_ends_in_the_number_of_a_plain_loop_or_in_a_typed_refusal(call: Call) -> None:
    verdict = judge(call)
    assert verdict.good, f"{verdict}\n{call}"


@pytest.mark.timeout(300 + LONG)
@settings(max_examples=examples(120), **OPTIONS)
@given(cases())
def test_a_loss_that_cannot_be_minimised_is_refused_whatever_else_is_given(case: Case) -> None:
    fault = fault_of(case)
    assert not fault, f"{fault}\n{case}"


@pytest.mark.timeout(300 + LONG)
@settings(max_examples=examples(600), **OPTIONS)
@given(st.sampled_from(sorted(SLOTS)), st.sampled_from(sorted(OBJECTS)))
def test_an_argument_of_any_kind_is_taken_or_refused_by_a_typed_error(slot: str, odd: str) -> None:
    fault = fault_of_argument(slot, odd)
    assert not fault, f"{slot} given {odd}: {fault}"


@pytest.mark.slow
@pytest.mark.parametrize("slot", sorted(SLOTS))
def test_every_argument_is_taken_or_refused_by_a_typed_error(slot: str) -> None:
    faults = {odd: fault_of_argument(slot, odd) for odd in OBJECTS}
    assert {odd: fault for odd, fault in faults.items() if fault} == {}


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="compiles for minutes; part of the long form")
@settings(max_examples=12, **COMMON)
@given(calls(modes=("autograd", "func", "grad_vmap")).map(lambda call: Call(**{**vars(call), "compiled": True})))
def test_a_compiled_call_gives_the_same_number(call: Call) -> None:
    verdict = judge(call)
    assert verdict.good, f"{verdict}\n{call}"


def test_the_grammar_reaches_every_mode_and_almost_every_number_has_an_oracle() -> None:
    """A fuzz that draws nothing but refusals would hold anything."""
    tally = Tally()

    @settings(max_examples=45, derandomize=True, phases=[Phase.generate], **COMMON)
    @given(calls(modes=tuple(mode for mode in MODES if mode not in ("inference", "second", "checkpointed"))))
    def visit(call: Call) -> None:
        tally.add(call.mode, judge(call), call, ())

    visit()
    outcomes = [outcome for (_, outcome), count in tally.counts.items() for _ in range(count)]
    assert outcomes.count("equal") > len(outcomes) / 2
    assert len({mode for mode, _ in tally.counts}) >= 8


def test_a_wrong_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's own fault: with its gradients doubled, every call is a finding."""
    plain, call = answers.expected, _first_call()
    monkeypatch.setattr(answers, "expected", lambda *given: [2 * g + 1 for g in plain(*given) or []])
    assert judge(call).outcome == "silent: hypergradient"
    monkeypatch.undo()
    assert judge(call).outcome == "equal"


def _first_call() -> Call:
    found: list[Call] = []

    @settings(max_examples=20, derandomize=True, phases=[Phase.generate], **COMMON)
    @given(calls(modes=("autograd",)))
    def visit(call: Call) -> None:
        if not found and judge(call).outcome == "equal" and call.steps > 1 and not call.frozen:
            found.append(call)

    visit()
    return found[0]


@pytest.mark.slow
def test_the_long_form_runs(checkout: Path) -> None:
    """A program of its own, which finds by itself what pytest is told of in pyproject.toml."""
    command = [sys.executable, str(checkout / "tests" / "fuzz" / "run.py"), "6", "1"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 calls, 0 kinds of findings" in done.stdout


def test_every_odd_object_can_be_made_and_every_place_takes_something_right() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(make() is not NotImplemented or name == "not_implemented" for name, make in OBJECTS.items())
    assert len(OBJECTS) >= 80
    assert len(SLOTS) >= 100
    assert len(TABLE) >= 25
    assert torch.is_grad_enabled()
