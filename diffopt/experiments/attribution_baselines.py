r"""What attributions are compared with: gradient products and influence functions, at the end of the training.

Both know the last parameters only. With ``M_j`` the metric and ``l_i`` the loss of example ``i`` over the number of
examples, in the sign of :func:`diffopt.attribute`:

.. math:: -\nabla M_j^\top \nabla l_i \qquad\text{and}\qquad -\nabla M_j^\top (H + \lambda I)^{-1} \nabla l_i
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import diffopt
from diffopt.experiments.attribution_problem import Params, Problem
from diffopt.linear_solve import ConjugateGradient


def slopes(params: Params, metric: Callable[[Params], Tensor]) -> Params:
    """The gradient of every metric: a tree like ``params`` with a leading axis for the metrics."""
    found: Params = torch.func.jacrev(metric)(params)
    return found


def gradient_products(problem: Problem, params: Params, cotangents: Params) -> Tensor:
    """Minus the product of each metric's gradient with that of each example's loss, ``[metrics, examples]``."""
    gradient = torch.func.grad(problem.whole_loss)
    back = torch.func.vjp(lambda weights: gradient(params, weights), problem.ones)[1]
    products: Tensor = torch.func.vmap(back)(cotangents)[0]
    return -products


def influences(problem: Problem, params: Params, cotangents: Params, damping: float, products: int) -> Tensor:
    """The influence function with the damped Hessian, ``[metrics, examples]``.

    Conjugate gradients take so many products at most; where they meet a direction of negative curvature, which the
    Hessian of a network has if the damping is small, they stop there.
    """
    solver = ConjugateGradient(products, throw=False)

    def loss(moved: Params, weights: Tensor) -> Tensor:
        away = torch.stack([(moved[name] - params[name]).square().sum() for name in params]).sum()
        return problem.whole_loss(moved, weights) + damping / 2 * away  # its gradient at params is that without

    def of_one(cotangent: Params) -> Tensor:
        found = diffopt.implicit_gradients(loss, params, problem.ones, cotangent=cotangent, solver=solver)
        effect: Tensor = found.args[0]
        return effect

    effects: Tensor = torch.func.vmap(of_one)(cotangents)
    return effects


def every_score(
    problem: Problem, metric: Callable[[Params], Tensor], dampings: tuple[float, ...], products: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The scores of every method, ``[metrics, examples]`` each, and the processor seconds that each took."""
    scores, seconds = {}, {}
    began = time.process_time()
    scores["exact"] = diffopt.attribute(problem.train, metric, problem.ones)
    seconds["exact"] = time.process_time() - began
    params = {name: x.detach() for name, x in problem.train(problem.ones).items()}
    cotangents = slopes(params, metric)
    for damping in dampings:
        began = time.process_time()
        scores[f"influence, {damping:g}"] = influences(problem, params, cotangents, damping, products)
        seconds[f"influence, {damping:g}"] = time.process_time() - began
    began = time.process_time()
    scores["gradient product"] = gradient_products(problem, params, cotangents)
    seconds["gradient product"] = time.process_time() - began
    return scores, seconds
