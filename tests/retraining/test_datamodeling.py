"""``diffopt.datamodeling_score``: beside closed forms; in other threads and processes; refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
import torch
from weighted_ridge import FEATURES, ONES, SAMPLES, Killed, Ridge, drifting, same

import diffopt
from diffopt import datamodeling_score
from diffopt.errors import (
    DisconnectedError,
    EstimateWarning,
    GradModeError,
    HyperparameterError,
    LeafError,
    LossError,
    NonFiniteLossError,
    ShapeError,
)
from diffopt.retraining.trainings import random_subsets

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3])
def test_measured_changes_are_those_of_the_closed_form(fraction):
    ridge = Ridge()
    scores = diffopt.attribute(ridge.trained, ridge.predicted, ONES)
    found = datamodeling_score(ridge.trained, ridge.predicted, ONES, scores, fraction=fraction, subsets=6)
    assert found.left_out.shape == (6, max(1, round(fraction * SAMPLES)))
    at = ridge.minimiser(ONES)
    for chosen, measured, predicted in zip(found.left_out, found.measured, found.predicted, strict=True):
        kept = torch.ones(SAMPLES, dtype=torch.bool)
        kept[chosen] = False
        curvature = ridge.x[kept].T @ ridge.x[kept] + ridge.penalty * torch.eye(FEATURES)
        fewer = torch.linalg.solve(curvature, ridge.x[kept].T @ ridge.y[kept])
        torch.testing.assert_close(measured, ridge.queries @ (fewer - at), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(predicted, -scores[:, chosen].sum(1))
    assert found.score == pytest.approx(found.per_metric.mean().item())


def test_where_the_training_is_linear_in_the_weights_the_score_is_one_to_round_off():
    for penalty, close in ((1e3, 1e-1), (1e5, 1e-3)):
        ridge = Ridge(penalty)  # its minimiser is X' W y / penalty, but for the square of 1 / penalty
        found = datamodeling_score(ridge.minimiser, ridge.predicted, ONES, ridge.scores(), fraction=0.25, subsets=40)
        torch.testing.assert_close(found.predicted, found.measured, rtol=close, atol=close / penalty)
    assert found.per_metric.tolist() == [1.0] * 4
    assert (found.score, found.interval) == (1.0, (1.0, 1.0))


@pytest.mark.parametrize("shape", [(SAMPLES,), (3, 4), (SAMPLES, 1)], ids=str)
def test_a_weight_that_is_not_one_is_taken_away_whole(shape):
    ridge = Ridge(1e6)
    weights = torch.linspace(0.5, 3, SAMPLES).reshape(shape)

    def train(w):
        return ridge.minimiser(w.reshape(-1))

    scores = diffopt.attribute(train, ridge.predicted, weights)
    found = datamodeling_score(train, ridge.predicted, weights, scores, fraction=0.2, subsets=10)
    torch.testing.assert_close(found.predicted, found.measured, rtol=1e-4, atol=1e-10)
    for chosen, predicted in zip(found.left_out, found.predicted, strict=True):
        lost = sum(scores.reshape(4, -1)[:, i] * weights.reshape(-1)[i] for i in chosen)
        torch.testing.assert_close(predicted, -lost)


def test_scores_of_the_wrong_sign_score_minus_one_and_a_scalar_is_one_metric():
    ridge = Ridge(1e5)
    scores = diffopt.attribute(ridge.minimiser, lambda p: ridge.predicted(p).sum(), ONES)
    found = datamodeling_score(ridge.minimiser, lambda p: ridge.predicted(p).sum(), ONES, -scores, subsets=8)
    assert found.score == pytest.approx(-1)
    assert found.per_metric.shape == (1,)
    assert found.of(scores).score == pytest.approx(1)
    assert found.of(scores[None]).score == pytest.approx(1)
    with pytest.raises(LeafError, match="scores is list"):
        found.of([1.0] * SAMPLES)
    with pytest.raises(ShapeError, match=r"\(1,\) \+ \(12,\)"):
        found.of(torch.stack([scores, scores]))


def test_other_scores_beside_the_same_trainings():
    ridge = Ridge()
    other = torch.randn(4, SAMPLES, generator=torch.Generator().manual_seed(3))
    first = datamodeling_score(ridge.minimiser, ridge.predicted, ONES, ridge.scores(), fraction=0.2, subsets=12)
    calls = ridge.calls
    found = first.of(other)
    assert ridge.calls == calls
    assert same(found, datamodeling_score(ridge.minimiser, ridge.predicted, ONES, other, fraction=0.2, subsets=12))
    assert found.score < first.score
    with pytest.raises(ShapeError, match=r"\(4,\) \+ \(12,\)"):
        first.of(other[:3])


def test_what_is_left_out_is_random_and_repeatable():
    chosen = random_subsets(50, 7, 30, seed=2)
    assert all(len(set(row.tolist())) == 7 for row in chosen)
    assert chosen.unique().tolist() == list(range(50))
    assert torch.equal(chosen[:10], random_subsets(50, 7, 10, seed=2))
    assert not torch.equal(chosen, random_subsets(50, 7, 30, seed=3))


def test_a_training_by_hand_is_taken_too_and_what_is_given_is_left_alone():
    ridge = Ridge()
    weights = torch.ones(SAMPLES, requires_grad=True)

    def train(w):
        p = torch.zeros(FEATURES, requires_grad=True)
        optimizer = torch.optim.SGD([p], lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            ((w * (ridge.x @ p - ridge.y).square()).sum() / 2 + ridge.penalty * p.square().sum() / 2).backward()
            optimizer.step()
        w.zero_()  # it is this training's own
        return p

    found = datamodeling_score(train, ridge.predicted, weights, ridge.scores(), fraction=0.1, subsets=5)
    right = datamodeling_score(ridge.minimiser, ridge.predicted, ONES, ridge.scores(), fraction=0.1, subsets=5)
    torch.testing.assert_close(found.measured, right.measured, rtol=1e-4, atol=1e-6)
    assert weights.grad is None
    assert weights.detach().equal(ONES)
    assert not found.measured.requires_grad


def test_it_says_what_it_found():
    ridge = Ridge(1e6)
    found = datamodeling_score(ridge.minimiser, ridge.predicted, ONES, ridge.scores(), fraction=0.2, subsets=5)
    said = str(found)
    assert "score 1.000 (95 % interval 1.000 to 1.000)" in said
    assert "5 trainings without 2 of 12, 4 metrics" in said


def test_threads_find_the_same_bits(tmp_path):
    ridge = Ridge()
    scores = diffopt.attribute(ridge.trained, ridge.predicted, ONES)
    alone = datamodeling_score(ridge.trained, ridge.predicted, ONES, scores, subsets=6)
    with ThreadPoolExecutor(2) as threads:
        options = {"executor": threads, "path": tmp_path / "trainings.jsonl"}
        found = datamodeling_score(ridge.trained, ridge.predicted, ONES, scores, subsets=6, **options)
    assert same(alone, found)


def test_a_training_that_fails_in_another_thread_ends_the_call():
    ridge, done = Ridge(), []

    def train(w):
        if not w.all():
            time.sleep(0.02 if done else 0)  # what comes after the first is slow: there is time to stop it
            done.append(1)
            raise Killed
        return ridge.minimiser(w)

    with ThreadPoolExecutor(1) as threads, pytest.raises(Killed):
        datamodeling_score(train, ridge.predicted, ONES, ridge.scores(), subsets=200, executor=threads)
    assert len(done) < 100


PROGRAM = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import torch, diffopt

x = torch.linspace(-1, 2, 20, dtype=torch.float64)

def loss(p, weights):
    return (weights * (p - x) ** 4).mean()

def train(weights):
    return diffopt.solve(loss, x.new_zeros(()), weights, optimizer=diffopt.SGD(0.05), steps=20).params

def metric(p):
    return torch.stack([p, p.sin()])

if __name__ == "__main__":
    torch.set_num_threads(1)
    ones = torch.ones_like(x)
    scores = diffopt.attribute(train, metric, ones)
    alone = diffopt.datamodeling_score(train, metric, ones, scores, subsets=4)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        found = diffopt.datamodeling_score(train, metric, ones, scores, subsets=4, executor=processes)
    assert torch.equal(alone.measured, found.measured), (alone.measured, found.measured)
    print(found)
"""


@pytest.mark.slow
def test_processes_find_the_same_bits(tmp_path, checkout):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "4 trainings without 1 of 20, 2 metrics" in done.stdout


def test_a_training_that_is_not_repeatable_is_warned_of():
    ridge = Ridge()
    with pytest.warns(EstimateWarning, match="make the training the same each time"):
        found = datamodeling_score(drifting(ridge, 1.0), ridge.predicted, ONES, ridge.scores(), subsets=10)
    assert found.noise > 0.1
    assert found.score < 0.8


class Elsewhere(Executor):
    """Runs at once what it is given, where other random numbers come out."""

    def submit(self, function, /, *args):
        torch.manual_seed(7)
        future = Future()
        future.set_result(function(*args))
        torch.manual_seed(0)
        return future


def test_trainings_that_begin_differently_elsewhere_are_warned_of():
    ridge = Ridge()

    def train(w):
        before = torch.get_rng_state()
        start = torch.randn(FEATURES)  # as a module begins that does not seed it
        torch.set_rng_state(before)
        return ridge.minimiser(w) + start

    torch.manual_seed(0)
    scores = ridge.scores()
    assert datamodeling_score(train, ridge.predicted, ONES, scores, subsets=5).noise == 0
    with pytest.warns(EstimateWarning, match="make the training the same each time"):
        found = datamodeling_score(train, ridge.predicted, ONES, scores, subsets=5, executor=Elsewhere())
    assert found.noise > 0.1


def test_it_is_refused_under_a_transform():
    ridge = Ridge()
    scores = ridge.scores()
    with pytest.raises(GradModeError, match="call it outside"):
        torch.func.grad(lambda w: datamodeling_score(ridge.minimiser, ridge.predicted, w, scores).score)(ONES)


BAD = {
    "no training": ({"train": 3}, LossError, "train"),
    "a class": ({"train": Ridge}, LossError, "that is a class"),
    "no metric": ({"metric": None}, LossError, "metric"),
    "a matrix": ({"metric": lambda p: p[:, None] * p}, LossError, "flatten it"),
    "a list of numbers": ({"metric": lambda p: list(p)}, LossError, "with torch.stack"),
    "a number": ({"metric": lambda p: p.sum().item()}, LossError, "keep it a tensor"),
    "weights of integers": ({"weights": torch.ones(SAMPLES, dtype=torch.int64)}, LeafError, r"torch\.ones\(n\)"),
    "no weight": ({"weights": torch.ones(0)}, LeafError, "weights is"),
    "NaN among the weights": ({"weights": ONES / 0 * 0}, LeafError, "weights holds NaN"),
    "a list of scores": ({"scores": [1.0]}, LeafError, "scores is"),
    "NaN among the scores": ({"scores": torch.full((4, SAMPLES), torch.nan)}, LeafError, "scores holds NaN"),
    "scores of other weights": ({"scores": torch.ones(4, 5)}, ShapeError, r"metric\.shape \+ \(12,\)"),
    "scores turned around": ({"scores": torch.ones(SAMPLES, 4)}, ShapeError, "diffopt.attribute"),
    "scores of other metrics": ({"scores": torch.ones(3, SAMPLES)}, ShapeError, r"\(4,\) \+ \(12,\)"),
    "scores of one metric": ({"scores": torch.ones(SAMPLES)}, ShapeError, r"\(4,\) \+ \(12,\)"),
    "scores with an axis too many": ({"scores": torch.ones(2, 4, SAMPLES)}, ShapeError, "a score for each"),
    "no fraction": ({"fraction": 0.0}, HyperparameterError, "fraction"),
    "a percentage": ({"fraction": 1}, HyperparameterError, "fraction"),
    "all examples": ({"fraction": 0.99}, HyperparameterError, "one to all but one"),
    "one example": ({"weights": ONES[:1], "scores": torch.ones(4, 1)}, HyperparameterError, "take more examples"),
    "two subsets": ({"subsets": 2}, HyperparameterError, "subsets"),
    "a negative seed": ({"seed": -1}, HyperparameterError, "seed"),
    "a confidence in per cent": ({"confidence": 95}, HyperparameterError, "confidence"),
    "a number of processes": ({"executor": 4}, HyperparameterError, "ProcessPoolExecutor"),
    "no function to tell": ({"on_retraining": True}, LossError, "on_retraining"),
    "a constant metric": (
        {"metric": lambda p: torch.stack([p[0], 0 * p[0]]), "scores": torch.rand(2, SAMPLES)},
        HyperparameterError,
        "measured change of metric 1 is 0",
    ),
    "scores that are alike": ({"scores": torch.ones(4, SAMPLES)}, HyperparameterError, "predicted change of metric 0"),
    "weights that are not read": ({"train": lambda w: torch.ones(FEATURES)}, DisconnectedError, "reads the weights"),
    "NaN with all": (
        {"metric": lambda p: p / 0 * 0, "scores": torch.ones(3, SAMPLES)},
        NonFiniteLossError,
        "all examples",
    ),
    "NaN with fewer": (
        {"train": lambda w: torch.ones(FEATURES).where(w.all(), torch.nan)},
        NonFiniteLossError,
        "without subset 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_score_is_refused(name):
    changed, kind, message = BAD[name]
    ridge = Ridge()
    call = {"train": ridge.minimiser, "metric": ridge.predicted, "weights": ONES, "scores": ridge.scores()}
    with pytest.raises(kind, match=message):
        datamodeling_score(**{**call, "subsets": 4, **changed})


def test_nothing_is_trained_where_the_arguments_alone_are_wrong():
    for changed in ({"subsets": 2}, {"scores": torch.ones(4, 5)}, {"executor": 4}, {"fraction": 0.99}):
        ridge = Ridge()
        call = {"scores": torch.ones(4, SAMPLES), "subsets": 4, **changed}
        with pytest.raises(diffopt.DiffoptError):
            datamodeling_score(ridge.minimiser, ridge.predicted, ONES, **call)
        assert ridge.calls == 0
