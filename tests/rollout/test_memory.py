"""What stays in memory: what an estimator stores, what autograd records, what is given up after the backward pass."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffopt
from diffopt import Leaves
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.estimators import Adjoint, FirstOrder, ForwardMode, Keep, MultiStep, Reptile, Reverse, Truncated, Unrolled

SIZE = 1000
STATE = 8 * SIZE  # bytes of one copy of the parameters, in float64


class Meter(TorchDispatchMode):
    """Counts the live storages as large as a state, whether Python or a graph holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= STATE:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.alive[reference.cdata] = reference
        self.peak = max(self.peak, self.count())
        return result

    def count(self) -> int:
        self.alive = {key: reference for key, reference in self.alive.items() if not reference.expired()}
        return len(self.alive)


def loss(w: Tensor, scale: Tensor) -> Tensor:
    return (torch.tanh(w) * scale).square().sum()


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    w = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
    return w, torch.tensor(0.7, dtype=torch.float64, requires_grad=True)


def solve(estimator: Any, steps: int, w: Tensor, scale: Tensor, **options: Any) -> diffopt.Solution[Tensor]:
    optimizer = diffopt.SGD(0.05, momentum=0.5)
    return diffopt.solve(loss, w, scale, optimizer=optimizer, steps=steps, estimator=estimator, **options)


def peak(estimator: Any, steps: int) -> int:
    """The most states alive at once, during the rollout or the backward pass."""
    w, scale = inputs()
    if isinstance(estimator, ForwardMode):
        w = w.detach()  # it carries one state per number that is differentiated
    with Meter() as meter:
        solve(estimator, steps, w, scale).params.square().sum().backward()
    return meter.peak


def graph_of(*tensors: Tensor) -> set[Any]:
    """All nodes of the graph behind some tensors."""
    pending, seen = [tensor.grad_fn for tensor in tensors], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending.extend(parent for parent, _ in node.next_functions)
    return seen


# --------------------------------------------------------------------------------------------- what is stored

NOTHING = {"first_order": FirstOrder(), "reptile": Reptile(), "forward": ForwardMode()}
# estimator -> the states it stores of `steps`
COUNTS: dict[str, tuple[Any, Callable[[int], int]]] = {
    **{name: (estimator, lambda steps: 0) for name, estimator in NOTHING.items()},
    "graph": (Reverse("graph"), lambda steps: 0),
    "every_state": (Reverse(1), lambda steps: steps),
    "every_fifth": (Reverse(5), lambda steps: math.ceil(steps / 5)),
    "one_block": (Reverse(1000), lambda steps: 1),
    "sqrt": (Reverse("sqrt"), lambda steps: round(math.sqrt(steps))),
    "log": (Reverse("log"), lambda steps: math.ceil(math.log2(steps)) + 1),
    "truncated": (Truncated(4, checkpoint=1), lambda steps: 4),
    "truncated_sqrt": (Truncated(16, checkpoint="sqrt"), lambda steps: 4),
    "truncated_at_none": (Truncated(0, checkpoint=1), lambda steps: 0),
}


@pytest.mark.parametrize("steps", [16, 100, 400])  # squares
@pytest.mark.parametrize("name", COUNTS)
def test_an_estimator_stores_the_states_it_needs(name: str, steps: int) -> None:
    estimator, count = COUNTS[name]
    kept = solve(estimator, steps, *inputs()).kept
    assert kept.states == count(steps)
    if name != "graph":
        assert kept.bytes == 2 * STATE * kept.states  # parameters and velocity


@pytest.mark.parametrize(
    "estimator", [Reverse(), Reverse("graph"), Reverse(1), Reverse("sqrt"), Truncated(3, checkpoint=1)]
)
def test_nothing_is_stored_when_nothing_is_differentiated(estimator: Any) -> None:
    w, scale = inputs()
    constant = solve(estimator, 8, w.detach(), scale.detach())
    with torch.no_grad():
        unrecorded = solve(estimator, 8, w, scale)
    for solution in (constant, unrecorded):
        assert (solution.kept.states, solution.kept.bytes) == (0, 0)
        assert not solution.params.requires_grad
    with torch.no_grad(), Meter() as meter:
        solution = solve(estimator, 40, w, scale)
    assert meter.count() == 3  # the initial parameters, the final ones and their velocity


@pytest.mark.parametrize("steps", [5, 50])
def test_the_default_keeps_graphs_while_they_are_small(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph here saves a few states; the choice is made from the first, times the steps."""
    assert solve(Reverse(), steps, *inputs()).kept.checkpoint == "graph"
    few = solve(Reverse(), steps, *inputs()).kept.bytes
    monkeypatch.setattr("diffopt.rollout.keeper.GRAPH_BUDGET", few - 1)
    kept = solve(Reverse(), steps, *inputs()).kept
    assert kept.checkpoint == math.ceil(math.sqrt(steps))
    assert kept.states == math.ceil(steps / math.ceil(math.sqrt(steps)))


@pytest.mark.parametrize("tasks", [None, 4])
def test_the_bytes_of_graphs_are_well_estimated(tasks: int | None) -> None:
    """Against what is alive, to a factor of two: the budget that picks ``"sqrt"`` is compared with them."""
    w, scale = inputs()
    if tasks is not None:
        w = w.detach()[: SIZE // tasks].expand(tasks, -1).clone().requires_grad_()  # as large in all
    solutions = []

    def one(w: Tensor) -> Tensor:
        solutions.append(solve(Reverse("graph"), 20, w, scale))
        return solutions[0].params

    with Meter() as meter:
        end = one(w) if tasks is None else vmap(one)(w)
        alive = meter.count() * STATE
    assert end.requires_grad
    assert alive / 2 <= solutions[0].kept.bytes <= alive


def measured(loss: Callable[..., Tensor], w: Tensor, *args: Any, **options: Any) -> int:
    """The bytes that the graphs of a solve are estimated to take."""
    given = {"optimizer": diffopt.SGD(0.05), "steps": 5, "estimator": Reverse("graph"), **options}
    return diffopt.solve(loss, w.detach().requires_grad_(), *args, **given).kept.bytes


def test_of_one_loss_graphs_of_another_size_are_measured_anew() -> None:
    w, scale = inputs()
    sizes = [measured(loss, w[:n], scale) for n in (10, SIZE, 10)]
    assert sizes[1] > 50 * sizes[0]
    assert sizes[2] == sizes[0]


def test_so_are_graphs_in_another_precision_or_under_a_vmap() -> None:
    w, scale = inputs()
    wide, narrow = measured(loss, w, scale), measured(loss, w.float(), scale.float())
    assert narrow == wide / 2
    found: list[int] = []

    def one(w: Tensor) -> Tensor:
        solution = diffopt.solve(loss, w, scale, optimizer=diffopt.SGD(0.05), steps=5, estimator=Reverse("graph"))
        found.append(solution.kept.bytes)
        return solution.params

    vmap(one)(w.detach().expand(3, -1).clone().requires_grad_())
    assert found[0] > 2 * wide


def test_so_are_graphs_of_another_optimizer_or_window() -> None:
    (w, scale), by_adam = inputs(), {"optimizer": diffopt.Adam(0.01)}
    plain, adam = measured(loss, w, scale), measured(loss, w, scale, **by_adam)
    assert adam > 1.5 * plain
    windows = measured(loss, w, scale, steps=20, estimator=MultiStep(4, Reverse("graph")), **by_adam)
    assert windows > 1.5 * adam  # as many steps, of four updates each


@pytest.mark.parametrize("checkpoint", [1, 2, 3, "sqrt"])
def test_states_are_stored_at_the_first_step_and_then_at_every_so_many(checkpoint: Any) -> None:
    """As a rule of the user's own sees them."""
    seen: list[list[int]] = []

    class Looking(Adjoint):
        def keep(self, steps: int) -> Keep:
            return Keep(first=3, checkpoint=checkpoint, gradients=True)

        def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
            seen.extend([list(trajectory.rollout.states), list(trajectory.rollout.gradients)])
            return Cotangents(cotangent, {})

    solve(Looking(), 11, *inputs()).params.sum().backward()
    assert seen == [list(range(3, 12, 3 if checkpoint == "sqrt" else checkpoint)), list(range(3, 12))]


def test_graphs_that_are_given_up_are_taken_again_from_the_first_state(monkeypatch: pytest.MonkeyPatch) -> None:
    w, scale = inputs()
    ends = [solve(Reverse("graph"), 7, w, scale).params]
    monkeypatch.setattr("diffopt.rollout.keeper.GRAPH_BUDGET", 0)
    ends.append(solve(Reverse(), 7, w, scale).params)
    kept, again = (torch.autograd.grad(end.pow(2).sum(), [w, scale]) for end in ends)
    torch.testing.assert_close(again, kept, rtol=1e-12, atol=1e-14)  # rounding


# ------------------------------------------------------------------------------- what autograd records of it


@pytest.mark.parametrize("name", [name for name in COUNTS if name != "graph"])
def test_the_graph_of_a_solution_does_not_grow_with_steps(name: str) -> None:
    found = [solve(COUNTS[name][0], steps, *inputs()) for steps in (16, 64)]
    sizes = [len(graph_of(x.params, x.state.buffers["velocity"], x.losses)) for x in found]
    assert sizes[0] == sizes[1] <= 6  # the rollout is one node; the rest leads to the inputs


def test_plain_unrolling_records_every_step() -> None:
    """The measure above does notice a recorded rollout."""
    few, many = (len(graph_of(solve(Unrolled(), steps, *inputs()).params)) for steps in (16, 64))
    assert many > 3 * few > 100


# ------------------------------------------------------------------------------------------- what is alive at once


@pytest.mark.parametrize("name", [*NOTHING, "truncated", "truncated_sqrt"])
def test_the_peak_does_not_grow_with_steps(name: str) -> None:
    estimator = COUNTS[name][0]
    assert peak(estimator, 20) == peak(estimator, 80)


def test_the_peak_of_many_tangents_does_not_grow_with_steps() -> None:
    """A thousand hyperparameters of a small problem: not even a number per tangent and step is kept."""

    def peak_of(steps: int) -> int:
        scale = torch.linspace(0.1, 0.5, SIZE, dtype=torch.float64).view(-1, 4).requires_grad_()
        with Meter() as meter:
            solve(ForwardMode(), steps, torch.ones(4, dtype=torch.float64), scale).params.sum().backward()
        return meter.peak

    assert peak_of(5) == peak_of(20)


def test_the_peak_of_storing_every_state_grows_by_one_state_per_step() -> None:
    """A state is parameters and velocity; beside them one graph at a time."""
    few, many = peak(Reverse(1), 16), peak(Reverse(1), 64)
    assert many - few == 2 * (64 - 16)
    assert few - 2 * 16 < 20


def test_the_peak_of_root_checkpointing_grows_like_the_root() -> None:
    """The replayed blocks count, too: ``sqrt(T)`` states, those of ``sqrt(T)`` steps, and one graph at a time."""
    four, eight, twelve = (peak(Reverse("sqrt"), k * k) for k in (4, 8, 12))
    assert eight - four == twelve - eight
    assert (eight - four) / 4 == 2 + 2  # parameters and velocity of each


@pytest.mark.parametrize("steps", [4, 9, 30])
@pytest.mark.parametrize("estimator", [Reverse("sqrt"), Reverse(2), Reverse(7), Reverse(1000), Reverse("log")], ids=str)
def test_no_way_of_storing_needs_more_than_storing_every_state(estimator: Any, steps: int) -> None:
    assert peak(estimator, steps) <= peak(Reverse(1), steps)


def test_the_peak_of_the_recursion_grows_like_the_logarithm() -> None:
    """By one state, of two tensors, when the steps are doubled."""
    found = [peak(Reverse("log"), 2**k) for k in (4, 5, 6, 7)]
    assert [more - less for less, more in itertools.pairwise(found)] == [2, 2, 2]


@pytest.mark.parametrize(("used", "again"), [(SIZE, 28), (10, 16)], ids=["large graphs", "small graphs"])
@pytest.mark.parametrize("tasks", [None, 3])
def test_blocks_are_one_graph_where_graphs_are_no_larger_than_states(used: int, again: int, tasks: int | None) -> None:
    """Of 16 steps in four blocks, the states between are computed once more where they are stored."""
    w, scale = inputs()
    solutions = []

    def partly(w: Tensor, scale: Tensor) -> Tensor:
        return (w[:used].tanh() * scale).square().sum()

    def one(w: Tensor, estimator: Any) -> Tensor:
        optimizer = diffopt.SGD(0.05, momentum=0.5)
        solutions.append(diffopt.solve(partly, w, scale, optimizer=optimizer, steps=16, estimator=estimator))
        return solutions[-1].params.square().sum()

    start = w if tasks is None else torch.stack([w.detach() * i for i in range(1, tasks + 1)]).requires_grad_()
    found = []
    for estimator in (Reverse("sqrt"), Reverse("graph")):
        value = one(start, estimator) if tasks is None else vmap(one, (0, None))(start, estimator).sum()
        found.append(torch.autograd.grad(value, [start, scale]))
    assert solutions[0].counts.extra_steps == again
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)  # rounding


def test_the_peak_of_plain_unrolling_grows_with_steps() -> None:
    """The meter does see what only a graph holds; and step graphs cost no more than unrolling."""
    few, many = peak(Unrolled(), 10), peak(Unrolled(), 40)
    assert many - few >= 4 * 30
    assert peak(Reverse("graph"), 40) <= many + 10


# ------------------------------------------------------------------------------------------------ what is given up


@pytest.mark.parametrize("name", COUNTS)
def test_a_backward_pass_releases_what_was_stored_while_the_solution_lives(name: str) -> None:
    w, scale = inputs()
    w = w.detach()
    with Meter() as meter:
        solution = solve(COUNTS[name][0], 30, w, scale)
        before = meter.count()
        solution.params.square().sum().backward()
        after = meter.count()
    assert solution.params.shape == (SIZE,)
    assert after <= 4  # initial and final parameters, the final velocity, a zero cotangent at the most
    stored = {"every_state": 60, "graph": 120, "every_fifth": 12}.get(name, 0)
    assert before >= stored


def test_a_retained_graph_can_be_used_again_and_releases_the_stored_states_all_the_same() -> None:
    w, scale = inputs()
    with Meter() as meter:
        end = solve(Reverse(1), 30, w, scale).params.square().sum()
        (first,) = torch.autograd.grad(end, scale, retain_graph=True)
        between = meter.count()
        (second,) = torch.autograd.grad(end, scale)
    assert between <= 6
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_a_solution_that_is_dropped_without_a_backward_pass_leaves_nothing() -> None:
    """Without help of the garbage collector: no reference cycle holds the states."""
    w, scale = inputs()
    gc.collect()
    gc.disable()
    try:
        with Meter() as meter:
            for name in COUNTS:
                solution = solve(COUNTS[name][0], 16, w, scale)
                end = weakref.ref(solution.params)
                del solution
                assert end() is None
                assert meter.count() <= 1, name  # w itself
    finally:
        gc.enable()


LEANER = [pytest.param(estimator, marks=pytest.mark.slow) for estimator in (Reverse("sqrt"), FirstOrder())]
STYLES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "backward": lambda objective, w: torch.autograd.grad(objective(w), w)[0],
    "vmap": lambda objective, w: torch.autograd.grad(vmap(objective)(w.expand(2, -1)).sum(), w)[0],
    "grad": lambda objective, w: grad(objective)(w.detach()),
    "vmap_of_grad": lambda objective, w: vmap(grad(objective))(w.detach().expand(2, -1)).sum(0),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("estimator", [Reverse("graph"), *LEANER], ids=str)
def test_outer_steps_leave_no_tensor_behind(style: str, estimator: Any) -> None:
    w, scale = (x.detach()[..., :10] if x.ndim else x.detach() for x in inputs())

    def alive() -> list[Tensor]:
        gc.collect()
        return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]

    def objective(w: Tensor) -> Tensor:
        return solve(estimator, 2, w, scale).params.square().sum()

    others = alive()  # what other tests left must not go while this one counts
    counts = []
    for step in range(1, 61):
        w = (w.detach() - 0.01 * STYLES[style](objective, w.detach().requires_grad_())).detach()
        if step in (20, 60):
            counts.append(len(alive()) - len(others))
    assert counts[0] == counts[1]


def test_graphs_are_measured_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of one loss on the same shapes may save as differently as a number among the arguments says."""

    def loss(w: Tensor, count: int) -> Tensor:
        return (w * torch.ones(count, dtype=w.dtype)).sin().mean()

    def kept(count: int) -> Any:
        w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        return diffopt.solve(loss, w, count, optimizer=diffopt.SGD(0.1), steps=16).kept.checkpoint

    monkeypatch.setattr("diffopt.rollout.keeper.GRAPH_BUDGET", 2**20)
    assert [kept(4), kept(100_000), kept(4)] == ["graph", 4, "graph"]


@pytest.mark.parametrize("estimator", [FirstOrder(), Truncated(2, checkpoint=1), Reptile()], ids=str)
def test_looking_for_captured_tensors_keeps_no_state_alive(estimator: Any) -> None:
    alive: list[Any] = []
    most = 0

    def loss(w: Tensor) -> Tensor:
        nonlocal most
        alive.append(weakref.ref(w))
        most = max(most, sum(x() is not None for x in alive))
        return w.square().sum()

    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    diffopt.solve(loss, w, optimizer=diffopt.SGD(0.1), steps=20, estimator=estimator)
    assert most <= 2
