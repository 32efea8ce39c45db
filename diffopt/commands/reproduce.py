"""``diffopt reproduce``: run a paper's experiment and set the figures found beside the paper's."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any, TypeAlias

from diffopt.experiments.framework.flags import add_flags, read, to_store
from diffopt.experiments.framework.options import OptionError
from diffopt.experiments.framework.run_folder import Header, ReproduceOptions, RunFolder

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def add_command(commands: Commands) -> None:
    """Add ``reproduce``."""
    text = "Run a paper's experiment and set the figures found beside the paper's."
    parser = commands.add_parser("reproduce", help=text, description=text, allow_abbrev=False)
    parser.add_argument("experiment", nargs="?", metavar="name", help="the experiment; see --list")
    parser.add_argument("--list", action="store_true", help="say what there is, or what settings NAME has, and stop")
    scale = parser.add_mutually_exclusive_group()
    for name, text in (("quick", "some seconds: does it run?"), ("full", "the scale of the paper")):
        scale.add_argument(
            f"--{name}", dest="scale", action="store_const", const=name, default=argparse.SUPPRESS, help=text
        )
    for name, parse, metavar, text in (
        ("set", str, "SETTING=VALUE", "change one setting of the experiment; may be given several times"),
        ("dataset", "dataset={}".format, "NAME", "short for --set dataset=NAME, where the experiment has that setting"),
        ("scale", "scale={}".format, "NAME", "short for --set scale=NAME: paper is L/K in the binomial estimator"),
    ):
        parser.add_argument(
            f"--{name}",
            dest="changed",
            action="append",
            type=parse,
            metavar=metavar,
            default=argparse.SUPPRESS,
            help=text,
        )
    add_flags(parser, ReproduceOptions)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """List the experiments, start a run, or continue one."""
    from diffopt.experiments.framework import catalogue
    from diffopt.experiments.framework.files import check_alone
    from diffopt.experiments.framework.listing import list_all, list_one
    from diffopt.experiments.framework.reproduction import Reproduction

    name = given.experiment
    if name is None:
        if given.list:
            return list_all()
        raise OptionError(
            "no experiment is named", f"one of {', '.join(catalogue.NAMES)}", "name one, or ask for --list"
        )
    experiment = catalogue.experiment(name)
    if given.list:
        return list_one(experiment)
    check_alone()
    folder = RunFolder(read(ReproduceOptions, given).out or f"runs/reproduce/{name}")
    stored = folder.header()[0] if given.resume else None
    options = read(ReproduceOptions, given, stored and to_store(stored))
    if options.device != "cpu" and experiment.needs.minutes_gpu is None:
        raise OptionError(f"--device is {options.device}", f"cpu: {name} runs on it only", "leave --device out")
    settings = changed(getattr(experiment, options.scale), options.changed)
    header = Header.now(options, settings)
    if stored is not None:
        header.check_same(stored)
    return Reproduction(experiment, settings, header, folder).run(given.resume)


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
