"""An inner problem in double precision."""

from __future__ import annotations

from dataclasses import replace

from diffopt.rollout.field import VectorField
from diffopt.rollout.inputs import Inputs
from diffopt.rollout.problem import Problem
from diffopt.tensors.in_double import doubled, run_in_double
from diffopt.tensors.leaves import Leaves


def problem_in_double(problem: Problem) -> Problem:
    """The same problem, with all its tensors and functions in double precision.

    (Its functions by themselves, not only what is around the solve: the backward pass calls them, where torch has left
    the mode around it.)
    """
    dynamics, loss = problem.dynamics, problem.dynamics.loss
    wrapped = replace(loss, v=run_in_double(loss.v)) if isinstance(loss, VectorField) else run_in_double(loss)
    observer = dynamics.observer
    if observer is not None:
        observer = replace(observer, function=run_in_double(observer.function))
    inputs = Inputs(*(Leaves(map(doubled, part)) for part in problem.inputs))
    return replace(problem, dynamics=replace(dynamics, loss=wrapped, observer=observer), inputs=inputs)
