"""Few-shot tasks with an embedding and a head, and one task's hypergradient by every method that is compared.

The memory-reduced algorithm is that of derivations, section 6.3: from where the task was left, some steps on the head
without a graph; some iterations of conjugate gradients from where the last ones ended; one mixed product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import diffopt
from diffopt.estimators import Reverse
from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.unit_context import Work
from diffopt.linear_solve import ConjugateGradient
from diffopt.tasks import Conv4, Episodes, functional, sample_episodes
from diffopt.tensors.tree import flatten

Params: TypeAlias = dict[str, Tensor]
Task: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
METHODS = ("ours, warm", "ours, cold", "ITD-BiO", "ANIL", "MAML")
FORMS = ("features once", "features in each step")
"""What the inner loss is given: the features, or the embedding and the images."""


@final
@dataclass(frozen=True)
class Warm:
    """Where a task was left: its head, and the solution of its linear system; changed in place."""

    head: Params
    multiplier: Params


@final
class Shared:
    """A four-block embedding that tasks share, each with a linear head of its own whose loss is strongly convex."""

    def __init__(self, settings: Any, work: Work, seed: int = 0) -> None:
        """Draw the embedding and the tasks; every method sees the same."""
        self.settings, self.device = settings, work.device
        kind = image_sets.SETS[settings.dataset]
        network = Conv4(
            kind.channels, settings.way, settings.filters, kind.size, generator=work.generator(f"start {seed}")
        )
        self.embed, self.body = functional(network.features)
        named = network.head.named_parameters()
        self.learned_head = {name: value.detach().to(work.device).requires_grad_() for name, value in named}
        self.body = {name: value.detach().to(work.device).requires_grad_() for name, value in self.body.items()}
        self.zero_head = {name: torch.zeros_like(value) for name, value in self.learned_head.items()}
        self.tasks = self.draw("train", settings.tasks, work.generator(f"tasks {seed}"), work)

    def draw(self, split: Any, count: int, generator: torch.Generator, work: Work) -> Episodes:
        """Tasks of one split."""
        s, images = self.settings, image_sets.load(self.settings.dataset, split, work.data_dir, work.device)
        return sample_episodes(images, way=s.way, shot=s.shot, query=s.queries, tasks=count, generator=generator)

    def params(self, method: str) -> Params:
        """What the outer loop trains: the embedding, and for ANIL and MAML the start of the head."""
        head = self.learned_head if method in ("ANIL", "MAML") else {}
        return {**{f"body {k}": v for k, v in self.body.items()}, **{f"head {k}": v for k, v in head.items()}}

    def logits(self, head: Params, features: Tensor) -> Tensor:
        """Of the linear head."""
        found: Tensor = linear(features, head["weight"], head["bias"])
        return found

    def inner(self, form: str, inputs: Tensor, labels: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """The loss of the head and its arguments."""

        def penalty(head: Params) -> Tensor:
            squares = head["weight"].square().sum() + head["bias"].square().sum()
            return squares * float(self.settings.decay / 2)

        def of_features(head: Params, features: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(self.logits(head, features), labels) + penalty(head)

        def of_images(head: Params, body: Params, inputs: Tensor, labels: Tensor) -> Tensor:
            return of_features(head, self.embed(body, inputs), labels)

        if form == "features once":
            return of_features, (self.embed(self.body, inputs), labels)
        return of_images, (self.body, inputs, labels)

    def backward(self, method: str, form: str, steps: int, task: Task, weight: float, warm: Warm | None) -> float:
        """Add ``weight`` times a task's hypergradient to the ``grad`` of what is trained; return the outer loss."""
        if method == "MAML":
            loss = self._maml(steps, task)
        elif method.startswith("ours"):
            return self._memory_reduced(form, steps, task, weight, warm)
        else:
            inputs, labels, queries, wanted = task
            inner, args = self.inner(form, inputs, labels)
            start = self.learned_head if method == "ANIL" else self.zero_head
            found = diffopt.solve(inner, start, *args, optimizer=self.sgd, steps=steps, estimator=Reverse("graph"))
            loss = cross_entropy(self.logits(found.params, self.embed(self.body, queries)), wanted)
        torch.autograd.backward(weight * loss)
        return loss.item()

    @property
    def sgd(self) -> diffopt.SGD:
        """The inner optimizer of a head."""
        return diffopt.SGD(self.settings.lr)

    def _maml(self, steps: int, task: Task) -> Tensor:
        inputs, labels, queries, wanted = task
        found = diffopt.solve(
            self.whole_loss,
            {"body": self.body, "head": self.learned_head},
            inputs,
            labels,
            optimizer=diffopt.SGD(self.settings.maml_lr),
            steps=steps,
            estimator=Reverse("graph"),
        )
        return self.whole_loss(found.params, queries, wanted)

    def whole_loss(self, params: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of embedding and head, for MAML, which adapts both."""
        return cross_entropy(self.logits(params["head"], self.embed(params["body"], inputs)), labels)

    def _memory_reduced(self, form: str, steps: int, task: Task, weight: float, warm: Warm | None) -> float:
        inputs, labels, queries, wanted = task
        loss, args = self.inner(form, inputs, labels)
        start = self.zero_head if warm is None else warm.head
        with torch.no_grad():
            head = diffopt.solve(loss, start, *args, optimizer=self.sgd, steps=steps).params
        leaf = {name: value.detach().requires_grad_() for name, value in head.items()}
        outer = cross_entropy(self.logits(leaf, self.embed(self.body, queries)), wanted)
        torch.autograd.backward(weight * outer)  # into the embedding: the direct part
        cotangent = {name: value.grad for name, value in leaf.items()}
        solver = ConjugateGradient(max_iterations=self.settings.products, rtol=0.0, throw=False)
        found = diffopt.implicit_gradients(
            loss,
            head,
            *args,
            cotangent=cotangent,
            solver=solver,
            start=None if warm is None else _times(weight, warm.multiplier),
        )
        pairs = zip(flatten(args)[0], flatten(found.args)[0], strict=True)
        used = [(x, term) for x, term in pairs if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.backward([x for x, _ in used], [term for _, term in used])
        if warm is not None:
            for name, value in head.items():
                warm.head[name].copy_(value)
                warm.multiplier[name].copy_(found.multiplier[name] / weight)
        return outer.item()

    def accuracy(self, method: str, steps: int, tasks: Episodes) -> Tensor:
        """The accuracy on each task's queries in per cent, after adaptation to its support, ``[tasks]``."""

        def one(inputs: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor) -> Tensor:
            if method == "MAML":
                start = {"body": self.body, "head": self.learned_head}
                sgd = diffopt.SGD(self.settings.maml_lr)
                found = diffopt.solve(self.whole_loss, start, inputs, labels, optimizer=sgd, steps=steps).params
                logits = self.logits(found["head"], self.embed(found["body"], queries))
            else:
                loss, args = self.inner("features once", inputs, labels)
                head = self.learned_head if method == "ANIL" else self.zero_head
                head = diffopt.solve(loss, head, *args, optimizer=self.sgd, steps=steps).params
                logits = self.logits(head, self.embed(self.body, queries))
            return 100 * (logits.argmax(-1) == wanted).float().mean()

        with torch.no_grad():
            batched: Tensor = torch.func.vmap(one, chunk_size=20)(*tasks)
        return batched


def _times(weight: float, tree: Params) -> Params:
    return {name: weight * value for name, value in tree.items()}
