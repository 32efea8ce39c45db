"""Tasks that share an embedding, and the ways to train it that the experiment ``esj`` compares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import diffopt
from diffopt.estimators import ESJacobian, Estimator, FirstOrder, Implicit, Reverse
from diffopt.experiments.framework import small_images
from diffopt.experiments.framework.unit_context import Work
from diffopt.linear_solve import ConjugateGradient
from diffopt.tasks import MLP, Episodes, ResNet12, functional, sample_episodes

SIZES: dict[str, tuple[int, ...]] = {"linear": (4,), "two layers": (64, 32)}
"""The widths of the embedding's layers."""
DEEP, DEEP_WIDTH, DEEP_TASKS = "ResNet-12", 64, 1
"""The embedding that takes one outer step only: its name, its features, and on how many tasks."""
DIVIDED = "ESJ, Q=1, divided by p"


class Method(NamedTuple):
    """How a task is adapted to, and how the hypergradient is taken.

    Attributes:
        estimator: of the response.
        divided: the response is divided by the number of parameters.
        once: the features of the support images are computed outside of the inner problem.
        learned: the start of the head is learned (ANIL), not zero.
        whole: the embedding is adapted too, from a learned start of all layers (MAML).
        check: the solve is checked, which costs ESJ one rollout more.
    """

    estimator: Estimator
    divided: bool = False
    once: bool = False
    learned: bool = False
    whole: bool = False
    check: bool = True


def methods(settings: Any, work: Work) -> dict[str, Method]:
    """The ways to train by name."""
    source = work.generator("directions")
    exact, implicit = Reverse("graph"), Implicit(ConjugateGradient(max_iterations=10, throw=False))

    def central(directions: int, sampling: str = "gaussian") -> Estimator:
        return ESJacobian(directions, settings.radius, sampling=sampling, generator=source)  # type: ignore[arg-type]

    def forward(directions: int) -> Estimator:
        """The slides' own form: one rollout a direction."""
        return ESJacobian(directions, settings.radius, sampling="gaussian", antithetic=False, generator=source)

    return {
        "direct part only": Method(FirstOrder()),
        "ITD": Method(exact),
        "AID, 10 CG": Method(implicit),
        **{f"ESJ, Q={directions}": Method(central(directions)) for directions in settings.directions},
        # the scale of the authors' code: unit directions without the factor p that makes them unbiased
        DIVIDED: Method(central(1, "sphere"), divided=True),
        "ESJ, Q=1, forward": Method(forward(1), check=False),
        "ITD, features once": Method(exact, once=True),
        "AID, features once": Method(implicit, once=True),
        **{f"ESJ, Q={q}, features once": Method(forward(q), once=True, check=False) for q in settings.directions},
        "ANIL": Method(exact, once=True, learned=True),
        "MAML": Method(exact, learned=True, whole=True),
    }


def of_one_step(settings: Any) -> list[str]:
    """Those of which a step of the deep embedding is measured: of ESJ in its parameters the slides' form alone."""
    central = {f"ESJ, Q={directions}" for directions in settings.directions}
    return [name for name in methods(settings, Work(0)) if name not in (DIVIDED, *central)]


@final
class Embedding:
    """The problem: parameters of the embedding, tasks, and the mean outer loss under an estimator."""

    def __init__(self, settings: Any, size: str, seed: int, work: Work) -> None:
        """Draw the start; the tasks come from ``generator``."""
        self.settings, self.device, self.deep = settings, work.device, size == DEEP
        self.images = small_images.load(settings.problem, work).to(work.device)
        generator = work.generator(f"start {seed}")
        if self.deep:
            width, network = DEEP_WIDTH, ResNet12(1, DEEP_WIDTH, settings.deep_filters, generator)
            self.apply, start = functional(network)
        else:
            width = SIZES[size][-1]
            self.apply, start = functional(MLP((small_images.PIXELS, *SIZES[size]), generator=generator))
        self.params = {name: value.detach().to(work.device).requires_grad_() for name, value in start.items()}
        self.count = sum(value.numel() for value in start.values())
        self.head = torch.zeros(width + 1, settings.way, device=work.device)
        self.learned_head = self.head.clone().requires_grad_()
        self.generator = work.generator(f"tasks {seed}")

    def sample(self) -> Episodes:
        """The next tasks."""
        s, tasks = self.settings, DEEP_TASKS if self.deep else self.settings.tasks
        shape = {"way": s.way, "shot": s.shot, "query": s.queries, "tasks": tasks}
        return sample_episodes(self.images, **shape, generator=self.generator)

    def leaves(self, method: Method) -> dict[str, Tensor]:
        """What is trained: the embedding, and the start of the head where it is learned."""
        return {**self.params, "head": self.learned_head} if method.learned else dict(self.params)

    def outer_loss(self, method: Method, episodes: Episodes) -> Tensor:
        """The mean over the tasks."""
        one: Callable[..., Tensor] = partial(self._one, method)
        losses: Tensor = torch.func.vmap(one)(*episodes)
        return losses.mean()

    def features(self, params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Of images; a deep embedding sees them made larger."""
        side = self.settings.deep_side
        seen = interpolate(inputs, size=(side, side), mode="bilinear") if self.deep else inputs.flatten(1)
        return torch.relu(self.apply(params, seen))

    def _one(self, method: Method, inputs: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor) -> Tensor:
        params, head = self.params, self.learned_head if method.learned else self.head
        if method.whole:
            params, head = self._adapted(method, (params, head), inputs, labels)
        else:
            seen = self.features(params, inputs) if method.once else inputs
            head = self._fitted(method, head, seen, labels)
        if method.divided:  # the same head, its response a fraction of what the estimator says
            head = head.detach() + (head - head.detach()) / self.count
        return cross_entropy(linear(head, self.features(params, queries)), wanted)

    def _fitted(self, method: Method, start: Tensor, seen: Tensor, labels: Tensor) -> Tensor:
        """A head fitted to features, or to images whose features are part of the inner loss."""
        s = self.settings

        def of_features(head: Tensor, features: Tensor, labels: Tensor) -> Tensor:
            penalty: Tensor = s.decay / 2 * head.square().sum()
            return cross_entropy(linear(head, features), labels) + penalty

        def of_images(head: Tensor, params: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
            return of_features(head, self.features(params, inputs), labels)

        loss: Callable[..., Tensor] = of_features if method.once else of_images
        args: tuple[Any, ...] = (seen, labels) if method.once else (self.params, seen, labels)
        return diffopt.solve(
            loss,
            start,
            *args,
            optimizer=diffopt.SGD(s.lr, momentum=0.9),
            steps=s.steps,
            estimator=method.estimator,
            check=method.check,
        ).params

    def _adapted(
        self, method: Method, start: tuple[dict[str, Tensor], Tensor], inputs: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The embedding and the head adapted together."""

        def loss(now: tuple[dict[str, Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(linear(now[1], self.features(now[0], inputs)), labels)

        sgd, steps = diffopt.SGD(self.settings.maml_lr), self.settings.steps
        found = diffopt.solve(loss, start, inputs, labels, optimizer=sgd, steps=steps, estimator=method.estimator)
        return found.params[0], found.params[1]


def linear(head: Tensor, features: Tensor) -> Tensor:
    """Logits; the last row of a head is its bias."""
    return features @ head[:-1] + head[-1]
