"""Backward passes in modes and under hooks of the caller's: the numbers are the same, or a typed error says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ESTIMATORS
from limits import sampled
from ridge_by_hand import EXACT, assert_same, leaves, loop, loss, outer, solved, wanted
from torch import Tensor
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.estimators import Adjoint, Binomial, FirstOrder, Keep, Krylov, Truncated
from diffopt.tensors.leaves import Leaves


@pytest.fixture(params=EXACT)
def exact(request: pytest.FixtureRequest) -> Any:
    return EXACT[request.param]


# ------------------------------------------------------------------------------------------------ inference mode


def hypergradient(estimator: Any, *, inference: bool, again: bool = False, tasks: bool = False) -> list[Tensor]:
    """By a backward pass that runs in inference mode or not; ``again``: the second one through the same graph."""
    torch.manual_seed(0)
    inputs, estimator = leaves(), copy.copy(estimator)
    if getattr(estimator, "generator", None) is not None:
        estimator.generator.manual_seed(0)
    if tasks:
        each = vmap(lambda penalty: outer(solved(inputs[0], penalty, inputs[2], estimator=estimator)))
        value = each(inputs[1] * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)).sum()
    else:
        value = outer(solved(*inputs, estimator=estimator))
    with torch.inference_mode(inference):
        for more in [True] * again + [False]:
            found = torch.autograd.grad(value, inputs, retain_graph=more, allow_unused=True, materialize_grads=True)
    return list(found)


@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
def test_a_backward_pass_in_inference_mode_gives_the_same_numbers(estimator: Any, again: bool) -> None:
    expected = hypergradient(estimator, inference=False, again=again)
    assert any(bool(x.any()) for x in expected)
    assert_same(hypergradient(estimator, inference=True, again=again), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS[::3], ids=lambda estimator: type(estimator).__name__)
def test_a_backward_pass_of_tasks_in_inference_mode_gives_the_same_numbers(estimator: Any) -> None:
    assert_same(
        hypergradient(estimator, inference=True, tasks=True), hypergradient(estimator, inference=False, tasks=True)
    )


def test_exact_estimators_are_exact_in_inference_mode(exact: Any) -> None:
    assert_same(hypergradient(exact, inference=True), wanted())


def test_an_implicit_gradient_in_inference_mode_is_the_same() -> None:
    start, penalty, _ = leaves()
    star = diffopt.solve(loss, start.detach(), penalty.detach(), optimizer=diffopt.SGD(0.3, momentum=0.6), steps=300)
    found = []
    for inference in (False, True):
        value = outer(diffopt.implicit(loss, star.params, penalty))
        with torch.inference_mode(inference):
            found += torch.autograd.grad(value, penalty)
    assert found[0]
    assert_same(found[1:], found[:1])


@pytest.mark.parametrize("inference", [True, False], ids=["there", "outside"])
@pytest.mark.parametrize("cotangent", ["ones", "expanded", "made there"])
def test_a_cotangent_that_was_made_in_inference_mode_is_taken(exact: Any, cotangent: str, inference: bool) -> None:
    inputs = leaves()
    expected = torch.autograd.grad(loop(*inputs).sum(), inputs)
    end = solved(*inputs, estimator=exact)
    with torch.inference_mode():
        one = torch.ones((), dtype=torch.float64)
        given = {"ones": torch.ones_like(end), "expanded": one.expand(3), "made there": end * 0 + 1}[cotangent]
    with torch.inference_mode(inference):
        assert_same(torch.autograd.grad(end, inputs, given), expected)


class Recording(Adjoint):
    """An estimator of somebody's own, first order, that lets autograd save the cotangent."""

    def keep(self, steps: int) -> Keep:
        return Keep(first=steps + 1)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        with torch.enable_grad():
            roots = [x.detach().requires_grad_() for x in trajectory.initial]
            total = sum((root * c).sum() for root, c in zip(roots, cotangent, strict=True))
        return Cotangents(Leaves(torch.autograd.grad(total, roots)), {})


def test_an_estimator_of_ones_own_may_record_in_inference_mode() -> None:
    assert_same(hypergradient(Recording(), inference=True), hypergradient(FirstOrder(), inference=False))


def test_backward_in_inference_mode_writes_to_grad_what_can_be_used_outside(exact: Any) -> None:
    inputs = leaves()
    value = outer(solved(*inputs, estimator=exact))
    with torch.inference_mode():
        value.backward()
    grads = [x.grad for x in inputs]
    assert_same(grads, wanted())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ hooks around a solve


def around_saved_on_cpu(task: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return task(*inputs)


def hooks_of_the_callers(task: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        return task(*inputs)


HOOKED: dict[str, Callable[..., Tensor]] = {
    "checkpoint": lambda task, inputs: checkpoint(task, *inputs, use_reentrant=False),
    "reentrant checkpoint": lambda task, inputs: checkpoint(task, *inputs, use_reentrant=True),
    "checkpoint in a checkpoint": lambda task, inputs: checkpoint(
        lambda *given: checkpoint(task, *given, use_reentrant=False), *inputs, use_reentrant=False
    ),
    "save_on_cpu": around_saved_on_cpu,
    "hooks": hooks_of_the_callers,
}


@pytest.mark.parametrize("style", HOOKED)
def test_a_task_inside_hooks_has_the_same_hypergradient(exact: Any, style: str) -> None:
    inputs = leaves()
    value = HOOKED[style](lambda *given: outer(solved(*given, estimator=exact)), inputs)
    value.backward()
    assert_same([x.grad for x in inputs], wanted())  # type: ignore[misc]


@pytest.mark.parametrize("style", [style for style in HOOKED if style != "reentrant checkpoint"])
def test_two_tasks_inside_hooks_of_their_own(exact: Any, style: str) -> None:
    inputs = leaves()
    tasks = [
        lambda *given: outer(solved(*given, estimator=exact)),
        lambda *given: solved(*given, estimator=exact).sum(),
    ]
    value = sum(HOOKED[style](task, inputs) for task in tasks)
    end = loop(*inputs)
    assert_same(torch.autograd.grad(value, inputs), torch.autograd.grad(outer(end) + end.sum(), inputs))


@pytest.mark.parametrize("estimator", [FirstOrder(), Truncated(2), Binomial(1), Krylov(2)], ids=str)
@pytest.mark.parametrize("style", HOOKED)
def test_an_estimate_inside_hooks_is_the_one_outside(estimator: Any, style: str) -> None:
    inputs = leaves()
    expected = torch.autograd.grad(
        outer(solved(*inputs, estimator=estimator)), inputs, allow_unused=True, materialize_grads=True
    )
    HOOKED[style](lambda *given: outer(solved(*given, estimator=estimator)), inputs).backward()
    assert_same([torch.zeros_like(x) if x.grad is None else x.grad for x in inputs], expected)


@pytest.mark.parametrize("style", ["checkpoint", "save_on_cpu"])
@pytest.mark.parametrize("name", [name for name in EXACT if name not in ("binomial of all", "krylov of all")])
def test_a_random_task_inside_hooks_draws_as_it_did(name: str, style: str) -> None:
    """A checkpoint draws the numbers of its forward pass again; the oracle is the plain loop inside the same hooks."""

    def noisy(w: Tensor, penalty: Tensor) -> Tensor:
        return loss(w * torch.rand(3, dtype=torch.float64), penalty)

    found = []
    for run in (lambda *given: loop(*given, of=noisy), lambda *given: solved(*given, of=noisy, estimator=EXACT[name])):
        inputs = leaves()
        torch.manual_seed(4)
        value = HOOKED[style](lambda *given, run=run: outer(run(*given)), inputs)
        torch.rand(5)
        found.append(torch.autograd.grad(value, inputs))
    assert_same(found[1], found[0])


# ------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of what its tracer looks at
@pytest.mark.parametrize("backend", sampled(["aot_eager", "eager"], 2))
@pytest.mark.parametrize("name", sampled(["default", "states", "forward", "krylov of all", "unrolled"], 2))
def test_a_compiled_outer_step_has_the_same_hypergradient(backend: str, name: str) -> None:
    torch._dynamo.reset()  # type: ignore[attr-defined]

    def step(*inputs: Tensor) -> Tensor:
        return outer(solved(*inputs, estimator=EXACT[name]) * 1.0)

    inputs = leaves()
    compiled: Any = torch.compile(step, backend=backend)
    for _ in range(2):
        assert_same(torch.autograd.grad(compiled(*inputs), inputs), wanted())
