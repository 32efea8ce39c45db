"""Games: each player's own gradient, differentiable by what the others do, under every transform and layer."""

from __future__ import annotations

import pytest
import torch
from fields import normal
from oracles import relative_error
from torch import nn
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import Binomial, ForwardMode, Reverse, Unrolled

ROUND_OFF = 1e-10
ESTIMATORS = [Reverse(), Reverse(1), Unrolled(), ForwardMode(), Binomial(3)]
STEPS = 3


def generator(params, price, data):
    """The first player: its own cost, and what the second makes of it."""
    made, judge = params
    seen = torch.tanh(data @ made["w"] + made["b"])
    return (seen @ judge["w"]).sigmoid().log().mean() * price + 0.3 * (made["w"] * judge["c"]).sum() ** 2


def critic(params, price, data):
    made, judge = params
    seen = torch.tanh(data @ made["w"] + made["b"])
    return (judge["w"] * judge["w"]).sum() / 2 - (seen @ judge["w"]).sin().mean() + judge["c"] ** 4 * made["b"].sum()


def start():
    return ({"w": normal(1, 2, 2), "b": normal(2, 2)}, {"w": normal(3, 2), "c": normal(4)})


def outer(players):
    return players[0]["w"].sin().sum() + players[1]["w"].square().sum() + players[1]["c"]


def by_hand(players, price, data, lr):
    for _ in range(STEPS):
        moved = []
        for player, loss in zip(players, (generator, critic), strict=True):
            own = list(player.values())
            grads = torch.autograd.grad(loss(players, price, data), own, create_graph=True, materialize_grads=True)
            moved.append({k: p - lr * g for (k, p), g in zip(player.items(), grads, strict=True)})
        players = tuple(moved)
    return players


GAME = diffopt.game(generator, critic)
DATA, PRICE, LR = normal(5, 4, 2), torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)


def leaves():
    first, second = start()
    made = [first["w"], first["b"], second["w"], second["c"], PRICE, DATA, LR]
    return [x.clone().requires_grad_() for x in made]


def value(estimator, *made):
    a, b, c, d, price, data, lr = made
    players = ({"w": a, "b": b}, {"w": c, "c": d})
    if estimator is None:
        return outer(by_hand(players, price, data, lr))
    optimizer = diffopt.SGD(lr)
    return outer(
        diffopt.solve(GAME, players, price, data, optimizer=optimizer, steps=STEPS, estimator=estimator).params
    )


def answers(*made):
    own = [x.detach().clone().requires_grad_() for x in made]
    return torch.autograd.grad(value(None, *own), own)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
class TestTwoPlayers:
    def test_plain(self, estimator):
        made = leaves()
        assert relative_error(torch.autograd.grad(value(estimator, *made), made), answers(*made)) < ROUND_OFF

    def test_vmap_of_grad_and_nested(self, estimator):
        made = [x.detach() for x in leaves()]
        made[1], made[5] = normal(11, 3, 2), normal(12, 2, 3, 4, 2)
        of_one = grad(lambda *made: value(estimator, *made), argnums=tuple(range(7)))
        inner = vmap(of_one, in_dims=(None, 0, None, None, None, 0, None))
        got = vmap(inner, in_dims=(None, None, None, None, None, 0, None))(*made)
        for i in range(2):
            for j in range(3):
                own = [*made]
                own[1], own[5] = made[1][j], made[5][i, j]
                assert relative_error([x[i, j] for x in got], answers(*own)) < ROUND_OFF

    def test_grad_of_vmap(self, estimator):
        made = [x.detach() for x in leaves()]
        made[5] = normal(13, 3, 4, 2)

        def total(*made):
            return vmap(lambda data: value(estimator, *made[:5], data, made[6]))(made[5]).sum()

        got = grad(total, argnums=tuple(range(7)))(*made)
        own = [x.clone().requires_grad_() for x in made]
        expected = torch.autograd.grad(sum(value(None, *own[:5], x, own[6]) for x in own[5]), own)
        assert relative_error(got, expected) < ROUND_OFF


def test_a_field_is_what_it_says():
    """Called by hand: a tuple of partial gradients, under grad mode or not."""
    players = start()
    with torch.no_grad():
        found = GAME.v(players, PRICE, DATA)
    for k, loss in enumerate((generator, critic)):
        own = [{name: x.clone().requires_grad_(i == k) for name, x in p.items()} for i, p in enumerate(players)]
        expected = torch.autograd.grad(loss(own, PRICE, DATA), list(own[k].values()), materialize_grads=True)
        assert relative_error(list(found[k].values()), expected) < ROUND_OFF


def test_one_player_is_a_loss():
    a = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def loss(w, a):
        return (a * w).cos().sum() + w.square().sum()

    options = {"optimizer": diffopt.SGD(0.1, momentum=0.5), "steps": 4}
    w = normal(21, 3)
    alone = diffopt.solve(diffopt.game(lambda params, a: loss(params[0], a)), (w,), a, **options).params[0]
    plain = diffopt.solve(loss, w, a, **options).params
    assert relative_error(*(torch.autograd.grad([x.sin().sum()], a) for x in (alone, plain))) < ROUND_OFF


def test_a_player_that_detaches_the_other_loses_its_part():
    """What the docstring warns of, and what the wrong number is."""

    def follows(detach):
        return diffopt.game(
            lambda xy: (xy[0] - (xy[1].detach() if detach else xy[1])) ** 2, lambda xy: (xy[1] - 1.0) ** 2
        )

    y = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor(0.0, dtype=torch.float64)
    found = []
    for detach in (False, True):
        end = diffopt.solve(follows(detach), (x, y), optimizer=diffopt.SGD(0.25), steps=1).params[0]
        found.append(float(torch.autograd.grad(end, y, allow_unused=True)[0] or 0.0))
    assert found == [0.5, 0.0]


def test_batch_norm_under_vmap():
    """Of which ``vmap(torch.func.grad)`` has a wrong derivative."""
    norm = nn.BatchNorm1d(3, track_running_stats=False, dtype=torch.float64).requires_grad_(False)

    def first(params, x):
        scaled = torch.nn.functional.batch_norm(x * params[1], None, None, params[0]["w"], params[0]["b"], True)
        return (norm(scaled) * scaled.sin()).sum()

    def second(params, x):
        scaled = torch.nn.functional.batch_norm(x * params[1], None, None, params[0]["w"], params[0]["b"], True)
        return scaled.cos().sum() + params[1].square().sum()

    def end(w, b, p, x):
        players = ({"w": w, "b": b}, p)
        options = {"optimizer": diffopt.SGD(0.01), "steps": 2}
        found = diffopt.solve(diffopt.game(first, second), players, x, **options).params
        return found[0]["w"].sin().sum() + found[1].square().sum()

    made = [normal(31, 3), normal(32, 3), normal(33, 3), normal(34, 4, 5, 3)]
    got = vmap(grad(end, argnums=(0, 1, 2, 3)), in_dims=(None, None, None, 0))(*made)
    for i in range(4):
        own = [x.clone().requires_grad_() for x in (*made[:3], made[3][i])]
        assert relative_error([x[i] for x in got], torch.autograd.grad(end(*own), own)) < 1e-9


def test_batches_and_constants_reach_every_player():
    data = normal(41, 2, 3)

    def follow(number):
        return lambda params, name, scale, batch: (scale * params[number] - batch[number]).square() * len(name)

    a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    params = tuple(torch.zeros(3, dtype=torch.float64).unbind())
    field = diffopt.game(*map(follow, range(3)))
    options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "batches": data}
    got = torch.autograd.grad(sum(diffopt.solve(field, params, "ab", a, **options).params), a)
    w = torch.zeros(3, dtype=torch.float64)
    for batch in data:
        w = w - 0.1 * 4 * a * (a * w - batch)
    assert relative_error(got, torch.autograd.grad(w.sum(), a)) < ROUND_OFF


def test_linear_losses_are_no_fault():
    """Their gradients are constants, and need no graph to be right."""
    a = torch.tensor(0.5, requires_grad=True)
    field = diffopt.game(lambda xy, a: 3 * xy[0], lambda xy, a: a * xy[1])
    x, y = diffopt.solve(field, (torch.tensor(1.0), torch.tensor(1.0)), a, optimizer=diffopt.SGD(0.1), steps=2).params
    assert float(x.detach()) == pytest.approx(0.4)
    assert torch.autograd.grad(y, a)[0].item() == pytest.approx(-0.2)


ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("losses", "params", "error", "message"),
    [
        ((lambda p: p[0] ** 2, lambda p: p[0] ** 2), (ONE, ONE), diffopt.DisconnectedError, "player 1 does not depend"),
        ((lambda p: p[0] ** 2, lambda p: 1.0), (ONE, ONE), diffopt.LossError, "player 1 returned float 1.0"),
        ((lambda p: p[0] ** 2,), (ONE, ONE), diffopt.StructureError, "a tuple of 1, one entry for each player"),
        ((lambda p: p[0] ** 2, lambda p: p[1] ** 2), ONE, diffopt.StructureError, "a tuple of 2"),
        ((lambda p: p[0] ** 2, lambda p: p[1] ** 2), {0: ONE, 1: ONE}, diffopt.StructureError, "a tuple of 2"),
        ((lambda p, a: p[0] ** 2,), (ONE,), diffopt.LossError, r"player 0's loss takes \(p, a\)"),
    ],
    ids=["no own entry", "no tensor", "too many entries", "one tensor", "a dict", "arguments"],
)
@pytest.mark.parametrize("batched", [False, True], ids=["plain", "vmap"])
def test_what_is_no_game_is_refused(losses, params, error, message, batched):
    def run(scale):
        moved = diffopt.tensors.tree.map_leaves(lambda x: scale * x, params)
        return diffopt.solve(diffopt.game(*losses), moved, optimizer=diffopt.SGD(0.1), steps=1).losses

    with pytest.raises(error, match=message):
        vmap(run)(torch.ones(2)) if batched else run(1.0)


def test_no_player_and_no_function_are_refused():
    with pytest.raises(diffopt.LossError, match="no loss"):
        diffopt.game()
    with pytest.raises(diffopt.LossError, match="game: loss 1 is"):
        diffopt.game(lambda p: p[0], 3.0)


@pytest.mark.parametrize("estimator", [Reverse(), Unrolled()], ids=str)
def test_a_captured_tensor_of_a_transform_is_refused(estimator):
    def end(a, w):
        field = diffopt.game(lambda p: (a * p[0]) ** 2, lambda p: p[1] ** 2 + p[0] * p[1])
        return diffopt.solve(field, (w, w), optimizer=diffopt.SGD(0.1), steps=2, estimator=estimator).params[0]

    with pytest.raises(diffopt.CapturedTensorError):
        vmap(end, in_dims=(0, None))(torch.ones(3), torch.tensor(1.0))
    with pytest.raises(diffopt.CapturedTensorError):
        vmap(end)(torch.ones(3), torch.ones(3))


def test_tasks_that_share_the_players_have_gradients_of_their_own():
    """Called by hand under vmap, where nothing has given each task its own params."""
    players, data = start(), normal(51, 3, 4, 2)
    found = vmap(GAME.v, in_dims=(None, None, 0))(players, PRICE, data)
    for i in range(3):
        alone = GAME.v(players, PRICE, data[i])
        for player in range(2):
            got = [x[i] for x in found[player].values()]
            assert relative_error(got, list(alone[player].values())) < ROUND_OFF


@pytest.mark.slow
@pytest.mark.compiler
def test_compiled_games():
    made = leaves()
    a, b, c, d, price, data, lr = made
    options = {"optimizer": diffopt.SGD(lr), "steps": STEPS, "compile": True}
    solution = diffopt.solve(GAME, ({"w": a, "b": b}, {"w": c, "c": d}), price, data, **options)
    assert relative_error(torch.autograd.grad(outer(solution.params), made), answers(*made)) < ROUND_OFF
