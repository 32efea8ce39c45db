"""Estimators and optimizers that are not what they claim to be: each is caught, by the findings that must say so."""

from __future__ import annotations

from typing import Any

import pytest
from broken_optimizers import BROKEN as BROKEN_OPTIMIZERS
from broken_rules import BROKEN as BROKEN_RULES
from broken_rules import Changed, RefusesBatches, Symmetric, negated, saying
from limits import sampled

import diffopt
from diffopt.adjoint.claims import ALL_INPUTS
from diffopt.estimators import (
    ESJacobian,
    FirstOrder,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.linear_solve import ConjugateGradient
from diffopt.testing import check_estimator, check_optimizer

NO_REPORT = ("all in them at most: got 0, expected 4 to 4", "bytes of states that outlive the rollout")
# a shipped estimator, the claim that is changed, the findings that must say so
CLAIMED: list[tuple[Any, ...]] = [
    (Truncated(2), "exact", "always", "exact: got"),
    (Truncated(2), "exact", "at the fixed point", "exact at the fixed point"),
    (Truncated(2), "inputs", frozenset({"init"}), "args: gets exact zeros"),
    (Truncated(2), "inputs", ALL_INPUTS - {"init"}, "init: gets exact zeros"),
    (Truncated(2), "linear", False, "not linear in the outer gradient"),
    (Implicit(), "tolerance", 1e-10, "exact at the fixed point"),
    (Implicit(), "inputs", ALL_INPUTS, "init: has a hypergradient"),
    (FirstOrder(), "inputs", ALL_INPUTS, "args: has a hypergradient: got 0"),
    (FirstOrder(), "second_derivatives", True, "refuses a loss without"),
    (Krylov(3), "linear", True, "\nlinear in the outer gradient"),
    (Reptile(), "linear", True, "zero for a zero outer gradient"),
    (MultiStep(2), "own_steps", False, "takes the optimizer's steps"),
    (Reverse(), "own_steps", True, "takes steps of its own: got"),
    (Reverse(), "vmap", False, "refuses vmap, then backward: got no error"),
    (Reverse(), "random", True, "other draws: other numbers: got 0"),
    (Reverse(), "second_derivatives", False, "MissingDerivativeError"),
    (Reverse(), "twice", True, "SecondDerivativeError"),
    (Reverse(), "reports", False, "reports nothing: got"),
    (ESJacobian(64, 0.3), "tolerance", 1e-6, "exact: got"),
    (Unrolled(), "twice", False, "refuses to be differentiated twice: got no error"),
    (Unrolled(), "reports", True, *NO_REPORT),
]
BROKEN_RULES |= {
    f"{estimator}, {claim} {value}: {findings[0]}": (saying(estimator, **{claim: value}), findings)
    for estimator, claim, value, *findings in CLAIMED
}


@pytest.mark.parametrize("name", sampled(BROKEN_RULES, 8))
def test_a_broken_estimator_is_caught(name):
    estimator, findings = BROKEN_RULES[name]
    with pytest.raises(diffopt.ConformanceError) as caught:
        check_estimator(estimator)
    for finding in findings:
        assert finding in str(caught.value)


@pytest.mark.parametrize("name", BROKEN_OPTIMIZERS)
def test_a_broken_optimizer_is_caught(name):
    optimizer, reference, finding = BROKEN_OPTIMIZERS[name]
    with pytest.raises(diffopt.ConformanceError) as caught:
        check_optimizer(optimizer, reference=reference)
    assert finding in str(caught.value)


def test_the_error_names_the_claim_the_number_the_limit_and_what_to_check():
    with pytest.raises(diffopt.ConformanceError) as caught:
        check_estimator(Changed(negated))
    text = "exact: got 2.0e+00, expected <= 1.0e-09; check signs, dropped terms and steps"
    assert text in str(caught.value)
    assert "exact                      " in caught.value.table
    assert caught.value.table.count("  FAIL  ") == caught.value.table.count("\n    fix: check ") >= 2


def test_an_estimator_that_is_wrong_for_fields_only_fails_for_them_only():
    with pytest.raises(diffopt.ConformanceError) as caught:
        check_estimator(Symmetric())
    assert "\nexact: got" not in str(caught.value)  # of its numbers; its counts are another matter


def test_an_honest_refusal_of_fields_passes():
    findings = {f.claim: f for f in check_estimator(Implicit(ConjugateGradient(rtol=1e-9))).findings}
    assert findings["exact for a vector field"].measured == "LinearSolveError"


def test_an_honest_refusal_of_batches_passes():
    findings = {f.claim: f for f in check_estimator(RefusesBatches()).findings}
    assert findings["refuses vmap of grad"].measured == "GradModeError"
