"""What an outer loss reads besides its arguments: a program is never used for what has changed since."""

from __future__ import annotations

import collections
import functools
import sys
import types
import warnings
import weakref
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import Interpreted
from torch import Tensor

import diffopt
from diffopt.rollout.program import Program
from diffopt.tensors import tracing
from diffopt.tensors.reads import Reads

W = torch.tensor([1.0, -2.0], dtype=torch.float64)


def module(**names: Any) -> Any:
    found = types.ModuleType("a_module_of_settings")
    vars(found).update(names)
    return found


settings = module(scale=1.0, deeper=module(scale=1.0))


class Slotted:
    __slots__ = ("__hidden", "power")

    def __init__(self) -> None:
        self.power = 2
        self.__hidden = 1.0

    def hide(self, number: float) -> None:
        self.__hidden = number

    def __call__(self, w: Tensor) -> Tensor:
        return self.__hidden * (w**self.power).sum()


class Base:
    power = 2


class Derived(Base):
    table: Any = (2.0,)

    @staticmethod
    def scaled(w: Tensor) -> Tensor:
        return Derived.table[0] * w

    @property
    def place(self) -> float:
        return float(settings.scale)


class Module(torch.nn.Module):
    power = 2

    def __init__(self) -> None:
        super().__init__()
        self.part, self.drop = torch.nn.LeakyReLU(0.5), torch.nn.Dropout(0.0)
        self.numbers = {"a": 1.0}


BEHIND: Any = Base()
BEHIND.scale = 1.0
REFERENCE = weakref.ref(BEHIND)
THING, SLOTTED, MODULE, SET, ARRAY = Derived(), Slotted(), Module(), {1.0}, np.ones(3)


def annotated(w: Tensor) -> Tensor:
    return annotated.scale * w.sum()  # type: ignore[attr-defined,no-any-return]


annotated.scale = 1.0  # type: ignore[attr-defined]


def scaled(w: Tensor, scale: float = 1.0, *, power: int = 1) -> Tensor:
    return scale * w**power


def rewritten(w: Tensor, scale: float = 1.0, *, power: int = 1) -> Tensor:
    return scale * w**power + power


def with_class(w: Tensor) -> Tensor:
    return (Derived.scaled(w) ** Derived.power).sum()


FUNCTIONS = {
    "a global of a module": lambda w: settings.scale * w,
    "a global of a module in a module": lambda w: settings.deeper.scale * w,
    "a slot": lambda w: w**SLOTTED.power,
    "an attribute of a class": lambda w: w**THING.power,
    "what a static method reads": with_class,
    "what a property reads": lambda w: w * THING.place,
    "a set": lambda w: w * len(SET),
    "an array": lambda w: w * torch.from_numpy(ARRAY[:2]),
    "an option of a module of torch's": lambda w: MODULE.part(w),
    "an attribute of a module": lambda w: MODULE.numbers["a"] * w,
    "the class of a module": lambda w: w**MODULE.power,
    "an attribute of a function": annotated,
    "a number that is hidden in a slot": SLOTTED,
    "the code of a function, as an editor reloads it": lambda w: scaled(w),
    "the default of an argument": lambda w: scaled(w),
    "the default of a keyword": lambda w: scaled(w),
    "an attribute behind a weak reference": lambda w: w * REFERENCE().scale,  # type: ignore[union-attr]
}
CHANGES: dict[str, tuple[Any, str, Any]] = {
    "a global of a module": (settings, "scale", 2.0),
    "a global of a module in a module": (settings.deeper, "scale", 2.0),
    "a slot": (SLOTTED, "power", 3),
    "an attribute of a class": (Base, "power", 3),
    "what a static method reads": (Derived, "table", (3.0,)),
    "what a property reads": (settings, "scale", -1.0),
    "an option of a module of torch's": (MODULE.part, "negative_slope", 0.1),
    "an attribute of a module": (MODULE, "numbers", {"a": 2.0}),
    "the class of a module": (Module, "power", 3),
    "an attribute of a function": (annotated, "scale", 2.0),
    "the code of a function, as an editor reloads it": (scaled, "__code__", rewritten.__code__),
    "the default of an argument": (scaled, "__defaults__", (2.0,)),
    "the default of a keyword": (scaled, "__kwdefaults__", {"power": 2}),
    "an attribute behind a weak reference": (BEHIND, "scale", 2.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_noticed_wherever_it_stands(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reads = Reads([FUNCTIONS[name]])
    assert reads.unchanged
    place, attribute, value = CHANGES[name]
    before = getattr(place, attribute)
    monkeypatch.setattr(place, attribute, value)
    assert not reads.unchanged
    monkeypatch.setattr(place, attribute, before)
    assert reads.unchanged


def local_class() -> Any:
    class Settings:
        scale = 1.0

    return lambda w: Settings.scale * w, lambda: setattr(Settings, "scale", 2.0)


def child() -> Any:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
    return lambda w: network(w), lambda: network.__setitem__(1, torch.nn.ReLU())


def child_added() -> Any:
    parts = torch.nn.ModuleList([torch.nn.Tanh()])
    return lambda w: [part(w) for part in parts], lambda: parts.append(torch.nn.ReLU())


def hook() -> Any:
    layer = torch.nn.Linear(2, 2)
    return lambda w: layer(w), lambda: layer.register_forward_hook(lambda module, given, found: 2 * found)


def own_forward() -> Any:
    layer = torch.nn.Linear(2, 2)
    return lambda w: layer(w), lambda: setattr(layer, "forward", torch.relu)


def deep() -> Any:
    last = types.SimpleNamespace(scale=1.0)
    first = last
    for _ in range(8):
        first = types.SimpleNamespace(next=first)
    return lambda w: first.next.next.next.next.next.next.next.next.scale * w, lambda: setattr(last, "scale", 2.0)


def through_functions() -> Any:
    scale = 1.0

    def set_it() -> None:
        nonlocal scale
        scale = 2.0

    def called(function: Any) -> Any:
        return lambda w: function(w)

    function: Any = lambda w: scale * w  # noqa: E731
    for _ in range(8):
        function = called(function)
    return function, set_it


def of_a_tensor() -> Any:
    weight: Any = torch.ones(2)
    weight.fast = 1.0
    return lambda w: weight.fast * w, lambda: setattr(weight, "fast", 2.0)


def context() -> Any:
    scale = ContextVar("scale", default=1.0)
    return lambda w: scale.get() * w, lambda: scale.set(2.0)


def read_only_view() -> Any:
    numbers = {"a": 1.0}
    view = types.MappingProxyType(numbers)
    return lambda w: view["a"] * w, lambda: numbers.update(a=2.0)


def some_bytes() -> Any:
    numbers = bytearray([1, 2])
    return lambda w: numbers[0] * w, lambda: numbers.__setitem__(0, 3)


MADE = [local_class, child, child_added, hook, own_forward, deep, through_functions, of_a_tensor, context]


@pytest.mark.parametrize("made", [*MADE, read_only_view, some_bytes])
def test_a_change_deep_inside_is_noticed(made: Any) -> None:
    function, change = made()
    reads = Reads([function])
    assert reads.unchanged
    change()
    assert not reads.unchanged


class Log:
    __slots__ = ("__dict__", "last")
    of_all: Any = ()


@pytest.mark.parametrize("place", ["an argument", "a class", "a set", "a long list", "a slot"])
def test_a_trace_leaves_nothing_in_what_an_outer_loss_stores(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr("diffopt.outer_program.Program", Interpreted)
    log, kept = Log(), {"a set": set[Tensor](), "a long list": [W] * 2000}.get(place, list[Tensor]())
    Log.of_all = log.values = kept
    log.last = W
    held: Any = kept if place in ("a set", "a long list") else log

    def outer(w: Tensor, log: Any) -> Tensor:
        value = w.square().sum()
        if place == "a slot":
            held.last = value.detach()
        elif place == "a class":
            Log.of_all.append(value.detach())
        elif place == "an argument":
            log.values.append(value.detach())
        else:
            held.add(value.detach()) if place == "a set" else held.append(value.detach())
        return value

    for _ in range(2):
        diffopt.compiled(outer).value_and_grad(W, log if place == "an argument" else None)
    assert all(type(x) is Tensor for x in [*kept, log.last])
    assert place != "a slot" or log.last == W.square().sum()


class Deep(dict[str, Any]):
    """Its copy is one of what it holds, too."""

    def copy(self) -> Deep:
        return Deep({key: dict(value) for key, value in self.items()})


class Ordered(collections.OrderedDict[str, Any]):
    def __init__(self, first: str, second: int) -> None:
        super().__init__({first: second})


class Cached:
    __slots__ = ("cache",)


class Counting:
    """A class that a loss may give an attribute of its own."""


@functools.cache
def squared(number: float) -> list[float]:
    return [number**2]


def test_what_a_trace_stores_is_gone_and_all_else_is_the_very_same() -> None:
    inner = {"b": 1.0}
    deep, ordered, slotted, names = Deep(a=inner), Ordered("x", 1), Cached(), {f"name {i}" for i in range(50)}
    tensor, counting, before = torch.ones(1), Counting(), squared(3.0)

    def loss(w: Tensor) -> Tensor:
        return w * deep["a"]["b"] * ordered["x"] * len(names) * tensor * squared(3.0)[0] * hasattr(slotted, "cache")

    def reads() -> Reads:
        return Reads([loss, counting])

    now = reads()
    with now.put_back():
        pass
    assert now.unchanged
    assert squared(3.0) is before
    assert deep["a"] is inner
    with now.put_back():
        inner["b"], ordered["x"], slotted.cache, Counting.cache = 2.0, 2, "of a trace", "of a trace"  # type: ignore[attr-defined]
        tensor.cache, deep["c"] = "of a trace", {}  # type: ignore[attr-defined]
        names.add("another")
        squared(4.0)
    assert (deep, ordered, len(names)) == ({"a": {"b": 1.0}}, {"x": 1}, 50)
    assert deep["a"] is inner
    assert not any([hasattr(x, "cache") for x in (slotted, Counting, tensor)])
    assert squared.cache_info().currsize == 0
    assert now.unchanged


def test_a_hook_is_noticed_where_there_was_none() -> None:
    layer = torch.nn.Linear(1, 1)
    now = Reads([lambda w: layer(w)])
    assert now.unchanged
    layer.register_forward_hook(lambda *given: None)
    assert not now.unchanged


def test_sets_arrays_and_hidden_slots_are_looked_into() -> None:
    reads = [Reads([FUNCTIONS[name]]) for name in ("a set", "an array", "a number that is hidden in a slot")]
    assert all([r.unchanged for r in reads])
    SET.add(2.0)
    ARRAY[1] = 5.0
    SLOTTED.hide(2.0)
    assert not any([r.unchanged for r in reads])
    SET.remove(2.0)
    ARRAY[1] = 1.0
    SLOTTED.hide(1.0)
    assert all([r.unchanged for r in reads])


def test_what_is_read_again_and_has_not_changed_counts_as_the_same() -> None:
    """A number that is made anew is equal; NaN is itself; what torch and Python keep for themselves is passed over."""
    nan, scale = float("nan"), 0.5

    def function(w: Tensor) -> Tensor:
        return torch.nn.functional.relu(w) * scale * nan * np.pi * types.SimpleNamespace(x=1).x

    reads = Reads([function, MODULE])
    nan, scale = float("nan"), float("0.5")
    MODULE.part(W)
    assert reads.unchanged


@pytest.mark.parametrize("place", ["lib/python3/dist-packages", "opt/lib/python3.11/site-packages"])
def test_installed_packages_keep_nothing_that_changes_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    """An environment may see those of the system, too; what is beside them is the user's own."""
    there, own = module(calls=0), module(calls=0)
    there.__file__, own.__file__ = str(tmp_path / place / "a_package.py"), str(tmp_path / "mine" / "a_module.py")
    monkeypatch.setitem(sys.modules, f"a_package_{len(place)}", there)
    monkeypatch.setitem(sys.modules, f"a_module_{len(place)}", own)
    there.__name__, own.__name__ = f"a_package_{len(place)}", f"a_module_{len(place)}"

    def of(space: Any) -> Any:
        exec("def function(w):\n    return w * space.calls", names := {"space": space})
        return names["function"]

    reads = Reads([of(there)]), Reads([of(own)])
    there.calls = own.calls = 1
    assert [found.unchanged for found in reads] == [True, False]


class Plain:
    """In the place of a program: the function itself, and what it has captured."""

    made = 0

    def __init__(self, function: Any, tensors: Any) -> None:
        type(self).made += 1
        self.function = function

    def __call__(self, tensors: Any) -> list[Tensor]:
        return self.function(*[x.detach() for x in tensors])  # type: ignore[no-any-return]

    def check(self, function: Any, tensors: Any) -> None:
        """Nothing to be seen."""

    fits = True
    compare = Program.compare


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> type[Plain]:
    monkeypatch.setattr(Plain, "made", 0)
    monkeypatch.setattr("diffopt.outer_program.Program", Plain)
    return Plain


def test_zeros_of_both_signs_are_two_numbers(plain: type[Plain]) -> None:
    """Among the arguments and by closure: ``atan2`` tells them apart. NaN is one."""
    zero = 0.0

    def outer(w: Tensor, other: float) -> Tensor:
        return torch.atan2(torch.tensor(zero + 0 * other), torch.tensor(-1.0)) + w.sum()

    program = diffopt.compiled(outer)
    for others, made in (((0.0, -0.0, 0.0), 2), ((float("nan"), float("nan")), 3)):
        for other in others:
            program.value_and_grad(W, other)
        assert plain.made == made
    zero = -0.0
    program.value_and_grad(W, 0.0)
    assert plain.made == 4


@pytest.mark.parametrize("where", ["beside a solve", "at its start", "alone"])
def test_a_captured_tensor_that_requires_grad_is_refused_where_it_would_get_no_gradient(
    plain: type[Plain], where: str
) -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def outer(w: Tensor) -> Tensor:
        start = w * scale if where == "at its start" else w
        end = diffopt.solve(lambda w: w.square().sum(), start, optimizer=diffopt.SGD(0.1), steps=2).params.sum()
        return w.sum() * scale if where == "alone" else end * (scale if where == "beside a solve" else 1.0)

    program, w = diffopt.compiled(outer), W.clone().requires_grad_()
    with pytest.raises(diffopt.CapturedTensorError, match=r"outer reads .* without being given it"):
        program(w)
    program.value_and_grad(w)  # of which nobody expects another gradient
    with torch.no_grad():
        program(w)
    scale.requires_grad_(False)
    program(w).backward()
    assert w.grad is not None


def test_leaves_that_an_outer_loss_makes_for_itself_are_not_captured(plain: type[Plain]) -> None:
    def outer(w: Tensor) -> Tensor:
        own = torch.ones(2, dtype=torch.float64, requires_grad=True)
        [slope] = torch.autograd.grad((own * w).square().sum(), own, create_graph=True)
        return slope.sum() + (own * w).sum()

    w = W.clone().requires_grad_()
    diffopt.compiled(outer)(w).backward()
    assert w.grad is not None
    assert plain.made == 1


def test_a_captured_tensor_that_comes_to_require_grad_is_another_one() -> None:
    scale = torch.tensor(2.0)
    program = object.__new__(Program)
    program._captured = [scale]
    program._kinds = [(scale.shape, scale.dtype, scale.device, False)]
    assert program.fits
    scale.requires_grad_()
    assert not program.fits


NUMBER: Any = torch.tensor(2.0)


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w * float(NUMBER),
        lambda w: w * torch.full((2,), NUMBER),
        lambda w: w[NUMBER.long() - 1],
        lambda w: w * torch.tensor([NUMBER, 1.0]),
        lambda w: w * torch.as_tensor([[NUMBER], [NUMBER]]),
        lambda w: w * torch.as_tensor(data=(1.0, NUMBER)),
        lambda w: w * torch.asarray([NUMBER, NUMBER], dtype=w.dtype),
        lambda w: w * w.new_tensor([1.0, NUMBER]),
        lambda w: w * w.new([NUMBER, 1.0]),
        lambda w: w * torch.stack([NUMBER, NUMBER]),
        lambda w: w * torch.as_tensor(NUMBER),
        lambda w: w * w.clamp(max=NUMBER.item()),
        lambda w: w * float(2 * NUMBER),
        lambda w: w * torch.full((2,), 2 * NUMBER),
    ],
)
def test_a_number_that_is_read_out_of_a_captured_tensor_is_not_frozen(read: Any) -> None:
    try:
        graph, captured = tracing.trace(lambda w: [read(w).sum()], [W])
    except tracing.NotTraceableError as error:
        assert "captured" in str(error)  # noqa: PT017
    else:  # it is an input, then; what has been made of it while tracing would be one, too, and stay as it is
        with torch.no_grad():
            before = graph(W, *captured)[0]
            NUMBER.sub_(1)
            after = graph(W, *captured)[0]
            NUMBER.add_(1)
        assert not torch.equal(after, before)


def test_numbers_of_tensors_that_are_given_may_be_gathered() -> None:
    graph, captured = tracing.trace(lambda w: [torch.stack([w[0], w[1]]) * torch.tensor([1.0, 2.0])], [W])
    assert torch.equal(graph(2 * W, *captured)[0], 2 * W * torch.tensor([1.0, 2.0]))


class Scaled:
    """A loss that is equal to one with another scale."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scaled)

    def __hash__(self) -> int:
        return 0

    def __call__(self, w: Tensor) -> Tensor:
        return self.scale * (w**2).sum()


@pytest.mark.compiler
def test_losses_that_are_equal_have_programs_of_their_own() -> None:
    losses = [Scaled(1.0), Scaled(2.0)]
    for scale, loss in zip((1.0, 2.0), losses, strict=True):
        for _ in range(3):
            found = diffopt.solve(loss, W, optimizer=diffopt.SGD(0.1), steps=2, compile=True).params
            torch.testing.assert_close(found, W * (1 - 0.2 * scale) ** 2)


@pytest.mark.compiler
def test_a_default_of_what_is_observed_may_change() -> None:
    """Of a lambda that is made anew at every call, with its keyword's default."""

    def loss(w: Tensor) -> Tensor:
        return (w**2).sum()

    for scale in (1.0, 1.0, 1.0, 2.0, 3.0):
        solution = diffopt.solve(
            loss, W, optimizer=diffopt.SGD(0.1), steps=2, compile=True, observe=lambda w, *, by=scale: by * w
        )
        torch.testing.assert_close(solution.observed[-1], scale * solution.params)


@pytest.mark.compiler
def test_what_only_the_observed_numbers_read_may_change() -> None:
    scale = {"of": 1.0}

    def loss(w: Tensor) -> Tensor:
        return (w**2).sum()

    def observe(w: Tensor) -> Tensor:
        return scale["of"] * w

    for scale["of"] in (1.0, 1.0, 1.0, 2.0, 3.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", diffopt.errors.CompileWarning)
            by = {"optimizer": diffopt.SGD(0.1), "steps": 2, "compile": True}
            solution = diffopt.solve(loss, W, observe=observe, **by)
        torch.testing.assert_close(solution.observed[-1], scale["of"] * solution.params)


def test_a_program_that_raises_raises_what_the_plain_way_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Interpreted, tensors: Any) -> list[Tensor]:
        raise RuntimeError("of a compiled program")

    program = diffopt.compiled(lambda w, a: torch.linalg.solve(a, w).sum())
    monkeypatch.setattr("diffopt.outer_program.Program", Interpreted)
    program.value_and_grad(W, torch.eye(2, dtype=torch.float64))
    monkeypatch.setattr(Interpreted, "__call__", refuse)
    with pytest.raises(torch.linalg.LinAlgError):
        program.value_and_grad(W, torch.zeros(2, 2, dtype=torch.float64))
    assert float(program.value_and_grad(W, torch.eye(2, dtype=torch.float64))[0]) == -1.0
