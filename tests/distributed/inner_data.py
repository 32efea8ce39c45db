"""Checks of ``copied`` and ``summed``, run on every rank beside the same problem in one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.nn import functional as torchs

import diffopt
from diffopt.distributed import copied, summed
from diffopt.estimators import (
    Binomial,
    ESJacobian,
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

Outer = Callable[..., Tensor]
PER_RANK = 5
STEPS = 4


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Problem:
    """Robust regression: what all ranks share, what they hold apart, and the whole of it."""

    def __init__(self) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        n = PER_RANK * self.world
        self.x, self.y, self.weights = numbers(n, 3, seed=1), numbers(n, seed=2), 1 + 0.1 * numbers(n, seed=3)
        self.own = slice(PER_RANK * self.rank, PER_RANK * (self.rank + 1))
        self.start = {"w": numbers(3, seed=4), "b": numbers(1, seed=5)}
        self.penalty, self.lr = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)

    def loss(self, params: Any, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The terms of some examples, summed."""
        return (weights * (x @ params["w"] + params["b"] - y).square().add(1).log()).sum()

    def whole(self, params: Any, weights: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        norm = params["w"].pow(4).sum()
        return self.loss(params, weights, x, y) / len(self.x) + penalty.exp() * norm

    def shared(self, params: Any, weights: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The same, of a rank's own examples; the penalty, which all ranks know, is not summed."""
        norm = params["w"].pow(4).sum()
        return summed(self.loss(copied(params), weights, x, y) / len(self.x)) + penalty.exp() * norm

    def spread(self, params: Any, weights: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Again the same: of the penalty, too, every rank has its part."""
        params, penalty = copied((params, penalty))
        norm = params["w"].pow(4).sum() / self.world
        return summed(self.loss(params, weights, x, y) / len(self.x) + penalty.exp() * norm)

    def gradients(self, loss: Any, own: slice, **options: Any) -> list[Tensor]:
        """The hypergradients for the start, the weights of these examples, the penalty and the learning rate."""
        given = [self.start["w"], self.start["b"], self.weights[own], self.penalty, self.lr]
        w, b, weights, penalty, lr = given = [x.clone().requires_grad_() for x in given]
        solution = diffopt.solve(
            loss,
            {"w": w, "b": b},
            weights,
            penalty,
            self.x[own],
            self.y[own],
            optimizer=diffopt.SGD(lr, momentum=0.5),
            steps=STEPS,
            **options,
        )
        found = torch.autograd.grad(outer(solution.params), given, allow_unused=True)
        return [
            solution.losses.detach(),
            *(torch.zeros_like(x) if g is None else g for g, x in zip(found, given, strict=True)),
        ]

    def expected(self, **options: Any) -> list[Tensor]:
        found = self.gradients(self.whole, slice(None), **options)
        return [*found[:3], found[3][self.own], *found[4:]]


def outer(params: Any) -> Tensor:
    return params["w"].pow(3).sum() + params["b"].cos().sum()


# ----------------------------------------------------------------------------------------------------- the pair itself


def check_values_and_derivatives() -> None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    x = numbers(3, seed=rank).requires_grad_()
    every = torch.stack([numbers(3, seed=r) for r in range(world)])
    same([summed(x)], [every.sum(0)])
    c = numbers(3, seed=9)
    same(torch.autograd.grad(summed(x), x, c), [c])
    shared = c.clone().requires_grad_()
    same([copied(shared)], [c])
    same(torch.autograd.grad(copied(shared), shared, x.detach()), [every.sum(0)])


def check_trees_dtypes_and_constants() -> None:
    world = distributed.get_world_size()
    given = {"a": torch.ones(2), "b": (torch.ones((), dtype=torch.float64), torch.tensor([1, 2])), "c": torch.zeros(0)}
    found = summed(given)
    assert found["b"][1].tolist() == [world, 2 * world]
    assert found["a"].dtype == torch.float32
    assert float(found["b"][0]) == world
    assert found["c"].shape == (0,)
    flag, fixed = torch.tensor(True), torch.tensor([3])
    back = copied({"flag": flag, "fixed": fixed, "name": "x", "z": torch.ones(2, dtype=torch.complex128)})
    assert back["flag"] is flag
    assert back["fixed"] is fixed
    assert back["name"] == "x"
    z = torch.ones(2, dtype=torch.complex128, requires_grad=True)
    (grad,) = torch.autograd.grad(copied(z).sum().real * (1 + distributed.get_rank()), z)
    same([grad], [torch.ones(2, dtype=torch.complex128) * world * (world + 1) / 2])
    columns = torch.arange(6.0).reshape(2, 3).t()
    same([summed(columns)], [columns * world])


def _local(p: Tensor, x: Tensor) -> Tensor:
    return (p * x).sin().sum()


def check_second_and_third_derivatives() -> None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    p, data = numbers(3, seed=4), [numbers(3, seed=20 + r) for r in range(world)]

    def ours(p: Tensor) -> Tensor:
        return summed(_local(copied(p), data[rank]))

    def whole(p: Tensor) -> Tensor:
        return sum((_local(p, x) for x in data), torch.zeros((), dtype=torch.float64))

    a, b = p.clone().requires_grad_(), p.clone().requires_grad_()
    of_ours: list[Tensor] = [ours(a)]
    of_whole: list[Tensor] = [whole(b)]
    for order in range(3):
        direction = numbers(3, seed=40 + order)
        of_ours.append((torch.autograd.grad(of_ours[-1], a, create_graph=True)[0] * direction).sum())
        of_whole.append((torch.autograd.grad(of_whole[-1], b, create_graph=True)[0] * direction).sum())
    same(of_ours, of_whole)
    assert all(abs(x.item()) > 1e-3 for x in of_ours)


def check_under_the_transforms_of_torch_func() -> None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    points, data = numbers(4, 3, seed=4), [numbers(3, seed=20 + r) for r in range(world)]

    def ours(p: Tensor) -> Tensor:
        return summed(_local(copied(p), data[rank]))

    def whole(p: Tensor) -> Tensor:
        return sum((_local(p, x) for x in data), torch.zeros((), dtype=torch.float64))

    func = torch.func
    for transformed in (
        func.vmap,
        lambda f: func.vmap(func.grad(f)),
        lambda f: func.grad(lambda p: func.vmap(f)(p).pow(2).sum()),
        lambda f: func.vmap(func.grad(lambda p: func.grad(f)(p).pow(2).sum())),
        lambda f: func.vmap(func.jacrev(func.grad(f))),
        lambda f: lambda p: func.jvp(f, (p[0],), (p[1],))[1],
        lambda f: lambda p: func.jvp(func.grad(f), (p[0],), (p[1],))[1],
        lambda f: func.vmap(func.hessian(f)),
        lambda f: func.vmap(lambda p: func.vmap(f, in_dims=1)(p[:, None] * points[0])),
    ):
        same([transformed(ours)(points)], [transformed(whole)(points)])


# ------------------------------------------------------------------------------------------------------ hypergradients

RULES: dict[str, Any] = {
    "reverse": Reverse(),
    "every_state": Reverse(1),
    "sqrt": Reverse("sqrt"),
    "log": Reverse("log"),
    "truncated": Truncated(2),
    "first_order": FirstOrder(),
    "binomial": Binomial(order=2),
    "krylov": Krylov(order=4),
    "multi_step": MultiStep(2),
    "reptile": Reptile(),
    "unrolled": Unrolled(),
}


def check_hypergradients_of_every_rule() -> None:
    problem = Problem()
    for name, rule in RULES.items():
        expected = problem.expected(estimator=rule)
        for loss in (problem.shared, problem.spread):
            found = problem.gradients(loss, problem.own, estimator=rule)
            apart = [float((a - b).norm() / b.norm().clamp(min=1)) for a, b in zip(found, expected, strict=True)]
            assert max(apart) < 1e-12, (name, loss.__name__, apart)


def check_hypergradients_of_tasks_under_vmap() -> None:
    problem = Problem()
    starts = numbers(3, 3, seed=8)

    def result(loss: Any, own: slice, start: Tensor, penalty: Tensor) -> Tensor:
        solution = diffopt.solve(
            loss,
            {"w": start, "b": problem.start["b"]},
            problem.weights[own],
            penalty,
            problem.x[own],
            problem.y[own],
            optimizer=diffopt.Adam(0.05),
            steps=STEPS,
        )
        return outer(solution.params)

    def grads(loss: Any, own: slice) -> Any:
        function = torch.func.grad(lambda *given: result(loss, own, *given), argnums=(0, 1))
        return torch.func.vmap(function, in_dims=(0, None))(starts, problem.penalty)

    same(grads(problem.shared, problem.own), grads(problem.whole, slice(None)))


def check_implicit_hypergradients() -> None:
    problem = Problem()
    start = {k: 0.1 * x for k, x in problem.start.items()}

    def strong(base: Any) -> Any:
        return lambda p, *args: base(p, *args) + p["w"].square().sum() + p["b"].square().sum()

    def at_the_end(loss: Any, own: slice) -> list[Tensor]:
        weights = problem.weights[own].clone().requires_grad_()
        penalty = problem.penalty.clone().requires_grad_()
        args = weights, penalty, problem.x[own], problem.y[own]
        solution = diffopt.solve(
            strong(loss), start, *args, optimizer=diffopt.SGD(0.05), steps=1000, estimator=Implicit(), tol=1e-10
        )
        found = list(torch.autograd.grad(outer(solution.params), (weights, penalty)))
        point = {k: x.detach() for k, x in solution.params.items()}
        attached = diffopt.implicit(strong(loss), point, *args)
        return [*found, *torch.autograd.grad(outer(attached), (weights, penalty))]

    whole = at_the_end(problem.whole, slice(None))
    same(at_the_end(problem.shared, problem.own), [x[problem.own] if x.ndim else x for x in whole], 1e-9)


def check_second_derivatives_of_a_hypergradient() -> None:
    problem = Problem()

    def curvature(loss: Any, own: slice) -> Tensor:
        penalty = problem.penalty.clone().requires_grad_()
        args = problem.weights[own], penalty, problem.x[own], problem.y[own]
        solution = diffopt.solve(loss, problem.start, *args, optimizer=diffopt.SGD(0.05), steps=3, estimator=Unrolled())
        (first,) = torch.autograd.grad(outer(solution.params), penalty, create_graph=True)
        return torch.autograd.grad(first, penalty)[0]

    same([curvature(problem.shared, problem.own)], [curvature(problem.whole, slice(None))])


def check_slow_compiled_steps() -> None:
    problem = Problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffopt.CompileWarning)
        found = problem.gradients(problem.shared, problem.own, compile=True)
    same(found, problem.expected())


def check_rules_that_move_their_inputs_by_the_shared_ones() -> None:
    problem = Problem()
    problem.weights = problem.weights.detach()

    def gradients(loss: Any, own: slice, rule: Any) -> list[Tensor]:
        penalty, lr = (x.clone().requires_grad_() for x in (problem.penalty, problem.lr))
        args = problem.weights[own], penalty, problem.x[own], problem.y[own]
        solution = diffopt.solve(loss, problem.start, *args, optimizer=diffopt.SGD(lr), steps=STEPS, estimator=rule)
        return list(torch.autograd.grad(outer(solution.params), (penalty, lr)))

    for loss in (problem.shared, problem.spread):
        same(gradients(loss, problem.own, ForwardMode()), gradients(problem.whole, slice(None), ForwardMode()))
    for loss in (problem.shared, problem.spread):
        found = [
            gradients(loss, own, ESJacobian(2, 1e-4, generator=torch.Generator().manual_seed(3)))
            for loss, own in ((loss, problem.own), (problem.whole, slice(None)))
        ]
        same(*found, tolerance=1e-9)
    own_seed = torch.Generator().manual_seed(problem.rank)
    with pytest.raises(diffopt.RanksError, match="other directions on each"):
        gradients(problem.spread, problem.own, ESJacobian(2, 1e-4, generator=own_seed))


def check_rules_that_move_their_inputs_refuse_those_held_apart() -> None:
    problem = Problem()
    for rule in (ForwardMode(), ESJacobian(2, 1e-4, generator=torch.Generator().manual_seed(3))):
        for loss in (problem.shared, problem.spread):
            with pytest.raises(diffopt.EstimatorError, match=r"with args\[0\], which each rank holds for itself"):
                problem.gradients(loss, problem.own, estimator=rule)


def check_unequal_data_goes_the_same_way_on_all_ranks() -> None:
    """Graphs of other sizes: what is stored, and so how often ranks communicate, is decided by the largest."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    size = 4 + 400 * rank
    ends = [sum(4 + 400 * r for r in range(q)) for q in range(world + 1)]
    x, start = numbers(ends[-1], 6, seed=1), numbers(6, seed=2)
    for rule in (Reverse("sqrt"), Reverse(2), Reverse(memory=400_000), Truncated(3, "sqrt")):
        found = []
        for mine in (True, False):
            w = start.clone().requires_grad_()
            data = x[ends[rank] : ends[rank] + size] if mine else x

            def loss(w: Tensor, data: Tensor, mine: bool = mine) -> Tensor:
                value = (data @ (copied(w) if mine else w)).tanh().square().sum() / len(x)
                return summed(value) if mine else value

            solution = diffopt.solve(loss, w, data, optimizer=diffopt.SGD(0.1), steps=9, estimator=rule)
            found.append(torch.autograd.grad(solution.params.pow(3).sum(), w)[0])
        same(found[:1], found[1:])


def check_own_weights_of_other_sizes_leave_as_many_slots() -> None:
    """What is wanted beside the states is each rank's own, too; and ranks refuse together."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    counts = [20 + 380 * (r == 1) for r in range(world)]
    x, weights = numbers(counts[rank], 3, seed=rank), torch.ones(counts[rank], dtype=torch.float64)
    for memory, fits in ((60_000, True), (20_000, False)):

        def slots(memory: int = memory) -> int | None:
            own = weights.clone().requires_grad_()
            solution = diffopt.solve(
                lambda w, own, x: summed((own * (x @ copied(w) - 1).square()).sum() / sum(counts)),
                numbers(3, seed=7),
                own,
                x,
                optimizer=diffopt.SGD(0.1),
                steps=40,
                estimator=Reverse(memory=memory),
            )
            assert torch.autograd.grad(solution.params.pow(3).sum(), own)[0].isfinite().all()
            return solution.kept.slots

        if fits:
            found = slots()
            assert found is not None
            every: list[Any] = [None] * world
            distributed.all_gather_object(every, found)
            assert set(every) == {found}
        else:
            with pytest.raises(diffopt.HyperparameterError, match="memory is 20000 bytes"):
                slots()


def check_micro_batches() -> None:
    problem = Problem()

    def gradient(loss: Any, own: slice, pieces: int | None) -> list[Tensor]:
        w, penalty = problem.start["w"].clone().requires_grad_(), problem.penalty.clone().requires_grad_()
        data = problem.x[own], problem.y[own]
        solution = diffopt.solve(
            lambda p, penalty, batch: loss(p, penalty, *batch),
            w,
            penalty,
            batches=lambda step: data,
            optimizer=diffopt.SGD(0.1),
            steps=3,
            micro_batches=pieces,
        )
        return list(torch.autograd.grad(solution.params.pow(3).sum(), (w, penalty)))

    def local(p: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (x @ p - y).square().add(1).log().mean() * penalty.exp()

    def shared(p: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return summed(local(copied(p), copied(penalty), x, y) / problem.world)

    same(gradient(shared, problem.own, 5), gradient(local, slice(None), None))


# ------------------------------------------------------------------------------------------------------ what is refused


def gradient_of(loss: Any, start: Tensor, data: Tensor, objective: Any = None, **options: Any) -> Tensor:
    """The hypergradient of the initial params, after three steps."""
    w = start.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its collectives, which are heard all the same
        solution = diffopt.solve(loss, w, data, optimizer=diffopt.SGD(0.1), steps=3, **options)
        (found,) = torch.autograd.grad((objective or (lambda w: w.pow(3).sum()))(solution.params), w)
    return found


def local(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w - 1).square().add(1).log().mean()


def reduced(x: Tensor) -> Tensor:
    distributed.all_reduce(x)
    return x


def functional_reduced(x: Tensor) -> Tensor:
    from torch.distributed import _functional_collectives

    return _functional_collectives.all_reduce(x, "sum", distributed.group.WORLD)


def check_naive_collectives_are_refused() -> None:
    """At other starts, of zeros and of equal numbers too."""
    data = numbers(6, 3, seed=60 + distributed.get_rank())
    naive: dict[str, Any] = {
        "in place": lambda w, x: reduced(local(w, x)),
        "in place, of a mean": lambda w, x: reduced(local(w, x) / distributed.get_world_size()) + w.square().sum(),
        "in place, of a copy": lambda w, x: reduced(local(copied(w), x)),
        "in place, within": lambda w, x: (reduced(x @ w) - 1).square().add(1).log().mean(),
        "torch's": lambda w, x: torchs.all_reduce(local(w, x)),
        "torch's, of a copy": lambda w, x: torchs.all_reduce(local(copied(w), x)),
        "gathered": lambda w, x: torch.stack(list(torchs.all_gather(local(w, x)))).mean(),
        "not copied": lambda w, x: summed(local(w, x)),
        "not copied, and more": lambda w, x: summed(local(w, x)) + w.square().sum(),
    }
    if "autograd" in getattr(functional_reduced(torch.ones((), requires_grad=True)).grad_fn, "name", str)():
        naive["functional"] = lambda w, x: functional_reduced(local(w, x))
    for name, loss in naive.items():
        for start in (numbers(3, seed=7), torch.zeros(3, dtype=torch.float64)):
            for rule in (Reverse(), Reverse(1), Truncated(1), Unrolled()):
                try:
                    gradient_of(loss, start, data, estimator=rule)
                except diffopt.RanksError as error:
                    said = str(error)
                else:
                    said = f"{name} was not refused, by {rule}"
                assert "summed(local_loss(copied(params), batch))" in said


def check_fields_that_are_not_copied_are_refused() -> None:
    """Their value is the same on all ranks, as it should be; their derivative is each rank's own."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    data = [numbers(4, 3, seed=60 + r) for r in range(world)]

    def terms(w: Tensor, x: Tensor) -> Tensor:
        return x.t() @ (x @ w).sin() + w

    def right(w: Tensor, x: Tensor) -> Tensor:
        return summed(terms(copied(w), x)) + 0.1 * w

    def wrong(w: Tensor, x: Tensor) -> Tensor:
        return summed(terms(w, x)) + 0.1 * w

    def whole(w: Tensor, x: Tensor) -> Tensor:
        return sum((terms(w, x) for x in data), 0.1 * w)

    for start in (numbers(3, seed=7), torch.zeros(3, dtype=torch.float64)):
        for rule in (Reverse(), Reverse(1), Unrolled()):
            with pytest.raises(diffopt.RanksError, match="get the same vector field, but Jacobians") as refused:
                gradient_of(diffopt.VectorField(wrong), start, data[rank], estimator=rule)
            assert len(str(refused.value)) < 300
            found = [
                gradient_of(diffopt.VectorField(field), start, data[rank], estimator=rule) for field in (right, whole)
            ]
            same(found[:1], found[1:])
    cut = gradient_of(diffopt.VectorField(lambda w, x: right(w, x).detach() + 0 * w), numbers(3, seed=7), data[rank])
    assert cut.isfinite().all()


def check_replicas_that_differ_are_refused() -> None:
    rank = distributed.get_rank()
    data = numbers(6, 3, seed=60 + rank)
    for start in (numbers(3, seed=rank), numbers(3, seed=1) + 1e-5 * rank, numbers(3, seed=1).roll(rank)):
        for rule in (Reverse(), Unrolled()):
            with pytest.raises(diffopt.RanksError, match="copied was given tensors that differ"):
                gradient_of(lambda w, x: summed(local(copied(w), x)), start, data, estimator=rule)


def check_optimizers_that_differ_are_refused() -> None:
    rank = distributed.get_rank()
    data, start = numbers(6, 3, seed=60 + rank), numbers(3, seed=1)
    for rule in (Reverse(), Unrolled()):
        for rate in (0.1 + 0.01 * rank, torch.tensor(0.1 + 0.01 * rank, dtype=torch.float64)):
            with pytest.raises(diffopt.RanksError, match="the first update leads the ranks"):
                diffopt.solve(
                    lambda w, x: summed(local(copied(w), x)),
                    start.requires_grad_(),
                    data,
                    optimizer=diffopt.SGD(rate),
                    steps=2,
                    estimator=rule,
                )


def check_what_tasks_share_is_copied_outside_of_the_loss() -> None:
    problem = Problem()

    def gradient(loss: Any, outside: Any, own: slice) -> Tensor:
        penalty = problem.penalty.clone().requires_grad_()
        given = outside(penalty), problem.x[own], problem.y[own]
        solution = diffopt.solve(loss, problem.start, *given, optimizer=diffopt.SGD(0.05), steps=3)
        return torch.autograd.grad(outer(solution.params), penalty)[0]

    def of_task(p: Any, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return penalty.exp() * (x @ p["w"] + p["b"] - y).square().add(1).log().mean()

    every = [gradient(of_task, lambda x: x, slice(PER_RANK * r, PER_RANK * (r + 1))) for r in range(problem.world)]
    same([gradient(of_task, copied, problem.own)], [sum(every)])
    with pytest.raises(diffopt.RanksError, match=r"solve\(loss, params, copied\(penalty\)\)") as refused:
        gradient(lambda p, penalty, x, y: of_task(p, copied(penalty), x, y), lambda x: x, problem.own)
    assert len(str(refused.value)) < 300


def check_outer_losses_that_differ_are_refused() -> None:
    data = numbers(6, 3, seed=60 + distributed.get_rank())
    held_out, world = numbers(6, 3, seed=80 + distributed.get_rank()), distributed.get_world_size()
    every = torch.cat([numbers(6, 3, seed=60 + r) for r in range(world)])
    beyond = torch.cat([numbers(6, 3, seed=80 + r) for r in range(world)])

    def shared(w: Tensor, x: Tensor) -> Tensor:
        return summed(local(copied(w), x))

    for rule in (Reverse(), Reverse(1), Unrolled(), FirstOrder()):
        with pytest.raises(diffopt.RanksError, match="the gradients of their outer losses"):
            gradient_of(shared, numbers(3, seed=7), data, lambda w: local(w, held_out), estimator=rule)
        whole = gradient_of(shared, numbers(3, seed=7), data, lambda w: shared(w, held_out), estimator=rule)
        expected = gradient_of(
            lambda w, x: world * local(w, x),
            numbers(3, seed=7),
            every,
            lambda w: world * local(w, beyond),
            estimator=rule,
        )
        same([whole], [expected])


def check_outer_losses_of_other_results_are_refused() -> None:
    """Of other leaves, which is to make no rank wait in vain, and of what is handed out along the way."""
    problem = Problem()
    rank = problem.rank
    outers: dict[str, Any] = {
        "a leaf": lambda s: s.params["w"].sum() + (s.params["b"].sum() if rank == 0 else 0),
        "other leaves": lambda s: s.params["w"].sum() if rank == 0 else s.params["b"].sum(),
        "losses": lambda s: s.losses.sum() * (1 + rank),
        "losses of one rank": lambda s: s.losses.sum() if rank == 0 else s.params["w"].sum(),
        "observed": lambda s: s.observed.sum() * (1 + rank),
    }
    for name, of_all in outers.items():
        for rule in (Reverse(), Unrolled()):
            penalty = problem.penalty.clone().requires_grad_()
            args = problem.weights[problem.own], penalty, problem.x[problem.own], problem.y[problem.own]
            options: dict[str, Any] = {"observe": lambda p, *_: p["w"].square().sum()}
            solution = diffopt.solve(
                problem.spread, problem.start, *args, optimizer=diffopt.SGD(0.05), steps=3, estimator=rule, **options
            )
            try:
                torch.autograd.grad(of_all(solution), penalty)
            except diffopt.RanksError as error:
                said = str(error)
            else:
                said = f"{name} was not refused, by {rule}"
            assert "the gradients of their outer losses" in said, said


def check_right_programs_are_not_refused() -> None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    data, start = numbers(6, 3, seed=60 + rank), numbers(3, seed=7)
    alone = gradient_of(local, start, data)

    def logs(w: Tensor, x: Tensor) -> Tensor:
        value = local(w, x)
        distributed.all_reduce(value.detach().clone())
        return value

    same([gradient_of(logs, start, data)], [alone])  # tasks over ranks
    every = torch.cat([numbers(6, 3, seed=60 + r) for r in range(world)])

    def normed(w: Tensor, x: Tensor, mean: Tensor) -> Tensor:
        return ((x @ w) - mean).square().add(1).log().sum()

    def own_statistics(w: Tensor, x: Tensor) -> Tensor:
        w = copied(w)
        return summed(normed(w, x, torchs.all_reduce((x @ w).sum()) / len(every)))

    def all_statistics(w: Tensor, x: Tensor) -> Tensor:
        return normed(w, x, (x @ w).mean())

    same([gradient_of(own_statistics, start, data)], [gradient_of(all_statistics, start, every)])
    for zero in (start, torch.zeros(3, dtype=torch.float64)):  # features over ranks: params are shards
        shards = torch.cat([zero + (r if zero.any() else 0) for r in range(world)])
        mine = slice(3 * rank, 3 * rank + 3)
        x = numbers(6, 3 * world, seed=61)
        found = gradient_of(lambda w, x: (summed(x @ w) - 1).square().add(1).log().mean(), shards[mine], x[:, mine])
        same([found], [gradient_of(local, shards, x)[mine]])
    naive = gradient_of(lambda w, x: summed(local(w, x)), start, data, check=False)
    assert naive.isfinite().all()  # what is not checked is not refused


def check_shards_of_other_sizes() -> None:
    """Features over ranks: params that are shards, of other shapes on each rank, or other numbers of them."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    sizes = [3 if r == 0 else 2 for r in range(world)]
    first = sum(sizes[:rank])
    mine, x, start = slice(first, first + sizes[rank]), numbers(6, sum(sizes), seed=61), numbers(sum(sizes), seed=62)

    def shards(w: Tensor, x: Tensor) -> Tensor:
        return (summed(x @ w) - 1).square().add(1).log().mean()

    found = gradient_of(shards, start[mine], x[:, mine])
    same([found], [gradient_of(local, start, x)[mine]])
    parts = start[mine].split(2)  # two leaves on the first rank, one on the others
    leaves = [p.clone().requires_grad_() for p in parts]
    solution = diffopt.solve(
        lambda ps, x: shards(torch.cat(ps), x), leaves, x[:, mine], optimizer=diffopt.SGD(0.1), steps=3
    )
    same(torch.autograd.grad(torch.cat(solution.params).pow(3).sum(), leaves), found.split(2))
    with pytest.raises(diffopt.RanksError, match="copied was given 1 tensor") as refused:
        gradient_of(lambda w, x: shards(copied(w), x), start[mine], x[:, mine])
    assert len(str(refused.value)) < 300


def check_shards_that_start_equal_may_have_a_penalty() -> None:
    """The sum of squares of all shards is one number, and their gradients differ all the same."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    x = numbers(6, 2 * world, seed=61)
    mine = slice(2 * rank, 2 * rank + 2)

    def shards(w: Tensor, x: Tensor) -> Tensor:
        return (summed(x @ w) - 1).square().mean() + 0.3 * summed(w.square().sum())

    def whole(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w - 1).square().mean() + 0.3 * w.square().sum()

    for number in (0.0, 1.0):
        start = torch.full((2 * world,), number, dtype=torch.float64)
        same([gradient_of(shards, start[mine], x[:, mine])], [gradient_of(whole, start, x)[mine]])
    with pytest.raises(diffopt.RanksError, match=r"if params are shards, check=False") as refused:  # of one example
        gradient_of(shards, torch.zeros(2, dtype=torch.float64), x[:1, mine])
    assert len(str(refused.value)) < 300


def check_losses_that_do_not_depend_on_params_are_refused() -> None:
    data = numbers(6, 3, seed=60 + distributed.get_rank())
    for rule in (Reverse(), Unrolled()):
        with pytest.raises(diffopt.DisconnectedError):
            gradient_of(
                lambda w, x: summed(x.square().sum()) + 0 * x.sum().requires_grad_(),
                numbers(3, seed=7),
                data,
                estimator=rule,
            )


def check_what_the_pair_refuses() -> None:
    with pytest.raises(diffopt.LeafError, match="summed was given float"):
        summed(3.0)
    with pytest.raises(diffopt.LeafError, match="a bool tensor"):
        summed({"a": torch.tensor(True)})
    with pytest.raises(diffopt.LeafError, match="sparse"):
        summed(torch.eye(2).to_sparse())
    with pytest.raises(diffopt.LeafError, match="sparse"):
        copied([torch.eye(2).to_sparse()])


def check_groups() -> None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    halves = [list(range(world // 2)), list(range(world // 2, world))]
    made = [distributed.new_group(ranks) for ranks in halves]
    mine = int(rank >= world // 2)
    same([summed(torch.tensor(rank + 1.0), group=made[mine])], [torch.tensor(sum(r + 1.0 for r in halves[mine]))])
    other = made[1 - mine]
    for function in (copied, summed):
        with pytest.raises(diffopt.RanksError, match="with a group that it is not of"):
            function(torch.ones(2), group=other)
    data = numbers(6, 3, seed=60 + rank)
    found = gradient_of(
        lambda w, x: summed(local(copied(w, made[mine]), x), made[mine]) / len(halves[mine]),
        numbers(3, seed=mine),
        data,
    )
    every = torch.cat([numbers(6, 3, seed=60 + r) for r in halves[mine]])
    same([found], [gradient_of(local, numbers(3, seed=mine), every)])
