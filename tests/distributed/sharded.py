"""Checks of params that are spread over ranks as DTensors, run beside the same problem in one process."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn import functional as F  # noqa: N812

import diffopt
from diffopt.estimators import (
    Binomial,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense

TOLERANCE = 1e-10
WHOLE, ROWS, COLUMNS = [Replicate()], [Shard(0)], [Shard(1)]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layout:
    """Where the params and the data of a problem lie; ``None`` for both: in one process."""

    def __init__(self, params: Any = None, data: Any = None, *, plain: bool = False) -> None:
        self.mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        self.params, self.data, self.plain = params, data, plain

    def spread(self, x: Tensor, placements: Any) -> Tensor:
        return x.clone() if placements is None else distribute_tensor(x.clone(), self.mesh, placements)

    def shared(self, x: Tensor) -> Tensor:
        return self.spread(x, None if self.params is None or self.plain else WHOLE)

    def of(self, name: str) -> Any:
        return self.params[name] if isinstance(self.params, dict) else self.params


PARAMS = {"w1": 0.5 * numbers(4, 3, seed=1), "b1": 0.1 * numbers(4, seed=2), "w2": 0.5 * numbers(4, 4, seed=3)}
PLACES = {
    "fully sharded": (ROWS, WHOLE),
    "tensor parallel": ({"w1": ROWS, "b1": ROWS, "w2": COLUMNS}, WHOLE),
    "sharded data": (WHOLE, ROWS),
    "both": (ROWS, ROWS),
}
TWO = {name: PLACES[name] for name in ("tensor parallel", "both")}


def loss(params: Any, penalty: Tensor, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    hidden = torch.tanh(x @ params["w1"].t() + params["b1"])
    errors = (hidden @ params["w2"].t() - y).square().sum(-1)
    return (weights * errors).mean() + penalty.exp() * sum(p.pow(4).sum() for p in params.values())


def full(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(at: Layout, optimizer: Any, *, numbers_only: bool = False, **options: Any) -> list[Tensor]:
    """The hypergradients of params, weights, penalty and learning rate; ``numbers_only``: of the last two."""
    params = {name: at.spread(x, at.of(name)) for name, x in PARAMS.items()}
    penalty, lr = (at.shared(torch.tensor(x, dtype=torch.float64)).requires_grad_() for x in (-1.0, 0.05))
    weights = at.spread(numbers(8, seed=6).exp(), at.data)
    data = at.spread(numbers(8, 3, seed=4), at.data), at.spread(numbers(8, 4, seed=5), at.data)
    inputs = [penalty, lr]
    if not numbers_only:
        inputs = [*(x.requires_grad_() for x in params.values()), weights.requires_grad_(), *inputs]
    solution = diffopt.solve(loss, params, penalty, weights, *data, optimizer=optimizer(lr), steps=3, **options)
    outer = sum((p.pow(3).sum() for p in solution.params.values()), full(solution.losses.detach()).sum() * 0)
    found = torch.autograd.grad(outer, inputs, allow_unused=True)
    return [torch.zeros_like(full(x)) if g is None else full(g) for g, x in zip(found, inputs, strict=True)]


def same(found: list[Tensor], expected: list[Tensor], what: Any) -> None:
    apart = [float((a - b).norm() / b.norm().clamp(min=1)) for a, b in zip(found, expected, strict=True)]
    assert max(apart) < TOLERANCE, (what, apart)


def sgd(lr: Tensor) -> diffopt.SGD:
    return diffopt.SGD(lr, momentum=0.5)


def check_slow_hypergradients_of_sharded_params() -> None:
    for rule in (Reverse(), Reverse(1), Truncated(2)):
        expected = gradients(Layout(), sgd, estimator=rule)
        for place, (params, data) in PLACES.items():
            same(gradients(Layout(params, data), sgd, estimator=rule), expected, (rule, place))


def check_slow_hypergradients_of_every_rule() -> None:
    rules: Any = (
        *(Reverse(2), Reverse("sqrt"), Reverse("log"), Reverse(memory="1MB"), Reverse(1, offload=True)),
        *(Truncated(3, "log"), FirstOrder(), Reptile(), MultiStep(2), Unrolled()),
    )
    for rule in rules:
        expected = gradients(Layout(), sgd, estimator=rule)
        for place, (params, data) in TWO.items():
            same(gradients(Layout(params, data), sgd, estimator=rule), expected, (rule, place))
    for optimizer in (diffopt.Adam, diffopt.RMSprop, lambda lr: diffopt.Clip(sgd(lr), max_norm=0.5)):
        expected = gradients(Layout(), optimizer)
        for place, (params, data) in TWO.items():
            same(gradients(Layout(params, data), optimizer), expected, (optimizer, place))


def check_graphs_are_measured() -> None:
    """A graph of DTensors takes the memory of what this rank holds."""
    start = 0.1 * numbers(4, 1000, seed=1)

    def kept(placements: Any) -> tuple[int, int | None]:
        found = []
        for rule in (Reverse(), Reverse(memory="800kB")):
            w = Layout(placements).spread(start, placements).requires_grad_()
            solution = diffopt.solve(
                lambda w: w.sin().pow(4).sum(), w, optimizer=diffopt.SGD(0.05), steps=20, estimator=rule
            )
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

    def of_all(at: Layout, rule: Any) -> list[Tensor]:
        w, c = at.spread(small, at.params).requires_grad_(), at.spread(wide, at.data).requires_grad_()
        options: dict[str, Any] = {"optimizer": diffopt.Adam(0.1), "steps": 3, "estimator": rule}
        solution = diffopt.solve(lambda w, c: (w * c).pow(4).sum() + w.square().sum(), w, c, **options)
        found = torch.autograd.grad(solution.params.pow(3).sum() + solution.losses.sum(), (w, c))
        return [full(g) for g in found]

    same(of_all(Layout(COLUMNS, ROWS), ForwardMode()), of_all(Layout(), Reverse()), "of tensors")


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


def check_uneven_shards() -> None:
    """Three rows on any number of ranks: some hold more than others, and some none."""
    rows, x, y = 0.5 * numbers(3, 2, seed=1), numbers(8, 2, seed=4), numbers(8, 3, seed=5)

    def bowl(w: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (x @ w.t() - y).square().sum() / 24 + penalty.exp() * (w - 0.3).square().sum()

    def found(at: Layout, rule: Any, tol: float) -> list[Tensor]:
        w, penalty = at.spread(rows, at.params), at.shared(torch.tensor(0.0, dtype=torch.float64)).requires_grad_()
        data = at.spread(x, at.data), at.spread(y, at.data)
        options: dict[str, Any] = {"optimizer": diffopt.SGD(0.3), "steps": 100, "estimator": rule, "tol": tol}
        solution = diffopt.solve(bowl, w, penalty, *data, **options)
        results = [solution.params]
        if isinstance(rule, Implicit):
            results.append(diffopt.implicit(bowl, solution.params.detach(), penalty, *data))
        return [
            *(full(torch.autograd.grad(p.pow(3).sum(), penalty)[0]) for p in results),
            solution.steps * x.new_ones(()),
        ]

    for rule in (Reverse(), Unrolled(), *map(Implicit, (ConjugateGradient(), GMRES(max_iterations=9), Dense()))):
        tol = 1e-12 if isinstance(rule, Implicit) else 1e-4
        expected = found(Layout(), rule, tol)
        assert expected[-1] < 100
        same(found(Layout(ROWS, WHOLE), rule, tol), expected, rule)


def check_a_row_that_one_rank_holds() -> None:
    """Losses come out spread in other ways from step to step."""
    w, v, x = 0.5 * numbers(1, 4, seed=1), numbers(1, seed=3), numbers(6, 4, seed=2)

    def loss(p: Any, penalty: Tensor, x: Tensor) -> Tensor:
        errors = ((x @ p["w"].t()).tanh() @ p["v"]).square().mean()
        return errors + penalty * p["w"].pow(4).sum() + penalty * p["v"].square().sum()

    def found(at: Layout, rule: Any) -> list[Tensor]:
        params = {"w": at.spread(w, at.params).requires_grad_(), "v": at.spread(v, at.params).requires_grad_()}
        penalty = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        options: dict[str, Any] = {"optimizer": diffopt.SGD(0.05), "steps": 3, "estimator": rule}
        solution = diffopt.solve(loss, params, penalty, at.spread(x, at.data), **options)
        outer = sum(p.pow(3).sum() for p in solution.params.values())
        return [full(g) for g in torch.autograd.grad(outer, [*params.values(), penalty])]

    expected = found(Layout(), Reverse())
    for rule in (Unrolled(), Reverse(), Reverse(1)):
        same(found(Layout(ROWS, WHOLE), rule), expected, rule)


def check_what_is_refused() -> None:
    for rule in (Binomial(order=1), Krylov(order=1)):
        with pytest.raises(diffopt.DeviceError, match="a DTensor and an ordinary tensor"):
            gradients(Layout(ROWS, WHOLE), sgd, estimator=rule)
    with pytest.raises(diffopt.EstimatorError, match="a leaf of the state that is a DTensor"):
        gradients(Layout(ROWS, WHOLE), sgd, estimator=Reverse(1, offload="disk"))
    for function in (diffopt.distributed.copied, diffopt.distributed.summed):
        with pytest.raises(diffopt.LeafError, match="a DTensor"):
            function(Layout(ROWS).spread(numbers(4, seed=1), ROWS))


def check_means_with_a_wrong_gradient() -> None:
    look_at_means(F.mse_loss)


def check_slow_other_means() -> None:
    look_at_means(F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss, F.binary_cross_entropy)


def look_at_means(*functions: Any) -> None:
    """Those of torch over sharded numbers are refused; a mean of numbers, and one over whole tensors, are right."""
    x, y, w = numbers(8, 3, seed=1), numbers(8, 4, seed=2).sigmoid(), numbers(4, 3, seed=3)
    for function in functions:

        def found(at: Layout, rule: Any, means: bool, function: Any = function) -> Tensor:
            def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
                ends = (x @ w.t()).sigmoid()
                return function(ends, y) if means else function(ends, y, reduction="none").mean()

            start = at.spread(w, at.params).requires_grad_()
            data = at.spread(x, at.data), at.spread(y, at.data)
            solution = diffopt.solve(loss, start, *data, optimizer=diffopt.SGD(0.5), steps=2, estimator=rule)
            return full(torch.autograd.grad(solution.params.pow(3).sum(), start)[0])

        for rule in (Reverse(), Reverse(1), Unrolled()):
            for places in ((ROWS, WHOLE), (WHOLE, ROWS)):
                with pytest.raises(diffopt.RanksError, match=r'write reduction="none" there, and .mean\(\) behind it'):
                    found(Layout(*places), rule, True)
                same([found(Layout(*places), rule, False)], [found(Layout(), rule, False)], function)
            same([found(Layout(WHOLE, WHOLE), rule, True)], [found(Layout(), rule, True)], function)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def check_fully_sharded_modules() -> None:
    from torch.distributed.fsdp import fully_shard

    module, at = network(), Layout(ROWS, WHOLE)
    bare = copy.deepcopy(module)
    fully_shard(module)
    with pytest.raises(diffopt.RanksError, match="functional was given a module within fully_shard"):
        diffopt.functional(module)
    x, y = numbers(12, 6, seed=4), numbers(12, 4, seed=5)
    whole_data = at.spread(x, WHOLE), at.spread(y, WHOLE)
    for data, error in (((x, y), diffopt.RanksError), (whole_data, diffopt.DeviceError)):
        fresh = network()  # whose hooks have not run yet
        fully_shard(fresh)
        with pytest.raises(error, match=r"own parameters in the(ir)? place.* functional\(bare\)"):
            diffopt.solve(
                lambda p, x, y, fresh=fresh: (torch.func.functional_call(fresh, p, (x,)) - y).square().mean(),
                {name: p.detach() for name, p in fresh.named_parameters()},
                *data,
                optimizer=diffopt.SGD(0.1),
                steps=1,
            )
    function, whole = diffopt.functional(bare)

    def hypergradient(params: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        start = {name: p.detach().requires_grad_() for name, p in params.items()}
        solution = diffopt.solve(
            lambda p, x, y: (function(p, x) - y).square().mean(), start, x, y, optimizer=diffopt.Adam(0.01), steps=3
        )
        outer = sum(p.pow(3).sum() for p in solution.params.values())
        return [full(g) for g in torch.autograd.grad(outer, list(start.values()))]

    spread = hypergradient(dict(module.named_parameters()), *whole_data)
    same(spread, hypergradient(whole, x, y), "the bare module")


def check_modules_in_data_parallel() -> None:
    wrapped = nn.parallel.DistributedDataParallel(network())
    for module in (wrapped, nn.Sequential(wrapped, nn.Tanh())):
        with pytest.raises(diffopt.RanksError, match=r"write functional\(wrapped.module\)"):
            diffopt.functional(module)
    _, params = diffopt.functional(wrapped.module)
    assert len(params) == 4


def check_slow_compile() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffopt.CompileWarning)
        for place, (params, data) in TWO.items():
            same(gradients(Layout(params, data), sgd, compile=True), gradients(Layout(), sgd), place)
