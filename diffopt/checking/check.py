"""``check``: one call that says whether an inner problem is fit for :func:`diffopt.solve`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffopt.checking.inner_loss import Subject
from diffopt.checking.probes import (
    probe_arguments,
    probe_captures,
    probe_dependence,
    probe_loss,
    probe_purity,
    probe_repetition,
)
from diffopt.checking.second_derivative import probe_second_derivative
from diffopt.checking.under_vmap import probe_vmap
from diffopt.checking.whole import Whole
from diffopt.checking.whole_probes import CHECKS, probe_whole
from diffopt.errors import DiffoptError, GradModeError, OptimizerError, StepsError
from diffopt.optimizers.base import Optimizer
from diffopt.reports import Finding, Report
from diffopt.state import State
from diffopt.tensors import hints, transforms
from diffopt.tensors.arguments import MOST, check_flag, check_integer


def check(
    loss: Callable[..., Tensor],
    params: Any,
    *args: Any,
    directions: int = 3,
    second_derivative: bool = True,
    vmap: bool = True,
    optimizer: Optimizer | None = None,
    steps: int | None = None,
) -> Report:
    r"""Look at one inner problem from all sides and say what is not fit, what it means, and the fix.

    ======================  =========================================================================================
    scalar, finite          the loss is one floating scalar, and finite
    depends on params       which leaves have a gradient, and that it is finite
    nothing captured        no tensor that requires grad reaches the loss but by its arguments
    arguments               which of them require grad, and get a hypergradient
    changes nothing         no argument, and nothing that the loss holds, is changed in place
    deterministic           two calls give one number; whether it draws from torch's generators
    second derivative       ``nabla (g'u)`` by autograd beside central differences of ``g`` along random ``u``
    safe under vmap         two sets of params at once give what a loop over them gives, second derivatives too
    ======================  =========================================================================================

    Given ``optimizer`` and ``steps``, the solve is looked at too: whether its exact hypergradient is worth anything.
    Its outer loss is a mean of the final params with random weights, in float64 where the loss runs in it.

    ======================  =========================================================================================
    adjoint                 how its norm changes on the way back; exponential growth is that of chaos
    smooth                  the hypergradient beside differences of the outer loss, for moves of what is learned
                            (``params``, ``args`` and hyperparameters that require grad) by 0.1, ..., 1e-4 of its size
    precise                 the hypergradient in the solve's own precision beside that in float64
    ======================  =========================================================================================

    Of a :class:`diffopt.VectorField` the loss is its norm and the gradient ``g`` the field; its Jacobian need not be
    symmetric, and the second derivative is compared as that of ``g`` along ``u``.

    ``solve`` itself makes the checks that cost next to nothing. This one costs about 40 evaluations of the loss and
    its gradient with the defaults, and finds what only a second opinion can: a second derivative that torch gets
    wrong (``weight_norm``), or that a ``detach`` or a function with a backward of its own cuts off. With ``optimizer``
    and ``steps``: two exact hypergradients more, one of them in float64, and for each of the three kinds of what is
    learned 6 to 18 times the steps alone (36 where that is rough; ``2 * directions`` for each size of the moves).

    Nothing of the caller's is changed: the loss gets copies, cut off from their history, and torch's generators are
    left as they were. Only what a loss holds by itself it can change (running statistics, a generator of its own), at
    every evaluation; the report then says so.

    Args:
        loss: ``loss(params, *args)``, as for :func:`diffopt.solve`; or a :class:`diffopt.VectorField`.
        params: where the inner problem starts; also where the loss is looked at. A :class:`diffopt.State`: a
            solve goes on from it.
        args: whatever else the loss reads; one batch last, if the loss takes batches.
        directions: how many random directions the second derivative, and the outer loss, are probed along.
        second_derivative: whether it is needed; not for ``FirstOrder``, ``Reptile`` and ``ESJacobian``.
        vmap: whether the loss is to run under ``torch.func.vmap``: over tasks, or in ``Binomial``, ``Krylov``,
            ``ForwardMode`` and ``ESJacobian``.
        optimizer: the update rule of the solve that is to be looked at.
        steps: the number of its steps; each sees the same ``args``.

    Returns:
        A :class:`diffopt.Report`: ``print`` it, ask ``report.ok``, or call ``report.raise_if_failed()``.

    Raises:
        GradModeError: called under a ``torch.func`` transform or in inference mode.
        HyperparameterError: ``directions`` is not an integer >= 1, or a switch not ``True`` or ``False``.
        OptimizerError, StepsError: only one of ``optimizer`` and ``steps`` is given, or it is not one.

    Example:
        >>> import torch, diffopt
        >>> w = torch.tensor([3.0, 4.0], dtype=torch.float64)
        >>> report = diffopt.check(lambda w, x: (w * x).square().sum(), w, torch.ones(2, dtype=torch.float64))
        >>> report.ok
        True
        >>> diffopt.check(lambda w: w.detach().square().sum(), w).failures[0].error
        DisconnectedError('the inner loss does not depend on params, expected a gradient; use the params it is given; do not detach them or leave torch (.item(), .numpy())')
    """  # noqa: E501  (an error's representation cannot be broken)
    directions = check_integer("check: directions", directions, 1, high=MOST + 1, note=f" (and at most {MOST})")
    check_flag("check: second_derivative", second_derivative)
    check_flag("check: vmap", vmap)
    if transforms.transforms_active() or torch.is_inference_mode_enabled():
        raise GradModeError(
            "check was called under a torch.func transform or in inference mode",
            "plain code",
            f"call it once, outside, on one task{hints.in_inference_mode()}",
        )
    probes: dict[str, Callable[[Subject], Finding] | None] = {
        "depends on params": probe_dependence,
        "nothing captured": probe_captures,
        "arguments": probe_arguments,
        "changes nothing": probe_purity,
        "deterministic": probe_repetition,
        "second derivative": partial(probe_second_derivative, directions=directions) if second_derivative else None,
        "safe under vmap": partial(probe_vmap, products=second_derivative) if vmap else None,
    }
    if (optimizer is None) != (steps is None):
        kind = OptimizerError if optimizer is None else StepsError
        missing = "optimizer" if optimizer is None else "steps"
        raise kind(f"check: {missing} is None", "both optimizer and steps, or none", "say which solve to look at")
    subject, first = _start(loss, params, args)
    findings = {first.check: first}
    for name, probe in probes.items():
        if subject is None or probe is None:
            findings[name] = Finding(name, "skipped", "not asked for" if probe is None else "needs a loss that runs")
        elif name in _COMPARING and any(findings[need].outcome == "FAIL" for need in _NEEDED):
            findings[name] = Finding(name, "skipped", "needs a gradient, and a loss that repeats itself")
        elif name == "safe under vmap" and findings["second derivative"].outcome == "FAIL":
            findings[name] = _found(name, partial(probe_vmap, products=False), subject)
        else:
            findings[name] = _found(name, probe, subject)
    if optimizer is not None and steps is not None:
        findings |= _of_solve(partial(Whole.of, loss, params, args, optimizer, steps), findings, directions)
    return Report(tuple(findings.values()))


_NEEDED = ("depends on params", "deterministic")
_COMPARING = ("second derivative", "safe under vmap")
_NEEDED_BY_SOLVE = ("scalar, finite", *_NEEDED, "nothing captured", "changes nothing", "second derivative")


def _of_solve(whole: Callable[[], Whole], before: dict[str, Finding], directions: int) -> dict[str, Finding]:
    """The findings on the solve, if it can be run at all."""
    broken = [check for check in _NEEDED_BY_SOLVE if before[check].outcome == "FAIL"]
    if broken or before["second derivative"].outcome == "skipped":
        reason = f"needs what failed: {broken[0]}" if broken else "needs a second derivative"
        return {check: Finding(check, "skipped", reason) for check in CHECKS}
    return {finding.check: finding for finding in probe_whole(whole(), directions)}


def _start(loss: Callable[..., Tensor], params: Any, args: tuple[Any, ...]) -> tuple[Subject | None, Finding]:
    """The subject, if the loss runs on what it is given and returns a scalar, and the finding on that."""
    try:
        subject = Subject.of(loss, params.params if isinstance(params, State) else params, args)
        return subject, probe_loss(subject)
    except DiffoptError as error:
        return None, Finding.of("scalar, finite", error)


def _found(name: str, probe: Callable[[Subject], Finding], subject: Subject) -> Finding:
    """What a probe finds; an error that it meets is its finding."""
    try:
        return probe(subject)
    except DiffoptError as error:
        return Finding.of(name, error)
