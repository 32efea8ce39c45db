"""Estimators and optimizers that are not what they claim to be: each is caught, by the findings that must say so."""

from __future__ import annotations

import pytest
from broken_optimizers import BROKEN as BROKEN_OPTIMIZERS
from broken_rules import (
    BIASED,
    EXACT,
    AfterUnrolling,
    BeforeUnrolling,
    Changed,
    Eager,
    FallsBack,
    Forgetful,
    OtherNumbers,
    RefusesBatches,
    Saying,
    ShortSweep,
    Symmetric,
    WarmStarted,
    by_company,
    by_the_clock,
    clipped,
    constant_added,
    first_leaf_doubled,
    in_double,
    in_half,
    in_single,
    leaking,
    miscounting,
    negated,
    noisy,
    normalised_by_leaf,
    normalised_over_all_tasks,
    once,
    saying,
    schedules_reversed,
    very_noisy,
    with_infinite_slope,
    with_unwanted,
    without_buffers,
    without_hyperparameters,
    without_last_batch,
    writing,
    writing_grad,
    wrong_for_adam,
)
from limits import sampled

import diffopt
from diffopt.adjoint.claims import ALL_INPUTS
from diffopt.estimators import (
    Claims,
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

RANDOM = Claims(random=True, tolerance=1e-3)
NOT_LINEAR = Claims("never", linear=False)
FIXED_POINT = Claims("at the fixed point")

EXACTNESS = {
    "wrong sign": (Changed(negated), "exact: got 2"),
    "a dropped term": (Changed(without_hyperparameters), "hyperparameters: has a hypergradient: got 0", "exact: got"),
    "a dropped step": (ShortSweep(), "exact: got"),
    "ignores the final buffers": (
        Changed(before=without_buffers),
        "exact in the final buffers, and for sched",
    ),
    "schedules backwards": (Changed(schedules_reversed), "exact in the final buffers, and for sched"),
    "a dropped batch, biased": (Changed(without_last_batch, said=BIASED), "batches and schedules: sum"),
    "takes Jacobians for symmetric": (Symmetric(), "exact for a vector field: got"),
    "right for momentum only": (Changed(wrong_for_adam), "exact with Adam: got 5.0e-01"),
    "claims exact, is biased": (saying(Truncated(2), exact="always"), "exact: got"),
    "claims biased, is exact": (Changed(said=BIASED), "biased: got"),
    "claims the fixed point, is biased": (saying(Truncated(2), exact="at the fixed point"), "exact at the fixed point"),
    "the fixed point's negative": (Saying(Changed(negated), FIXED_POINT), "exact at the fixed point"),
    "claims the fixed point, is exact": (Changed(said=FIXED_POINT), "biased: got"),
    "less accurate than said": (saying(Implicit(), tolerance=1e-10), "exact at the fixed point"),
    "claims its own steps, takes none": (saying(Reverse(), own_steps=True), "takes steps of its own: got"),
    "takes its own steps, unsaid": (saying(MultiStep(2), own_steps=False), "takes the optimizer's steps"),
    "does not run": (Truncated(9), "does not run on 4 steps (StepsError)"),
}

INPUTS = {
    "claims every input, knows one": (saying(FirstOrder(), inputs=ALL_INPUTS), "args: has a hypergradient: got 0"),
    "claims one input, knows all": (saying(Truncated(2), inputs=frozenset({"init"})), "args: gets exact zeros"),
    "claims an initialisation that it ignores": (saying(Implicit(), inputs=ALL_INPUTS), "init: has a hypergradient"),
    "knows an initialisation, unsaid": (saying(Truncated(2), inputs=ALL_INPUTS - {"init"}), "init: gets exact zeros"),
    "depends on its company": (Changed(by_company, said=BIASED), "init: the same alone"),
    "depends on the order of leaves": (Changed(first_leaf_doubled, said=BIASED), "the order of the leaves"),
    "returns single precision": (Changed(in_single), "float64: returns tensors like the inputs: got no"),
    "returns double precision": (Changed(in_double), "float32: returns tensors like the inputs: got no"),
    "loses precision": (Changed(in_half), "float32: the numbers of float64"),
    "NaN": (
        BeforeUnrolling(with_infinite_slope),
        "float64: derivatives are finite: got no",
        "float32: derivatives are finite: got no",
        "uses nothing or one leaf: got no",
    ),
}

LINEARITY = {
    "clips": (Changed(before=clipped, said=BIASED), "\nlinear in the outer gradient"),
    "adds a constant": (Changed(constant_added, said=BIASED), "zero for a zero outer gradient"),
    "claims not to be linear, is": (saying(Truncated(2), linear=False), "not linear in the outer gradient"),
    "minimises": (saying(Krylov(3), linear=True), "\nlinear in the outer gradient"),
    "points nowhere": (saying(Reptile(), linear=True), "zero for a zero outer gradient"),
    "NaN at a zero cotangent": (
        Changed(before=normalised_by_leaf, said=NOT_LINEAR),
        "linearity: got NonFiniteGradientError, expected no error; ",
    ),
}

TASKS = {
    "mixes tasks": (
        Changed(before=normalised_over_all_tasks, said=NOT_LINEAR),
        "vmap, then backward: as in",
        "vmap of grad: as in",
        "vmap of vmap, on other axes: as in",
    ),
    "claims not to batch, does": (saying(Reverse(), vmap=False), "refuses vmap, then backward: got no error"),
    "refuses batches by an untyped error": (RefusesBatches(ValueError), "refuses vmap of grad: got ValueError"),
    "claims to batch, refuses": (Saying(RefusesBatches(), EXACT), "tasks: got GradModeError, expected no error; "),
    "one draw for all tasks": (
        Changed(noisy, said=RANDOM),
        "every task draws for itself: got",
        "vmap of grad: the mean of a loop",
    ),
}

RANDOMNESS = {
    "keeps state between calls": (WarmStarted(), "repeats itself to the bit"),
    "right only once": (Changed(once), "a second backward pass agrees"),
    "draws, unsaid": (
        Changed(noisy, said=BIASED),
        "draws nothing from torch's generator: got no",
        "repeats itself to the bit",
    ),
    "follows another generator": (
        Changed(by_the_clock, said=Claims(random=True, tolerance=0.1)),
        "the same seed: the same numbers",
    ),
    "claims to draw, does not": (saying(Reverse(), random=True), "other draws: other numbers: got 0"),
    "another mean": (Saying(Changed(negated), RANDOM), "exact: got 2"),
    "too noisy to tell": (Changed(very_noisy, said=RANDOM), "precise enough to test"),
    "coarse differences": (saying(ESJacobian(64, 0.3), tolerance=1e-6), "exact: got"),
    "draws a loss's numbers anew": (
        OtherNumbers(),
        "a loss with dropout: exact or refused: got",
        "a loss with dropout: the generator moves on as in a loop: got no",
    ),
}

CONDUCT = {
    "writes on its inputs": (Changed(writing), "leaves its inputs alone: got no"),
    "writes .grad": (Changed(writing_grad), "writes no .grad: got no"),
    "needs second derivatives, unsaid": (saying(Reverse(), second_derivatives=False), "MissingDerivativeError"),
    "claims to need second derivatives": (saying(FirstOrder(), second_derivatives=True), "refuses a loss without"),
    "falls back": (FallsBack(), "needs no second derivatives"),
    "claims a second order": (saying(Reverse(), twice=True), "SecondDerivativeError"),
    "has a second order, unsaid": (saying(Unrolled(), twice=False), "refuses to be differentiated twice: got no error"),
    "another second order": (AfterUnrolling(Forgetful.apply), "its derivative is that of central differences"),
    "counts wrongly": (
        Changed(miscounting),
        "all in them at most: got 5, expected 4 to 4",
        "depth: the batches that the loss saw, or fewer if some need not wait: got 5, expected 1 to 4",
        "gradients: those that the loss saw, but for one per product: got 54, expected 0 to 4",
    ),
    "counts nothing": (
        saying(Unrolled(), reports=True),
        "all in them at most: got 0, expected 4 to 4",
        "bytes of states that outlive the rollout",
    ),
    "claims no report, reports": (saying(Reverse(), reports=False), "reports nothing: got"),
    "leaks": (Changed(leaking), "outlive the backward pass"),
    "works for nobody": (
        Eager(),
        "no input wanted: gradients: got 8",
        "no input wanted: products: got 4",
        "only init wanted: derivatives in what the loss reads",
        "only hyperparameters wanted: derivatives in what the loss reads",
    ),
    "returns what nobody wants": (Changed(with_unwanted), "only init wanted: terms for others"),
}

BROKEN_RULES = EXACTNESS | INPUTS | LINEARITY | TASKS | RANDOMNESS | CONDUCT


@pytest.mark.parametrize("name", sampled(BROKEN_RULES, 8))
def test_a_broken_rule_is_caught(name):
    rule, *findings = BROKEN_RULES[name]
    with pytest.raises(diffopt.ConformanceError) as caught:
        check_estimator(rule)
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


def test_a_rule_that_is_wrong_for_fields_only_fails_for_them_only():
    with pytest.raises(diffopt.ConformanceError) as caught:
        check_estimator(Symmetric())
    assert "\nexact: got" not in str(caught.value)  # of its numbers; its counts are another matter


def test_an_honest_refusal_of_fields_passes():
    findings = {f.claim: f for f in check_estimator(Implicit(ConjugateGradient(rtol=1e-9))).findings}
    assert findings["exact for a vector field"].measured == "LinearSolveError"


def test_an_honest_refusal_of_batches_passes():
    findings = {f.claim: f for f in check_estimator(RefusesBatches()).findings}
    assert findings["refuses vmap of grad"].measured == "GradModeError"
