"""``diffopt train``: meta-train an initialisation on few-shot tasks; its options are one dataclass per problem."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

from diffopt.commands.estimator_names import KNOWN_NAMES, estimator_name
from diffopt.experiments.framework.flags import RunOptions, add_flags, check_stored, read
from diffopt.experiments.framework.image_sets import SETS
from diffopt.experiments.framework.options import MOST, one_of, option, real, whole

Commands: TypeAlias = "argparse._SubParsersAction[Any]"

IMAGE_SETS = tuple(name for name in SETS if not name.startswith("omniglot"))
"""Those that have no command of their own."""


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """What every problem shares."""

    estimator: str = option("reverse", f"estimator of the hypergradient: {KNOWN_NAMES}", estimator_name)
    steps: int = option(5, "inner steps in training", whole(1, MOST))
    eval_steps: int = option(10, "inner steps in evaluation", whole(1, MOST))
    inner_lr: float = option(0.1, "step size of the inner SGD", real(0))
    inner_momentum: float = option(0.0, "its momentum", real(0, above=False))
    meta_lr: float = option(0.001, "step size of the outer Adam", real(0))
    meta_lr_decay: Literal["cosine", "none"] = option(
        "cosine", "how it falls to 0 over the iterations", choices=("cosine", "none")
    )
    iterations: int = option(2500, "outer iterations", whole(1))
    eval_every: int = option(1000, "iterations between evaluations; 0: only at the end", whole(0))
    eval_episodes: int = option(600, "episodes of an evaluation", whole(2))
    log_every: int = option(1, "iterations between two lines of metrics.jsonl", whole(1))
    seed: int = option(0, "of the initial parameters and the training episodes", whole(0))


@dataclass(frozen=True)
class PicturesOptions(TrainOptions):
    """What the sets of images share."""

    way: int = option(5, "classes per task", whole(2, MOST))
    shot: int = option(1, "support images per class", whole(1, MOST))
    queries: int = option(5, "query images per class in training", whole(1, MOST))
    tasks: int = option(4, "tasks per iteration (meta-batch)", whole(1, MOST))
    filters: int = option(32, "channels of the four convolutions", whole(1, 1024))
    data_dir: str | None = option(None, "where the data is; default: $DIFFOPT_DATA, else the user's cache")


@final
@dataclass(frozen=True)
class OmniglotOptions(PicturesOptions):
    """Omniglot; the defaults are for 5-way 1-shot."""

    rotations: bool = option(True, "also train on classes turned by 90, 180 and 270 degrees")
    split: Literal["official", "vinyals"] = option(
        "official", "what is trained and evaluated on", choices=("official", "vinyals")
    )
    out: str = option("runs/omniglot", "folder for metrics.jsonl, curve.png and checkpoint.pt")
    inner_lr: float = option(0.4, "step size of the inner SGD", real(0))
    meta_lr: float = option(0.005, "step size of the outer Adam", real(0))


@final
@dataclass(frozen=True)
class ImagesOptions(PicturesOptions):
    """Few-shot image classification on other sets; the defaults are for 5-way 1-shot."""

    dataset: str = option("caltech101", f"one of {', '.join(IMAGE_SETS)}", one_of(*IMAGE_SETS))
    queries: int = option(15, "query images per class in training", whole(1, MOST))
    out: str = option("runs/images", "folder for metrics.jsonl, curve.png and checkpoint.pt")


@final
@dataclass(frozen=True)
class SinusoidOptions(TrainOptions):
    """Regression on sine waves; needs no data."""

    shot: int = option(10, "support points", whole(1, MOST))
    queries: int = option(10, "query points in training", whole(1, MOST))
    tasks: int = option(25, "tasks per iteration (meta-batch)", whole(1, MOST))
    out: str = option("runs/sinusoid", "folder for metrics.jsonl, curve.png and checkpoint.pt")
    inner_lr: float = option(0.01, "step size of the inner SGD", real(0))
    iterations: int = option(5000, "outer iterations", whole(1))
    log_every: int = option(10, "iterations between two lines of metrics.jsonl", whole(1))


def add_command(commands: Commands) -> None:
    """Add ``train`` with one sub-command per problem."""
    text = "Meta-train an initialisation (MAML) and evaluate it on unseen tasks."
    train = commands.add_parser("train", help=text, description=text)
    problems = train.add_subparsers(title="problems", metavar="PROBLEM", required=True)
    for name, kind in (("omniglot", OmniglotOptions), ("images", ImagesOptions), ("sinusoid", SinusoidOptions)):
        problem = problems.add_parser(name, help=kind.__doc__, description=kind.__doc__, allow_abbrev=False)
        add_flags(problem, kind)
        problem.set_defaults(run=run, problem=name, kind=kind)


def run(given: argparse.Namespace) -> int:
    """Start a run, or continue the one in ``--out``."""
    from diffopt.commands.training import Training  # needs optional packages
    from diffopt.experiments.framework.checkpoint import load_checkpoint
    from diffopt.experiments.framework.files import check_alone
    from diffopt.experiments.framework.ranks import joined
    from diffopt.experiments.framework.run_folder import RunFolder

    options = read(given.kind, given)
    folder = RunFolder(options.out, "checkpoint.pt", kept=("metrics.jsonl",))

    def stored() -> dict[str, Any] | None:
        if given.resume:
            found: dict[str, Any] = load_checkpoint(folder.head_path, given.problem)["options"]
            check_stored(given.kind, found)
            return found
        folder.check_unused()  # before the data is looked for
        return None

    with joined(options.device) as ranks:
        if ranks.count == 1:
            check_alone()
        options = read(given.kind, given, ranks.of_first(stored))
        return Training(given.problem, options, folder, ranks).run(given.resume)
