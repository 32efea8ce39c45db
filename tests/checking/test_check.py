"""``diffopt.check``: one row per fault, with the check that must fail; and what must pass."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from check_cases import FAULTS, FIT, attention, normed, numbers, w
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.nn import utils
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import diffopt

BEFORE = ["scalar, finite", "depends on params", "nothing captured", "arguments", "changes nothing", "deterministic"]
CHECKS = [*BEFORE, "second derivative", "safe under vmap"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_its_check(name: str) -> None:
    fault = FAULTS[name]
    report = diffopt.check(*fault.make())
    finding = report[fault.check]
    assert not report.ok
    assert finding in report.failures
    assert type(finding.error) is fault.error
    assert isinstance(finding.error, diffopt.DiffoptError)
    assert re.search(fault.says, str(finding.error), re.DOTALL)
    parts = finding.error.got, finding.error.expected, finding.error.fix
    assert (finding.measured, finding.expected, finding.fix) == parts
    assert all(part in str(report) for part in parts)
    assert ", expected " in str(finding.error)
    assert len(str(finding.error)) < 300
    with pytest.raises(diffopt.DiffoptError) as caught:
        report.raise_if_failed()
    assert caught.value is report.failures[0].error


@pytest.mark.parametrize("name", FIT)
def test_no_false_alarm(name: str) -> None:
    torch.manual_seed(0)
    report = diffopt.check(*FIT[name]())
    assert report.ok, report
    assert all(finding.outcome == "ok" for finding in report.findings), report
    report.raise_if_failed()
    assert [finding.check for finding in report.findings] == CHECKS


def test_attention_by_its_fix_is_fit() -> None:
    with sdpa_kernel([SDPBackend.MATH]):
        assert diffopt.check(*attention()).ok


@pytest.mark.parametrize("fused", [True, False])
def test_a_wrong_second_derivative_by_an_answer_of_its_own(fused: bool) -> None:
    """``g v / |v|``: torch's fused form and the formula beside differences of differences of the loss in float64."""
    v, g, x = (numbers(*shape).double() for shape in ((2, 3), (2, 1), (5, 3)))
    u = torch.eye(2, 3, dtype=torch.float64)

    def loss(v: Tensor) -> Tensor:
        weight = torch._weight_norm(v, g, 0) if fused else g * v / v.norm(dim=1, keepdim=True)
        return (x @ weight.T).square().mean()

    root, h = v.clone().requires_grad_(), 1e-3
    (gradient,) = torch.autograd.grad(loss(root), root, create_graph=True)
    (product,) = torch.autograd.grad(gradient, root, u)
    curvature = float(loss(v + h * u) - 2 * loss(v) + loss(v - h * u)) / h**2
    wrong = abs(float((product * u).sum()) - curvature) > 1e-4 * abs(curvature)
    found = diffopt.check(loss, v)["second derivative"].outcome
    assert (found == "FAIL") == wrong == fused


def test_a_kink_is_a_note() -> None:
    finding = diffopt.check(lambda w: w.abs().sum() + (w - 1).square().sum(), torch.zeros(4))["second derivative"]
    assert (finding.outcome, "beside a kink" in finding.measured) == ("note", True)


def test_a_precision_too_coarse_for_differences_is_a_note() -> None:
    finding = diffopt.check(lambda w: torch.zeros(4).half().copy_(w).square().sum(), numbers(4))["second derivative"]
    assert (finding.outcome, "float16 is too coarse" in finding.measured) == ("note", True)


@pytest.mark.parametrize("cast", [Tensor.half, Tensor.bfloat16, lambda w: w.to(torch.bfloat16), Tensor.float])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_casts_of_the_loss_are_no_fault(cast: Any, dtype: torch.dtype) -> None:
    """Differences of what is rounded say nothing: they are taken of the loss without its casts."""
    finding = diffopt.check(lambda w: (cast(w).pow(3) * w).sum(), numbers(4).to(dtype))["second derivative"]
    assert (finding.outcome, "(float64)" in finding.measured) == ("ok", True)


def test_constants_of_the_loss_are_raised_to_double_precision() -> None:
    finding = diffopt.check(*FIT["constants_in_single"]())["second derivative"]
    assert (finding.outcome, "(float64)" in finding.measured) == ("ok", True)


def test_what_cannot_be_compared_is_skipped() -> None:
    for name in ("detached", "own_generator", "counted"):
        report = diffopt.check(*FAULTS[name].make())
        assert [f.check for f in report.findings if f.outcome == "skipped"] == ["second derivative", "safe under vmap"]


@pytest.mark.parametrize("threads", [1, 2])
def test_dropout_is_a_note_and_its_curvature_is_compared_on_the_same_numbers(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.active_count", lambda: threads)
    report = diffopt.check(lambda w: F.dropout(w, 0.5).pow(4).sum(), numbers(6))
    assert report.ok
    assert report["deterministic"].outcome == "note"
    assert "draws from torch's generator" in report["deterministic"].measured
    assert report["second derivative"].outcome == report["safe under vmap"].outcome == "ok"


def test_leaves_and_arguments_without_influence_are_named() -> None:
    a, b = w().requires_grad_(), w().requires_grad_()
    report = diffopt.check(lambda p, a, b: (p["x"] - a).square().sum() + b.sum(), {"x": w(), "y": w()}, a, b)
    assert report.ok
    assert report["depends on params"].measured == "all but params['y']"
    assert report["arguments"].measured.startswith("args[1]: requires grad, but the inner gradient does not depend")
    assert a.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checkpoint_in_a_module_is_fit_but_for_vmap(dtype: torch.dtype) -> None:
    """Its second derivative too; the recomputation of constants in single precision keeps that to its own."""
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(dtype), numbers(5, 3)

    class Saving(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    module = Saving()
    report = diffopt.check(
        lambda p: functional_call(module, p, (x.to(dtype),)).square().mean(), dict(module.named_parameters())
    )
    assert {finding.check for finding in report.failures} == {"safe under vmap"}
    assert report["second derivative"].outcome in ({"ok"} if dtype == torch.float64 else {"ok", "note"})


def test_what_is_not_asked_for_is_not_run() -> None:
    report = diffopt.check(*attention(), second_derivative=False, vmap=False)
    assert report.ok
    skipped = [finding.check for finding in report.findings if finding.outcome == "skipped"]
    assert skipped == ["second derivative", "safe under vmap"]


def test_the_table_says_everything() -> None:
    text = str(diffopt.check(*normed(utils.parametrizations.weight_norm)))
    assert text.splitlines()[0].split() == ["check", "outcome", "measured"]
    assert all(check in text for check in CHECKS)
    assert "\n    expected at most 1e-03; fix: look for weight_norm" in text
    assert text.endswith("\n1 of 8 checks failed")
    assert str(diffopt.check(*FIT["square"]())).endswith("\nnone of 8 checks failed")


def test_nothing_of_the_callers_is_changed() -> None:
    """Neither tensors nor generators, by a loss that draws, and by one that writes into everything it is given."""

    def rude(w: Tensor, x: Tensor) -> Tensor:
        w.data.mul_(2)
        x.add_(1)
        return (w * x * torch.rand(4)).sum().square()

    params, x = numbers(4).requires_grad_(), numbers(4)
    before, state = (params.detach().clone(), x.clone()), torch.get_rng_state()
    report = diffopt.check(rude, params, x)
    assert not report.ok
    assert torch.equal(params.detach(), before[0])
    assert torch.equal(x, before[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert params.grad is None


def test_misuse() -> None:
    with pytest.raises(diffopt.GradModeError, match=r"under a torch\.func transform.*outside"):
        torch.func.vmap(lambda w: diffopt.check(lambda w: w.sum(), w) and w)(torch.ones(2, 3))
    with torch.inference_mode(), pytest.raises(diffopt.GradModeError, match="inference mode"):
        diffopt.check(lambda w: w.sum(), torch.ones(2))
    with pytest.raises(diffopt.HyperparameterError, match="directions is int 0, expected an integer >= 1"):
        diffopt.check(lambda w: w.sum(), torch.ones(2), directions=0)
    with torch.no_grad():
        assert diffopt.check(lambda w: w.square().sum(), torch.ones(2)).ok
