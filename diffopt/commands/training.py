"""The meta-training behind ``diffopt train``: one unit that iterates, logs, evaluates, saves, and ends in time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias, final

import torch

import diffopt
from diffopt.commands.estimator_names import estimator
from diffopt.commands.train import ImagesOptions, OmniglotOptions, SinusoidOptions
from diffopt.experiments.framework.checkpoint import Checkpoint, check_params, wrong
from diffopt.experiments.framework.curve import draw_curve
from diffopt.experiments.framework.experiment import Row, Unit
from diffopt.experiments.framework.few_shot_problem import (
    Adaptation,
    FewShot,
    classification,
    evaluate,
    image_set,
    meta_gradient,
    omniglot,
    sinusoid,
)
from diffopt.experiments.framework.flags import to_store
from diffopt.experiments.framework.ranks import Ranks
from diffopt.experiments.framework.run_folder import RunFolder
from diffopt.experiments.framework.runner import Run
from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import Conv4

Options: TypeAlias = OmniglotOptions | ImagesOptions | SinusoidOptions


@final
class Training(Run):
    """A run of one unit, which writes the log and the checkpoint; its results are the parameters in the latter."""

    options: Options

    def __init__(self, name: str, options: Options, folder: RunFolder, ranks: Ranks) -> None:
        """Load the data and make the problem."""
        options = replace(options, threads=options.threads or torch.get_num_threads())  # so, resumed elsewhere as well
        self.name, self.iteration, self.curve_path = name, 0, folder.folder / "curve.png"
        self.checkpoint: Checkpoint | None = None
        self.generator = torch.Generator().manual_seed(options.seed)
        self.problem = _problem(options, self.generator)
        self.params = self.problem.params
        self.outer = torch.optim.Adam(self.params.values(), lr=options.meta_lr)
        inner = diffopt.SGD(lr=options.inner_lr, momentum=options.inner_momentum)
        self.training = Adaptation(inner, options.steps, estimator(options.estimator))
        self.evaluation = Adaptation(inner, options.eval_steps)
        size = options.iterations, "iteration", options.iterations
        super().__init__(f"train {name}", options, folder, ranks, size=size)

    def begin(self, resume: bool) -> None:
        """All that a run is, its checkpoint says."""
        if self.ranks.writes:
            self.checkpoint = Checkpoint(self.folder.head_path, self.name, to_store(self.options), self.log)

    def left(self) -> Iterator[tuple[Unit, Checkpoint | None]]:
        """The unit, which ends in time by itself."""
        yield Unit(self.name, self.train, resumable=True), self.checkpoint

    def train(self, work: Work) -> Row:
        """Iterate to the end, or as long as there is time; then evaluate."""
        options = self.options
        if saved := work.saved():
            self.restore(saved)
            self.log.cut()  # not before: what cannot be gone on with stays as it is
        else:
            work.save(self.state())
        before, cost = work.seconds[0], self.evaluation_seconds(work)
        lasted = before / max(self.iteration, 1)  # an iteration, at most
        while self.iteration < options.iterations and not work.is_late(before + lasted + cost):
            began = work.seconds[0]
            told = self.iterate(work)
            lasted = work.seconds[0] - began
            if options.eval_every and self.iteration % options.eval_every == 0 and self.iteration < options.iterations:
                cost = self.evaluate(work)
                work.save(self.state())
            work.step(self.iteration, options.iterations, told, self.state, in_time=False)
        if not self.ranks.any(self.is_evaluated())[0]:
            self.evaluate(work)
        work.save(self.state())
        self.seconds = work.seconds[0]
        return {}

    def iterate(self, work: Work) -> str:
        """One outer step; returns how it went, in words."""
        options = self.options
        if options.meta_lr_decay == "cosine":
            factor = (1 + math.cos(math.pi * self.iteration / options.iterations)) / 2
            self.outer.param_groups[0]["lr"] = options.meta_lr * factor
        episodes = self.problem.training(options.tasks, self.generator)
        loss, metric = meta_gradient(self.problem, self.params, self.training, episodes, self.ranks)
        self.outer.step()
        self.iteration += 1
        if self.iteration % options.log_every == 0:
            self.write("training", work, {"outer_loss": loss, self.problem.metric: metric})
        return f"outer loss {loss:.3f}, {self.problem.metric} {metric:.3f}"

    def evaluate(self, work: Work) -> float:
        """Evaluate, log and tell the result; returns the seconds that it took."""
        began, options = work.seconds[0], self.options
        alone = self.ranks.count == 1  # else all ranks stop together, or those that go on would wait
        between = self.interrupt.check if alone else lambda: None
        result = evaluate(self.problem, self.params, self.evaluation, options.eval_episodes, between, self.ranks)
        found = {
            self.problem.metric: result.after.mean,
            "half_width": result.after.half_width,
            "before": result.before.mean,
            "before_half_width": result.before.half_width,
            "episodes": result.episodes,
            "inner_steps": options.eval_steps,
        }
        self.write("evaluation", work, found)
        if self.ranks.writes:
            draw_curve(self.log.rows, self.problem.metric, self.problem.title, self.curve_path)
        self.report.say(f"iteration {self.iteration}, {work.seconds[0]:.0f} s: {_in_words(self.log.rows[-1])}")
        return work.seconds[0] - began

    def evaluation_seconds(self, work: Work) -> float:
        """What an evaluation will take, judged by one batch of episodes; 0 if no time is set."""
        if self.options.minutes is None:
            return 0.0
        began, batch = work.seconds[0], self.problem.evaluation_batch
        evaluate(self.problem, self.params, self.evaluation, batch)
        return (work.seconds[0] - began) * math.ceil(self.options.eval_episodes / batch / self.ranks.count)

    def write(self, kind: str, work: Work, found: dict[str, Any]) -> None:
        """Add a line to the log."""
        seconds = round(work.seconds[0], 3)
        self.log.append({"kind": kind, "iteration": self.iteration, **found, "seconds": seconds})

    def is_evaluated(self) -> bool:
        """Whether the last line of the log is the evaluation of these parameters."""
        last = self.log.rows[-1] if self.log.rows else {"kind": "nothing"}
        return last["kind"] == "evaluation" and last["iteration"] == self.iteration

    def state(self) -> dict[str, Any]:
        """All that decides how the run goes on."""
        generators = {"episodes": self.generator.get_state(), "torch": torch.get_rng_state()}
        if torch.device(self.options.device).type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.options.device)
        params = {name: value.detach() for name, value in self.params.items()}
        optimizer = self.outer.state_dict()
        return {"iteration": self.iteration, "params": params, "optimizer": optimizer, "generators": generators}

    def restore(self, saved: dict[str, Any]) -> None:
        """Put everything back to where the checkpoint was written.

        Raises:
            CheckpointError: a part of it is not of this problem.
        """
        path, part = self.folder.head_path, "optimizer"
        check_params(path, saved["params"], self.params)
        try:
            self.outer.load_state_dict(saved["optimizer"])
            part = "generators"
            self.generator.set_state(saved["generators"]["episodes"])
            torch.set_rng_state(saved["generators"]["torch"])
            if "cuda" in saved["generators"]:
                torch.cuda.set_rng_state(saved["generators"]["cuda"], self.options.device)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            refused = f"refused ({' '.join(str(error).split())[:60]})"
            raise wrong(path, part, refused, "that of this problem and torch") from error
        with torch.no_grad():
            for name, value in self.params.items():
                value.copy_(saved["params"][name])
        self.iteration = saved["iteration"]

    def keep(self, unit: Unit, row: Row, seconds: tuple[float, float]) -> None:
        """All is kept."""

    def finish(self) -> None:
        """Tell the result and where the files are."""
        if self.ranks.writes:
            print(f"{self.problem.title}: {_in_words(self.log.rows[-1])}")
            files = f"{self.curve_path}, {self.folder.metrics_path}, {self.folder.head_path}"
            print(f"{self.iteration} iterations in {self.seconds / 60:.1f} minutes; see {files}", flush=True)

    def safe(self) -> str | None:
        """The checkpoint."""
        if self.checkpoint is None or self.checkpoint.iteration is None:
            return None
        return f"the checkpoint of iteration {self.checkpoint.iteration} is {self.checkpoint.path}"


def _problem(options: Options, generator: torch.Generator) -> FewShot:
    if isinstance(options, SinusoidOptions):
        return sinusoid(shot=options.shot, queries=options.queries, generator=generator, device=options.device)
    if isinstance(options, ImagesOptions):
        pictures = image_set(options.dataset, options.data_dir, options.device)
    else:
        pictures = omniglot(options.data_dir, options.split, options.rotations, options.device)
    return classification(
        f"{pictures.title} {options.way}-way {options.shot}-shot, {pictures.unseen}",
        Conv4(pictures.channels, options.way, options.filters, pictures.size, generator=generator),
        pictures.train,
        pictures.test,
        way=options.way,
        shot=options.shot,
        queries=options.queries,
        device=options.device,
    )


def _in_words(row: dict[str, Any]) -> str:
    """A line of the log that is an evaluation, for people."""
    name, factor, unit = ("accuracy", 100, " %") if "accuracy" in row else ("mse", 1, "")
    digits = 2 if unit else 4

    def shown(mean: float, half_width: float) -> str:
        return f"{factor * mean:.{digits}f}{unit} +- {factor * half_width:.{digits}f}{unit}"

    after, before = shown(row[name], row["half_width"]), shown(row["before"], row["before_half_width"])
    return (
        f"{name} {after} after {row['inner_steps']} inner steps, {before} before "
        f"(mean of {row['episodes']} episodes +- 95 % confidence)"
    )
