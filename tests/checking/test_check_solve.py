"""``diffopt.check`` of a whole solve: chaos and wrong derivatives are found, smooth programs pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from check_cases import learned, numbers
from stateless import Stateless
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

import diffopt
from diffopt import SGD, Adam, check

SOLVE = ("adjoint", "smooth", "precise")
x, y = numbers(16, 4).double(), numbers(16).double().sin()


def ridge(w: Tensor, weights: Tensor) -> Tensor:
    return (weights * (x @ w - y).square()).mean() + 0.1 * w.square().sum()


def logistic(w: Tensor, log_penalty: Tensor) -> Tensor:
    return F.softplus(-(x.to(w.dtype) @ w) * y.to(w.dtype).sign()).mean() + log_penalty.exp() * w.square().sum()


def network(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> tuple[Callable[..., Tensor], Any]:
    torch.manual_seed(0)
    function, params = diffopt.functional(nn.Sequential(nn.Linear(4, 6), kind(), nn.Linear(6, 1)).to(dtype))
    inputs, targets = x.to(dtype), y.to(dtype)
    return lambda p, w: (w * (function(p, inputs)[:, 0] - targets).square()).mean(), params


def dropped(p: dict[str, Tensor], w: Tensor) -> Tensor:
    hidden = F.dropout(torch.tanh(x @ p["a"]), 0.3)
    return (w * (hidden @ p["b"] - y).square()).mean()


def smooth() -> dict[str, tuple[Any, Any, tuple[Any, ...], Any, int]]:
    start, ones, zeros = numbers(4).double(), torch.ones(16).double(), torch.zeros(()).double()
    net, single = network(nn.Tanh), network(nn.SiLU, torch.float32)
    two = {"a": numbers(4, 5).double(), "b": numbers(5).double()}
    return {
        "quadratic, SGD": (ridge, start, (learned(ones),), SGD(0.1), 10),
        "quadratic, momentum": (ridge, start, (learned(ones),), SGD(learned(0.1), momentum=learned(0.8)), 10),
        "quadratic, Adam": (ridge, start, (learned(ones),), Adam(learned(0.05)), 10),
        "quadratic, to the end": (ridge, learned(start), (learned(ones),), SGD(0.2), 100),
        "quadratic, nothing learned": (ridge, start, (ones,), SGD(0.1), 5),
        "logistic, SGD": (logistic, start, (learned(zeros),), SGD(0.5), 10),
        "logistic, Nesterov": (logistic, start, (learned(zeros),), SGD(0.1, momentum=0.9, nesterov=True), 10),
        "logistic, Adam": (logistic, start, (learned(zeros),), Adam(0.05, betas=(learned(0.9), learned(0.99))), 10),
        "logistic, from zero": (logistic, torch.zeros(4), (learned(0.0, torch.float32),), SGD(0.5), 10),
        "tanh, SGD": (*net, (learned(ones),), SGD(0.1), 10),
        "tanh, momentum": (*net, (learned(ones),), SGD(0.05, momentum=0.9), 10),
        "tanh, Adam": (*net, (learned(ones),), Adam(0.01), 10),
        "SiLU in float32": (*single, (learned(ones, torch.float32),), SGD(learned(0.1, torch.float32)), 10),
        "dropout": (dropped, two, (learned(ones),), SGD(0.1), 10),
        "a schedule": (ridge, start, (learned(ones),), SGD(diffopt.Schedule(learned(torch.full((10,), 0.1)))), 10),
    }


@pytest.mark.parametrize("name", smooth())
def test_smooth_programs_pass(name: str) -> None:
    loss, params, args, optimizer, steps = smooth()[name]
    before = torch.get_rng_state()
    report = check(loss, params, *args, optimizer=optimizer, steps=steps)
    assert [report[name].outcome for name in SOLVE] == ["ok"] * 3, report
    assert report.ok
    assert torch.equal(torch.get_rng_state(), before)


def cubic(w: Tensor, *_: Tensor) -> Tensor:
    """SGD(1) makes of it the logistic map, ``w <- 4 w (1 - w)``."""
    return (4 / 3 * w**3 - 3 / 2 * w**2).sum()


def wells(w: Tensor, *_: Tensor) -> Tensor:
    """SGD(2) makes of it Chebyshev's cubic, ``w <- 3 w - 2 w**3``."""
    return (w**4 / 4 - w**2 / 2).sum()


def waves(w: Tensor, scale: Tensor) -> Tensor:
    return (scale * torch.sin(w)).sum()


CHAOTIC = {
    "logistic map": (cubic, (), SGD(1.0), 30, 2.0),
    "two wells": (wells, (), SGD(2.0), 20, 3.0),
    "waves": (waves, (learned(5.0),), SGD(1.0), 20, None),
    "waves with momentum": (waves, (learned(5.0),), SGD(learned(1.0), momentum=0.3), 20, None),
}


@pytest.mark.parametrize("name", CHAOTIC)
def test_chaos_is_found(name: str) -> None:
    loss, args, optimizer, steps, rate = CHAOTIC[name]
    options = {"optimizer": optimizer, "steps": steps}
    report = check(loss, torch.rand(8, generator=torch.Generator().manual_seed(3)).double(), *args, **options)
    assert [f.check for f in report.failures] == ["smooth"]
    assert isinstance(report["smooth"].error, diffopt.errors.SmoothnessError)
    assert "chaotic" in report["smooth"].fix
    assert len(str(report["smooth"].error)) < 400
    assert report["adjoint"].outcome == "note"
    if rate is not None:  # the exponential of the map's Lyapunov exponent
        assert abs(float(report["adjoint"].measured.split(",")[-1].split()[0]) - rate) < 0.3 * rate


def test_the_same_losses_with_a_small_step_are_smooth() -> None:
    w = torch.rand(8, generator=torch.Generator().manual_seed(3)).double()
    for loss, args, *_ in CHAOTIC.values():
        report = check(loss, w, *args, optimizer=SGD(0.05), steps=10)
        assert [report[name].outcome for name in SOLVE] == ["ok"] * 3, report


def test_few_chaotic_steps_are_no_failure_yet() -> None:
    report = check(cubic, torch.tensor([0.3]).double(), optimizer=SGD(1.0), steps=4)
    assert report.ok


def test_the_adjoint_is_that_of_the_closed_form() -> None:
    for lr, steps in ((3.0, 20), (0.5, 7), (2.5, 33)):
        report = check(lambda w: w.square().sum() / 2, torch.ones(3).double(), optimizer=SGD(lr), steps=steps)
        growth = abs(1 - lr) ** steps
        assert f"{growth:.1e}" in report["adjoint"].measured
        assert report["adjoint"].outcome == ("note" if growth > 1e3 else "ok")
        assert report["smooth"].outcome == "ok"  # it diverges, but as a line


@dataclass(frozen=True)
class Cut(Stateless):
    """Gradient descent whose update takes half of the gradient as a constant."""

    def update(self, params: Any, grads: Any, buffers: Any, step: int) -> Any:
        return params - 0.05 * grads - 0.05 * diffopt.Leaves([g.detach() for g in grads]), buffers


def test_an_update_that_is_cut_off_is_a_wrong_derivative() -> None:
    report = check(ridge, numbers(4).double(), learned(torch.ones(16)), optimizer=Cut(), steps=9)
    assert isinstance(report["smooth"].error, diffopt.WrongDerivativeError)
    assert "agree with one another" in report["smooth"].measured


def only_single(w: Tensor, weights: Tensor) -> Tensor:
    if w.dtype != torch.float32:
        raise TypeError("float32, please")
    return (weights * (x.float() @ w - y.float()).square()).mean() + 0.1 * w.square().sum()


def test_what_round_off_hides_is_neither_right_nor_wrong() -> None:
    """In float32 alone, only large moves show above round-off."""
    ones = learned(torch.ones(16), torch.float32)
    right = check(only_single, numbers(4), ones, optimizer=SGD(0.1), steps=9)["smooth"]
    assert right.outcome == "ok"
    assert "0.1, 0.01 of the size" in right.measured
    wrong = check(only_single, numbers(4), ones, optimizer=Cut(), steps=9)["smooth"]
    assert wrong.outcome == "note"
    assert "off differences of the end by 0.5, 0.5 for" in wrong.measured
    assert "cannot be told" in wrong.measured
    assert "float64" in wrong.fix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_params_of_which_nothing_is_left_are_no_failure(dtype: torch.dtype) -> None:
    """Two hundred steps take ``0.2**200`` of the start to the end: zero in float32, less than round-off in float64."""
    start, target = learned(numbers(3), dtype), learned(numbers(3).cos(), dtype)
    report = check(lambda w, a: (w - a).square().sum(), start, target, optimizer=SGD(0.4), steps=200)
    assert [report[name].outcome for name in SOLVE] == ["ok", "note", "ok"], report
    assert "moves of params change the end by less than its round-off: cannot be told" in report["smooth"].measured
    assert "of args; moves" in report["smooth"].measured


def test_kinks_are_a_note() -> None:
    """Signs of ``w - a``: the end is on a lattice, and jumps where it is moved; no jump grows."""
    start, target = numbers(5000).double(), learned(numbers(5000).double().cos())
    report = check(
        lambda w, a: (w - a).abs().sum() + 0.1 * (w - a).square().sum(), start, target,
        optimizer=SGD(0.1), steps=8, vmap=False, directions=2,
    )  # fmt: skip
    assert report.ok
    assert report["adjoint"].outcome == "ok"
    assert report["smooth"].outcome == "note"
    assert "compare" in report["smooth"].fix


def test_a_solve_may_go_on_from_a_state_and_follow_a_field() -> None:
    adam, ones = Adam(0.05), learned(torch.ones(16))
    state = diffopt.solve(ridge, numbers(4).double(), ones.detach(), optimizer=adam, steps=7).state
    rates = SGD(diffopt.Schedule(learned(torch.linspace(0.3, 0.1, 12))))
    momentum = diffopt.solve(ridge, numbers(4).double(), ones.detach(), optimizer=rates, steps=7).state
    game = diffopt.game(lambda p: (p[0] * p[1]).sum() + p[0].square().sum(), lambda p: (p[1] - p[0]).square().sum())
    for report in (
        check(ridge, state, ones, optimizer=adam, steps=5),
        check(ridge, momentum, ones, optimizer=rates, steps=5),
        check(game, (numbers(3).double(), numbers(3).double()), optimizer=SGD(0.05), steps=6),
        check(ridge, numbers(4).double(), ones, optimizer=SGD(0.1), steps=0),
    ):
        assert [report[name].outcome for name in SOLVE] == ["ok"] * 3, report


def test_what_cannot_be_looked_at_is_skipped() -> None:
    detached = check(lambda w: w.detach().square().sum(), numbers(3), optimizer=SGD(0.1), steps=2)
    no_curvature = check(ridge, numbers(4).double(), x[:, 0], optimizer=SGD(0.1), steps=2, second_derivative=False)
    for report in (detached, no_curvature):
        assert [report[name].outcome for name in SOLVE] == ["skipped"] * 3
    single = check(
        lambda w: (w @ torch.ones(3, 2).float().numpy() if w.dtype.itemsize > 4 else w).square().sum(),
        numbers(3),
        optimizer=SGD(0.1),
        steps=2,
    )
    assert single["precise"].outcome == "note"
    assert "does not run in float64" in single["precise"].measured


def test_a_solve_that_diverges_says_at_which_step() -> None:
    report = check(lambda w: w.pow(4).sum(), torch.full((2,), 3.0), optimizer=SGD(1.0), steps=30)
    assert isinstance(report["adjoint"].error, diffopt.DivergenceError)
    assert "of 30" in report["adjoint"].measured
    assert [report[name].outcome for name in SOLVE[1:]] == ["skipped"] * 2


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"steps": 3}, diffopt.OptimizerError),
        ({"optimizer": SGD(0.1)}, diffopt.StepsError),
        ({"optimizer": "SGD", "steps": 3}, diffopt.OptimizerError),
        ({"optimizer": SGD(0.1), "steps": 2.5}, diffopt.StepsError),
    ],
)
def test_misuse(options: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        check(lambda w: w.square().sum(), numbers(3), **options)


def test_without_a_solve_the_report_is_as_it_was() -> None:
    assert len(check(lambda w: w.square().sum(), numbers(3)).findings) == 8
