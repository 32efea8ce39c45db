"""What ``from_torch`` refuses, each by its reason; and that its check finds a lift that went wrong."""

from __future__ import annotations

import pytest
import torch
from bad_row import Refused
from lifted import Doing
from oracles import relative_error
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt import LiftError, from_torch
from diffopt.lifting import operations
from diffopt.tensors import transforms

STRANGE: dict[type, str] = {}
"""By class: why it cannot be lifted."""


def strange(reason):
    """The class that follows cannot be lifted, for this reason."""

    def add(kind):
        STRANGE[kind] = reason
        return kind

    return add


@strange("its attribute 'count' changes from step to step")
class CountsInAnAttribute(Doing):
    count = 0

    def one(self, p, g, state, group):
        self.count += 1
        p.add_(g, alpha=-group["lr"] * (0.1 if self.count > 100 else 1))


@strange(r"it keeps 'history', which is \[")
class KeepsAList(Doing):
    def one(self, p, g, state, group):
        state.setdefault("history", []).append(g)
        p.add_(sum(state["history"]), alpha=-group["lr"])


@strange("state that belongs to no parameter")
class KeepsWhatNoParameterHas(Doing):
    def one(self, p, g, state, group):
        self.state["all"]["best"] = g.norm()
        p.sub_(group["lr"] * g)


@strange(r"changes a view of another tensor in place \(sub\)")
class ChangesAView(Doing):
    def one(self, p, g, state, group):
        p.view(-1)[0].sub_(group["lr"])
        p.sub_(group["lr"] * g)


@strange("reads a view of a tensor that was changed in place")
class ReadsAnOldView(Doing):
    def one(self, p, g, state, group):
        flat = p.view(-1)
        p.sub_(group["lr"] * g)
        p.sub_(0.1 * flat.sum())


@strange("makes a Python number of a tensor .__float__")
class MakesANumber(Doing):
    def one(self, p, g, state, group):
        p.sub_(g, alpha=group["lr"] / (1 + float(g.norm())))


@strange("makes a Python number of a tensor .numpy")
class LeavesTorch(Doing):
    def one(self, p, g, state, group):
        p.sub_(torch.from_numpy(g.numpy() * group["lr"]))


@strange("draws random numbers")
class DrawsNoise(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * (g + torch.randn_like(g)))


@strange("its step raises TypeError: .*closure")
class NeedsAClosure(Doing):
    def step(self, closure):
        closure()


@strange("calls torch._foreach_add_.*foreach=False")
class RunsForeach(Doing):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            torch._foreach_add_(group["params"], [p.grad for p in group["params"]], alpha=-group["lr"])


@strange("its derivative by .* is .*, expected .* as by differences")
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


@strange("its derivative by the initial parameters is 0, expected .* as by differences")
class HasAWrongDerivative(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * Cut.apply(g))


@strange("derivative is NaN or infinite where a coordinate's gradient is always zero")
class HasNoDerivativeAtZero(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * g / (g.square().pow(0.25) + 1))


@strange("it keeps 'slow', only after its first step")
class MakesStateLate(Doing):
    def one(self, p, g, state, group):
        state["n"] = state.get("n", 0) + 1
        if state["n"] == 3:
            state["slow"] = p.clone()
        p.sub_(group["lr"] * g)


CALLS = torch.zeros(())


@strange(r"changes another tensor in place \(add\), expected changes of parameters")
class ChangesATensorOfTheModule(Doing):
    def one(self, p, g, state, group):
        CALLS.add_(1)
        p.sub_(group["lr"] * g)


@strange("it differs from the original by")
class GoesPastOverrides(Doing):
    def one(self, p, g, state, group):
        p.set_(p - group["lr"] * g)


class Branches(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * (g if g.norm() > 1 else 2 * g))


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


class WithMath(Doing):
    def one(self, p, g, state, group):
        p.sub_(group["lr"] * g, alpha=__import__("math").sqrt(1 - group["factor"]))


def test_an_option_that_cannot_be_learned_can_still_be_given_as_a_number():
    lr = torch.tensor(0.1, requires_grad=True)
    assert "factor=0.8" in repr(from_torch(WithMath, lr=lr, factor=0.8))
    with pytest.raises(LiftError, match="makes a Python number"):
        from_torch(WithMath, lr=lr, factor=lr)


HyperparameterError, OptimizerError = diffopt.HyperparameterError, diffopt.OptimizerError
refused = Refused("from_torch")


@refused(LiftError, "LBFGS cannot be lifted: it evaluates the loss itself", torch.optim.LBFGS)
@refused(LiftError, "Mine cannot be lifted: it evaluates", type("Mine", (torch.optim.LBFGS,), {}))
@refused(LiftError, "sparse gradients.*diffopt.Adam", torch.optim.SparseAdam, lr=0.1)
@refused(HyperparameterError, "Adam: foreach=True has no mean", torch.optim.Adam, foreach=True)
@refused(HyperparameterError, "a fused kernel has no derivative", torch.optim.Adam, fused=True)
@refused(HyperparameterError, "capturable=True.*omit it", torch.optim.Adam, capturable=True)
@refused(HyperparameterError, "always is", torch.optim.SGD, lr=0.1, differentiable=True)
@refused(HyperparameterError, "SGD: Invalid learning rate: -0.1", torch.optim.SGD, lr=-0.1)
@refused(HyperparameterError, "SGD: .*leraning_rate", torch.optim.SGD, leraning_rate=1)
@refused(HyperparameterError, "params go to solve", torch.optim.Adam, params=[])
@refused(HyperparameterError, "Adam: ", torch.optim.Adam, betas=(0.9,))
@refused(HyperparameterError, "SGD: ", torch.optim.SGD, lr="fast")
@refused(HyperparameterError, "lr is set .*expected a number", torch.optim.SGD, lr={1, 2})
@refused(OptimizerError, "expected an optimizer class", torch.optim.SGD([torch.ones(1)]), name="from_torch(an SGD)")
@refused(OptimizerError, "expected an optimizer class", diffopt.SGD)
@refused(OptimizerError, "expected an optimizer class", "Adam")
def lifted(kind, **options):
    from_torch(kind, **options)


@pytest.mark.parametrize("row", refused.rows.values(), ids=refused.rows)
def test_bad_input(row):
    row.check()


def test_muon_is_refused():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    with pytest.raises(LiftError, match=r"Muon cannot be lifted: it rounds to bfloat16.*use diffopt\.Muon$"):
        from_torch(torch.optim.Muon)


class TestTheCheck:
    """The check at construction finds what it is there for: each of these is a lift that went wrong."""

    def refused(self, monkeypatch, rule, function, kind, match, **options):
        monkeypatch.setitem(operations.RULES, rule, function)
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
        def wrong(x):
            shared = transforms.plain(x).sum() if transforms.transforms_active() else 0.0
            return torch.where(x > 0, x.clamp_min(1e-30), 1).sqrt() * (x > 0) + 0 * x + 1e-3 * shared

        self.refused(monkeypatch, "sqrt", wrong, torch.optim.Adam, "under vmap it differs from a loop")
