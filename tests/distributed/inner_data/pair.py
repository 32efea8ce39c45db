"""``copied`` and ``summed`` by themselves: values, derivatives of every order, groups, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from beside import numbers, same
from inner_data.problem import gradient_of, local
from torch import Tensor, distributed

import diffopt
from diffopt.distributed import copied, summed


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
