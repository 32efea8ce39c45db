"""Tensors that an inner loss reads without being given them: refused where they would silently lose a derivative."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap

import diffopt
from diffopt.estimators import FirstOrder, ForwardMode, Reverse, Truncated, Unrolled

Run = Callable[..., Tensor]
RULES: dict[str, Any] = {
    "reverse": Reverse(),
    "states": Reverse(1),
    "truncated": Truncated(1),
    "forward": ForwardMode(),
    "first_order": FirstOrder(),
}


def start() -> Tensor:
    return torch.tensor([1.0, 2.0], dtype=torch.float64)


def leaf() -> Tensor:
    return torch.tensor([0.5, 0.3], dtype=torch.float64, requires_grad=True)


def rows(count: int) -> Tensor:
    return torch.linspace(0.1, 0.9, 2 * count, dtype=torch.float64).view(count, 2)


def distance(w: Tensor, c: Tensor) -> Tensor:
    return (w - c).square().sum()


def to(c: Tensor) -> Callable[[Tensor], Tensor]:
    """A loss that captures ``c``."""
    return lambda w: distance(w, c)


class Holder:
    """A loss that reads an attribute of its object."""

    def __init__(self, c: Tensor) -> None:
        self.c = c

    def loss(self, w: Tensor) -> Tensor:
        return distance(w, self.c)

    __call__ = loss


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 2).double()


# Each gets run(loss, params, *args) -> final params.
REFUSED: dict[str, Callable[[Run], Any]] = {
    "leaf": lambda run: run(to(leaf()), start()),
    "apart_from_params": lambda run: (lambda c: run(lambda w: w.square().sum() + c.square().sum(), start()))(leaf()),
    "module_called_as_it_is": lambda run: (
        lambda net: run(
            lambda p: net(rows(3)).square().mean() + sum(x.square().sum() for x in p.values()),
            {name: x.detach() for name, x in net.named_parameters()},
        )
    )(linear()),
    "leaf_beside_args": lambda run: (lambda c: run(lambda w, x: distance(w * x, c), start(), leaf()))(leaf()),
    "non_leaf": lambda run: run(to(2 * leaf()), start()),
    "module": lambda run: (lambda module: run(lambda w: module(w).square().sum(), start()))(linear()),
    "bound_method": lambda run: run(Holder(leaf()).loss, start()),
    "object": lambda run: run(Holder(leaf()), start()),
    "partial": lambda run: run(partial(distance, c=leaf()), start()),
    "grad": lambda run: grad(lambda c: run(to(c), start()).sum())(start()),
    "grad_non_leaf": lambda run: grad(lambda c: run(to(2 * c), start()).sum())(start()),
    "grad_constant_made_under_it": lambda run: grad(lambda w: run(to(start()), w).sum())(start()),
    "vjp": lambda run: vjp(lambda c: run(to(c), start()), start()),
    "jacrev": lambda run: jacrev(lambda c: run(to(c), start()))(start()),
    "vmap_shared_params": lambda run: vmap(lambda c: run(to(c), start()))(rows(3)),
    "vmap_batched_params": lambda run: vmap(lambda w, c: run(to(c), w))(rows(3), rows(3)),
    "vmap_leaf_outside": lambda run: (lambda c: vmap(lambda w: run(to(c), w))(rows(3)))(leaf()),
    "vmap_of_index": lambda run: vmap(lambda i: run(lambda w: w[i].square(), start()))(torch.tensor([0, 1])),
    "vmap_of_grad": lambda run: vmap(grad(lambda c: run(to(c), start()).sum()))(rows(3)),
    "vmap_of_grad_captures_vmapped": lambda run: vmap(lambda c, w: grad(lambda w: run(to(c), w).sum())(w))(
        rows(3), rows(3)
    ),
    "grad_of_vmap": lambda run: grad(lambda c: vmap(lambda c: run(to(c), start()))(c).sum())(rows(3)),
    "grad_of_vmap_captures_outer": lambda run: grad(lambda c: vmap(lambda w: run(to(c), w))(rows(3)).sum())(start()),
    "nested_vmap_captures_outer": lambda run: vmap(lambda c: vmap(lambda w: run(to(c), w))(rows(4)))(rows(3)),
    "nested_vmap_captures_inner": lambda run: vmap(lambda w: vmap(lambda c: run(to(c), w))(rows(4)))(rows(3)),
    "same_sizes_nested": lambda run: vmap(lambda c: vmap(lambda w: run(to(c), w))(rows(2)))(rows(2)),
    "in_a_list": lambda run: grad(lambda c: run(lambda w: torch.stack([w, c]).prod(0).sum(), start()).sum())(start()),
    "by_keyword": lambda run: grad(lambda c: run(lambda w: torch.mul(input=w, other=c).sum(), start()).sum())(start()),
}


@pytest.fixture(params=RULES)
def run(request: pytest.FixtureRequest) -> Run:
    return partial(solve, RULES[request.param])


def solve(rule: Any, loss: Any, params: Any, *args: Any, check: bool = True) -> Any:
    optimizer = diffopt.SGD(0.1)
    return diffopt.solve(loss, params, *args, optimizer=optimizer, steps=2, estimator=rule, check=check).params


@pytest.mark.parametrize("name", REFUSED)
def test_a_captured_tensor_is_refused(run: Run, name: str) -> None:
    with pytest.raises(diffopt.CapturedTensorError, match=r"captured it.* Pass it in \*args") as caught:
        REFUSED[name](run)
    assert isinstance(caught.value, diffopt.DiffoptError)
    assert len(str(caught.value)) < 350


@pytest.mark.parametrize(
    "name", [name for name in REFUSED if "vmap" in name and "grad" not in name and "leaf" not in name]
)
def test_what_a_vmap_batches_is_refused_by_plain_unrolling_too(name: str) -> None:
    """The steps run below the vmap, where its batch axis would be matched with something else."""
    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        REFUSED[name](partial(solve, Unrolled()))


@pytest.mark.parametrize("name", ["leaf", "non_leaf", "module", "bound_method", "object", "partial"])
def test_without_check_a_captured_tensor_is_a_constant(run: Run, name: str) -> None:
    result = REFUSED[name](partial(run, check=False))
    assert not result.requires_grad
    torch.testing.assert_close(result, REFUSED[name](partial(solve, Unrolled())).detach())


@pytest.mark.parametrize("style", ["autograd", "grad", "vmap_of_grad", "vmap_leaf_outside"])
def test_unrolling_differentiates_what_it_captures(style: str) -> None:
    """As its docstring says; two steps towards ``c`` give ``0.64 w + 0.36 c``."""
    c = leaf()

    def objective(c: Tensor) -> Tensor:
        return solve(Unrolled(), to(c), start()).square().sum()

    actual = {
        "autograd": lambda: torch.autograd.grad(objective(c), c)[0],
        "grad": lambda: grad(objective)(c.detach()),
        "vmap_of_grad": lambda: vmap(grad(objective))(c.detach()[None])[0],
        "vmap_leaf_outside": lambda: torch.autograd.grad(vmap(lambda i: i * objective(c))(torch.ones(1)).sum(), c)[0],
    }[style]()
    expected = 2 * 0.36 * (0.64 * start() + 0.36 * c.detach())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)  # rounding


# ------------------------------------------------------------------------------------------------ no false alarm


def under_no_grad(run: Run) -> Tensor:
    c = leaf()
    with torch.no_grad():
        return run(to(c), start())


def no_grad_inside(c: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(w: Tensor) -> Tensor:
        with torch.no_grad():
            target = 2 * c
        return distance(w, target)

    return loss


def cubes(w: Tensor) -> Tensor:
    return grad(lambda x: x.pow(3).sum())(w).square().sum()


def own_leaf(w: Tensor) -> Tensor:
    """A loss that differentiates by ``torch.autograd.grad`` with respect to a leaf that it makes itself."""
    z = torch.zeros(2, dtype=w.dtype, requires_grad=True)
    return torch.autograd.grad((z - w).pow(3).sum(), z, create_graph=True)[0].square().sum()


def own_leaf_in_a_cycle(w: Tensor) -> Tensor:
    """The same where the leaf is held by an object that holds itself, until garbage is collected."""
    holder: dict[str, Any] = {"leaf": torch.zeros(2, dtype=w.dtype, requires_grad=True)}
    holder["itself"] = holder
    return distance(w, holder["leaf"])


def in_another_thread(w: Tensor) -> Tensor:
    """A loss whose nodes autograd numbers from the start, as those of a GPU's backward thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: w.pow(3).sum()).result() + w.square().sum()


def nested(rule: Any, constant_start: bool) -> Callable[..., Tensor]:
    """A loss that solves an inner problem of its own, given ``w`` through its args."""

    def loss(w: Tensor) -> Tensor:
        begin = torch.ones_like(w.detach()) if constant_start else 2 * w
        return solve(rule, distance, begin, w).square().sum() + w.square().sum()

    return loss


def through(module: nn.Module) -> Callable[..., Tensor]:
    return lambda params, x: functional_call(module, params, (x,)).square().sum()


def parameters(module: nn.Module, detached: bool = False) -> dict[str, Tensor]:
    return {name: p.detach() if detached else p for name, p in module.named_parameters()}


MODULE = linear()
ALLOWED: dict[str, Callable[[Run], Any]] = {
    "functional_call": lambda run: run(through(MODULE), parameters(MODULE), rows(1)),
    "functional_call_grad": lambda run: grad(lambda p: run(through(MODULE), p, rows(1))["weight"].sum())(
        parameters(MODULE, detached=True)
    ),
    "functional_call_vmap": lambda run: vmap(lambda x: run(through(MODULE), parameters(MODULE), x)["bias"])(rows(3)),
    "constant": lambda run: run(to(rows(1)[0]), leaf()),
    "constant_vmap": lambda run: vmap(lambda w: run(to(start()), w))(rows(3)),
    "constant_grad": lambda run: (lambda c: grad(lambda w: run(to(c), w).sum())(start()))(start()),
    "constant_vmap_of_grad": lambda run: (lambda c: vmap(grad(lambda w: run(to(c), w).sum()))(rows(3)))(start()),
    "constant_of_the_loss_vmap_of_grad": lambda run: vmap(grad(lambda w: run(lambda w: distance(w, start()), w).sum()))(
        rows(3)
    ),
    "detached": lambda run: run(to(leaf().detach()), leaf()),
    "frozen_module": lambda run: (lambda m: run(lambda w: m(w).square().sum(), leaf()))(linear().requires_grad_(False)),
    "solve_under_no_grad": under_no_grad,
    "no_grad_inside": lambda run: run(no_grad_inside(leaf()), leaf()),
    "func_grad_inside": lambda run: run(cubes, leaf()),
    "func_grad_inside_grad": lambda run: grad(lambda w: run(cubes, w).sum())(start()),
    "func_grad_inside_vmap": lambda run: vmap(lambda w: run(cubes, w))(rows(3)),
    "vmap_inside": lambda run: run(lambda w: vmap(torch.square)(w).sum(), leaf()),
    "vmap_of_grad_inside_vmap": lambda run: vmap(lambda w: run(lambda w: vmap(grad(torch.square))(w).sum(), w))(
        rows(3)
    ),
    "own_leaf_in_a_cycle": lambda run: run(own_leaf_in_a_cycle, leaf()),
    "in_another_thread": lambda run: run(in_another_thread, leaf()),
    "autograd_inside": lambda run: run(own_leaf, leaf()),
    **{
        f"solve_inside{'_from_constant' * constant}{style}": partial(
            lambda run, loss, call: call(run, loss), loss=nested(Unrolled(), constant), call=call
        )
        for constant in (False, True)
        for style, call in {
            "": lambda run, loss: run(loss, leaf()),
            "_vmap": lambda run, loss: vmap(lambda w: run(loss, w))(rows(3)),
            "_grad": lambda run, loss: grad(lambda w: run(loss, w).sum())(start()),
            "_vmap_of_grad": lambda run, loss: vmap(grad(lambda w: run(loss, w).sum()))(rows(3)),
        }.items()
    },
    "first_order_inside": lambda run: run(nested(FirstOrder(), False), start()),
    "first_order_inside_from_constant": lambda run: run(nested(FirstOrder(), True), start()),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_no_false_alarm(run: Run, name: str) -> None:
    result = ALLOWED[name](run)
    leaves = list(result.values()) if isinstance(result, dict) else [result]
    assert all(leaf.isfinite().all() for leaf in leaves)


def test_frozen_parameters_among_others_are_refused() -> None:
    """``torch.optim`` would leave them alone; all frozen, detached or passed as arguments they are what they seem."""
    net = nn.Sequential(linear(), linear())
    net[0].requires_grad_(False)
    params, given = dict(net.named_parameters()), {"optimizer": diffopt.SGD(0.1), "steps": 2}

    def loss(p: Any, frozen: Any) -> Tensor:
        return functional_call(net, {**frozen, **p}, (rows(3),)).square().mean()

    with pytest.raises(diffopt.LeafError, match=r"params\['0.bias'\] is a frozen parameter .* in \*args"):
        diffopt.solve(loss, params, {}, **given)
    split: tuple[dict[str, Tensor], ...] = tuple(
        {name: x for name, x in params.items() if name.startswith(layer)} for layer in "10"
    )
    ends = [
        diffopt.solve(loss, *split, **given).params,
        diffopt.solve(loss, {name: x.detach() for name, x in params.items()}, {}, **given).params,
        diffopt.solve(loss, params, {}, check=False, **given).params,
    ]
    assert [set(end) for end in ends] == [set(split[0]), set(params), set(params)]
    net.requires_grad_(False)
    assert torch.equal(diffopt.solve(loss, params, {}, **given).params["0.weight"], ends[1]["0.weight"])


@pytest.mark.parametrize("rule", [FirstOrder(), Reverse()])
def test_an_inner_solve_that_captures_the_outer_params_is_refused(rule: Any) -> None:
    def loss(w: Tensor) -> Tensor:
        return solve(rule, to(w), torch.ones_like(w.detach())).square().sum() + w.square().sum()

    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        solve(rule, loss, leaf())


def test_the_parameters_of_a_module_among_the_arguments_are_named() -> None:
    module = torch.nn.Linear(2, 1)
    says = r"reads `args\[0\]\['net'\]\.bias`, .*diffopt\.functional\(module\)"
    with pytest.raises(diffopt.CapturedTensorError, match=says):
        diffopt.solve(
            lambda w, held: held["net"](w).square().sum(),
            torch.ones(2),
            {"net": module},
            optimizer=diffopt.SGD(0.1),
            steps=1,
        )
