"""Proximal maps and ``Proximal``: closed forms, the definition itself, and hypergradients on the active set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compositions import on_simplex
from hypothesis import given
from hypothesis import strategies as st
from limits import sampled
from oracles import relative_error
from stateless import Stateless

import diffopt
from diffopt import SGD, Adam, AdamW, Clip, Groups, Lookahead, Muon, Proximal, ProximalGD, RMSprop, Schedule
from diffopt.estimators import ForwardMode, Implicit, Reverse, Unrolled
from diffopt.linear_solve import GMRES, Dense
from diffopt.prox import L1, Box, GroupL1, L2Ball, Nonnegative, Prox, Simplex

DOUBLE = torch.float64


def central_difference(function: Callable[[float], torch.Tensor]) -> float:
    """With an error of the fourth power of the width: 1e-12, beside round-off of 1e-16 / 1e-3."""
    high, low, further, lower = (float(function(w).detach()) for w in (1e-3, -1e-3, 2e-3, -2e-3))
    return (8 * (high - low) - (further - lower)) / 12e-3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# ------------------------------------------------------------------------------------------------- the maps themselves

PENALTIES: list[tuple[Prox, Any]] = [
    (L1(0.7), lambda x: 0.7 * x.abs().sum()),
    (
        L1(torch.tensor([[0.1, 2.0, 0.5]], dtype=DOUBLE).expand(2, 3)),
        lambda x: (x.abs() @ torch.tensor([0.1, 2, 0.5]).to(x)).sum(),
    ),
    (GroupL1(0.9, axis=1), lambda x: 0.9 * x.norm(dim=1).sum()),
    (GroupL1(0.9, axis=(0, -1)), lambda x: 0.9 * x.norm()),
    (Box(-0.2, 0.5), lambda x: inside((x >= -0.2 - 1e-12) & (x <= 0.5 + 1e-12))),
    (Box(high=0.1), lambda x: inside(x <= 0.1 + 1e-12)),
    (Box(low=torch.tensor(0.3, dtype=DOUBLE)), lambda x: inside(x >= 0.3 - 1e-12)),
    (Nonnegative(), lambda x: inside(x >= 0)),
    (Simplex(), lambda x: inside((x >= 0) & ((x.sum(-1, keepdim=True) - 1).abs() < 1e-12))),
    (L2Ball(0.8), lambda x: inside(x.norm() <= 0.8 + 1e-12)),
]


def inside(whether: torch.Tensor) -> float:
    return 0.0 if bool(whether.all()) else float("inf")


@given(seed=st.integers(0, 2**31), entry=st.sampled_from(PENALTIES), step=st.floats(0.1, 2.0), size=st.floats(0.1, 3))
def test_a_prox_is_the_minimiser_that_defines_it(seed, entry, step, size):
    """No point near by is better: as the function is strongly convex, none is."""
    prox, penalty = entry
    at = size * normal(2, 3, seed=seed)
    found = prox(at, step)

    def height(x):
        return float(step * penalty(x) + (x - at).square().sum() / 2)

    least = height(found)
    assert least < float("inf"), "outside the set"
    for k in range(40):
        way, shorter = normal(2, 3, seed=seed % 1000 + k), 1 - 0.05 * (k % 5)
        for other in (found + 1e-3 * way, found + 0.1 * way, found * shorter, prox(found + way, step)):
            assert height(other) >= least - 1e-12


@given(seed=st.integers(0, 2**31), length=st.integers(1, 6), size=st.floats(0.01, 10))
def test_the_simplex_is_exact(seed, length, size):
    row = size * normal(length, seed=seed)
    got = Simplex()(row)
    assert relative_error([got], [on_simplex(row)]) < 1e-12
    assert abs(float(got.sum()) - 1) < 1e-12
    again = Simplex()(got)
    assert relative_error([again], [got]) < 1e-12, "a point of the simplex is its own projection"


def test_ties_and_corners_of_the_simplex():
    for row, expected in [
        ([1.0, 1.0, 1.0, 1.0], [0.25] * 4),
        ([0.0, 0.0], [0.5, 0.5]),
        ([9.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
        ([-3.0, -3.0, -9.0], [0.5, 0.5, 0.0]),
        ([5.0], [1.0]),
    ]:
        assert Simplex()(torch.tensor(row, dtype=DOUBLE)).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "prox",
    [L1(0.7), GroupL1(0.9, axis=1), Box(-0.2, 0.5), Nonnegative(), Simplex(), L2Ball(0.8)],
    ids=lambda p: type(p).__name__,
)
def test_derivatives_are_those_of_central_differences(prox):
    at, direction = normal(2, 3, seed=3), normal(2, 3, seed=4)
    weights = normal(2, 3, seed=5)
    leaf = at.clone().requires_grad_()
    (got,) = torch.autograd.grad((prox(leaf, 0.6) * weights).sum(), leaf)
    expected = central_difference(lambda e: (prox(at + e * direction, 0.6) * weights).sum())
    assert abs(float((got * direction).sum()) - float(expected)) < 1e-8


@pytest.mark.parametrize(
    "make", [L1, lambda s: GroupL1(s, axis=0), lambda s: Box(-s, s), L2Ball], ids=["L1", "rows", "box", "ball"]
)
def test_strengths_bounds_and_radii_are_learned(make):
    at, weights = normal(2, 3, seed=6), normal(2, 3, seed=7)
    value = torch.tensor(0.45, dtype=DOUBLE, requires_grad=True)
    (got,) = torch.autograd.grad((make(value)(at, 0.8) * weights).sum(), value)
    expected = central_difference(lambda e: (make(value.detach() + e)(at, 0.8) * weights).sum())
    assert abs(float(got) - float(expected)) < 1e-8
    assert float(got) != 0


def test_at_zero_every_derivative_is_finite():
    zero = torch.zeros(2, 3, dtype=DOUBLE)
    for prox in (
        L1(0.0),
        L1(0.3),
        GroupL1(0.3, 1),
        GroupL1(0.0, 1),
        L2Ball(1.0),
        L2Ball(0.0),
        Nonnegative(),
        Box(0.0, 1.0),
        Simplex(),
    ):
        leaf = zero.clone().requires_grad_()
        (got,) = torch.autograd.grad(prox(leaf).sum(), leaf)
        assert bool(got.isfinite().all()), prox
    leaf = zero.clone().requires_grad_()
    (got,) = torch.autograd.grad(L1(0.0)(leaf).sum(), leaf)
    assert bool((got == 1).all()), "without a strength it is the identity, at zero too"


def test_a_prox_takes_trees_and_step_sizes_for_each_leaf():
    tree = {"a": torch.tensor([2.0, -0.1]), "b": torch.tensor(1.0)}
    got = L1(0.5)(tree, {"a": 1.0, "b": torch.tensor(3.0)})
    assert got["a"].tolist() == [1.5, 0.0]
    assert float(got["b"]) == 0.0
    got = L1({"a": torch.tensor([0.5, 0.0]), "b": 0.25})(tree)
    assert got["a"].tolist() == [1.5, pytest.approx(-0.1)]
    assert float(got["b"]) == 0.75
    assert float(torch.func.vmap(lambda s: L1(s)(torch.tensor(2.0)))(torch.tensor([0.5, 1.0])).sum()) == 2.5


# ------------------------------------------------------------------------------------------- inner problems with a kink

BY_STEPS = [Reverse(), Reverse(1), Reverse("sqrt"), Unrolled(), ForwardMode()]
EXACT = [*BY_STEPS, Implicit(GMRES(60, rtol=1e-12)), Implicit(Dense())]


def squares(w, inputs, targets):
    return (inputs @ w - targets).square().mean() / 2


class Lasso:
    """Some weights are zero; the solution's derivative on the others is known by linear algebra."""

    def __init__(self, ridge: float = 0.0) -> None:
        self.inputs, self.targets, self.ridge = normal(20, 6, seed=1), normal(20, seed=2), ridge
        self.strength, self.weights = 0.15, normal(6, seed=3)

    def solved(self, optimizer: Any, steps: int = 600, targets: Any = None, **options: Any) -> torch.Tensor:
        targets = self.targets if targets is None else targets
        options.update(optimizer=optimizer, steps=steps)
        return diffopt.solve(squares, torch.zeros(6, dtype=DOUBLE), self.inputs, targets, **options).params

    def expected(self, w: torch.Tensor) -> list[torch.Tensor]:
        """The derivative of ``weights @ w`` by the strength and by the targets."""
        on = w != 0
        x = self.inputs[:, on]
        hessian = x.T @ x / len(x) + self.ridge * torch.eye(int(on.sum()), dtype=DOUBLE)
        solved = torch.linalg.solve(hessian, self.weights[on])
        return [-(solved @ w[on].sign()), x @ solved / len(x)]


@pytest.mark.parametrize("estimator", EXACT, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("ridge", sampled([0.3, 0.0], 2), ids=["ElasticNet", "Lasso"])
def test_the_hypergradient_of_a_lasso_is_that_of_its_active_set(estimator, ridge):
    problem = Lasso(ridge)
    strength = torch.tensor(problem.strength, dtype=DOUBLE, requires_grad=True)
    targets = problem.targets.clone().requires_grad_()
    optimizer = Proximal(SGD(0.4, weight_decay=ridge), L1(strength))
    w = problem.solved(optimizer, targets=targets, estimator=estimator)
    assert 1 <= int((w == 0).sum()) <= 4, "some weights are exactly zero"
    got = torch.autograd.grad(problem.weights @ w, [strength, targets])
    assert relative_error(got, problem.expected(w.detach())) < 1e-9


def test_a_lasso_and_an_elastic_net_are_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    for ridge in (0.0, 0.3):
        problem = Lasso(ridge)
        total, options = problem.strength + ridge, {"fit_intercept": False, "tol": 1e-14, "max_iter": 100_000}
        model = linear_model.ElasticNet(alpha=total, l1_ratio=problem.strength / total, **options)
        model.fit(problem.inputs.numpy(), problem.targets.numpy())
        w = problem.solved(Proximal(SGD(0.4, weight_decay=ridge), L1(problem.strength)))
        assert relative_error([w], [torch.from_numpy(model.coef_)]) < 1e-8


@pytest.mark.parametrize("estimator", EXACT, ids=lambda e: type(e).__name__)
def test_bounds_that_hold_are_learned_and_the_rest_is_solved_again(estimator):
    """A quadratic in a box: the coordinates at a bound move with it, the others answer by linear algebra."""
    a, weights = normal(8, 4, seed=5), normal(4, seed=6)
    hessian, linear = a.T @ a / 8 + 0.2 * torch.eye(4, dtype=DOUBLE), 2 * normal(4, seed=7)
    low = torch.tensor(-0.3, dtype=DOUBLE, requires_grad=True)
    high = {"w": torch.full((4,), 0.4, dtype=DOUBLE, requires_grad=True)}
    options = {"optimizer": Proximal(SGD(0.3), Box(low, high)), "steps": 400, "estimator": estimator}

    def loss(p, b):
        return p["w"] @ hessian @ p["w"] / 2 - b @ p["w"]

    w = diffopt.solve(loss, {"w": torch.zeros(4, dtype=DOUBLE)}, linear, **options).params["w"]
    got = torch.autograd.grad(weights @ w, [low, high["w"]])
    below, above = w.detach() == -0.3, w.detach() == 0.4
    free = ~(below | above)
    assert min(int(below.sum()), int(above.sum()), int(free.sum())) >= 1
    bound = weights - hessian[:, free] @ torch.linalg.solve(hessian[free][:, free], weights[free])
    assert relative_error(got, [bound[below].sum(), torch.where(above, bound, 0.0)]) < 1e-9


@pytest.mark.parametrize("estimator", EXACT, ids=lambda e: type(e).__name__)
def test_the_nearest_point_of_a_ball_and_of_a_simplex_by_descent(estimator):
    """Descent on half the squared distance ends at the projection, whose derivative is known."""
    target, weights = 2 * normal(5, seed=8), normal(5, seed=9)
    radius = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    for prox, nearest in [(L2Ball(radius), lambda t: radius * t / t.norm()), (Simplex(), on_simplex)]:
        leaf, start = target.clone().requires_grad_(), torch.full((5,), 0.1, dtype=DOUBLE)
        options = {"optimizer": Proximal(SGD(0.3), prox), "steps": 300, "estimator": estimator}
        w = diffopt.solve(lambda w, t: (w - t).square().sum() / 2, start, leaf, **options).params
        got, expected = (
            torch.autograd.grad(weights @ end, [leaf, radius], allow_unused=True, materialize_grads=True)
            for end in (w, nearest(leaf))
        )
        assert relative_error(got, expected) < 1e-8


def test_the_step_size_of_the_prox_is_the_inner_one_of_that_step():
    """From 0 on ``-a w``: ``w+ = soft(w + lr a, lr s)``; rates by step, by group and by coordinate."""
    slope = torch.tensor([3.0, 5.0], dtype=DOUBLE)

    def final(optimizer, steps=2):
        start = {"a": torch.zeros(2, dtype=DOUBLE), "b": torch.zeros((), dtype=DOUBLE)}
        return diffopt.solve(lambda p: -(slope @ p["a"]) - 2 * p["b"], start, optimizer=optimizer, steps=steps).params

    got = final(Proximal(SGD(Schedule([0.5, 0.1])), L1(1.0)))
    assert got["a"].tolist() == pytest.approx([0.6 * 2, 0.6 * 4])
    got = final(Proximal(Groups({"a": SGD({"a": torch.tensor([0.5, 0.1], dtype=DOUBLE)}), "b": SGD(0.2)}), L1(1.0)))
    assert got["a"].tolist() == pytest.approx([2 * 0.5 * 2, 2 * 0.1 * 4])
    assert float(got["b"]) == pytest.approx(2 * 0.2 * 1)
    got = final(Groups({"a": Proximal(SGD(0.5), L1(1.0)), "b": SGD(0.2)}))
    assert float(got["b"]) == pytest.approx(0.8)
    assert float(final(Proximal(Clip(SGD(0.5), value=1.5), L1(1.0)))["b"]) == pytest.approx(0.5)


def test_with_momentum_the_limit_has_a_smaller_strength():
    """As the page says: a velocity at rest is ``1 / (1 - momentum)`` gradients."""
    problem = Lasso()
    heavy = problem.solved(Proximal(SGD(0.2, momentum=0.5), L1(2 * problem.strength)), 800)
    assert relative_error([heavy], [problem.solved(Proximal(SGD(0.4), L1(problem.strength)), 800)]) < 1e-9


@dataclass(frozen=True)
class Shrink(Prox):
    """A user's own: that of ``strength * |w|^2 / 2``."""

    strength: Any
    elementwise = True

    def apply(self, params, step_size):
        return params / (1 + step_size * self.strength)


def test_a_prox_of_a_users_own_is_learned_like_the_others():
    strength = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    w = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)
    lr = torch.tensor([0.5, 0.25], dtype=DOUBLE, requires_grad=True)
    optimizer = Proximal(SGD(Schedule(lr)), Shrink(strength))
    got = diffopt.solve(lambda w: w**2 / 2, w, optimizer=optimizer, steps=2).params
    expected = w * (1 - lr[0]) / (1 + lr[0] * strength) * (1 - lr[1]) / (1 + lr[1] * strength)
    leaves = [w, lr, strength]
    assert relative_error(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)) < 1e-12
    tree = {"x": torch.tensor(2.0, dtype=DOUBLE)}
    assert float(Shrink({"x": torch.tensor(3.0, dtype=DOUBLE)})(tree)["x"]) == 0.5


@dataclass(frozen=True)
class Halved(Stateless):
    """A user's descent that says its step size."""

    rate: Any
    elementwise = True
    proximal_step_size = property(lambda self: self.rate)

    def update(self, params, grads, buffers, step):
        return params - self.rate * grads, buffers


def test_an_optimizer_of_a_users_own_says_its_step_size():
    optimizer = Proximal(Halved(0.5), L1(1.0))
    assert float(diffopt.solve(lambda w: -3 * w, torch.tensor(0.0), optimizer=optimizer, steps=1).params) == 1.0


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "optimizer",
    [
        Adam(0.1),
        AdamW(0.1),
        RMSprop(0.1),
        Muon(0.1),
        Lookahead(SGD(0.1)),
        Clip(Adam(0.1), value=1.0),
        Groups({"a": SGD(0.1), "b": Adam(0.1)}),
        diffopt.Preconditioned(0.1, diagonal=0.5),
        diffopt.from_torch(torch.optim.NAdam),
    ],
    ids=lambda o: type(o).__name__,
)
def test_optimizers_without_one_step_size_are_refused_when_it_is_made(optimizer):
    with pytest.raises(diffopt.OptimizerError, match=rf"^Proximal: {type(optimizer).__name__} has no one step size"):
        Proximal(optimizer, L1(0.1))


def test_those_that_have_one_are_taken():
    around = diffopt.EMA(SGD(0.1)), Clip(SGD(0.1), max_norm=1.0), Proximal(SGD(0.1), L1(0.1))
    for optimizer in (ProximalGD(0.1, 0.2), *around):
        assert Proximal(optimizer, Nonnegative()).proximal_step_size == 0.1


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Proximal(SGD(0.1), L1), diffopt.HyperparameterError, "call it: that is the class"),
        (lambda: Proximal(SGD(0.1), 0.1), diffopt.HyperparameterError, "Proximal: prox is float 0.1"),
        (lambda: Proximal(SGD, L1(0.1)), diffopt.OptimizerError, "call it, as in SGD"),
        (lambda: Proximal(torch.optim.SGD, L1(0.1)), diffopt.OptimizerError, r"write diffopt\.SGD"),
        (lambda: L1(-0.1), diffopt.HyperparameterError, r"L1: strength is -0\.1"),
        (lambda: L1({"a": 0.1, "b": -1.0}), diffopt.HyperparameterError, r"strength\['b'\] is -1\.0"),
        (lambda: GroupL1(0.1, 0.5), diffopt.HyperparameterError, r"GroupL1: axis is float 0\.5"),
        (lambda: Box(1.0, 0.5), diffopt.HyperparameterError, r"Box: low is 1\.0 and high is 0\.5"),
        (lambda: Box("0", 1.0), diffopt.HyperparameterError, "Box: low is str '0'"),
        (lambda: Box(float("nan")), diffopt.HyperparameterError, "Box: low is float nan"),
        (lambda: L2Ball({"a": 1.0}), diffopt.HyperparameterError, "one number for all parameters"),
        (lambda: L2Ball(-1.0), diffopt.HyperparameterError, r"L2Ball: radius is -1\.0"),
        (lambda: L1(0.1)([1.0]), diffopt.LeafError, r"L1: params\[0\] is float"),
        (lambda: L1({"b": 0.1})({"a": torch.ones(1)}), diffopt.StructureError, "strength is dict"),
        (lambda: GroupL1(0.1, 1)(torch.ones(3)), diffopt.ShapeError, r"axis is \(1,\) for a parameter of shape \(3,\)"),
        (lambda: Simplex()(torch.tensor(1.0)), diffopt.ShapeError, "a parameter has no axes"),
        (lambda: GroupL1(torch.ones(2, 2), 1)(torch.ones(2, 2)), diffopt.HyperparameterError, "one step size for each"),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("prox", [Simplex(), L2Ball(1.0), GroupL1(0.1, 0)], ids=lambda p: type(p).__name__)
def test_step_sizes_that_differ_within_a_parameter_are_refused_where_coordinates_mix(prox):
    w = torch.ones(3)
    with pytest.raises(diffopt.HyperparameterError, match="one step size for each parameter"):
        diffopt.solve(lambda w: w.sum(), w, optimizer=Proximal(SGD(torch.ones(3) / 10), prox), steps=1)


@dataclass(frozen=True)
class Stepping(Stateless):
    """A user's descent whose fields have names that the library might want to have."""

    step_size: float
    prox: float
    places: float = 1.0

    def update(self, params, grads, buffers, step):
        return params - self.step_size * self.prox * self.places * grads, buffers


def test_names_of_a_users_fields_are_free():
    assert float(diffopt.solve(lambda w: w, torch.tensor(1.0), optimizer=Stepping(0.5, 0.5), steps=1).params) == 0.75
    with pytest.raises(diffopt.OptimizerError, match="Stepping has no one step size"):
        Proximal(Stepping(0.5, 0.5), L1(0.1))
