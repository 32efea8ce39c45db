"""``diffopt train``: meta-train an initialisation on few-shot tasks."""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

from diffopt.commands.train_options import ImagesOptions, OmniglotOptions, SinusoidOptions
from diffopt.experiments.framework.flags import add_flags, check_stored, read

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


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
