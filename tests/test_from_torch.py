"""Lifted ``torch.optim`` classes against the classes themselves, differences of them, and the native rules."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, OptimizerCase, hypergradient, small_network
from oracles import relative_error
from test_composition import Setting, TestEveryWay  # noqa: F401  # run here for the lifted rules, by the fixture below
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt import LiftError, Schedule, from_torch
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

# Adam-like rules get a large eps: with the usual 1e-8 their first step is a sign step, whose derivative is round-off.
ADAM = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 0.05, "weight_decay": 0.03}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.02, "momentum": 0.7, "nesterov": True, "maximize": True}),
    ("Adam", ADAM),
    ("Adam", {**ADAM, "amsgrad": True, "maximize": True}),
    ("AdamW", ADAM),
    ("NAdam", {**ADAM, "momentum_decay": 0.02}),
    ("NAdam", {**ADAM, "decoupled_weight_decay": True, "maximize": True}),
    ("RAdam", ADAM),
    ("Adamax", ADAM),
    ("Adadelta", {"lr": 0.7, "rho": 0.8, "eps": 0.05, "weight_decay": 0.03}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 0.05}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.7, "eps": 0.05, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.7, "eps": 0.1, "centered": True, "momentum": 0.6, "maximize": True}),
    ("ASGD", {"lr": 0.05, "lambd": 0.02, "alpha": 0.6, "weight_decay": 0.03}),
    ("ASGD", {"lr": 0.05, "t0": 2.0}),
    ("Rprop", {"lr": 0.02, "etas": (0.4, 1.3), "step_sizes": (1e-3, 0.3)}),
    ("Adafactor", {"lr": 0.05, "beta2_decay": -0.7, "eps": (None, 0.02), "d": 1.2, "weight_decay": 0.03}),
]
NATIVE = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"]
REFUSED = ["LBFGS", "SparseAdam", "Muon"]
SHAPES = [(3, 2), (4,), ()]


def by_case(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items() if k != "betas")


every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=by_case)


def classes() -> list[str]:
    """Every optimizer class that this torch has."""
    found = [k for k, v in vars(torch.optim).items() if inspect.isclass(v) and issubclass(v, torch.optim.Optimizer)]
    return sorted(set(found) - {"Optimizer"})


def tensors(shapes: Sequence[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def wavy(params: Sequence[Tensor], target: Tensor) -> Tensor:
    """A loss whose gradient changes sign on the way."""
    return sum(((p - target).square().mul(0.5).add((3 * p).cos()).sum() for p in params), target.new_zeros(()))


def trained(kind: Any, options: dict[str, Any], start: list[Tensor], target: Tensor, steps: int) -> list[Tensor]:
    """The class itself, in the usual loop."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in start]
    optimizer = kind(params, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        wavy(params, target).backward()
        optimizer.step()
    return [p.detach() for p in params]


def test_the_cases_cover_every_class_of_this_torch():
    assert set(classes()) <= {name for name, _ in CASES} | set(REFUSED)


@every_case
def test_twenty_steps_equal_the_class(name, options):
    kind, start, target = getattr(torch.optim, name), tensors(SHAPES, 0), torch.tensor(0.7, dtype=torch.float64)
    solution = diffopt.solve(wavy, start, target, optimizer=from_torch(kind, **options), steps=20)
    assert relative_error(solution.params, trained(kind, options, start, target, 20)) < 1e-12


@every_case
def test_twenty_steps_with_every_number_as_a_tensor_equal_the_class(name, options):
    kind, start, target = getattr(torch.optim, name), tensors(SHAPES, 0), torch.tensor(0.7, dtype=torch.float64)
    learned = {k: as_tensor(v) for k, v in options.items()}
    solution = diffopt.solve(wavy, start, target, optimizer=from_torch(kind, **learned), steps=20)
    # NAdam and ASGD keep a scalar in float32, which rounds otherwise in a product with a float64 tensor.
    allowed = 1e-6 if name in ("NAdam", "ASGD") else 1e-12
    assert relative_error(solution.params, trained(kind, options, start, target, 20)) < allowed


def as_tensor(value: Any) -> Any:
    """Every float in it as a tensor that is learned."""
    if isinstance(value, tuple):
        return tuple(map(as_tensor, value))
    return torch.tensor(value, dtype=torch.float64, requires_grad=True) if isinstance(value, float) else value


@pytest.fixture
def scalars_in_float64():
    """The classes keep scalars in the default dtype; differences need the digits of float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every_case
@pytest.mark.usefixtures("scalars_in_float64")
def test_hypergradients_equal_central_differences_of_the_class(name, options):
    kind, steps = getattr(torch.optim, name), 7  # RAdam changes its formula at step 6
    start, direction, weights = (tensors(SHAPES, seed) for seed in (0, 1, 2))
    flat = {f"{k}[{i}]": x for k, v in options.items() for i, x in enumerate(v if isinstance(v, tuple) else (v,))}
    point = {"start": 0.0, "target": 0.7, **{k: x for k, x in flat.items() if isinstance(x, float)}}

    def outer(final: Sequence[Tensor]) -> Tensor:
        return torch.stack([(w * p).sum() + p.square().sum() for w, p in zip(weights, final, strict=True)]).sum()

    def made(values: dict[str, Any]) -> tuple[list[Tensor], Any, dict[str, Any]]:
        moved = [p + values["start"] * d for p, d in zip(start, direction, strict=True)]
        now = {
            k: tuple(values.get(f"{k}[{i}]", x) for i, x in enumerate(v))
            if isinstance(v, tuple)
            else values.get(f"{k}[0]", v)
            for k, v in options.items()
        }
        return moved, values["target"], now

    def value(**changed: float) -> float:
        moved, target, now = made({**point, **changed})
        return float(outer(trained(kind, now, moved, torch.tensor(target), steps)))

    leaves = {k: torch.tensor(v, requires_grad=True) for k, v in point.items()}
    moved, target, now = made(leaves)
    solution = diffopt.solve(wavy, moved, target, optimizer=from_torch(kind, **now), steps=steps)
    got = torch.autograd.grad(outer(solution.params), list(leaves.values()), allow_unused=True, materialize_grads=True)
    for (key, at), derivative in zip(point.items(), got, strict=True):
        errors = []
        # Five points: truncation h^4 = 2e-15 and cancellation 1e-16 / h = 1e-12, times higher derivatives. The smaller
        # step is for Adamax, where a maximum has its kink within the larger one.
        for h in (2e-4, 1e-5):
            near, far = (value(**{key: at + x}) - value(**{key: at - x}) for x in (h, 2 * h))
            difference = (8 * near - far) / (12 * h)
            errors.append(abs(float(derivative) - difference) / (1 + abs(difference)))
        assert min(errors) < 1e-8, key


RULES = [
    Reverse("graph"),
    Reverse(1),
    Reverse(2),
    Reverse("sqrt"),
    Unrolled(),
    ForwardMode(),
    Truncated(2),
    Binomial(2),
    Krylov(5),
    MultiStep(2),
    MultiStep(2, Binomial(1)),
    Implicit(GMRES(11, rtol=1e-13, throw=False)),
    FirstOrder(),
    Reptile(),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in NATIVE], ids=by_case)
def test_every_rule_gives_the_numbers_of_the_native_optimizer(name, options, rule):
    # Not compared, as the dynamics differ there: Krylov below full order, whose space depends on the buffers before the
    # first step, and what Adagrad's sum starts from, which is a native buffer's start but part of a lifted first step.
    start = tensors(SHAPES, 0)
    made = [(getattr(diffopt, name), lambda kind, **o: kind(**o)), (getattr(torch.optim, name), from_torch)]
    found = []
    for kind, lift in made:
        learned = {k: v if k == "initial_accumulator_value" else as_tensor(v) for k, v in options.items()}
        leaves = [p.clone().requires_grad_() for p in start]
        target = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        hypers = [x for v in learned.values() for x in (v if isinstance(v, tuple) else (v,)) if isinstance(x, Tensor)]
        solution = diffopt.solve(wavy, leaves, target, optimizer=lift(kind, **learned), steps=5, estimator=rule)
        outer = sum(((p - 0.3).square() * p).sum() for p in solution.params)
        found.append(torch.autograd.grad(outer, [*leaves, target, *hypers], allow_unused=True, materialize_grads=True))
    assert relative_error(found[1], found[0]) < 1e-10


def lifted(case: OptimizerCase, kind: Any) -> OptimizerCase:
    """A case of the property tests with the lifted class in place of the native rule."""
    made = lambda **options: from_torch(kind, **options)  # noqa: E731
    return OptimizerCase(f"lifted {case.name}", made, case.step, case.learned, case.fixed, case.pair, case.buffers)


BY_NAME = {case.name: case for case in OPTIMIZERS}


@pytest.fixture(
    scope="module",
    params=[lifted(BY_NAME["nesterov"], torch.optim.SGD), lifted(BY_NAME["amsgrad"], torch.optim.Adam)],
    ids=lambda case: case.name,
)
def setting(request):
    made = Setting(request.param)
    made.rows = made.expected()
    return made


@every_case
def test_a_batch_of_tasks_from_one_start_equals_a_loop_over_them(name, options):
    kind = getattr(torch.optim, name)
    start, targets = tensors(SHAPES, 0), torch.tensor([0.7, -0.4, 1.9], dtype=torch.float64)
    # Adafactor takes the larger of two numbers, which must be the same one for all tasks
    options = {**options, "d": 1e6} if name == "Adafactor" else options
    learned = {k: as_tensor(v) for k, v in options.items()}
    hypers = [x for v in learned.values() for x in (v if isinstance(v, tuple) else (v,)) if isinstance(x, Tensor)]
    leaves = [*(p.requires_grad_() for p in start), *hypers]

    def outer(target: Tensor) -> Tensor:
        solution = diffopt.solve(wavy, start, target, optimizer=from_torch(kind, **learned), steps=7)
        return torch.stack([(p * (p - target)).sum() for p in solution.params]).sum()

    batched, single = vmap(outer)(targets), torch.stack([outer(target) for target in targets])
    assert relative_error([batched], [single]) < 1e-12
    got, expected = (
        torch.autograd.grad(x.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        for x in (batched, single)
    )
    # a float32 scalar's derivative is rounded to float32 for each task, or for their sum
    assert relative_error(got, expected) < (1e-6 if name in ("NAdam", "ASGD") else 1e-11)


@every_case
@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled(), ForwardMode()], ids=str)
def test_hypergradients_are_finite_where_the_gradient_is_exactly_zero(name, options, estimator):
    inputs = torch.tensor([[0.0, 1.0], [0.0, -2.0], [0.0, 0.5]], dtype=torch.float64)  # the first feature is dead
    start = torch.tensor([0.0, 0.4], dtype=torch.float64, requires_grad=True)
    learned = {k: as_tensor(v) if k == "lr" else v for k, v in options.items() if k != "eps"}
    solution = diffopt.solve(
        lambda w, x: (x @ w - 1).square().mean(),
        start,
        inputs,
        optimizer=from_torch(getattr(torch.optim, name), **learned),
        steps=4,
        estimator=estimator,
    )
    assert all(g.isfinite().all() for g in torch.autograd.grad(solution.params.sum(), [start, learned["lr"]]))


class Ordinary(torch.optim.Optimizer):
    """A third-party Adam with decoupled decay, in the style of most of them."""

    def __init__(self, params, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0):
        if lr < 0:
            raise ValueError(f"negative lr {lr}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad.data, self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p.data)
                    state["exp_avg_sq"] = torch.zeros_like(p.data)
                    state["previous"] = p.detach().clone()
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                beta1, beta2 = group["betas"]
                state["step"] += 1
                mean.mul_(beta1).add_(grad, alpha=1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denom = square.sqrt().add_(group["eps"])
                size = group["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                if group["weight_decay"] != 0:
                    p.data.mul_(1 - group["lr"] * group["weight_decay"])
                inertia = p.data - state["previous"]
                state["previous"].copy_(p.data)
                p.data.addcdiv_(mean, denom, value=-size)
                p.data = p.data.add(inertia, alpha=0.1)


def ordinary_by_hand(start, target, lr, beta1, decay, steps):
    now, previous = list(start), list(start)
    mean, square = [0.0] * len(now), [0.0] * len(now)
    for t in range(1, steps + 1):
        grads = torch.autograd.grad(wavy(now, target), now, create_graph=True)
        for i, (p, g) in enumerate(zip(list(now), grads, strict=True)):
            mean[i] = beta1 * mean[i] + (1 - beta1) * g
            square[i] = 0.99 * square[i] + 0.01 * g**2
            p = p * (1 - lr * decay)
            inertia, previous[i] = p - previous[i], p
            scale = lr * (1 - 0.99**t) ** 0.5 / (1 - beta1**t)
            now[i] = p - scale * mean[i] / (square[i].sqrt() + 0.05) + 0.1 * inertia
    return now


@pytest.mark.parametrize("rule", [Reverse("graph"), Reverse(1), Unrolled(), ForwardMode()], ids=str)
def test_a_class_written_by_someone_else(rule):
    start = [p.requires_grad_() for p in tensors(SHAPES, 0)]
    target, lr, beta1, decay = leaves = [
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.1, 0.8, 0.0)
    ]
    optimizer = from_torch(Ordinary, lr=lr, betas=(beta1, 0.99), eps=0.05, weight_decay=decay)
    solution = diffopt.solve(wavy, start, target, optimizer=optimizer, steps=6, estimator=rule)
    expected = ordinary_by_hand(start, target, lr, beta1, decay, 6)
    assert relative_error(solution.params, expected) < 1e-13
    got, reference = (
        torch.autograd.grad(sum(p.square().sum() for p in x), [*start, *leaves]) for x in (solution.params, expected)
    )
    assert relative_error(got, reference) < 1e-11


class TestHyperparameters:
    """The forms that a hyperparameter may have."""

    @property
    def params(self):
        return {"a": tensors([(2, 1, 2)], 3)[0], "b": tensors([(3,)], 4)[0]}  # an axis of length 1 within

    @staticmethod
    def loss(p):
        return (p["a"].square().sum() + 1) * (p["b"].sin().sum() + 4)

    def both(self, native, lifted, leaves, steps=4, rule=None):
        found = []
        for optimizer in (native, lifted):
            solution = diffopt.solve(self.loss, self.params, optimizer=optimizer, steps=steps, estimator=rule)
            outer = solution.params["a"].square().sum() + solution.params["b"].sum()
            found.append([outer, *torch.autograd.grad(outer, leaves)])
        assert relative_error(found[1], found[0]) < 1e-11

    @staticmethod
    def leaf(*shape):
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.rand(shape, generator=generator, dtype=torch.float64).mul(0.1).add(0.05).requires_grad_()

    @pytest.mark.parametrize("rule", [Reverse(1), Unrolled(), ForwardMode()], ids=str)
    def test_one_for_each_coordinate_and_one_for_each_leaf(self, rule):
        lr, decay = {"a": self.leaf(2, 1, 2), "b": self.leaf(3)}, {"a": self.leaf(), "b": 0.2}
        leaves = [*lr.values(), decay["a"]]
        options = {"lr": lr, "weight_decay": decay}
        self.both(diffopt.SGD(**options), from_torch(torch.optim.SGD, **options), leaves, rule=rule)
        options = {**options, "eps": 0.05}
        self.both(diffopt.AdamW(**options), from_torch(torch.optim.AdamW, **options), leaves, rule=rule)

    def test_an_option_that_only_the_constructor_reads_may_differ_from_leaf_to_leaf(self):
        start = {"a": self.leaf(2, 1, 2), "b": self.leaf()}
        options = {"lr": 0.1, "initial_accumulator_value": start}
        self.both(diffopt.Adagrad(**options), from_torch(torch.optim.Adagrad, **options), list(start.values()))

    @pytest.mark.parametrize("rule", [Reverse(2), Unrolled(), MultiStep(2)], ids=str)
    def test_schedules(self, rule):
        rates, per_leaf = self.leaf(4), {"a": self.leaf(4), "b": self.leaf(4, 3)}
        momentum = Schedule([0.5, 0.6, 0.0, 0.8])
        options = {"lr": Schedule(rates), "momentum": momentum, "weight_decay": Schedule(per_leaf)}
        leaves = [rates, *per_leaf.values()]
        self.both(diffopt.SGD(**options), from_torch(torch.optim.SGD, **options), leaves, rule=rule)

    @pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
    def test_a_learned_zero_has_a_derivative(self, name):
        zero = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        options = {"lr": 0.1, "weight_decay": zero}
        native, lifted = getattr(diffopt, name)(**options), from_torch(getattr(torch.optim, name), **options)
        self.both(native, lifted, [zero])

    def test_a_misfit_is_named_by_the_option(self):
        pair = (torch.tensor(0.9), {"a": torch.ones(5, dtype=torch.float64), "b": 0.9})
        optimizer = from_torch(torch.optim.Adam, betas=pair)
        with pytest.raises(diffopt.ShapeError, match=r"betas\[1\]\['a'\] has shape"):
            diffopt.solve(self.loss, self.params, optimizer=optimizer, steps=1)

    def test_it_says_what_it_is(self):
        assert repr(from_torch(torch.optim.SGD, lr=0.1, nesterov=True, momentum=0.5)) == (
            "from_torch(SGD, lr=0.1, nesterov=True, momentum=0.5)"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["SGD", "NAdam", "Adagrad", "Rprop", "Adafactor"])
def test_other_dtypes_and_shapes(name, dtype):
    kind, start = getattr(torch.optim, name), tensors([(2, 3, 1, 2), (), (1,)], 0, dtype)
    start.append(tensors([(3,)], 1)[0])  # of float64, beside the others
    target = torch.tensor(0.7, dtype=dtype)
    solution = diffopt.solve(wavy, start, target, optimizer=from_torch(kind, lr=0.01), steps=4)
    assert [p.dtype for p in solution.params] == [p.dtype for p in start]
    expected = trained(kind, {"lr": 0.01}, start, target, 4)
    # some tens of roundings
    assert relative_error(solution.params, expected) < 64 * torch.finfo(dtype).eps
    assert relative_error(solution.params[-1:], expected[-1:]) < 1e-6 + 64 * torch.finfo(dtype).eps


class TestNothingIsShared:
    """A lifted optimizer is a value: what one solve does is unknown to the next."""

    def run(self, optimizer):
        return diffopt.solve(
            wavy, tensors(SHAPES, 0), torch.tensor(0.7, dtype=torch.float64), optimizer=optimizer, steps=5
        )

    @pytest.mark.parametrize("name", ["SGD", "NAdam", "Adagrad", "ASGD"])
    def test_solves_do_not_see_each_other(self, name):
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = from_torch(getattr(torch.optim, name), lr=0.1, **options)
        first = self.run(optimizer)
        with torch.no_grad():
            for x in [*first.params, *(x for buffer in first.state.buffers.values() for x in buffer)]:
                x.mul_(3)
        vmap(lambda t: diffopt.solve(wavy, [t.cos()], t, optimizer=optimizer, steps=2).params[0])(torch.ones(3))
        second, fresh = self.run(optimizer), self.run(from_torch(getattr(torch.optim, name), lr=0.1, **options))
        assert all(torch.equal(a, b) for a, b in zip(second.params, fresh.params, strict=True))

    def test_inputs_and_random_numbers_are_left_alone(self):
        start, lr = tensors(SHAPES, 0), torch.tensor(0.1, dtype=torch.float64)
        before, state = [p.clone() for p in start], torch.get_rng_state()
        optimizer = from_torch(torch.optim.Adam, lr=lr, eps=0.0123)
        solution = diffopt.solve(wavy, start, lr, optimizer=optimizer, steps=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(start, before, strict=True))
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(start, solution.params, strict=True))
        assert float(lr) == 0.1

    def test_it_can_be_made_under_every_mode_and_transform(self):
        kind = torch.optim.Adam

        def final(lr):
            optimizer = from_torch(kind, lr=lr, eps=0.0321)
            return diffopt.solve(lambda w: w.pow(4).sum(), torch.ones(2).double(), optimizer=optimizer, steps=2).params

        lr = torch.tensor(0.1, dtype=torch.float64)
        expected = torch.autograd.functional.jacobian(final, lr)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            from_torch(kind, lr=0.1, eps=0.0111)
        with torch.inference_mode():
            from_torch(kind, lr=0.1, eps=0.0222)
        with torch.device("meta"):
            from_torch(kind, lr=0.1, eps=0.0333)
        assert relative_error([torch.func.jacrev(final)(lr)], [expected]) < 1e-13
        assert relative_error([vmap(torch.func.jacrev(final))(lr.expand(3))[2]], [expected]) < 1e-13


class Doing(torch.optim.Optimizer):
    """An optimizer that does something unusual in its step; subclasses say what."""

    def __init__(self, params, lr=0.1, factor=0.9):
        super().__init__(params, {"lr": lr, "factor": factor})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.one(p, p.grad, self.state[p], group)


class CountsInAnAttribute(Doing):
    count = 0

    def one(self, p, g, state, group):
        self.count += 1
        p.add_(g, alpha=-group["lr"] * (0.1 if self.count > 100 else 1))


class KeepsAList(Doing):
    def one(self, p, g, state, group):
        state.setdefault("history", []).append(g)
        p.add_(sum(state["history"]), alpha=-group["lr"])


class KeepsWhatNoParameterHas(Doing):
    def one(self, p, g, state, group):
        self.state["all"]["best"] = g.norm()
        p.sub_(group["lr"] * g)


class ChangesAView(Doing):
    def one(self, p, g, state, group):
        p.view(-1)[0].sub_(group["lr"])
        p.sub_(group["lr"] * g)


class ReadsAnOldView(Doing):
    def one(self, p, g, state, group):
        flat = p.view(-1)
        p.sub_(group["lr"] * g)
        p.sub_(0.1 * flat.sum())


class MakesANumber(Doing):
    def one(self, p, g, state, group):
        p.sub_(g, alpha=group["lr"] / (1 + float(g.norm())))


class LeavesTorch(Doing):
    def one(self, p, g, state, group):
        p.sub_(torch.from_numpy(g.numpy() * group["lr"]))


class DrawsNoise(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * (g + torch.randn_like(g)))


class NeedsAClosure(Doing):
    def step(self, closure):
        closure()


class RunsForeach(Doing):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            torch._foreach_add_(group["params"], [p.grad for p in group["params"]], alpha=-group["lr"])


class UsesLowPrecision(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * g.bfloat16().to(p.dtype))


class Cut(torch.autograd.Function):
    """The identity with a wrong derivative."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * 0


class HasAWrongDerivative(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * Cut.apply(g))


class HasNoDerivativeAtZero(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * g / (g.square().pow(0.25) + 1))


class MakesStateLate(Doing):
    def one(self, p, g, state, group):
        state["n"] = state.get("n", 0) + 1
        if state["n"] == 3:
            state["slow"] = p.clone()
        p.sub_(group["lr"] * g)


CALLS = torch.zeros(())


class ChangesATensorOfTheModule(Doing):
    def one(self, p, g, state, group):
        CALLS.add_(1)
        p.sub_(group["lr"] * g)


class GoesPastOverrides(Doing):
    def one(self, p, g, state, group):
        p.set_(p - group["lr"] * g)


class Branches(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * (g if g.norm() > 1 else 2 * g))


STRANGE = {
    CountsInAnAttribute: "its attribute 'count' changes from step to step",
    KeepsAList: r"it keeps 'history', which is \[",
    KeepsWhatNoParameterHas: "state that belongs to no parameter",
    ChangesAView: r"changes a view of another tensor in place \(sub\)",
    ReadsAnOldView: "reads a view of a tensor that was changed in place",
    MakesANumber: "makes a Python number of a tensor .__float__",
    LeavesTorch: "makes a Python number of a tensor .numpy",
    DrawsNoise: "draws random numbers",
    NeedsAClosure: "its step raises TypeError: .*closure",
    RunsForeach: "calls torch._foreach_add_.*foreach=False",
    UsesLowPrecision: "its derivative by .* is .* and by differences",
    HasAWrongDerivative: "its derivative by the initial parameters is 0, and by differences",
    MakesStateLate: "it keeps 'slow', only after its first step",
    ChangesATensorOfTheModule: r"changes a tensor in place \(add\) that is neither a parameter nor state",
    GoesPastOverrides: "it differs from the original by",
    HasNoDerivativeAtZero: "derivative is NaN or infinite where a coordinate's gradient is always zero",
}


@pytest.mark.parametrize(("kind", "message"), STRANGE.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_cannot_be_lifted_is_refused_by_its_reason(kind, message):
    depth = torch._C._len_torch_function_stack()
    with pytest.raises(LiftError, match=rf"^{kind.__name__} cannot be lifted: .*{message}") as error:
        from_torch(kind, lr=0.1)
    assert len(str(error.value)) < 300
    assert "diffopt.Optimizer" in str(error.value)
    assert torch._C._len_torch_function_stack() == depth, "a mode was left on"
    assert torch.is_grad_enabled()


def test_a_branch_is_refused_only_where_tasks_part():
    optimizer = from_torch(Branches, lr=0.1)

    def final(scale):
        loss = lambda w, s: s * w.square().sum()  # noqa: E731
        return diffopt.solve(loss, torch.ones(2), scale, optimizer=optimizer, steps=1).params

    assert relative_error([vmap(final)(torch.tensor([1.0, 2.0]))[1]], [final(torch.tensor(2.0))]) < 1e-7
    with pytest.raises(LiftError, match="branches on a number in which the tasks of a vmap differ"):
        vmap(final)(torch.tensor([0.1, 2.0]))
    assert torch._C._len_torch_function_stack() == 0


class ChangesLater(Doing):
    def one(self, p, g, state, group):
        state["n"] = state.get("n", 0) + 1
        if state["n"] == 12:
            getattr(self, group["where"])(p, state, group)
        p.sub_(group["lr"] * g)

    def makes_state(self, p, state, group):
        state["slow"] = p.clone()

    def changes_its_group(self, p, state, group):
        group["lr"] = group["lr"] * 0.1

    def changes_an_attribute(self, p, state, group):
        self.warm = True

    def __init__(self, params, lr=0.1, where="makes_state"):
        super().__init__(params, lr)
        self.param_groups[0]["where"] = where


@pytest.mark.parametrize(
    ("where", "what"),
    [("makes_state", "slow"), ("changes_its_group", "lr"), ("changes_an_attribute", "warm")],
)
def test_what_changes_only_after_the_check_is_refused_when_it_does(where, what):
    optimizer = from_torch(ChangesLater, where=where)
    run = lambda steps: diffopt.solve(lambda w: w.square().sum(), torch.ones(2), optimizer=optimizer, steps=steps)  # noqa: E731
    run(11)
    with pytest.raises(LiftError, match=f"'{what}' only some steps after its first"):
        run(12)


class NoGradInside(Doing):
    def one(self, p, g, state, group):
        with torch.no_grad():
            move = g * group["lr"]
        p.data[...] = p.data - move


class ClipsByItsNorm(Doing):
    def one(self, p, g, state, group):
        torch.nn.utils.clip_grad_norm_([p], 0.5)
        p.sub_(group["lr"] * p.grad)


class DecaysAnOptionOfItsGroup(Doing):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["factor"] = group["factor"] * 0.8
            group["k"] = group.get("k", 0) + 1

    def one(self, p, g, state, group):
        p.sub_(group["lr"] * group["factor"] * g / (1 + group.get("k", 0)))


class AveragesInPlace(Doing):
    def one(self, p, g, state, group):
        if "slow" not in state:
            state["slow"], state["scale"], state["on"] = p.clone(), 1.0, True
        p -= group["lr"] * g * state["scale"]
        state["scale"] = state["scale"] * 0.9
        state["slow"].lerp_(p, 0.5)
        p.copy_(state["slow"])


class MixesLeavesByItem(Doing):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            norm = torch.stack([p.grad.square().sum() for p in group["params"]]).sum().sqrt().item()
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] / (1 + norm))


LIFTABLE = [NoGradInside, ClipsByItsNorm, DecaysAnOptionOfItsGroup, AveragesInPlace, MixesLeavesByItem]


@pytest.mark.parametrize("kind", LIFTABLE, ids=lambda kind: kind.__name__)
def test_ways_of_writing_a_step_that_lift(kind):
    start, target = tensors(SHAPES, 0), torch.tensor(0.7, dtype=torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    solution = diffopt.solve(wavy, start, target, optimizer=from_torch(kind, lr=lr), steps=12)
    assert relative_error(solution.params, trained(kind, {"lr": 0.1}, start, target, 12)) < 1e-12

    def outer(final):
        return torch.stack([p.square().sum() for p in final]).sum()

    (got,) = torch.autograd.grad(outer(solution.params), lr)
    h = 1e-4
    value = {x: float(outer(trained(kind, {"lr": 0.1 + x * h}, start, target, 12))) for x in (-2, -1, 1, 2)}
    difference = (8 * (value[1] - value[-1]) - (value[2] - value[-2])) / (12 * h)
    assert abs(float(got) - difference) < 1e-7 * (1 + abs(difference))


class KeepsAScalar(Doing):
    def one(self, p, g, state, group):
        if "scale" not in state:
            state["scale"] = torch.ones((), dtype=p.dtype)
        state["scale"].mul_(1 - group["lr"])
        p.sub_(group["lr"] * state["scale"] * g)


def test_an_option_for_each_coordinate_that_does_not_fit_the_state():
    lr = {"a": torch.full((2, 3), 0.1)}
    with pytest.raises(LiftError, match=r"of shape \(\) in place into one of \(2, 3\)"):
        diffopt.solve(
            lambda p: p["a"].square().sum(), {"a": torch.ones(2, 3)}, optimizer=from_torch(KeepsAScalar, lr=lr), steps=2
        )


class WithMath(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * g, alpha=__import__("math").sqrt(1 - group["factor"]))


def test_an_option_that_cannot_be_learned_can_still_be_given_as_a_number():
    lr = torch.tensor(0.1, requires_grad=True)
    assert "factor=0.8" in repr(from_torch(WithMath, lr=lr, factor=0.8))
    with pytest.raises(LiftError, match="makes a Python number"):
        from_torch(WithMath, lr=lr, factor=lr)


BAD = [
    (lambda: from_torch(torch.optim.LBFGS), LiftError, "LBFGS cannot be lifted: it evaluates the loss itself"),
    (lambda: from_torch(type("Mine", (torch.optim.LBFGS,), {})), LiftError, "Mine cannot be lifted: it evaluates"),
    (lambda: from_torch(torch.optim.SparseAdam, lr=0.1), LiftError, "sparse gradients.*diffopt.Adam"),
    (lambda: from_torch(torch.optim.Adam, foreach=True), diffopt.HyperparameterError, "Adam: foreach=True has no mean"),
    (lambda: from_torch(torch.optim.Adam, fused=True), diffopt.HyperparameterError, "a fused kernel has no derivative"),
    (lambda: from_torch(torch.optim.Adam, capturable=True), diffopt.HyperparameterError, "capturable=True.*omit it"),
    (lambda: from_torch(torch.optim.SGD, lr=0.1, differentiable=True), diffopt.HyperparameterError, "always is"),
    (lambda: from_torch(torch.optim.SGD, lr=-0.1), diffopt.HyperparameterError, "SGD: Invalid learning rate: -0.1"),
    (lambda: from_torch(torch.optim.SGD, leraning_rate=1), diffopt.HyperparameterError, "SGD: .*leraning_rate"),
    (lambda: from_torch(torch.optim.Adam, params=[]), diffopt.HyperparameterError, "params go to solve"),
    (lambda: from_torch(torch.optim.Adam, betas=(0.9,)), diffopt.HyperparameterError, "Adam: "),
    (lambda: from_torch(torch.optim.SGD, lr="fast"), diffopt.HyperparameterError, "SGD: "),
    (lambda: from_torch(torch.optim.SGD, lr={1, 2}), diffopt.HyperparameterError, "lr is set .*expected a number"),
    (lambda: from_torch(torch.optim.SGD([torch.ones(1)])), diffopt.OptimizerError, "expected an optimizer class"),
    (lambda: from_torch(diffopt.SGD), diffopt.OptimizerError, "expected an optimizer class"),
    (lambda: from_torch("Adam"), diffopt.OptimizerError, "expected an optimizer class"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert len(str(raised.value)) < 300


def test_muon_is_refused():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    with pytest.raises(LiftError, match="Muon cannot be lifted: it rounds to bfloat16"):
        from_torch(torch.optim.Muon)


class TestTheCheck:
    """The check at construction finds what it is there for: each of these is a lift that went wrong."""

    def refused(self, monkeypatch, rule, function, kind, match, **options):
        from diffopt import pure

        monkeypatch.setitem(pure._RULES, rule, function)
        with pytest.raises(LiftError, match=match):
            from_torch(kind, lr=0.0777, **options)

    def test_values(self, monkeypatch):
        wrong = lambda x, a, b, *, value=1: x + value * (a / (b + 1e-6))  # noqa: E731
        self.refused(monkeypatch, "addcdiv", wrong, torch.optim.Adam, "differs from the original by .*use diffopt.Adam")

    def test_the_first_momentum_buffer(self, monkeypatch):
        cut = lambda x, **options: x.detach()  # noqa: E731
        self.refused(monkeypatch, "clone", cut, torch.optim.SGD, "its derivative by the ", momentum=0.9)

    def test_the_root_at_zero(self, monkeypatch):
        self.refused(monkeypatch, "sqrt", torch.sqrt, torch.optim.Adam, "NaN or infinite where a coordinate")

    def test_a_learned_option(self, monkeypatch):
        wrong = lambda x, y, alpha=1: x + (alpha.detach() if isinstance(alpha, Tensor) else alpha) * y  # noqa: E731
        decay = torch.tensor(0.1, requires_grad=True)
        self.refused(monkeypatch, "add", wrong, torch.optim.Adam, "derivative by weight_decay is", weight_decay=decay)

    def test_a_batch(self, monkeypatch):
        from diffopt import transforms

        def wrong(x):
            shared = transforms.plain(x).sum() if transforms.transforms_active() else 0.0
            return torch.where(x > 0, x.clamp_min(1e-30), 1).sqrt() * (x > 0) + 0 * x + 1e-3 * shared

        self.refused(monkeypatch, "sqrt", wrong, torch.optim.Adam, "under vmap it differs from a loop")


def test_the_page_says_of_every_class_whether_it_lifts(checkout: Path):
    """The table of docs/optimizers.md, row by row, against what happens."""
    page = (checkout / "docs" / "optimizers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \| (.*?) \|", page, flags=re.MULTILINE)
    assert {name for name, _, _ in rows} >= set(classes())
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
        numbers = {k for k, v in defaults.items() if type(v) in (int, float, tuple)} | {"lr"} & set(defaults)
        assert set(re.findall(r"`(\w+)`", learnable)) == numbers, name
        assert (name in NATIVE) == (f"`diffopt.{name}` is faster" in page)
        for option in sorted(numbers):
            scalar = torch.tensor(0.9, requires_grad=True)
            value = (scalar,) * 2 if isinstance(defaults[option], tuple) else scalar
            from_torch(kind, **{option: value})


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
    case = lifted(BY_NAME["adamw"], torch.optim.AdamW)
    problem = small_network(seed=5, steps=5)
    got, expected = (hypergradient(problem, c, 5, Reverse(2)) for c in (case, BY_NAME["adamw"]))
    assert relative_error(got, expected) < 1e-10
