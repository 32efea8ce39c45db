"""What the attributions say: tables, claims and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from diffopt.experiments.framework.claims import Finished, Frame, ask
from diffopt.experiments.framework.experiment import Row, Summary
from diffopt.experiments.framework.pictures import STYLES, curves, panels, save
from diffopt.experiments.framework.tables import listed
from diffopt.experiments.framework.texts import asked

GOALS = {"digits": 0.97, "mnist": 0.95}
"""The linear datamodeling scores to reach."""
FOUND, WORST = 0.9, 15
"""The share of the changed labels to find among so many per cent."""
LOOKS: dict[str, dict[str, Any]] = {
    "exact": STYLES["exact"],
    "influence": STYLES["implicit"],
    "gradient product": STYLES["truncated"],
    "own loss": STYLES["binomial"],
    "random": STYLES["first-order"],
}


def scores_of(done: Finished) -> Frame:
    """One row per start, set of images, method and query; the best of the influence functions is marked."""

    def records(row: Row) -> Iterator[Row]:
        left_out = f"{row['left out']} of {row['examples']}, {len(row['measured'])} times"
        for method, found in row["methods"].items():
            low, high = found["interval"]
            known = {
                "estimator": method,
                "low": low,
                "high": high,
                "seconds": row["seconds"][method],
                "left out": left_out,
            }
            known |= {"loss": row["loss"], "right": row["accuracy"]}
            yield from ({**known, "draw": draw, "score": score} for draw, score in enumerate(found["each"]))

    return done.table(records, part="scores")


def best_influence(scores: Frame, images: str) -> str:
    """The damping whose score is the highest, over all starts."""
    means = scores[scores["images"] == images].groupby("estimator")["score"].mean()
    return str(means[means.index.str.startswith("influence")].idxmax())


def curves_of(done: Finished, shares: Sequence[float]) -> Frame:
    """One row per start, set of images, line and share left out: the change of the mean test loss."""

    def records(row: Row) -> Iterator[Row]:
        for name, values in row["curves"].items():
            method, _, which = name.rpartition(", ")
            for share, value in zip(shares, values, strict=True):
                random = name.startswith("random")
                found = {"estimator": "random" if random else method, "which": "" if random else which}
                yield {**found, "line": "random" if random else name, "share": 100 * share, "change": value}

    return done.table(records, part="scores")


def labels_of(done: Finished) -> Frame:
    """One row per start, method and share looked at: how many of the changed labels are found, in per cent."""

    def records(row: Row) -> Iterator[Row]:
        for method, found in row["found"].items():
            known = {"estimator": method, "accuracy": row["accuracy"][method], "changed": row["changed"]}
            for percent, share in enumerate([0.0, *found]):
                yield {**known, "percent": percent, "found": 100 * share}

    return done.table(records, part="labels")


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    scores, lines, labels = (
        scores_of(done),
        curves_of(done, settings.shares),
        labels_of(done),
    )
    found = listed(
        "Linear datamodeling score",
        scores,
        {"images": "images", "left out": "left out", "method": "estimator"},
        {
            "score": "score",
            "+- (95 %)": ("score", "+-"),
            "from": "low",
            "to (95 %, over subsets)": "high",
            "worst query": ("score", "min"),
            "seconds": "seconds",
        },
    )
    for images in dict.fromkeys(scores["images"]) if len(scores) else ():
        kept, model = (frame[frame["images"] == images] for frame in (lines, scores))
        kept = kept[kept["estimator"].isin(("exact", best_influence(scores, images), "gradient product", "random"))]
        mean = f"{images}: test loss {model['loss'].mean():.3f}, accuracy {model['right'].mean():.1f} %"
        title = f"Change of the mean test loss after training without the most and least helpful examples ({mean})"
        found += listed(
            title, kept, {"left out by": "line"}, {}, across="share", cell="change", label=lambda x: f"{x:g} %"
        )
    if len(labels):
        each = done.table(lambda row: [row["accuracy"]], part="labels")
        whole, clean = each["all"].mean(), each["without the changed"].mean()
        told = f"; test accuracy with all {whole:.2f} %, without the changed {clean:.2f} %"
        found += listed(
            f"{labels['changed'].mean():.0f} changed labels{told}",
            labels[labels["percent"].isin((5, 10, 15, 20, 30))],
            {"worst by": "estimator"},
            {f"accuracy without the worst {WORST} % [%]": "accuracy"},
            across="percent",
            cell="found",
            label=lambda part: f"found in {part} % [%]",
        )
    rivals = [f"influence, {damping:g}" for damping in settings.dampings] + ["gradient product", "own loss"]
    more = tuple(f"found: exact - {rival} >= 0" for rival in rivals)
    claims = (
        *asked("attribution", "scores", scores),
        *asked("attribution", "rivals", _with_best(scores)),
        *asked("attribution", "left out", _beyond_random(lines)),
        *asked("attribution", "labels", labels),
        ask("no other method finds more of them", "this library", more, f"percent == {WORST}").answer(labels),
    )
    return Summary(found, claims)


def _with_best(scores: Frame) -> Frame:
    """The best influence function on each set of images under a name of its own."""
    if not len(scores):
        return scores
    best = {images: best_influence(scores, images) for images in set(scores["images"])}
    chosen = scores["estimator"] == scores["images"].map(best)
    return scores.assign(estimator=scores["estimator"].mask(chosen, "the best influence function"))


def _beyond_random(lines: Frame) -> Frame:
    """How far each change of the test loss by the exact method is beyond that of random ones, in the sign predicted."""
    keys = ["seed", "images", "share"]
    if len(lines):
        exact = lines[lines["estimator"] == "exact"]
        random = lines[lines["estimator"] == "random"].groupby(keys)["change"].mean().reset_index()
        lines = exact.merge(random, on=keys, suffixes=("", " of random"))
        sign = lines["which"].map({"most": 1, "least": -1})
        lines = lines.assign(beyond=sign * (lines["change"] - lines["change of random"]))
    return lines


def _look(line: str) -> dict[str, Any]:
    name = line.partition(",")[0]
    return {**LOOKS[name], **({"fillstyle": "none"} if line.endswith("least") else {})}


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``scores.png``: changes and scores; ``leave-out.png``: curves; ``labels.png``: what is found."""
    scores, found = scores_of(done), list[Path]()
    shown = [name for name in GOALS if f"seed=0 {name}" in done.results]
    if shown:
        figure, grid = panels(len(shown), 2, 5, 3.6)
        for (left, right), images in zip(grid, shown, strict=True):
            _draw_changes(left, images, done.results[f"seed=0 {images}"])
            _draw_scores(right, images, scores[scores["images"] == images])
        found.append(save(figure, folder / "scores.png"))
    lines, labels = curves_of(done, settings.shares), labels_of(done)
    if len(scores):
        best = {images: best_influence(scores, images) for images in set(scores["images"])}
        kept = lines["estimator"].isin(("exact", "gradient product", "random")) | (
            lines["estimator"] == lines["images"].map(best)
        )
        lines = lines[kept]
        lines = lines.assign(line=lines["line"].str.replace(r"influence, [^,]+", "influence", regex=True))
    names = {"share": "left out [%]", "change": "change of the mean test loss"}
    names |= {"percent": "examples looked at, the worst first [%]", "found": "changed labels found [%]"}

    def zero(axes: Axes, images: Any) -> None:
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)

    def goal(axes: Axes, where: Any) -> None:
        axes.axvline(WORST, color="0.6", linewidth=0.8)
        axes.axhline(100 * FOUND, color="0.6", linewidth=0.8)
        axes.plot([0, 100], [0, 100], color=LOOKS["random"]["color"], linestyle=":")

    look: dict[str, Any] = {"hue": "line", "panel": "images", "scales": {"share": "log"}}
    path = folder / "leave-out.png"
    found += curves(lines, path, x="share", y="change", labels=names, style=_look, finish=zero, size=(5, 4), **look)
    look = {"hue": "estimator", "style": lambda name: {**_look(name), "marker": ""}, "finish": goal, "size": (6.5, 4.5)}
    return found + curves(labels, folder / "labels.png", x="percent", y="found", labels=names, **look)


def _draw_changes(axes: Axes, images: str, row: Row) -> None:
    """All queries in one panel, each in units of the spread of its measured changes."""
    predicted = list(zip(*row["methods"]["exact"]["predicted"], strict=True))
    measured = list(zip(*row["measured"], strict=True))
    for x, y in zip(predicted, measured, strict=True):
        spread = (sum(value**2 for value in y) / len(y)) ** 0.5
        axes.plot([value / spread for value in x], [value / spread for value in y], ".", markersize=3, alpha=0.5)
    axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    axes.set(xlabel="predicted change, exact", ylabel="measured change", title=f"{images}: every query in its spread")
    axes.grid(alpha=0.3)


def _draw_scores(axes: Axes, images: str, scores: Frame) -> None:
    means = scores.groupby("estimator", sort=False)[["score", "low", "high"]].mean()
    for place, (name, row) in enumerate(means.iterrows()):
        axes.barh(place, row["score"], color=LOOKS[str(name).partition(",")[0]]["color"], alpha=0.8)
        axes.plot([row["low"], row["high"]], [place, place], color="0.4", linewidth=3)
        axes.annotate(f"{row['score']:.3f}", (max(row["score"], 0) + 0.03, place - 0.28), fontsize="small")
    axes.axvline(GOALS[images], color="0.4", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(means)), list(means.index))
    axes.invert_yaxis()
    axes.set(xlabel="linear datamodeling score, 95 % interval", title=images, xlim=(min(0.0, axes.get_xlim()[0]), 1.15))
    axes.grid(alpha=0.3, axis="x")
