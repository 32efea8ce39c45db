"""What an estimator claims of its numbers: exactness, inputs, linearity, and that their form does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffopt.adjoint.claims import KINDS, Kind
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import DiffoptError
from diffopt.reports import Finding
from diffopt.solve import Solution
from diffopt.testing.counting_losses import spied
from diffopt.testing.estimator_case import EstimatorCase, Sample
from diffopt.testing.findings import above, at_most, decided, holds
from diffopt.testing.problem import Point, Setting, differences, distance, flat, gradient, leaves, state_loss

CONVERGED = 150
"""Steps after which the problem no longer moves (to 1e-13)."""


def derivatives(case: EstimatorCase) -> Iterator[Finding]:
    """What an estimator returns is finite and like the inputs, in both precisions, in which it is the same."""
    yield from _derivatives(case, torch.float64)
    try:
        yield from _derivatives(case, torch.float32)
    except DiffoptError as error:
        fix = "check limits that single precision cannot keep"
        yield decided("float32: works or is refused", True, type(error).__name__, "a DiffoptError", fix)


def _derivatives(case: EstimatorCase, dtype: torch.dtype) -> Iterator[Finding]:
    seen: list[tuple[Trajectory, Cotangents]] = []
    point: Point = {kind: tuple(x.to(dtype) for x in case.point[kind]) for kind in KINDS}
    found = gradient(partial(case.setting.value, spied(case.seeded(), seen)), point, case.claims.inputs)
    name, fix = str(dtype).removeprefix("torch."), "check what pullback returns, constants made in another precision"
    yield holds(f"{name}: derivatives are finite", all(bool(g.isfinite().all()) for g in flat(found)), fix)
    if seen:
        yield holds(f"{name}: returns tensors like the inputs", _alike(*seen.pop()), fix)
    if dtype == torch.float32 and not case.claims.random:
        off = distance(found, case.found, case.claims.inputs)
        yield at_most("float32: the numbers of float64", off, max(1e-3, 10 * case.claims.tolerance), fix)


def _alike(trajectory: Trajectory, result: Cotangents) -> bool:
    """Whether what an estimator returned has the shapes and dtypes of what it is the derivative for."""
    pairs = [(term, trajectory.inputs.at(place)) for place, term in result.direct.items()]
    if result.initial is not None:
        if len(result.initial) != len(trajectory.initial):
            return False
        pairs += zip(result.initial, trajectory.initial, strict=True)
    return all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)


def steps(case: EstimatorCase) -> Iterator[Finding]:
    """The forward pass is the optimizer's, or is not."""
    solution = case.setting.solve(case.estimator, case.point)
    by_hand = case.setting.by_hand(leaves(case.point, frozenset({"init"})))
    error = max(
        float((solution.params[name] - p).detach().abs().max())
        for name, p in zip(case.setting.names, by_hand, strict=True)
    )
    if case.claims.own_steps:
        yield above("takes steps of its own", error, 1e-9, "declare own_steps=False: the solution is the optimizer's")
    else:
        yield at_most("takes the optimizer's steps", error, 1e-12, "check run(), or declare own_steps=True")


def exactness(case: EstimatorCase) -> Iterator[Finding]:
    """An exact estimator equals plain autograd through a loop; a biased one must differ from it."""
    claims, found, expected = case.claims, case.sampled, case.expected(case.setting, case.point)
    error, limit = case.error(found, expected), case.limit(found, expected)
    if claims.exact != "always":
        fix = "declare exact='always': it is, on a problem of few steps whose curvature changes"
        yield above("biased", error, limit + 9 * claims.tolerance, fix)
    else:
        fix = "check signs, dropped terms and steps; if it is not meant to be exact, declare exact='never'"
        yield at_most("exact", error, limit, fix)
    if claims.random:
        fix = "narrow the spread of the draws: it is too wide to tell a right mean from a wrong one"
        yield at_most("precise enough to test", limit, 0.9, fix)
    elif claims.exact == "always":
        setting = replace(case.setting, optimizer="adam")
        yield _exact(case, "exact with Adam", setting, "check what of the estimator is right for gradient descent only")
    if claims.exact == "at the fixed point":
        setting = replace(case.setting, steps=CONVERGED, stepped=False)
        fix = "check the system solved at the fixed point, its solver's tolerance, the terms of the last step"
        yield _exact(case, "exact at the fixed point", setting, fix)


def whole_state(case: EstimatorCase) -> Iterator[Finding]:
    """An exact estimator is so for an outer loss of the final buffers too, and for each entry of a schedule."""
    if case.claims.exact != "always" or case.claims.random:
        return
    setting, claims = case.setting, case.claims
    course = torch.linspace(0.8, 1.2, setting.steps, dtype=torch.float64)
    point: Point = {**case.point, "hyperparameters": tuple(x * course for x in case.point["hyperparameters"])}
    value = partial(setting.state_value, case.estimator)
    if claims.own_steps:
        expected = differences(value, point)
    else:
        expected = gradient(lambda point: state_loss(*setting.state_by_hand(point)), point)
    found = Sample(gradient(value, point, claims.inputs), 0.0)
    fix = "check the cotangent of buffers, and to which step the term of a schedule goes (layout.slice_at)"
    claim = "exact in the final buffers, and for schedules"
    yield at_most(claim, case.error(found, expected), case.limit(found, expected), fix)


def _exact(case: EstimatorCase, claim: str, setting: Setting, fix: str) -> Finding:
    point = setting.point(1)
    found, expected = case.sample(setting, point), case.expected(setting, point)
    return at_most(claim, case.error(found, expected), case.limit(found, expected), fix)


def inputs(case: EstimatorCase) -> Iterator[Finding]:
    """Inputs that are claimed get the same hypergradient in any company, the others exact zeros."""
    for kind in KINDS:
        if kind not in case.claims.inputs:
            yield _nothing(case, kind)
            continue
        alone = case.gradient(kinds=frozenset({kind}))
        size = max(float(x.abs().max()) for x in alone[kind])
        yield above(f"{kind}: has a hypergradient", size, 1e-9, f"check the terms of {kind}, or leave it out of inputs")
        if not case.claims.random:
            error = distance(alone, case.found, frozenset({kind}))
            fix = "check what depends on trajectory.wanted and wanted_state"
            yield at_most(f"{kind}: the same alone", error, case.claims.tolerance, fix)


def _nothing(case: EstimatorCase, kind: Kind) -> Finding:
    claim, fix = f"{kind}: gets exact zeros", f"check what is returned for {kind}, or add it to inputs"
    alone: frozenset[Kind] = frozenset({kind})
    try:
        found = [case.gradient(kinds=kinds)[kind] for kinds in (alone, case.claims.inputs | alone)]
    except DiffoptError as error:
        return decided(claim, True, type(error).__name__, "0 or a DiffoptError", fix)
    return at_most(claim, max(float(x.abs().max()) for row in found for x in row), 0.0, fix)


def forms(case: EstimatorCase) -> Iterator[Finding]:
    """One batch for all steps, copies of it for each; a number, copies of it as a schedule: the sum is the same."""
    kinds = case.claims.inputs if "args" in case.claims.inputs else case.claims.inputs - {"batches"}
    if case.claims.random or not kinds:
        return
    setting = replace(case.setting, stepped=False)
    point = setting.point(2)
    once = case.gradient(setting, point, kinds)
    copies = dict(point)
    stepped: tuple[Kind, ...] = ("batches", "hyperparameters")
    for kind in stepped:
        copies[kind] = tuple(x.expand(setting.steps, *x.shape) for x in point[kind])
    each = dict(case.gradient(case.setting, copies, kinds))
    for kind in stepped:
        each[kind] = tuple(x.sum(0) for x in each[kind])
    fix = "check to which step the direct term of a batch or a schedule goes (layout.runs_over_steps, slice_at)"
    error = distance(each, once, kinds)
    yield at_most("batches and schedules: sum to the number's own", error, case.claims.tolerance, fix)


def linearity(case: EstimatorCase) -> Iterator[Finding]:
    """A pullback is linear in the outer gradient: also where some outputs are not used, and at zero."""
    solution = case.setting.solve(case.estimator, case.point)
    shapes = [x.detach() for x in _outputs(solution)]
    generator = torch.Generator().manual_seed(3)
    dense = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in shapes]
    sparse = [torch.ones_like(x) if i == 0 else torch.zeros_like(x) for i, x in enumerate(shapes)]
    both = [2 * a - 3 * b for a, b in zip(dense, sparse, strict=True)]
    one, other, mixed, none = (_pull(case, c) for c in (dense, sparse, both, [0 * c for c in dense]))
    fix = "check constants, norms or signs of the adjoint; if it is not meant to be linear, declare linear=False"
    finite = all(bool(x.isfinite().all()) for found in (one, other, none) for x in flat(found))
    yield holds("finite where the outer loss uses nothing or one leaf", finite, "check divisions by adjoints' norms")
    parts: Point = {kind: tuple(2 * a - 3 * b for a, b in zip(one[kind], other[kind], strict=True)) for kind in KINDS}
    error = distance(mixed, parts, case.claims.inputs)
    if not case.claims.linear:
        fix = "declare linear=True: it is"
        yield above("not linear in the outer gradient", error, 10 * case.claims.tolerance, fix)
        return
    yield at_most("linear in the outer gradient", error, case.claims.tolerance, fix)
    yield at_most("zero for a zero outer gradient", max(float(x.abs().max()) for x in flat(none)), 0.0, fix)


def _outputs(solution: Solution[Any]) -> list[Tensor]:
    state = solution.state
    return [*state.params.values(), *(x for buffer in state.buffers.values() for x in buffer.values())]


def _pull(case: EstimatorCase, cotangents: list[Tensor]) -> Point:
    def value(point: Point) -> Tensor:
        outputs = _outputs(case.setting.solve(estimator, point))
        return torch.stack([(c * x).sum() for c, x in zip(cotangents, outputs, strict=True)]).sum()

    estimator = case.seeded()
    return gradient(value, case.point, case.claims.inputs)


def leaf_order(case: EstimatorCase) -> Iterator[Finding]:
    """Other names for the params, and so another order of the leaves, give the same numbers."""
    if case.claims.random:
        return
    error = distance(case.gradient(replace(case.setting, names=("z", "y", "x"))), case.found, case.claims.inputs)
    fix = "check what is done to one leaf or by position"
    yield at_most("the order of the leaves does not matter", error, case.claims.tolerance, fix)
