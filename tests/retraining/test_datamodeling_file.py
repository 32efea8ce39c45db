"""``diffopt.datamodeling_score`` with a file: gone on with to the same bits, refused where it is another call's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from weighted_ridge import FEATURES, ONES, SAMPLES, Killed, Ridge, drifting, same

from diffopt import datamodeling_score
from diffopt.errors import HyperparameterError, RandomnessError, ShapeError

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, after):
    ridge, path = Ridge(), tmp_path / "trainings.jsonl"
    call = {"fraction": 0.2, "subsets": 8, "seed": 4}
    whole = datamodeling_score(ridge.minimiser, ridge.predicted, ONES, ridge.scores(), **call)
    told = []

    def stop(done, total):
        told.append((done, total))
        if done == after:
            raise Killed

    with pytest.raises(Killed):
        datamodeling_score(
            ridge.minimiser, ridge.predicted, ONES, ridge.scores(), path=path, on_retraining=stop, **call
        )
    with path.open("ab") as file:
        file.write(b'{"subset": 7, "measu')  # as a kill leaves it
    scores, ridge.calls = ridge.scores(), 0
    rest = []
    options = {"path": str(path), "on_retraining": lambda *x: rest.append(x), **call}
    again = datamodeling_score(ridge.minimiser, ridge.predicted, ONES, scores, **options)
    assert same(whole, again)
    assert ridge.calls == 2 + 8 - after
    assert told + rest == [(done, 8) for done in range(1, 9)]
    ridge.calls = 0
    assert same(whole, datamodeling_score(ridge.minimiser, ridge.predicted, ONES, scores, path=path, **call))
    assert ridge.calls == 2


def test_a_file_serves_more_subsets_and_fewer(tmp_path):
    ridge, path = Ridge(), tmp_path / "trainings.jsonl"
    for subsets, calls in ((6, 8), (9, 5), (4, 2)):
        scores, ridge.calls = ridge.scores(), 0
        found = datamodeling_score(ridge.minimiser, ridge.predicted, ONES, scores, subsets=subsets, path=path)
        assert ridge.calls == calls
        assert same(found, datamodeling_score(ridge.minimiser, ridge.predicted, ONES, scores, subsets=subsets))


CHANGES = {
    "seed": ({"seed": 1}, HyperparameterError, "another seed"),
    "fraction": ({"fraction": 0.3}, HyperparameterError, "another size of the subsets"),
    "weights": ({"weights": 2 * ONES}, HyperparameterError, "another weights"),
    "metric": ({"metric": lambda p: p, "scores": torch.rand(FEATURES, SAMPLES)}, HyperparameterError, "another metric"),
    "training": ({"train": lambda w: Ridge(10 + 1e-8).minimiser(w)}, RandomnessError, "has moved by"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_of_another_call_is_refused_and_left_as_it_is(tmp_path, name):
    changed, kind, message = CHANGES[name]
    ridge, path = Ridge(), tmp_path / "trainings.jsonl"
    call = {"train": ridge.minimiser, "metric": ridge.predicted, "weights": ONES, "scores": ridge.scores()}
    datamodeling_score(**call, subsets=4, path=path)
    before = path.read_bytes()
    with pytest.raises(kind, match=message):
        datamodeling_score(**{**call, **changed}, subsets=4, path=path)
    assert path.read_bytes() == before


FOREIGN = {
    "notes": b"remember the milk",
    "lines": b"remember\nthe milk\n",
    "other JSON": b'{"iteration": 3}\n',
    "a list": b"[1, 2]\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path, name):
    ridge, path = Ridge(), tmp_path / "notes"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(HyperparameterError, match="nothing is overwritten"):
        datamodeling_score(ridge.minimiser, ridge.predicted, ONES, ridge.scores(), subsets=4, path=path)
    assert path.read_bytes() == FOREIGN[name]


@pytest.mark.parametrize(
    "line",
    [b"{}", b"7", b'{"subset": 1, "measured": [1, 2, 3, NaN]}', b'{"subset": 1, "measured": [1, 2]}', b"\xff"],
    ids=str,
)
def test_a_line_that_was_changed_is_refused(tmp_path, line):
    ridge, path = Ridge(), tmp_path / "trainings.jsonl"
    datamodeling_score(ridge.minimiser, ridge.predicted, ONES, ridge.scores(), subsets=4, path=path)
    first, *rest = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, *rest[1:], b""]))
    with pytest.raises(HyperparameterError, match="has the line"):
        datamodeling_score(ridge.minimiser, ridge.predicted, ONES, ridge.scores(), subsets=4, path=path)


def test_a_little_noise_is_only_told_and_a_file_allows_for_it(tmp_path, recwarn):
    ridge, path = Ridge(), tmp_path / "trainings.jsonl"
    assert datamodeling_score(ridge.minimiser, ridge.predicted, ONES, ridge.scores(), subsets=5).noise == 0
    for seed in range(3):
        train = drifting(ridge, 1e-7, seed)
        found = datamodeling_score(train, ridge.predicted, ONES, ridge.scores(), subsets=5, path=path)
        assert 0 < found.noise < 1e-4
    assert not recwarn.list


def test_no_file_is_left_of_a_call_that_is_refused(tmp_path):
    ridge = Ridge()
    with pytest.raises(ShapeError):
        datamodeling_score(
            ridge.minimiser, ridge.predicted, ONES, torch.ones(3, SAMPLES), path=tmp_path / "trainings.jsonl"
        )
    assert list(Path(tmp_path).iterdir()) == []
