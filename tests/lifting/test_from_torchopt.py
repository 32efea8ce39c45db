"""Lifted pairs ``(init, update)``: one of the test's own, and TorchOpt's where it is installed."""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from bad_row import Refused
from lifted import SHAPES, assert_as_by_differences, tensors, wavy
from oracles import relative_error
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt import HyperparameterError, LiftError, OptimizerError, Schedule, from_torchopt
from diffopt.estimators import Binomial, ForwardMode, MultiStep, Reverse, Truncated, Unrolled

DOUBLE = torch.float64


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=DOUBLE, requires_grad=True)


class MomentumState(NamedTuple):
    velocity: dict[str, tuple[Tensor, ...]]
    count: Tensor
    power: float


def momentum(lr=0.1, decay=0.8, correct=True):
    """Momentum with a bias correction, as an optax-like pair, changing its state in place as it likes."""

    def init(params):
        return MomentumState({"v": tuple(map(torch.zeros_like, params))}, torch.tensor(0), 1.0)

    def update(grads, state, params=None):
        count, power = state.count + 1, state.power * decay
        for v, g in zip(state.velocity["v"], grads, strict=True):
            v.mul_(decay).add_(g, alpha=1 - decay)
        scale = lr / (1 - decay ** int(count)) if correct else lr
        return tuple(-scale * (v + 0.1 * power * p) for v, p in zip(state.velocity["v"], params, strict=True)), (
            MomentumState(state.velocity, count, power)
        )

    return init, update


def momentum_by_hand(start, target, lr, decay, steps):
    now, velocity = list(start), [0.0] * len(start)
    for t in range(1, steps + 1):
        grads = torch.autograd.grad(wavy(now, target), now, create_graph=True)
        velocity = [decay * v + (1 - decay) * g for v, g in zip(velocity, grads, strict=True)]
        scale = lr / (1 - decay**t)
        now = [p - scale * (v + 0.1 * decay**t * p) for p, v in zip(now, velocity, strict=True)]
    return now


RULES = [Reverse("graph"), Reverse(1), Reverse(2), Unrolled(), ForwardMode(), Truncated(6), Binomial(6)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_pair_made_from_learned_options(rule):
    start = [p.requires_grad_() for p in tensors(SHAPES, 0)]
    leaves = target, lr, decay = [scalar(0.7), scalar(0.1), scalar(0.8)]
    optimizer = from_torchopt(momentum, lr=lr, decay=decay)
    solution = diffopt.solve(wavy, start, target, optimizer=optimizer, steps=6, estimator=rule)
    expected = momentum_by_hand(start, target, lr, decay, 6)
    assert relative_error(solution.params, expected) < 1e-12
    got, reference = (
        torch.autograd.grad(sum(p.square().sum() for p in x), [*start, *leaves]) for x in (solution.params, expected)
    )
    assert relative_error(got, reference) < 1e-11


def test_a_ready_pair_a_schedule_and_windows():
    start, target = tensors(SHAPES, 0), torch.tensor(0.7, dtype=DOUBLE)
    got = diffopt.solve(wavy, start, target, optimizer=from_torchopt(momentum(0.05)), steps=6).params
    expected = momentum_by_hand([p.requires_grad_() for p in start], target, 0.05, 0.8, 6)
    assert relative_error(got, expected) < 1e-12
    rates = torch.linspace(0.01, 0.06, 6, dtype=DOUBLE)
    for rule in (Reverse(), MultiStep(2)):
        optimizer = from_torchopt(momentum, lr=Schedule(rates), decay=0.0, correct=False)
        got, expected = (
            diffopt.solve(wavy, tensors(SHAPES, 0), target, optimizer=o, steps=6, estimator=rule).params
            for o in (optimizer, diffopt.SGD(Schedule(rates)))
        )
        assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("way", ["vmap of grad", "grad of vmap", "vmap then backward"])
def test_tasks_that_share_their_start(way):
    start, targets, lr = tensors(SHAPES, 0), torch.tensor([0.7, -0.4, 1.9], dtype=DOUBLE), scalar(0.1)

    def outer(lr, target):
        solution = diffopt.solve(wavy, start, target, optimizer=from_torchopt(momentum, lr=lr), steps=4)
        return sum(p.square().sum() for p in solution.params)

    def total(lr):
        return vmap(outer, in_dims=(None, 0))(lr, targets).sum()

    expected = torch.stack([torch.autograd.grad(outer(lr, target), lr)[0] for target in targets])
    if way == "vmap of grad":
        got = vmap(grad(outer), in_dims=(None, 0))(lr.detach(), targets)
    else:
        got = grad(total)(lr.detach()) if way == "grad of vmap" else torch.autograd.grad(total(lr), lr)[0]
        expected = expected.sum()
    assert relative_error([got], [expected]) < 1e-12


def test_repr_and_pairs_without_state():
    descent = (lambda params: (), lambda grads, state, params=None: (tuple(-0.1 * g for g in grads), state))
    end = diffopt.solve(torch.square, torch.tensor(1.0), optimizer=from_torchopt(descent), steps=1).params
    assert float(end) == pytest.approx(0.8)
    assert repr(from_torchopt(momentum, lr=0.3)) == "from_torchopt(momentum, lr=0.3)"


def impure():
    calls = []

    def update(grads, state, params=None):
        calls.append(1)
        return tuple(-0.1 * len(calls) * g for g in grads), state

    return (lambda params: ()), update


def with_math(lr):
    return (lambda params: ()), lambda g, s, params=None: (tuple(-math.sqrt(lr) * x for x in g), s)


def of_integers():
    return (lambda params: torch.tensor(3)), lambda g, s, params=None: (tuple(-0.1 * x for x in g), s * 2)


CAPTURED = scalar(0.1)
CAPTURES = "^the pair cannot be lifted: its step reads a tensor that requires grad"
NO_NUMBER = "lr is dict .* expected a number, a scalar"
refused = Refused("from_torchopt")


@refused(LiftError, "differs from the original", impure(), name="an impure pair")
@refused(LiftError, CAPTURES, momentum(lr=CAPTURED), name="a pair that captures")
@refused(LiftError, "with_math cannot be lifted: .*makes a Python number", with_math, lr=CAPTURED)
@refused(LiftError, "it keeps '', which is tensor", of_integers(), name="a pair of integers")
@refused(HyperparameterError, NO_NUMBER, momentum, lr={"a": CAPTURED})
@refused(HyperparameterError, "momentum: .*unexpected keyword.*rate", momentum, rate=0.1)
@refused(OptimizerError, "and options, expected a pair", momentum(), lr=0.1, name="a pair with options")
@refused(OptimizerError, r"got tuple \(1, 2\), expected a pair", (1, 2))
@refused(OptimizerError, "returned int 3, expected a pair", lambda: 3, name="a function of a number")
@refused(OptimizerError, "expected a pair", 3)
def lifted(pair, **options):
    from_torchopt(pair, **options)


@pytest.mark.parametrize("row", refused.rows.values(), ids=refused.rows)
def test_bad_input(row):
    row.check()
    assert torch._C._len_torch_function_stack() == 0


needs_torchopt = pytest.mark.skipif(importlib.util.find_spec("torchopt") is None, reason="needs torchopt")
ADAM = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 0.05}
TORCHOPT: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.1, "weight_decay": 0.1}),
    ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("adam", {**ADAM, "weight_decay": 0.03}),
    ("adamw", {**ADAM, "weight_decay": 0.03}),
    ("rmsprop", {"lr": 0.02, "alpha": 0.7, "eps": 0.1, "momentum": 0.6, "centered": True}),
    ("adagrad", {"lr": 0.1, "eps": 0.05, "initial_accumulator_value": 0.2}),
    ("adamax", ADAM),
    ("adadelta", {"lr": 0.5, "rho": 0.8, "eps": 0.05}),
    ("radam", ADAM),
]


def trained(pair, start, target, steps):
    """A pair of TorchOpt itself, in its own loop."""
    torchopt = pytest.importorskip("torchopt")
    params = tuple(p.detach().clone() for p in start)
    state = pair.init(params)
    for _ in range(steps):
        leaves = [p.requires_grad_() for p in params]
        grads = torch.autograd.grad(wavy(leaves, target), leaves)
        updates, state = pair.update(grads, state, params=params, inplace=False)
        params = tuple(p.detach() for p in torchopt.apply_updates(params, updates, inplace=False))
    return list(params)


@needs_torchopt
@pytest.mark.usefixtures("float64_by_default")  # in which TorchOpt corrects its biases: differences need the digits
@pytest.mark.parametrize(("name", "options"), TORCHOPT, ids=str)
@pytest.mark.parametrize("ready", [True, False], ids=["pair", "options"])
class TestTorchOpt:
    """TorchOpt's optimizers, as ready pairs and made from learned options."""

    def trained(self, name, options, start, target, steps):
        return trained(getattr(pytest.importorskip("torchopt"), name)(**options), start, target, steps)

    def lifted(self, name, options, ready):
        torchopt = pytest.importorskip("torchopt")
        make = getattr(torchopt, name)
        return from_torchopt(make(**options)) if ready else from_torchopt(make, **options)

    def test_twenty_steps_equal_torchopt(self, name, options, ready):
        start, target = tensors(SHAPES, 0), torch.tensor(0.7)
        solution = diffopt.solve(wavy, start, target, optimizer=self.lifted(name, options, ready), steps=20)
        assert relative_error(solution.params, self.trained(name, options, start, target, 20)) < 1e-12

    def test_hypergradients_equal_central_differences(self, name, options, ready):
        learned = () if ready else ("lr", "momentum", "weight_decay", "eps")
        lift = partial(self.lifted, name, ready=ready)
        assert_as_by_differences(lift, partial(self.trained, name), options, learned, 7)

    def test_a_batch_of_tasks_equals_a_loop(self, name, options, ready):
        start, targets = tensors(SHAPES, 0), torch.tensor([0.7, -0.4, 1.9])
        optimizer = self.lifted(name, options, ready)

        def outer(target):
            solution = diffopt.solve(wavy, start, target, optimizer=optimizer, steps=7)
            return sum((p * (p - target)).sum() for p in solution.params)

        got = vmap(grad(outer))(targets)
        assert relative_error([got], [torch.stack([grad(outer)(t) for t in targets])]) < 1e-12


@needs_torchopt
@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize(("name", "options"), TORCHOPT[:4], ids=str)
def test_hypergradients_equal_those_of_the_native_optimizer(name, options):
    torchopt = pytest.importorskip("torchopt")
    native = {"sgd": diffopt.SGD, "adam": diffopt.Adam, "adamw": diffopt.AdamW}[name](**options)
    found = []
    for optimizer in (from_torchopt(getattr(torchopt, name), **{**options, "lr": scalar(options["lr"])}), native):
        leaves = [p.requires_grad_() for p in tensors(SHAPES, 0)]
        target = scalar(0.7)
        solution = diffopt.solve(wavy, leaves, target, optimizer=optimizer, steps=6)
        found.append(torch.autograd.grad(sum(p.square().sum() for p in solution.params), [*leaves, target]))
    assert relative_error(*found) < 1e-10


@needs_torchopt
def test_torchopt_refusals_and_zero_gradients():
    torchopt = pytest.importorskip("torchopt")
    with pytest.raises(LiftError, match="its derivative by the initial parameters is 0"):
        from_torchopt(torchopt.adam(0.1, use_accelerated_op=True))
    with pytest.raises(LiftError, match="lr=lr"):
        from_torchopt(torchopt.adam(scalar(0.1)))
    start, dead = torch.tensor([0.0, 0.4], requires_grad=True), torch.tensor([0.0, 1.0])
    for make in (torchopt.adam, torchopt.rmsprop, torchopt.adagrad):
        optimizer = from_torchopt(make(0.1))
        end = diffopt.solve(lambda w, x: ((w * x).sum() - 1) ** 2, start, dead, optimizer=optimizer, steps=3).params
        assert torch.autograd.grad(end.sum(), start)[0].isfinite().all()


@needs_torchopt
@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("ready", [True, False], ids=["pair", "options"])
def test_a_chain_is_a_pair_like_another(ready):
    """Of two optimizers, and of one after a filter, which is that optimizer."""
    torchopt = pytest.importorskip("torchopt")
    start, target = [p.requires_grad_() for p in tensors(SHAPES, 0)], scalar(0.7)

    def two(lr):
        return torchopt.chain(torchopt.sgd(0.5, momentum=0.8), torchopt.adam(lr, betas=(0.8, 0.9), eps=0.05))

    def filtered(lr):
        return torchopt.chain(torchopt.nan_to_num(0.0), torchopt.adam(lr, betas=(0.8, 0.9), eps=0.05))

    params = trained(two(0.05), start, target.detach(), 20)
    lifted = from_torchopt(two(0.05)) if ready else from_torchopt(two, lr=scalar(0.05))
    assert relative_error(diffopt.solve(wavy, start, target, optimizer=lifted, steps=20).params, params) < 1e-12

    found, rates = [], [scalar(0.05), scalar(0.05)]
    lifted = from_torchopt(filtered(0.05)) if ready else from_torchopt(filtered, lr=rates[0])
    for optimizer, lr in zip((lifted, diffopt.Adam(rates[1], (0.8, 0.9), 0.05)), rates, strict=True):
        end = diffopt.solve(wavy, start, target, optimizer=optimizer, steps=6).params
        leaves = [*start, target] if ready else [*start, target, lr]
        found.append(torch.autograd.grad(sum(p.square().sum() for p in end), leaves))
    assert relative_error(*found) < 1e-10


@needs_torchopt
@pytest.mark.usefixtures("float64_by_default")
def test_the_clipping_of_a_chain_is_refused_and_put_around_the_rest():
    """TorchOpt makes a Python number of the norm: its derivative would be lost."""
    torchopt = pytest.importorskip("torchopt")
    with pytest.raises(LiftError, match=r"makes a Python number of a tensor.*put diffopt\.Clip around the rest"):
        from_torchopt(torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.sgd(0.1)))
    start, target, most = [p.requires_grad_() for p in tensors(SHAPES, 0)], scalar(0.7), scalar(1.2)
    found = []
    for inner in (from_torchopt(torchopt.sgd, lr=scalar(0.1)), diffopt.SGD(0.1)):
        optimizer = diffopt.Clip(inner, max_norm=most)
        end = diffopt.solve(wavy, start, target, optimizer=optimizer, steps=6).params
        found.append(torch.autograd.grad(sum(p.square().sum() for p in end), [*start, target, most]))
    assert relative_error(*found) < 1e-12
    assert float(found[0][-1]) != 0
