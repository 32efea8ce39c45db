"""What torch refuses inside a loss: a typed error that names the fix, and the spelling that the fix names runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from limits import sampled
from ridge_by_hand import assert_same
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.tensors import derivatives

RECOMPUTING: list[Any] = [Reverse(1), Reverse("sqrt"), ForwardMode(), Binomial(1), Krylov(2)]
VMAPPING: list[Any] = [ForwardMode(), Binomial(1), Krylov(2)]
"""Estimators that evaluate the loss under vmap, where torch takes some operations apart, and can differentiate them."""
EVERY: list[Any] = [Reverse(), *RECOMPUTING, Truncated(2), MultiStep(2), Unrolled()]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = normal(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])


def run(loss: Any, start: Any, *args: Any, estimator: Any = None, lr: float = 0.1, steps: int = 3) -> Any:
    estimator = estimator or Reverse()
    return diffopt.solve(loss, start, *args, optimizer=diffopt.SGD(lr), steps=steps, estimator=estimator).params


def loop(loss: Any, w: Tensor, *args: Any, lr: float = 0.1, steps: int = 3) -> Tensor:
    for _ in range(steps):
        w = w if w.requires_grad else w.detach().requires_grad_()
        w = w - lr * torch.autograd.grad(loss(w, *args), w, create_graph=True)[0]
    return w


def of(end: Any) -> Tensor:
    return end.pow(3).sum() if isinstance(end, Tensor) else sum(x.pow(3).sum() for x in end.values())


# ------------------------------------------------------------------------------------------------ class weights

WEIGHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda p, w: F.cross_entropy(X @ p, Y, weight=w),
    "nll_loss": lambda p, w: F.nll_loss((X @ p).log_softmax(-1), Y, weight=w),
    "a module": lambda p, w: nn.CrossEntropyLoss(weight=w)(X @ p, Y),
    "a sum": lambda p, w: F.cross_entropy(X @ p, Y, weight=w, reduction="sum"),
}


def weighed_by_hand(p: Tensor, w: Tensor) -> Tensor:
    """As the message says."""
    return (w[Y] * F.cross_entropy(X @ p, Y, reduction="none")).sum() / w[Y].sum()


@pytest.mark.parametrize("estimator", [estimator for estimator in EVERY if estimator not in VMAPPING], ids=str)
@pytest.mark.parametrize("loss", WEIGHED.values(), ids=WEIGHED)
def test_class_weights_that_are_learned_are_named(loss: Any, estimator: Any) -> None:
    w = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    with pytest.raises(
        diffopt.MissingDerivativeError, match=r"argument 'weight'.*\(w\[y\] \* cross_entropy\(.*reduction='none'\)"
    ):
        of(run(loss, torch.zeros(3, 3, dtype=torch.float64), w, estimator=estimator)).backward()


@pytest.mark.parametrize("estimator", VMAPPING, ids=str)
@pytest.mark.parametrize("loss", [name for name in WEIGHED if name != "a sum"])
def test_class_weights_that_are_learned_are_right_where_torch_can(loss: str, estimator: Any) -> None:
    w = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    p = normal(3, 3)
    found, by_hand = (of(run(one, p, w, estimator=estimator)) for one in (WEIGHED[loss], weighed_by_hand))
    assert_same(torch.autograd.grad(found, w), torch.autograd.grad(by_hand, w))


@pytest.mark.parametrize("estimator", EVERY, ids=str)
def test_class_weights_that_are_not_learned_are_right(estimator: Any) -> None:
    if isinstance(estimator, ForwardMode):
        estimator = ForwardMode(chunk_size=3)
    p, w = normal(3, 3).requires_grad_(), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    exact = not isinstance(estimator, Binomial | Krylov | Truncated) and estimator != MultiStep(2)
    found = torch.autograd.grad(of(run(WEIGHED["cross_entropy"], p, w, estimator=estimator)), p)
    by_hand = torch.autograd.grad(of(run(weighed_by_hand, p, w, estimator=estimator)), p)
    assert_same(found, by_hand)
    if exact:
        assert_same(found, torch.autograd.grad(of(loop(WEIGHED["cross_entropy"], p, w)), p))


def test_the_weighing_that_the_message_names_is_right() -> None:
    w = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    p = normal(3, 3)
    torch.testing.assert_close(weighed_by_hand(p, w), WEIGHED["cross_entropy"](p, w.detach()))
    found = torch.autograd.grad(of(run(weighed_by_hand, p, w)), w)
    assert_same(found, torch.autograd.grad(of(loop(weighed_by_hand, p, w)), w))


# ------------------------------------------------------------------------------------------------ compiled modules


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


COMPILED: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "a module": lambda net: squared_by(torch.compile(net, backend="aot_eager")),
    "a loss": lambda net: torch.compile(squared_by(net), backend="aot_eager"),
    "a part of a loss": lambda net: twice(torch.compile(squared_by(net), backend="aot_eager")),
    "a layer": lambda net: squared_by(nn.Sequential(torch.compile(net[0], backend="aot_eager"), *net[1:])),
    "what it begins with": lambda net: lambda p: squared_by(net)(doubled(p)),
}


def squared_by(net: Any) -> Callable[..., Tensor]:
    return lambda p: functional_call(net, p, (X,)).square().mean()


def twice(loss: Any) -> Callable[..., Tensor]:
    return lambda p: 2 * loss(p) + sum(x.square().sum() for x in p.values())


@torch.compile(backend="aot_eager")
def doubled(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x + x.sin() for name, x in p.items()}


def compiled(kind: str) -> tuple[dict[str, Tensor], Any]:
    """Where to start, and a loss of which something has been compiled."""
    torch._dynamo.reset()  # type: ignore[attr-defined]
    net = network()
    loss = COMPILED[kind](net)
    prefix = {"a module": "_orig_mod.", "a layer": "0._orig_mod."}.get(kind, "")
    names = {
        f"0._orig_mod.{n[2:]}" if kind == "a layer" and n.startswith("0") else n: x for n, x in net.named_parameters()
    }
    return {f"{prefix}{n}" if kind == "a module" else n: x for n, x in names.items()}, loss


SECOND: list[Any] = [Reverse(), Reverse(1), Reverse("sqrt"), Truncated(2), MultiStep(2), Unrolled()]
OF_TRACERS = pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of what its tracer looks at


@OF_TRACERS
@pytest.mark.parametrize("estimator", sampled(SECOND, 3), ids=str)
@pytest.mark.parametrize("kind", COMPILED)
def test_what_torch_compiled_is_named(kind: str, estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch says nothing where the first gradient comes out as a constant.

    (Beside another thread, such as that of a compiler, a replay runs in a mode in which torch compiles nothing.)
    """
    monkeypatch.setattr("threading.active_count", lambda: 1)
    start, loss = compiled(kind)
    with pytest.raises(diffopt.MissingDerivativeError, match=r"aot_autograd.*module\._orig_mod.*compile=True"):
        of(run(loss, start, estimator=estimator)).backward()


@OF_TRACERS
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("kind", COMPILED)
def test_what_is_compiled_later_is_named(kind: str, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if nothing had been when that was last looked at, by a torch that counts and by one that does not."""
    if not counted:
        monkeypatch.setattr(derivatives, "_counter", None)
    monkeypatch.setattr("threading.active_count", lambda: 1)
    start, loss = compiled(kind)
    monkeypatch.setattr(derivatives, "_seen", (repr(derivatives._counter), False))
    with pytest.raises(diffopt.MissingDerivativeError, match="aot_autograd"):
        of(run(loss, start, estimator=Reverse("graph"))).backward()


@OF_TRACERS
@pytest.mark.parametrize("estimator", [FirstOrder(), Truncated(0), Binomial(0)], ids=str)
@pytest.mark.parametrize("kind", COMPILED)
def test_what_torch_compiled_is_right_where_first_derivatives_are_all(kind: str, estimator: Any) -> None:
    found = []
    for start, loss in (compiled(kind), (compiled(kind)[0], torch.compiler.disable(compiled(kind)[1]))):
        found.append(torch.autograd.grad(of(run(loss, start, estimator=estimator)), list(start.values())))
    assert_same(*found)


@OF_TRACERS
@pytest.mark.parametrize("estimator", [Reverse(), Unrolled()], ids=str)
@pytest.mark.parametrize("kind", COMPILED)
def test_what_torch_compiled_can_be_solved_without_a_gradient(kind: str, estimator: Any) -> None:
    start, loss = compiled(kind)
    with torch.no_grad():
        end = run(loss, start, estimator=estimator)
    assert_same(list(end.values()), list(run(loss, start, estimator=FirstOrder()).values()))


@OF_TRACERS
@pytest.mark.parametrize(
    "estimator", [Reverse(), Reverse(1), ForwardMode(), Unrolled(), Binomial(3), Implicit()], ids=str
)
def test_what_torch_compiled_of_the_arguments_alone_is_right(estimator: Any) -> None:
    """It is differentiated once: the gradient in params does not pass through it."""
    torch._dynamo.reset()  # type: ignore[attr-defined]
    bent = torch.compile(torch.tanh, backend="aot_eager")

    def inside(w: Tensor, a: Tensor, f: Any = bent) -> Tensor:
        return (X @ w - f(X @ a)).square().mean() + 0.1 * w.pow(2).sum()

    found = []
    for f, outside in ((torch.tanh, False), (bent, False), (bent, True)):
        a = normal(3, seed=1).requires_grad_()
        if outside:  # what was compiled stands before the solve
            given, loss = f(a), lambda w, b: (X @ w - X @ b).square().mean() + 0.1 * w.pow(2).sum()
            plain = torch.autograd.grad(of(run(loss, normal(3), torch.tanh(a), estimator=estimator, steps=200)), a)
            assert_same(torch.autograd.grad(of(run(loss, normal(3), given, estimator=estimator, steps=200)), a), plain)
        else:
            loss = lambda w, a, f=f: inside(w, a, f)  # noqa: E731
            steps = 200 if isinstance(estimator, Implicit) else 3
            found.append(torch.autograd.grad(of(run(loss, normal(3), a, estimator=estimator, steps=steps)), a))
    assert_same(found[1], found[0])


# ------------------------------------------------------------------------------------------------ iterators


class Loader:
    """Hands out batches for as long as it has any."""

    def __init__(self, batches: int) -> None:
        self._left = iter([X] * batches)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return next(self._left)


@pytest.mark.parametrize("batches", [0, 2, 3, 4])
@pytest.mark.parametrize("estimator", [*EVERY, FirstOrder()], ids=str)
def test_an_iterator_that_has_ended_is_named_or_nothing_asks_it_again(estimator: Any, batches: int) -> None:
    loader, w = Loader(batches), torch.ones(3, dtype=torch.float64, requires_grad=True)
    try:
        (found,) = torch.autograd.grad(of(run(lambda w: (next(loader) @ w).square().mean(), w, estimator=estimator)), w)
    except diffopt.HiddenStateError as error:
        assert "iterator" in str(error) or "state" in str(error)  # noqa: PT017  (refused or right)
    else:
        expected = run(lambda w: (X @ w).square().mean(), w, estimator=estimator)
        assert_same([found], torch.autograd.grad(of(expected), w))


def test_the_message_of_an_ended_iterator_names_batches() -> None:
    loader = iter([X, X])
    with pytest.raises(diffopt.HiddenStateError, match=r"asks an iterator .*it has ended.*in batches, stacked"):
        run(lambda w: (next(loader) @ w).square().mean(), torch.ones(3, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ under vmap


class Square(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * cotangents[0] * x


class SetUpSquare(torch.autograd.Function):
    """With a ``setup_context``, still without a rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * cotangents[0] * x


class VmappedSquare(SetUpSquare):
    """With all that the message names."""

    generate_vmap_rule = True


def applied(function: Any) -> Callable[[Tensor], Tensor]:
    return lambda w: function.apply(w).sum() + w.pow(4).sum()


def asking_for_grad(w: Tensor) -> Tensor:
    x = w.new_tensor([0.5, 1.0, 2.0]).requires_grad_()
    (slope,) = torch.autograd.grad((x * w).tanh().sum(), x, create_graph=True)
    return (slope - 1).square().sum()


def asking_torch_func(w: Tensor) -> Tensor:
    """The same by ``torch.func``."""
    slope = grad(lambda x: (x * w).tanh().sum())(w.new_tensor([0.5, 1.0, 2.0]))
    return (slope - 1).square().sum()


UNDER_VMAP: dict[str, tuple[Callable[[Tensor], Tensor], str, Callable[[Tensor], Tensor]]] = {
    "a checkpoint": (
        lambda w: checkpoint(lambda w: w.sin().square(), w, use_reentrant=False).sum(),
        r"take torch\.utils\.checkpoint out of it, .* use Reverse\('sqrt'\)",
        lambda w: w.sin().square().sum(),
    ),
    "a function": (applied(Square), "setup_context and generate_vmap_rule = True", applied(VmappedSquare)),
    "a function that is set up": (
        applied(SetUpSquare),
        "generate_vmap_rule = True, or a vmap of its own",
        applied(VmappedSquare),
    ),
    "requires_grad_": (asking_for_grad, r"differentiate by torch\.func\.grad there", asking_torch_func),
}
BATCHING: list[Any] = [Binomial(2), Krylov(2), ForwardMode(), ESJacobian(3, 1e-4)]


@pytest.mark.parametrize("estimator", BATCHING, ids=str)
@pytest.mark.parametrize("kind", UNDER_VMAP)
def test_a_loss_that_an_estimator_vmaps_is_refused_or_right(kind: str, estimator: Any) -> None:
    loss, says, better = UNDER_VMAP[kind]
    w = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(of(run(better, w, estimator=estimator)), w)
    try:
        found = torch.autograd.grad(of(run(loss, w, estimator=estimator)), w)
    except diffopt.VmapError as error:
        assert re.search(says, str(error))  # noqa: PT017  (refused or right, by what torch can)
    else:
        assert_same(found, expected, rtol=1e-5 if isinstance(estimator, ESJacobian) else 1e-10)


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled(), FirstOrder(), Binomial(1)], ids=str)
@pytest.mark.parametrize("kind", UNDER_VMAP)
def test_a_loss_under_the_callers_vmap_is_refused_and_its_better_form_is_right(kind: str, estimator: Any) -> None:
    loss, says, better = UNDER_VMAP[kind]
    tasks = normal(2, 3)

    def each(loss: Any) -> tuple[Tensor, ...]:
        w = tasks.clone().requires_grad_()
        return torch.autograd.grad(of(vmap(lambda w: run(loss, w, estimator=estimator))(w)), w)

    with pytest.raises(diffopt.VmapError, match=says):
        each(loss)
    rows = []
    for row in tasks:
        w = row.clone().requires_grad_()
        rows += torch.autograd.grad(of(run(better, w, estimator=estimator)), w)
    assert_same(each(better), [torch.stack(rows)])


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Truncated(3), Unrolled()], ids=str)
@pytest.mark.parametrize("kind", UNDER_VMAP)
def test_a_loss_that_nothing_vmaps_is_right(kind: str, estimator: Any) -> None:
    loss, _, better = UNDER_VMAP[kind]
    w = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(of(loop(better, w)), w)
    assert_same(torch.autograd.grad(of(run(loss, w, estimator=estimator)), w), expected)


@pytest.mark.parametrize("kind", ["requires_grad_", "a function", "a checkpoint"])
def test_implicit_gradients_of_such_a_loss_are_right(kind: str) -> None:
    loss, _, better = UNDER_VMAP[kind]
    w = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = []
    for one in (loss, better):
        end = run(lambda w, c, one=one: one(w) + c * (w - 1).square().sum(), w, weight, estimator=Implicit(), steps=400)
        found.append(torch.autograd.grad(of(end), weight))
    assert_same(found[0], found[1])
