"""``check_optimizer``: the contract of an inner optimizer, its derivatives, batches of tasks, and forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError, OptimizerError, StepsError
from diffopt.optimizers.base import Optimizer
from diffopt.optimizers.binding import bind
from diffopt.reports import Finding, Report
from diffopt.tensors import hints, tree
from diffopt.tensors.arguments import check_integer
from diffopt.testing.findings import at_most, equal, holds, run, title
from diffopt.testing.hyperparameters import bare, changed, forms, with_forms
from diffopt.testing.optimizer_case import Inputs, Trial, wavy


def check_optimizer(
    optimizer: Optimizer,
    *,
    params: Any = None,
    reference: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    steps: int = 4,
) -> Report:
    """Test the contract of an optimizer and its derivatives, all of it before it says what is broken.

    * what ``init`` and ``update`` return keeps its structure, shapes and dtypes; an update changes nothing it is given
      and gives the same again;
    * the hypergradient of the initial params, of what the loss reads and of every hyperparameter (every float and
      floating tensor in the fields) is that of central differences through ``steps`` steps;
    * under ``vmap``, over params and over hyperparameters, the numbers are those of a loop: ``elementwise`` is true;
    * a hyperparameter is the same as a float, a tensor, a tree and a :class:`~diffopt.Schedule`, unless the optimizer
      refuses that form by a :class:`~diffopt.HyperparameterError`;
    * nothing is NaN where gradients are exactly zero; float32 stays float32;
    * each step is that of ``reference``.

    Costs about a second.

    Args:
        optimizer: what to test, its hyperparameters where its formula is smooth.
        params: the params it is for, if its fields are trees like them: a tree of floating tensors.
        reference: makes the ``torch.optim`` optimizer that it should equal, from a list of parameters.
        steps: inner steps, at least 2; the length of its schedules.

    Returns:
        A :class:`Report`; ``print`` it.

    Raises:
        ConformanceError: as for :func:`check_estimator`.
        OptimizerError, StepsError: ``optimizer`` is not one, or no dataclass, or ``steps`` less than 2.
        StructureError, HyperparameterError, ShapeError: a field does not hold a hyperparameter for such params.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, diffopt
        >>> from diffopt.testing import check_optimizer
        >>> @dataclass(frozen=True)
        ... class Descent(diffopt.Optimizer):
        ...     lr: float
        ...     def init(self, params):
        ...         return {}
        ...     def update(self, params, grads, buffers, step):
        ...         return params - self.lr * grads, buffers
        >>> check_optimizer(Descent(0.1), reference=lambda params: torch.optim.SGD(params, lr=0.1)).broken
        ()
        >>> try:
        ...     check_optimizer(Descent(0.1), reference=lambda params: torch.optim.SGD(params, lr=0.2))
        ... except diffopt.ConformanceError as error:
        ...     print(str(error).splitlines()[1][:28])
        the steps of SGD: got 8.5e-0
    """
    if not isinstance(optimizer, Optimizer) or not is_dataclass(optimizer):
        got, fix = f"optimizer is {tree.describe(optimizer)}", hints.for_optimizer(optimizer)
        raise OptimizerError(got, "a diffopt.Optimizer and a dataclass", fix)
    steps = check_integer("steps", steps, 2, kind=StepsError)
    if params is None:
        generator = torch.Generator().manual_seed(0)
        params = {
            name: torch.randn(shape, generator=generator) for name, shape in [("a", (2, 3)), ("b", (3,)), ("c", ())]
        }
    trial = _cast(Trial(optimizer, params, steps, reference), torch.float64)
    bind(trial.optimizer, *tree.flatten(trial.params), steps)  # else every check would end in the same error
    checks = (contract, purity, derivatives, tasks, equal_forms, zero_gradients, dtypes, torch_optim)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        return run(title(optimizer), trial, checks)


def _cast(trial: Trial, dtype: torch.dtype) -> Trial:
    params = tree.map_leaves(lambda x: x.detach().to(dtype), trial.params)
    optimizer = changed(trial.optimizer, lambda name, x: x.detach().to(dtype) if isinstance(x, Tensor) else x)
    return replace(trial, params=params, optimizer=optimizer)


def contract(trial: Trial) -> Iterator[Finding]:
    """What ``init`` and ``update`` return looks alike at every step."""
    layouts, fix = list[dict[str, Any]](), "return Leaves([...]) around lists of tensors, and a dict of such buffers"
    for step in trial.walk():
        for params, buffers in ((step.params, step.buffers), step.taken()):
            parts = {"params": params, **buffers}
            kinds = {type(part).__name__ for part in parts.values()}
            if kinds != {"Leaves"}:
                yield equal(f"step {step.number} takes and returns", kinds, {"Leaves"}, fix)
                return
            layouts.append({name: [(x.shape, x.dtype) for x in parts[name]] for name in sorted(parts)})
    different = sum(layout != layouts[0] for layout in layouts)
    fix = "return buffers by the same names, shapes and dtypes from init on, at every step"
    yield at_most("states that differ in structure from the first", different, 0, fix)
    kind: Any = type(trial.optimizer)
    yield holds("is a frozen dataclass", kind.__dataclass_params__.frozen, "write @dataclass(frozen=True)")


def purity(trial: Trial) -> Iterator[Finding]:
    """An update changes nothing it is given, and gives the same again."""
    kept, repeated = True, True
    for step in trial.walk():
        before = [(x.clone(), x._version) for x in step.tensors()]
        (one, first), (two, second) = step.taken(), step.taken()
        pairs = zip(before, step.tensors(), strict=True)
        kept &= all(torch.equal(old, x) and version == x._version for (old, version), x in pairs)
        results = ([*p, *(x for name in sorted(b) for x in b[name])] for p, b in ((one, first), (two, second)))
        repeated &= all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    yield holds("changes nothing that it is given", kept, "avoid operations in place: x += y, x.add_(y)")
    yield holds("repeats itself", repeated, "check for state outside the buffers, random numbers")


def derivatives(trial: Trial) -> Iterator[Finding]:
    """The hypergradient of every input is that of central differences along one direction."""
    found, inputs = trial.gradient(trial.inputs), trial.inputs
    size = 1 + abs(float(trial.value(inputs).detach()))
    generator = torch.Generator().manual_seed(1)
    for name, x in inputs.items():
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.ndim else torch.ones_like(x)
        width = _width(x) if name in trial.hyperparameters else 1e-5
        slope, expected = float((found[name] * direction).sum()), _slope(trial, inputs, name, direction, width)
        # the values' round-off, some 1e-14, in the differences: 1e-5 of that is what the claim below allows for
        error = abs(slope - expected) / max(abs(slope), abs(expected), 1e-9 / width * size)
        fix = f"check how {name} enters the update: .detach(), .item(), float(), torch.no_grad()"
        yield at_most(f"{name}: derivative", error, 1e-5, fix)


def _width(x: Tensor) -> float:
    """How far a hyperparameter is moved: not to where it has another sign, so less than 1e-5 if it is small itself."""
    positive = x[x > 0]
    return min(1e-5, 0.03 * float(positive.min())) if positive.numel() and not bool((x < 0).any()) else 1e-5


def _slope(trial: Trial, inputs: Inputs, name: str, direction: Tensor, width: float) -> float:
    """Central differences of two widths, combined so that the error is of fourth order."""

    def central(width: float) -> float:
        high, low = (trial.value({**inputs, name: inputs[name] + w * direction}) for w in (width, -width))
        return float((high - low).detach()) / (2 * width)

    return (4 * central(width / 2) - central(width)) / 3


def tasks(trial: Trial) -> Iterator[Finding]:
    """Tasks that differ in their start, or in their hyperparameters, do as they do alone."""
    own = [name for name in trial.inputs if name.startswith("init") or name == "target"]
    for what, batched in (("params", own), ("hyperparameters", list(trial.hyperparameters))):
        if not batched:
            continue
        rows = [{**trial.inputs, **{name: f * trial.inputs[name] for name in batched}} for f in (1.0, 0.9, 0.8)]
        fix = "check norms and sums over more than a coordinate, if elementwise is set, and what depends on shapes"
        yield at_most(f"vmap over {what}: as in a loop", _off(trial, rows, batched), 1e-9, fix)


def _off(trial: Trial, rows: list[Inputs], batched: list[str]) -> float:
    names = list(trial.inputs)

    stacked = {name: torch.stack([row[name] for row in rows]) if name in batched else rows[0][name] for name in names}
    dims = {name: 0 if name in batched else None for name in names}
    got = torch.func.vmap(torch.func.grad(trial.value), in_dims=(dims,))(stacked)
    errors = [0.0]
    for i, row in enumerate(rows):
        alone = trial.gradient(row)
        errors += [_error(got[name][i], alone[name]) for name in names]
    return max(errors)


def equal_forms(trial: Trial) -> Iterator[Finding]:
    """A number is the same as a float, a tensor, a tree and a schedule."""
    usual = trial.final(trial.inputs)
    for name, value in bare(trial.optimizer).items():
        others = {key: x for key, x in trial.inputs.items() if key != name}
        worst, notes = 0.0, []
        for form, x in forms(trial.params, value, trial.steps).items():
            if trial.refuses(name, x):
                notes.append(f"{form}: refused")
                continue
            error, note = _compared(replace(trial, optimizer=with_forms(trial.optimizer, {name: x})), others, usual)
            worst, notes = max(worst, error), notes + [f"{form}: {note}"] * bool(note)
        fix = f"check arithmetic with {name} that is not that of Leaves"
        said = f" ({', '.join(notes)})" if notes else ""
        yield at_most(f"{name}: the same in every form{said}", worst, 1e-12, fix)


def _compared(trial: Trial, inputs: Inputs, usual: list[Tensor]) -> tuple[float, str]:
    """How far the final params are from the usual ones, and the name of the error if there is one."""
    try:
        return max(_error(a, b) for a, b in zip(trial.final(inputs), usual, strict=True)), ""
    except HyperparameterError:  # where it meets the shapes of the params
        return 0.0, "refused"
    except Exception as error:
        return math.inf, type(error).__name__


def zero_gradients(trial: Trial) -> Iterator[Finding]:
    """Where gradients are exactly zero, nothing is NaN."""
    losses = {"one coordinate has": _dead, "nothing has": lambda params, target: 0 * wavy(params, target)}
    for what, loss in losses.items():
        found = [*trial.final(trial.inputs, loss), *trial.gradient(trial.inputs, loss).values()]
        fix = "check roots and quotients at zero: Leaves.sqrt has slope 0 there, torch.sqrt an infinite one"
        yield holds(f"finite where {what} no gradient", all(bool(x.isfinite().all()) for x in found), fix)


def _dead(params: Any, target: Tensor) -> Tensor:
    """A loss that multiplies the first entry of each leaf by zero, like a feature that is never there."""
    return wavy(tree.map_leaves(lambda x: x * (torch.arange(x.numel()).reshape(x.shape) > 0), params), target)


def dtypes(trial: Trial) -> Iterator[Finding]:
    """Params keep their precision."""
    wide = trial.final(trial.inputs)
    narrow = _cast(trial, torch.float32)
    found = narrow.final({name: x.to(torch.float32) for name, x in narrow.inputs.items()})
    kinds = {str(x.dtype) for x in found}
    yield equal("float32 stays float32", kinds, {"torch.float32"}, "check constants made in another precision")
    error = max(_error(a, b) for a, b in zip(found, wide, strict=True))
    yield at_most("float32: the numbers of float64", error, 1e-3, "check numbers that single precision cannot hold")


def torch_optim(trial: Trial) -> Iterator[Finding]:
    """Every step is that of the reference."""
    if trial.reference is None:
        return
    params = [torch.nn.Parameter(x.clone()) for x in tree.flatten(trial.params)[0]]
    reference, target = trial.reference(params), trial.inputs["target"]  # type: ignore[arg-type]
    worst, first = 0.0, 0
    for step in trial.walk():
        for x, gradient in zip(params, torch.autograd.grad(wavy(params, target), params), strict=True):
            x.grad = gradient
        reference.step()
        error = max(_error(a, b.detach()) for a, b in zip(step.taken()[0], params, strict=True))
        first = first or (step.number if not error <= 1e-10 else 0)
        worst = max(worst, error)
    fix = f"step {first}" if first else "every step"
    yield at_most(f"the steps of {type(reference).__name__}", worst, 1e-10, f"check {fix}, the first that differs")


def _error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry or to 1 if that is more."""
    error = float((got.double() - expected.double()).detach().abs().max())
    return error / max(1.0, float(expected.detach().abs().max()))
