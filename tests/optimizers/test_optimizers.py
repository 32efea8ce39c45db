"""The optimizers against ``torch.optim`` forwards, and at their traps backwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lifted import SHAPES, as_tensor, tensors, trained, wavy, with_a_dead_feature
from oracles import relative_error

import diffopt
from diffopt import SGD, Adagrad, Adam, AdamW, Leaves, Preconditioned, ProximalGD, RMSprop, Schedule
from diffopt.estimators import ForwardMode, Reverse, Unrolled

TORCH = [
    (SGD, torch.optim.SGD, {"lr": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (Adam, torch.optim.Adam, {"lr": 0.05}),
    (Adam, torch.optim.Adam, {"lr": 0.05, "betas": (0.6, 0.7), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True}),
    (Adam, torch.optim.Adam, {"lr": 0.05, "maximize": True}),
    (AdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2}),
    (AdamW, torch.optim.AdamW, {"lr": 0.05, "amsgrad": True, "betas": (0.5, 0.6), "maximize": True}),
    (RMSprop, torch.optim.RMSprop, {"lr": 0.02}),
    (RMSprop, torch.optim.RMSprop, {"lr": 0.02, "maximize": True}),
    (RMSprop, torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.7, "centered": True, "momentum": 0.6, "weight_decay": 0.1}),
    (Adagrad, torch.optim.Adagrad, {"lr": 0.1}),
    (Adagrad, torch.optim.Adagrad, {"lr": 0.1, "maximize": True}),
    (Adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.1, "initial_accumulator_value": 0.2}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), TORCH, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("in_tensors", [False, True], ids=["floats", "tensors"])
def test_twenty_steps_equal_torch_optim(ours, theirs, options, in_tensors):
    start, target, losses = tensors(SHAPES, 0), torch.tensor(0.7, dtype=torch.float64), []
    expected = trained(theirs, {"foreach": False, **options}, start, target, 20, losses)
    made = {k: as_tensor(v) if in_tensors else v for k, v in options.items()}
    solution = diffopt.solve(wavy, start, target, optimizer=ours(**made), steps=20)
    assert relative_error(solution.params, expected) < 1e-12
    assert relative_error([solution.losses], [torch.stack(losses)]) < 1e-12


@pytest.mark.parametrize(("ours", "theirs", "options"), TORCH, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled(), ForwardMode()], ids=str)
def test_hypergradients_are_finite_where_the_gradient_is_exactly_zero(ours, theirs, options, estimator):
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    gradients = with_a_dead_feature(ours(**{**options, "lr": lr}), estimator, lr)
    assert all(g.isfinite().all() for g in gradients)
    assert float(gradients[0][0]) != 0


def test_adam_at_a_zero_gradient_has_the_derivative_of_its_momentum_alone():
    # d = 0 with v = 0: the root's slope is taken as 0, so that E = -lr (1 - beta1) / (b1 eps) = -lr / eps at t = 1.
    lr, eps = 0.01, 0.1
    slope = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(2.0, dtype=torch.float64)
    solution = diffopt.solve(lambda w, a: a * w, w, slope, optimizer=Adam(lr, eps=eps), steps=1)
    (got,) = torch.autograd.grad(solution.params, slope)
    assert abs(float(got) + lr / eps) < 1e-12


@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(2), Unrolled(), ForwardMode()], ids=str)
def test_trees_and_schedules_of_hyperparameters(estimator):
    steps = 4
    generator = torch.Generator().manual_seed(3)
    params = {k: torch.randn(n, generator=generator, dtype=torch.float64) for k, n in [("a", 2), ("b", 3)]}

    def leaf(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).mul(0.1).add(0.05).requires_grad_()

    meta_sgd = {"a": leaf(2), "b": leaf(3)}
    per_layer_per_step = Schedule({"a": leaf(steps), "b": leaf(steps, 3)})
    per_step = Schedule(leaf(steps))

    def loss(p):
        return (p["a"].square().sum() + 1) * (p["b"].sin().sum() + 4)

    def by_hand(lr, decay, momentum):
        now, velocity = dict(params), dict.fromkeys(params, 0.0)
        for t in range(steps):
            leaves = {k: v.detach().requires_grad_() if not v.requires_grad else v for k, v in now.items()}
            grads = torch.autograd.grad(loss(leaves), leaves.values(), create_graph=True)
            for k, g in zip(leaves, grads, strict=True):
                velocity[k] = momentum(t) * velocity[k] + g + decay(k) * leaves[k]
                now[k] = leaves[k] - lr(k, t) * velocity[k]
        return now

    rates, layered, half = per_step.values, per_layer_per_step.values, {"a": 0.1, "b": meta_sgd["b"]}
    tenths = Schedule([0.1, 0.2, 0.3, 0.4])
    cases = [
        (SGD(meta_sgd, momentum=0.5), by_hand(lambda k, t: meta_sgd[k], lambda k: 0.0, lambda t: 0.5)),
        (
            SGD(per_layer_per_step, momentum=per_step, weight_decay=meta_sgd),
            by_hand(lambda k, t: layered[k][t], lambda k: meta_sgd[k], lambda t: rates[t]),
        ),
        (
            SGD(tenths, momentum=per_step, weight_decay=half),
            by_hand(lambda k, t: 0.1 * (t + 1), lambda k: half[k], lambda t: rates[t]),
        ),
    ]
    leaves = [*meta_sgd.values(), *layered.values(), rates]
    for optimizer, expected in cases:
        found = diffopt.solve(loss, params, optimizer=optimizer, steps=steps, estimator=estimator).params
        assert relative_error(list(found.values()), list(expected.values())) < 1e-12
        ends = [end["a"].square().sum() + end["b"].sum() for end in (found, expected)]
        zeros = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        assert relative_error(*(torch.autograd.grad(end, leaves, **zeros) for end in ends)) < 1e-12


@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(2), Unrolled(), ForwardMode(chunk_size=3)], ids=str)
def test_kronecker_preconditioning_equals_the_matrix_of_the_kronecker_product(estimator):
    generator = torch.Generator().manual_seed(4)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    w, left, middle, diagonal = leaf(2, 3, 4), leaf(2, 2), leaf(3, 3), leaf(2, 3, 4)
    optimizer = Preconditioned(0.01, diagonal={"w": diagonal}, factors={"w": (left, middle, None)})

    def loss(p):
        return p["w"].square().sum() * p["w"].sum().cos()

    solution = diffopt.solve(loss, {"w": w}, optimizer=optimizer, steps=3, estimator=estimator)
    now = w.flatten()
    for _ in range(3):
        (g,) = torch.autograd.grad(loss({"w": now.reshape(2, 3, 4)}), now, create_graph=True)
        matrix = torch.kron(torch.kron(left, middle), torch.eye(4, dtype=torch.float64))
        now = now - 0.01 * matrix @ (diagonal.flatten() * g)
    leaves = [w, left, middle, diagonal]
    got = torch.autograd.grad(solution.params["w"].square().sum(), leaves)
    assert relative_error(got, torch.autograd.grad(now.square().sum(), leaves)) < 1e-11


def test_a_given_proximal_center_is_a_meta_parameter():
    # w+ = w - lr (w + s (w - c)) twice, from w_1: dw_3/dc = lr s (1 + 1 - lr (1 + s)).
    lr, s = 0.1, 0.5
    center = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(1.0, dtype=torch.float64)
    solution = diffopt.solve(lambda w: w**2 / 2, w, optimizer=ProximalGD(lr, s, center=center), steps=2)
    (got,) = torch.autograd.grad(solution.params, center)
    assert abs(float(got) - lr * s * (2 - lr * (1 + s))) < 1e-12


def test_a_scalar_of_another_dtype_takes_that_of_each_parameter():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = [torch.ones(2, dtype=torch.float32), torch.ones(1, dtype=torch.float64)]
    solution = diffopt.solve(lambda p: sum(x.double().square().sum() for x in p), params, optimizer=SGD(lr), steps=2)
    assert [p.dtype for p in solution.params] == [torch.float32, torch.float64]
    (got,) = torch.autograd.grad(solution.params[0].double().sum() + solution.params[1].sum(), lr)
    assert abs(float(got) - 3 * 2 * 0.8 * -2) < 1e-5  # w (1 - 2 lr)^2, three coordinates; float32 in two of them
    assert got.dtype == torch.float64


def test_init_sees_the_first_entry_of_a_schedule():
    start = Schedule(torch.tensor([0.5, 7.0], dtype=torch.float64))
    w = torch.tensor(1.0, dtype=torch.float64)
    optimizer = Adagrad(0.0, initial_accumulator_value=start)
    solution = diffopt.solve(lambda w: w**2, w, optimizer=optimizer, steps=2)
    assert float(solution.state.buffers["square"]) == 0.5 + 4 + 4


def test_the_larger_of_two_equals_is_the_second():
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    y = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (larger,) = Leaves([x]).where_greater(Leaves([y]))
    assert [float(g) for g in torch.autograd.grad(larger, [x, y])] == [0.0, 1.0]


@given(value=st.floats(0, 10), other=st.floats(-10, 10))
def test_leaves_arithmetic_is_elementwise(value, other):
    x = Leaves([torch.tensor([value, 1.0], dtype=torch.float64), torch.tensor(other, dtype=torch.float64)])
    y = Leaves([torch.tensor([other, 2.0], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)])
    for ours, plain in [
        (2 * x + y - 1, [2 * a + b - 1 for a, b in zip(x, y, strict=True)]),
        (1 - x * y, [1 - a * b for a, b in zip(x, y, strict=True)]),
        (-x / (y * y + 1), [-a / (b * b + 1) for a, b in zip(x, y, strict=True)]),
        (2 / (x**2 + 1), [2 / (a**2 + 1) for a in x]),
        ((x * x).sqrt(), [(a * a).sqrt() for a in x]),
        (x.where_greater(y), [torch.maximum(a, b) for a, b in zip(x, y, strict=True)]),
    ]:
        # (a processor may add what it multiplies without rounding in between: numbers of up to a hundred)
        torch.testing.assert_close(list(ours), plain, rtol=1e-14, atol=1e-13)
