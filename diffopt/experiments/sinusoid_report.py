"""What the errors on sine waves say: tables, answers to the paper's claims, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, final

from matplotlib.ticker import MaxNLocator

from diffopt.experiments.framework.experiment import Cell, Claim, Results, Row, Summary, Table, verdict
from diffopt.experiments.framework.pictures import SEQUENCE, STYLES, legend_below, panels, save

PAPER = "binomial paper"
ORDER = ("truncated", "binomial", "binomial, scale L/K", "hybrid", "krylov")
ROUND_OFF = 1e-14
"""Of a meta-gradient beside its norm."""
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16)

NOTES = (
    "The paper's inner step size is missing from the text available to us, and with it the curvature number "
    "`K * lr * lambda_max` that decides everything here; so several step sizes were run. Initial weights are torch's "
    "default.",
    "`scale L/K` is the substitution of the paper's appendix C.2 (the inner step size times L/K in the backward pass), "
    "which its tables use. For 0 < L < K it keeps an error of first order in the step size; the theorems do not cover "
    "it.",
    "Krylov (minimal residuals in time) is this library's; it costs about K instead of K - L + 1 products a level.",
)


@final
class Pair(NamedTuple):
    """Two estimators at one level of one setting."""

    steps: int
    rate: float
    level: int
    curvature: float
    truncated: list[float]
    binomial: list[float]
    scaled: list[float]
    krylov: list[float]
    norm: float

    def ratio(self, rule: str = "binomial") -> float:
        """Truncated's error over another rule's, median over the batches; errors below round-off count as that."""
        least, other = ROUND_OFF * self.norm, {"binomial": self.binomial, "krylov": self.krylov}[rule]
        return median(max(a, least) / max(b, least) for a, b in zip(self.truncated, other, strict=True))

    def is_exact(self) -> bool:
        """Whether binomial's error is round-off."""
        return fmean(self.binomial) <= ROUND_OFF * self.norm


def summarise(settings: Any, results: Results) -> Summary:
    """Tables and claims."""
    pairs = list(_pairs(results))
    tables = [_ratio_table(results, pairs), *_error_tables(settings, results)]
    return Summary(tuple(table for table in tables if table.rows), tuple(_claims(pairs, results)), NOTES)


def _ratio_table(results: Results, pairs: Sequence[Pair]) -> Table:
    rows = []
    for name, row in results.items():
        ratios = {pair.level: pair.ratio() for pair in pairs if (pair.steps, pair.rate) == _key(name)}
        claimed = "10^3 to 10^4 at L=4" if name.startswith("K=5 ") else None
        rows.append((name, median(row["curvature"]), *(ratios.get(level) for level in SHOWN), claimed))
    return Table(
        "Truncated's error over binomial's at equal L, median over the batches (below 1: binomial is worse)",
        ("setting", "K lr lambda_max", *(f"L={level}" for level in SHOWN), "the paper"),
        tuple(rows),
    )


def _error_tables(settings: Any, results: Results) -> Iterator[Table]:
    """The errors over L for the fewest steps, at each step size."""
    steps = min(settings.steps)
    for name, row in results.items():
        if _key(name)[0] == steps:
            found, norm = row["errors"], fmean(row["norm"])
            rows: list[tuple[Cell, ...]] = [("first-order", fmean(found["first-order"]["0"]) / norm)]
            rows[0] += (None,) * (steps - 2)
            for rule in ORDER:
                errors = (found[rule].get(str(level)) for level in range(1, steps))
                rows.append((rule, *(None if e is None else fmean(e) / norm for e in errors)))
            columns = ("estimator", *(f"L={level}" for level in range(1, steps)))
            yield Table(f"Mean error over the mean norm of the exact meta-gradient, {name}", columns, tuple(rows))


def _claims(pairs: Sequence[Pair], results: Results) -> Iterator[Claim]:
    last = [pair for pair in pairs if pair.steps == 5 and pair.level == 4]
    ratios = ", ".join(f"{pair.ratio():.2g} at lr {pair.rate:g}" for pair in last)
    yield Claim(
        "at equal L, binomial's error is 10^3 to 10^4 times smaller than truncated's",
        f"{PAPER}, Fig. 3a (K=5, L=4)",
        *verdict([pair.ratio() >= 1e3 for pair in last], f"truncated / binomial: {ratios}"),
    )
    batches = [a / b for pair in last for a, b in zip(pair.truncated, pair.binomial, strict=True)]
    yield Claim(
        "it is smaller on every batch",
        f"{PAPER}, Fig. 3a (K=5, L=4)",
        *verdict([r > 1 for r in batches], f"on {sum(r > 1 for r in batches)} of {len(batches)} batches"),
    )
    yield Claim(
        "binomial beats truncated by orders of magnitude at equal L",
        f"{PAPER}, section 4.1, here for all K, L and step sizes",
        *verdict([pair.ratio() >= 10 for pair in pairs], _where(pairs)),
    )
    first = [pair for pair in pairs if pair.steps == 5 and pair.level in (1, 2)]
    low = {(pair.rate, pair.level): fmean(pair.binomial) for pair in first}
    comparable = {pair.rate: low[pair.rate, 1] / fmean(pair.truncated) for pair in last}
    told = ", ".join(f"{ratio:.2g} at lr {rate:g}" for rate, ratio in comparable.items())
    yield Claim(
        "binomial at L=1 is comparable to truncated at L=4 (K=5)",
        f"{PAPER}, Fig. 3b",
        *verdict([ratio <= 2 for ratio in comparable.values()], f"binomial(1) / truncated(4): {told}; counted up to 2"),
    )
    shares = {pair.rate: fmean(pair.binomial) / pair.norm for pair in first if pair.level == 2}
    told = ", ".join(f"{100 * share:.2g} % at lr {rate:g}" for rate, share in shares.items())
    yield Claim(
        "binomial's error is negligible from L=2 on (K=5)",
        f"{PAPER}, Fig. 3b",
        *verdict([share < 0.01 for share in shares.values()], f"of the gradient's norm: {told}; counted below 1 %"),
    )
    scaled = [fmean(pair.scaled) < fmean(pair.binomial) for pair in pairs]
    better = [pair.curvature for pair, yes in zip(pairs, scaled, strict=True) if yes]
    worse = [pair.curvature for pair, yes in zip(pairs, scaled, strict=True) if not yes]
    told = f"smaller error in {len(better)} of {len(pairs)} settings" + (
        f", at curvature numbers {min(better):.2g} to {max(better):.2g}; larger at {min(worse):.2g} to {max(worse):.2g}"
        if better and worse
        else ""
    )
    yield Claim("scaling by L/K makes binomial more accurate", f"{PAPER}, appendix C.2", *verdict(scaled, told))
    compared = [pair for pair in pairs if pair.level > 1 and not pair.is_exact()]
    krylov = [fmean(pair.krylov) <= fmean(pair.binomial) for pair in compared]
    yield Claim(
        "Krylov's error is no larger than binomial's at equal L > 1",
        "this library",
        *verdict(krylov, f"in {sum(krylov)} of {len(krylov)} settings in which binomial's is more than round-off"),
    )
    hybrid = [fmean(h) >= fmean(b) for h, b in _hybrids(results)]
    yield Claim(
        "the hybrid rule is less accurate than binomial at equal L",
        f"{PAPER}, appendix D.1 (there by accuracy)",
        *verdict(hybrid, f"in {sum(hybrid)} of {len(hybrid)} settings of K, L < C and step size"),
    )


def _where(pairs: Sequence[Pair]) -> str:
    """In how many settings binomial wins by tens, and the curvature numbers on both sides."""
    tens = [pair for pair in pairs if pair.ratio() >= 10]
    worse = [pair for pair in pairs if pair.ratio() < 1]
    text = f"ten times smaller in {len(tens)} of {len(pairs)} settings; larger than truncated's in {len(worse)}"
    if worse:
        text += f", all with a curvature number of {min(pair.curvature for pair in worse):.2g} or more"
        most = max(pair.level / pair.curvature for pair in worse)
        text += f" and L up to {most:.2g} times that number"
    return text


def _pairs(results: Results) -> Iterator[Pair]:
    for name, row in results.items():
        found = row["errors"]
        for level, truncated in found["truncated"].items():
            yield Pair(
                *_key(name),
                level=int(level),
                curvature=median(row["curvature"]),
                truncated=truncated,
                binomial=found["binomial"][level],
                scaled=found["binomial, scale L/K"][level],
                krylov=found["krylov"][level],
                norm=fmean(row["norm"]),
            )


def _hybrids(results: Results) -> Iterator[tuple[list[float], list[float]]]:
    for row in results.values():
        window = max(map(int, row["errors"]["hybrid"]))
        for level, errors in row["errors"]["hybrid"].items():
            if int(level) < window:
                yield errors, row["errors"]["binomial"][level]


def _key(name: str) -> tuple[int, float]:
    steps, rate = (word.partition("=")[2] for word in name.split())
    return int(steps), float(rate)


def draw(settings: Any, results: Results, folder: Path) -> list[Path]:
    """``levels.png``: errors over L; ``batches.png``: over batches; ``curvature.png``: who wins, by curvature."""
    if not results:
        return []
    paths = [_draw_levels(settings, results, folder / "levels.png")]
    paths.append(_draw_batches(results, folder / "batches.png"))
    return [*paths, _draw_curvature(settings, results, folder / "curvature.png")]


def _draw_levels(settings: Any, results: Results, path: Path) -> Path:
    figure, grid = panels(len(settings.steps), len(settings.rates), 3.1, 2.9)
    for i, steps in enumerate(settings.steps):
        for axes, rate in zip(grid[i], settings.rates, strict=True):
            row = results.get(f"K={steps} lr={rate:g}")
            axes.set(yscale="log", xlabel="level L", title=f"K={steps}, lr={rate:g}: not run")
            if row is None:
                continue
            axes.set_title(f"K={steps}, lr={rate:g}, curvature {median(row['curvature']):.2g}", fontsize="medium")
            for rule in ORDER:
                _curve(axes, row, rule)
            axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
        grid[i][0].set_ylabel("error / norm of the meta-gradient")
    legend_below(figure, grid[0][0], len(ORDER))
    return save(figure, path)


def _curve(axes: Any, row: Row, rule: str) -> None:
    """Mean over the batches, and the range of them; at L=0 every rule is first order."""
    norm = fmean(row["norm"])
    found = {0: row["errors"]["first-order"]["0"], **{int(k): v for k, v in row["errors"][rule].items()}}
    shown = {level: errors for level, errors in found.items() if max(errors) > 1e-13 * norm}
    low, middle, high = ([f(errors) / norm for errors in shown.values()] for f in (min, fmean, max))
    axes.plot(list(shown), middle, **STYLES[rule], markersize=4, label=rule)
    axes.fill_between(list(shown), low, high, color=STYLES[rule]["color"], alpha=0.12, linewidth=0)


def _draw_batches(results: Results, path: Path) -> Path:
    """The paper's Fig. 3a: the fewest steps, the last level below exactness, at every step size."""
    steps = min(_key(name)[0] for name in results)
    rows = {name: row for name, row in results.items() if _key(name)[0] == steps}
    figure, grid = panels(1, len(rows), 3.1, 3.2)
    for axes, (name, row) in zip(grid[0], rows.items(), strict=True):
        for rule in ("truncated", "binomial", "binomial, scale L/K", "krylov"):
            errors = row["errors"][rule][str(steps - 1)]
            axes.plot(range(1, len(errors) + 1), errors, **STYLES[rule], markersize=4, label=rule)
        axes.set(yscale="log", xlabel="batch of tasks", title=f"{name}, L={steps - 1}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("mean error of the batch")
    legend_below(figure, grid[0][0], len(ORDER))
    return save(figure, path)


def _draw_curvature(settings: Any, results: Results, path: Path) -> Path:
    figure, grid = panels(1, 2, 5, 4)
    for axes, rule in zip(grid[0], ("binomial", "krylov"), strict=True):
        for i, steps in enumerate(settings.steps):
            pairs = [pair for pair in _pairs(results) if pair.steps == steps]
            ratios = [pair.ratio(rule) for pair in pairs]
            at = [pair.level / pair.curvature for pair in pairs]
            style: dict[str, Any] = {"color": SEQUENCE[i % len(SEQUENCE)], "marker": "os^D"[i % 4], "linestyle": ""}
            axes.plot(at, ratios, **style, markersize=5, alpha=0.8, label=f"K={steps}")
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="level L / curvature number K lr lambda_max")
        axes.set(ylabel=f"truncated's error / {rule}'s", title=f"above the line {rule} is better at equal L")
        axes.grid(alpha=0.3)
    low, high = min(axes.get_ylim()[0] for axes in grid[0]), max(axes.get_ylim()[1] for axes in grid[0])
    for axes in grid[0]:
        axes.set_ylim(low, high)
    legend_below(figure, grid[0][0], len(settings.steps))
    return save(figure, path)
