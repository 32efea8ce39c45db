"""Optimizers in the fields of a user's optimizers: bound at any depth, checked, compiled as what they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracles import relative_error
from stateless import Stateless

import diffopt
from diffopt import EMA, SGD, Adam, Clip, Groups, Leaves, Lookahead, Proximal, Schedule
from diffopt.estimators import Binomial, ForwardMode, Reverse, Unrolled
from diffopt.optimizers import EACH, OPTION, TREE
from diffopt.optimizers.binding import bind
from diffopt.prox import L1, Prox
from diffopt.rollout import compiled, known_programs
from diffopt.tensors import tree

DOUBLE = torch.float64


def leaf(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=DOUBLE, requires_grad=True)


@dataclass(frozen=True)
class Mixture(diffopt.Optimizer):
    """The weighted mean of where several optimizers go; ``parts`` is a list, a tuple or a dict of them."""

    parts: Any
    weight: Any = 0.5
    elementwise = True

    def _all(self):
        return [self.parts[k] for k in sorted(self.parts)] if isinstance(self.parts, dict) else list(self.parts)

    def init(self, params):
        return {f"{i}.{k}": b for i, part in enumerate(self._all()) for k, b in part.init(params).items()}

    def update(self, params, grads, buffers, step):
        ends, new = [], {}
        for i, part in enumerate(self._all()):
            own = {k[2:]: b for k, b in buffers.items() if k.startswith(f"{i}.")}
            end, own = part.update(params, grads, own, step)
            ends.append(end)
            new |= {f"{i}.{k}": b for k, b in own.items()}
        return self.weight * ends[0] + (1 - self.weight) * ends[1], new


@dataclass(frozen=True)
class Each(Mixture):
    """The same with a field of the kind ``EACH``, whose entries are hyperparameters of their own."""

    parts: Any = field(default=(), metadata=EACH)


@dataclass(frozen=True)
class Whole(Mixture):
    """The same with a field of the kind ``TREE``."""

    parts: Any = field(default=(), metadata=TREE)


START = {"a": [0.3, -0.8], "b": [1.2]}


def loss(p, scale):
    return scale * ((p["a"].sum() * p["b"]).sin().sum() + p["a"].square().sum() + p["b"].square().sum())


@pytest.mark.parametrize(
    "estimator", [Reverse(), Reverse(1), Reverse("graph"), Unrolled(), ForwardMode(), Binomial(3)], ids=str
)
@pytest.mark.parametrize("kind", [Mixture, Each, Whole])
@pytest.mark.parametrize(
    "form", [tuple, list, lambda parts: dict(zip("xy", parts, strict=True))], ids=["tuple", "list", "dict"]
)
def test_optimizers_in_any_field_are_learned(estimator, kind, form):
    if kind is Each and form is list:
        pytest.skip("a tuple or a dict, by its definition")
    leaves = [leaf(0.1), leaf([0.5, 0.3, 0.6]), leaf([0.2, 0.1]), leaf(0.6), leaf(1.1), *map(leaf, START.values())]
    lr, mu, tree_lr, weight, scale, a, b = leaves
    parts = form([SGD(lr, Schedule(mu)), EMA(SGD({"a": tree_lr, "b": 0.3}), 0.5)])
    options = {"optimizer": kind(parts, weight), "steps": 3, "estimator": estimator}
    end = diffopt.solve(loss, {"a": a, "b": b}, scale, **options).params
    now, velocity = {"a": a, "b": b}, {"a": 0.0, "b": 0.0}
    for t in range(3):
        slopes = torch.autograd.grad(loss(now, scale), list(now.values()), create_graph=True)
        grads = dict(zip("ab", slopes, strict=True))
        velocity = {k: mu[t] * velocity[k] + grads[k] for k in now}
        other = {"a": tree_lr, "b": 0.3}
        now = {k: weight * (now[k] - lr * velocity[k]) + (1 - weight) * (now[k] - other[k] * grads[k]) for k in now}
    got, expected = (torch.autograd.grad(x["a"].sum() + x["b"].square().sum(), leaves) for x in (end, now))
    assert relative_error(got, expected) < 1e-12


def test_what_holds_an_optimizer_that_mixes_coordinates_mixes_them():
    params, structure = tree.flatten({"a": torch.ones(2), "b": torch.ones(1)})
    elementwise = Mixture([SGD(0.1), Adam(0.1)])
    mixing = Mixture([SGD(0.1), Clip(Adam(0.1), max_norm=1.0)])
    assert bind(elementwise, params, structure, 1).elementwise
    assert not bind(mixing, params, structure, 1).elementwise
    assert not bind(EMA(EMA(mixing)), params, structure, 1).elementwise

    def end(start):
        return diffopt.solve(lambda w: w.square().sum(), start, optimizer=mixing, steps=2).params

    starts = torch.tensor([[3.0, 4.0], [30.0, 40.0]], dtype=DOUBLE)
    assert relative_error([torch.func.vmap(end)(starts)], [torch.stack([end(x) for x in starts])]) < 1e-14


def test_init_sees_inner_hyperparameters_that_are_ready():
    first = Schedule(leaf([0.5, 7.0]))
    optimizer = EMA(diffopt.Adagrad(0.0, initial_accumulator_value=first), 0.5)
    buffers = diffopt.solve(lambda w: w**2, torch.tensor(1.0).double(), optimizer=optimizer, steps=2).state.buffers
    assert float(buffers["inner.square"].detach()) == 0.5 + 4 + 4


@dataclass(frozen=True)
class Scaled(Stateless):
    """Descent whose rate goes through a function, which is no hyperparameter."""

    lr: Any
    function: Any = field(default=torch.tanh, metadata=OPTION)
    elementwise = True

    def update(self, params, grads, buffers, step):
        return params - self.lr * grads.map(self.function), buffers


def test_a_function_may_be_an_option():
    w = torch.tensor(1.0)
    assert float(diffopt.solve(lambda w: 2 * w, w, optimizer=Scaled(0.5, torch.square), steps=1).params) == -1.0
    lr = torch.tensor(0.5, requires_grad=True)
    end = diffopt.solve(lambda w: 2 * w, w, optimizer=Clip(Scaled(lr, torch.square), value=1.0), steps=1).params
    assert float(torch.autograd.grad(end, lr)[0]) == -1.0


@dataclass(frozen=True)
class Capturing(Stateless):
    """One that reads a tensor from elsewhere, of which nobody is told."""

    lr: Any
    elementwise = True

    def update(self, params, grads, buffers, step):
        return params - self.lr * SECRET * grads, buffers


@dataclass(frozen=True)
class CapturingProx(Prox):
    """A prox that does."""

    elementwise = True

    def apply(self, params, step_size):
        return params * SECRET


@dataclass(frozen=True)
class InPlace(Stateless):
    """One that writes into its gradients."""

    lr: Any

    def update(self, params, grads, buffers, step):
        for p in params:
            p.add_(1.0)
        return params - self.lr * grads, buffers


SECRET = torch.tensor(2.0, requires_grad=True)


def two_steps(optimizer):
    params = {"a": torch.ones(2), "b": torch.ones(1)}
    diffopt.solve(lambda p: p["a"].sum() + p["b"].sum(), params, optimizer=optimizer, steps=2)


AT_ANY_DEPTH = [
    EMA(Capturing(0.1)),
    Clip(Capturing(0.1), max_norm=1.0),
    Groups({"a": SGD(0.1), "b": Lookahead(Capturing(0.1))}),
    Mixture([SGD(0.1), Clip(Capturing(0.1), value=1.0)]),
    EMA(Mixture([Capturing(0.1), SGD(0.1)])),
    Proximal(SGD(0.1), CapturingProx()),
]


@pytest.mark.parametrize("optimizer", AT_ANY_DEPTH, ids=lambda o: type(o).__name__)
def test_a_tensor_captured_at_any_depth_is_found(optimizer):
    with pytest.raises(diffopt.CapturedTensorError):
        two_steps(optimizer)


def test_what_an_inner_optimizer_writes_in_place_is_found():
    with pytest.raises(diffopt.InPlaceError):
        diffopt.solve(lambda w: w.sum(), torch.ones(2), optimizer=EMA(InPlace(0.1)), steps=2)


class NotADataclass(Stateless):
    """One that forgot its decorator."""

    def update(self, params, grads, buffers, step):
        return params, buffers


INTEGER, SHORT = SGD(torch.tensor(1)), Schedule([0.1])
WRONG_WITHIN = [
    (EMA(NotADataclass()), diffopt.OptimizerError, "NotADataclass is not a dataclass"),
    (Clip(SGD({"c": 0.1}), 1.0), diffopt.StructureError, r"^optimizer\.lr is dict"),
    (Clip(EMA(INTEGER), 1.0), diffopt.DtypeError, r"^optimizer\.optimizer\.lr is a"),
    (EMA(SGD(SHORT), 0.5), diffopt.StepsError, r"^the schedule of optimizer\.lr has 1 entries"),
    (Mixture([SGD(0.1), SGD(SHORT)]), diffopt.StepsError, r"^the schedule of parts\[1\]\.lr has 1"),
    (Proximal(SGD(0.1), L1({"a": 0.1})), diffopt.StructureError, r"^prox\.strength is dict"),
    (Proximal(SGD(0.1), L1(SHORT)), diffopt.StepsError, r"^the schedule of prox\.strength has 1 entries"),
]


@pytest.mark.parametrize(("optimizer", "error", "match"), WRONG_WITHIN)
def test_errors_name_the_field_with_its_way(optimizer, error, match):
    with pytest.raises(error, match=match):
        two_steps(optimizer)


def test_citations_of_optimizers_within_others():
    inner = Groups({"a": Adam(0.1), "b": Proximal(SGD(0.1), diffopt.prox.Simplex())})
    text = diffopt.cite(EMA(Mixture([Clip(inner, max_norm=1.0)])))
    for title in ("Adam: A Method", "Efficient Projections", "Proximal Algorithms", "Difficulty of Training"):
        assert title in text


# ----------------------------------------------------------------------------------------------------------- compiled


def energy(params, scale):
    return scale * (params["a"].square().sum() + (params["b"] * params["a"].sum()).sin().sum())


def end_of(optimizer, **options):
    """The final params, and their derivative by the initial ones."""
    a, b = leaf([0.3, -0.8]), leaf([1.2])
    options.update(optimizer=optimizer, steps=4)
    end = diffopt.solve(energy, {"a": a, "b": b}, torch.tensor(0.9, dtype=DOUBLE), **options).params
    return [end["a"].detach(), end["b"].detach(), *torch.autograd.grad(end["a"].sum() + end["b"].sum(), [a, b])]


@pytest.mark.slow
@pytest.mark.compiler
def test_what_differs_within_is_compiled_anew_and_what_does_not_is_found_again(monkeypatch):
    made = []
    for module, name in ((compiled, "_compile"), (known_programs, "_made")):  # a step, and all steps as one program
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, make=original: made.append(1) or make(*args))

    def count(optimizer):
        before = len(made)
        assert relative_error(end_of(optimizer, compile=True), end_of(optimizer)) < 1e-11
        return len(made) - before

    def grouped(swap, first, second):
        names = ["y", "x"] if swap else ["x", "y"]
        return Groups(lambda path: names[path == "b"], {"x": SGD(leaf(first)), "y": SGD(leaf(second))})

    assert count(grouped(False, 0.1, 0.2)) > 0
    assert count(grouped(False, 0.3, 0.05)) == 0, "another function with the same outcome"
    assert count(grouped(True, 0.1, 0.2)) > 0, "the same shapes, but other groups"
    assert count(Lookahead(SGD(leaf(0.1)), 2)) > 0
    assert count(Lookahead(SGD(leaf(0.2)), 2)) == 0
    assert count(Lookahead(SGD(leaf(0.1)), 3)) > 0, "another period"
    assert count(Lookahead(SGD(leaf(0.1), weight_decay=0.5), 3)) > 0, "another number within"


@pytest.mark.compiler
def test_entries_of_a_dict_in_another_order_are_not_mixed_up():
    def both(names):
        return Each({name: {"x": SGD(leaf(0.1)), "y": SGD(leaf(0.4))}[name] for name in names}, 0.25)

    for optimizer in (both("xy"), both("yx")):
        assert relative_error(end_of(optimizer, compile=True), end_of(optimizer)) < 1e-11


def test_leaves_of_a_part_are_in_their_order():
    from diffopt.optimizers.base import Part

    part = Part(SGD(0.1), (2, 0))
    leaves = Leaves([torch.tensor(float(i)) for i in range(3)])
    assert [float(x) for x in part.of(leaves)] == [2.0, 0.0]
