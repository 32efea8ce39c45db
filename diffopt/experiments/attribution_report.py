"""What the attributions say: tables, answers to the goals, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from diffopt.experiments.framework.experiment import Cell, Claim, Results, Row, Summary, Table, verdict
from diffopt.experiments.framework.pictures import STYLES, legend_below, panels, save

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
    "Spearman's correlation between predicted and measured changes over random subsets left out; the interval draws "
    "the subsets again with replacement, the queries as given.",
    "`exact` is `diffopt.attribute` with `Reverse`, all queries in one call. Influence functions take the Hessian of "
    "the last parameters with damping, by conjugate gradients; gradient products are those of the last parameters. Of "
    "several dampings the best by the same trainings is compared with, which favours it.",
    "The training is made to be predictable: a fixed initialisation and order of batches, tanh, large batches, few "
    "epochs. Scores are lower where it is not: a longer training that fits single examples, small batches, GELU in the "
    "place of tanh.",
    "Finding changed labels needs images whose labels are right. The example's own loss, which needs none, asks "
    "whether a label is odd, not whether it does harm.",
)


def summarise(settings: Any, results: Results) -> Summary:
    """Tables and claims."""
    compared = {name: results[name] for name in GOALS if name in results}
    tables = [_scores(compared)] if compared else []
    tables += [_curves(settings, name, row) for name, row in compared.items()]
    if "labels" in results:
        tables.append(_labels(results["labels"]))
    return Summary(tuple(tables), tuple(_claims(compared, results.get("labels"))), NOTES)


def best_influence(row: Row) -> str:
    """The damping whose score is the highest."""
    methods: dict[str, Row] = row["methods"]
    return max((name for name in methods if name.startswith("influence")), key=lambda name: methods[name]["score"])


def _scores(compared: Mapping[str, Row]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for images, row in compared.items():
        for name, found in row["methods"].items():
            low, high = found["interval"]
            setting = f"{images}, {row['left out']} of {row['examples']} left out {len(row['measured'])} times"
            ends = f"{low:.4f} to {high:.4f}"
            rows.append((setting, name, round(found["score"], 4), ends, min(found["each"]), row["seconds"][name]))
    columns = ("setting", "method", "score", "95 % interval", "worst query", "seconds")
    return Table("Linear datamodeling score", columns, tuple(rows))


def _curves(settings: Any, images: str, row: Row) -> Table:
    best, curves = best_influence(row), row["curves"]
    rows: list[tuple[Cell, ...]] = [
        (f"{which} helpful by {name}", *curves[f"{name}, {which}"])
        for which in ("most", "least")
        for name in ("exact", best, "gradient product")
    ]
    rows.append(("random", *_random(curves)))
    columns = ("left out", *(f"{100 * share:g} %" for share in settings.shares))
    model = f"{images}: test loss {row['loss']:.3f}, accuracy {row['accuracy']:.1f} %"
    title = f"Change of the mean test loss after training without examples ({model})"
    return Table(title, columns, tuple(rows))


def _random(curves: Mapping[str, Sequence[float]]) -> list[float]:
    """The mean over the random draws."""
    drawn = [values for name, values in curves.items() if name.startswith("random")]
    return [fmean(values) for values in zip(*drawn, strict=True)]


def _labels(row: Row) -> Table:
    shares, accuracies = (5, 10, 15, 20, 30), row["accuracy"]
    rows: list[tuple[Cell, ...]] = [
        (name, *(round(100 * found[share - 1], 1) for share in shares), round(accuracies[name], 2))
        for name, found in row["found"].items()
    ]
    rows.append(("nothing is left out", *(None for _ in shares), round(accuracies["all"], 2)))
    rows.append(("the changed are left out", *(None for _ in shares), round(accuracies["without the changed"], 2)))
    columns = (
        "worst by",
        *(f"found in {share} % [%]" for share in shares),
        f"accuracy without the worst {WORST} % [%]",
    )
    return Table(f"{row['changed']} changed labels", columns, tuple(rows))


def _claims(compared: Mapping[str, Row], labels: Row | None) -> Iterator[Claim]:
    for images, goal in GOALS.items():
        flags, told = [], ""
        if images in compared:
            found = compared[images]["methods"]["exact"]
            flags, (low, high) = [found["score"] >= goal], found["interval"]
            told = f"{found['score']:.4f} (95 % interval {low:.4f} to {high:.4f})"
        yield Claim(f"{images}: the linear datamodeling score is at least {goal}", HERE, *verdict(flags, told))
    scores = {
        images: (row["methods"]["exact"], row["methods"][best_influence(row)], row["methods"]["gradient product"])
        for images, row in compared.items()
    }
    for place, words in ((1, "the best influence function"), (2, "gradient products")):
        told = "; ".join(f"{images}: {of[0]['score']:.3f}, {of[place]['score']:.3f}" for images, of in scores.items())
        flags = [of[0]["interval"][0] > of[place]["interval"][1] for of in scores.values()]
        yield Claim(f"the exact derivative is above {words} (beyond both intervals)", HERE, *verdict(flags, told))
    yield _most_and_least(compared)
    found_labels = {} if labels is None else {name: 100 * found[WORST - 1] for name, found in labels["found"].items()}
    exact = found_labels.get("exact", 0.0)
    told = f"{exact:.1f} % of {0 if labels is None else labels['changed']}"
    flags = [exact >= 100 * FOUND] if found_labels else []
    words = f"of the changed labels {100 * FOUND:g} % are among the {WORST} % with the worst scores"
    yield Claim(words, HERE, *verdict(flags, told))
    told = ", ".join(f"{name} {value:.1f} %" for name, value in found_labels.items())
    flags = [exact >= value for value in found_labels.values()]
    yield Claim("no other method finds more of them", HERE, *verdict(flags, told))


def _most_and_least(compared: Mapping[str, Row]) -> Claim:
    flags, told = [], []
    for images, row in compared.items():
        curves, drawn = row["curves"], _random(row["curves"])
        more = [a > b for a, b in zip(curves["exact, most"], drawn, strict=True)]
        less = [a < b for a, b in zip(curves["exact, least"], drawn, strict=True)]
        flags += more + less
        told.append(f"{images}: {sum(more)} and {sum(less)} of {len(more)} shares")
    words = (
        "without the most helpful examples the test loss is above, without the least helpful below, that of random ones"
    )
    return Claim(words, HERE, *verdict(flags, "; ".join(told)))


def _look(name: str) -> dict[str, Any]:
    return {**LOOKS[name.partition(",")[0]], "markersize": 4, "label": name}


def draw(settings: Any, results: Results, folder: Path) -> list[Path]:
    """``scores.png``: changes and scores; ``leave-out.png``: curves; ``labels.png``: what is found."""
    compared = {name: results[name] for name in GOALS if name in results}
    made = []
    if compared:
        figure, grid = panels(len(compared), 2, 5, 3.6)
        for (left, right), (images, row) in zip(grid, compared.items(), strict=True):
            _draw_changes(left, images, row)
            _draw_scores(right, images, row)
        made.append(save(figure, folder / "scores.png"))
        figure, (axes,) = panels(1, len(compared), 5, 4)
        for place, (images, row) in zip(axes, compared.items(), strict=True):
            _draw_curves(settings, place, images, row)
        legend_below(figure, axes[0], 4)
        made.append(save(figure, folder / "leave-out.png"))
    if "labels" in results:
        made.append(_draw_labels(results["labels"], folder))
    return made


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


def _draw_scores(axes: Axes, images: str, row: Row) -> None:
    for place, (name, found) in enumerate(row["methods"].items()):
        look, (low, high) = LOOKS[name.partition(",")[0]], found["interval"]
        axes.barh(place, found["score"], color=look["color"], alpha=0.8)
        axes.plot([low, high], [place, place], color="0.4", linewidth=3)
        axes.annotate(f"{found['score']:.3f}", (max(found["score"], 0) + 0.03, place - 0.28), fontsize="small")
    axes.axvline(GOALS[images], color="0.4", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(row["methods"])), list(row["methods"]))
    axes.invert_yaxis()
    axes.set(xlabel="linear datamodeling score, 95 % interval", title=images, xlim=(min(0.0, axes.get_xlim()[0]), 1.15))
    axes.grid(alpha=0.3, axis="x")


def _draw_curves(settings: Any, axes: Axes, images: str, row: Row) -> None:
    shares, curves = [100 * share for share in settings.shares], row["curves"]
    for name in ("exact", best_influence(row), "gradient product"):
        label = "influence, the best damping" if name.startswith("influence") else name
        axes.plot(shares, curves[f"{name}, most"], **{**_look(name), "label": label})
        axes.plot(shares, curves[f"{name}, least"], **{**_look(name), "label": None, "fillstyle": "none"})
    axes.plot(shares, _random(curves), **_look("random"))
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.set(xlabel="left out [%]", ylabel="change of the mean test loss", xscale="log")
    axes.set_title(f"{images}: most helpful (above), least helpful (below)", fontsize="medium")
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _draw_labels(row: Row, folder: Path) -> Path:
    figure, ((axes,),) = panels(1, 1, 6.5, 4.5)
    found = row["found"]
    influence = max((name for name in found if name.startswith("influence")), key=lambda name: found[name][WORST - 1])
    for name in ("exact", influence, "gradient product", "own loss"):
        look = {**_look(name), "marker": None}
        axes.plot(range(101), [0, *(100 * share for share in row["found"][name])], **look)
    axes.plot([0, 100], [0, 100], color=LOOKS["random"]["color"], linestyle=":", label="random")
    axes.axvline(WORST, color="0.6", linewidth=0.8)
    axes.axhline(100 * FOUND, color="0.6", linewidth=0.8)
    axes.set(xlabel="examples looked at, the worst first [%]", ylabel="changed labels found [%]", xlim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return save(figure, folder / "labels.png")
