"""``functional(module, checkpoint=...)``: the numbers of the module as it is, in the memory of one block; float64."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffopt
from diffopt.estimators import Binomial, ForwardMode, Reverse, Truncated, Unrolled
from diffopt.functional import _blocks
from diffopt.nn import second_order_attention
from diffopt.tensors.marks import Marks
from diffopt.tensors.memory import peak_bytes


class Block(nn.Module):
    """Takes and returns tuples, keywords and what is no tensor; holds a buffer that it reads, and may drop out."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("shift", torch.linspace(0, 1, width))

    def forward(self, x: Tensor, gates: tuple[Tensor, str], *, scale: float = 1.0, no: None = None) -> Any:
        assert (gates[1], no) == ("gate", None)
        y = self.dropout(torch.tanh(self.inner(self.norm(x)) + self.shift)) * gates[0] * scale
        return x + y, {"kept": None, "mean": y.mean()}


class Deep(nn.Module):
    """Blocks one after the other, one of them twice; the first weight is the last one's as well."""

    def __init__(self, depth: int = 3, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.last = nn.Linear(width, width)
        self.last.weight = self.first.weight
        self.blocks[-1].inner.weight = self.blocks[0].inner.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gates = (x.sigmoid(), "gate")
        total = x.sum() * 0
        for block in (*self.blocks, self.blocks[0]):
            x, more = block(x, gates, scale=0.7)
            total = total + more["mean"]
        return self.last(x) + total


def made(kind: Callable[..., nn.Module] = Deep, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(**options).double()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hypergradient(module: nn.Module, checkpoint: Any, estimator: Any, tasks: int | None = None) -> tuple[Tensor, ...]:
    """Of the data, the initial parameters and the learning rate, after three steps, one seed for all."""
    function, params = diffopt.functional(module, checkpoint)
    x = drawn(*([] if tasks is None else [tasks]), 5, 4)
    lr = torch.tensor(0.1, dtype=torch.float64)

    def loss(params: Any, x: Tensor) -> Tensor:
        return (function(params, x) - 1).square().mean()

    def outer(x: Tensor, params: Any, lr: Tensor) -> Tensor:
        optimizer = diffopt.SGD(lr, momentum=0.5)
        end = diffopt.solve(loss, params, x, optimizer=optimizer, steps=3, estimator=estimator).params
        return sum(p.sin().sum() for p in end.values())

    torch.manual_seed(4)
    gradient = torch.func.grad(outer, (0, 1, 2))
    if tasks is not None:
        gradient = torch.func.vmap(gradient, (0, None, None), randomness="different")
    of_x, of_params, of_lr = gradient(x, params, lr)
    return of_x, *(of_params[name] for name in sorted(of_params)), of_lr


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- numbers

ESTIMATORS = [Reverse(), Reverse(1), Reverse("sqrt"), Unrolled(), Truncated(2), Binomial(order=2)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("tasks", [None, 2])
def test_hypergradients_are_those_without(estimator: Any, tasks: int | None) -> None:
    assert_same(*(hypergradient(made(), blocks, estimator, tasks) for blocks in ("blocks", ())))


@pytest.mark.parametrize("blocks", [["blocks.1"], ["blocks.0", "last"], ["blocks", "blocks.0.norm"]], ids=str)
def test_any_modules_may_be_blocks(blocks: list[str]) -> None:
    """Those within another block, too."""
    assert_same(*(hypergradient(made(), names, Reverse()) for names in (blocks, ())))


def test_forward_mode_as_an_estimator() -> None:
    assert_same(*(hypergradient(made(depth=1), blocks, ForwardMode()) for blocks in ("blocks", ())))


def test_frozen_weights_are_constants_of_a_block() -> None:
    found = []
    for blocks in ("blocks", ()):
        module = made()
        module.blocks[1].inner.requires_grad_(False)
        found.append(hypergradient(module, blocks, Reverse()))
    assert_same(*found)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_of_any_order(order: int) -> None:
    found = []
    for blocks in ("blocks", ()):
        function, params = diffopt.functional(made(depth=2), blocks)
        x = drawn(5, 4).requires_grad_()
        value, leaves = function(params, x).square().sum(), [x, *params.values()]
        for _ in range(order):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((g * drawn(*g.shape, seed=9)).sum() for g in gradients)
        found.append([g.detach() for g in gradients])
    for a, b in zip(*found, strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", [(None, 0), (0, None), (0, 0)], ids=str)
def test_transforms_over_a_block(dims: tuple[int | None, ...]) -> None:
    """Of weights and of data, shared by tasks or each one's own."""
    found = []
    for blocks in ("blocks", ()):
        function, params = diffopt.functional(made(depth=2), blocks)
        many = {k: p.detach() + (0.1 * drawn(3, *p.shape) if dims[0] == 0 else 0) for k, p in params.items()}
        x = drawn(3, 5, 4) if dims[1] == 0 else drawn(5, 4)

        def loss(params: Any, x: Tensor, function: Any = function) -> Tensor:
            return function(params, x).square().mean()

        def product(params: Any, x: Tensor, loss: Any = loss) -> Any:
            return torch.func.grad(lambda y: torch.func.grad(loss)(params, y)["blocks.0.inner.weight"].sum())(x)

        found.append(
            [
                vmap(loss, dims)(many, x),
                vmap(grad(loss, (0, 1)), dims)(many, x),
                grad(lambda p, y, f=loss: vmap(f, dims)(p, y).pow(2).sum(), (0, 1))(many, x),
                vmap(product, dims)(many, x),
            ]
        )
    assert_same(*found)


# ------------------------------------------------------------------------------------------------- what is repeated


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled()], ids=repr)
def test_dropout_is_the_same_when_it_is_computed_again(estimator: Any) -> None:
    found = [hypergradient(made(dropout=0.4), blocks, estimator) for blocks in ("blocks", ())]
    assert_same(*found)
    other = hypergradient(made(), "blocks", estimator)
    assert not torch.allclose(found[0][0], other[0])


@pytest.mark.parametrize("estimator", [Reverse(1), Truncated(3)], ids=repr)
def test_dropout_of_each_task(estimator: Any) -> None:
    assert_same(*(hypergradient(made(dropout=0.4), "blocks", rule, tasks=2) for rule in (estimator, Unrolled())))


def test_dropout_beside_another_thread() -> None:
    expected = hypergradient(made(dropout=0.4), (), Reverse(1))
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert_same(hypergradient(made(dropout=0.4), "blocks", Reverse(1)), expected)
    finally:
        end.set()
        thread.join()


def test_the_generator_stands_where_it_would_without() -> None:
    stands = []
    for blocks in ("blocks", ()):
        function, params = diffopt.functional(made(dropout=0.4), blocks)
        torch.manual_seed(0)
        torch.autograd.grad(function(params, drawn(5, 4)).sum(), list(params.values()))
        stands.append(torch.get_rng_state())
    assert torch.equal(*stands)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)
        self.block.forward = self.attend

    def attend(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.block.weight, self.block.bias)[None, None]  # with fewer axes torch takes its math kernel
        return F.scaled_dot_product_attention(y, y, y)[0, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize(
    "context", [second_order_attention, lambda: sdpa_kernel([SDPBackend.MATH])], ids=["ours", "math"]
)
def test_contexts_of_the_loss_are_there_when_it_is_computed_again(context: Any) -> None:
    """The loss has left them when its gradient is taken; without them there is no second derivative."""
    found = []
    for blocks in ("block", ()):
        function, params = diffopt.functional(made(Attends), blocks)
        with context():
            value = function(params, drawn(5, 4)).square().sum()
        gradients = torch.autograd.grad(value, list(params.values()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.sin().sum() for g in gradients), list(params.values())))
    assert_same(*found)


def test_autocast_of_the_loss() -> None:
    found = []
    for blocks in ("0", ()):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Tanh())
        function, params = diffopt.functional(module, blocks)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = function(params, drawn(5, 4).float()).float().square().sum()
        found.append(torch.autograd.grad(value, list(params.values())))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_the_mode_is_that_of_the_call() -> None:
    """``eval()`` between the loss and its gradient changes neither."""
    found = []
    for blocks in ("blocks", ()):
        module = made(dropout=0.4)
        function, params = diffopt.functional(module, blocks)
        torch.manual_seed(0)
        value = function(params, drawn(5, 4)).square().sum()
        module.eval()
        found.append(torch.autograd.grad(value, list(params.values())))
        assert not any(part.training for part in module.modules())
    assert_same(*found)


class Counting(nn.Module):
    """A block that writes to a buffer and reads it when it is called again."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.BatchNorm1d(4, momentum=None)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.spectral(self.block(x) + 0.1 * x)
        return x + self.block.running_mean + self.block.num_batches_tracked


def test_what_a_block_writes_to_its_buffers_is_there_for_the_rest_of_the_call() -> None:
    found = []
    for blocks in (["block", "spectral"], ()):
        module = made(Counting)
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        function, params = diffopt.functional(module, blocks)
        value = function(params, drawn(5, 4))
        gradients = torch.autograd.grad(value.square().sum(), list(params.values()), create_graph=True)
        again = torch.autograd.grad(sum(g.sin().sum() for g in gradients), list(params.values()))
        found.append([value, *gradients, *again])
        assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    assert_same(*found)


def test_the_module_is_left_as_it_was() -> None:
    module = made()
    before = {name: dict(part.__dict__) for name, part in module.named_modules()}
    function, params = diffopt.functional(module, "blocks")
    function(params, drawn(5, 4)).sum().backward()
    with pytest.raises(RuntimeError):
        function(params, drawn(5, 3))
    assert {name: list(part.__dict__) for name, part in module.named_modules()} == {
        k: list(v) for k, v in before.items()
    }
    assert all(
        part.forward.__func__ is type(part).forward for part in module.modules() if not isinstance(part, nn.ModuleList)
    )
    assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is not None for p in params.values())


class Around(nn.Module):
    """A block between two layers."""

    def __init__(self, block: Callable[[], nn.Module], change: bool = False) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), block(), nn.Linear(4, 4)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.first(x))
        y = y[0] * y[1].sin() if isinstance(y, tuple) else y
        return self.last(y.mul_(2) if self.change else y)


class Shifts(nn.Module):
    """The cotangent is the gradient of both inputs; and an input is an output."""

    def __init__(self, hands_on: bool) -> None:
        super().__init__()
        self.shift, self.hands_on = nn.Parameter(torch.ones(5, 4)), hands_on

    def forward(self, x: Tensor) -> Any:
        return (x + self.shift, x) if self.hands_on else x + self.shift


AS_THEY_ARE = {
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.5).eval(),
    "sum": lambda: Shifts(False),
    "hands on": lambda: Shifts(True),
    "view": nn.Flatten,
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
@pytest.mark.parametrize("use", ["plain", "change", "vmap"])
def test_a_block_may_return_what_it_was_given(name: str, use: str) -> None:
    """And so may its gradient; the output is a tensor of its own, which may be changed in place."""
    found = []
    for blocks in ("block", ()):
        function, params = diffopt.functional(made(Around, block=AS_THEY_ARE[name], change=use == "change"), blocks)
        x, leaves = drawn(*([3] if use == "vmap" else []), 5, 4), list(params.values())
        call = vmap(function, (None, 0)) if use == "vmap" else function
        gradients = torch.autograd.grad(call(params, x).sin().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.sin().sum() for g in gradients), leaves)
        found.append([*gradients, *again])
    assert_same(*found)


def test_gradients_of_a_block_share_no_memory() -> None:
    """As each is a parameter's own ``grad``, which optimizers change in place."""
    function, params = diffopt.functional(made(Around, block=AS_THEY_ARE["sum"]), "block")
    x = drawn(5, 4).requires_grad_()
    (function({**params, "first.weight": torch.eye(4).double()}, x)).sum().backward()
    assert x.grad is not None
    assert x.grad.data_ptr() != params["block.shift"].grad.data_ptr()


class Slow(nn.Module):
    """A block that reads its weight twice, with time between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        time.sleep(0.005)
        return (y @ self.weight).tanh()


def test_threads_that_differentiate_wait_for_each_other() -> None:
    """What is computed again has weights of its own in the module, as a call has."""
    module = made(lambda: nn.Sequential(Slow(), Slow()))
    function, params = diffopt.functional(module, ["0", "1"])
    many = [{k: drawn(*p.shape, seed=seed).requires_grad_() for k, p in params.items()} for seed in range(8)]

    def gradients(params: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(params, drawn(5, 4)).sum(), list(params.values()))

    expected = list(map(gradients, many))
    with ThreadPoolExecutor(4) as threads:
        assert_same(list(threads.map(gradients, many)), expected)
    assert all(isinstance(block.weight, nn.Parameter) for block in module)


class Penalized(nn.Module):
    """It differentiates through its block before it returns, in a thread of its own, as on a GPU torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.threads = nn.Linear(4, 4), ThreadPoolExecutor(1)

    def forward(self, x: Tensor) -> Tensor:
        value = self.block(x).sin().sum()
        work = self.threads.submit(torch.autograd.grad, value, x, create_graph=True)
        return value + work.result(timeout=20)[0].square().sum()


def test_a_module_may_differentiate_through_its_blocks() -> None:
    found = []
    for blocks in ("block", ()):
        function, params = diffopt.functional(made(Penalized), blocks)
        x = drawn(5, 4).requires_grad_()
        found.append(torch.autograd.grad(function(params, x), [x, *params.values()]))
    assert_same(*found)


# --------------------------------------------------------------------------------------------------------- memory


def test_memory_of_a_gradient_and_of_a_second_derivative_falls() -> None:
    """To the inputs of the blocks and one block; measured by torch's allocator."""
    peaks = []
    for blocks in (lambda name: name.isdecimal(), ()):
        torch.manual_seed(0)
        parts = [nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh()) for _ in range(8)]
        function, params = diffopt.functional(nn.Sequential(*parts), blocks)
        x = torch.randn(500, 8)

        def second(function: Any = function, params: Any = params, x: Tensor = x) -> None:
            gradients = torch.autograd.grad(function(params, x).sum(), list(params.values()), create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in gradients), list(params.values()))

        def first(function: Any = function, params: Any = params, x: Tensor = x) -> None:
            torch.autograd.grad(function(params, x).sum(), list(params.values()))

        second()
        peaks.append([peak_bytes(work) for work in (first, second)])
    for with_blocks, without in zip(*peaks, strict=True):
        assert with_blocks < 0.5 * without


def test_how_often_a_block_is_evaluated() -> None:
    """Once more for the gradient; for a second derivative twice, as the activations behind it have one as well."""
    calls: list[int] = []
    module = made(depth=2)
    module.blocks[1].inner.register_forward_hook(lambda *_: calls.append(1))
    function, params = diffopt.functional(module, "blocks")
    value = function(params, drawn(5, 4)).sum()
    assert len(calls) == 1
    gradients = torch.autograd.grad(value, list(params.values()), create_graph=True)
    assert len(calls) == 2
    torch.autograd.grad(sum(g.sin().sum() for g in gradients), list(params.values()), allow_unused=True)
    assert len(calls) == 4
    with torch.no_grad():
        function(params, drawn(5, 4))
    assert len(calls) == 5


# -------------------------------------------------------------------------------------------------------- refusals


class Reads(nn.Module):
    """A block that reads a tensor which it is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)
        self.block.forward = lambda x: F.linear(x, self.block.weight) * self.held
        self.held: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).sum()


def dual(run: Callable[[Any], Any]) -> Any:
    with forward_ad.dual_level():
        return run(forward_ad.make_dual(TWO, TWO))


func, TWO = torch.func, torch.tensor(2.0, dtype=torch.float64)
ELSEWHERE: dict[str, Callable[[Any], Any]] = {
    "requires grad": lambda run: run(TWO.clone().requires_grad_()),
    "depends on it": lambda run: run(TWO.clone().requires_grad_() * 2),
    "grad": lambda run: func.grad(run)(TWO),
    "vmap": lambda run: func.vmap(run)(TWO.expand(3)),
    "vmap of grad": lambda run: func.vmap(func.grad(run))(TWO.expand(3)),
    "grad of vmap": lambda run: func.grad(lambda c: func.vmap(lambda _: run(c))(TWO.expand(3)).sum())(TWO),
    "jvp": lambda run: func.jvp(run, (TWO,), (TWO,)),
    "dual": lambda run: dual(run),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward mode loads it
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_tensor_that_a_block_reads_from_elsewhere_is_refused(name: str) -> None:
    module = made(Reads)
    function, params = diffopt.functional(module, "block")

    x = drawn(5, 4)

    def run(held: Tensor) -> Tensor:
        module.held = held
        return function(params, x)

    with pytest.raises(
        diffopt.CapturedTensorError, match=r"block 'block', which is to be computed again, reads a tensor"
    ):
        ELSEWHERE[name](run)
    module.held = TWO  # a constant is nothing to be said against
    assert function(params, drawn(5, 4)).requires_grad


class Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)
        self.block.forward = self.cached

    def cached(self, x: Tensor, cache: Cache) -> Tensor:
        cache.keys.append(F.linear(x, self.block.weight))
        return sum(cache.keys)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, Cache())


def test_an_object_that_a_block_writes_to_is_refused() -> None:
    function, params = diffopt.functional(made(Caching), "block")
    with pytest.raises(diffopt.HiddenStateError, match=r"takes or returns .*Cache.*use_cache=False"):
        function(params, drawn(5, 4))


class Leaves(nn.Module):
    """A block that leaves something behind, which is read behind it; ``where`` may say what is in the attribute."""

    def __init__(self, where: Any) -> None:
        super().__init__()
        self.block, self.where, self.records, self.reads = nn.Linear(4, 4), where, [], True
        self.block.register_buffer("state", torch.zeros(5, 4))
        self.block.forward = self.leave
        self.block.register_forward_pre_hook(lambda *_: None)

    def leave(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.block.weight).tanh()
        if callable(self.where):
            self.block.aux = self.where(x, self.block.weight, y)
        elif self.where == "buffer":
            self.block.state = y + self.block.state
        elif self.where == "attribute":
            self.block.aux = y.square().sum()
        else:
            self.records.append(y)
        return y + self.block.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x).sum()
        if not self.reads:
            return y
        if self.where == "buffer":
            return y + self.block(x).sum()
        return y + (self.block.aux if self.where == "attribute" else self.records.pop().sum())


@pytest.mark.parametrize(
    ("where", "way"),
    [
        *itertools.product(["attribute", "list"], ["autograd", "grad", "vmap of grad", "vmap", "solve"]),
        *itertools.product(["buffer"], ["autograd", "grad", "solve"]),  # vmap refuses it, with a block or without
    ],
)
def test_what_a_block_leaves_behind_is_refused(where: str, way: str) -> None:
    function, params = diffopt.functional(made(Leaves, where=where), "block")
    x = drawn(5, 4)
    run = {
        "autograd": lambda: torch.autograd.grad(function(params, x), list(params.values())),
        "grad": lambda: grad(function)(params, x),
        "vmap of grad": lambda: vmap(grad(function), (None, 0))(params, x.expand(2, 5, 4)),
        "vmap": lambda: vmap(function, (None, 0))(params, x.expand(2, 5, 4)).sum().backward(),
        "solve": lambda: diffopt.solve(function, params, x, optimizer=diffopt.SGD(0.1), steps=2),
    }[way]
    with pytest.raises(diffopt.HiddenStateError, match="leaves a tensor in an attribute, a buffer or a list"):
        run()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("of", ["x", "weight"])
@pytest.mark.parametrize("wanted", ["x", "weight"])
@pytest.mark.parametrize(
    ("left", "says"),
    [
        (lambda x, w, y: x.sum() + w.sum(), "leaves a tensor in an attribute, a buffer or a list"),
        (lambda x, w, y: y.square().sum(), "leaves a tensor in|backward through the graph a second time"),
    ],
    ids=["of the inputs", "of what the gradient has used up"],
)
def test_what_a_block_leaves_behind_when_it_is_computed_again_is_refused(
    left: Any, says: str, wanted: str, of: str, order: int
) -> None:
    """What is in the attribute after a gradient is of the last evaluation; whatever that gradient was in."""
    module = made(Leaves, where=left)
    module.reads = False
    function, params = diffopt.functional(module, "block")
    leaves = {"x": drawn(5, 4).requires_grad_(), "weight": params["block.weight"]}
    value = function(params, leaves["x"])
    gradient = value
    for _ in range(order):
        (gradient,) = torch.autograd.grad(gradient.sum(), leaves[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match=says):
        torch.autograd.grad(value + module.block.aux, leaves[of])


@pytest.mark.parametrize("where", ["attribute", "list"])
def test_what_a_block_leaves_behind_may_stay_there(where: str) -> None:
    """Where nobody differentiates it: a record of activations, say."""
    module = made(Leaves, where=where)
    module.reads = False
    function, params = diffopt.functional(module, "block")
    torch.autograd.grad(function(params, drawn(5, 4)), list(params.values()))


class Inner(nn.Module):
    """A block that differentiates within, as one of forces does."""

    def __init__(self, inside: str) -> None:
        super().__init__()
        self.block, self.inside = nn.Linear(4, 4), inside
        self.block.forward = self.inner

    def inner(self, x: Tensor) -> Tensor:
        def energy(x: Tensor) -> Tensor:
            return F.linear(x, self.block.weight).tanh().sum()

        if self.inside == "func":
            return grad(energy)(x) + self.block.bias
        (force,) = torch.autograd.grad(energy(x), x, create_graph=True)
        return force + self.block.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x * 2).square().sum()


@pytest.mark.parametrize("kind", ["func", "autograd"])
def test_a_block_may_differentiate_within(kind: str) -> None:
    found = []
    for blocks in ("block", ()):
        function, params = diffopt.functional(made(Inner, inside=kind), blocks)
        x = drawn(5, 4).requires_grad_()
        found.append(torch.autograd.grad(function(params, x), [x, *params.values()]))
    assert_same(*found)


class Differs(nn.Module):
    """A block of which something changes besides tensors."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.block, self.what = nn.Linear(4, 4), nn.Linear(4, 4), what
        self.block.forward = self.differ
        self.generator, self.scale, self.python = torch.Generator(), 1.0, random.Random(0)

    def differ(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.block.weight).tanh()
        if self.what == "another layer":
            return y @ self.first.weight
        if self.what == "generator":
            return y * (torch.rand(5, 4, generator=self.generator, dtype=y.dtype) > 0.5)
        if self.what == "shape":
            self.scale += 1
            return y[: int(self.scale)]
        return y * (self.scale if self.what == "attribute" else self.python.random())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x)).sum()


@pytest.mark.parametrize("what", ["generator", "random", "shape", "attribute", "another layer"])
@pytest.mark.parametrize("way", ["autograd", "grad", "vmap", "vmap of the gradient", "second"])
def test_a_block_that_gives_other_numbers_the_second_time_is_refused(what: str, way: str) -> None:
    module = made(Differs, what=what)
    function, params = diffopt.functional(module, "block")
    constant = {name: 2 * p.detach() for name, p in params.items()}  # not what the module has itself
    x = drawn(5, 4).requires_grad_()

    def value(x: Tensor) -> Tensor:
        found = function(constant, x)
        module.scale += 1.0
        return found

    many = x.expand(2, 5, 4)
    run = {
        "autograd": lambda: torch.autograd.grad(value(x), x),
        "grad": lambda: grad(value)(x),
        "vmap": lambda: vmap(value, randomness="same")(many).sum().backward(),
        "vmap of the gradient": lambda: torch.autograd.grad(value(x), x, torch.ones(2).double(), is_grads_batched=True),
        "second": lambda: torch.autograd.grad(value(x), x, create_graph=True),
    }[way]
    if (what, way) == ("generator", "vmap of the gradient"):  # where torch allows no random numbers
        with pytest.raises(RuntimeError, match="random operations inside of vmap"):
            run()
        return
    with pytest.raises(diffopt.HiddenStateError, match="gives other numbers when it is computed again"):
        run()


def test_round_off_is_no_other_number() -> None:
    first = [drawn(100, 100).float(), torch.arange(3), drawn(3).to(torch.complex64), torch.zeros(0), drawn(2) / 0]
    marks = Marks(first, 0, 0.0)
    near = [x * (1 + 1e-6) if x.is_floating_point() or x.is_complex() else x for x in first]
    assert marks.are_of(near, 0)
    assert marks.are_of([x.expand(2, *x.shape) for x in near], 1)
    assert not marks.are_of([x * 1.1 if x.dtype is torch.float32 else x for x in near], 0)
    assert not marks.are_of([*near[:2], near[2] * 1.1, *near[3:]], 0)
    assert not marks.are_of(near[1:], 0)
    rough = [x * (1 + 1e-2) if x.is_floating_point() or x.is_complex() else x for x in first]
    assert Marks(first, 0, torch.finfo(torch.bfloat16).eps).are_of(rough, 0)
    assert not marks.are_of(rough, 0)


@pytest.mark.parametrize("needs", [True, False])
def test_a_block_that_changes_its_input_is_refused(needs: bool) -> None:
    """One that requires no grad, too: it would be changed once more when the block is computed again."""
    layers = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))).double()
    function, params = diffopt.functional(layers if needs else nn.Sequential(layers[1]), "1" if needs else "0")
    with pytest.raises(diffopt.InPlaceError, match=r"changes an input or a weight in place.*inplace=False"):
        function(params, drawn(5, 4))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode_through_a_block_is_refused() -> None:
    function, params = diffopt.functional(made(), "blocks")
    with pytest.raises(
        diffopt.MissingDerivativeError, match=r"in forward mode, expected reverse mode; leave checkpoint="
    ):
        func.jvp(lambda x: function(params, x), (drawn(5, 4),), (drawn(5, 4),))


NAMES: dict[str, tuple[Any, str]] = {
    "a letter off": ("block.1", r"checkpoint names 'block\.1', expected .*; the closest are 'blocks\.1'"),
    "one of several": (["blocks.0", "blocks.0.atn"], r"names 'blocks\.0\.atn'"),
    "nothing like it": ("zzz", "names are such as 'first', 'blocks'"),
    "another module": (nn.Linear(1, 1), "checkpoint holds Linear.*a module inside it"),
    "a class": (nn.Linear, "checkpoint holds .*Linear.*a module inside it"),
    "classes": ([nn.Linear], "checkpoint holds .*Linear.*a module inside it"),
    "a number": (3, "checkpoint is int 3, expected names of blocks"),
    "a function": (lambda name: False, "says no to every name"),
    "the whole": ("", "checkpoint names ''"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_block_that_is_not_there_is_refused(name: str) -> None:
    given, says = NAMES[name]
    with pytest.raises(diffopt.StructureError, match=says):
        diffopt.functional(made(), given)


def test_blocks_may_be_named_in_every_way() -> None:
    module = made()
    expected = hypergradient(module, "blocks", Reverse())
    for given in (
        module.blocks,
        list(module.blocks),
        ["blocks"],
        lambda name: name.count(".") == 1 and "blocks" in name,
    ):
        assert all(map(torch.equal, hypergradient(module, given, Reverse()), expected))


class Nested(nn.Module):
    """Containers that nobody calls, one of them a list of a class with a ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.named = nn.ModuleDict(
            {"a": nn.Linear(4, 4), "b": nn.ModuleList([nn.Linear(4, 4), CalledList([nn.Tanh()])])}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.named["a"](x)
        for layer in self.named["b"]:
            x = layer(x)
        return x


class CalledList(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


def test_a_container_stands_for_its_entries() -> None:
    """To any depth; one that can be called is a block itself."""
    module = made(Nested)
    assert list(_blocks(module, "named")) == ["named.a", "named.b.0", "named.b.1"]
    found = []
    for blocks in ("named", ()):
        function, params = diffopt.functional(module, blocks)
        found.append(torch.autograd.grad(function(params, drawn(5, 4)).sum(), list(params.values())))
    assert_same(*found)
