"""The probe of second derivatives: autograd's curvature products beside differences of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.checking.inner_loss import Subject
from diffopt.checking.probes import short
from diffopt.errors import DiffoptError, NonFiniteGradientError, WrongDerivativeError
from diffopt.reports import Finding
from diffopt.rollout.field import stands_behind
from diffopt.tensors import autograd_graph, derivatives
from diffopt.tensors.leaves import all_finite, norm

CHECK = "second derivative"


class _Setting(NamedTuple):
    """How closely a precision lets a difference be taken: radii tried, relative error allowed."""

    radii: tuple[float, ...]
    rtol: float


# NOTE [several radii]
# Differences across a kink (ReLU, max) are far off at a large radius and right once the radius is too small to reach
# it (a large network has one everywhere near); those at a tiny radius drown in round-off. A wrong derivative is off at
# every radius, always by as much.
_SETTINGS = {
    torch.float64: _Setting((1e-4, 1e-6, 1e-8), 1e-3),
    torch.float32: _Setting((1e-2, 3e-3, 1e-3), 5e-2),
}


class _Comparison(NamedTuple):
    """Products beside differences at several radii.

    Attributes:
        error: the smallest relative error over the radii.
        smooth: whether the differences at two radii agree with one another, so that an error is the product's.
        worst: where the error is largest.
    """

    error: float
    smooth: bool
    worst: str


class _Direction(NamedTuple):
    """A direction in the parameters and one in the arguments that require grad."""

    params: list[Tensor]
    args: list[Tensor]


def probe_second_derivative(subject: Subject, directions: int) -> Finding:
    r"""Whether autograd's curvature products are the derivatives of the gradient.

    .. math:: H u = \nabla_\phi (g^\top u)\ \text{beside}\ \frac{g(\phi + h u) - g(\phi - h u)}{2h},\qquad
              u^\top M b = \nabla_\theta (g^\top u)^\top b\ \text{beside}\
              u^\top\frac{g(\theta + h b) - g(\theta - h b)}{2h}

    with ``g`` the inner gradient and ``theta`` the arguments that require grad, for random directions ``u`` and ``b``;
    in double precision where the loss runs in it.
    """
    _products(subject, _directions(subject, 1)[0])  # in its own precision: that all derivatives exist there
    used, precision = _precise(subject)
    name = str(precision).removeprefix("torch.")
    if precision not in _SETTINGS:
        return Finding(CHECK, "note", f"exists; not compared with differences, which {name} is too coarse for")
    setting, remark = _SETTINGS[precision], ""
    found = _comparisons(used, directions, setting)
    if any(c.error > setting.rtol and not c.smooth for c in found):
        # params sit on a kink, such as |x| at zero: beside it, curvature is what it should be
        steps = zip(used.params, _directions(used, 1)[0].params, strict=True)
        moved = used.at([x + 1e-2 * (1e-2 + x.abs().mean()) * u.sign() for x, u in steps])
        found, remark = _comparisons(moved, directions, setting), ", beside a kink"
    worst = max(found, key=lambda c: c.error)
    if worst.error <= setting.rtol:
        text = f"HVP within {worst.error:.1e} of differences along {directions} directions ({name}{remark})"
        kinks = "second derivatives leave kinks out" if remark else ""
        return Finding(CHECK, "note" if remark else "ok", text, fix=kinks)
    if not worst.smooth:
        text = f"differences of the gradient do not settle ({name}): the loss has kinks all around params"
        return Finding(CHECK, "note", text, fix="expect noisy hypergradients; smooth the loss, or use ESJacobian(...)")
    raise WrongDerivativeError(
        f"autograd's second derivative is {worst.error:.0%} off finite differences, most in {worst.worst}",
        f"at most {setting.rtol:.0e}",
        "look for weight_norm, detach(), .item(), no_grad or a function of your own whose backward is not "
        "differentiable; or use FirstOrder()",
    )


def _precise(subject: Subject) -> tuple[Subject, torch.dtype]:
    """The subject in double precision if it runs in it, else in its own; and the precision of its values."""
    for candidate in (subject.in_double(), subject):
        try:
            _, loss, grads = candidate.gradients(differentiable=False)
        except DiffoptError:  # it asks for another precision
            continue
        kinds = [loss.dtype, *(g.dtype for g in grads if g is not None)]
        coarsest = max(kinds, key=lambda kind: torch.finfo(kind).eps)
        if coarsest == torch.float64 or not candidate.double:
            return candidate, coarsest
    raise AssertionError("the subject itself has been run before")


def _directions(subject: Subject, count: int) -> list[_Direction]:
    """Random directions of about the inputs' own size, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)

    def one(x: Tensor) -> Tensor:
        size = x.abs().mean()
        normal = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        return torch.where(size > 0, size, 1) * normal

    args = [subject.args[i] for i in subject.wanted]
    return [_Direction([one(x) for x in subject.params], [one(x) for x in args]) for _ in range(count)]


def _products(subject: Subject, direction: _Direction) -> tuple[list[Tensor], list[Tensor]]:
    """``H u`` and ``M' u`` by autograd twice, zeros where nothing depends on an input; of a field ``V u`` for ``H u``.

    (Its transpose, which ``V' u`` is the product with, is the derivative along no direction.)
    """
    roots, loss, grads = subject.gradients(differentiable=True)
    count = len(direction.params)
    autograd_graph.refuse_broken_graph([g.grad_fn for g in grads[:count] if g is not None])
    with torch.enable_grad():
        along = None
        if stands_behind(loss):
            along = derivatives.pushforward(grads[:count], roots[:count], direction.params)
        products = list(derivatives.pullback(grads[:count], roots, direction.params))
        if along is not None:
            products[:count] = derivatives.filled(along, subject.params)
    if not all_finite(products):
        wrong = [path for path, x in zip(subject.paths, products, strict=True) if not all_finite([x])]
        raise NonFiniteGradientError(
            f"the second derivative is NaN or infinite in {wrong[0]}",
            "finite numbers",
            "check for roots, norms or logarithms at zero",
        )
    return products[:count], products[count:]


def _comparisons(subject: Subject, count: int, setting: _Setting) -> list[_Comparison]:
    """Along every direction: ``H u`` leaf by leaf, and ``u' M b`` for a direction ``b`` in the arguments."""
    found, args = [], [subject.args[i] for i in subject.wanted]
    for direction in _directions(subject, count):
        own, mixed = _products(subject, direction)
        nowhere = _Direction([x.new_zeros(()) for x in own], [x.new_zeros(()) for x in mixed])
        along_params = direction._replace(args=nowhere.args)
        found.append(_compare(subject, own, along_params, setting, subject.params_paths))
        if args:
            along_args = direction._replace(params=nowhere.params)
            names = (short(subject.paths[len(own) :]),)
            weighted = [_dot(mixed, direction.args)]
            found.append(_compare(subject, weighted, along_args, setting, names, direction.params))
    return found


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).double().sum() for x, y in zip(a, b, strict=True)]).sum()


def _compare(
    subject: Subject,
    products: Sequence[Tensor],
    direction: _Direction,
    setting: _Setting,
    names: Sequence[str],
    weights: Sequence[Tensor] | None = None,
) -> _Comparison:
    """Products beside differences of the gradient along a direction (of its product with ``weights``, if any)."""
    best, before = _Comparison(math.inf, False, names[0]), None
    for radius in setting.radii:
        slope, noise = _difference(subject, direction, radius)
        slope = slope if weights is None else [_dot(slope, weights)]
        noise = noise if weights is None else noise * norm(weights)
        scale = max(norm(products), norm(slope)) + noise / setting.rtol + 1e-300
        errors = [float((p - s).double().norm()) / scale for p, s in zip(products, slope, strict=True)]
        smooth = best.smooth or (
            before is not None
            and norm([s - b for s, b in zip(slope, before, strict=True)]) <= 10 * setting.rtol * scale
        )
        if math.hypot(*errors) < best.error:
            best = best._replace(error=math.hypot(*errors), worst=names[errors.index(max(errors))])
        best, before = best._replace(smooth=smooth), slope
    return best


def _difference(subject: Subject, direction: _Direction, radius: float) -> tuple[list[Tensor], float]:
    """The central difference of the gradient along a direction, and the round-off to expect in its norm."""
    ends = []
    args = [subject.args[i] for i in subject.wanted]
    for sign in (radius, -radius):
        moved = subject.at(
            [x + sign * u for x, u in zip(subject.params, direction.params, strict=True)],
            [x + sign * u for x, u in zip(args, direction.args, strict=True)],
        )
        _, _, grads = moved.gradients(differentiable=False)
        ends.append(derivatives.or_zeros(grads[: len(subject.params)], subject.params))
    slope = [(up - down) / (2 * radius) for up, down in zip(*ends, strict=True)]
    coarsest = max(torch.finfo(x.dtype).eps for x in slope)
    return slope, 100 * coarsest * norm([x for end in ends for x in end]) / radius
