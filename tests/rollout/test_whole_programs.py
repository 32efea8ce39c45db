"""``compile=True``, all steps as one program: the numbers of the plain way, and what is noticed when something changes.

The graphs run as they were traced (``conftest.py``); what inductor makes of them: ``test_programs_of_every_kind.py``.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import Interpreted
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import Binomial, FirstOrder, Krylov, MultiStep, Reptile, Reverse, Truncated
from diffopt.rollout import compiled, known_programs
from diffopt.rollout.hidden_state import left_alone

pytestmark = pytest.mark.compiler


@pytest.fixture(autouse=True)
def _wholly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No step is compiled by itself, unless the test says so, and nothing is said."""
    alone: list[Any] = []
    monkeypatch.setattr(Interpreted, "made", 0)
    monkeypatch.setattr(compiled, "_compile", lambda function, arguments: alone.append(1) or function)
    with warnings.catch_warnings():
        warnings.simplefilter("error", diffopt.CompileWarning)
        yield
    assert not alone or "falls_back" in request.fixturenames


@pytest.fixture
def falls_back() -> None:
    """Steps may be taken one by one, for there is no program, or it has been given up."""


def quadratic(w: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (a * w**2).sum() + (w**4).sum() / 4


A = torch.ones(2, dtype=torch.float64)


def start() -> Tensor:
    return torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)


def solve(loss: Any = quadratic, *args: Any, w: Any = None, **options: Any) -> Any:
    w = start() if w is None else w
    given = {"optimizer": diffopt.SGD(0.05), "steps": 3, "compile": True, **options}
    return w, diffopt.solve(loss, w, *(args or (A,)), **given)


def both(outer: Callable[[Any], Tensor], *args: Any, times: int = 3, **options: Any) -> None:
    """The hypergradient by both ways, some times."""
    for _ in range(times):
        (w, found), (v, plain) = (solve(*args, compile=compile, **options) for compile in (True, False))
        [one], [other] = torch.autograd.grad(outer(found), w), torch.autograd.grad(outer(plain), v)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_programs_are_made_once_and_used_again() -> None:
    def loss(w: Tensor, a: Tensor) -> Tensor:
        return quadratic(w, a)

    for _ in range(5):
        _, solution = solve(loss)
        solution.params.sum().backward()
        counts, kept = solution.counts, solution.kept
        assert (counts.gradients, counts.products, counts.depth, counts.extra_steps) == (3, 3, 3, 3)
        assert (kept.checkpoint, kept.states, kept.bytes) == (1, 3, 48)
    assert Interpreted.made == 2
    with torch.no_grad():
        end = solve(loss)[1]
    assert (end.kept.states, end.kept.checkpoint) == (0, None)
    assert Interpreted.made == 3
    plain = solve(loss, compile=False)[1]
    torch.testing.assert_close((end.params, end.losses), (plain.params.detach(), plain.losses.detach()))


def test_checkpoints_are_programs_too() -> None:
    """The root of 7 steps is every third state; ``again``: how many steps lie between states that are kept."""

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return quadratic(w, a)

    def grad(w: Tensor, solution: Any) -> Tensor:
        return torch.autograd.grad(solution.params.square().sum() + solution.losses.prod(), w)[0]

    given = {"steps": 7, "optimizer": diffopt.SGD(0.05, momentum=0.5)}
    expected = grad(*solve(loss, compile=False, **given))
    cases: tuple[tuple[Any, int, int, int], ...] = (
        *((1, 7, 0, 2), ("graph", 7, 0, 2), (None, 7, 0, 2)),
        *((3, 3, 4, 4), ("sqrt", 3, 4, 4), (9, 1, 6, 6)),
    )
    for checkpoint, states, again, made in cases:
        for _ in range(3):
            w, solution = solve(loss, estimator=Reverse(checkpoint), **given)
            torch.testing.assert_close(grad(w, solution), expected, rtol=1e-12, atol=0)
            counts, kept = solution.counts, solution.kept
            assert (kept.states, kept.bytes) == (states, 32 * states)
            assert (counts.gradients, counts.products, counts.extra_steps) == (7 + again, 7, 7 + again)
        assert Interpreted.made == made


def test_all_states_are_kept_while_they_are_few_unless_it_is_said_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """``checkpoint=None``: as with graphs, within a budget."""
    monkeypatch.setattr("diffopt.rollout.loop.GRAPH_BUDGET", 7 * 16 - 1)
    for steps, estimator, states in ((6, Reverse(), 6), (7, Reverse(), 3), (7, Reverse(1), 7), (7, Truncated(6), 6)):
        both(lambda s: s.params.sum(), steps=steps, estimator=estimator, times=2)
        assert solve(steps=steps, estimator=estimator)[1].kept.states == states


@pytest.mark.parametrize("estimator", [Reverse("log"), Reverse(memory="2GB"), Reverse(2, offload="disk")], ids=repr)
def test_other_ways_to_store_states_are_compiled_step_by_step(estimator: Any, falls_back: None) -> None:
    both(lambda s: s.params.sum(), steps=5, estimator=estimator)
    assert Interpreted.made == 0


@pytest.mark.parametrize("estimator", [Reverse("sqrt"), MultiStep(2, Reverse(2))], ids=repr)
def test_blocks_under_transforms(estimator: Any) -> None:
    """Several levels of vmap, each task with its own hyperparameter; and many cotangents of one solve."""
    lrs = torch.linspace(0.01, 0.05, 6, dtype=torch.float64).reshape(2, 3)

    def of_task(lr: Tensor, compile: bool) -> Tensor:
        given = {"optimizer": diffopt.SGD(lr), "steps": 7, "estimator": estimator, "compile": compile}
        return solve(w=start().detach(), **given)[1].params

    found = []
    for compile in (True, False):
        function = vmap(vmap(lambda lr, compile=compile: of_task(lr, compile).square().sum()))
        jacobian = torch.func.jacrev(lambda lr, compile=compile: of_task(lr, compile))(lrs[0, 0])
        found.append((torch.func.grad(lambda x, function=function: function(x).sum())(lrs), jacobian))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_what_is_handed_out_along_the_way_and_its_derivatives() -> None:
    def aux_loss(w: Tensor, a: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return quadratic(w, a), {"norm": w.norm()}

    # a lambda that is made anew at every call
    both(lambda s: s.params.sum() + s.observed["w"][1].prod() * s.losses[2], observe=lambda w, a: {"w": w})
    both(lambda s: s.losses.sum() * s.observed.sum(), observe=lambda w, a: (a * w).sum())
    both(lambda s: s.params.sum() * s.losses[1] * s.aux["norm"].sum(), aux_loss, has_aux=True)
    both(lambda s: s.losses[2], estimator=Reverse(1), optimizer=diffopt.Adam(0.1, eps=0.1))
    assert Interpreted.made == 8


def test_backward_passes_of_one_rollout_by_other_inputs_and_outputs() -> None:
    """One program of the rollout, and one of the backward pass for each."""

    def loss(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return quadratic(w, a) + (b * w).sum()

    for learned, costs in (((), False), ((0,), False), ((1,), False), ((0, 1), False), ((0, 1), True), ((), False)):
        found = []
        for compile in (True, False):
            args = [A.clone().requires_grad_(i in learned) for i in range(2)]
            w, solution = solve(loss, *args, compile=compile)
            total = solution.params.square().sum() + (solution.losses.prod() if costs else 0)
            found.append(torch.autograd.grad(total, [w, *[args[i] for i in learned]]))
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert Interpreted.made == 6


def test_observers_that_read_something_else_are_told_apart(falls_back: None) -> None:
    """They share their code."""
    for factor in (1.0, 2.0, 3.0):
        both(lambda s: s.observed.sum(), observe=lambda w, a, factor=factor: factor * w, times=1)


def test_a_solve_that_goes_on_needs_no_program_of_its_own() -> None:
    """Nor does Adam, which counts; a schedule, of which other entries are read, does."""

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return quadratic(w, a)

    ends = []
    for compile in (True, False):
        state: Any = start()
        for _ in range(4):
            state = solve(loss, w=state, optimizer=diffopt.Adam(0.1, eps=0.1), compile=compile)[1].state
        ends.append(state.params)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)
    assert Interpreted.made == 1
    rates = torch.tensor([0.1, 0.2, 0.05, 0.01, 0.3, 0.15], dtype=torch.float64)
    for optimizer in (diffopt.SGD(diffopt.Schedule(rates)), diffopt.SGD(diffopt.Schedule(rates.tolist()))):
        ends = []
        for compile in (True, False):
            state = solve(loss, optimizer=optimizer, compile=compile)[1].state
            ends.append(solve(loss, w=state, optimizer=optimizer, compile=compile)[1].params)
        torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_a_second_backward_pass_and_many_at_once() -> None:
    w, solution = solve(steps=4)
    total = solution.params.sum()
    first, second, third = (torch.autograd.grad(total, w, retain_graph=True)[0] for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    (w, solution), (v, plain) = solve(), solve(compile=False)
    eye = torch.eye(2, dtype=torch.float64)
    rows = [torch.autograd.grad(s.params, x, eye, is_grads_batched=True)[0] for x, s in ((w, solution), (v, plain))]
    torch.testing.assert_close(*rows, rtol=1e-12, atol=0)
    jacobians = [
        torch.func.jacrev(lambda w, compile=compile: solve(w=w, compile=compile)[1].params)(start().detach())
        for compile in (True, False)
    ]
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=0)


def test_dtypes_shapes_autocast_and_default_dtype_get_programs_of_their_own() -> None:
    def loss(w: Tensor, a: Tensor) -> Tensor:
        return ((torch.outer(a, a) @ w - 1) ** 2).sum()

    for dtype, size, autocast in (
        (torch.float64, 2, False),
        (torch.float32, 2, False),
        (torch.float32, 3, False),
        (torch.float32, 3, True),
        (torch.float64, 2, False),
    ):
        ends = []
        for compile in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                w = torch.linspace(0.1, 1, size, dtype=dtype).requires_grad_()
                end = solve(loss, torch.linspace(1, 2, size, dtype=dtype), w=w, compile=compile)[1].params
            ends += [end.detach(), *torch.autograd.grad(end.square().sum(), w)]
        eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
        torch.testing.assert_close(ends[:2], ends[2:], rtol=20 * eps, atol=20 * eps)
    assert Interpreted.made == 8


ORDERS: tuple[tuple[Any, int], ...] = (
    *((Binomial(2), 2), (Binomial(3, window=4, chunk_size=6), 2), (Binomial(0), 2)),
    *(
        (Krylov(3), 2),
        (Krylov(3, chunk_size=4), 1),
        (Binomial(2, chunk_size=5), 1),
        (Krylov(4, rtol=0.1), 1),
        (Krylov(1, rtol=0.5), 2),
        (Krylov(0), 2),
    ),
    *((MultiStep(2, Binomial(1)), 2), (MultiStep(2, Krylov(2)), 2)),
)
"""Estimators by orders, and how many programs six steps of theirs are: one, if what goes back is plain code."""


@pytest.mark.parametrize(
    ("estimator", "made"),
    [*ORDERS[:2], *[pytest.param(*case, marks=pytest.mark.slow) for case in ORDERS[2:]]],
    ids=repr,
)
def test_orders_are_programs_with_the_counts_diagnostics_and_warnings_of_the_plain_way(
    estimator: Any, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_programs, "_functions", Counter())  # the loss is made anew in each of these tests

    def loss(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return quadratic(w, a) + (b * w).sum()

    def run(compile: bool, w: Tensor, lr: float) -> tuple[Any, ...]:
        b, rate = A.clone().requires_grad_(), torch.tensor(lr, dtype=torch.float64, requires_grad=True)
        given = {"optimizer": diffopt.SGD(rate, momentum=0.3), "steps": 6, "observe": lambda w, a, b: (b * w).sum()}
        _, found = solve(loss, A, b, w=w, estimator=estimator, compile=compile, **given)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            grads = torch.autograd.grad(found.params.square().sum(), [w, b, rate], allow_unused=True)
        numbers = [found.observed.detach(), *[torch.zeros(()) if x is None else x for x in grads]]
        return numbers, found.diagnostics, found.counts, found.kept, [str(one.message) for one in caught]

    for lr in (0.05, 0.25, 0.05):
        got, expected = (run(compile, start(), lr) for compile in (True, False))
        torch.testing.assert_close(got[:2], expected[:2], rtol=1e-10, atol=1e-12)
        assert got[2:] == expected[2:]
    known = known_programs._known[compiled.owner(loss)].values()  # (one that is wrong is given up, and never used)
    assert sum([one.program is not None for one in known]) == Interpreted.made == made


def test_a_program_of_orders_serves_later_backward_passes_and_no_other_estimator() -> None:
    """What it goes back over is not used up; the programs of the steps are one."""
    w, solution = solve(steps=4, estimator=Binomial(2))
    total = solution.params.square().sum()
    first, second = (torch.autograd.grad(total, w, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert solution.counts.gradients == 4
    made = Interpreted.made
    for estimator in (Binomial(1), Binomial(2), Binomial(2, scale=0.5), Krylov(2)):
        both(lambda s: s.params.square().sum(), steps=4, estimator=estimator, times=1)
    assert Interpreted.made == made + 3
    for estimator in (Binomial(4), Krylov(5)):  # the exact recursion, over the states that are kept beside gradients
        both(lambda s: s.params.square().sum(), steps=4, estimator=estimator, times=1)
    assert Interpreted.made == made + 4
    functions = [lambda w, c=c: solve(w=w, steps=4, estimator=Krylov(2), compile=c)[1].params for c in (True, False)]
    jacobians = [torch.func.jacrev(function)(start().detach()) for function in functions]
    torch.testing.assert_close(*jacobians, rtol=1e-12, atol=1e-14)


def test_what_orders_do_not_differentiate_is_refused_as_ever() -> None:
    _, solution = solve(estimator=Binomial(1))
    with pytest.raises(diffopt.EstimatorError, match=r"depends on Solution\.losses"):
        solution.losses.sum().backward()


# ------------------------------------------------------------------------------------------------ what changes


SCALE = [1.0]


def scaled(w: Tensor, a: Tensor) -> Tensor:
    return SCALE[0] * quadratic(w, a)


@pytest.mark.parametrize("uses", [1, 2, 5])
def test_a_number_that_the_loss_reads_may_not_change(uses: int) -> None:
    for _ in range(uses):
        solve(scaled)
    for SCALE[0] in (2.0, 3.0):
        with pytest.raises(diffopt.CapturedTensorError, match="has changed since it was compiled"):
            solve(scaled)
    SCALE[0] = 1.0
    both(lambda s: s.params.sum(), scaled, times=1)


def test_what_changes_and_does_not_matter_may_change() -> None:
    """A counter: each call is a plain one as well, and right."""
    seen = [0]

    def loss(w: Tensor, a: Tensor) -> Tensor:
        seen[0] += 1
        return quadratic(w, a)

    both(lambda s: s.params.sum(), loss, times=4)
    assert Interpreted.made == 2


@pytest.mark.parametrize("estimator", [Reverse(1), Reverse(2), Binomial(1), Krylov(2)], ids=repr)
def test_a_change_after_the_rollout_is_noticed_in_the_backward_pass(estimator: Any) -> None:
    for _ in range(3):
        solve(scaled, estimator=estimator)[1].params.sum().backward()
    _, solution = solve(scaled, estimator=estimator)
    SCALE[0] = 2.0
    with pytest.raises(diffopt.RandomnessError, match="came out differently in the backward pass"):
        solution.params.sum().backward()
    SCALE[0] = 1.0


WEIGHTS = torch.ones(2, dtype=torch.float64)


def weighted(w: Tensor, a: Tensor) -> Tensor:
    return quadratic(w, a * WEIGHTS)


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Truncated(2), Binomial(2)], ids=repr)
def test_a_captured_tensor_written_to_after_the_rollout_is_refused_as_ever(estimator: Any, falls_back: None) -> None:
    WEIGHTS.fill_(1.0)
    for _ in range(2):
        solve(weighted, estimator=estimator)[1].params.sum().backward()
    _, solution = solve(weighted, estimator=estimator)
    WEIGHTS.mul_(2)
    with pytest.raises(diffopt.RandomnessError, match="came out differently in the backward pass"):
        solution.params.sum().backward()  # the third use of the program is not compared with the plain way


def test_a_change_of_later_steps_only_is_noticed_and_the_program_given_up() -> None:
    late = [0.0]

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return quadratic(w, a) + late[0] * (w[0] - 1) ** 2  # nothing at the start

    solve(loss)
    late[0] = 1.0
    with pytest.warns(diffopt.CompileWarning, match="it is off by"):
        found = solve(loss)[1].params
    torch.testing.assert_close(found, solve(loss, compile=False)[1].params, rtol=1e-12, atol=0)


def test_a_change_that_nobody_sees_is_noticed_by_and_by() -> None:
    """In a large array, which is data; the fourth use is compared."""
    hidden = np.ones(2000)

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return float(hidden[0]) * quadratic(w, a)

    for _ in range(3):
        solve(loss)
    hidden[0] = 2.0
    with pytest.raises(diffopt.CapturedTensorError, match="has changed since it was compiled"):
        solve(loss)


def test_no_program_is_made_of_what_is_known_to_change_unseen(falls_back: None) -> None:
    """Its steps are compiled, of which the first one is looked at in every solve."""
    hidden = itertools.cycle([1.0])

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return next(hidden) * quadratic(w, a)

    both(lambda s: s.params.sum(), loss)
    assert Interpreted.made == 0


def test_captured_tensors_are_read_anew_and_refused_if_they_require_grad(falls_back: None) -> None:
    target = torch.ones(2, dtype=torch.float64)

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return quadratic(w, a) + (target * w).sum()

    for _ in range(3):
        both(lambda s: s.params.sum(), loss, times=1)
        target.mul_(1.5)
    assert Interpreted.made == 2
    target.requires_grad_()
    with pytest.raises(diffopt.CapturedTensorError, match="captured"):
        solve(loss)


def test_another_captured_tensor_with_the_same_numbers_is_read_later_too(falls_back: None) -> None:
    """The program would go on to read the first one."""
    places = [torch.ones(2, dtype=torch.float64)]

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return quadratic(w, a) + (places[0] * w).sum()

    for _ in range(3):
        both(lambda s: s.params.sum(), loss, times=1)
    places[0] = places[0].clone()
    both(lambda s: s.params.sum(), loss, times=1)
    places[0].mul_(2)
    both(lambda s: s.params.sum(), loss, times=2)


def test_numbers_that_are_not_finite_are_refused_by_step() -> None:
    for _ in range(4):  # the fifth use is compared with nothing
        solve(steps=5)
    with pytest.raises(diffopt.DivergenceError, match="step"):
        solve(w=torch.tensor([1e3, 1.0], dtype=torch.float64, requires_grad=True), steps=5)
    with pytest.raises(diffopt.NonFiniteLossError, match="at the initial params"):
        solve(w=torch.tensor([float("nan"), 1.0], dtype=torch.float64, requires_grad=True), steps=5)
    both(lambda s: s.params.sum(), steps=5)


def test_a_loss_that_keeps_a_state_is_refused_as_ever(falls_back: None) -> None:
    memory = torch.ones(2, dtype=torch.float64)

    def loss(w: Tensor, a: Tensor) -> Tensor:
        memory.mul_(0.5).add_(w.detach())
        return quadratic(w, a) + (memory * w).sum()

    def run() -> None:
        solve(loss)[1].params.sum().backward()

    for _ in range(3):
        with pytest.raises((diffopt.HiddenStateError, diffopt.RandomnessError, diffopt.CapturedTensorError)):
            run()


def test_a_loss_that_keeps_a_state_is_evaluated_in_every_solve(falls_back: None) -> None:
    """However slowly that moves: a program would agree for long, and the state would stand still meanwhile."""
    scale = [1.0]

    def loss(w: Tensor, a: Tensor) -> Tensor:
        scale[0] *= 1 + 1e-13
        return scale[0] * quadratic(w, a)

    for estimator in (FirstOrder(), Reptile()):  # which compute no step again, and so may be given such a loss
        for _ in range(4):
            before = scale[0]
            solve(loss, estimator=estimator)
            assert scale[0] != before


def test_errors_of_the_plain_way_are_raised(falls_back: None) -> None:
    captured = start()
    for loss, error in (
        (lambda w, a: (w * captured).sum() + quadratic(w, a), diffopt.CapturedTensorError),
        (lambda w, a: a.sum() + 0 * captured.detach().sum(), diffopt.DisconnectedError),
        (lambda w, a: w, diffopt.LossError),
    ):
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", diffopt.CompileWarning)
                with pytest.raises(error):
                    solve(loss)


def test_where_a_program_stumbles_the_plain_way_says_why(falls_back: None) -> None:
    """A singular matrix in the rollout, and an error within the backward pass alone."""

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return quadratic(w, a) + torch.linalg.solve(torch.diag(a), w).sum()

    for _ in range(2):
        solve(loss)[1].params.sum().backward()
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        solve(loss, torch.zeros(2, dtype=torch.float64))
    w, solution = solve(loss)
    v, other = solve(loss, compile=False)
    for program in [x.program for x in known_programs._known[loss].values()]:
        program.graph = None  # (which cannot be called)
    solution.params.sum().backward()
    (expected,) = torch.autograd.grad(other.params.sum(), v)
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=0)


def test_per_task_hyperparameters_and_tasks_that_share_all() -> None:
    lrs = torch.tensor([0.05, 0.1, 0.02], dtype=torch.float64)

    def outer(lr: Tensor, compile: bool) -> Tensor:
        return solve(optimizer=diffopt.SGD(lr, momentum=0.5), compile=compile)[1].params.square().sum()

    found = []
    for compile in (True, False):
        own = lrs.clone().requires_grad_()
        found += torch.autograd.grad(vmap(lambda lr, compile=compile: outer(lr, compile))(own).sum(), own)
        found += [torch.func.grad(lambda lr, compile=compile: outer(lr, compile))(lrs[0])]
        found += [vmap(torch.func.grad(lambda lr, compile=compile: outer(lr, compile)))(lrs)]
    torch.testing.assert_close(found[:3], found[3:], rtol=1e-12, atol=0)


def test_numbers_of_steps_and_shapes_that_keep_changing_get_no_programs_without_end(
    monkeypatch: pytest.MonkeyPatch, falls_back: None
) -> None:
    """Compiled steps serve all numbers of steps."""
    monkeypatch.setattr(known_programs, "_MOST_ALIKE", 2)

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return quadratic(w, a)

    with torch.no_grad():
        for steps, size in ((1, 2), (2, 2), (3, 2), (1, 2), (1, 3), (4, 2)):
            w, a = torch.linspace(1, 2, size).double(), torch.ones(size).double()
            ends = [solve(loss, a, w=w, steps=steps, compile=compile)[1].params for compile in (True, False)]
            torch.testing.assert_close(*ends, rtol=1e-12, atol=0)
        assert Interpreted.made == 2
        solve(loss, optimizer=diffopt.SGD(0.02))
    assert Interpreted.made == 3


@pytest.mark.parametrize("estimator", [Reverse(1), FirstOrder(), Reptile()], ids=repr)
@pytest.mark.parametrize("place", ["a list", "an attribute", "a tensor written to"])
def test_a_trace_leaves_nothing_of_its_own_in_what_the_loss_holds(estimator: Any, place: str, falls_back: None) -> None:
    """Tensors without numbers, which a later evaluation would stumble over."""
    held, box, running = [torch.ones(2)], Box(), torch.zeros(2, dtype=torch.float64)

    def loss(w: Tensor, a: Tensor) -> Tensor:
        if place == "a list":
            held.append(w.detach())
        elif place == "an attribute":
            box.last = w.detach()
        else:
            running.copy_(w.detach())
        return quadratic(w, a)

    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", diffopt.CompileWarning)
            _, found = solve(loss, steps=2, estimator=estimator)
            found.params.sum().backward()
        _, plain = solve(quadratic, steps=2, compile=False, estimator=estimator)
        torch.testing.assert_close(found.params, plain.params)
    kept = [held[-1], running, *([box.last] if place == "an attribute" else [])]
    assert all([type(x) is Tensor for x in (*held, *kept)])
    assert all([bool(torch.isfinite(x).all()) for x in kept])


class Box:
    """Something with an attribute."""

    last: Tensor


def test_a_state_that_a_step_replaces_is_right_or_refused(falls_back: None) -> None:
    box = [torch.zeros(2, dtype=torch.float64)]

    def loss(w: Tensor, a: Tensor) -> Tensor:
        box[0] = 0.5 * box[0] + w.detach()
        return quadratic(w, a) + (w * box[0]).sum()

    def numbers(compile: bool) -> Tensor:
        box[0] = torch.zeros(2, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", diffopt.CompileWarning)
            found: Tensor = solve(loss, steps=2, estimator=FirstOrder(), compile=compile)[1].params.detach()
        return found

    for _ in range(3):
        try:
            found = numbers(True)
        except diffopt.CapturedTensorError:  # a step that was compiled by itself
            continue
        torch.testing.assert_close(found, numbers(False))


def test_what_functions_hold_is_as_it_was_whatever_is_done_to_it() -> None:
    numbers, items, box = torch.zeros(2), [1], Box()
    box.last = numbers

    def loss(w: Tensor) -> Tensor:
        return (w * numbers).sum() * len(items) * box.last.sum()

    with left_alone([loss]):
        numbers.add_(1)
        items.append(2)
        box.last = start()
    assert (items, box.last is numbers, numbers.tolist()) == ([1], True, [0, 0])


@pytest.mark.slow
def test_terms_of_what_runs_over_steps_are_put_where_their_steps_are() -> None:
    """Blocks of 3 of 8 steps: batches and a schedule of which no two entries are alike, in either order."""
    batches = torch.arange(1.0, 17.0, dtype=torch.float64).reshape(8, 2).div(10).requires_grad_()
    rates = torch.linspace(0.01, 0.08, 8, dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor, a: Tensor, batch: Tensor) -> Tensor:
        return quadratic(w, a) + (w * batch).sin().sum()

    def terms(compile: bool, estimator: Any) -> list[Tensor]:
        given = {"optimizer": diffopt.SGD(diffopt.Schedule(rates)), "steps": 8, "batches": batches}
        w, found = solve(loss, A, estimator=estimator, compile=compile, **given)
        outer = found.params.square().sum() + (found.losses.prod() if isinstance(estimator, Reverse) else 0)
        return list(torch.autograd.grad(outer, [w, batches, rates]))

    for estimator in (Reverse(3), Truncated(5, 2)):
        for got, expected in zip(terms(True, estimator), terms(False, estimator), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
