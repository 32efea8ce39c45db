"""W2 and W3: few-shot classification by Conv4 with batch statistics, 5 ways, 1 shot, 15 queries a class.

W2 has 64 filters and 28x28 images, as for Omniglot; W3 has 32 filters and 84x84 colour images, as for miniImageNet.
The images are noise: only shapes matter for speed. One problem has two forms of the same normalisation, since each
method is measured with the one that is right and fast for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import limit, methods, ours
from benchmarks.measure import Cell, Method, Prepared, Role, Size
from benchmarks.peers import jax, jax_losses
from benchmarks.problem import Data, Params, Problem
from diffopt.estimators import Estimator

WAYS, QUERIES = 5, 15


def fused_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One call: the fastest in a loop, and wrong under ``vmap(func.grad)`` differentiated from outside."""
    return functional.batch_norm(x, None, None, weight, bias, training=True)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Scale and shift apart: right everywhere."""
    return functional.batch_norm(x, None, None, training=True) * weight[:, None, None] + bias[:, None, None]


@final
@dataclasses.dataclass(frozen=True)
class Losses:
    """The cross entropies of Conv4 with one form of the normalisation."""

    norm: Callable[[Tensor, Tensor, Tensor], Tensor]

    def inner(self, params: Params, hyper: Params, support: Data) -> Tensor:
        """On the support: the same loss, no hyperparameters."""
        return self.outer(params, support)

    def outer(self, params: Params, query: Data) -> Tensor:
        """The mean over a task's images."""
        images, labels = query
        for i in range(4):
            images = functional.conv2d(images, params[f"w{i}"], padding=1)
            images = functional.max_pool2d(
                functional.relu(self.norm(images, params[f"scale{i}"], params[f"shift{i}"])), 2
            )
        return functional.cross_entropy(images.flatten(1) @ params["head"] + params["bias"], labels)


def problem(
    dtype: torch.dtype, device: torch.device, tasks: int, filters: int, channels: int, side: int, steps: int
) -> Problem:
    """Noise images and an untrained network."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=dtype)
    initial: Params = {}
    for i in range(4):
        inputs = channels if i == 0 else filters
        initial[f"w{i}"] = draw(filters, inputs, 3, 3) / (9 * inputs) ** 0.5
        initial[f"scale{i}"] = 1 + 0.1 * draw(filters)
        initial[f"shift{i}"] = 0.1 * draw(filters)
    features = filters * (side // 16) ** 2
    initial |= {"head": draw(features, WAYS) / features**0.5, "bias": 0.1 * draw(WAYS)}
    initial = {name: x.to(device) for name, x in initial.items()}
    images = [draw(tasks, WAYS * shots, channels, side, side).to(device) for shots in (1, QUERIES)]
    labels = [torch.arange(WAYS, device=device).repeat(tasks, shots) for shots in (1, QUERIES)]
    losses = Losses(fused_norm)
    support, query = zip(images, labels, strict=True)
    return Problem(losses.inner, losses.outer, initial, {}, support, query, steps, lr=0.1)


def plain(problem: Problem) -> Problem:
    """The same problem with scale and shift apart."""
    losses = Losses(plain_norm)
    return dataclasses.replace(problem, inner=losses.inner, outer=losses.outer)


def chunks(name: str, estimator: Estimator, chunk: int) -> Method:
    """Ours: the inner loops of ``chunk`` tasks at a time, the outer losses in a loop."""
    return Method(
        f"ours, {name}, chunks of {chunk}", Role.OURS, lambda problem: ours.chunked(problem, estimator, chunk)
    )


WRONG = dataclasses.replace(methods.FUNCTORCH, role=Role.WRONG_PEER)
RIGHT = dataclasses.replace(methods.FUNCTORCH_INSIDE, run=lambda problem: methods.FUNCTORCH_INSIDE.run(plain(problem)))
JAX = methods.by_jax(jax_losses.Images())
JAX_LOOP = methods.jax_method("JAX, loop", jax.unrolled(jax_losses.Images(), alone=True))
PROGRAM = dataclasses.replace(methods.PROGRAM, run=Prepared(lambda problem: ours.program(plain(problem))))
FAST_LOOPS = (methods.PLAIN_LOOP, methods.HIGHER, methods.LEARN2LEARN)
GRAPH, STATES = methods.GRAPH, methods.STATES
LOOP_GRAPH, LOOP_STATES, LOOP_SQRT = methods.OURS_LOOPED
LIMIT = Method("by hand, chunks of 2 (a limit)", Role.LIMIT, lambda problem: limit.chunked(problem, 2))
OURS_SHORT = (LIMIT, chunks("graphs", GRAPH, 4), chunks("graphs", GRAPH, 2), LOOP_GRAPH, LOOP_STATES)
OURS_LONG = (LIMIT, chunks("graphs", GRAPH, 2), LOOP_GRAPH, LOOP_SQRT)


def cells(size: Size) -> list[Cell]:
    if size is Size.SMOKE:
        small = functools.partial(problem, filters=2, channels=1, side=16, steps=2)
        everyone = (
            *methods.LOOP_PEERS,
            WRONG,
            RIGHT,
            JAX_LOOP,
            *OURS_SHORT,
            chunks("states", STATES, 2),
            LOOP_SQRT,
        )
        return [Cell("W2", "T=2 B=2", small, everyone, 2, seconds=0)]
    omniglot = functools.partial(problem, filters=64, channels=1, side=28)
    imagenet = functools.partial(problem, filters=32, channels=3, side=84)
    if size is Size.QUICK:
        few = (methods.PLAIN_LOOP, methods.HIGHER, JAX_LOOP, LIMIT, *OURS_SHORT[2:])
        return [
            Cell("W2", "T=5 B=8", functools.partial(omniglot, steps=5), few, 8, verified_tasks=2, seconds=0),
            Cell(
                "W3",
                "T=5 B=2",
                functools.partial(imagenet, steps=5),
                (*few[:2], LOOP_GRAPH, LOOP_STATES),
                2,
                1,
                seconds=0,
            ),
        ]
    peers = (methods.PLAIN_LOOP, methods.HIGHER, methods.LEARN2LEARN, methods.TORCHOPT_META)
    vectorised = (WRONG, RIGHT)
    everyone = (*peers, *vectorised, *OURS_SHORT)
    return [
        Cell("W2", "T=5 B=8", functools.partial(omniglot, steps=5), (*everyone, JAX_LOOP), 8, 2, 90),
        Cell("W2", "T=16 B=8", functools.partial(omniglot, steps=16), (*FAST_LOOPS, *OURS_LONG), 8, 2, 90),
        Cell(
            "W3",
            "T=5 B=2",
            functools.partial(imagenet, steps=5),
            (*peers, *vectorised, *methods.OURS_LOOPED),
            2,
            2,
            100,
        ),
    ]
