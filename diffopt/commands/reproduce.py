"""``diffopt reproduce``: run a paper's experiment and set the figures found beside the paper's."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any, TypeAlias

from diffopt.experiments.framework.options import MOST_THREADS, OptionError, device, real, whole

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def add_command(commands: Commands) -> None:
    """Add ``reproduce``."""
    text = "Run a paper's experiment and set the figures found beside the paper's."
    parser = commands.add_parser("reproduce", help=text, description=text, allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="the experiment; see --list")
    parser.add_argument("--list", action="store_true", help="say what there is, or what settings NAME has, and stop")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", dest="scale", action="store_const", const="quick", help="some seconds: does it run?")
    scale.add_argument("--full", dest="scale", action="store_const", const="full", help="the scale of the paper")
    parser.add_argument("--out", help="folder of the run (default: runs/reproduce/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--minutes", type=real(0), help="stop in time to be done after so many minutes of this call")
    parser.add_argument("--seed", type=whole(0), help="of all random numbers (default: 0)")
    parser.add_argument("--data-dir", help="where the data is; default: $DIFFOPT_DATA, else the user's cache")
    parser.add_argument("--device", type=device, help="where to compute, such as cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=whole(1, MOST_THREADS), help="CPU threads (default: 1)")
    parser.add_argument(
        "--save-every",
        type=real(0, above=False),
        default=10.0,
        help="seconds between two saves of a long unit's state (default: 10)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        dest="changes",
        help="change one setting of the experiment; may be given several times",
    )
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        type=lambda name: f"dataset={name}",
        metavar="NAME",
        dest="changes",
        help="short for --set dataset=NAME, where the experiment has that setting",
    )
    parser.add_argument(
        "--scale",
        action="append",
        default=[],
        type=lambda name: f"scale={name}",
        metavar="NAME",
        dest="changes",
        help="short for --set scale=NAME, where the experiment has that setting: paper is L/K in the binomial rule",
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """List the experiments, start a run, or continue one."""
    from diffopt.experiments.framework import catalogue
    from diffopt.experiments.framework.files import check_alone
    from diffopt.experiments.framework.listing import list_all, list_one
    from diffopt.experiments.framework.run_folder import Header, RunFolder
    from diffopt.experiments.framework.runner import Runner

    if given.name is None:
        if given.list:
            return list_all()
        raise OptionError(
            "no experiment is named", f"one of {', '.join(catalogue.NAMES)}", "name one, or ask for --list"
        )
    experiment = catalogue.experiment(given.name)
    if given.list:
        return list_one(experiment)
    check_alone()
    folder = RunFolder(given.out or f"runs/reproduce/{given.name}")
    if given.resume:
        stored = folder.header()
        _agree(given, stored)
        scale, changes = stored.scale, stored.changed
        seed, place, threads = stored.seed, stored.device, stored.threads
    else:
        scale, changes = given.scale or "standard", tuple(given.changes)
        seed, place, threads = given.seed or 0, given.device or "cpu", given.threads or 1
    if place != "cpu" and experiment.needs.minutes_gpu is None:
        raise OptionError(f"--device is {place}", f"cpu: {given.name} runs on it only", "leave --device out")
    settings = changed(getattr(experiment, scale), changes)
    header = Header.now(given.name, scale, changes, settings, seed, place, threads)
    if given.resume:
        _same(header, folder.header())
    runner = Runner(
        experiment,
        settings,
        header,
        folder,
        resume=given.resume,
        data_dir=given.data_dir,
        minutes=given.minutes,
        save_every=given.save_every,
    )
    return runner.run()


def changed(settings: Any, changes: tuple[str, ...]) -> Any:
    """The settings with some fields replaced, each given as ``field=value``.

    Raises:
        OptionError: there is no such setting, or the value does not fit it.
    """
    known = {item.name: item for item in fields(settings)}
    for change in changes:
        name, equals, text = change.partition("=")
        if name not in known or not equals:
            raise OptionError(f"--set {change}", f"SETTING=VALUE, with one of {', '.join(known)}")
        try:
            settings = replace(settings, **{name: known[name].metadata["parse"](text)})
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise OptionError(f"--set {change} does not fit ({error})", f"a value of {name}") from error
    return settings


def _agree(given: argparse.Namespace, stored: Any) -> None:
    """What was given together with ``--resume`` must be what the run was started with."""
    asked = {
        "the experiment": (given.name, stored.experiment),
        "the scale": (given.scale, stored.scale),
        "--set": (tuple(given.changes) or None, stored.changed),
        "--seed": (given.seed, stored.seed),
        "--device": (given.device, stored.device),
        "--threads": (given.threads, stored.threads),
    }
    for what, (now, then) in asked.items():
        if now is not None and now != then:
            raise OptionError(
                f"{what} is {now}",
                f"{then}, with which the run to resume was started",
                "leave it out, or start a new run in another --out",
            )


def _same(now: Any, then: Any) -> None:
    """The machine and the versions must be those of the run that is resumed, or its numbers would be of two kinds."""
    for item in fields(now):
        mine, stored = getattr(now, item.name), getattr(then, item.name)
        if mine != stored:
            raise OptionError(
                f"{item.name} is {mine} here", f"{stored} as in the run to resume", "start a new run in another --out"
            )
