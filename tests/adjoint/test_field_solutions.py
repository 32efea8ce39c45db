"""Roots, fixed points, and equilibria, found elsewhere, against closed forms."""

from __future__ import annotations

import pytest
import torch
from fields import CLOSED, DOUBLE, jacobian, leaf, normal, number, soft
from oracles import relative_error
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import Implicit
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom

SOLVERS = [GMRES(30, rtol=1e-13), Dense(), Neumann(3000, step_size=0.3, rtol=1e-13)]
TIGHT = SOLVERS[0]


# ------------------------------------------------------------------------------------------ games

COST = torch.tensor([1.0, 0.7, 1.3], dtype=DOUBLE)  # of the first player, and in part of the second
CROSS = 0.8 * normal(1, 3, 2)
MATRIX = torch.cat([torch.cat([COST.diag(), CROSS], 1), torch.cat([-CROSS.T, 0.5 * COST[:2].diag()], 1)])
"""``V``: what the players' field is linear by."""


def first(players, aim):
    x, y = players
    return (COST * x * x).sum() / 2 + x @ CROSS @ y - x @ aim["x"]


def second(players, aim):
    x, y = players
    return (COST[:2] * y * y).sum() / 4 - x @ CROSS @ y - y @ aim["y"]


GAME = diffopt.game(first, second)
AIM = normal(2, 5)


def split(z: Tensor) -> tuple[Tensor, Tensor]:
    return z[:3], z[3:]


def aimed(z: Tensor) -> dict[str, Tensor]:
    return dict(zip("xy", split(z), strict=True))


def payoff(players: tuple[Tensor, Tensor]) -> Tensor:
    return players[0].square().sum() + (players[1] * torch.tensor([1.0, -2.0], dtype=DOUBLE)).sum()


@pytest.mark.parametrize("solver", [*SOLVERS, None], ids=lambda s: type(s).__name__)
def test_the_equilibrium_of_a_game(solver):
    aim = leaf(AIM)
    players = split(torch.linalg.solve(MATRIX, AIM))
    got = torch.autograd.grad(payoff(diffopt.implicit(GAME, players, aimed(aim), solver=solver)), aim)
    answer = torch.autograd.grad(payoff(split(torch.linalg.solve(MATRIX, aim))), aim)
    assert relative_error(got, answer) < (CLOSED if solver else 1e-4)  # the default solver's own tolerance


@pytest.mark.parametrize("momentum", [0.0, 0.4])
def test_players_who_descend_at_the_same_time(momentum):
    """``z - lr v`` with momentum is a linear recurrence, whose power is the answer."""
    aim, lr, decay, start = leaf(AIM), number(0.2), number(momentum), leaf(normal(3, 5))
    optimizer = diffopt.SGD(lr, momentum=decay)
    steps = 7
    players = diffopt.solve(GAME, split(start), aimed(aim), optimizer=optimizer, steps=steps).params
    wanted = [aim, lr, decay, start]
    got = torch.autograd.grad(payoff(players), wanted)
    eye, rest = torch.eye(5, dtype=DOUBLE), torch.linalg.solve(MATRIX, aim)
    rows = [torch.cat([eye - lr * MATRIX, -lr * decay * eye], 1), torch.cat([MATRIX, decay * eye], 1)]
    power = torch.linalg.matrix_power(torch.cat(rows), steps)
    final = rest + power[:5, :5] @ (start - rest)
    assert relative_error(got, torch.autograd.grad(payoff(split(final)), wanted)) < CLOSED


def test_the_estimator_of_a_fixed_point_takes_gmres_for_a_field():
    aim = leaf(AIM)
    options = {"optimizer": diffopt.SGD(0.4), "steps": 150}
    solution = diffopt.solve(GAME, split(normal(4, 5)), aimed(aim), **options, estimator=Implicit())
    got = torch.autograd.grad(payoff(solution.params), aim)
    answer = torch.autograd.grad(payoff(split(torch.linalg.solve(MATRIX, aim))), aim)
    assert relative_error(got, answer) < 1e-4
    assert int(solution.diagnostics["iterations"]) <= 6  # as many as there are unknowns, and one to judge
    options["optimizer"] = diffopt.SGD(0.4, momentum=0.1)
    whole = Implicit(GMRES(30, rtol=1e-12), whole_state=True)
    solution = diffopt.solve(GAME, split(normal(4, 5)), aimed(aim), **options, estimator=whole)
    assert relative_error(torch.autograd.grad(payoff(solution.params), aim), answer) < CLOSED


@pytest.mark.parametrize("solver", [ConjugateGradient(), Nystrom(3, damping=1e-3)], ids=lambda s: type(s).__name__)
def test_solvers_of_symmetric_systems_are_refused(solver):
    players = split(torch.linalg.solve(MATRIX, AIM))
    match = rf"{type(solver).__name__} was given a vector field.*take GMRES"
    with pytest.raises(diffopt.LinearSolveError, match=match):
        diffopt.implicit(GAME, players, aimed(AIM), solver=solver)
    with pytest.raises(diffopt.LinearSolveError, match=match):
        diffopt.implicit_gradients(GAME, players, aimed(AIM), cotangent=players, solver=solver)
    with pytest.raises(diffopt.LinearSolveError, match=match):  # before the first step
        diffopt.solve(GAME, players, aimed(AIM), optimizer=diffopt.SGD(0.1), steps=1, estimator=Implicit(solver))


def equilibrium(aim: Tensor) -> Tensor:
    players = split(torch.linalg.solve(MATRIX, aim))
    return payoff(diffopt.implicit(GAME, players, aimed(aim), solver=TIGHT))


def test_transforms_over_games():
    aims = normal(5, 4, 5)
    answer = torch.stack(
        [torch.autograd.grad(payoff(split(torch.linalg.solve(MATRIX, a))), a)[0] for a in map(leaf, aims)]
    )
    assert relative_error([vmap(grad(equilibrium))(aims)], [answer]) < CLOSED
    assert relative_error([grad(lambda a: vmap(equilibrium)(a).sum())(aims)], [answer]) < CLOSED
    nested = vmap(vmap(grad(equilibrium)))(aims.reshape(2, 2, 5)).reshape(4, 5)
    assert relative_error([nested], [answer]) < CLOSED
    made = leaf(aims)
    assert relative_error(torch.autograd.grad(vmap(equilibrium)(made).sum(), made), [answer]) < CLOSED


# ------------------------------------------------------------------------------------------ temporal differences

FEATURES = normal(6, 6, 3)
MOVES = torch.softmax(normal(7, 6, 6), dim=-1)
REWARD = normal(8, 6)


def differences(w, discount, reward):
    """The expected semi-gradient of temporal differences: no gradient goes through the value that is aimed at."""
    return FEATURES.T @ (FEATURES @ w - reward - discount * MOVES @ FEATURES @ w) / len(FEATURES)


def values(discount, reward):
    matrix = FEATURES.T @ (FEATURES - discount * MOVES @ FEATURES)
    return torch.linalg.solve(matrix, FEATURES.T @ reward)


@pytest.mark.parametrize("found", ["given", "by steps"])
def test_temporal_differences_with_a_learned_discount(found):
    discount, reward = number(0.6), leaf(REWARD)
    field = diffopt.VectorField(differences)
    if found == "given":
        w = diffopt.implicit(field, values(discount, reward), discount, reward, solver=TIGHT)
    else:
        options = {"optimizer": diffopt.SGD(0.5), "steps": 2000, "estimator": Implicit(Dense())}
        w = diffopt.solve(field, torch.zeros(3, dtype=DOUBLE), discount, reward, **options).params
    got = torch.autograd.grad(w.square().sum(), [discount, reward])
    answer = torch.autograd.grad(values(discount, reward).square().sum(), [discount, reward])
    assert relative_error(got, answer) < CLOSED


# ------------------------------------------------------------------------------------------ roots and fixed points


def test_a_root_of_one_number():
    a = number(3.0)
    z = torch.tensor(1.2134116627622296, dtype=DOUBLE)  # of z**3 + z = 3
    found = diffopt.implicit(diffopt.VectorField(lambda z, a: z**3 + z - a), z, a)
    assert torch.autograd.grad(found, a)[0].item() == pytest.approx(1 / (3 * z.item() ** 2 + 1), rel=1e-12)


def test_a_root_whose_slope_is_negative():
    """No minimum of anything: to a solver of minima it would be negative curvature."""
    a = number(2.0)
    found = diffopt.implicit(diffopt.VectorField(lambda z, a: a - z**2), torch.tensor(2.0**0.5, dtype=DOUBLE), a)
    assert torch.autograd.grad(found, a)[0].item() == pytest.approx(0.5 / 2**0.5, rel=1e-12)


@pytest.mark.parametrize("solver", [GMRES(30, rtol=1e-13), Dense()], ids=str)
def test_a_root_of_many_numbers(solver):
    matrix, b = normal(9, 4, 4), normal(10, 4)

    def field(z, matrix, b):
        return {"z": matrix @ z["z"] + z["z"].sin() + 3 * z["z"] - b}

    def flat(z):
        return field({"z": z}, matrix, b)["z"]

    z = torch.zeros(4, dtype=DOUBLE)
    for _ in range(30):
        z = z - torch.linalg.solve(jacobian(flat, z), flat(z))
    made = [leaf(matrix), leaf(b)]
    found = diffopt.implicit(diffopt.VectorField(field), {"z": z}, *made, solver=solver)
    got = torch.autograd.grad(found["z"].square().sum(), made)
    multiplier = torch.linalg.solve(jacobian(flat, z).T, 2 * z)
    assert relative_error(got, [-torch.outer(multiplier, z), multiplier]) < CLOSED


INPUT = 0.5 * normal(11, 2, 4)


def layer(z, weights, x):
    return torch.tanh(z @ weights["z"] + x @ weights["x"] + weights["b"])


def weights() -> dict[str, Tensor]:
    return {"z": 0.3 * normal(12, 3, 3), "x": normal(13, 4, 3), "b": normal(14, 3)}


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=str)
def test_a_deep_equilibrium(solver):
    """Against the unrolled iteration, and against the Jacobian of the layer."""
    made = {k: leaf(w) for k, w in weights().items()}
    z = torch.zeros(2, 3, dtype=DOUBLE)
    for _ in range(200):
        z = layer(z, made, INPUT)
    wanted = list(made.values())
    answer = torch.autograd.grad(z.sin().sum(), wanted)
    at = z.detach()
    found = diffopt.implicit(diffopt.fixed_point(layer), at, made, INPUT, solver=solver)
    got = torch.autograd.grad(found.sin().sum(), wanted)
    assert relative_error(got, answer) < CLOSED
    slope = jacobian(lambda z: layer(z.reshape(2, 3), made, INPUT).flatten(), at.flatten())
    multiplier = torch.linalg.solve(torch.eye(6, dtype=DOUBLE) - slope.T, at.cos().flatten())
    direct = torch.autograd.grad(layer(at, made, INPUT), wanted, multiplier.reshape(2, 3))
    assert relative_error(got, direct) < CLOSED


def test_damped_steps_to_a_fixed_point():
    """``SGD(lr)`` on ``z - m(z)`` takes steps ``z + lr (m(z) - z)``; with ``lr=1`` they are the iteration itself."""
    made, lr = {k: leaf(w) for k, w in weights().items()}, number(0.6)
    wanted = [*made.values(), lr]
    field, start = diffopt.fixed_point(layer), torch.zeros(2, 3, dtype=DOUBLE)
    found = diffopt.solve(field, start, made, INPUT, optimizer=diffopt.SGD(lr), steps=6).params
    z = start
    for _ in range(6):
        z = z + lr * (layer(z, made, INPUT) - z)
    got, answer = (torch.autograd.grad(x.sin().sum(), wanted) for x in (found, z))
    assert relative_error(got, answer) < CLOSED
    plain = diffopt.solve(field, start, made, INPUT, optimizer=diffopt.SGD(1.0), steps=2).params
    assert torch.allclose(plain, layer(layer(start, made, INPUT), made, INPUT))


def test_a_map_has_to_return_what_it_is_given():
    z = {"z": torch.ones(2), "w": torch.ones(())}
    options = {"optimizer": diffopt.SGD(0.1), "steps": 1}
    with pytest.raises(diffopt.StructureError, match=r"the map returned .*m\['w'\] is missing"):
        diffopt.solve(diffopt.fixed_point(lambda z: {"z": z["z"]}), z, **options)
    with pytest.raises(diffopt.ShapeError, match=r"the map's entry m\['w'\] has shape \(2,\)"):
        diffopt.solve(diffopt.fixed_point(lambda z: {"z": z["z"], "w": z["z"]}), z, **options)
    with pytest.raises(diffopt.LossError, match="m is"):
        diffopt.fixed_point(3)


# ------------------------------------------------------------------------------------------ what is no root


def test_a_point_that_is_no_root_is_refused():
    field = diffopt.VectorField(lambda z, a: z**3 - a)
    with pytest.raises(diffopt.StationarityError, match="the vector field at params has norm"):
        diffopt.implicit(field, torch.tensor(1.0), torch.tensor(4.0))
    with pytest.raises(diffopt.StationarityError, match="solve for its root further"):
        vmap(lambda a: diffopt.implicit(field, torch.tensor(1.0), a))(
            torch.tensor([1.0, 4.0], requires_grad=True)
        ).sum().backward()


def test_a_field_in_small_units_is_refused_by_the_way_to_its_root():
    a = torch.tensor(4.0, dtype=DOUBLE, requires_grad=True)
    turning = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=DOUBLE)
    field = diffopt.VectorField(lambda z, a: 1e-9 * (turning @ z - a))
    z = diffopt.implicit(field, torch.zeros(2, dtype=DOUBLE), a)
    with pytest.raises(diffopt.StationarityError, match="from the stationary point"):
        z.sum().backward()


@pytest.mark.parametrize("curl", [1.0, -3.0])
def test_a_field_that_turns_around_its_root_is_not(curl):
    """Along the field it has next to no slope, which of a loss would mean that the minimum is far away."""
    a = leaf(normal(25, 2))
    matrix = torch.tensor([[1e-7, curl], [-curl, 1e-7]], dtype=DOUBLE)
    near = torch.linalg.solve(matrix, a.detach()) + 1e-4
    z = diffopt.implicit(diffopt.VectorField(lambda z, a: matrix @ z - a), near, a, solver=Dense())
    got = torch.autograd.grad(z[0], a)
    assert relative_error(got, [torch.linalg.inv(matrix)[0]]) < CLOSED


def test_a_field_that_jumps_at_the_point_is_refused():
    """Of the absolute value it is the slope; the shrinking step of its minimiser has a derivative there."""
    field = diffopt.VectorField(lambda z, a: z.sign() + z - a)
    z = torch.zeros(3, dtype=DOUBLE)
    a = torch.full((3,), 0.005, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(diffopt.StationarityError, match=r"kink of the vector field.*fixed_point"):
        diffopt.implicit(field, z, a).sum().backward()
    step = diffopt.fixed_point(lambda z, a: soft(z - (z - a), torch.tensor(1.0, dtype=DOUBLE)))
    assert torch.autograd.grad(diffopt.implicit(step, z, a).sum(), a)[0].tolist() == [0.0] * 3


def test_a_field_without_its_graph_is_refused():
    """Its Jacobian would be zero, and the system singular."""
    field = diffopt.VectorField(lambda z, a: torch.autograd.grad((z**2 / 2 - a * z).sum(), z)[0])
    a, z = number(2.0), torch.tensor(2.0, dtype=DOUBLE)
    with pytest.raises(diffopt.DisconnectedError, match="create_graph=True"):
        diffopt.implicit(field, z, a)
    with pytest.raises(diffopt.DisconnectedError, match="create_graph=True"):
        diffopt.implicit_gradients(field, z, a, cotangent=z)
    whole = diffopt.VectorField(lambda z, a: torch.autograd.grad((z**2 / 2 - a * z).sum(), z, create_graph=True)[0])
    assert torch.autograd.grad(diffopt.implicit(whole, z, a), a)[0].item() == pytest.approx(1.0)
