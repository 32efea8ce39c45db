"""The probes behind :func:`diffopt.check`: each looks at one property of a loss and returns what it found.

A probe that finds a fault raises the error of it, which :func:`diffopt.check` makes a finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from diffopt.checking.inner_loss import Subject
from diffopt.errors import (
    CapturedTensorError,
    DisconnectedError,
    InPlaceError,
    NonFiniteGradientError,
    NonFiniteLossError,
    RandomnessError,
)
from diffopt.reports import Finding
from diffopt.rollout.field import VectorField, refuse_constant
from diffopt.rollout.hidden_state import HiddenState
from diffopt.tensors import autograd_graph, derivatives, random_state
from diffopt.tensors.captures import mend_for, named_tensors, names_of
from diffopt.tensors.leaves import all_finite


def short(names: Sequence[str]) -> str:
    """A list of names, the first three of many."""
    return ", ".join([*names[:3], f"... ({len(names)} in all)"] if len(names) > 3 else names)


def probe_loss(subject: Subject) -> Finding:
    """One floating scalar (else :meth:`Subject.loss` raises), and finite."""
    value = subject.value()
    kind = str(value.dtype).removeprefix("torch.")
    if not all_finite([value]):
        return Finding.of(
            "scalar, finite",
            NonFiniteLossError(
                f"the inner loss is {float(value)} at params",
                "a finite number",
                "check the data and the initialisation",
            ),
        )
    return Finding("scalar, finite", "ok", f"{float(value):.4g}, {kind}")


def probe_dependence(subject: Subject) -> Finding:
    """The gradient in every leaf of the parameters."""
    check = "depends on params"
    roots, loss, grads = subject.gradients(differentiable=False)
    if isinstance(subject.dynamics.loss, VectorField):
        refuse_constant(loss, roots[: len(subject.params)], grads, subject.params_paths)
    own = dict(zip(subject.params_paths, grads, strict=False))
    missing = [path for path, grad in own.items() if grad is None]
    if len(missing) == len(own):
        raise DisconnectedError(
            "the inner loss does not depend on params",
            "a gradient",
            "use the params it is given; do not detach them or leave torch (.item(), .numpy())",
        )
    wrong = [path for path, grad in own.items() if grad is not None and not all_finite([grad])]
    if wrong:
        raise NonFiniteGradientError(
            f"the inner gradient is NaN or infinite in {short(wrong)}",
            "finite numbers",
            "check for roots, norms or logarithms at zero",
        )
    size = torch.stack([grad.double().norm() for grad in own.values() if grad is not None]).norm()
    if missing:
        return Finding(check, "note", f"all but {short(missing)}", fix="leave these out, or use them in the loss")
    if float(size) == 0:
        return Finding(check, "note", "the gradient is exactly zero", fix="start where it is not")
    return Finding(check, "ok", f"gradient of norm {float(size):.2g} in {len(own)} leaves")


def probe_captures(subject: Subject) -> Finding:
    """Tensors that require grad and come to the loss from elsewhere than its arguments."""
    with torch.enable_grad():
        roots, args = subject.roots()
        loss = subject.loss(roots[: len(subject.params)], args)
    nodes = autograd_graph.captured_nodes([autograd_graph.GraphPart.of(loss, roots)])
    if nodes:
        raise CapturedTensorError(
            f"the inner loss captured {names_of(nodes, [subject.dynamics.loss])}, which requires grad",
            "every such tensor among its arguments",
            mend_for(nodes),
        )
    return Finding("nothing captured", "ok", "no tensor that requires grad comes from outside the arguments")


def probe_arguments(subject: Subject) -> Finding:
    """Which arguments require grad, and through which of them a hypergradient can flow."""
    check = "arguments"
    if not subject.wanted:
        constant = f"{len(subject.args)} tensors, none requires grad" if subject.args else "none"
        return Finding(check, "ok", constant)
    roots, loss, grads = subject.gradients(differentiable=True)
    count = len(subject.params)
    names = [subject.args_paths[i] for i in subject.wanted]
    with torch.enable_grad():
        total = [grad.sum() for grad in grads[:count] if grad is not None and grad.requires_grad]
        mixed: Sequence[Tensor | None] = [None] * len(names)
        if total and loss.requires_grad:
            mixed = torch.autograd.grad(torch.stack(total).sum(), roots[count:], allow_unused=True)
    silent = [name for name, term in zip(names, mixed, strict=True) if term is None]
    if silent:
        return Finding(
            check,
            "note",
            f"{short(silent)}: requires grad, but the inner gradient does not depend on it: hypergradient zero",
            fix="use it in a term with params, or do not learn it",
        )
    return Finding(check, "ok", f"hypergradient for {short(names)}; {len(subject.args) - len(names)} constants")


def probe_repetition(subject: Subject) -> Finding:
    """The same number at every call; random numbers from torch's global generators may be drawn again."""
    check, device = "deterministic", subject.params[0].device
    held = HiddenState(subject.dynamics.loss)
    loss, grads = _evaluated(subject)
    if held.has_moved() and held.matters(partial(_evaluated, subject), loss, grads, exactly=True):
        raise held.error()
    first = subject.value()
    with torch.enable_grad(), subject.replayed():
        roots, args = subject.roots()
        again = subject.dynamics.losses(roots[: len(subject.params)], args).detach()
        draws = random_state.changed(subject.generators, random_state.present(device))
    tolerance = max(1e-3, 4 * torch.finfo(first.dtype).eps)  # looser than round-off, which may differ on a GPU
    if not torch.isclose(again, first, rtol=tolerance, atol=1e-6):
        raise RandomnessError(
            f"the inner loss was {float(first):.6g}, and {float(again):.6g} at the same params again",
            "the same number",
            "draw from torch's global generator, or pass the numbers in batches; keep no state in the loss",
        )
    if draws:
        return Finding(
            check,
            "note",
            "draws from torch's generator: solve draws the same numbers again in the backward pass",
            fix="vmap needs randomness='different' or 'same'; Binomial, Krylov and Implicit refuse such a loss",
        )
    return Finding(check, "ok", f"two calls differ by {abs(float(again - first)):.1g}")


def _evaluated(subject: Subject) -> tuple[Tensor, Sequence[Tensor]]:
    """The loss and all its gradients."""
    roots, loss, grads = subject.gradients(differentiable=False)
    return loss.detach(), derivatives.or_zeros(grads, roots)


def probe_purity(subject: Subject) -> Finding:
    """Nothing that the loss is given, or holds, is changed by it."""
    check = "changes nothing"
    given = dict(zip(subject.params_paths, subject.params, strict=True))
    given |= dict(zip(subject.args_paths, subject.args, strict=True))
    held = named_tensors(subject.dynamics.loss)
    watched = {**held, **given}
    versions = {name: tensor._version for name, tensor in watched.items() if not tensor.is_inference()}
    subject.value()
    changed = [name for name, version in versions.items() if watched[name]._version != version]
    if changed:
        raise InPlaceError(
            f"the inner loss changes {short(changed)} in place",
            "a function without side effects",
            "write x = x + y for x += y; batch norm: track_running_stats=False, or GroupNorm",
        )
    return Finding(check, "ok", f"{len(given)} tensors given, {len(held)} held: all as before")
