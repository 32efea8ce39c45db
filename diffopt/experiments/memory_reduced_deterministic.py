"""The deterministic case: all tasks in every iteration, few inner steps, and the true gradient beside them.

Four tasks of three drawings share a linear embedding (tanh behind it); each has a head of its own, strongly convex by
an L2 term. Two inner steps and one iteration of conjugate gradients per outer step are constants; whether the outer
loop still comes to a stationary point is the question. The true gradient is taken at the exact heads (Newton's method)
by an exactly solved linear system. Float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

import diffopt
from diffopt.experiments.framework import small_images
from diffopt.experiments.framework.experiment import Row
from diffopt.experiments.framework.outer_loop import train
from diffopt.experiments.framework.unit_context import Work
from diffopt.linear_solve import ConjugateGradient, Dense
from diffopt.tasks import sample_episodes
from diffopt.warm_starts import Warm

TASKS, WAY, FEATURES = 4, 3, 3
STEPS, PRODUCTS, LR, OUTER_LR = 2, 1, 1.0, 3.0
DECAY, OUTER_DECAY = 0.1, 0.05


def descend(iterations: int, real: bool, warm: bool, work: Work) -> Row:
    """Gradient descent on the embedding by the memory-reduced hypergradient, from warm or from cold starts.

    Returns:
        The outer losses, the norms of the true gradient, and after how many iterations these were measured.
    """
    images = small_images.load("omniglot" if real else "clusters", work)
    episodes = sample_episodes(
        images, way=WAY, shot=5, query=5, tasks=TASKS, generator=work.generator("deterministic tasks")
    )
    support, query = ([avg_pool2d(x, 2).flatten(1).double() for x in episodes[side]] for side in (0, 2))
    tasks = list(zip(support, episodes[1], query, episodes[3], strict=True))
    start = torch.randn(support[0].shape[1], FEATURES, generator=work.generator("embedding"), dtype=torch.float64)
    embedding = (0.3 * start).requires_grad_()
    heads, multipliers = (torch.zeros(TASKS, FEATURES + 1, WAY, dtype=torch.float64) for _ in range(2))
    method = diffopt.WarmStarts(
        lambda head, embedding, task: inner_loss(head, embedding, *task[:2]),
        lambda head, embedding, task: outer_loss(head, embedding, *task[2:]),
        optimizer=diffopt.SGD(LR),
        steps=STEPS,
        solver=ConjugateGradient(max_iterations=PRODUCTS, rtol=0.0, throw=False),
    )
    cold = method.start(torch.zeros_like(heads[0]))
    curves: dict[str, list[float]] = {"gradient": [], "after": []}
    every = max(1, iterations // 20)

    def look(after: int) -> None:
        curves["gradient"].append(float(true_gradient(embedding.detach(), tasks).norm()))
        curves["after"].append(after)

    def iterate(iteration: int) -> float:
        if iteration % every == 0:
            look(iteration)
        losses = []
        for i, task in enumerate(tasks):
            found = method(Warm(heads[i], multipliers[i]) if warm else cold, embedding.detach(), task)
            heads[i], multipliers[i] = found.warm
            torch.autograd.backward(embedding, found.gradients[0] / TASKS)
            losses.append(found.value.item())
        return sum(losses) / TASKS

    outer = torch.optim.SGD([embedding], lr=OUTER_LR)
    held = {"heads": heads, "multipliers": multipliers}
    losses, _ = train(work, {"embedding": embedding}, outer, {}, iterations, iterate, tensors=held, curves=curves)
    look(iterations)
    return {"losses": losses, **curves}


def logits(head: Tensor, embedding: Tensor, inputs: Tensor) -> Tensor:
    """Of a head with a bias in its last row."""
    return torch.tanh(inputs @ embedding) @ head[:-1] + head[-1]


def inner_loss(head: Tensor, embedding: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Strongly convex in the head."""
    return cross_entropy(logits(head, embedding, inputs), labels) + DECAY / 2 * head.square().sum()


def outer_loss(head: Tensor, embedding: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """With an L2 term too, so that there is a stationary point at a finite place."""
    return cross_entropy(logits(head, embedding, inputs), labels) + OUTER_DECAY / 2 * embedding.square().sum()


def true_gradient(embedding: Tensor, tasks: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    """The gradient of the outer loss at exact heads."""
    leaf = embedding.clone().requires_grad_()
    total = torch.zeros((), dtype=leaf.dtype)
    for inputs, labels, queries, wanted in tasks:
        head = diffopt.implicit(
            inner_loss, minimiser(embedding, inputs, labels), leaf, inputs, labels, solver=Dense(), stationarity=1e-8
        )
        total = total + outer_loss(head, leaf, queries, wanted) / TASKS
    return torch.autograd.grad(total, leaf)[0]


def minimiser(embedding: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """The head's exact minimum, by Newton's method."""
    head = torch.zeros(FEATURES + 1, WAY, dtype=embedding.dtype)
    for _ in range(12):
        slope = torch.func.grad(inner_loss)(head, embedding, inputs, labels)
        curvature = torch.func.jacrev(torch.func.grad(inner_loss))(head, embedding, inputs, labels)
        move = torch.linalg.solve(curvature.reshape(head.numel(), head.numel()), slope.flatten())
        head = head - move.reshape(head.shape)
    return head
