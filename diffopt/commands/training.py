"""The meta-training loop behind ``diffopt train``: iterate, log, evaluate, save, and stop in time."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from typing import Any, TypeAlias, final

import torch

import diffopt
from diffopt.commands.estimator_names import estimator
from diffopt.commands.train_options import FREE, ImagesOptions, OmniglotOptions, SinusoidOptions
from diffopt.experiments.framework.checkpoint import Checkpoint, MetricsLog, NoLog
from diffopt.experiments.framework.checkpoint_content import cannot_be_put_back, check_params
from diffopt.experiments.framework.curve import draw_curve
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
from diffopt.experiments.framework.interrupt import Interrupt
from diffopt.experiments.framework.options import to_store
from diffopt.experiments.framework.progress import Reporter, reporter, silence
from diffopt.experiments.framework.ranks import ALONE, Ranks
from diffopt.experiments.framework.train_folder import RunFolder, Stopped
from diffopt.tasks import Conv4

Options: TypeAlias = OmniglotOptions | ImagesOptions | SinusoidOptions
SECONDS_TO_FINISH = 3.0
"""Kept free at the end of ``--minutes`` for the picture and the last save."""


def train(name: str, options: Options, folder: RunFolder, stopped: Stopped | None, ranks: Ranks = ALONE) -> int:
    """Run until the iterations are done or the time is up; of several ranks the first one writes the folder.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.
    """
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    options = replace(options, threads=threads)  # resumed elsewhere, the same number: sums keep their order
    run = _Run(name, options, folder, ranks)
    log = stopped.log if stopped else folder.start_on(ranks)
    try:
        with run.interrupt:
            run.begin(log, stopped.checkpoint if stopped else None)
            with reporter(options.iterations, run.iteration) if ranks.writes else silence() as report:
                run.loop(report)
        return 0
    except KeyboardInterrupt:
        if run.saved_iteration is None or not ranks.writes:
            raise
        again = f"diffopt train {name} --out {folder.folder} --resume"
        print(
            f"diffopt: interrupted; the checkpoint of iteration {run.saved_iteration} is "
            f"{folder.checkpoint_path}; continue with: {again}",
            file=sys.stderr,
        )
        return 130
    finally:
        log.close()


@final
class _Run:
    """One run: all that changes while it goes on."""

    log: MetricsLog | NoLog

    def __init__(self, name: str, options: Options, folder: RunFolder, ranks: Ranks) -> None:
        self.name, self.options, self.folder, self.ranks = name, options, folder, ranks
        self.interrupt = Interrupt()
        self.generator = torch.Generator().manual_seed(options.seed)
        self.problem = _problem(options, self.generator)
        self.params = self.problem.params
        self.outer = torch.optim.Adam(self.params.values(), lr=options.meta_lr)
        inner = diffopt.SGD(lr=options.inner_lr, momentum=options.inner_momentum)
        self.training = Adaptation(inner, options.steps, estimator(options.estimator))
        self.evaluation = Adaptation(inner, options.eval_steps)
        self.iteration, self.seconds_before, self.started = 0, 0.0, time.perf_counter()
        self.saved_iteration: int | None = None
        self.saved_seconds = 0.0

    def begin(self, log: MetricsLog | NoLog, checkpoint: Checkpoint | None) -> None:
        """Save the start, or go back to where ``checkpoint`` was written."""
        self.log = log
        if checkpoint is None:
            self.save()
        else:
            self.restore(checkpoint)  # before the log is cut back: what cannot be continued stays as it is
            log.cut()

    @property
    def seconds(self) -> float:
        """How long this run has taken, the time before it was resumed included."""
        return self.seconds_before + time.perf_counter() - self.started

    def loop(self, report: Reporter) -> None:
        """Iterate to the end, then evaluate."""
        options, cost = self.options, self.evaluation_seconds()
        while self.iteration < options.iterations and not self.ranks.any(self.time_is_up(cost))[0]:
            loss, metric = self.iterate()
            report.update(self.iteration, f"outer loss {loss:.3f}, {self.problem.metric} {metric:.3f}")
            due = bool(options.eval_every) and self.iteration % options.eval_every == 0
            stop = self.ranks.any(self.interrupt.heard)[0]
            if due and self.iteration < options.iterations:
                cost = self.evaluate(report)
            if due or stop or self.seconds - self.saved_seconds > options.save_every:
                self.save()
            if stop:
                raise KeyboardInterrupt
        if not self.is_evaluated():
            self.evaluate(report)
        self.save()
        self.finish(report)

    def iterate(self) -> tuple[float, float]:
        """One outer step; returns the outer loss and the metric."""
        options = self.options
        if options.meta_lr_decay == "cosine":
            factor = (1 + math.cos(math.pi * self.iteration / options.iterations)) / 2
            self.outer.param_groups[0]["lr"] = options.meta_lr * factor
        episodes = self.problem.training(options.tasks, self.generator)
        loss, metric = meta_gradient(self.problem, self.params, self.training, episodes, self.ranks)
        self.outer.step()
        self.iteration += 1
        if self.iteration % options.log_every == 0:
            self.log.append(
                {
                    "kind": "training",
                    "iteration": self.iteration,
                    "outer_loss": loss,
                    self.problem.metric: metric,
                    "seconds": round(self.seconds, 3),
                }
            )
        return loss, metric

    def evaluate(self, report: Reporter) -> float:
        """Evaluate, log and tell the result; returns the seconds that it took."""
        began, options = self.seconds, self.options
        alone = self.ranks.count == 1  # else all ranks stop together, or those that go on would wait
        between = self.interrupt.check if alone else lambda: None
        result = evaluate(self.problem, self.params, self.evaluation, options.eval_episodes, between, self.ranks)
        self.log.append(
            {
                "kind": "evaluation",
                "iteration": self.iteration,
                self.problem.metric: result.after.mean,
                "half_width": result.after.half_width,
                "before": result.before.mean,
                "before_half_width": result.before.half_width,
                "episodes": result.episodes,
                "inner_steps": options.eval_steps,
                "seconds": round(self.seconds, 3),
            }
        )
        if self.ranks.writes:
            draw_curve(self.log.rows, self.problem.metric, self.problem.title, self.folder.curve_path)
        report.say(f"iteration {self.iteration}, {self.seconds:.0f} s: {_in_words(self.log.rows[-1])}")
        return self.seconds - began

    def is_evaluated(self) -> bool:
        """Whether the last line of the log is the evaluation of these parameters."""
        last = self.log.rows[-1] if self.log.rows else {"kind": "nothing"}
        return last["kind"] == "evaluation" and last["iteration"] == self.iteration

    def evaluation_seconds(self) -> float:
        """What an evaluation will take, judged by one batch of episodes; 0 if no time is set."""
        if self.options.minutes is None:
            return 0.0
        began, batch = self.seconds, self.problem.evaluation_batch
        evaluate(self.problem, self.params, self.evaluation, batch)
        return (self.seconds - began) * math.ceil(self.options.eval_episodes / batch / self.ranks.count)

    def time_is_up(self, evaluation_seconds: float) -> bool:
        """Whether there is just time left for the last evaluation."""
        minutes = self.options.minutes
        to_come = evaluation_seconds + SECONDS_TO_FINISH
        return minutes is not None and self.seconds + to_come > 60 * minutes

    def save(self) -> None:
        """Write the checkpoint, on the first rank."""
        if self.ranks.writes:
            self.write()
        self.saved_iteration, self.saved_seconds = self.iteration, self.seconds

    def write(self) -> None:
        """Write the checkpoint."""
        generators = {"episodes": self.generator.get_state(), "torch": torch.get_rng_state()}
        if torch.device(self.options.device).type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.options.device)
        self.log.sync()
        Checkpoint(
            problem=self.name,
            options=to_store(self.options, FREE),
            iteration=self.iteration,
            seconds=self.seconds,
            lines=len(self.log.rows),
            params={name: value.detach() for name, value in self.params.items()},
            optimizer=self.outer.state_dict(),
            generators=generators,
            log=self.log.digest,
        ).save(self.folder.checkpoint_path)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back to where the checkpoint was written."""
        path = self.folder.checkpoint_path
        check_params(path, checkpoint.params, self.params)
        try:
            self.outer.load_state_dict(checkpoint.optimizer)
        except (ValueError, KeyError, TypeError) as error:
            raise cannot_be_put_back(path, "optimizer", error) from error
        try:
            self.generator.set_state(checkpoint.generators["episodes"])
            torch.set_rng_state(checkpoint.generators["torch"])
            if "cuda" in checkpoint.generators:
                torch.cuda.set_rng_state(checkpoint.generators["cuda"], self.options.device)
        except (RuntimeError, TypeError) as error:
            raise cannot_be_put_back(path, "generators", error) from error
        with torch.no_grad():
            for name, value in self.params.items():
                value.copy_(checkpoint.params[name])
        self.iteration, self.seconds_before = checkpoint.iteration, checkpoint.seconds
        self.saved_iteration, self.saved_seconds = self.iteration, self.seconds

    def finish(self, report: Reporter) -> None:
        """Tell the result and where the files are."""
        report.say(f"{self.problem.title}: {_in_words(self.log.rows[-1])}")
        folder = self.folder
        report.say(
            f"{self.iteration} iterations in {self.seconds / 60:.1f} minutes; see {folder.curve_path}, "
            f"{folder.metrics_path}, {folder.checkpoint_path}"
        )


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
