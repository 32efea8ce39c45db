"""The experiment ``hessian-free``: its three estimators beside exact products, its runs, its answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from experiment_answers import answers

import diffopt
from diffopt.errors import EstimatorError
from diffopt.estimators import Reverse
from diffopt.experiments import hessian_free
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.unit_context import OutOfTime, Work
from diffopt.experiments.hessian_free_estimators import ESMAML, GGSMAML, HFMAML
from diffopt.experiments.hessian_free_report import split
from diffopt.testing import check_estimator

SETTINGS = catalogue.experiment("hessian-free").quick


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def curved(params, inputs):
    """A loss of two leaves with a Hessian that changes from point to point."""
    weight, bias = params
    return (torch.tanh(inputs @ weight + bias) - 0.3).square().mean() + 0.1 * weight.pow(4).sum()


def hypergradient(estimator, loss, optimizer, steps, batch=None):
    """Of the start; for a batch of tasks under vmap, each with its own start."""
    shape = () if batch is None else (batch,)
    start = (torch.randn(*shape, 3, generator=seeded(), dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))
    start = tuple(x.requires_grad_() for x in start)
    inputs = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)

    def outer(*start):
        found = diffopt.solve(loss, start, inputs, optimizer=optimizer, steps=steps, estimator=estimator)
        return found.params[0].sin().sum() + found.params[1].square()

    value = torch.func.vmap(outer)(*start).sum() if batch else outer(*start)
    return torch.autograd.grad(value, start)


@pytest.mark.parametrize("optimizer", [diffopt.SGD(0.3), diffopt.SGD(0.1, momentum=0.9), diffopt.Adam(0.05)])
@pytest.mark.parametrize("batch", [None, 3])
def test_a_difference_along_the_vector_is_the_exact_recursion(optimizer, batch):
    exact = hypergradient(Reverse(), curved, optimizer, 4, batch)
    found = hypergradient(HFMAML(1e-4), curved, optimizer, 4, batch)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["gradients", "losses"])
@pytest.mark.parametrize("directions", [1, 3])
def test_differences_along_random_directions_are_their_formulas(kind, directions):
    """On a quadratic, where no difference has an error: one step, from the same draws written out."""
    root = torch.randn(3, 3, generator=seeded(2), dtype=torch.float64)
    matrix, lr = root @ root.T, 0.1

    def loss(params, inputs):
        return params[0] @ matrix @ params[0] / 2 + params[0].sum() + params[1]

    estimator = {"gradients": GGSMAML, "losses": ESMAML}[kind](directions, 0.5, seeded(3))
    found, _ = hypergradient(estimator, loss, diffopt.SGD(lr), 1)
    start, source = torch.randn(3, generator=seeded(), dtype=torch.float64), seeded(3)
    adjoint = (start - lr * (matrix @ start + 1)).cos()
    turned = torch.cat([-lr * adjoint, -lr * 2 * torch.full((1,), -lr, dtype=torch.float64)])  # of both leaves
    whole = torch.zeros(4, 4, dtype=torch.float64)
    whole[:3, :3], total = matrix, torch.zeros(4, dtype=torch.float64)
    for _ in range(directions):
        z = torch.cat([torch.randn(n, generator=source, dtype=torch.float64) for n in (3, 1)])
        if kind == "gradients":
            total += whole @ z * (z @ turned) / directions
        else:
            total += (z @ whole @ z) / 2 * (z * (z @ turned) - turned) / directions
    torch.testing.assert_close(found, adjoint + total[:3])


@pytest.mark.parametrize("estimator", [HFMAML(1e-4), GGSMAML(1, 1e-4), ESMAML(1, 1e-3)])
def test_a_vector_field_is_refused(estimator):
    field, start = diffopt.VectorField(lambda w: w.flip(0)), torch.ones(2, requires_grad=True)
    with pytest.raises(EstimatorError, match="was given a vector field"):
        diffopt.solve(field, start, optimizer=diffopt.SGD(0.1), steps=2, estimator=estimator)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [HFMAML(1e-4), GGSMAML(4, 1e-4, seeded()), ESMAML(40, 1e-3, seeded())])
def test_their_claims_hold(estimator):
    assert not check_estimator(estimator).broken


def test_all_methods_see_the_same_start_and_episodes():
    rows = {
        name: hessian_free.learn(SETTINGS, name, Work(0)) for name in hessian_free.estimators(SETTINGS, (1,), Work(0))
    }
    assert len({row["losses"][0] for row in rows.values()}) == 1
    assert rows["HF-MAML"]["losses"] == pytest.approx(rows["MAML"]["losses"], rel=1e-4)
    assert rows["FOMAML"]["losses"][1] != rows["MAML"]["losses"][1]
    assert rows["MAML"]["after"] == [0, 2]
    assert len(rows["MAML"]["each"]) == SETTINGS.episodes


@pytest.mark.parametrize("method", ["HF-MAML", "GGS-MAML, Q=1", "ES-MAML, Q=1", "ESJ, Q=1"])
def test_it_stops_and_goes_on_to_the_last_bit(tmp_path, method):
    settings = replace(SETTINGS, iterations=3)
    whole = hessian_free.learn(settings, method, Work(0))
    stopped = Work(0, unit="x", store=tmp_path / "x.pt", deadline=0.0)  # out of time after every iteration
    for _ in range(2):
        with pytest.raises(OutOfTime):
            hessian_free.learn(settings, method, stopped)
    again = hessian_free.learn(settings, method, stopped)
    assert [again[key] for key in ("losses", "validation", "each")] == [
        whole[key] for key in ("losses", "validation", "each")
    ]


def test_errors_are_those_of_the_vectors():
    """HF-MAML's is small, that of leaving the Hessian out is not, and more directions err less."""
    row = hessian_free.measure(replace(SETTINGS, draws=2, measured=(1, 50)), 1, Work(0))
    errors = {name: numbers["error"] for name, numbers in row["rules"].items()}
    assert errors["HF-MAML"] < 0.01 < errors["FOMAML"]
    assert errors["GGS-MAML, Q=50"] < errors["GGS-MAML, Q=1"]
    assert row["rules"]["HF-MAML"]["cosine"] == pytest.approx(1, abs=1e-3)
    assert "MAML" not in errors


def test_answers_follow_the_numbers():
    settings = replace(SETTINGS, seeds=3, episodes=4)

    def said(ggs, es, gain, slower):
        results = {}
        for unit in hessian_free.units(settings):
            estimator, off = unit.keys.get("estimator"), 1 + 0.01 * unit.keys["seed"]
            if estimator is None:
                of = {"FOMAML": 0.5, "HF-MAML": 1e-4, "GGS-MAML, Q=1": ggs, "ES-MAML, Q=1": es}
                of = {name: {"error": error * off, "cosine": 0.1} for name, error in of.items()}
                results[unit.name] = {"parameters": 9, "rules": of}
                continue
            plain = estimator in ("MAML", "FOMAML")
            accuracy = 60.0 + (0.0 if estimator == "MAML" else -5.0 if estimator == "FOMAML" else gain) + off
            seconds = [0.5 * off, off] if plain else [0.5 * slower * off, slower * off]
            looks = {"validation": [20.0, accuracy], "after": [0, 2]}
            results[unit.name] = {"losses": [1.0, 0.9], "seconds": seconds, **looks, "each": [accuracy] * 4}
        summary = catalogue.experiment("hessian-free").summarise(settings, results)
        return list(answers(summary).values())

    assert said(0.4, 20.0, 0.5, 2.0) == ["yes"] * 8
    assert said(9.0, 0.3, -8.0, 0.5) == ["no"] * 3 + ["yes"] + ["no"] * 4


@pytest.mark.parametrize(
    ("method", "expected"), [("MAML", ("MAML", 0)), ("HF-MAML", ("HF-MAML", 0)), ("ESJ, Q=10", ("ESJ", 10))]
)
def test_names_are_taken_apart(method, expected):
    assert tuple(split(method).values()) == expected
