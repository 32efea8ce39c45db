"""The public battery: what is shipped passes, and so does what a user writes; what is broken: test_broken.py."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from broken_optimizers import AdaBelief
from cases import ESTIMATORS, OPTIMIZERS, OptimizerCase
from compositions import COMPOSITIONS, kinds
from limits import sampled

import diffopt
import diffopt.estimators
import diffopt.prox
from diffopt.comparing.comparison import brief
from diffopt.estimators import (
    Adjoint,
    Claims,
    Cotangents,
    ESJacobian,
    FirstOrder,
    Implicit,
    Keep,
    Reverse,
    Trajectory,
    Truncated,
)
from diffopt.linear_solve import ConjugateGradient
from diffopt.testing import check_estimator, check_optimizer

TORCH: dict[str, tuple[diffopt.Optimizer, Any]] = {
    "sgd": (diffopt.SGD(0.05, 0.9, 0.4, 0.1), lambda p: torch.optim.SGD(p, 0.05, 0.9, 0.4, 0.1)),
    "adam": (diffopt.Adam(0.05), lambda p: torch.optim.Adam(p, 0.05)),
    "adamw": (diffopt.AdamW(0.05, amsgrad=True), lambda p: torch.optim.AdamW(p, 0.05, amsgrad=True)),
    "rmsprop": (diffopt.RMSprop(0.02, centered=True), lambda p: torch.optim.RMSprop(p, 0.02, centered=True)),
    "adagrad": (diffopt.Adagrad(0.1, 0.3), lambda p: torch.optim.Adagrad(p, 0.1, 0.3)),
}


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


TREES: dict[str, tuple[diffopt.Optimizer, Any]] = {
    "kronecker": (
        diffopt.Preconditioned(0.01, diagonal={"w": leaf(2, 3)}, factors={"w": (leaf(2, 2), None)}),
        {"w": leaf(2, 3)},
    ),
    "center": (diffopt.ProximalGD(0.1, 0.5, center={"a": leaf(2)}), {"a": 2 * leaf(2)}),
    "vectors": (diffopt.Adam(leaf(3).abs() / 9, betas=(leaf(3).abs() / 9, 0.9)), leaf(3)),
    "schedules": (diffopt.SGD(diffopt.Schedule([0.1, 0.2, 0.3, 0.4]), diffopt.Schedule(leaf(4).abs() / 9)), None),
    "learned": (diffopt.Adam(leaf().abs() / 9, betas=(diffopt.Schedule(leaf(4).abs() / 9), 0.9)), None),
}


@pytest.mark.parametrize("estimator", sampled(ESTIMATORS, 6), ids=lambda e: re.sub(" object at 0x\\w+", "", brief(e)))
def test_every_shipped_estimator_is_what_it_claims(estimator):
    report = check_estimator(estimator)
    assert report.broken == ()
    assert len(report.findings) >= 30


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_every_shipped_optimizer_keeps_its_contract(case: OptimizerCase):
    report = check_optimizer(case.optimizer(case.learned))
    derivatives = {f.claim for f in report.findings if f.claim.endswith("derivative")}
    assert len(derivatives) >= 4 + len(case.learned)


@pytest.mark.parametrize("name", TORCH)
def test_every_shipped_optimizer_equals_its_reference(name):
    optimizer, reference = TORCH[name]
    assert "the steps of" in str(check_optimizer(optimizer, reference=reference, steps=8))


@pytest.mark.parametrize("name", TREES)
def test_trees_and_schedules_in_an_optimizers_fields(name):
    optimizer, params = TREES[name]
    check_optimizer(optimizer, params=params)


def test_nothing_shipped_is_left_out():
    estimators = [getattr(diffopt.estimators, name) for name in diffopt.estimators.__all__]
    concrete = {c for c in estimators if issubclass(c, diffopt.estimators.Estimator) and not inspect.isabstract(c)}
    assert {type(estimator) for estimator in ESTIMATORS} == concrete
    shipped = [c for c in vars(diffopt).values() if inspect.isclass(c) and issubclass(c, diffopt.Optimizer)]
    composed = {kind for case in COMPOSITIONS for kind in kinds(case.made(**case.hypers())[0])}
    shipped += [getattr(diffopt.prox, name) for name in diffopt.prox.__all__]
    assert {case.make for case in OPTIMIZERS} | composed == {c for c in shipped if not inspect.isabstract(c)}


@dataclass(frozen=True)
class Between(Adjoint):
    """A user's own estimator: part of the way from the first-order estimator to the exact one."""

    share: float

    def claims(self, steps: int) -> Claims:
        return Claims("always" if self.share == 1 else "never")

    def keep(self, steps: int) -> Keep:
        return Keep(first=1, checkpoint="sqrt")

    def pullback(self, trajectory: Trajectory, cotangent: diffopt.Leaves) -> Cotangents:
        exact = trajectory.sweep(cotangent)
        initial = None
        if exact.initial is not None:
            initial = self.share * exact.initial + (1 - self.share) * cotangent
        return Cotangents(initial, {place: self.share * term for place, term in exact.direct.items()})


@dataclass(frozen=True)
class Misaligned(Adjoint):
    """Keeps from one step on and sweeps to another."""

    checkpoint: Any

    def keep(self, steps: int) -> Keep:
        return Keep(1, self.checkpoint)

    def pullback(self, trajectory: Trajectory, cotangent: diffopt.Leaves) -> Cotangents:
        return trajectory.sweep(cotangent, first=3)


@pytest.mark.parametrize("checkpoint", ["graph", 1, 2])
def test_a_sweep_to_another_step_than_was_kept_is_refused(checkpoint):
    with pytest.raises(
        diffopt.ConformanceError, match=r"\(EstimatorError\), .*; sweep\(first=3\): the estimator keeps steps from 1 on"
    ):
        check_estimator(Misaligned(checkpoint))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_users_own_estimator_gets_the_same_battery(share):
    check_estimator(Between(share))
    with pytest.raises(diffopt.ConformanceError, match="exact: got" if share < 1 else "biased: got"):
        check_estimator(Between(share), claims=Claims("always" if share < 1 else "never"))


@dataclass(frozen=True)
class HeavyBall(diffopt.Optimizer):
    """A user's own optimizer, with a norm that mixes coordinates."""

    lr: Any
    momentum: Any

    def init(self, params):
        return {"before": params}

    def update(self, params, grads, buffers, step):
        size = 1 + sum(g.square().sum() for g in grads)
        step = self.momentum * (params - buffers["before"]) - self.lr * grads.map(lambda g: g / size)
        return params + step, {"before": params}


def test_a_users_own_optimizer_gets_the_same_battery():
    check_optimizer(HeavyBall(0.1, torch.tensor(0.5)))


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10])
def test_a_small_hyperparameter_is_moved_by_less_than_itself(size):
    """An ``eps`` under a root; a step size."""
    check_optimizer(AdaBelief(0.05, eps=size))
    check_optimizer(diffopt.SGD(size, momentum=0.9, weight_decay=size))


def test_claims_may_be_sharper_than_the_estimators_own():
    """Tight solves and a full frame of directions are as good as exact, and must then be."""
    tight = Implicit(ConjugateGradient(rtol=1e-12))
    check_estimator(tight, claims=replace(tight.claims(4), tolerance=1e-8))
    frame = ESJacobian(64, 1e-4)
    check_estimator(frame, claims=replace(frame.claims(4), tolerance=1e-6))


def test_the_steps_decide_what_is_claimed():
    assert Truncated(3).claims(3).exact == "always"
    assert Truncated(3).claims(4).exact == "never"
    check_estimator(Truncated(3), steps=3)


def test_the_report_is_a_table():
    lines = str(check_estimator(Reverse())).splitlines()
    assert lines[0] == "Reverse()"
    assert lines[1].split() == ["check", "outcome", "measured", "expected"]
    assert all("  ok  " in line for line in lines[3:-1])
    assert lines[-1] == f"none of {len(lines) - 4} checks failed"


def test_the_battery_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    check_estimator(FirstOrder())
    check_optimizer(diffopt.SGD(0.1))
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(()))


def test_nobody_pays_for_the_battery_who_does_not_use_it():
    code = "import sys, diffopt; assert 'diffopt.testing' not in sys.modules; import diffopt.testing; "
    code += "assert not {'pytest', 'hypothesis'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
