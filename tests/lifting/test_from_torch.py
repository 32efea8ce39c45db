"""Lifted ``torch.optim`` classes against the classes themselves, differences of them, and the native rules."""

from __future__ import annotations

import importlib.util
import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import lifted
import pytest
import torch
from cases import OPTIMIZERS, OptimizerCase, hypergradient, small_network
from every_way import Setting, TestEveryWay  # noqa: F401  # run here for the lifted rules, by the fixture below
from lifted import CASES, NATIVE, REFUSED, SHAPES, as_tensor, every_case, tensors, trained, wavy
from limits import sampled
from oracles import relative_error
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt import LiftError, from_torch
from diffopt.estimators import (
    Binomial,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.linear_solve import GMRES


def test_the_cases_cover_every_class_of_this_torch():
    assert set(lifted.classes()) <= {name for name, _ in CASES} | set(REFUSED)


@every_case
@pytest.mark.parametrize("in_tensors", [False, True], ids=["floats", "tensors"])
def test_twenty_steps_equal_the_class(name, options, in_tensors):
    kind, start, target = getattr(torch.optim, name), tensors(SHAPES, 0), torch.tensor(0.7, dtype=torch.float64)
    given = {k: as_tensor(v) if in_tensors else v for k, v in options.items()}
    solution = diffopt.solve(wavy, start, target, optimizer=from_torch(kind, **given), steps=20)
    # NAdam and ASGD keep a scalar in float32, which rounds otherwise in a product with a float64 tensor.
    allowed = 1e-6 if in_tensors and name in ("NAdam", "ASGD") else 1e-12
    assert relative_error(solution.params, trained(kind, options, start, target, 20)) < allowed


@every_case
@pytest.mark.usefixtures("float64_by_default")  # in which the classes keep scalars: differences need the digits
def test_hypergradients_equal_central_differences_of_the_class(name, options):
    kind = getattr(torch.optim, name)

    def lift(now: dict[str, Any]) -> diffopt.Optimizer:
        return from_torch(kind, **now)

    lifted.assert_as_by_differences(lift, partial(trained, kind), options, options, 7)  # RAdam changes at step 6


EXACT = [*map(Reverse, ["graph", 1, 2, "sqrt"]), Unrolled(), ForwardMode()]
BIASED = [Truncated(2), Binomial(2), Krylov(5), MultiStep(2), MultiStep(2, Binomial(1)), FirstOrder(), Reptile()]
RULES = [*EXACT, *BIASED, Implicit(GMRES(11, rtol=1e-13, throw=False))]


@pytest.mark.parametrize("rule", sampled(RULES, 3), ids=str)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in NATIVE], ids=lifted.by_case)
def test_every_rule_gives_the_numbers_of_the_native_optimizer(name, options, rule):
    # Not compared, as the dynamics differ there: Krylov below full order, whose space depends on the buffers before the
    # first step, and what Adagrad's sum starts from, which is a native buffer's start but part of a lifted first step.
    if name == "AdamW" and isinstance(rule, Implicit):
        pytest.skip("of the native one, whose decay depends on buffers that are held fixed, it is refused")
    start = tensors(SHAPES, 0)
    made = [(getattr(diffopt, name), lambda kind, **o: kind(**o)), (getattr(torch.optim, name), from_torch)]
    found = []
    for kind, lift in made:
        learned = {k: v if k == "initial_accumulator_value" else as_tensor(v) for k, v in options.items()}
        leaves = [p.clone().requires_grad_() for p in start]
        target = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        solution = diffopt.solve(wavy, leaves, target, optimizer=lift(kind, **learned), steps=5, estimator=rule)
        outer = sum(((p - 0.3).square() * p).sum() for p in solution.params)
        inputs = [*leaves, target, *lifted.numbers(learned)]
        found.append(torch.autograd.grad(outer, inputs, allow_unused=True, materialize_grads=True))
    assert relative_error(found[1], found[0]) < 1e-10


def as_case(case: OptimizerCase, kind: Any) -> OptimizerCase:
    """A case of the property tests with the lifted class in place of the native rule."""
    made = lambda **options: from_torch(kind, **options)  # noqa: E731
    return OptimizerCase(f"lifted {case.name}", made, case.step, case.learned, case.fixed, case.pair, case.buffers)


BY_NAME = {case.name: case for case in OPTIMIZERS}


LIFTED = [as_case(BY_NAME["nesterov"], torch.optim.SGD), as_case(BY_NAME["amsgrad"], torch.optim.Adam)]


@pytest.fixture(scope="module", params=LIFTED, ids=lambda case: case.name)
def setting(request):
    return Setting(request.param)


@every_case
def test_a_batch_of_tasks_from_one_start_equals_a_loop_over_them(name, options):
    kind = getattr(torch.optim, name)
    start, targets = tensors(SHAPES, 0), torch.tensor([0.7, -0.4, 1.9], dtype=torch.float64)
    # Adafactor takes the larger of two numbers, which must be the same one for all tasks
    options = {**options, "d": 1e6} if name == "Adafactor" else options
    learned = {k: as_tensor(v) for k, v in options.items()}
    leaves = [*(p.requires_grad_() for p in start), *lifted.numbers(learned)]

    def outer(target: Tensor) -> Tensor:
        solution = diffopt.solve(wavy, start, target, optimizer=from_torch(kind, **learned), steps=7)
        return torch.stack([(p * (p - target)).sum() for p in solution.params]).sum()

    batched, single = vmap(outer)(targets), torch.stack([outer(target) for target in targets])
    assert relative_error([batched], [single]) < 1e-12
    zeros = {"allow_unused": True, "materialize_grads": True}
    got, expected = (torch.autograd.grad(x.square().sum(), leaves, **zeros) for x in (batched, single))
    # a float32 scalar's derivative is rounded to float32 for each task, or for their sum
    assert relative_error(got, expected) < (1e-6 if name in ("NAdam", "ASGD") else 1e-11)


@every_case
@pytest.mark.parametrize("estimator", sampled([Reverse(), ForwardMode(), Reverse(1), Unrolled()], 2), ids=str)
def test_hypergradients_are_finite_where_the_gradient_is_exactly_zero(name, options, estimator):
    learned = {k: as_tensor(v) if k == "lr" else v for k, v in options.items() if k != "eps"}
    optimizer = from_torch(getattr(torch.optim, name), **learned)
    assert all(g.isfinite().all() for g in lifted.with_a_dead_feature(optimizer, estimator, learned["lr"]))


def test_the_page_says_of_every_class_whether_it_lifts(checkout: Path):
    """The table of docs/optimizers.md, row by row, against what happens."""
    page = (checkout / "docs" / "optimizers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \| (.*?) \|", page, flags=re.MULTILINE)
    assert {name for name, _, _ in rows} >= set(lifted.classes())
    for name, lifts, learnable in rows:
        if not hasattr(torch.optim, name):
            continue
        kind = getattr(torch.optim, name)
        assert (lifts == "yes") == (name not in REFUSED)
        if lifts == "no":
            with pytest.raises(LiftError, match=f"{name} cannot be lifted"):
                from_torch(kind)
            continue
        defaults = {k: p.default for k, p in inspect.signature(kind).parameters.items()}
        scalars = {k for k, v in defaults.items() if type(v) in (int, float, tuple)} | {"lr"} & set(defaults)
        assert set(re.findall(r"`(\w+)`", learnable)) == scalars, name
        assert (name in NATIVE) == (f"`diffopt.{name}` is faster" in page)
        scalar = torch.tensor(0.9, requires_grad=True)
        from_torch(kind, **{k: (scalar,) * 2 if isinstance(defaults[k], tuple) else scalar for k in sorted(scalars)})


def test_the_programs_of_the_page_run(checkout: Path):
    page = (checkout / "docs" / "optimizers.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        if "import torchopt" not in block or importlib.util.find_spec("torchopt") is not None:
            exec(compile(block, "optimizers.md", "exec"), names)
    assert names["lr"].grad.isfinite()
    assert names["decay"]["w"].grad.isfinite()
    names["solution"].params["w"].sum().backward()
    assert names["solution"].losses[-1] < names["solution"].losses[0]


def test_batches_for_each_step():
    case = as_case(BY_NAME["adamw"], torch.optim.AdamW)
    problem = small_network(seed=5, steps=5)
    got, expected = (hypergradient(problem, c, 5, Reverse(2)) for c in (case, BY_NAME["adamw"]))
    assert relative_error(got, expected) < 1e-10
