"""``Clip`` beside ``torch.nn.utils`` and ``torch.optim``, and at its edges."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error

import diffopt
from diffopt import SGD, Adam, Clip, Groups, Schedule
from diffopt.estimators import Reverse, Unrolled

DOUBLE = torch.float64


def wavy(params, target):
    return sum((p - target).square().mul(2).add((3 * p).cos()).sum() for p in params)


@pytest.mark.parametrize("bound", [{"max_norm": 1.5}, {"max_norm": 1e9}, {"value": 0.6}], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_twenty_steps_equal_torch(bound, momentum):
    """Weight decay is added after clipping, by the optimizer."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=DOUBLE) for shape in [(3, 2), (4,), ()]]
    target = torch.tensor(0.7, dtype=DOUBLE)
    params = [torch.nn.Parameter(p.clone()) for p in start]
    reference = torch.optim.SGD(params, 0.05, momentum, weight_decay=0.3)
    clipped = 0
    for _ in range(20):
        reference.zero_grad()
        wavy(params, target).backward()
        if "value" in bound:
            torch.nn.utils.clip_grad_value_(params, bound["value"])
        else:
            clipped += bool(torch.nn.utils.clip_grad_norm_(params, bound["max_norm"]) > bound["max_norm"])
        reference.step()
    optimizer = Clip(SGD(0.05, momentum, weight_decay=0.3), **bound)
    solution = diffopt.solve(wavy, start, target, optimizer=optimizer, steps=20)
    assert relative_error(solution.params, [p.detach() for p in params]) < 1e-13
    assert bound != {"max_norm": 1.5} or 0 < clipped <= 20


def test_a_gradient_just_above_the_norm_is_scaled_by_the_small_number_too():
    slope = torch.tensor(2.0, dtype=DOUBLE)
    got = diffopt.solve(lambda w, a: a * w, torch.tensor(0.0).double(), slope, optimizer=Clip(SGD(1.0), 2.0), steps=1)
    assert float(got.params) == -2.0 * 2.0 / (2.0 + 1e-6)


@pytest.mark.parametrize("estimator", [Reverse(), Unrolled()], ids=str)
def test_at_gradients_of_zero_derivatives_are_those_of_the_plain_step(estimator):
    """The norm's derivative there is zero, not NaN; and a bound of zero stops everything."""
    w = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    slope = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    for most, expected in [(1.0, -0.5), (0.0, 0.0)]:
        options = {"optimizer": Clip(SGD(0.5), max_norm=most), "steps": 1, "estimator": estimator}
        solution = diffopt.solve(lambda w, a: a @ w, w, slope, **options)
        got = torch.autograd.grad(solution.params.sum(), [w, slope])
        assert got[0].tolist() == [1.0] * 3
        assert got[1].tolist() == [expected] * 3


def test_the_second_derivative_at_gradients_of_zero_is_finite():
    slope = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    options = {"optimizer": Clip(SGD(0.5), 1.0), "steps": 1, "estimator": Unrolled()}
    solution = diffopt.solve(lambda w, a: a @ w, torch.ones(2).double(), slope, **options)
    (first,) = torch.autograd.grad(solution.params.square().sum(), slope, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), slope)
    assert second.tolist() == [0.5, 0.5]


def test_every_task_of_a_vmap_is_clipped_by_its_own_norm():
    slopes = torch.tensor([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]], dtype=DOUBLE)
    most = torch.tensor([1.0, 1.0, 5.0], dtype=DOUBLE)

    def end(slope, most):
        start = {"a": torch.zeros((), dtype=DOUBLE), "b": torch.zeros(1, dtype=DOUBLE)}
        loss = lambda p, a: a[0] * p["a"] + a[1] * p["b"].sum()  # noqa: E731
        return diffopt.solve(loss, start, slope, optimizer=Clip(SGD(1.0), max_norm=most), steps=1).params

    got = torch.func.vmap(end)(slopes, most)
    assert got["a"].tolist() == pytest.approx([-0.6, -0.3, -3.0], rel=1e-5)
    assert got["b"].flatten().tolist() == pytest.approx([-0.8, -0.4, -4.0], rel=1e-5)


def test_a_norm_over_leaves_of_several_precisions():
    """The sum of squares of half precision would overflow."""
    params = [torch.zeros(2, dtype=torch.float16), torch.zeros(1, dtype=torch.float32)]
    slopes = [torch.tensor([600.0, 0.0], dtype=torch.float16), torch.tensor([800.0])]
    options = {"optimizer": Clip(SGD(1.0), max_norm=torch.tensor(10.0)), "steps": 1}
    solution = diffopt.solve(lambda p, a: (p[0] * a[0]).float().sum() + (p[1] * a[1]).sum(), params, slopes, **options)
    assert [p.dtype for p in solution.params] == [torch.float16, torch.float32]
    assert solution.params[0].tolist() == pytest.approx([-6.0, 0.0], rel=1e-3)
    assert solution.params[1].tolist() == pytest.approx([-8.0])


def test_it_is_elementwise_by_value_only_and_as_far_as_what_is_inside():
    assert Clip(Adam(0.1), value=1.0).elementwise
    assert not Clip(Adam(0.1), max_norm=1.0).elementwise
    assert not Clip(Clip(Adam(0.1), max_norm=1.0), value=1.0).elementwise
    assert not Clip(diffopt.Preconditioned(0.1, diagonal=1.0), value=1.0).elementwise
    assert Clip(Groups({"a": SGD(0.1)}), value=1.0).elementwise


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Clip(SGD(0.1)), diffopt.HyperparameterError, "Clip: neither max_norm nor value were given"),
        (lambda: Clip(SGD(0.1), 1.0, 1.0), diffopt.HyperparameterError, "Clip: both max_norm and value were given"),
        (lambda: Clip(SGD(0.1), -1.0), diffopt.HyperparameterError, r"Clip: max_norm is -1\.0"),
        (lambda: Clip(SGD(0.1), value={"a": -1.0}), diffopt.HyperparameterError, r"Clip: value\['a'\] is -1\.0"),
        (lambda: Clip(SGD(0.1), {"a": 1.0}), diffopt.HyperparameterError, "one number for all parameters"),
        (lambda: Clip(SGD(0.1), torch.ones(2)), diffopt.HyperparameterError, "diffopt.Groups"),
        (lambda: Clip(SGD(0.1), Schedule(torch.ones(2, 2))), diffopt.HyperparameterError, "one number for all"),
        (lambda: Clip(SGD(0.1), "1"), diffopt.HyperparameterError, "Clip: max_norm is '1'"),
        (lambda: Clip(SGD, 1.0), diffopt.OptimizerError, r"Clip: optimizer is .*call it, as in SGD\(lr=0\.1\)"),
        (lambda: Clip(1.0, 1.0), diffopt.OptimizerError, "Clip: optimizer is float 1.0"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_numbers_of_numpy_and_schedules_are_bounds():
    numpy = pytest.importorskip("numpy")
    assert Clip(SGD(0.1), numpy.float32(0.5)).max_norm == 0.5
    options = {"optimizer": Clip(SGD(1.0), value=Schedule([1.0, 0.5])), "steps": 2}
    end = diffopt.solve(lambda w: 10 * w, torch.tensor(0.0), **options)
    assert float(end.params) == -1.5
