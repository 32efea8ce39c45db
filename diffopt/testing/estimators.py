"""``check_estimator``: everything an estimator claims, tested both ways."""

from __future__ import annotations

import warnings

import torch

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Estimator
from diffopt.errors import ConformanceError, EstimateWarning, EstimatorError, StepsError
from diffopt.reports import Report
from diffopt.tensors.arguments import check_instance, check_integer
from diffopt.testing import behaviour, fields, gradients, tasks
from diffopt.testing.estimator_case import EstimatorCase
from diffopt.testing.findings import run, title
from diffopt.testing.problem import Setting

_CHECKS = (
    gradients.derivatives,
    gradients.steps,
    gradients.exactness,
    gradients.whole_state,
    gradients.inputs,
    gradients.forms,
    gradients.linearity,
    gradients.leaf_order,
    fields.vector_fields,
    tasks.tasks,
    behaviour.repeatability,
    behaviour.side_effects,
    behaviour.random_losses,
    behaviour.second_derivatives,
    behaviour.second_order,
    behaviour.reports,
    behaviour.work,
)


def check_estimator(estimator: Estimator, *, claims: Claims | None = None, steps: int = 4) -> Report:
    """Test everything that an estimator claims, each claim both ways, and all of them before it says what is broken.

    The problem is a small convex one whose curvature changes with the step: three params, arguments with and without
    derivatives, one batch per step, momentum and Adam with learned hyperparameters, in float64 on the CPU. The answer
    is plain autograd through a plain loop that shares no code with the library; for an estimator with steps of its own,
    central differences of its own outer loss. Tested are

    * ``exact``: equal to that answer, for schedules and an outer loss of the final buffers too; or (``"never"``)
      different from it by more than ``tolerance``;
    * ``exact`` for a :class:`diffopt.VectorField` too, whose Jacobian is not symmetric; or a typed error;
    * ``inputs``: those claimed get a hypergradient, the same alone as with all others and as a schedule or a batch per
      step; the others get exact zeros;
    * ``vmap``: the numbers of a loop in ``vmap`` then ``backward``, ``vmap(grad)`` and ``vmap(vmap(grad))``, with some
      inputs batched and some not; or a typed error;
    * ``second_derivatives``, ``twice``, ``linear``, ``random``, ``own_steps``: so, or really not so;
    * ``reports``: the counts are those that the loss itself saw (what a batch of products is padded with does not
      count), and no more stays in memory than is said;
    * without being claimed: shapes and dtypes, float32, another order of the leaves, bit-identical repetition whatever
      ran between, a second backward pass, inputs and ``.grad`` and torch's generator untouched, random losses drawn
      again or refused, nothing computed that nobody wants.

    What it cannot test: that the numbers of a biased estimator are those meant. They need an oracle of your own.

    Costs about a second for an estimator of the cost of :class:`diffopt.estimators.Reverse`.

    Args:
        estimator: what to test; a fresh copy draws each time if it is ``random``.
        claims: what is claimed of it; default: ``estimator.claims(steps)``.
        steps: inner steps of the problem, at least 2.

    Returns:
        A :class:`Report`; ``print`` it.

    Raises:
        ConformanceError: a claim is broken, or the estimator does not run at all. The message names every broken
            claim with what was measured, what was expected and what to check; ``table`` holds the whole report.
        EstimatorError, StepsError: ``estimator`` is not one, or ``steps`` less than 2.

    Example:
        First-order MAML, first without saying that it is biased.

        >>> import diffopt
        >>> from diffopt.estimators import Adjoint, Claims, Cotangents, Keep
        >>> from diffopt.testing import check_estimator
        >>> class Straight(Adjoint):
        ...     def keep(self, steps):
        ...         return Keep(first=steps + 1)
        ...     def pullback(self, trajectory, cotangent):
        ...         return Cotangents(cotangent, {})
        >>> try:
        ...     check_estimator(Straight())
        ... except diffopt.ConformanceError as error:
        ...     print(str(error).splitlines()[1][:51])
        exact: got 1.6e+00, expected <= 1.0e-09; check sign
        >>> claims = Claims(exact="never", inputs=frozenset({"init"}), second_derivatives=False)
        >>> check_estimator(Straight(), claims=claims).broken
        ()
    """
    check_instance("estimator", estimator, Estimator, "a diffopt.estimators object", EstimatorError)
    steps = check_integer("steps", steps, 2, kind=StepsError)
    if claims is None:
        claims = estimator.claims(steps)
    name, setting = title(estimator), Setting(steps)
    case = EstimatorCase(estimator, claims, setting, setting.point(0))
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimateWarning)  # an estimator is also tried where it is no good estimate
        try:
            case.found  # noqa: B018
        except Exception as error:
            raise ConformanceError(
                f"{name} does not run on {steps} steps ({type(error).__name__})",
                "a solution with its hypergradient",
                str(error),
                table=f"{type(error).__name__}: {error}",
            ) from error
        return run(name, case, _CHECKS)
