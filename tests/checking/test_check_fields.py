"""``diffopt.check`` of vector fields: nothing is said of asymmetry, and what is wrong is found."""

from __future__ import annotations

import pytest
import torch
from fields import BATCHES, arguments, normal, start, turning
from torch.func import grad
from torch.nn import functional as F  # noqa: N812  (its usual name)

import diffopt


def learned():
    coupling, pull = arguments()
    return coupling.requires_grad_(), {k: x.requires_grad_() for k, x in pull.items()}, BATCHES[0]


def curved(w, a):
    return (w @ a).sin().sum() + w.square().sum()


MATRIX = normal(1, 4, 4).requires_grad_()

FIT = {
    "far from symmetric": lambda: (diffopt.VectorField(turning), start(), *learned()),
    "turning only": lambda: (diffopt.VectorField(lambda w: w.roll(1) - w.roll(-1)), normal(2, 4)),
    "linear, with a learned matrix": lambda: (diffopt.VectorField(lambda w, m: m @ w), normal(2, 4), MATRIX),
    "in single precision": lambda: (diffopt.VectorField(lambda w, m: m @ w), normal(2, 4).float(), MATRIX.float()),
    "a gradient": lambda: (diffopt.VectorField(grad(curved)), normal(2, 4), MATRIX),
    "a gradient at another point": lambda: (
        diffopt.VectorField(lambda w, m: grad(curved)(w + 0.1 * F.normalize(grad(curved)(w, m), dim=0), m)),
        normal(2, 4),
        MATRIX,
    ),
    "a fixed point": lambda: (diffopt.fixed_point(lambda z, m: (m @ z).tanh()), normal(2, 4), MATRIX),
    "a game": lambda: (
        diffopt.game(lambda p, m: (p[0] @ m @ p[1]) + p[0] @ p[0], lambda p, m: (p[1] ** 4).sum() - p[0] @ m @ p[1]),
        (normal(2, 4), normal(3, 4)),
        MATRIX,
    ),
    "a gradient by hand": lambda: (
        diffopt.game(lambda p, m: (F.batch_norm(m, None, None, p[0], p[0], training=True)).sin().sum()),
        (normal(2, 4),),
        MATRIX,
    ),
}


@pytest.mark.parametrize("name", FIT)
def test_no_false_alarm(name):
    report = diffopt.check(*FIT[name]())
    assert all(finding.outcome == "ok" for finding in report.findings), report


def without_graph(w):
    return torch.autograd.grad((w**4).sum(), w)[0]


class Wrong(torch.autograd.Function):
    """Turns by a matrix, and back by another one than its transpose."""

    @staticmethod
    def forward(ctx, x):
        return x.roll(1)

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent.roll(1)


FAULTS = {
    "not like params": (
        lambda: (diffopt.VectorField(lambda w: w.sum()), normal(2, 4)),
        "scalar, finite",
        diffopt.ShapeError,
        r"v has shape \(\)",
    ),
    "no graph": (
        lambda: (diffopt.VectorField(without_graph), normal(2, 4)),
        "depends on params",
        diffopt.DisconnectedError,
        "create_graph=True",
    ),
    "one entry without a graph": (
        lambda: (diffopt.VectorField(lambda w: (w[1], without_graph(w[0]))), (normal(2, 4), normal(3, 4))),
        "depends on params",
        diffopt.DisconnectedError,
        r"entry v\[1\] does not depend on anything",
    ),
    "half detached": (
        lambda: (diffopt.VectorField(lambda w: w.detach() * w.roll(1)), normal(2, 4)),
        "second derivative",
        diffopt.WrongDerivativeError,
        "most in params",
    ),
    "an argument detached": (
        lambda: (diffopt.VectorField(lambda w, m: m @ w + m.detach().T @ w), normal(2, 4), MATRIX),
        "second derivative",
        diffopt.WrongDerivativeError,
        r"most in args\[0\]",
    ),
    "a Jacobian transposed": (
        lambda: (diffopt.VectorField(lambda w: Wrong.apply(w) + w**2), normal(2, 4)),
        "second derivative",
        diffopt.WrongDerivativeError,
        "most in params",
    ),
    "captured": (
        lambda: (diffopt.VectorField(lambda w: MATRIX @ w), normal(2, 4)),
        "nothing captured",
        diffopt.CapturedTensorError,
        "MATRIX",
    ),
    "a plain gradient": (
        lambda: (
            diffopt.VectorField(lambda w: torch.autograd.grad((w**4).sum(), w, create_graph=True)[0]),
            normal(2, 4),
        ),
        "safe under vmap",
        diffopt.VmapError,
        "torch.func.grad",
    ),
    "batch norm differentiated under vmap": (
        lambda: (
            diffopt.VectorField(grad(lambda w, m: (F.batch_norm(m, None, None, w, w, training=True)).sin().sum())),
            normal(2, 4),
            MATRIX,
        ),
        "safe under vmap",
        diffopt.VmapError,
        r"the second derivative in args\[0\] is .*torch.func.grad of batch norm",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_its_check(name):
    make, check, kind, said = FAULTS[name]
    finding = diffopt.check(*make())[check]
    assert type(finding.error) is kind
    with pytest.raises(kind, match=said):
        raise finding.error


@pytest.mark.parametrize(("penalty", "fits"), [(0.9, True), (1.0, False), (1.1, True)])
def test_an_active_set_that_changes_under_a_small_move_is_reported(penalty, fits):
    """Lasso with three coefficients, of which the last reaches its threshold at a penalty of one."""
    target = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)

    def step(w, penalty):
        return diffopt.prox.L1(penalty)(w - 0.5 * (w - target), 0.5)

    strength = torch.tensor(penalty, dtype=torch.float64)
    solution = diffopt.prox.L1(strength)(target, 1.0)
    report = diffopt.check(diffopt.fixed_point(step), solution, strength)
    assert [finding.check for finding in report.failures] == ([] if fits else ["second derivative"])
