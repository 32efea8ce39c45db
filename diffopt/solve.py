"""``solve``: minimise an inner loss by a fixed number of steps, differentiable in everything that went in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, final, overload

from torch import Tensor

from diffopt.adjoint.estimator import Estimator, check_estimator, refuse_changes, versions
from diffopt.adjoint.reverse import Reverse
from diffopt.errors import BatchesError, LossError, OptimizerError, VmapError
from diffopt.inner_problem import checked_problem
from diffopt.optimizers.base import Optimizer
from diffopt.optimizers.held import held
from diffopt.optimizers.prox import Proximal
from diffopt.rollout.along import Form, Observer, Stop
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import VectorField
from diffopt.rollout.problem import Outcome
from diffopt.rollout.record import Counts
from diffopt.rollout.record import Kept as Kept
from diffopt.state import State
from diffopt.tensors import tracing, transforms, tree
from diffopt.tensors.arguments import check_flag, check_function, check_integer, check_number

Params = TypeVar("Params")


@final
@dataclass(frozen=True)
class Solution(Generic[Params]):
    """What :func:`solve` returns.

    Attributes:
        params: final inner parameters, a tree like the initial ones; differentiable in params, args, batches and the
            optimizer's tensors.
        state: final optimizer state (params, buffers and the number of the step), differentiable too, and a place to go
            on from.
        losses: inner losses before each step, shape ``[steps]``; differentiable by the estimators that say so (others
            raise an error in the backward pass). ``losses.detach()`` are the numbers, without what the solve stored.
        observed: what ``observe`` returned after each step, each tensor with a leading axis of length ``steps``;
            differentiable as ``losses`` are.
        aux: what the loss returned besides at each step, likewise, detached.
        steps: how many updates were made: as many as were asked for, unless ``tol`` or ``on_step`` ended them.
        kept: what was stored for the backward pass.
        counts: gradients and curvature products computed, per task; the backward pass adds to it.
        diagnostics: what the estimator reports of its own quality, by name; the backward pass fills it in.
    """

    params: Params
    state: State[Params]
    losses: Tensor
    observed: Any
    aux: Any
    steps: int
    kept: Kept
    counts: Counts
    diagnostics: dict[str, Tensor]


@overload
def solve(
    loss: Callable[..., Any],
    params: State[Params],
    *args: Any,
    optimizer: Optimizer,
    steps: int,
    batches: Any = None,
    estimator: Estimator | None = None,
    check: bool = True,
    compile: bool = False,
    observe: Callable[..., Any] | None = None,
    has_aux: bool = False,
    tol: float | None = None,
    on_step: Callable[[int, float], Any] | None = None,
    micro_batches: int | None = None,
) -> Solution[Params]: ...


@overload
def solve(
    loss: Callable[..., Any],
    params: Params,
    *args: Any,
    optimizer: Optimizer,
    steps: int,
    batches: Any = None,
    estimator: Estimator | None = None,
    check: bool = True,
    compile: bool = False,
    observe: Callable[..., Any] | None = None,
    has_aux: bool = False,
    tol: float | None = None,
    on_step: Callable[[int, float], Any] | None = None,
    micro_batches: int | None = None,
) -> Solution[Params]: ...


@transforms.outside_compile
def solve(
    loss: Callable[..., Any],
    params: Any,
    *args: Any,
    optimizer: Optimizer,
    steps: int,
    batches: Any = None,
    estimator: Estimator | None = None,
    check: bool = True,
    compile: bool = False,
    observe: Callable[..., Any] | None = None,
    has_aux: bool = False,
    tol: float | None = None,
    on_step: Callable[[int, float], Any] | None = None,
    micro_batches: int | None = None,
) -> Solution[Any]:
    r"""Run ``steps`` steps of ``optimizer`` on ``loss`` from ``params``, with a hypergradient by ``estimator``.

    .. math:: s_{t+1} = \Phi_t(s_t) = U(s_t, \nabla_{params}\, loss(params_t, *args); \eta), \qquad t = 1, \dots, T

    Nothing is declared to be a meta-parameter: whatever requires grad, or is differentiated by ``torch.func``, gets
    its hypergradient. Works under ``torch.func.grad``, ``vmap`` (over tasks) and their compositions.

    Args:
        loss: ``loss(params, *args)``, with ``batches`` ``loss(params, *args, batch)``; returns a floating scalar. It
            must get every tensor that is to have a hypergradient through its arguments, not by closure. Or a
            :class:`diffopt.VectorField`, whose value is used where the gradient is.
        params: where the inner problem starts: a tree of floating tensors, or a :class:`diffopt.State` to go on from.
        args: whatever else the loss reads: trees of tensors of any dtype and of other values.
        optimizer: the update rule, such as :class:`diffopt.SGD`; its tensor fields are differentiable.
        steps: number of inner steps ``T``.
        batches: a tree of tensors with a leading axis of length ``steps``; step ``t`` sees entry ``t - 1``. Or a
            function of the step, such as :class:`diffopt.Batches`: ``batches(i)`` is a tree of tensors, where ``i``
            counts from 0, on from that of a state, and all tasks of a vmap around the call get the same ones. They are
            constants. It is called whenever a step is evaluated, in the backward pass too, and must return the same.
        estimator: how the backward pass is computed; default: exact, :class:`diffopt.estimators.Reverse`.
        observe: ``observe(params, *args)``, with ``batches`` ``observe(params, *args, batch)``, called with the params
            after every step and the batch of that step; returns a tree of tensors and numbers, stacked over steps in
            ``Solution.observed``. An outer loss may depend on it: running costs ``sum_t f_t(s_{t+1})``, derivations
            (13.1). Costs its evaluation and, where it is differentiated, one gradient of it a step.
        has_aux: the loss returns a pair ``(loss, aux)``, as in ``torch.func.grad``; ``Solution.aux`` has the trees.
        tol: stop before the step at which the gradient's norm, every task's, is at most this. ``steps`` is then the
            most that are made; ``Solution.steps`` says how many were, ``Solution.diagnostics["converged"]`` whether it
            was reached. Steps then run uncompiled. Not under ``Proximal``.
        on_step: ``on_step(step, loss)`` is called after every step (under ``MultiStep``: every window) with its number,
            counted on from that of a state, and its loss, as numbers; if it returns ``True`` no more steps are made.
            Not under vmap.
        micro_batches: the loss is a mean over the leading axis of its batch (of every tensor of it with that length):
            take its gradient, and the products with its second derivatives, in so many pieces, weighted by their sizes.
            Equal to round-off, in the memory of one piece. By ``Reverse``, ``Truncated``, ``FirstOrder``, ``Reptile``
            and ``Implicit``, and ``MultiStep`` of these; others take the whole loss where they differentiate it. With
            ``check`` the whole loss is compared with the pieces' at steps 1, 2, 4, 8, ... and the last, unless it draws
            random numbers.
        check: refuse, at once and by a typed error, non-finite losses, states and hypergradients, losses that do not
            depend on ``params``, tensors captured by closure, operations without a second derivative, and what is
            changed in place. Costs a few synchronisations on a GPU. (:func:`diffopt.check` looks closer, once.)
        compile: compile the steps, for small models whose time is overhead (tens of seconds, once for a loss, optimizer
            and shapes). On a CPU all steps become one program, and the backward pass another, by ``Reverse``,
            ``Truncated``, ``FirstOrder``, ``Reptile``, ``Binomial``, ``Krylov`` (the backward pass of these two only
            without ``chunk_size`` and ``rtol``) and ``MultiStep`` of these. ``Reverse()`` then keeps all states
            (while they take less than 1 GiB; else as ``"sqrt"``), ``Reverse("sqrt")`` and ``Reverse(k)`` those before
            blocks of steps, which the backward pass takes again. Else, with other estimators, ``"log"``, ``memory``,
            ``offload``, ``on_step`` and batches that are a function, it is each step and, where the estimator is exact
            or truncated, its pullback. ``loss`` must be one function that lives on; numbers that it reads besides its
            arguments must stay as they are (which is checked); tensors may change in place. An update may calculate
            with the number of its step, but not branch on it. What cannot be compiled runs without, with a
            :class:`diffopt.CompileWarning`. (:func:`diffopt.compiled` takes the outer loss, too.)

    Returns:
        A :class:`Solution`.

    Raises:
        LossError: the loss is not one floating scalar.
        NonFiniteLossError, DivergenceError: it is not finite at the start, or later.
        DisconnectedError, CapturedTensorError: it ignores ``params``, or reads tensors it was not given.
        InPlaceError, VmapError: it writes into what it is given, or cannot run under the vmap around the call.
        RanksError: ranks solve different problems, or communicate so that derivatives come out wrong.
        LeafError: ``params`` has a leaf that is not a floating, non-empty tensor.
        StepsError, BatchesError, OptimizerError, EstimatorError: the argument named is not what was expected.
        StructureError, ShapeError, DtypeError, DeviceError: a hyperparameter does not fit ``params``.

    Example:
        The learning rate's hypergradient for one step on ``w**2`` is ``-2w * 2 (w - 0.1 * 2w)``.

        >>> import torch, diffopt
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> w = torch.tensor(1.0)
        >>> solution = diffopt.solve(lambda w: w**2, w, optimizer=diffopt.SGD(lr), steps=1)
        >>> (solution.params**2).backward()
        >>> lr.grad
        tensor(-3.2000)
    """
    chosen = _EXACT if estimator is None else estimator
    check_estimator(chosen)
    check_flag("compile", compile)
    if has_aux is not False:
        check_flag("has_aux", has_aux)
        if isinstance(loss, VectorField):
            raise LossError("has_aux=True of a VectorField", "a loss", "look at params by observe=")
    if observe is not None:
        check_function("observe", observe, "a function observe(params, *args)", LossError)
    problem = checked_problem(loss, params, args, optimizer, steps, batches, check)
    if compile or observe is not None or has_aux:
        aux = Form("what the inner loss returned as aux") if has_aux else None
        observer = None if observe is None else Observer(observe)
        problem = replace(problem, dynamics=replace(problem.dynamics, compile=compile, aux=aux, observer=observer))
    if micro_batches is not None:
        count = _pieces(micro_batches, loss, batches, compile=compile, has_aux=has_aux)
        problem = replace(problem, dynamics=replace(problem.dynamics, micro_batches=count))
    if tol is not None or on_step is not None:
        problem = replace(problem, stop=_stop(tol, on_step, optimizer))
    if not chosen.traced:
        tracing.refuse(f"a solve by {chosen!r}")
    before = versions(problem)
    outcome = chosen.run(problem)
    refuse_changes(problem, before)
    return _solution(problem.dynamics, outcome)


_EXACT = Reverse()


def _pieces(count: Any, loss: Any, batches: Any, *, compile: bool, has_aux: bool) -> int:
    """In how many pieces the batch is taken; refused where that has no meaning."""
    if isinstance(loss, VectorField) or has_aux or compile:
        what = "a VectorField" if isinstance(loss, VectorField) else "has_aux=True" if has_aux else "compile=True"
        raise LossError(
            f"micro_batches with {what}", "a loss that is a mean over its batch, uncompiled", "leave one out"
        )
    if batches is None:
        raise BatchesError(
            "micro_batches without batches", "a batch to take in pieces", "pass the data as batches=lambda step: data"
        )
    return int(check_integer("micro_batches", count, 1))


def _stop(tol: Any, on_step: Any, optimizer: Optimizer) -> Stop:
    """What may end the steps early."""
    if tol is not None and any(isinstance(x, Proximal) for x in held(optimizer)):
        raise OptimizerError(
            f"tol={tol!r} with Proximal, at whose solution the gradient is not zero",
            "an optimizer that ends at a small gradient",
            "leave out tol, and look at Solution.diagnostics['stationarity'] (of Implicit)",
        )
    if on_step is not None:
        check_function("on_step", on_step, "a function on_step(step, loss)", LossError)
        if transforms.inside_vmap():
            raise VmapError(
                "on_step is called with numbers, and the solve runs under vmap", "a solve of one task", "leave it out"
            )
    return Stop(check_number("tol", tol, 0, also=(None,)), on_step)


def _solution(dynamics: Dynamics, outcome: Outcome) -> Solution[Any]:
    record, observer, aux = outcome.record, dynamics.observer, dynamics.aux
    layout, steps = dynamics.layout, record.rollout.updates
    structure, (params, buffers) = layout.params_structure, layout.split(outcome.state)
    losses, along = outcome.along[0], outcome.along[1:]
    named = {
        name: tree.unflatten(structure, buffer) if len(buffer) == len(params) else tuple(buffer)
        for name, buffer in buffers.items()
    }
    final = tree.unflatten(structure, params)
    if record.rollout.enough is not None:
        record.diagnostics["converged"] = record.rollout.enough
    return Solution(
        final,
        State(final, named, layout.start + steps),
        losses,
        None if observer is None else observer.form.tree(along[: observer.form.count]),
        None if aux is None else aux.tree(along[dynamics.observed_count :]),
        steps,
        record.kept,
        record.counts,
        record.diagnostics,
    )
