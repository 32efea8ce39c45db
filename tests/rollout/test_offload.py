"""Stored states that wait in the CPU's memory or on the disk: the same bits, little memory, and nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

import diffopt
from diffopt import Leaves
from diffopt.adjoint.autograd_function import solves_behind
from diffopt.estimators import Adjoint, Cotangents, Keep, MultiStep, Reverse, StepByStep, Trajectory, Truncated
from diffopt.rollout import disk
from diffopt.rollout.store import Store
from diffopt.tensors.memory import peak_bytes

resource = pytest.importorskip("resource", reason="no limits of files on this system")
pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="no positional reads of files on this system")

OFFLOADS = ("cpu", "disk")
ESTIMATORS: dict[str, Any] = {
    **{f"every {k}": lambda where, k=k: Reverse(k, offload=where) for k in (1, 3, 100)},
    **{name: lambda where, name=name: Reverse(name, offload=where) for name in ("sqrt", "log")},
    "memory": lambda where: Reverse(memory="52kB", offload=where),
    "truncated": lambda where: Truncated(5, "sqrt", offload=where),
    "windows": lambda where: MultiStep(2, Reverse(1, offload=where)),
}
OPTIMIZERS = {"momentum": diffopt.SGD(0.1, momentum=0.5), "adam": diffopt.Adam(0.02)}


def loss(w: Tensor, scale: Tensor) -> Tensor:
    return ((w * scale).tanh().sin() * w).square().sum()  # its graph is larger than a state


def solved(estimator: Any, steps: int, w: Tensor, scale: Tensor, **options: Any) -> diffopt.Solution[Tensor]:
    given = {"optimizer": OPTIMIZERS["momentum"], **options}
    return diffopt.solve(loss, w, scale, steps=steps, estimator=estimator, **given)


def inputs(size: int = 40, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    w = torch.linspace(-1, 1, size, dtype=torch.float64).to(dtype).requires_grad_()
    return w, torch.tensor(0.7, dtype=dtype, requires_grad=True)


def hypergradient(estimator: Any, steps: int = 13, *, tasks: int | None = None, **options: Any) -> tuple[Any, Any]:
    w, scale = inputs()
    solutions = []

    def outer(w: Tensor) -> Tensor:
        solutions.append(solved(estimator, steps, w, scale, **options))
        along = 0.0 if isinstance(estimator, Truncated) else solutions[-1].losses.sum()
        return solutions[-1].params.square().sum() + along

    if tasks is None:
        return torch.autograd.grad(outer(w), [w, scale]), solutions[0]
    stack = torch.stack([w.detach() * i for i in range(1, tasks + 1)]).requires_grad_()
    return torch.autograd.grad(vmap(outer)(stack).sum(), [stack, scale]), solutions[0]


def same(found: Any, expected: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def descriptors() -> int:
    """Open files without a name, as this library makes them: other threads of torch's may open others meanwhile."""
    held = [path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum([name.endswith("(deleted)") for name in held])


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files on this system")


# ----------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_bit_changes(estimator: str, optimizer: str, tasks: int | None) -> None:
    options = {"optimizer": OPTIMIZERS[optimizer], "tasks": tasks}
    expected, here = hypergradient(ESTIMATORS[estimator](False), **options)
    for where in OFFLOADS:
        found, away = hypergradient(ESTIMATORS[estimator](where), **options)
        assert same(found, expected)
        assert (away.kept, away.counts) == (here.kept, here.counts)


@pytest.mark.parametrize("where", OFFLOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_of_any_precision(dtype: torch.dtype, where: Any) -> None:
    found = []
    for place in (False, where):
        w, scale = inputs(41, dtype)
        end = solved(Reverse("sqrt", offload=place), 9, w, scale, check=False).params
        found.append(torch.autograd.grad(end.square().sum(), [w, scale]))
    assert same(found[1], found[0])


@pytest.mark.parametrize("where", OFFLOADS)
@pytest.mark.parametrize("form", ["transposed", "with holes", "a number", "an empty buffer"])
def test_no_bit_of_any_layout(form: str, where: Any) -> None:
    def of(place: Any) -> Any:
        whole = torch.linspace(-1, 1, 48, dtype=torch.float64).view(6, 8).requires_grad_()
        w = {"transposed": whole.t(), "with holes": whole[::2, ::3], "a number": whole[1, 2]}.get(form, whole)
        _, scale = inputs()
        params = (w, whole[:1].sum()) if form == "an empty buffer" else (w,)
        options = {"optimizer": diffopt.SGD(0.1, momentum=0.5), "steps": 7, "estimator": Reverse(2, offload=place)}
        end = diffopt.solve(lambda params, scale: sum(loss(x, scale) for x in params), params, scale, **options).params
        return torch.autograd.grad(sum(x.square().sum() for x in end), [whole, scale])

    assert same(of(where), of(False))


@pytest.mark.parametrize("where", [False, *OFFLOADS])
def test_a_store_is_a_dictionary(where: Any) -> None:
    """In any order: stored, read, taken, let go and stored again, of states of several sizes and dtypes."""
    draw, store, expected = random.Random(0), Store(where), {}
    for _ in range(400):
        step = draw.randrange(12)
        if draw.random() < 0.5:
            kinds = [torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool]
            size = draw.choice([0, 1, 5, 70])
            state = Leaves([torch.randn(size).to(draw.choice(kinds)) for _ in range(2)])
            expected.pop(step, None)
            store[step] = expected[step] = state
        elif step in expected:
            action = draw.choice(["read", "take", "drop", "settle"])
            if action in ("read", "take"):
                found = store[step] if action == "read" else store.take(step)
                assert same(found, expected[step])
                assert [x.dtype for x in found] == [x.dtype for x in expected[step]]
            if action == "take" or action == "drop":
                if action == "drop":
                    del store[step]
                del expected[step]
            if action == "settle":
                store.settle()
        assert list(store) == list(expected)
        assert store.nbytes == sum(x.nbytes for state in expected.values() for x in state)
    assert all(same(store[step], expected[step]) for step in expected)


class ByHand(Adjoint):
    """The exact recursion, written with the blocks of single steps."""

    def __init__(self, where: Any) -> None:
        self.where = where

    def keep(self, steps: int) -> Keep:
        return Keep(first=1, checkpoint=1, gradients=True, offload=self.where)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        steps, adjoint = StepByStep(trajectory), cotangent
        for t in range(trajectory.steps, 0, -1):
            adjoint = steps.through(t, adjoint, steps.curvature(t, steps.turn(t, adjoint)))
        return steps.cotangents(adjoint)


@pytest.mark.parametrize("where", OFFLOADS)
def test_estimators_of_ones_own_may_offload(where: Any) -> None:
    found = []
    for place in (False, where):
        w, scale = inputs()
        found.append(torch.autograd.grad(solved(ByHand(place), 9, w, scale).params.square().sum(), [w, scale]))
    assert same(found[1], found[0])


@pytest.mark.parametrize("stop", [{"tol": 1e-1}, {"on_step": lambda step, value: step == 6}])
@pytest.mark.parametrize("estimator", ["every 3", "log", "truncated"])
def test_no_bit_after_an_early_end(estimator: str, stop: dict[str, Any]) -> None:
    expected, _ = hypergradient(ESTIMATORS[estimator](False), 30, **stop)
    assert same(hypergradient(ESTIMATORS[estimator]("disk"), 30, **stop)[0], expected)


def test_many_cotangents_and_the_same_graph_twice() -> None:
    def rows(where: Any) -> list[Tensor]:
        w, scale = inputs()
        end = solved(Reverse("sqrt", offload=where), 9, w, scale).params
        first, second = (torch.autograd.grad(end.square().sum(), [w, scale], retain_graph=True) for _ in range(2))
        assert same(first, second)
        jacobian = jacrev(lambda s: solved(Reverse(2, offload=where), 5, w.detach(), s).params)(scale.detach())
        return [*first, jacobian]

    assert same(rows("disk"), rows(False))


# ------------------------------------------------------------------------------------------- several at once, processes


def test_two_solves_at_once_keep_their_own() -> None:
    expected = [hypergradient(Reverse("sqrt"), n)[0] for n in (9, 20)]
    leaves = [inputs() for _ in range(2)]
    ends = [solved(Reverse("sqrt", offload="disk"), n, *x) for n, x in zip((9, 20), leaves, strict=True)]
    total = sum(end.params.square().sum() + end.losses.sum() for end in ends)
    found = torch.autograd.grad(total, [x for pair in leaves for x in pair])
    assert same(found, [x for pair in expected for x in pair])


def test_threads_keep_their_own() -> None:
    counts, found = (9, 16, 25, 30), {}
    expected = {n: hypergradient(Reverse("sqrt"), n)[0] for n in counts}

    def work(n: int) -> None:
        found[n] = [hypergradient(Reverse("sqrt", offload="disk"), n, check=False)[0] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(n,)) for n in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(one, expected[n]) for n in counts for one in found[n])


def test_no_thread_is_left_between_rollout_and_backward_pass() -> None:
    """What is forked then has all that it needs."""
    before = threading.active_count()
    solution = solved(Reverse("sqrt", offload="disk"), 16, *inputs())
    assert threading.active_count() == before
    solution.params.sum().backward()
    assert threading.active_count() == before


FORK = """
import os, torch, diffopt
w = torch.linspace(-1, 1, 500, dtype=torch.float64).requires_grad_()
def ends(where):
    return diffopt.solve(lambda w: (w.tanh().sin() * w).square().sum(), w, optimizer=diffopt.SGD(0.1, momentum=0.5),
                         steps=40, estimator=diffopt.estimators.Reverse("sqrt", offload=where)).params
expected, = torch.autograd.grad(ends(False).square().sum(), w)
end = ends("disk")
child = os.fork()
found, = torch.autograd.grad(end.square().sum(), w)
right = torch.equal(found, expected)
if child == 0:
    os._exit(0 if right else 1)
assert right
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_and_its_parent_do_not_disturb_each_other() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", [False, True, *OFFLOADS])
def test_options_can_be_copied_and_compared(where: Any) -> None:
    estimator = Reverse(2, offload=where)
    assert pickle.loads(pickle.dumps(estimator)) == estimator
    assert estimator.offload == ("cpu" if where is True else where)


# ------------------------------------------------------------------------------------------------ memory, and the file


@pytest.mark.parametrize("checkpoint", [1, 10, "sqrt", "log"])
def test_memory_does_not_grow_with_the_states_on_the_disk(checkpoint: Any) -> None:
    """By torch's log of allocations: some states and graphs, whatever their number."""
    state = 2 * 8 * 3000

    def peak(steps: int) -> float:
        def work() -> None:
            w, scale = inputs(3000)
            solved(Reverse(checkpoint, offload="disk"), steps, w, scale).params.square().sum().backward()

        found = peak_bytes(work)
        assert found is not None
        return found / state

    few, many = peak(30), peak(120)
    assert many < few + 1 < 22


@pytest.mark.parametrize("where", [False, *OFFLOADS])
@pytest.mark.parametrize("checkpoint", [3, "sqrt"])
def test_small_graphs_are_linked_only_where_states_stay(checkpoint: Any, where: Any) -> None:
    """A block of graphs would take the memory that the disk saves."""
    w, scale = inputs(1000)
    options = {"optimizer": OPTIMIZERS["momentum"], "steps": 9, "estimator": Reverse(checkpoint, offload=where)}
    solution = diffopt.solve(lambda w, scale: (w[:3] * scale).tanh().square().sum(), w, scale, **options)
    found = torch.autograd.grad(solution.params.square().sum(), [w, scale])
    assert solution.counts.extra_steps == (15 if where == "disk" else 9)
    w_again, scale_again = inputs(1000)
    options["estimator"] = Reverse("graph")
    end = diffopt.solve(lambda w, scale: (w[:3] * scale).tanh().square().sum(), w_again, scale_again, **options).params
    expected = torch.autograd.grad(end.square().sum(), [w_again, scale_again])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)  # rounding


@needs_proc
def test_the_file_has_no_name_and_goes_with_the_solve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = descriptors()
    solution = solved(Reverse(1, offload="disk"), 8, *inputs())
    assert descriptors() == before + 1
    assert list(tmp_path.iterdir()) == []  # so nothing is left after a crash
    del solution  # its backward pass was never called
    assert descriptors() == before


@needs_proc
@pytest.mark.parametrize("estimator", [Reverse(1, offload="disk"), Reverse("sqrt", offload="disk")], ids=str)
def test_the_file_goes_with_the_backward_pass(estimator: Any) -> None:
    before = descriptors()
    solution = solved(estimator, 16, *inputs())
    solution.params.sum().backward()
    assert descriptors() == before


@needs_proc
def test_the_file_goes_where_the_loss_fails_midway() -> None:
    calls = []

    def failing(w: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 9:
            raise KeyError("midway")
        return w.square().sum()

    before = descriptors()
    options = {"optimizer": diffopt.SGD(0.1), "steps": 20, "check": False}
    with pytest.raises(KeyError, match="midway"):
        diffopt.solve(failing, inputs()[0], estimator=Reverse(1, offload="disk"), **options)
    gc.collect()  # the error's traceback holds what it went through
    assert descriptors() == before


def test_places_in_the_file_are_used_again() -> None:
    """A hundred blocks do not write a hundred times as much."""
    store, state = Store("disk"), Leaves([torch.zeros(1000)])
    for _ in range(50):
        for step in range(4):
            store[step] = state
        for step in (3, 2, 1):
            store.take(step)
    file = store._disk._file  # type: ignore[union-attr]
    assert file is not None
    assert file._end <= 6 * state[0].nbytes


# ------------------------------------------------------------------------------------------------------ what goes wrong


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(disk._File, "free", property(lambda file: free))


STATE = 2 * 8 * 40


@pytest.mark.parametrize(
    ("estimator", "states"),
    [(Reverse(1, offload="disk"), 30), (Reverse(4, offload="disk"), 8), (Reverse("log", offload="disk"), 6)],
    ids=str,
)
def test_a_disk_without_room_is_refused_at_the_first_step(
    estimator: Any, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, states * STATE)
    hypergradient(estimator, 30)
    with_free(monkeypatch, states * STATE - 1)
    steps: list[int] = []
    told = rf"{states} states of {STATE} bytes .* where [\d,]+ bytes are free, expected [\d,]+ .*TMPDIR"
    with pytest.raises(diffopt.errors.StorageError, match=told):
        diffopt.solve(
            lambda w: (steps.append(1), w.tanh().sin().square().sum())[1],
            inputs()[0],
            optimizer=OPTIMIZERS["momentum"],
            steps=30,
            estimator=estimator,
            check=False,
        )
    assert len(steps) == 0


def test_where_any_step_may_be_the_last_nothing_is_said_of_those_that_may_not_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_free(monkeypatch, 10 * STATE)
    estimator = Reverse(1, offload="disk")
    hypergradient(estimator, 10**6, on_step=lambda step, value: step == 5)
    with pytest.raises(diffopt.errors.StorageError, match=r"1,000,000 states"):
        hypergradient(estimator, 10**6)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 3 * 48_000 + 100])
def test_what_the_system_refuses_to_write_is_named_by_the_solve(size: int) -> None:
    w, scale = inputs(3000)
    with (
        largest_file(size),
        pytest.raises(diffopt.errors.StorageError, match=r"(24|48),000 bytes cannot be .*File too large"),
    ):
        solved(Reverse(1, offload="disk"), 20, w, scale)


def test_or_by_the_backward_pass() -> None:
    w, scale = inputs(3000)
    end = solved(Reverse("sqrt", offload="disk"), 36, w, scale).params.square().sum()
    with largest_file(48_000), pytest.raises(diffopt.errors.StorageError, match="cannot be written, after"):
        end.backward()
    end = solved(Reverse("sqrt", offload="disk"), 36, w, scale).params.square().sum()
    end.backward()  # as soon as there is room


def solution_states(solution: Any) -> dict[int, Any]:
    """What waits, by the number of its step."""
    waiting: dict[int, Any] = solves_behind(solution.params.sum())[0].call.record.rollout.states._waiting
    return waiting


def test_a_file_that_was_cut_is_no_state_of_zeros() -> None:
    w, scale = inputs(3000)
    solution = solved(Reverse(1, offload="disk"), 9, w, scale)
    file = next(iter(solution_states(solution).values()))._file
    os.ftruncate(file._number, 5 * 48_000 + 7)
    with pytest.raises(diffopt.errors.StorageError, match="shorter than what was written"):
        solution.params.sum().backward()


def test_a_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no such folder")
    with pytest.raises(diffopt.errors.StorageError, match=r"no temporary file can be made in .*no such folder"):
        solved(Reverse(1, offload="disk"), 9, *inputs())


def test_too_many_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(diffopt.errors.StorageError, match=r"Too many open files.*raise ulimit -n"):
        solved(Reverse(1, offload="disk"), 9, *inputs())


def test_a_system_without_positional_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pwrite")
    with pytest.raises(diffopt.errors.StorageError, match=r"expected os\.pwrite"):
        solved(Reverse(1, offload="disk"), 9, *inputs())
    solved(Reverse(1, offload="cpu"), 9, *inputs())


def test_leaves_that_are_no_plain_tensors_cannot_be_written() -> None:
    class Own(Tensor):
        pass

    with pytest.raises(diffopt.EstimatorError, match="expected plain tensors"):
        Store("disk")[1] = Leaves([torch.ones(3).as_subclass(Own)])
