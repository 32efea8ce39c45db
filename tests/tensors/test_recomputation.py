"""Losses that compute parts of themselves again in the backward pass (checkpointing), and hooks around a solve.

The oracle is a plain loop over the same network without them.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from estimator_names import exact
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt.estimators import (
    Binomial,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.tensors import saved_hooks

STEPS, LR, MOMENTUM = 4, 0.1, 0.5


class Body(nn.Module):
    """Two layers and a head; ``saving``: the layers are checkpointed."""

    def __init__(self, saving: bool, middle: nn.Module | None = None) -> None:
        super().__init__()
        layers = [nn.Linear(3, 6), middle or nn.Identity(), nn.Tanh(), nn.Linear(6, 3), nn.Tanh()]
        self.layers, self.head, self.saving = nn.Sequential(*layers), nn.Linear(3, 1), saving

    def forward(self, x: Tensor) -> Tensor:
        return self.head(saved(self.layers, x, self.saving))


def saved(function: Callable[..., Tensor], x: Tensor, saving: bool) -> Tensor:
    return checkpoint(function, x, use_reentrant=False) if saving else function(x)


class Nested(Body):
    def forward(self, x: Tensor) -> Tensor:
        def outer(x: Tensor) -> Tensor:
            return self.layers[3:](saved(self.layers[:3], x, self.saving))

        return self.head(saved(outer, x, self.saving))


class Twice(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(saved(self.layers, saved(self.layers, x, self.saving), self.saving))


class Layer(nn.Module):
    """A layer that checkpoints its own call, as those of ``transformers`` do."""

    def __init__(self, saving: bool) -> None:
        super().__init__()
        self.linear, self.saving = nn.Linear(3, 3), saving

    def __call__(self, *args: Any) -> Any:
        call = functools.partial(super().__call__, *args)
        return checkpoint(call, use_reentrant=False) if self.saving else call()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Layers(nn.Module):
    def __init__(self, saving: bool) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(Layer(saving), Layer(saving)), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class Task(NamedTuple):
    loss: Callable[..., Tensor]
    start: dict[str, Tensor]


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 3, generator=generator).to(dtype), torch.randn(5, 1, generator=generator).to(dtype)


def of_network(make: Callable[[bool], nn.Module], saving: bool, dtype: torch.dtype) -> Task:
    torch.manual_seed(1)
    net, (x, y) = make(saving).to(dtype), data(dtype)
    return Task(lambda p: (functional_call(net, p, (x,)) - y).square().mean(), dict(net.named_parameters()))


def adapted(saving: bool, dtype: torch.dtype, *, all_given: bool) -> Task:
    """Low-rank adapters of one weight of a frozen network, all of whose weights are given to it, or that one only."""
    torch.manual_seed(1)
    net, (x, y) = Body(saving).to(dtype).requires_grad_(False), data(dtype)
    start = {"a": torch.randn(6, 2, dtype=dtype), "b": torch.randn(2, 3, dtype=dtype)}
    base = dict(net.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        weights = {"layers.0.weight": base["layers.0.weight"] + p["a"] @ p["b"]}
        return (functional_call(net, {**base, **weights} if all_given else weights, (x,)) - y).square().mean()

    return Task(loss, {name: value.requires_grad_() for name, value in start.items()})


def with_two_sets(saving: bool, dtype: torch.dtype) -> Task:
    """One module, called with two sets of weights in one loss."""
    torch.manual_seed(1)
    net, (x, y) = Body(saving).to(dtype), data(dtype)
    first = {f"1.{name}": p for name, p in net.named_parameters()}
    second = {f"2.{name}": (1.3 * p).detach().requires_grad_() for name, p in net.named_parameters()}

    def of(p: dict[str, Tensor], which: str) -> dict[str, Tensor]:
        return {name.removeprefix(which): value for name, value in p.items() if name.startswith(which)}

    def loss(p: dict[str, Tensor]) -> Tensor:
        outputs = functional_call(net, of(p, "1."), (x,)) * functional_call(net, of(p, "2."), (x + 1,))
        return (outputs - y).square().mean()

    return Task(loss, first | second)


def weights_as_arguments(saving: bool, dtype: torch.dtype) -> Task:
    torch.manual_seed(1)
    net, (x, y) = Body(False).to(dtype), data(dtype)

    def part(q: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net.layers, q, (x,))

    def loss(p: dict[str, Tensor]) -> Tensor:
        layers = {name.removeprefix("layers."): value for name, value in p.items() if name.startswith("layers.")}
        hidden = checkpoint(part, layers, x, use_reentrant=False) if saving else part(layers, x)
        return (hidden @ p["head.weight"].T + p["head.bias"] - y).square().mean()

    return Task(loss, dict(net.named_parameters()))


def saved_elsewhere(saving: bool, dtype: torch.dtype) -> Task:
    task = of_network(Body, False, dtype)

    def loss(p: dict[str, Tensor]) -> Tensor:
        with save_on_cpu() if saving else nullcontext():
            return task.loss(p)

    return task._replace(loss=loss)


def saved_in_another_form(saving: bool, dtype: torch.dtype) -> Task:
    """By hooks that pack numbers away where torch does not see them, and into other tensors."""
    task, drawer = of_network(Body, False, dtype), dict[int, Any]()

    def pack(x: Tensor) -> int:
        drawer[len(drawer)] = x.detach().numpy().copy() if len(drawer) % 2 else x.detach().to(torch.float64) * 2
        return len(drawer) - 1

    def unpack(key: int) -> Tensor:
        kept = drawer[key]
        return (kept / 2).to(dtype) if isinstance(kept, Tensor) else torch.from_numpy(kept)

    def loss(p: dict[str, Tensor]) -> Tensor:
        with saved_tensors_hooks(pack, unpack) if saving else nullcontext():
            return task.loss(p)

    return task._replace(loss=loss)


def another_net_later(saving: bool, dtype: torch.dtype) -> Task:
    """A second network, which nobody finds from the loss, from the second step on."""
    task, other = of_network(Body, saving, dtype), Slot(Body(saving).to(dtype))
    x, y = data(dtype)

    def loss(p: dict[str, Tensor]) -> Tensor:
        value = task.loss(p)
        if not torch.equal(p["head.bias"], task.start["head.bias"]):
            value = value + (functional_call(other.held, p, (x - 1,)) - y).square().mean()
        return value

    return task._replace(loss=loss)


class Slot:
    """Holds something where nobody looks."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


def kept_in(hide: Callable[[nn.Module], Callable[[], nn.Module]], saving: bool, dtype: torch.dtype) -> Task:
    torch.manual_seed(1)
    net, (x, y) = Body(saving).to(dtype), data(dtype)
    start, found = dict(net.named_parameters()), hide(net)
    del net
    return Task(lambda p: (functional_call(found(), p, (x,)) - y).square().mean(), start)


def of_slot(net: nn.Module) -> Callable[[], nn.Module]:
    slot = Slot(net)
    return lambda: slot.held


def of_set(net: nn.Module) -> Callable[[], nn.Module]:
    several = {net}
    return lambda: next(iter(several))


def of_iterator(net: nn.Module) -> Callable[[], nn.Module]:
    repeated = itertools.repeat(net)
    return lambda: next(repeated)


TASKS: dict[str, Callable[[bool, torch.dtype], Task]] = {
    "layers": functools.partial(of_network, Body),
    "nested": functools.partial(of_network, Nested),
    "twice": functools.partial(of_network, Twice),
    "layers_that_call_themselves": functools.partial(of_network, Layers),
    "dropout": functools.partial(of_network, lambda saving: Body(saving, nn.Dropout(0.4))),
    "batch_norm": functools.partial(of_network, lambda saving: Body(saving, nn.BatchNorm1d(6))),
    "adapters": functools.partial(adapted, all_given=True),
    "adapters_alone": functools.partial(adapted, all_given=False),
    "two_sets": with_two_sets,
    "weights_as_arguments": weights_as_arguments,
    "saved_elsewhere": saved_elsewhere,
    "saved_in_another_form": saved_in_another_form,
    "another_net_later": another_net_later,
    "in_a_slot": functools.partial(kept_in, of_slot),
    "in_a_set": functools.partial(kept_in, of_set),
    "in_an_iterator": functools.partial(kept_in, of_iterator),
}
EXACT = exact(STEPS, "default", "graph", "states", "sqrt", "unrolled", "truncated at all")


def hypergradient(task: Task, estimator: Any, steps: int = STEPS, **options: Any) -> list[Tensor]:
    """Of the initial params and of the step size, under one seed."""
    torch.manual_seed(7)
    lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    first = next(iter(task.start.values()))
    optimizer = diffopt.SGD(lr.to(first.dtype), momentum=MOMENTUM)
    end = diffopt.solve(task.loss, task.start, optimizer=optimizer, steps=steps, estimator=estimator, **options).params
    return list(torch.autograd.grad(sum(x.pow(3).sum() for x in end.values()), [*task.start.values(), lr]))


def unrolled(task: Task) -> list[Tensor]:
    """The same by a plain loop."""
    torch.manual_seed(7)
    lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    now = dict(task.start)
    velocity = {name: torch.zeros_like(x) for name, x in now.items()}
    for _ in range(STEPS):
        grads = torch.autograd.grad(task.loss(now), list(now.values()), create_graph=True)
        velocity = {name: MOMENTUM * velocity[name] + g for name, g in zip(now, grads, strict=True)}
        now = {name: x - lr.to(x.dtype) * velocity[name] for name, x in now.items()}
    return list(torch.autograd.grad(sum(x.pow(3).sum() for x in now.values()), [*task.start.values(), lr]))


def assert_same(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    """To rounding, of a few steps of a small network."""
    a, b = (torch.cat([x.flatten().double() for x in tensors]) for tensors in (got, expected))
    assert (a - b).norm() <= (1e-9 if dtype == torch.float64 else 1e-4) * b.norm()


@functools.cache
def without_checkpoints(name: str) -> list[Tensor]:
    """The hypergradient by a loop, once for all estimators."""
    return unrolled(TASKS[name](False, torch.float64))


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("name", TASKS)
def test_a_checkpoint_changes_nothing(name: str, estimator: str) -> None:
    assert_same(hypergradient(TASKS[name](True, torch.float64), EXACT[estimator]), without_checkpoints(name))


@pytest.fixture
def beside_a_thread() -> Iterator[None]:
    """Another thread, which does nothing: replays then draw from generators of their own."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.usefixtures("beside_a_thread")
@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("name", ["dropout", "layers", "batch_norm"])
def test_beside_another_thread_a_checkpoint_changes_nothing_either(name: str, estimator: str) -> None:
    """What it recomputes, in the step's gradient and in the backward pass, draws what the step drew."""
    wanted = unrolled(TASKS[name](False, torch.float64))
    assert_same(hypergradient(TASKS[name](True, torch.float64), EXACT[estimator]), wanted)


@pytest.mark.parametrize("estimator", ["default", "states"])
@pytest.mark.parametrize("name", ["layers", "adapters_alone", "layers_that_call_themselves"])
def test_nor_does_it_in_single_precision(name: str, estimator: str) -> None:
    wanted = unrolled(TASKS[name](False, torch.float64))
    assert_same(hypergradient(TASKS[name](True, torch.float32), EXACT[estimator]), wanted, torch.float32)


@pytest.mark.parametrize("estimator", [Truncated(2), FirstOrder(), Krylov(STEPS), MultiStep(1, Reverse(1))], ids=repr)
def test_nor_does_it_under_other_estimators(estimator: Any) -> None:
    plain, saving = (of_network(Body, saving, torch.float64) for saving in (False, True))
    assert_same(hypergradient(saving, estimator), hypergradient(plain, estimator))


@pytest.mark.parametrize("estimator", [Implicit(), Implicit(whole_state=True)], ids=["params", "state"])
def test_nor_does_it_at_a_minimum(estimator: Any) -> None:
    """Two parameters and a penalty, so that there is one."""
    y, penalty = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.w - x).tanh()

    def end(saving: bool) -> Tensor:
        net, weight = Shift(), penalty.clone().requires_grad_()

        def inner(p: dict[str, Tensor], weight: Tensor) -> Tensor:
            outputs = (
                functional_call(net, p, (y,)) if not saving else functional_call(Saving(net), {"net.w": p["w"]}, y)
            )
            return outputs.square().sum() + weight * p["w"].square().sum()

        optimizer = diffopt.SGD(0.2)
        start = {"w": torch.zeros(2, dtype=torch.float64)}
        w = diffopt.solve(inner, start, weight, optimizer=optimizer, steps=200, estimator=estimator).params["w"]
        return torch.autograd.grad(w.pow(3).sum(), weight)[0]

    assert_same([end(True)], [end(False)])


class Saving(nn.Module):
    """Another module, checkpointed."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize("estimator", [Binomial(2), Krylov(2), ForwardMode(chunk_size=16)], ids=repr)
def test_a_checkpoint_under_a_vmap_is_refused(estimator: Any) -> None:
    """It recomputes when the vmap has ended; other hooks need no vmap."""
    with pytest.raises(diffopt.VmapError, match=r"take torch\.utils\.checkpoint out of it"):
        hypergradient(of_network(Body, True, torch.float64), estimator)
    plain, saving = (saved_elsewhere(saving, torch.float64) for saving in (False, True))
    assert_same(hypergradient(saving, estimator), hypergradient(plain, estimator))


def test_a_checkpoint_under_a_vmap_of_the_callers_is_refused() -> None:
    task = of_network(Body, True, torch.float64)

    def end(factor: Tensor) -> Tensor:
        start = {name: x.detach() * factor for name, x in task.start.items()}
        return diffopt.solve(task.loss, start, optimizer=diffopt.SGD(0.1), steps=2).params["head.bias"]

    with pytest.raises(diffopt.VmapError, match=r"take torch\.utils\.checkpoint out of it"):
        vmap(end)(torch.ones(2, dtype=torch.float64))


def reparametrized(call: str, *, frozen: bool = False) -> Task:
    """A module that is neither found from the loss nor running when its checkpoint begins."""
    torch.manual_seed(1)
    slot, (x, y) = Slot(Body(False).double().requires_grad_(not frozen)), data(torch.float64)

    def loss(p: dict[str, Tensor]) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(slot.held, p):
            part = (lambda x: slot.held(x)) if call == "call" else (lambda x: slot.held.head(slot.held.layers(x)))
            return (checkpoint(part, x, use_reentrant=False) - y).square().mean()

    return Task(loss, {name: p.detach().clone().requires_grad_() for name, p in slot.held.named_parameters()})


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("call", ["call", "parts"])
def test_a_recomputation_that_would_read_other_weights_is_refused(call: str, frozen: bool, estimator: str) -> None:
    task = reparametrized(call, frozen=frozen)
    with pytest.raises(diffopt.RecomputationError, match=r"reads .*, expected what its forward pass read.*Pass the w"):
        hypergradient(task, EXACT[estimator])
    with pytest.raises(diffopt.RecomputationError):
        hypergradient(task, EXACT[estimator], check=False)


def test_what_a_recomputation_reads_beside_weights_is_its_own_business() -> None:
    """Tables made at the first call, and constants of other modules."""
    tasks = {saving: of_network(Body, saving, torch.float64) for saving in (False, True)}
    table: dict[int, Tensor] = {}
    made = Slot([])  # kept, so that none lies where another has been
    frozen = nn.Linear(3, 1).double().requires_grad_(False)

    def part(x: Tensor) -> Tensor:
        if len(x) not in table:
            table[len(x)] = torch.arange(len(x), dtype=x.dtype)[:, None]
        made.held.append(torch.from_numpy(np.array([0.5])))  # another tensor at every call
        return frozen(x + made.held[-1] * torch.tensor(2.0)) * table[len(x)]

    def loss(p: dict[str, Tensor], saving: bool) -> Tensor:
        return tasks[saving].loss(p) + saved(part, p["layers.0.weight"], saving).square().mean()

    plain, saving = (Task(functools.partial(loss, saving=saving), tasks[saving].start) for saving in (False, True))
    assert_same(hypergradient(saving, Reverse(1)), unrolled(plain))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled()], ids=repr)
def test_weights_that_take_turns_in_an_attribute_are_refused(estimator: Any, frozen: bool) -> None:
    """What ``functional_call`` does, done by hand."""

    class Held:
        w = torch.ones(3, dtype=torch.float64, requires_grad=not frozen)

        def output(self, x: Tensor) -> Tensor:
            return (x @ self.w).tanh()

    held, (x, _) = Held(), data(torch.float64)

    def loss(p: dict[str, Tensor]) -> Tensor:
        own, held.w = held.w, p["w"]
        value = checkpoint(held.output, x, use_reentrant=False).square().sum()
        held.w = own
        return value

    start = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    with pytest.raises(diffopt.RecomputationError, match=r"reads .*w in the backward pass only"):
        hypergradient(Task(loss, {"w": start}), estimator)


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled()], ids=repr)
def test_a_part_that_reads_other_data_when_it_is_computed_again_is_refused(estimator: Any) -> None:
    rows = iter(torch.linspace(0, 1, 300, dtype=torch.float64).view(100, 3).unbind())
    start = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return checkpoint(lambda w: (next(rows).clone() * w).tanh(), p["w"], use_reentrant=False).square().sum()

    with pytest.raises(diffopt.RecomputationError, match="in the backward pass only, expected what its forward pass"):
        hypergradient(Task(loss, {"w": start}), estimator)


def test_modules_have_their_own_weights_and_torch_its_own_functions_afterwards() -> None:
    torch.manual_seed(1)
    net = Body(True).double()
    own, (x, y) = {name: id(p) for name, p in net.named_parameters()}, data(torch.float64)
    task = Task(lambda p: (functional_call(net, p, (x,)) - y).square().mean(), dict(net.named_parameters()))
    hypergradient(task, Reverse(1))
    assert {name: id(p) for name, p in net.named_parameters()} == own

    def failing(p: dict[str, Tensor]) -> Tensor:
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            raise KeyError("on purpose")

    with pytest.raises(KeyError):
        hypergradient(task._replace(loss=failing), Reverse(1))
    assert torch._C._autograd._push_saved_tensors_default_hooks is saved_hooks._push
    assert torch._C._autograd._pop_saved_tensors_default_hooks is saved_hooks._pop
    assert saved_hooks._top() is None
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()


def test_hooks_of_other_threads_are_left_alone() -> None:
    packed: list[bool] = []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(60)
        with saved_tensors_hooks(lambda x: packed.append(True) or x, lambda x: x):
            w = torch.ones(2, requires_grad=True)
            w.square().sum().backward()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def loss(w: Tensor) -> Tensor:
        inside.set()
        assert done.wait(60)
        return w.square().sum()

    diffopt.solve(loss, torch.ones(2), optimizer=diffopt.SGD(0.1), steps=1)
    thread.join()
    assert packed
    assert saved_hooks._top() is None


# ------------------------------------------------------------------------------------------------ around a solve


def around(x: Tensor, y: Tensor, estimator: Any) -> Callable[..., Tensor]:
    def task(start: Tensor, penalty: Tensor, lr: Tensor) -> Tensor:
        def loss(w: Tensor, penalty: Tensor) -> Tensor:
            return (x @ w - y).square().mean() + penalty * w.square().sum()

        optimizer = diffopt.SGD(diffopt.Schedule(lr))
        return (
            diffopt.solve(loss, start, penalty, optimizer=optimizer, steps=3, estimator=estimator).params.pow(3).sum()
        )

    return task


@pytest.mark.parametrize("estimator", [Reverse(), Reverse("graph"), Reverse(1), Truncated(2)], ids=repr)
def test_hooks_around_a_solve_see_its_inputs_and_its_end_only(estimator: Any) -> None:
    """Not its inner graphs, which would grow with the number of steps, and be recomputed for every step's gradient."""
    packed: list[int] = []

    def count(x: Tensor) -> Tensor:
        packed[-1] += 1
        return x

    for steps in (3, 9):
        packed.append(0)
        with saved_tensors_hooks(count, lambda x: x):
            w = torch.ones(2, dtype=torch.float64, requires_grad=True)
            optimizer = diffopt.SGD(LR)
            diffopt.solve(lambda w: w.pow(4).sum(), w, optimizer=optimizer, steps=steps, estimator=estimator)
    assert packed[0] == packed[1]


@pytest.mark.parametrize("estimator", [*EXACT.values(), Binomial(3), ForwardMode(), Krylov(3), FirstOrder()], ids=repr)
@pytest.mark.parametrize("how", ["checkpoint", "save_on_cpu", "identity"])
def test_hooks_around_a_solve_change_nothing(how: str, estimator: Any) -> None:
    x, y = data(torch.float64)
    inputs = [
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.3, -0.5, 0.2], 0.4, [0.1, 0.2, 0.1])
    ]
    estimator = Truncated(3) if isinstance(estimator, Truncated) else estimator
    task = around(x, y[:, 0], estimator)
    wanted = torch.autograd.grad(task(*inputs), inputs)
    hooks = {"save_on_cpu": save_on_cpu(), "identity": saved_tensors_hooks(lambda x: x, lambda x: x)}
    if how == "checkpoint":
        value = checkpoint(task, *inputs, use_reentrant=False)
    else:
        with hooks[how]:
            value = task(*inputs)
    assert_same(list(torch.autograd.grad(value, inputs)), list(wanted))
