"""``compile=True``, step by step: the numbers of the plain way, and a warning or an error where there are none."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, small_network
from oracles import relative_error
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import Binomial, FirstOrder, MultiStep, Reverse, Truncated
from diffopt.rollout import compiled
from diffopt.rollout.step_graph import Block

STEPS = 4
pytestmark = [pytest.mark.compiler, pytest.mark.usefixtures("steps_alone")]


def hypergradient(case: Any, estimator: Any, *, compile: bool, tasks: int | None = None) -> list[Tensor]:
    """Of the initial params, a loss argument, the batches and every hyperparameter."""
    problem = small_network(0, STEPS)
    params = [p.clone().requires_grad_() for p in problem.params]
    weights, inputs = problem.weights.clone().requires_grad_(), problem.batches[0].clone().requires_grad_()
    hypers = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in case.learned.items()}

    def outer(weights: Tensor) -> Tensor:
        end = diffopt.solve(
            problem.loss,
            params,
            weights,
            optimizer=case.optimizer(hypers),
            steps=STEPS,
            batches=(inputs, problem.batches[1]),
            estimator=estimator,
            compile=compile,
        ).params
        return problem.outer_loss(end)

    factors = torch.linspace(0.5, 1.5, tasks or 1, dtype=torch.float64)
    total = outer(weights) if tasks is None else vmap(outer)(factors[:, None] * weights).sum()
    found = torch.autograd.grad(total, [*params, weights, inputs, *hypers.values()], allow_unused=True)
    return [torch.zeros(()) if x is None else x for x in found]


CASES = {case.name: case for case in OPTIMIZERS}
ESTIMATORS = (Reverse(), Reverse(2), Reverse(3), Truncated(2), Truncated(3, 2), Binomial(2), FirstOrder())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tasks"), [("momentum", None), ("adam", 3)])
def test_the_numbers_are_those_of_the_plain_way(name: str, tasks: int | None) -> None:
    """In float64, where kernels differ by round-off only."""
    for estimator in (*ESTIMATORS, MultiStep(3), MultiStep(3, Reverse(2))):
        found = hypergradient(CASES[name], estimator, compile=True, tasks=tasks)
        assert relative_error(found, hypergradient(CASES[name], estimator, compile=False, tasks=tasks)) < 1e-11


def quadratic(w: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (a * w**2).sum() + (w**4).sum() / 4


def solve(loss: Any = quadratic, *args: Any, **options: Any) -> Any:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    given = {"optimizer": diffopt.SGD(0.05), "steps": 3, "compile": True, **options}
    return w, diffopt.solve(loss, w, *(args or (torch.ones(2, dtype=torch.float64),)), **given)


@pytest.mark.slow
def test_every_estimator_gets_the_gradient_of_the_plain_way() -> None:
    """Of one small loss, so that little is compiled; the test above is of networks, optimizers and tasks.

    Under Adam the number of a step matters: a window that the steps cut short is no single step of another estimator.
    """
    adam = diffopt.Adam(0.05, eps=0.1)
    for estimator in (*ESTIMATORS, MultiStep(3)):
        given = {"steps": 4, "estimator": estimator, "optimizer": adam}
        (w, found), (v, plain) = (solve(**given, compile=compile) for compile in (True, False))
        found.params.square().sum().backward()
        plain.params.square().sum().backward()
        torch.testing.assert_close(found.params, plain.params, rtol=1e-12, atol=0)
        torch.testing.assert_close(w.grad, v.grad, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_compiled_functions_are_used_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = compiled._compile
    monkeypatch.setattr(compiled, "_compile", lambda *a: made.append(1) or original(*a))

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return quadratic(w, a)

    for _ in range(3):
        w, solution = solve(loss)
        solution.params.sum().backward()
        assert solution.kept.checkpoint == 1
        assert (solution.counts.gradients, solution.counts.products) == (3, 3)
    assert len(made) == 2  # the gradient and the product
    w, plain = solve(loss, compile=False)
    before = w.grad
    plain.params.sum().backward()
    assert before is None
    _, again = solve(loss)
    torch.testing.assert_close(again.params, plain.params, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("checkpoint", "again"), [(1, 0), (2, 2), (3, 3), (5, 4), ("sqrt", 3), ("log", 1)])
def test_checkpoints_take_the_steps_between_them_again_compiled(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Any, again: int
) -> None:
    """Of five steps; no graph of a step is made, and each block's last step is not taken again."""
    w, plain = solve(steps=5, compile=False)
    plain.params.sum().backward()
    monkeypatch.setattr(Block, "__init__", None)
    v, solution = solve(steps=5, estimator=Reverse(checkpoint))
    solution.params.sum().backward()
    torch.testing.assert_close(v.grad, w.grad, rtol=1e-12, atol=0)
    counts = solution.counts
    assert (counts.gradients, counts.products, counts.depth) == (5 + again, 5, 5)


def test_losses_that_come_out_differently_between_checkpoints_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, solution = solve(steps=4, estimator=Reverse(2))
    original = compiled.Steps.take

    def drifted(*given: Any) -> Any:
        step = original(*given)
        return step._replace(losses=2 * step.losses)

    monkeypatch.setattr(compiled.Steps, "take", drifted)
    with pytest.raises(diffopt.RandomnessError, match="step 1 came out differently"):
        solution.params.sum().backward()


def test_a_second_backward_pass_gives_the_same_numbers() -> None:
    """Of the plain way too; the first has used up what was stored."""
    for estimator in (Reverse(), Reverse(2), Truncated(2)):
        w, solution = solve(steps=4, estimator=estimator)
        total = solution.params.sum()
        first, second, third = (torch.autograd.grad(total, w, retain_graph=True) for _ in range(3))
        w, solution = solve(steps=4, estimator=estimator, compile=False)
        torch.testing.assert_close(first, torch.autograd.grad(solution.params.sum(), w), rtol=1e-12, atol=0)
        torch.testing.assert_close([second, third], [first, first], rtol=1e-12, atol=0)  # rounding


def test_a_loss_that_draws_random_numbers_runs_without() -> None:
    def noisy(w: Tensor, a: Tensor) -> Tensor:
        return (a * (w + 0.1 * torch.randn(2)) ** 2).sum()

    torch.manual_seed(0)
    with pytest.warns(diffopt.CompileWarning, match="draws random numbers"):
        w, solution = solve(noisy)
    with pytest.warns(diffopt.CompileWarning, match="draws random numbers"):
        solution.params.sum().backward()
    torch.manual_seed(0)
    v, plain = solve(noisy, compile=False)
    plain.params.sum().backward()
    torch.testing.assert_close(w.grad, v.grad)


def test_a_loss_that_leaves_torch_runs_without() -> None:
    def branches(w: Tensor, a: Tensor) -> Tensor:
        return (a * w**2).sum() if float(a.sum()) > 1 else (a * w**4).sum()

    with pytest.warns(diffopt.CompileWarning, match="could not be compiled"):
        w, solution = solve(branches)
    with pytest.warns(diffopt.CompileWarning, match="could not be compiled"):
        solution.params.sum().backward()
    torch.testing.assert_close(w.grad, torch.full((2,), 0.9**3, dtype=torch.float64))


def test_what_the_loss_reads_by_closure_may_not_change() -> None:
    scale = [1.0]

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return scale[0] * quadratic(w, a)

    solve(loss)
    scale[0] = 2.0
    with pytest.raises(diffopt.CapturedTensorError, match="has changed since it was compiled"):
        solve(loss)


def test_arguments_that_are_equal_but_of_another_type_are_told_apart() -> None:
    def loss(w: Tensor, a: Tensor, flag: Any) -> Tensor:
        return quadratic(w, a) * (2.0 if flag is True else 1.0)

    ends = {}
    for flag in (1, True):
        for compile in (True, False):
            _, solution = solve(loss, torch.ones(2, dtype=torch.float64), flag, compile=compile, check=False)
            ends[flag is True, compile] = solution.params.detach()
        torch.testing.assert_close(ends[flag is True, True], ends[flag is True, False], rtol=1e-12, atol=0)
    assert not torch.equal(ends[True, True], ends[False, True])


def test_functions_that_are_built_in_are_compiled_each_on_its_own() -> None:
    for loss in (torch.dot, torch.dist):
        ends = [solve(loss, compile=compile)[1].params for compile in (True, False)]
        torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_the_backward_pass_runs_under_the_autocast_of_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    original = compiled._compile
    monkeypatch.setattr(compiled, "_compile", lambda *a: modes.append(torch.is_autocast_enabled("cpu")) or original(*a))
    matrix = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return ((matrix @ w - a) ** 2).sum()

    found = []
    for compile in (False, True):
        w = torch.tensor([0.3, 0.7, 1.0], requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solution = diffopt.solve(loss, w, torch.ones(3), optimizer=diffopt.SGD(0.05), steps=3, compile=compile)
        found += torch.autograd.grad(solution.params.square().sum(), w)
    assert modes == [True, True]
    # not to the last bit: a compiled function rounds to half precision in fewer places, some of them in each of 3 steps
    torch.testing.assert_close(found[1], found[0], rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0)


def test_a_loss_made_anew_at_every_call_is_warned_of() -> None:
    def fresh() -> Any:
        def loss(w: Tensor, a: Tensor) -> Tensor:
            return quadratic(w, a)

        return loss

    kept = [fresh() for _ in range(3)]
    for loss in kept[:2]:
        solve(loss)
    with pytest.warns(diffopt.CompileWarning, match="new function at every call"):
        solve(kept[2])


def test_optimizers_that_differ_are_compiled_each_on_its_own() -> None:
    """By class, by float and by which fields are tensors; a tensor's value is an argument."""
    number = torch.tensor(0.07, dtype=torch.float64)
    optimizers = [
        diffopt.SGD(0.05),
        diffopt.SGD(0.06),
        diffopt.SGD(number),
        diffopt.SGD(2 * number),
        diffopt.SGD(0.05, momentum=0.5),
        diffopt.SGD(diffopt.Schedule(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))),
        diffopt.RMSprop(0.05),
    ]
    for optimizer in optimizers:
        ends = [solve(optimizer=optimizer, compile=compile, check=False)[1].params for compile in (True, False)]
        torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


@dataclass(frozen=True)
class Halving(diffopt.Optimizer):
    """Its first step is a longer one than the others."""

    lr: float

    def init(self, params: diffopt.Leaves) -> dict[str, diffopt.Leaves]:
        return {}

    def update(self, params: diffopt.Leaves, grads: diffopt.Leaves, buffers: Any, step: int) -> Any:
        return params - (self.lr if step == 1 else 0.5 * self.lr) * grads, buffers


def test_an_update_that_looks_at_the_number_of_its_step_runs_without() -> None:
    optimizer = Halving(0.05)
    ends = []
    for compile in (True, False):
        with pytest.warns(diffopt.CompileWarning, match="could not be compiled") if compile else nullcontext():
            w, solution = solve(optimizer=optimizer, compile=compile)
            solution.params.sum().backward()
        ends += [solution.params.detach(), w.grad]
    torch.testing.assert_close(ends[:2], ends[2:], rtol=1e-12, atol=0)


def added(w: dict[str, Tensor], a: Tensor) -> Tensor:
    return (a * w["x"] * w["y"]).sum().square() + (w["x"] - 1).pow(4).sum() + (w["y"] + 2).square().sum()


def by_both_ways(start: dict[str, Tensor], a: Tensor, outer: Any, estimator: Any = Reverse(1)) -> list[list[Tensor]]:  # noqa: B008
    """The solution and the hypergradient, compiled and not."""
    results = []
    for compile in (True, False):
        optimizer = diffopt.SGD(0.01, momentum=0.5)
        end = diffopt.solve(added, start, a, optimizer=optimizer, steps=3, compile=compile, estimator=estimator).params
        inputs = list(dict.fromkeys([*start.values(), a]))
        results.append([*end.values(), *torch.autograd.grad(outer(end), inputs)])
    return results


ONE = torch.tensor([0.3, -0.7, 0.5], dtype=torch.float64)
STARTS: dict[str, Any] = {
    "one_tensor": lambda: (lambda w: {"x": w, "y": w})(ONE.clone().requires_grad_()),
    "two_views": lambda: (lambda w: {"x": w.view(3), "y": w.view(3)})(ONE.clone().requires_grad_()),
    "equal": lambda: {"x": ONE.clone().requires_grad_(), "y": ONE.clone().requires_grad_()},
    "zero": lambda: {"x": torch.zeros_like(ONE).requires_grad_(), "y": ONE.clone().requires_grad_()},
    "expanded": lambda: {"x": ONE[:1].clone().requires_grad_().expand(3), "y": ONE.clone().requires_grad_()},
    "strided": lambda: {"x": torch.stack([ONE, -ONE], 1).requires_grad_()[:, 0], "y": ONE.clone().requires_grad_()},
}
COTANGENTS: dict[str, Any] = {
    "equal": lambda end: (end["x"] + end["y"]).sum(),
    "one_zero": lambda end: end["x"].sum() + 0 * end["y"].sum(),
    "one_none": lambda end: end["y"].pow(2).sum(),
    "opposite": lambda end: (end["x"] - end["y"]).sum(),
    "expanded": lambda end: end["x"].sum() * end["y"].sum(),
    "one_matrix": lambda end: torch.stack([end["x"], end["y"]]).T.pow(2).sum(),
    "all_zero": lambda end: 0 * (end["x"] + end["y"]).sum(),
}


@pytest.mark.slow
@pytest.mark.parametrize("begin", STARTS)
def test_arguments_that_are_one_object_or_look_alike_stay_apart(begin: str) -> None:
    """Tracing tells arguments apart by object, and may take what is equal, or zero, for always so."""
    for end in COTANGENTS:  # the functions are compiled once for all of them
        start, a = STARTS[begin](), ONE.flip(0).clone().requires_grad_()
        got, expected = by_both_ways(start, a, COTANGENTS[end])
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    start = STARTS[begin]()
    for estimator in (Truncated(2), Reverse(2)):
        got, expected = by_both_ways(start, ONE.clone().requires_grad_(), COTANGENTS["equal"], estimator)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_an_argument_that_is_one_of_the_params_stays_apart() -> None:
    w = ONE.clone().requires_grad_()
    got, expected = by_both_ways({"x": w, "y": ONE.flip(0).clone().requires_grad_()}, w, COTANGENTS["equal"])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_a_function_that_is_right_only_where_it_was_traced_is_not_used() -> None:
    """The check of a compiled function looks at other numbers than those that it was made with."""
    given = [torch.tensor(1.0, dtype=torch.float64), ONE.clone(), ONE.clone()]
    right: Any = lambda number, x, y: (x * y * number,)  # noqa: E731
    merged: Any = lambda number, x, y: (x * x * number,)  # noqa: E731
    frozen: Any = lambda number, x, y: (x * ONE * number,)  # noqa: E731
    assert compiled._checked(right, right, given) is right
    for wrong in (merged, frozen):
        with pytest.raises(ArithmeticError, match="compiled, it is off by"):
            compiled._checked(wrong, right, given)


@pytest.mark.compiler
def test_every_batch_gets_its_own_term_where_steps_are_compiled_alone(steps_alone: None) -> None:
    """Of batches that are learned: a term at another step's place would change each of them."""
    found = []
    for compile in (True, False):
        numbers = [[1.0, 2.0], [0.5, 3.0], [2.0, 0.25], [1.5, 1.0]]
        batches = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
        w = torch.tensor([1.0, -2.0], dtype=torch.float64)
        by = {"optimizer": diffopt.SGD(0.05), "steps": 4, "estimator": Reverse("log"), "compile": compile}
        end = diffopt.solve(quadratic, w, batches=batches, **by).params
        found += torch.autograd.grad(end.square().sum(), batches)
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
