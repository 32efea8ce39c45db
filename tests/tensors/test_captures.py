"""Tensors that an inner loss reads without being given them: refused where they would silently lose a derivative."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, vjp, vmap

import diffopt
from diffopt import Leaves
from diffopt.estimators import Binomial, ESJacobian, FirstOrder, ForwardMode, Reptile, Reverse, Truncated, Unrolled


@pytest.fixture(scope="module", autouse=True)
def others_are_old() -> Iterator[None]:
    """A refusal collects garbage first, which takes long among all that other tests have made and still hold."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
    with pytest.raises(diffopt.CapturedTensorError, match=r"captured it.*; pass it in \*args") as caught:
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


# ------------------------------------------------------------------------------------------------ at later steps


def from_step(first: int, c: Tensor) -> tuple[Any, Tensor]:
    """A loss that captures ``c`` from a step on, and the batches that tell it which step it is."""
    return lambda w, flag: distance(w, c) if float(flag) else w.square().sum(), (torch.arange(1, 5) >= first).double()


class Late:
    """An optimizer's update that captures a tensor from a step on."""

    @staticmethod
    def of(first: int, c: Tensor) -> Any:
        @dataclass(frozen=True)
        class Shifted(diffopt.Optimizer):
            lr: float = 0.1

            def init(self, params: Leaves) -> dict[str, Leaves]:
                return {}

            def update(self, params: Leaves, grads: Leaves, buffers: Any, step: int) -> Any:
                shift = params.map(lambda x: x + 0.01 * c) if step >= first else params
                return shift - self.lr * grads, buffers

        return Shifted()


LATER: dict[str, Any] = {**RULES, "graph": Reverse("graph"), "sqrt": Reverse("sqrt"), "every_third": Reverse(3)}


@pytest.mark.parametrize("first", [2, 3, 4])
@pytest.mark.parametrize("made", ["leaf", "non_leaf", "parameter", "older_graph"])
@pytest.mark.parametrize("rule", LATER)
def test_what_a_loss_captures_only_later_is_refused(rule: str, made: str, first: int) -> None:
    c = {
        "leaf": leaf,
        "non_leaf": lambda: 2 * leaf(),
        "parameter": lambda: nn.Parameter(leaf().detach()),
        "older_graph": lambda: distance(leaf(), leaf()).expand(2).clone(),
    }[made]()
    loss, flags = from_step(first, c)
    with pytest.raises(diffopt.CapturedTensorError, match=r"captured it.*; pass it in \*args"):
        diffopt.solve(
            loss, start(), optimizer=diffopt.SGD(0.1), steps=4, batches=flags, estimator=LATER[rule]
        ).params.sum().backward()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("only", [2, 17, 21])
@pytest.mark.parametrize("made", ["leaf", "non_leaf"])
@pytest.mark.parametrize("rule", LATER)
def test_what_a_loss_captures_in_one_step_of_many_is_refused(rule: str, made: str, only: int, learned: bool) -> None:
    """Not at the first step, nor at the last, nor where several are looked at together."""
    c = leaf() if made == "leaf" else 2 * leaf()
    flags = torch.zeros(24, dtype=torch.float64)
    flags[only - 1] = 1.0

    def loss(w: Tensor, flag: Tensor) -> Tensor:
        return distance(w, c) if float(flag) else w.square().sum()

    with pytest.raises(diffopt.CapturedTensorError, match=r"captured it.*; pass it in \*args"):
        diffopt.solve(
            loss,
            start().requires_grad_(learned),
            optimizer=diffopt.SGD(0.1),
            steps=24,
            batches=flags,
            estimator=LATER[rule],
        ).params.sum().backward()


@pytest.mark.parametrize("style", ["vmap", "grad", "vmap_of_grad", "grad_of_vmap"])
@pytest.mark.parametrize("first", [1, 2, 4])
def test_so_is_what_a_transform_has_wrapped(style: str, first: int) -> None:
    def end(c: Tensor) -> Tensor:
        loss, flags = from_step(first, c)
        return diffopt.solve(loss, start(), optimizer=diffopt.SGD(0.1), steps=4, batches=flags).params

    calls: dict[str, Callable[[], Any]] = {
        "vmap": lambda: vmap(end)(rows(3)),
        "grad": lambda: grad(lambda c: end(c).sum())(start()),
        "vmap_of_grad": lambda: vmap(grad(lambda c: end(c).sum()))(rows(3)),
        "grad_of_vmap": lambda: grad(lambda c: vmap(end)(c).sum())(rows(3)),
    }
    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        calls[style]()


class Box:
    """An object that no tree knows, with a tensor in it."""

    def __init__(self, held: Any) -> None:
        self.held = held


HELD: dict[str, Callable[[Tensor], Box]] = {
    "as it is": Box,
    "in a list": lambda c: Box([c]),
    "two deep": lambda c: Box({"inner": Box(c)}),
}


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("kind", HELD)
def test_so_is_what_a_transform_has_wrapped_within_an_argument(kind: str, first: int) -> None:
    def read(box: Box) -> Tensor:
        held = box.held
        c: Tensor = held["inner"].held if kind == "two deep" else held[0] if kind == "in a list" else held
        return c

    def loss(w: Tensor, box: Box, flag: Tensor) -> Tensor:
        return distance(w, read(box)) if float(flag) else w.square().sum()

    def end(c: Tensor) -> Tensor:
        flags = (torch.arange(1, 5) >= first).double()
        return diffopt.solve(loss, start(), HELD[kind](c), optimizer=diffopt.SGD(0.1), steps=4, batches=flags).params

    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        vmap(end)(rows(3))


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("rule", [Reverse(), Reverse("graph"), Reverse(1), Reverse(2), Truncated(4)], ids=repr)
def test_an_update_that_captures_a_tensor_is_refused_at_the_latest_in_the_backward_pass(rule: Any, first: int) -> None:
    w = leaf()
    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        diffopt.solve(
            lambda w: w.square().sum(), w, optimizer=Late.of(first, leaf()), steps=4, estimator=rule
        ).params.sum().backward()


@pytest.mark.parametrize("made", [leaf, lambda: 2 * leaf(), lambda: distance(leaf(), leaf()).expand(2).clone()])
@pytest.mark.parametrize("rule", [*RULES.values(), Reptile(), ESJacobian(2, 1e-3), Binomial(1)], ids=repr)
def test_an_update_that_captures_a_tensor_at_the_first_step_is_refused_by_the_solve(
    rule: Any, made: Callable[[], Tensor]
) -> None:
    """Also where no step is computed again, in which one would be looked at."""
    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        diffopt.solve(lambda w: w.square().sum(), leaf(), optimizer=Late.of(1, made()), steps=4, estimator=rule)


@pytest.mark.parametrize("rule", LATER)
def test_constants_and_arguments_that_are_read_later_are_right(rule: str) -> None:
    c = leaf()
    for captured, given in ((c.detach(), ()), (None, (c,))):

        def loss(w: Tensor, *args: Tensor, captured: Any = captured) -> Tensor:
            target = args[0] if captured is None else captured
            return distance(w, target) if float(args[-1]) else w.square().sum()

        flags = torch.tensor([0, 1, 0, 1], dtype=torch.float64)
        end = diffopt.solve(
            loss, start(), *given, optimizer=diffopt.SGD(0.1), steps=4, batches=flags, estimator=LATER[rule]
        ).params
        now = start()
        for flag in flags:
            now = now - 0.2 * (now - flag * c.detach())
        torch.testing.assert_close(end.detach(), now, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", [*RULES.values(), Reverse("sqrt")], ids=repr)
@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_captured_tangent_is_refused(rule: Any, first: int) -> None:
    """Of plain forward-mode differentiation, whose tensors no transform has wrapped."""
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        loss, flags = from_step(first, forward_ad.make_dual(start(), torch.ones(2, dtype=torch.float64)))
        with pytest.raises(
            diffopt.MissingDerivativeError, match="the inner loss reads a tensor that carries a tangent"
        ):
            diffopt.solve(loss, start(), optimizer=diffopt.SGD(0.1), steps=4, batches=flags, estimator=rule)


@pytest.mark.parametrize("first", [1, 2])
def test_plain_unrolling_passes_a_captured_tangent_on(first: int) -> None:
    """Each of the steps that read ``c`` adds a fifth of its tangent, and keeps four fifths of what was there."""
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        loss, flags = from_step(first, forward_ad.make_dual(start(), torch.ones(2, dtype=torch.float64)))
        end = diffopt.solve(
            loss, start(), optimizer=diffopt.SGD(0.1), steps=4, batches=flags, estimator=Unrolled()
        ).params
        tangent = forward_ad.unpack_dual(end).tangent
    expected = 0.0
    for flag in flags:
        expected = 0.8 * expected + 0.2 * float(flag)
    torch.testing.assert_close(tangent, torch.full((2,), expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_loss_may_ask_for_the_gradient_of_what_it_is_given() -> None:
    """A gradient penalty begins with ``x.requires_grad_()``, of an argument, a batch, or one that requires it."""
    x, factor = rows(3), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor, factor: Tensor, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad((x @ w).pow(3).sum(), x, create_graph=True)
        return distance(w, x[0].detach()) + factor * slope.square().mean()

    now = start()
    for _ in range(3):
        now = now.detach().requires_grad_() if now.is_leaf else now
        now = now - 0.1 * torch.autograd.grad(loss(now, factor, x.clone()), now, create_graph=True)[0]
    (expected,) = torch.autograd.grad(now.pow(3).sum(), factor)
    for rule in (Reverse(), Reverse(1), Reverse("sqrt"), Truncated(3), Unrolled()):
        for wanted in (x, x.clone().requires_grad_()):
            w = start()
            end = diffopt.solve(loss, w, factor, wanted, optimizer=diffopt.SGD(0.1), steps=3, estimator=rule).params
            (got,) = torch.autograd.grad(end.pow(3).sum(), factor)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
            batches = torch.stack([wanted] * 3)
            end = diffopt.solve(
                loss, w, factor, batches=batches, optimizer=diffopt.SGD(0.1), steps=3, estimator=rule
            ).params
            torch.testing.assert_close(torch.autograd.grad(end.pow(3).sum(), factor)[0], expected, rtol=1e-12, atol=0)
    assert not x.requires_grad
