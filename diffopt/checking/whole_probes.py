"""The probes of a whole solve: whether its hypergradient is worth anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from diffopt.adjoint.smoothness import CALMER, CLOSE, WORTHLESS, Smoothness, smoothness
from diffopt.checking.whole import PIECES, Found, Whole
from diffopt.errors import DiffoptError, PrecisionError, SmoothnessError, WrongDerivativeError
from diffopt.reports import Finding
from diffopt.rollout.inputs import Place

CHECKS = ("adjoint", "smooth", "precise")

_GROWN = 1e3
"""The growth of the adjoint from which on it is worth a note."""

_LESS_ROUND_OFF = "let the loss run in float64, or take fewer steps"

_SHRUNK = 1e-3
"""The share of the adjoint at the end below which what is left of it at the start does not count."""


def probe_whole(whole: Whole, directions: int) -> list[Finding]:
    """The findings on a solve, one for each of :data:`CHECKS`."""
    reference = _in_double(whole)
    used, found = reference or (whole, _derivatives(whole))
    if isinstance(found, DiffoptError):
        skipped = [Finding(check, "skipped", "needs a solve that can be differentiated") for check in CHECKS[1:]]
        return [Finding.of(CHECKS[0], found), *skipped]
    return [
        probe_adjoint(found, whole.dynamics.layout.inner_steps),
        _finding("smooth", lambda: probe_smoothness(used, found, directions)),
        _finding("precise", lambda: probe_precision(whole, found if reference else None)),
    ]


def probe_adjoint(found: Found, steps: int) -> Finding:
    """How the norm of the adjoint of the params changes from the last step back to the first."""
    ratios = found.ratios
    largest = max(ratios)
    if largest <= _GROWN:
        return Finding("adjoint", "ok", f"its norm stays within {min(ratios):.1e} to {largest:.1e} of that at the end")
    back = max(1, steps - found.every * ratios.index(largest))
    text = f"its norm grows {largest:.1e} times over {back} steps on the way back, {largest ** (1 / back):.2g} a step"
    return Finding("adjoint", "note", text, fix=f"inner steps that diverge or are chaotic: {CALMER}")


def probe_smoothness(whole: Whole, found: Found, directions: int) -> Finding:
    """Whether the end of the steps moves as the hypergradient says, for moves such as an outer optimizer makes.

    # NOTE [rough, or chaotic]
    Kinks (ReLU, max) and Adam's near-signs make the end jump a little at every move. An outer loss hardly sees it: that
    is a note. Where the adjoint grows as well, jumps and round-off grow with it, and there is no such outer loss.

    Raises:
        WrongDerivativeError, SmoothnessError: it does not.
    """

    def of_part(places: Sequence[Place]) -> Smoothness:
        leaves = [whole.inputs.at(place) for place in places]
        slopes = [found.hypergradient[place] for place in places]
        return smoothness(lambda moved: whole.value(dict(zip(places, moved, strict=True))), leaves, slopes, directions)

    each = {name: of_part(places) for name, places in whole.parts.items()}
    hidden = [name for name, found in each.items() if found.hidden]
    if len(hidden) == len(each):
        return _hidden_finding(hidden)
    told = [pair for pair in each.items() if not pair[1].hidden]
    name, worst = max(told, key=lambda pair: (pair[1].derivative is False, pair[1].error))
    text = f"off differences of the end by {worst} of {name}"
    if worst.derivative is False:
        raise WrongDerivativeError(
            f"the hypergradient is {text}, which agree with one another",
            f"at most {CLOSE:g}",
            "look for detach(), .item() or no_grad in the loss or in the optimizer's update",
        )
    if worst.error > WORTHLESS and max(found.ratios) > _GROWN:
        raise SmoothnessError(
            f"the hypergradient is {text}",
            f"at most {WORTHLESS:g} for moves of 0.0001 or more",
            f"the steps are chaotic, and no estimator's number says much: {CALMER}",
        )
    if worst.error <= CLOSE:
        return _hidden_finding(hidden, f"{text}; ") if hidden else Finding("smooth", "ok", text)
    if worst.cut_short:
        text += ", smaller ones lost in round-off: whether it is the derivative cannot be told"
        return Finding("smooth", "note", text, fix=_LESS_ROUND_OFF)
    if worst.undefined:
        text += ": the end is not defined there, or not finite"
        return Finding("smooth", "note", text, fix="move what is at the edge of where the loss is defined")
    fix = "the end jumps; see what the outer loss makes of that, diffopt.compare(problem, [], directions=3)"
    return Finding("smooth", "note", text, fix=fix)


def _hidden_finding(parts: Sequence[str], text: str = "") -> Finding:
    """What is said of parts whose influence on the end is too small to look at."""
    text += f"moves of {' and '.join(parts)} change the end by less than its round-off: cannot be told"
    return Finding("smooth", "note", text, fix=_LESS_ROUND_OFF)


def probe_precision(whole: Whole, reference: Found | None) -> Finding:
    """The hypergradient in its own precision beside that in double precision (``None``: the loss does not run in it).

    Raises:
        PrecisionError: they have little in common.
    """
    own = whole.derivatives()
    kind = str(whole.inputs.params[0].dtype).removeprefix("torch.")
    if reference is None:
        return Finding("precise", "note", f"{kind}; the loss does not run in float64, to compare it with")
    if own.drawn != reference.drawn:
        return Finding(
            "precise", "skipped", f"from one seed, the loss draws other random numbers in float64 than in {kind}"
        )
    errors = {name: _error(own, reference, places) for name, places in whole.parts.items()}
    name, worst = max(errors.items(), key=lambda pair: pair[1])
    text = f"{kind}, {worst:.1e} off float64 in {name}"
    if worst > WORTHLESS:
        raise PrecisionError(
            f"the hypergradient in {kind} is {worst:.0%} off that in float64 in {name}",
            f"at most {WORTHLESS:.0%}",
            f"keep params in float32 and the sensitive part of the loss out of lower precisions, or {CALMER}",
        )
    if worst > CLOSE:
        return Finding("precise", "note", text, fix=f"use a higher precision, or {CALMER}")
    return Finding("precise", "ok", text)


def _in_double(whole: Whole) -> tuple[Whole, Found] | None:
    """The solve and its derivatives in double precision, if it has them there."""
    double = whole.in_double()
    try:
        found = double.derivatives(PIECES)
    except Exception:  # a loss may ask for a precision in any way
        return None
    return (double, found) if all(x.dtype == torch.float64 for x in found.hypergradient.values()) else None


def _derivatives(whole: Whole) -> Found | DiffoptError:
    with suppress(DiffoptError):
        return whole.derivatives(PIECES)
    try:  # in one piece, whose steps an error counts from the first
        return whole.derivatives()
    except DiffoptError as error:
        return error


def _finding(check: str, probe: Callable[[], Finding]) -> Finding:
    """What a probe finds; an error that it meets is its finding."""
    try:
        return probe()
    except DiffoptError as error:
        return Finding.of(check, error)


def _error(own: Found, reference: Found, places: Sequence[Place]) -> float:
    """The relative error of one part; of params whose influence is all but gone, relative to what it was."""
    flat = [_flat([found.hypergradient[place] for place in places]) for found in (own, reference)]
    least = _SHRUNK * reference.adjoints[-1] if places[0].part == "params" else 0.0
    return float((flat[0] - flat[1]).norm()) / (max(float(flat[1].norm()), least) + 1e-300)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in tensors])
