"""W4: logistic regression with one L2 penalty per feature, 100 steps with momentum; and by conjugate gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional

from benchmarks import methods, ours
from benchmarks.measure import Cell, Method, Prepared, Role, Size
from benchmarks.peers import hypertorch, jax, jax_losses, loop, torchopt
from benchmarks.problem import Data, Gradients, Params, Problem
from diffopt.estimators import Estimator

ITERATIONS = 20


def inner(params: Params, hyper: Params, support: Data) -> Tensor:
    inputs, labels = support
    fit = functional.binary_cross_entropy_with_logits(inputs @ params["w"], labels)
    return fit + 0.5 * (hyper["log_penalty"].exp() * params["w"].square()).sum()


def outer(params: Params, query: Data) -> Tensor:
    inputs, labels = query
    return functional.binary_cross_entropy_with_logits(inputs @ params["w"], labels)


def problem(dtype: torch.dtype, device: torch.device, tasks: int, size: int, steps: int) -> Problem:
    """``size`` examples of ``size`` features, whose labels a hidden weight gives."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=dtype)
    truth = draw(size) / size**0.5
    inputs = [draw(1, size, size) for _ in range(2)]
    support, query = ((x.to(device), ((x @ truth) > 0).to(device, dtype)) for x in inputs)
    hyper = {"log_penalty": (0.3 * draw(size) - 3).to(device)}
    initial = {"w": (0.1 * draw(size)).to(device)}
    return Problem(inner, outer, initial, hyper, support, query, steps, lr=0.5, momentum=0.9)


def solved(dtype: torch.dtype, device: torch.device, tasks: int, size: int, steps: int) -> Problem:
    """The same with ``initial`` at the end of the inner loop."""
    start = problem(dtype, device, tasks, size, steps)
    support, _ = next(start.tasks())
    with torch.no_grad():
        end = ours.adapt(start, start.initial, start.hyper, support, methods.STATES)
    return dataclasses.replace(start, initial=end)


def several(dtype: torch.dtype, device: torch.device, tasks: int, size: int, steps: int) -> list[Problem]:
    """The same data under ``tasks`` vectors of penalties."""
    first = problem(dtype, device, 1, size, steps)
    penalties = first.hyper["log_penalty"]
    shifted = [{"log_penalty": penalties + 0.1 * i} for i in range(tasks)]
    return [dataclasses.replace(first, hyper=hyper) for hyper in shifted]


def one_by_one(run: Callable[[Problem], Sequence[Tensor]], problems: list[Problem]) -> Gradients:
    return tuple(torch.cat(gradients) for gradients in zip(*map(run, problems), strict=True))


def all_at_once(estimator: Estimator, problems: list[Problem]) -> Gradients:
    first = problems[0]
    support, query = next(first.tasks())
    penalties = torch.stack([p.hyper["log_penalty"] for p in problems]).requires_grad_()

    def validation_loss(log_penalty: Tensor) -> Tensor:
        return outer(ours.adapt(first, first.initial, {"log_penalty": log_penalty}, support, estimator), query)

    (gradients,) = torch.autograd.grad(vmap(validation_loss)(penalties).sum(), [penalties])
    return (gradients.flatten(),)


REVERSE = (
    methods.PLAIN_LOOP,
    methods.HIGHER,
    methods.TORCHOPT_META,
    methods.TORCHOPT_FUNCTIONAL,
    Method("hypertorch style, states", Role.PEER, hypertorch.stored_states),
    *methods.by_jax(jax_losses.Penalties()),
    *methods.OURS_LOOPED,
)
CONJUGATE_GRADIENT = (
    Method("hypertorch style CG", Role.PEER, lambda p: hypertorch.conjugate_gradient(p, ITERATIONS)),
    Method("TorchOpt CG", Role.PEER, lambda p: torchopt.conjugate_gradient(p, ITERATIONS)),
    methods.jax_method("JAXopt CG", jax.implicit(jax_losses.Penalties(), ITERATIONS), needs="jaxopt"),
    Method("ours, CG", Role.OURS, lambda p: ours.conjugate_gradient(p, ITERATIONS)),
)
PROGRAM_CG = Method(
    "ours, CG, compiled program",
    Role.OURS,
    Prepared(lambda p: ours.conjugate_gradient_program(p, ITERATIONS)),
    compiles=True,
)
SEVERAL = (
    Method("plain loop", Role.LOOP_PEER, functools.partial(one_by_one, loop.unroll)),
    Method("ours, loop, graphs", Role.OURS, functools.partial(one_by_one, methods.OURS_LOOP_GRAPH.run)),
    Method("ours, graphs", Role.OURS, functools.partial(all_at_once, methods.GRAPH)),
    Method("ours, states", Role.OURS, functools.partial(all_at_once, methods.STATES)),
    Method("ours, checkpoints", Role.OURS, functools.partial(all_at_once, methods.SQRT)),
)


def cells(size: Size) -> list[Cell]:
    scale, steps, vectors = (20, 4, 3) if size is Size.SMOKE else (2000, 100, 16)
    sizes = {"size": scale, "steps": steps}
    seconds = {Size.FULL: (40, 15, 60), Size.QUICK: (10, 5, 0), Size.SMOKE: (0, 0, 0)}[size]
    estimator, many = f"reverse T={steps}", f"{vectors} at once T={steps}"
    ways = REVERSE if size is Size.SMOKE else (*REVERSE, methods.PROGRAM, methods.LOOP_COMPILED)
    reverse = Cell("W4", estimator, functools.partial(problem, **sizes), ways, seconds=seconds[0])
    solvers = CONJUGATE_GRADIENT if size is Size.SMOKE else (*CONJUGATE_GRADIENT, PROGRAM_CG)
    implicit = Cell("W4", "CG(20)", functools.partial(solved, **sizes), solvers, seconds=seconds[1])
    tiny = functools.partial(solved, size=scale // 40 or 3, steps=steps)
    small = Cell("W4", "CG(20) n=50", tiny, solvers, seconds=seconds[1])
    at_once = Cell("W4", many, functools.partial(several, **sizes), SEVERAL, vectors, 3, seconds[2])
    return [reverse, implicit, small] if size is Size.QUICK else [reverse, implicit, small, at_once]
