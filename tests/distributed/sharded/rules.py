"""Every estimator finds the hypergradients of the problem in one process, however its params are spread."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from beside import numbers
from sharded.layouts import COLUMNS, PARAMS, PLACES, ROWS, TWO, WHOLE, Layout, full, gradients, same, sgd
from torch import Tensor

import diffopt
from diffopt.estimators import FirstOrder, ForwardMode, Implicit, MultiStep, Reptile, Reverse, Truncated, Unrolled
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense


def check_slow_hypergradients_of_sharded_params() -> None:
    for estimator in (Reverse(), Reverse(1), Truncated(2)):
        expected = gradients(Layout(), sgd, estimator=estimator)
        for place, (params, data) in PLACES.items():
            same(gradients(Layout(params, data), sgd, estimator=estimator), expected, (estimator, place))


def check_slow_hypergradients_of_every_rule() -> None:
    estimators: Any = (
        *(Reverse(2), Reverse("sqrt"), Reverse("log"), Reverse(memory="1MB"), Reverse(1, offload=True)),
        *(Truncated(3, "log"), FirstOrder(), Reptile(), MultiStep(2), Unrolled()),
    )
    for estimator in estimators:
        expected = gradients(Layout(), sgd, estimator=estimator)
        for place, (params, data) in TWO.items():
            same(gradients(Layout(params, data), sgd, estimator=estimator), expected, (estimator, place))
    for optimizer in (diffopt.Adam, diffopt.RMSprop, lambda lr: diffopt.Clip(sgd(lr), max_norm=0.5)):
        expected = gradients(Layout(), optimizer)
        for place, (params, data) in TWO.items():
            same(gradients(Layout(params, data), optimizer), expected, (optimizer, place))


def check_plain_numbers_beside_sharded_params() -> None:
    """A learning rate and a penalty need not be DTensors."""
    expected = gradients(Layout(), sgd)
    for place, (params, data) in PLACES.items():
        same(gradients(Layout(params, data, plain=True), sgd), expected, place)


def check_slow_forward_mode() -> None:
    for plain in (False, True):
        expected = gradients(Layout(), sgd, numbers_only=True, estimator=ForwardMode())
        for place, (params, data) in PLACES.items():
            at = Layout(params, data, plain=plain)
            same(gradients(at, sgd, numbers_only=True, estimator=ForwardMode()), expected, place)
    small, wide = numbers(2, 3, seed=1), numbers(3, seed=2)

    def of_all(at: Layout, estimator: Any) -> list[Tensor]:
        w, c = at.spread(small, at.params).requires_grad_(), at.spread(wide, at.data).requires_grad_()
        options: dict[str, Any] = {"optimizer": diffopt.Adam(0.1), "steps": 3, "estimator": estimator}
        solution = diffopt.solve(lambda w, c: (w * c).pow(4).sum() + w.square().sum(), w, c, **options)
        found = torch.autograd.grad(solution.params.pow(3).sum() + solution.losses.sum(), (w, c))
        return [full(g) for g in found]

    same(of_all(Layout(COLUMNS, ROWS), ForwardMode()), of_all(Layout(), Reverse()), "of tensors")

    def of_complex(at: Layout, estimator: Any) -> list[Tensor]:
        c = at.spread(torch.complex(numbers(4, seed=1), numbers(4, seed=2)), at.data).requires_grad_()
        options: dict[str, Any] = {"optimizer": diffopt.SGD(0.05), "steps": 3, "estimator": estimator}
        start = at.spread(numbers(4, seed=3), at.params)
        solution = diffopt.solve(
            lambda w, c: (w * c).abs().square().sum() + (w.pow(3) * c.imag).sum(), start, c, **options
        )
        return [full(g) for g in torch.autograd.grad(solution.params.pow(3).sum(), c)]

    same(of_complex(Layout(ROWS, WHOLE), ForwardMode()), of_complex(Layout(), Reverse()), "of complex tensors")


def check_slow_implicit() -> None:
    def bowl(p: Any, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return ((x @ p["w1"].t() + p["b1"]) @ p["w2"].t() - y).square().mean() + penalty.exp() * sum(
            (q - 0.3).square().sum() for q in p.values()
        )

    def found(at: Layout, solver: Any) -> list[Tensor]:
        params = {name: at.spread(x, at.of(name)) for name, x in PARAMS.items()}
        penalty = at.shared(torch.tensor(0.0, dtype=torch.float64)).requires_grad_()
        data = at.spread(numbers(8, 3, seed=4), at.data), at.spread(numbers(8, 4, seed=5), at.data)
        options: dict[str, Any] = {"optimizer": diffopt.SGD(0.2), "steps": 60, "estimator": Implicit(solver)}
        solution = diffopt.solve(bowl, params, penalty, *data, **options)
        point = {name: x.detach() for name, x in solution.params.items()}
        attached = diffopt.implicit(bowl, point, penalty, *data, solver=solver)
        outer = [sum(p.pow(3).sum() for p in ends.values()) for ends in (solution.params, attached)]
        return [full(torch.autograd.grad(x, penalty)[0]) for x in outer]

    for solver in (ConjugateGradient(rtol=1e-12), GMRES(max_iterations=60, rtol=1e-12), Dense()):
        expected = found(Layout(), solver)
        assert min(abs(float(x)) for x in expected) > 1e-3
        for place, (params, data) in TWO.items():
            same(found(Layout(params, data), solver), expected, (solver, place))


def check_slow_compile() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffopt.CompileWarning)
        for place, (params, data) in TWO.items():
            same(gradients(Layout(params, data), sgd, compile=True), gradients(Layout(), sgd), place)
