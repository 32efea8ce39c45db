"""Where states are stored, against dynamic programming, and the hypergradients that are computed so."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import relative_error
from torch.func import vmap

import diffopt
from diffopt.estimators import MultiStep, Reverse, Truncated, Unrolled
from diffopt.rollout import schedules
from diffopt.rollout.budget import as_bytes
from diffopt.rollout.record import Rollout
from diffopt.rollout.replay import Replay
from diffopt.rollout.store import Store
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.memory import peak_bytes


@cache
def least(steps: int, slots: int) -> int:
    """The fewest forward steps, by trying every place for the next state."""
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(k + least(steps - k, slots - 1) + least(k, slots) for k in range(1, steps))


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7, 12])
def test_the_formula_is_the_least_number_of_steps(slots: int) -> None:
    assert [schedules.least_steps(n, slots) for n in range(1, 81)] == [least(n, slots) for n in range(1, 81)]


@pytest.mark.parametrize("slots", [2, 3, 4, 7, 12])
def test_a_split_is_a_least_one(slots: int) -> None:
    for steps in range(2, 81):
        first = schedules.split(steps, slots)
        assert 1 <= first < steps
        assert first + least(steps - first, slots - 1) + least(first, slots) == least(steps, slots)


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 17, 60, 1000])
@pytest.mark.parametrize("slots", [1, 2, 5, 11, 70])
def test_no_more_states_are_stored_than_there_are_slots_or_steps(steps: int, slots: int) -> None:
    places = schedules.stored(steps, slots)
    assert places[0] == 0
    assert places == sorted(set(places))
    assert places[-1] < steps
    assert len(places) <= min(slots, steps)


def test_the_slots_of_log_are_the_logarithm_rounded_up() -> None:
    sizes = {1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 8: 3, 9: 4, 1024: 10, 1025: 11, 10_000: 14}
    assert {steps: schedules.logarithmic(steps) for steps in sizes} == sizes


@given(steps=st.integers(1, 60), slots=st.integers(1, 12))
def test_going_backwards_takes_the_least_steps_within_its_slots(steps: int, slots: int) -> None:
    """Each state is its number, and a step adds one; the states held are counted before every step."""
    held = Store()
    held[1] = Leaves([torch.tensor(1.0)])
    taken, most, order = 0, 0, []

    def advanced(state: Leaves, first: int, last: int, losses: torch.Tensor) -> Leaves:
        nonlocal taken, most
        assert float(state[0]) == first
        taken, most = taken + last - first, max(most, len(held))
        return Leaves([state[0] + (last - first)])

    replay = Replay.__new__(Replay)
    replay._advanced = advanced  # type: ignore[method-assign]
    replay._rollout = Rollout(states=held, kept=diffopt.Kept(slots=slots))
    for step, state in replay.backwards(1, steps, torch.empty(0)):
        assert float(state[0]) == step
        most = max(most, len(held))
        order.append(step)
    assert order == list(range(steps, 0, -1))
    assert taken == schedules.least_steps(steps, slots)
    assert most <= slots


# ----------------------------------------------------------------------------------------------- hypergradients


def inputs(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(steps)
    w = torch.randn(4, generator=generator, dtype=torch.float64)
    slope = torch.tensor(0.7, dtype=torch.float64)
    return [x.requires_grad_() for x in (w, slope, torch.linspace(1, 2, steps, dtype=torch.float64))]


def loss(w: torch.Tensor, slope: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return ((w * batch).sin() * slope).square().sum() + w.sum() ** 2 / 10


def solved(estimator: Any, leaves: list[torch.Tensor], **options: Any) -> diffopt.Solution[torch.Tensor]:
    w, slope, batches = leaves
    given = {"optimizer": diffopt.SGD(0.05, momentum=0.5), "steps": len(batches), **options}
    return diffopt.solve(loss, w, slope, batches=batches, estimator=estimator, **given)


def hypergradient(estimator: Any, steps: int, *, along: bool = False, **options: Any) -> tuple[Any, Any]:
    leaves = inputs(steps)
    observe = {"observe": lambda w, slope, batch: (w * slope).sin()} if along else {}
    solution = solved(estimator, leaves, **observe, **options)
    value = solution.params.square().sum()
    if along:
        value = value + (solution.losses * torch.arange(steps)).sum() + solution.observed.square().sum()
    return torch.autograd.grad(value, leaves), solution


@given(steps=st.integers(1, 40), estimator=st.sampled_from(["log", "sqrt", 1, 2, 5]), along=st.booleans())
def test_every_way_of_storing_gives_the_unrolled_hypergradient(steps: int, estimator: Any, along: bool) -> None:
    expected, _ = hypergradient(Unrolled(), steps, along=along)
    found, solution = hypergradient(Reverse(estimator), steps, along=along)
    assert relative_error(found, expected) < 1e-12
    if estimator == "log":
        slots = schedules.logarithmic(steps)
        assert (solution.kept.checkpoint, solution.kept.slots) == ("log", slots)
        assert solution.kept.states <= slots + 1
        assert solution.counts.extra_steps == schedules.least_steps(steps, slots) + 1
    assert solution.counts.gradients == steps + solution.counts.extra_steps


@pytest.mark.parametrize("last", [0, 1, 2, 7, 19, 20])
def test_so_does_truncation_of_its_last_steps(last: int) -> None:
    expected, _ = hypergradient(Truncated(last, "graph"), 20)
    found, solution = hypergradient(Truncated(last, "log"), 20)
    assert relative_error(found, expected) < 1e-12
    assert solution.counts.extra_steps == (schedules.least_steps(last, schedules.logarithmic(last)) + 1 if last else 0)


@pytest.mark.parametrize("optimizer", [diffopt.Adam(0.05), diffopt.SGD(0.05)], ids=["adam", "sgd"])
@pytest.mark.parametrize("window", [1, 3])
def test_windows_and_other_optimizers(optimizer: Any, window: int) -> None:
    expected, _ = hypergradient(MultiStep(window, Reverse("graph")), 23, optimizer=optimizer)
    found, _ = hypergradient(MultiStep(window, Reverse("log")), 23, optimizer=optimizer)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("checkpoint", ["graph", 1, 4, "sqrt", "log"])
def test_the_steps_taken_again_are_counted_in_every_mode(checkpoint: Any) -> None:
    """In blocks of four: three of the four once more without their graph, which is larger than a state here."""
    expected = {"graph": 0, 1: 16, 4: 12 + 16, "sqrt": 12 + 16, "log": schedules.least_steps(16, 4) + 1}
    assert hypergradient(Reverse(checkpoint), 16)[1].counts.extra_steps == expected[checkpoint]


@pytest.mark.parametrize("stop", [{"tol": 0.05}, {"tol": 1e9}, {"on_step": lambda step, value: step == 13}])
@pytest.mark.parametrize("estimator", [Reverse("log"), Truncated(3, "log")], ids=str)
def test_a_solve_that_ends_early_gives_the_hypergradient_of_its_steps(estimator: Any, stop: dict[str, Any]) -> None:
    graphs = Reverse("graph") if isinstance(estimator, Reverse) else Truncated(3, "graph")
    expected, other = hypergradient(graphs, 40, **stop)
    found, solution = hypergradient(estimator, 40, **stop)
    assert (solution.steps, relative_error(found, expected) < 1e-12) == (other.steps, True)
    assert solution.steps < 40


def test_a_second_backward_pass_and_tasks_under_vmap() -> None:
    leaves = inputs(19)
    solution = solved(Reverse("log"), leaves)
    value = solution.params.square().sum()
    first, again = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
    assert relative_error(again, first) < 1e-14
    assert solution.counts.extra_steps == 19 + 2 * (schedules.least_steps(19, 5) + 1)
    tasks = torch.stack([leaves[0].detach(), -0.3 * leaves[0].detach()]).requires_grad_()

    def outer(estimator: Any) -> list[torch.Tensor]:
        value = vmap(lambda w: solved(estimator, [w, *leaves[1:]]).params.square().sum())(tasks).sum()
        return list(torch.autograd.grad(value, [tasks, *leaves[1:]]))

    assert relative_error(outer(Reverse("log")), outer(Unrolled())) < 1e-12


@pytest.mark.parametrize("check", [True, False])
def test_random_numbers_are_drawn_again(check: bool) -> None:
    def noisy(w: torch.Tensor, slope: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.dropout(w, 0.5) * batch - slope).square().sum()

    def found(estimator: Any) -> Any:
        leaves = inputs(21)
        torch.manual_seed(3)
        w, slope, batches = leaves
        options = {"optimizer": diffopt.SGD(0.05), "steps": 21, "estimator": estimator, "check": check}
        solution = diffopt.solve(noisy, w, slope, batches=batches, **options)
        return torch.autograd.grad(solution.params.square().sum(), leaves)

    assert relative_error(found(Reverse("log")), found(Reverse("graph"))) < 1e-12


def test_many_cotangents_take_the_steps_again_once() -> None:
    size, steps = 40_000, 9
    w = torch.linspace(-1, 1, size, dtype=torch.float64, requires_grad=True)
    slope = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def rows(estimator: Any) -> tuple[Any, int]:
        def scaled(w: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
            return (slope * w).sin().square().sum()

        options = {"optimizer": diffopt.SGD(0.1, momentum=0.5), "steps": steps, "estimator": estimator}
        solution = diffopt.solve(scaled, w, slope, **options)
        value = torch.stack([solution.params.sum(), solution.params[:9].square().sum()])
        found = torch.autograd.grad(value, [w, slope], torch.eye(2).double(), is_grads_batched=True)
        return found, solution.counts.extra_steps

    found, extra = rows(Reverse("log"))
    assert relative_error(found, rows(Reverse("graph"))[0]) < 1e-12
    assert extra == schedules.least_steps(steps, 4) + 1


def test_a_long_rollout_keeps_few_states() -> None:
    steps = 2000
    w = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    slope = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def found(estimator: Any) -> tuple[Any, Any]:
        options = {"optimizer": diffopt.SGD(1e-3), "steps": steps, "estimator": estimator}
        solution = diffopt.solve(lambda w, slope: (w * slope).sin().sum(), w, slope, **options)
        return torch.autograd.grad(solution.params.square().sum(), [w, slope]), solution

    expected, _ = found(Reverse("graph"))
    gradients, solution = found(Reverse("log"))
    assert relative_error(gradients, expected) < 1e-12
    assert solution.kept.states <= 12
    assert solution.counts.extra_steps == schedules.least_steps(steps, 11) + 1 < 4.1 * steps


# ----------------------------------------------------------------------------------------------- a given memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [(7, 7), ("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("12B", 12), ("1TiB", 2**40)],
)
def test_amounts_of_memory(text: Any, expected: int) -> None:
    assert as_bytes("memory", text) == expected


def wide(estimator: Any, steps: int, *, batch: int = 4, **options: Any) -> tuple[Any, Any]:
    """A hypergradient whose graphs grow with the batch."""
    w = torch.linspace(-1, 1, 3000, dtype=torch.float64, requires_grad=True)
    scale = torch.full((batch, 1), 0.5, dtype=torch.float64, requires_grad=True)

    def loss(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return ((w * scale).tanh() * scale).square().mean()

    given = {"optimizer": diffopt.SGD(0.1, momentum=0.5), "steps": steps, "estimator": estimator, **options}
    solution = diffopt.solve(loss, w, scale, **given)
    return torch.autograd.grad(solution.params.square().sum(), [w, scale]), solution


def least_memory(**options: Any) -> int:
    with pytest.raises(diffopt.HyperparameterError, match=r"memory is 1 bytes, expected at least \d+ here") as error:
        wide(Reverse(memory=1), 30, **options)
    return int(str(error.value).partition("at least ")[2].split()[0])


@pytest.mark.parametrize("batch", [1, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (4, 40))])
def test_a_given_memory_is_kept(batch: int) -> None:
    state, least = 2 * 3000 * 8, least_memory(batch=batch)
    expected, _ = wide(Reverse("graph"), 30, batch=batch)
    for slots in (1, 2, 5, 12):
        budget, solutions = least + (slots - 1) * state, []
        peak = peak_bytes(lambda b=budget, found=solutions: found.append(wide(Reverse(memory=b), 30, batch=batch)))
        ((found, solution),) = solutions
        assert relative_error(found, expected) < 1e-12
        assert peak is not None
        assert peak <= 1.1 * budget
        assert (solution.kept.slots, solution.kept.checkpoint) == (slots, "log")
        assert solution.counts.extra_steps == schedules.least_steps(30, slots) + 1
        with pytest.raises(diffopt.HyperparameterError, match="expected at least"):
            wide(Reverse(memory=least - 1), 30, batch=batch)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_no_more_states_are_stored_than_there_are_steps(steps: int) -> None:
    found, solution = wide(Reverse(memory="1GB"), steps)
    assert (solution.kept.states, solution.counts.extra_steps) == (steps, steps)
    assert solution.kept.slots == max(1, steps - 1)
    assert relative_error(found, wide(Reverse("graph"), steps)[0]) < 1e-12


@pytest.mark.parametrize("stop", [{}, {"tol": 1e-3}, {"on_step": lambda step, value: step == 8}])
def test_truncation_within_a_given_memory(stop: dict[str, Any]) -> None:
    expected, _ = wide(Truncated(5, "graph"), 30, **stop)
    found, solution = wide(Truncated(5, memory="1GB"), 30, **stop)
    assert relative_error(found, expected) < 1e-12
    assert solution.kept.states <= 5


@pytest.mark.parametrize("stop", [{"tol": 1e9}, {"tol": 1e-3}, {"on_step": lambda step, value: step == 1}])
def test_an_early_end_within_a_given_memory(stop: dict[str, Any]) -> None:
    expected, _ = wide(Reverse("graph"), 30, **stop)
    found, _ = wide(Reverse(memory=least_memory()), 30, **stop)
    assert relative_error(found, expected) < 1e-12


def test_where_any_step_may_be_the_last_truncation_needs_memory_for_all_that_it_keeps() -> None:
    budget = least_memory() + 2 * 3000 * 8
    wide(Truncated(10, memory=budget), 30)
    with pytest.raises(diffopt.HyperparameterError, match=r"10 stored state\(s\)"):
        wide(Truncated(10, memory=budget), 30, tol=1e-9)


@pytest.mark.slow
@pytest.mark.compiler
def test_a_compiled_loss_that_has_changed_is_refused_within_a_given_memory() -> None:
    factor = 1.0

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (w.square() * factor).sum()

    def run() -> tuple[torch.Tensor, ...]:
        w = torch.ones(3, dtype=torch.float64, requires_grad=True)
        options = {"optimizer": diffopt.SGD(0.1), "steps": 6, "estimator": Reverse(memory="1MB"), "compile": True}
        return torch.autograd.grad(diffopt.solve(loss, w, **options).params.sum(), w)

    torch.testing.assert_close(run()[0], torch.full((3,), 0.8**6, dtype=torch.float64), rtol=1e-12, atol=0)
    factor = 2.0
    with pytest.raises(diffopt.CapturedTensorError, match="has changed since it was compiled"):
        run()
