"""What became of a call: a number equal to the oracle's, a refusal that was due, or a finding."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch
from fuzz.answers import oracle
from fuzz.calls import TASK_MODES, Call
from fuzz.losses import NEEDS_VALUES, NO_VMAP, RANDOM
from fuzz.modes import Found, run
from torch import Tensor

import diffopt
from diffopt import DiffoptError

GOOD = ("equal", "refused", "finite, no oracle", "plain code fails alike")


TRANSFORMED = ("func", "jacrev", "batched_grads")
"""Modes of a transform without a batch of tasks."""


@dataclass(frozen=True)
class Verdict:
    """The outcome in a word, and what was seen."""

    outcome: str
    seen: str = ""
    error: str = ""

    @property
    def good(self) -> bool:
        return self.outcome in GOOD


def judge(call: Call) -> Verdict:
    """Make a call and set it beside its oracle."""
    due = must_refuse(call)
    before = _state()
    try:
        with warnings.catch_warnings():
            _only_strange_warnings()
            found = run(call)
    except DiffoptError as error:
        return _refused(call, error, due) if _state() == before else Verdict("mode left changed")
    except Exception as error:
        if _plain_fails_alike(call, error):
            return Verdict("plain code fails alike", str(error), type(error).__name__)
        left = "" if _state() == before else " (and a mode of torch's is left changed)"
        return Verdict("raw error", str(error) + left, type(error).__name__)
    if _state() != before:
        return Verdict("mode left changed")
    if due:
        return Verdict("accepted", f"expected {[kind.__name__ for kind in due]}")
    return _compared(call, found)


def _plain_fails_alike(call: Call, error: Exception) -> bool:
    """Whether the plain loop meets the same error: it is the loss's own."""
    try:
        oracle(call)
    except Exception as own:
        return type(own) is type(error) and str(own) == str(error)
    return False


def _only_strange_warnings() -> None:
    """Take a warning for an error, such as that of an imaginary part lost; not this library's, nor torch's routine."""
    warnings.simplefilter("error")
    for kind in (DeprecationWarning, FutureWarning, *(k for k in vars(diffopt).values() if isinstance(k, type))):
        if issubclass(kind, Warning):
            warnings.simplefilter("ignore", kind)
    warnings.filterwarnings("ignore", message=".*performance drop")


def _state() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch._C._functorch.maybe_current_level(),
        torch._C._len_torch_function_stack(),
        torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch.is_autocast_enabled("cpu"),
    )


def _refused(call: Call, error: DiffoptError, due: tuple[type[DiffoptError], ...]) -> Verdict:
    said, name = str(error), type(error).__name__
    if "expected" not in said:
        return Verdict("says nothing of what was expected", said, name)
    if type(error) in due or type(error) in may_refuse(call):
        return Verdict("refused", said, name)
    if isinstance(error, diffopt.DivergenceError | diffopt.NonFiniteGradientError | diffopt.NonFiniteLossError):
        answer = oracle(call)
        if answer is not None and not all(bool(x.isfinite().all()) for x in answer.gradients):
            return Verdict("refused", said, name)
    return Verdict("refused what is right", said, name)


def must_refuse(call: Call) -> tuple[type[DiffoptError], ...]:
    """The errors of which one has to come."""
    spec = call.estimator
    if call.mode == "inference":
        return (diffopt.GradModeError, diffopt.StepsError)
    if spec.name == "Truncated" and spec.get("steps") > call.steps:
        return (diffopt.StepsError,)
    if spec.name == "Binomial" and (spec.get("window") or 0) > call.steps:
        return (diffopt.StepsError,)
    if spec.name == "Implicit" and call.steps == 0:
        return (diffopt.StepsError,)
    if call.mode == "second" and "Unrolled" not in (spec.name, spec.get("adjoint")):
        return (diffopt.SecondDerivativeError, *may_refuse(call))
    return ()


def may_refuse(call: Call) -> tuple[type[DiffoptError], ...]:
    """The errors that are allowed beside an answer."""
    spec, special, allowed = call.estimator, call.loss.specials, []
    ahead = spec.batches_steps or spec.get("adjoint") == "ForwardMode"
    if special & RANDOM and (ahead or spec.name == "Implicit" or call.mode in ("jacrev", "batched_grads")):
        allowed.append(diffopt.RandomnessError)
    if special & (NEEDS_VALUES | NO_VMAP) and (ahead or call.mode in (*TASK_MODES, "jacrev", "batched_grads")):
        allowed.append(diffopt.VmapError)
    if call.mode in (*TRANSFORMED, *TASK_MODES):  # torch itself refuses these under torch.func
        allowed += [diffopt.GradModeError] if "checkpoint" in special else []
        allowed += [diffopt.VmapError] if "gradient_penalty" in special else []
    if "wants_grad" in call.spectators and call.mode == "mean_over_tasks":
        allowed.append(diffopt.CapturedTensorError)
    if spec.name == "Implicit":
        allowed.append(diffopt.LinearSolveError)
        allowed += [diffopt.EstimatorError] if call.rule.kind == "adamw" else []  # whose decay is decoupled
    return tuple(allowed)


def tolerance(call: Call) -> float:
    """The largest relative error that round-off (and the estimator's own differences and solves) explain."""
    names = (call.estimator.name, call.estimator.get("adjoint"))
    if call.mode == "autocast":
        return 0.1  # eight bits, in another order
    if call.dtype == torch.float32:
        return 0.05 if "ESJacobian" in names else 5e-3  # six steps through roots of squares
    return 1e-4 if "ESJacobian" in names else 1e-5 if "Implicit" in names else 1e-7


def _compared(call: Call, found: Found) -> Verdict:
    values = [*found.gradients, *(found.leaves or [])]
    if not all(bool(x.isfinite().all()) for x in values):
        return Verdict("not finite")
    answer = oracle(call)
    if answer is None:
        return Verdict("finite, no oracle")
    if found.leaves is not None and answer.leaves is not None:
        error = _error(found.leaves, answer.leaves)
        if error > tolerance(call):
            return Verdict("silent: solution", f"{error:.1e}")
    if found.losses is not None and answer.losses is not None:
        if found.losses.shape != answer.losses.shape:
            return Verdict("silent: losses", f"{found.losses.shape} {answer.losses.shape}")
        if found.losses.numel() and _error([found.losses], [answer.losses]) > tolerance(call):
            return Verdict("silent: losses", f"{found.losses} {answer.losses}")
    if call.dtype == torch.float32 and call.estimator.name == "ESJacobian":
        return Verdict("finite, no oracle")  # differences of 1e-4 in single precision
    error = _error(found.gradients, answer.gradients)
    return Verdict("equal") if error <= tolerance(call) else Verdict("silent: hypergradient", f"{error:.1e}")


def _error(found: list[Tensor], answer: list[Tensor]) -> float:
    """The largest difference relative to its tensor, or to a thousandth of the largest number of all."""
    if [x.shape for x in found] != [x.shape for x in answer]:
        return float("inf")
    pairs = [(x.detach(), y.detach()) for x, y in zip(found, answer, strict=True) if x.numel()]
    if not pairs:
        return 0.0
    largest = max(float(y.abs().max()) for _, y in pairs)
    floor = max(1e-3 * largest, 1e-9)
    return max(float((x - y).abs().max()) / max(float(y.abs().max()), floor) for x, y in pairs)


@dataclass
class Tally:
    """How many calls were made, by kind and outcome, and the findings, one of each kind."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_estimator: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: dict[tuple[str, ...], tuple[object, Verdict]] = field(default_factory=dict)

    def add(self, kind: str, verdict: Verdict, call: object, key: tuple[str, ...]) -> None:
        """Count a call; keep the smallest one of each kind of finding."""
        self.counts[kind, verdict.outcome] += 1
        if not verdict.good:
            place = (verdict.outcome, verdict.error, verdict.seen[:60] if verdict.error else "", *key)
            if place not in self.findings or len(repr(call)) < len(repr(self.findings[place][0])):
                self.findings[place] = (call, verdict)

    def table(self) -> str:
        """The counts as text."""
        parts = [_table("kind", self.counts), _table("estimator", self.by_estimator)]
        return "\n\n".join([*parts, f"{sum(self.counts.values())} calls, {len(self.findings)} kinds of findings"])


def _table(title: str, counts: Counter[tuple[str, str]]) -> str:
    outcomes, kinds = (sorted({pair[i] for pair in counts}) for i in (1, 0))
    lines = [f"{title:32}" + "".join(f"{outcome[:22]:>24}" for outcome in outcomes)]
    lines += [f"{kind:32}" + "".join(f"{counts[kind, o]:>24}" for o in outcomes) for kind in kinds]
    return "\n".join(lines)
