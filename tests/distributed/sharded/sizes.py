"""What a rank holds: its part of a graph, parts of other sizes, and none."""

from __future__ import annotations

from typing import Any

import torch
from beside import numbers
from sharded.layouts import ROWS, WHOLE, Layout, full, same
from torch import Tensor, distributed

import diffopt
from diffopt.estimators import Implicit, Reverse, Unrolled
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense


def check_graphs_are_measured() -> None:
    """A graph of DTensors takes the memory of what this rank holds."""
    start = 0.1 * numbers(4, 1000, seed=1)

    def kept(placements: Any) -> tuple[int, int | None]:
        found = []
        for estimator in (Reverse(), Reverse(memory="800kB")):
            w = Layout(placements).spread(start, placements).requires_grad_()
            options = {"optimizer": diffopt.SGD(0.05), "steps": 20, "estimator": estimator}
            solution = diffopt.solve(lambda w: w.sin().pow(4).sum(), w, **options)
            found.append(solution.kept)
        return found[0].bytes, found[1].slots

    nbytes, slots = kept(None)
    whole_bytes, whole_slots = kept(WHOLE)
    assert 0.9 < whole_bytes / nbytes < 1.2
    assert whole_slots == slots
    assert slots is not None
    assert slots < 19
    rows_bytes, rows_slots = kept(ROWS)
    assert 0.4 < rows_bytes / nbytes * distributed.get_world_size() / 2 < 0.6
    assert rows_slots == 19


def check_uneven_shards() -> None:
    """Three rows on any number of ranks: some hold more than others, and some none."""
    rows, x, y = 0.5 * numbers(3, 2, seed=1), numbers(8, 2, seed=4), numbers(8, 3, seed=5)

    def bowl(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (x @ w.t() - y).square().sum() / 24 + penalty.exp() * (w - 0.3).square().sum()

    def found(at: Layout, estimator: Any, tol: float) -> list[Tensor]:
        w, penalty = at.spread(rows, at.params), at.shared(torch.tensor(0.0, dtype=torch.float64)).requires_grad_()
        data = at.spread(x, at.data), at.spread(y, at.data)
        options: dict[str, Any] = {"optimizer": diffopt.SGD(0.3), "steps": 100, "estimator": estimator, "tol": tol}
        solution = diffopt.solve(bowl, w, penalty, *data, **options)
        results = [solution.params]
        if isinstance(estimator, Implicit):
            results.append(diffopt.implicit(bowl, solution.params.detach(), penalty, *data))
        return [
            *(full(torch.autograd.grad(p.pow(3).sum(), penalty)[0]) for p in results),
            solution.steps * x.new_ones(()),
        ]

    for estimator in (Reverse(), Unrolled(), *map(Implicit, (ConjugateGradient(), GMRES(max_iterations=9), Dense()))):
        tol = 1e-12 if isinstance(estimator, Implicit) else 1e-4
        expected = found(Layout(), estimator, tol)
        assert expected[-1] < 100
        same(found(Layout(ROWS, WHOLE), estimator, tol), expected, estimator)


def check_a_row_that_one_rank_holds() -> None:
    """Losses come out spread in other ways from step to step."""
    w, v, x = 0.5 * numbers(1, 4, seed=1), numbers(1, seed=3), numbers(6, 4, seed=2)

    def loss(p: Any, penalty: Tensor, x: Tensor) -> Tensor:
        errors = ((x @ p["w"].t()).tanh() @ p["v"]).square().mean()
        return errors + penalty * p["w"].pow(4).sum() + penalty * p["v"].square().sum()

    def found(at: Layout, estimator: Any) -> list[Tensor]:
        params = {"w": at.spread(w, at.params).requires_grad_(), "v": at.spread(v, at.params).requires_grad_()}
        penalty = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        options: dict[str, Any] = {"optimizer": diffopt.SGD(0.05), "steps": 3, "estimator": estimator}
        solution = diffopt.solve(loss, params, penalty, at.spread(x, at.data), **options)
        outer = sum(p.pow(3).sum() for p in solution.params.values())
        return [full(g) for g in torch.autograd.grad(outer, [*params.values(), penalty])]

    expected = found(Layout(), Reverse())
    for estimator in (Unrolled(), Reverse(), Reverse(1)):
        same(found(Layout(ROWS, WHOLE), estimator), expected, estimator)
