"""What the attributions say: tables, answers to the goals, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from diffopt.experiments.framework.claims import Every, Frame, answers, ask, long_table
from diffopt.experiments.framework.experiment import Claim, Results, Row, Summary, Unit
from diffopt.experiments.framework.pictures import STYLES, curves, panels, save
from diffopt.experiments.framework.tables import listed

HERE = "this library"
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
NOTES = (
    "The linear datamodeling score is the mean over queries (single test images, the metric is their loss) of "
    "Spearman's correlation between predicted and measured changes over random subsets left out. `+-` is over "
    "starts and queries; the other interval draws the subsets again with replacement, starts and queries as given.",
    "`exact` is `diffopt.attribute` with `Reverse`, all queries in one call. Influence functions take the Hessian of "
    "the last parameters with damping, by conjugate gradients; gradient products are those of the last parameters. Of "
    "several dampings the best by the same trainings is compared with, which favours it.",
    "The training is made to be predictable: a fixed initialisation and order of batches, tanh, large batches, few "
    "epochs. Scores are lower where it is not: a longer training that fits single examples, small batches, GELU in the "
    "place of tanh.",
    "Finding changed labels needs images whose labels are right. The example's own loss, which needs none, asks "
    "whether a label is odd, not whether it does harm.",
)


def scores_of(units: Sequence[Unit], results: Results) -> Frame:
    """One row per start, set of images, method and query; the best of the influence functions is marked."""

    def records(row: Row) -> Iterator[Row]:
        left_out = f"{row['left out']} of {row['examples']}, {len(row['measured'])} times"
        for method, found in row["methods"].items():
            low, high = found["interval"]
            known = {"rule": method, "low": low, "high": high, "seconds": row["seconds"][method], "left out": left_out}
            known |= {"loss": row["loss"], "right": row["accuracy"]}
            yield from ({**known, "draw": draw, "score": score} for draw, score in enumerate(found["each"]))

    return long_table(units, results, records, part="scores")


def best_influence(scores: Frame, images: str) -> str:
    """The damping whose score is the highest, over all starts."""
    means = scores[scores["images"] == images].groupby("rule")["score"].mean()
    return str(means[means.index.str.startswith("influence")].idxmax())


def curves_of(units: Sequence[Unit], results: Results, shares: Sequence[float]) -> Frame:
    """One row per start, set of images, line and share left out: the change of the mean test loss."""

    def records(row: Row) -> Iterator[Row]:
        for name, values in row["curves"].items():
            method, _, which = name.rpartition(", ")
            for share, value in zip(shares, values, strict=True):
                random = name.startswith("random")
                found = {"rule": "random" if random else method, "which": "" if random else which}
                yield {**found, "line": "random" if random else name, "share": 100 * share, "change": value}

    return long_table(units, results, records, part="scores")


def labels_of(units: Sequence[Unit], results: Results) -> Frame:
    """One row per start, method and share looked at: how many of the changed labels are found, in per cent."""

    def records(row: Row) -> Iterator[Row]:
        for method, found in row["found"].items():
            known = {"rule": method, "accuracy": row["accuracy"][method], "changed": row["changed"]}
            for percent, share in enumerate([0.0, *found]):
                yield {**known, "percent": percent, "found": 100 * share}

    return long_table(units, results, records, part="labels")


def summary(settings: Any, units: Sequence[Unit], results: Results) -> Summary:
    """Tables and claims."""
    scores, lines, labels = (
        scores_of(units, results),
        curves_of(units, results, settings.shares),
        labels_of(units, results),
    )
    found = listed(
        "Linear datamodeling score",
        scores,
        {"images": "images", "left out": "left out", "method": "rule"},
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
        kept = kept[kept["rule"].isin(("exact", best_influence(scores, images), "gradient product", "random"))]
        mean = f"{images}: test loss {model['loss'].mean():.3f}, accuracy {model['right'].mean():.1f} %"
        title = f"Change of the mean test loss after training without the most and least helpful examples ({mean})"
        found += listed(
            title, kept, {"left out by": "line"}, {}, across="share", cell="change", label=lambda x: f"{x:g} %"
        )
    if len(labels):
        each = long_table(units, results, lambda row: [row["accuracy"]], part="labels")
        whole, clean = each["all"].mean(), each["without the changed"].mean()
        told = f"; test accuracy with all {whole:.2f} %, without the changed {clean:.2f} %"
        found += listed(
            f"{labels['changed'].mean():.0f} changed labels{told}",
            labels[labels["percent"].isin((5, 10, 15, 20, 30))],
            {"worst by": "rule"},
            {f"accuracy without the worst {WORST} % [%]": "accuracy"},
            across="percent",
            cell="found",
            label=lambda part: f"found in {part} % [%]",
        )
    return Summary(found, (*_of_scores(scores), _most_and_least(lines), *_of_labels(settings, labels)), NOTES)


def _of_scores(scores: Frame) -> Iterator[Claim]:
    for images, goal in GOALS.items():
        text, where = f"{images}: the linear datamodeling score is at least {goal}", f"images == {images!r}"
        yield ask(text, HERE, f"score: exact >= {goal}", where, headline=True).answer(scores)
    if len(scores):
        best = {images: best_influence(scores, images) for images in set(scores["images"])}
        chosen = scores["rule"] == scores["images"].map(best)
        scores = scores.assign(rule=scores["rule"].mask(chosen, "the best influence function"))
    for rival, words in (("the best influence function",) * 2, ("gradient product", "gradient products")):
        text = f"the exact derivative is above {words}"
        yield ask(text, HERE, f"score: exact - {rival} > 0 by images").answer(scores)


def _most_and_least(lines: Frame) -> Claim:
    keys = ["seed", "images", "share"]
    if len(lines):
        exact = lines[lines["rule"] == "exact"]
        random = lines[lines["rule"] == "random"].groupby(keys)["change"].mean().reset_index()
        lines = exact.merge(random, on=keys, suffixes=("", " of random"))
        sign = lines["which"].map({"most": 1, "least": -1})
        lines = lines.assign(beyond=sign * (lines["change"] - lines["change of random"]))
    words = (
        "without the most helpful examples the test loss is above, without the least helpful below, that of random ones"
    )
    return Every(words, HERE, "beyond > 0", shown="beyond", note="starts, sets, shares").answer(lines)


def _of_labels(settings: Any, labels: Frame) -> Iterator[Claim]:
    words = f"of the changed labels {100 * FOUND:g} % are among the {WORST} % with the worst scores"
    where, rivals = f"percent == {WORST}", [f"influence, {damping:g}" for damping in settings.dampings]
    more = tuple(f"found: exact - {rival} >= 0" for rival in (*rivals, "gradient product", "own loss"))
    first = ask(words, HERE, f"found: exact >= {100 * FOUND:g}", where, unit=" %", headline=True)
    return answers(labels, (first, ask("no other method finds more of them", HERE, more, where)))


def _look(line: str) -> dict[str, Any]:
    name = line.partition(",")[0]
    return {**LOOKS[name], **({"fillstyle": "none"} if line.endswith("least") else {})}


def pictures(settings: Any, units: Sequence[Unit], results: Results, folder: Path) -> list[Path]:
    """``scores.png``: changes and scores; ``leave-out.png``: curves; ``labels.png``: what is found."""
    scores, found = scores_of(units, results), list[Path]()
    shown = [name for name in GOALS if f"seed=0 {name}" in results]
    if shown:
        figure, grid = panels(len(shown), 2, 5, 3.6)
        for (left, right), images in zip(grid, shown, strict=True):
            _draw_changes(left, images, results[f"seed=0 {images}"])
            _draw_scores(right, images, scores[scores["images"] == images])
        found.append(save(figure, folder / "scores.png"))
    lines, labels = curves_of(units, results, settings.shares), labels_of(units, results)
    if len(scores):
        best = {images: best_influence(scores, images) for images in set(scores["images"])}
        kept = lines["rule"].isin(("exact", "gradient product", "random")) | (
            lines["rule"] == lines["images"].map(best)
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
    look = {"hue": "rule", "style": lambda name: {**_look(name), "marker": ""}, "finish": goal, "size": (6.5, 4.5)}
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
    means = scores.groupby("rule", sort=False)[["score", "low", "high"]].mean()
    for place, (name, row) in enumerate(means.iterrows()):
        axes.barh(place, row["score"], color=LOOKS[str(name).partition(",")[0]]["color"], alpha=0.8)
        axes.plot([row["low"], row["high"]], [place, place], color="0.4", linewidth=3)
        axes.annotate(f"{row['score']:.3f}", (max(row["score"], 0) + 0.03, place - 0.28), fontsize="small")
    axes.axvline(GOALS[images], color="0.4", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(means)), list(means.index))
    axes.invert_yaxis()
    axes.set(xlabel="linear datamodeling score, 95 % interval", title=images, xlim=(min(0.0, axes.get_xlim()[0]), 1.15))
    axes.grid(alpha=0.3, axis="x")
