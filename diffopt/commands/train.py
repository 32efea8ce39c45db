"""``diffopt train``: meta-train an initialisation on few-shot tasks."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any, TypeAlias

from diffopt.commands.train_options import FREE, ImagesOptions, OmniglotOptions, SinusoidOptions
from diffopt.experiments.framework.options import add_flags, check_stored, read

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def add_command(commands: Commands) -> None:
    """Add ``train`` with one sub-command per problem."""
    text = "Meta-train an initialisation (MAML) and evaluate it on unseen tasks."
    train = commands.add_parser("train", help=text, description=text)
    problems = train.add_subparsers(title="problems", metavar="PROBLEM", required=True)
    for name, kind in (("omniglot", OmniglotOptions), ("images", ImagesOptions), ("sinusoid", SinusoidOptions)):
        problem = problems.add_parser(name, help=kind.__doc__, description=kind.__doc__, allow_abbrev=False)
        add_flags(problem, kind)
        problem.add_argument(
            "--resume",
            action="store_true",
            help="continue the run in --out, with its options; those given again must be the same, "
            "but for --data-dir, --minutes and --save-every",
        )
        problem.set_defaults(run=run, problem=name, kind=kind)


def run(given: argparse.Namespace) -> int:
    """Start a run, or continue the one in ``--out``."""
    from diffopt.commands.training import train  # needs optional packages
    from diffopt.experiments.framework.files import check_alone
    from diffopt.experiments.framework.ranks import joined
    from diffopt.experiments.framework.train_folder import RunFolder

    options = read(given.kind, given, None)
    run_folder = RunFolder(options.out)
    with joined(options.device) as ranks:
        if ranks.count == 1:
            check_alone()
        if not given.resume:
            ranks.of_first(run_folder.check_unused)
            return train(given.problem, options, run_folder, None, ranks)
        stopped = run_folder.stopped_on(ranks, given.problem)
        with closing(stopped.log):
            check_stored(given.kind, stopped.checkpoint.options, FREE)
            options = read(given.kind, given, stopped.checkpoint.options)
            return train(given.problem, options, run_folder, stopped, ranks)
