r"""The evolution-strategies Jacobian against AID, ITD, ANIL and MAML where tasks share an embedding.

Each task fits a linear head of its own, from zero, on embedded images (an L2 term makes that strongly convex); the
outer loss trains the embedding. Its hypergradient has a direct part, through the embedding of the query images, and a
response, through the heads. The estimators differ in the response: none of it, back-propagation (ITD), implicit
differentiation (AID), or finite differences along random directions (ESJ). Where the features of the support images
are computed once, outside of the inner problem, the response is that to the features: autograd takes it to the
embedding, and ESJ perturbs so many fewer numbers. ANIL learns the head's start too, MAML adapts the embedding as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import diffopt
from diffopt.estimators import ESJacobian, Estimator, FirstOrder, Implicit, Reverse
from diffopt.experiments.esj_report import pictures, summary
from diffopt.experiments.framework import small_images
from diffopt.experiments.framework.experiment import Experiment, Needs, Row, Unit
from diffopt.experiments.framework.options import listed, one_of, option, real, whole
from diffopt.experiments.framework.outer_loop import train
from diffopt.experiments.framework.unit_context import Work
from diffopt.linear_solve import ConjugateGradient
from diffopt.tasks import MLP, Episodes, functional, sample_episodes

SIZES: dict[str, tuple[int, ...]] = {"linear": (4,), "two layers": (64, 32)}
"""The widths of the embedding's layers."""


@final
@dataclass(frozen=True)
class Settings:
    """What is trained."""

    problem: str = option("omniglot", "omniglot, or clusters (no data)", one_of(*small_images.PROBLEMS))
    directions: tuple[int, ...] = option((1, 10), "directions Q of ESJ in training", listed(whole(1)))
    measured: tuple[int, ...] = option((1, 10, 100), "directions Q whose error is measured", listed(whole(1)))
    radius: float = option(0.01, "length of a perturbation's entries", real(0))
    draws: int = option(5, "sets of directions whose errors are averaged", whole(1))
    seeds: int = option(3, "runs of each rule, from different starts on different tasks", whole(1))
    iterations: int = option(200, "outer iterations", whole(2))
    meta_lr: float = option(0.002, "step size of the outer Adam", real(0))
    steps: int = option(20, "inner steps", whole(1))
    lr: float = option(0.4, "inner step size; momentum is 0.9", real(0))
    decay: float = option(0.05, "weight of the L2 term of the inner loss", real(0, above=False))
    tasks: int = option(8, "tasks per outer iteration", whole(1))
    way: int = option(5, "classes per task", whole(2))
    shot: int = option(1, "support images per class", whole(1))
    queries: int = option(5, "query images per class", whole(1))
    target: float = option(1.1, "outer loss to be reached", real(0))
    maml_lr: float = option(0.1, "inner step size of MAML, which has no momentum", real(0))


class Rule(NamedTuple):
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


def units(settings: Settings) -> list[Unit]:
    """One for the errors at the start, and one per run, for each size of embedding."""
    found = []
    for seed in range(settings.seeds):
        for size in SIZES:
            keys = {"seed": seed, "embedding": size}
            run = partial(measure, settings, size, seed)
            found.append(Unit(f"errors, {size}, seed {seed}", run, 20.0 * settings.draws, keys=keys))
            for name in rules(settings, Work(0)):
                run = partial(learn, settings, size, name, seed)
                cost = settings.iterations * (3.0 if name.startswith("ESJ") else 1.0)
                unit = f"{size}, {name}, seed {seed}"
                found.append(Unit(unit, run, cost, resumable=True, keys={**keys, "rule": name}))
    return found


def rules(settings: Settings, work: Work) -> dict[str, Rule]:
    """The ways to train by name."""
    source = work.generator("directions")
    exact, implicit = Reverse("graph"), Implicit(ConjugateGradient(max_iterations=10, throw=False))

    def central(directions: int, sampling: str = "gaussian") -> Estimator:
        return ESJacobian(directions, settings.radius, sampling=sampling, generator=source)  # type: ignore[arg-type]

    def forward(directions: int) -> Estimator:
        """The slides' own form: one rollout a direction."""
        return ESJacobian(directions, settings.radius, sampling="gaussian", antithetic=False, generator=source)

    return {
        "direct part only": Rule(FirstOrder()),
        "ITD": Rule(exact),
        "AID, 10 CG": Rule(implicit),
        **{f"ESJ, Q={directions}": Rule(central(directions)) for directions in settings.directions},
        # the scale of the authors' code: unit directions without the factor p that makes them unbiased
        "ESJ, Q=1, divided by p": Rule(central(1, "sphere"), divided=True),
        "ESJ, Q=1, forward": Rule(forward(1), check=False),
        "ITD, features once": Rule(exact, once=True),
        "AID, features once": Rule(implicit, once=True),
        **{f"ESJ, Q={q}, features once": Rule(forward(q), once=True, check=False) for q in settings.directions},
        "ANIL": Rule(exact, once=True, learned=True),
        "MAML": Rule(exact, learned=True, whole=True),
    }


@final
class Embedding:
    """The problem: parameters of the embedding, tasks, and the mean outer loss under an estimator."""

    def __init__(self, settings: Settings, size: str, seed: int, work: Work) -> None:
        """Draw the start; the tasks come from ``generator``."""
        self.settings, self.device = settings, work.device
        self.images = small_images.load(settings.problem, work).to(work.device)
        widths = (small_images.PIXELS, *SIZES[size])
        self.apply, start = functional(MLP(widths, generator=work.generator(f"start {seed}")))
        self.params = {name: value.detach().to(work.device).requires_grad_() for name, value in start.items()}
        self.count = sum(value.numel() for value in start.values())
        self.head = torch.zeros(widths[-1] + 1, settings.way, device=work.device)
        self.learned_head = self.head.clone().requires_grad_()
        self.generator = work.generator(f"tasks {seed}")

    def sample(self) -> Episodes:
        """The next tasks."""
        s = self.settings
        shape = {"way": s.way, "shot": s.shot, "query": s.queries, "tasks": s.tasks}
        return sample_episodes(self.images, **shape, generator=self.generator)

    def leaves(self, rule: Rule) -> dict[str, Tensor]:
        """What is trained: the embedding, and the start of the head where it is learned."""
        return {**self.params, "head": self.learned_head} if rule.learned else dict(self.params)

    def outer_loss(self, rule: Rule, episodes: Episodes) -> Tensor:
        """The mean over the tasks."""
        one: Callable[..., Tensor] = partial(self._one, rule)
        losses: Tensor = torch.func.vmap(one)(*episodes)
        return losses.mean()

    def features(self, params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Of images."""
        return torch.relu(self.apply(params, inputs.flatten(1)))

    def _one(self, rule: Rule, inputs: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor) -> Tensor:
        params, head = self.params, self.learned_head if rule.learned else self.head
        if rule.whole:
            params, head = self._adapted(rule, (params, head), inputs, labels)
        else:
            seen = self.features(params, inputs) if rule.once else inputs
            head = self._fitted(rule, head, seen, labels)
        if rule.divided:  # the same head, its response a fraction of what the estimator says
            head = head.detach() + (head - head.detach()) / self.count
        return cross_entropy(linear(head, self.features(params, queries)), wanted)

    def _fitted(self, rule: Rule, start: Tensor, seen: Tensor, labels: Tensor) -> Tensor:
        """A head fitted to features, or to images whose features are part of the inner loss."""
        s = self.settings

        def of_features(head: Tensor, features: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(linear(head, features), labels) + s.decay / 2 * head.square().sum()

        def of_images(head: Tensor, params: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
            return of_features(head, self.features(params, inputs), labels)

        loss: Callable[..., Tensor] = of_features if rule.once else of_images
        args: tuple[Any, ...] = (seen, labels) if rule.once else (self.params, seen, labels)
        return diffopt.solve(
            loss,
            start,
            *args,
            optimizer=diffopt.SGD(s.lr, momentum=0.9),
            steps=s.steps,
            estimator=rule.estimator,
            check=rule.check,
        ).params

    def _adapted(
        self, rule: Rule, start: tuple[dict[str, Tensor], Tensor], inputs: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The embedding and the head adapted together."""

        def loss(now: tuple[dict[str, Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(linear(now[1], self.features(now[0], inputs)), labels)

        sgd, steps = diffopt.SGD(self.settings.maml_lr), self.settings.steps
        found = diffopt.solve(loss, start, inputs, labels, optimizer=sgd, steps=steps, estimator=rule.estimator)
        return found.params[0], found.params[1]


def linear(head: Tensor, features: Tensor) -> Tensor:
    """Logits; the last row of a head is its bias."""
    return features @ head[:-1] + head[-1]


def measure(settings: Settings, size: str, seed: int, work: Work) -> Row:
    """Relative error and cosine of every estimator's hypergradient at the start, beside the exact one (ITD)."""
    problem = Embedding(settings, size, seed, work)
    episodes = problem.sample()

    def hypergradient(rule: Rule) -> Tensor:
        found = torch.autograd.grad(problem.outer_loss(rule, episodes), list(problem.params.values()))
        return torch.cat([leaf.flatten() for leaf in found])

    exact, direct = hypergradient(Rule(Reverse("graph"))), hypergradient(Rule(FirstOrder()))
    every = replace(settings, directions=tuple(dict.fromkeys((*settings.directions, *settings.measured))))
    chosen = {name: rule for name, rule in rules(every, work).items() if not rule.learned}  # another outer loss
    response = float((exact - direct).norm() / exact.norm())
    found = {}
    for name, rule in chosen.items():
        draws = [hypergradient(rule) for _ in range(settings.draws if name.startswith("ESJ") else 1)]
        squares = [float(((draw - exact).norm() / exact.norm()) ** 2) for draw in draws]
        cosines = [float(torch.cosine_similarity(draw, exact, dim=0)) for draw in draws]
        found[name] = {"error": (sum(squares) / len(draws)) ** 0.5, "cosine": sum(cosines) / len(draws)}
    return {"parameters": problem.count, "response": response, "rules": found}


def learn(settings: Settings, size: str, name: str, seed: int, work: Work) -> Row:
    """Train the embedding; every estimator sees the same start and the same tasks."""
    problem = Embedding(settings, size, seed, work)
    rule = rules(settings, work)[name]
    leaves = problem.leaves(rule)
    outer = torch.optim.Adam(leaves.values(), lr=settings.meta_lr)
    generators = {"tasks": problem.generator}
    if isinstance(rule.estimator, ESJacobian) and rule.estimator.generator is not None:
        generators["directions"] = rule.estimator.generator

    def iterate(iteration: int) -> float:
        loss = problem.outer_loss(rule, problem.sample())
        torch.autograd.backward(loss)
        return loss.item()

    losses, seconds = train(work, leaves, outer, generators, settings.iterations, iterate)
    return {"losses": losses, "seconds": seconds}


EXPERIMENT = Experiment(
    name="esj",
    title="The evolution-strategies Jacobian against AID, ITD, ANIL and MAML on a shared embedding",
    paper="slides: ES for bilevel optimisation",
    needs=Needs("omniglot_28.npz or images_background.zip", 20, None),
    quick=Settings("clusters", (1,), (1, 4), draws=2, seeds=2, iterations=4, steps=3, tasks=2),
    standard=Settings(),
    full=Settings(directions=(1, 10, 100), seeds=5, iterations=2000),
    units=units,
    summarise=lambda settings, results: summary(settings, units(settings), results),
    draw=lambda settings, results, folder: pictures(settings, units(settings), results, folder),
    papers={
        "problem": "miniImageNet, FC100, Omniglot",
        "directions": "its code: 1",
        "radius": "its code: 0.1 (few shots), 0.01 (MNIST)",
        "steps": "its code: 30 on miniImageNet and FC100, 50 on Omniglot, 10 on MNIST",
        "lr": "its code: 0.01, momentum 0.9",
        "decay": "its code: 0.5 or 0.2",
        "tasks": "its code: 16",
        "meta_lr": "its code: Adam, 0.01, later 0.001 and 0.0001",
        "seeds": "not named",
    },
)
