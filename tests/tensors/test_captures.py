"""Tensors that an inner loss reads without being given them: refused where they would silently lose a derivative."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from stateless import Stateless
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, vjp, vmap

import diffopt
from diffopt import Leaves
from diffopt.estimators import Binomial, ESJacobian, FirstOrder, ForwardMode, Reptile, Reverse, Truncated, Unrolled

Run = Callable[..., Tensor]
ESTIMATORS: dict[str, Any] = {
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


def parameters(module: nn.Module, detached: bool = False) -> dict[str, Tensor]:
    return {name: p.detach() if detached else p for name, p in module.named_parameters()}


Case = Callable[[Run], Any]
REFUSED: dict[str, Case] = {}
ALLOWED: dict[str, Case] = {}
"""By name: what is called with ``run(loss, params, *args)``, which returns the final params."""


def refused(case: Case, into: dict[str, Case] = REFUSED) -> Case:
    """The loss that this runs captures what it must be given."""
    into[case.__name__] = case
    return case


allowed = partial(refused, into=ALLOWED)
"""The loss that this runs captures nothing that would lose a derivative."""


def runs(loss: Any) -> Case:
    """Run a loss from a constant start."""
    return lambda run: run(loss, start())


# One loss each, which has captured something: refused without any transform.
REFUSED["leaf"] = runs(to(leaf()))
REFUSED["non_leaf"] = runs(to(2 * leaf()))
REFUSED["bound_method"] = runs(Holder(leaf()).loss)
REFUSED["object"] = runs(Holder(leaf()))
REFUSED["partial"] = runs(partial(distance, c=leaf()))


@refused
def module(run: Run) -> Any:
    net = linear()
    return run(lambda w: net(w).square().sum(), start())


@refused
def apart_from_params(run: Run) -> Any:
    c = leaf()
    return run(lambda w: w.square().sum() + c.square().sum(), start())


@refused
def leaf_beside_args(run: Run) -> Any:
    c = leaf()
    return run(lambda w, x: distance(w * x, c), start(), leaf())


@refused
def module_called_as_it_is(run: Run) -> Any:
    net = linear()

    def loss(params: Any) -> Tensor:
        return net(rows(3)).square().mean() + sum(x.square().sum() for x in params.values())

    return run(loss, parameters(net, detached=True))


def transformed(run: Run, loss_of: Callable[[Tensor], Any] = to) -> Callable[[Tensor], Tensor]:
    """The final params from a constant start, as a function of what the loss captures."""
    return lambda c: run(loss_of(c), start())


def total(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda c: function(c).sum()


# What a transform differentiates by or batches is captured by the loss itself.
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda end: grad(total(end))(start()),
    "vjp": lambda end: vjp(end, start()),
    "jacrev": lambda end: jacrev(end)(start()),
    "vmap_shared_params": lambda end: vmap(end)(rows(3)),
    "vmap_of_grad": lambda end: vmap(grad(total(end)))(rows(3)),
    "grad_of_vmap": lambda end: grad(total(vmap(end)))(rows(3)),
}
for name, transform in TRANSFORMS.items():
    REFUSED[name] = lambda run, transform=transform: transform(transformed(run))


@refused
def grad_non_leaf(run: Run) -> Any:
    return grad(total(transformed(run, lambda c: to(2 * c))))(start())


@refused
def in_a_list(run: Run) -> Any:
    return grad(total(transformed(run, lambda c: lambda w: torch.stack([w, c]).prod(0).sum())))(start())


@refused
def by_keyword(run: Run) -> Any:
    return grad(total(transformed(run, lambda c: lambda w: torch.mul(input=w, other=c).sum())))(start())


@refused
def vmap_of_index(run: Run) -> Any:
    return vmap(transformed(run, lambda i: lambda w: w[i].square()))(torch.tensor([0, 1]))


@refused
def grad_constant_made_under_it(run: Run) -> Any:
    return grad(lambda w: run(to(start()), w).sum())(start())


@refused
def vmap_batched_params(run: Run) -> Any:
    return vmap(lambda w, c: run(to(c), w))(rows(3), rows(3))


@refused
def vmap_leaf_outside(run: Run) -> Any:
    c = leaf()
    return vmap(lambda w: run(to(c), w))(rows(3))


def from_rows(run: Run, c: Tensor, count: int) -> Tensor:
    """Solves under a vmap over their starts, which all capture ``c``."""
    return vmap(lambda w: run(to(c), w))(rows(count))


@refused
def vmap_of_grad_captures_vmapped(run: Run) -> Any:
    return vmap(lambda c, w: grad(lambda w: run(to(c), w).sum())(w))(rows(3), rows(3))


@refused
def grad_of_vmap_captures_outer(run: Run) -> Any:
    return grad(lambda c: from_rows(run, c, 3).sum())(start())


@refused
def nested_vmap_captures_outer(run: Run) -> Any:
    return vmap(lambda c: from_rows(run, c, 4))(rows(3))


@refused
def nested_vmap_captures_inner(run: Run) -> Any:
    return vmap(lambda w: vmap(lambda c: run(to(c), w))(rows(4)))(rows(3))


@refused
def same_sizes_nested(run: Run) -> Any:
    return vmap(lambda c: from_rows(run, c, 2))(rows(2))


@pytest.fixture(params=ESTIMATORS)
def run(request: pytest.FixtureRequest) -> Run:
    return partial(solve, ESTIMATORS[request.param])


def solve(estimator: Any, loss: Any, params: Any, *args: Any, check: bool = True) -> Any:
    optimizer = diffopt.SGD(0.1)
    return diffopt.solve(loss, params, *args, optimizer=optimizer, steps=2, estimator=estimator, check=check).params


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


def no_grad_inside(c: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(w: Tensor) -> Tensor:
        with torch.no_grad():
            target = 2 * c
        return distance(w, target)

    return loss


def cubes(w: Tensor) -> Tensor:
    return grad(lambda x: x.pow(3).sum())(w).square().sum()


def sum_of_squares(w: Tensor) -> Tensor:
    return vmap(torch.square)(w).sum()


def sum_of_slopes(w: Tensor) -> Tensor:
    return vmap(grad(torch.square))(w).sum()


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


def nested(estimator: Any, constant_start: bool) -> Callable[..., Tensor]:
    """A loss that solves an inner problem of its own, given ``w`` through its args."""

    def loss(w: Tensor) -> Tensor:
        begin = torch.ones_like(w.detach()) if constant_start else 2 * w
        return solve(estimator, distance, begin, w).square().sum() + w.square().sum()

    return loss


def through(module: nn.Module) -> Callable[..., Tensor]:
    return lambda params, x: functional_call(module, params, (x,)).square().sum()


MODULE = linear()
# Ways of calling a loss that is given all it needs, or captures constants.
WAYS: dict[str, Callable[[Run, Any], Any]] = {
    "plain": lambda run, loss: run(loss, leaf()),
    "vmap": lambda run, loss: vmap(lambda w: run(loss, w))(rows(3)),
    "grad": lambda run, loss: grad(lambda w: run(loss, w).sum())(start()),
    "vmap_of_grad": lambda run, loss: vmap(grad(lambda w: run(loss, w).sum()))(rows(3)),
}
FIT: dict[str, Any] = {
    "constant": to(start()),
    "detached": to(leaf().detach()),
    "no_grad_inside": no_grad_inside(leaf()),
    "func_grad_inside": cubes,
    "vmap_inside": sum_of_squares,
    "vmap_of_grad_inside": sum_of_slopes,
    "own_leaf_in_a_cycle": own_leaf_in_a_cycle,
    "in_another_thread": in_another_thread,
    "autograd_inside": own_leaf,
    "solve_inside": nested(Unrolled(), False),
    "solve_inside_from_constant": nested(Unrolled(), True),
}
ONCE_ONLY = ("own_leaf_in_a_cycle", "in_another_thread", "autograd_inside", "no_grad_inside")
for name, loss in FIT.items():
    for way, call in WAYS.items():
        if way == "plain" or name not in ONCE_ONLY:  # which torch's transforms refuse by themselves
            ALLOWED[f"{name}_{way}"] = lambda run, loss=loss, call=call: call(run, loss)


@allowed
def functional_call_plain(run: Run) -> Any:
    return run(through(MODULE), parameters(MODULE), rows(1))


@allowed
def functional_call_grad(run: Run) -> Any:
    given = parameters(MODULE, detached=True)
    return grad(lambda params: run(through(MODULE), params, rows(1))["weight"].sum())(given)


@allowed
def functional_call_vmap(run: Run) -> Any:
    return vmap(lambda x: run(through(MODULE), parameters(MODULE), x)["bias"])(rows(3))


@allowed
def constant_of_the_loss(run: Run) -> Any:
    return vmap(grad(lambda w: run(lambda w: distance(w, start()), w).sum()))(rows(3))


@allowed
def constant_made_under_a_vmap(run: Run) -> Any:
    return vmap(lambda w: run(to(start()), w))(rows(3))


@allowed
def frozen_module(run: Run) -> Any:
    net = linear().requires_grad_(False)
    return run(lambda w: net(w).square().sum(), leaf())


@allowed
def solve_under_no_grad(run: Run) -> Any:
    c = leaf()
    with torch.no_grad():
        return run(to(c), start())


@allowed
def first_order_inside(run: Run) -> Any:
    return run(nested(FirstOrder(), False), start())


@allowed
def first_order_inside_from_constant(run: Run) -> Any:
    return run(nested(FirstOrder(), True), start())


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
    split = [{name: x for name, x in params.items() if name.startswith(layer)} for layer in "10"]
    detached = {name: x.detach() for name, x in params.items()}
    ends = [diffopt.solve(loss, *each, **given).params for each in (split, (detached, {}))]
    ends.append(diffopt.solve(loss, params, {}, check=False, **given).params)
    assert [set(end) for end in ends] == [set(split[0]), set(params), set(params)]
    net.requires_grad_(False)
    assert torch.equal(diffopt.solve(loss, params, {}, **given).params["0.weight"], ends[1]["0.weight"])


@pytest.mark.parametrize("estimator", [FirstOrder(), Reverse()])
def test_an_inner_solve_that_captures_the_outer_params_is_refused(estimator: Any) -> None:
    def loss(w: Tensor) -> Tensor:
        return solve(estimator, to(w), torch.ones_like(w.detach())).square().sum() + w.square().sum()

    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        solve(estimator, loss, leaf())


def test_the_parameters_of_a_module_among_the_arguments_are_named() -> None:
    module = torch.nn.Linear(2, 1)
    says = r"reads `args\[0\]\['net'\]\.bias`, .*diffopt\.functional\(module\)"
    with pytest.raises(diffopt.CapturedTensorError, match=says):
        solve(None, lambda w, held: held["net"](w).square().sum(), torch.ones(2), {"net": module})


# ------------------------------------------------------------------------------------------------ at later steps


def descended(loss: Any, params: Any, batches: Tensor, estimator: Any = None, *args: Any) -> Any:
    """The final params, after a step for each of the batches."""
    given = {"optimizer": diffopt.SGD(0.1), "steps": len(batches), "batches": batches, "estimator": estimator}
    return diffopt.solve(loss, params, *args, **given).params


def where_told(w: Tensor, c: Tensor, flag: Tensor) -> Tensor:
    """The distance from ``c`` in the steps whose batch says so."""
    return distance(w, c) if float(flag) else w.square().sum()


def from_step(first: int) -> Tensor:
    """Batches that say so from a step on."""
    return (torch.arange(1, 5) >= first).double()


def reading(c: Tensor) -> Callable[..., Tensor]:
    """A loss that captures ``c``, in the steps whose batch says so."""
    return lambda w, flag: where_told(w, c, flag)


def capturing_update(first: int, c: Tensor) -> Any:
    """An optimizer whose update captures ``c`` from a step on."""

    @dataclass(frozen=True)
    class Shifted(Stateless):
        lr: float = 0.1

        def update(self, params: Leaves, grads: Leaves, buffers: Any, step: int) -> Any:
            shift = params.map(lambda x: x + 0.01 * c) if step >= first else params
            return shift - self.lr * grads, buffers

    return Shifted()


MADE: dict[str, Callable[[], Tensor]] = {
    "leaf": leaf,
    "non_leaf": lambda: 2 * leaf(),
    "parameter": lambda: nn.Parameter(leaf().detach()),
    "older_graph": lambda: distance(leaf(), leaf()).expand(2).clone(),
}
LATER: dict[str, Any] = {**ESTIMATORS, "graph": Reverse("graph"), "sqrt": Reverse("sqrt"), "every_third": Reverse(3)}


@pytest.mark.parametrize("first", [2, 3, 4])
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("estimator", LATER)
def test_what_a_loss_captures_only_later_is_refused(estimator: str, made: str, first: int) -> None:
    with pytest.raises(diffopt.CapturedTensorError, match=r"captured it.*; pass it in \*args"):
        descended(reading(MADE[made]()), start(), from_step(first), LATER[estimator]).sum().backward()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("only", [2, 17, 21])
@pytest.mark.parametrize("made", ["leaf", "non_leaf"])
@pytest.mark.parametrize("estimator", LATER)
def test_what_a_loss_captures_in_one_step_of_many_is_refused(
    estimator: str, made: str, only: int, learned: bool
) -> None:
    """Not at the first step, nor at the last, nor where several are looked at together."""
    flags = torch.zeros(24, dtype=torch.float64)
    flags[only - 1] = 1.0
    with pytest.raises(diffopt.CapturedTensorError, match=r"captured it.*; pass it in \*args"):
        descended(reading(MADE[made]()), start().requires_grad_(learned), flags, LATER[estimator]).sum().backward()


@pytest.mark.parametrize("style", TRANSFORMS)
@pytest.mark.parametrize("first", [1, 2, 4])
def test_so_is_what_a_transform_has_wrapped(style: str, first: int) -> None:
    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        TRANSFORMS[style](lambda c: descended(reading(c), start(), from_step(first)))


class Box:
    """An object that no tree knows, with a tensor in it."""

    def __init__(self, held: Any) -> None:
        self.held = held


HELD: dict[str, tuple[Callable[[Tensor], Box], Callable[[Box], Tensor]]] = {
    "as it is": (Box, lambda box: box.held),
    "in a list": (lambda c: Box([c]), lambda box: box.held[0]),
    "two deep": (lambda c: Box({"inner": Box(c)}), lambda box: box.held["inner"].held),
}


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("kind", HELD)
def test_so_is_what_a_transform_has_wrapped_within_an_argument(kind: str, first: int) -> None:
    held, read = HELD[kind]

    def loss(w: Tensor, box: Box, flag: Tensor) -> Tensor:
        return where_told(w, read(box), flag)

    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        vmap(lambda c: descended(loss, start(), from_step(first), None, held(c)))(rows(3))


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("estimator", [Reverse(), Reverse("graph"), Reverse(1), Reverse(2), Truncated(4)], ids=repr)
def test_an_update_that_captures_a_tensor_is_refused_at_the_latest_in_the_backward_pass(
    estimator: Any, first: int
) -> None:
    options = {"optimizer": capturing_update(first, leaf()), "steps": 4, "estimator": estimator}
    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        diffopt.solve(lambda w: w.square().sum(), leaf(), **options).params.sum().backward()


@pytest.mark.parametrize("made", [MADE[name] for name in ("leaf", "non_leaf", "older_graph")])
@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), Reptile(), ESJacobian(2, 1e-3), Binomial(1)], ids=repr)
def test_an_update_that_captures_a_tensor_at_the_first_step_is_refused_by_the_solve(
    estimator: Any, made: Callable[[], Tensor]
) -> None:
    """Also where no step is computed again, in which one would be looked at."""
    optimizer = capturing_update(1, made())
    with pytest.raises(diffopt.CapturedTensorError, match="captured it"):
        diffopt.solve(lambda w: w.square().sum(), leaf(), optimizer=optimizer, steps=4, estimator=estimator)


@pytest.mark.parametrize("estimator", LATER)
def test_constants_and_arguments_that_are_read_later_are_right(estimator: str) -> None:
    c, flags = leaf(), torch.tensor([0, 1, 0, 1], dtype=torch.float64)
    now = start()
    for flag in flags:
        now = now - 0.2 * (now - flag * c.detach())
    for loss, args in ((reading(c.detach()), ()), (where_told, (c,))):
        end = descended(loss, start(), flags, LATER[estimator], *args)
        torch.testing.assert_close(end.detach(), now, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), Reverse("sqrt")], ids=repr)
@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_captured_tangent_is_refused(estimator: Any, first: int) -> None:
    """Of plain forward-mode differentiation, whose tensors no transform has wrapped."""
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        loss = reading(forward_ad.make_dual(start(), torch.ones(2, dtype=torch.float64)))
        with pytest.raises(diffopt.MissingDerivativeError, match="loss reads a tensor that carries a tangent"):
            descended(loss, start(), from_step(first), estimator)


@pytest.mark.parametrize("first", [1, 2])
def test_plain_unrolling_passes_a_captured_tangent_on(first: int) -> None:
    """Each of the steps that read ``c`` adds a fifth of its tangent, and keeps four fifths of what was there."""
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        loss = reading(forward_ad.make_dual(start(), torch.ones(2, dtype=torch.float64)))
        tangent = forward_ad.unpack_dual(descended(loss, start(), from_step(first), Unrolled())).tangent
    expected = 0.0
    for flag in from_step(first):
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
    for estimator in (Reverse(), Reverse(1), Reverse("sqrt"), Truncated(3), Unrolled()):
        for wanted in (x, x.clone().requires_grad_()):
            options = {"optimizer": diffopt.SGD(0.1), "steps": 3, "estimator": estimator}
            argument = diffopt.solve(loss, start(), factor, wanted, **options).params
            for end in (argument, descended(loss, start(), torch.stack([wanted] * 3), estimator, factor)):
                (got,) = torch.autograd.grad(end.pow(3).sum(), factor)
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert not x.requires_grad
