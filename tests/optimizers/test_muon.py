"""``Muon``: the formula of ``torch.optim.Muon``, by code of the test's own, and by singular values."""

from __future__ import annotations

import pytest
import torch
from compositions import muon
from oracles import relative_error

import diffopt
from diffopt import SGD, AdamW, Groups, Muon, Schedule
from diffopt.estimators import ForwardMode, Reverse, Unrolled

DOUBLE = torch.float64
SHAPES = [(3, 2), (2, 5), (4, 4), (1, 3), (3, 1)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def wavy(params, target):
    return sum((p - target).square().mul(0.5).add((3 * p).cos()).sum() for p in params)


OPTIONS = [
    ({}, {}),
    ({"lr": 0.05, "weight_decay": 0.0, "momentum": 0.0}, {"lr": 0.05, "weight_decay": 0.0, "momentum": 0.0}),
    ({"nesterov": False, "momentum": 0.8}, {"nesterov": False, "momentum": 0.8}),
    ({"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 9}, {"abc": (1.5, -0.5, 0.0), "steps": 9}),
    ({"adjust_lr_fn": "match_rms_adamw"}, {"rms": True}),
    ({"adjust_lr_fn": "original", "eps": 30.0}, {"eps": 30.0}),
]


@pytest.mark.parametrize(("options", "by_hand"), OPTIONS, ids=str)
def test_twenty_steps_equal_the_formula(options, by_hand):
    start = [normal(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    target = torch.tensor(0.7, dtype=DOUBLE)
    update, now, memory = muon(**{"lr": 1e-3, **by_hand}), start, {}
    for t in range(1, 21):
        leaves = [p.detach().requires_grad_() for p in now]
        now = update(leaves, torch.autograd.grad(wavy(leaves, target), leaves), memory, t)
    got = diffopt.solve(wavy, start, target, optimizer=Muon(**options), steps=20).params
    assert relative_error(got, now) < 1e-12


@pytest.mark.parametrize("options", [{}, {"lr": 0.05, "nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}], ids=str)
def test_a_step_is_that_of_torch_up_to_its_rounding(options):
    """Torch rounds to bfloat16 within Newton-Schulz, whose steps enlarge that: a few hundredths of the move."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    start = [normal(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    reference = torch.optim.Muon(params, **options)
    target = torch.tensor(0.7, dtype=DOUBLE)
    wavy(params, target).backward()
    reference.step()
    got = diffopt.solve(wavy, start, target, optimizer=Muon(**options), steps=1).params
    lr = options.get("lr", 1e-3)
    for p, mine, theirs in zip(start, got, params, strict=True):
        moves = [(x.detach() - p * (1 - 0.1 * lr)) / lr for x in (mine, theirs)]
        assert float((moves[0] - moves[1]).norm() / moves[1].norm()) < 0.06


def test_the_defaults_are_those_of_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    theirs = torch.optim.Muon([torch.nn.Parameter(torch.ones(1, 1))]).defaults
    mine = vars(Muon())
    assert {name: mine[name] for name in mine} == {name: theirs[name] for name in mine}


def test_a_move_is_a_polynomial_of_the_singular_values():
    slope = normal(3, 4, seed=9)
    u, s, vt = torch.linalg.svd(slope, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    options = {"optimizer": Muon(0.5, weight_decay=0.0), "steps": 1}
    got = diffopt.solve(lambda w, a: (a * w).sum(), torch.zeros_like(slope), slope, **options).params
    assert relative_error([got], [-0.5 * u @ torch.diag(s) @ vt]) < 1e-12


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled(), ForwardMode()], ids=str)
def test_weight_decay_is_differentiated(estimator):
    """Without a gradient only the decay acts: ``w (1 - lr wd)^T``."""
    decay = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    lr = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)
    w = normal(2, 3)
    solution = diffopt.solve(lambda w: 0 * w.sum(), w, optimizer=Muon(lr, decay), steps=4, estimator=estimator)
    got = torch.autograd.grad(solution.params.sum(), [decay, lr])
    slope = -4 * float(w.sum()) * (1 - 0.06) ** 3
    assert [float(x) for x in got] == pytest.approx([slope * 0.2, slope * 0.3], rel=1e-12)


def test_params_keep_their_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = normal(3, 4).to(dtype)
        end = diffopt.solve(lambda w: w.float().square().sum(), w, optimizer=Muon(0.1), steps=3).params
        assert end.dtype == dtype
        exact = diffopt.solve(lambda w: w.square().sum(), w.double(), optimizer=Muon(0.1), steps=3).params
        assert relative_error([end.double()], [exact]) < (1e-5 if dtype == torch.float32 else 0.1)


def test_of_a_network_the_matrices_and_the_rest_have_optimizers_of_their_own():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    function, params = diffopt.functional(net)
    x, y = normal(8, 3), normal(8, 1, seed=1)
    groups = Groups(
        lambda path: "matrices" if path.endswith("weight") else "rest",
        {"matrices": Muon(Schedule([0.02, 0.01])), "rest": AdamW(1e-2)},
    )
    options = {"optimizer": groups, "steps": 2}
    solution = diffopt.solve(lambda p, x, y: (function(p, x) - y).square().mean(), params, x, y, **options)
    assert sorted(solution.state.buffers) == ["matrices.momentum", "rest.mean", "rest.square"]
    assert float(solution.losses[1].detach()) < float(solution.losses[0].detach())


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused_with_advice(shape):
    with pytest.raises(diffopt.ShapeError, match=r"^Muon: a parameter has shape .*matrices only; .*Groups"):
        diffopt.solve(
            lambda p: p["b"].sum(), {"a": torch.ones(2, 2), "b": torch.ones(shape)}, optimizer=Muon(), steps=1
        )


def test_under_vmap_the_axis_of_the_tasks_is_none_of_a_matrix():
    with pytest.raises(diffopt.ShapeError, match="Muon"):
        torch.func.vmap(lambda w: diffopt.solve(lambda w: w.sum(), w, optimizer=Muon(), steps=1).params)(
            torch.ones(2, 3)
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, r"Muon: lr is -1\.0"),
        ({"momentum": -0.1}, r"Muon: momentum is -0\.1"),
        ({"weight_decay": -0.1}, r"Muon: weight_decay is -0\.1"),
        ({"ns_steps": 100}, "Muon: ns_steps is int 100, expected an integer >= 0 and < 100"),
        ({"ns_steps": 2.5}, "Muon: ns_steps"),
        ({"ns_coefficients": (1.0, 2.0)}, "Muon: ns_coefficients is tuple"),
        ({"ns_coefficients": (1.0, 2.0, torch.ones(2))}, "one number for all parameters"),
        ({"eps": {"a": 1e-7}}, "one number for all parameters"),
        ({"adjust_lr_fn": "rms"}, "Muon: adjust_lr_fn is str 'rms'"),
        ({"nesterov": 1}, "Muon: nesterov is int 1"),
    ],
)
def test_options_that_torch_refuses_are_refused(options, match):
    with pytest.raises(diffopt.HyperparameterError, match=match):
        Muon(**options)


def test_where_an_optimizer_of_torch_was_given_the_native_one_is_named():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    w = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(diffopt.OptimizerError, match=r"write diffopt\.Muon\(lr=\.\.\.\)$"):
        diffopt.solve(lambda w: w.sum(), w, optimizer=torch.optim.Muon([w]), steps=1)
    with pytest.raises(diffopt.LiftError, match=r"use diffopt\.Muon$"):
        diffopt.from_torch(torch.optim.Muon)


def test_a_group_of_another_optimizer_may_hold_what_is_no_matrix():
    params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    options = {"optimizer": Groups({"w": Muon(), "b": SGD(0.5)}), "steps": 1}
    end = diffopt.solve(lambda p: p["w"].sum() + p["b"].sum(), params, **options).params
    assert end["b"].tolist() == [0.5, 0.5]
