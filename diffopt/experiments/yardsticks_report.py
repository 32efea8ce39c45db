"""What the public yardsticks say: tables and answers to claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from diffopt.experiments import yardsticks_influence as influence
from diffopt.experiments import yardsticks_toy as toy
from diffopt.experiments.framework.claims import Finished
from diffopt.experiments.framework.experiment import Cell, Claim, Results, Row, Summary, Table, verdict

VICOL = "Vicol et al. (2021), influence balancing"
SHEN = "Shen and Chen (2023)"
BENCHMARK = "benchmark_bilevel"
HERE = "this library"
HEADLINES = (
    "the exact hypergradient is +24.0",
    "truncation to 1, 10 and 20 steps has the wrong sign",
    "from random starts, descent by the exact estimator ends in local minima of h",
    "weights learned by the exact estimator lower the test error below that of equal weights (1 or the start's)",
)
"""What the results page begins with."""
TOLD = 0.9
"""A right label is to weigh more than a wrong one with so much probability."""
SHORT = ("truncated 1", "truncated 10", "truncated 20")


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    results = done.results
    still, moving = part(results, "influence, "), part(results, "toy, ")
    tables = [_influence_table(settings, still), _toy_table(settings, moving), *_cleaning_tables(settings, results)]
    claims = [*_influence_claims(still), *_toy_claims(settings, moving), *_cleaning_claims(settings, results)]
    marked = tuple(replace(claim, headline=claim.text in HEADLINES) for claim in claims)
    return Summary(tuple(table for table in tables if table.rows), marked)


def part(results: Results, prefix: str) -> dict[str, Row]:
    """The rows whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): row for name, row in results.items() if name.startswith(prefix)}


def _influence_table(settings: Any, rows: Mapping[str, Row]) -> Table:
    def line(name: str, row: Row) -> tuple[Cell, ...]:
        if "gradient" not in row:
            return (name, None, influence.by_hand(name), row.get("refused", row.get("diverged")), None)
        last = row["path"][-1]
        end = f"leaves, after {len(row['path']) - 1} steps" if abs(last) > influence.FAR else f"{last:.4f}"
        return (name, row["gradient"], influence.by_hand(name), ", ".join(row["warned"]) or "nothing", end)

    return Table(
        f"Influence balancing: the hypergradient at theta = 0.5 after {settings.influence_steps} steps, and descent "
        "by it to the optimum -0.1667",
        (
            "estimator",
            "hypergradient",
            "by hand",
            "warned of, or refused by",
            f"theta after {settings.influence_iterations} steps",
        ),
        tuple(line(name, row) for name, row in rows.items()),
    )


def _influence_claims(rows: Mapping[str, Row]) -> Iterator[Claim]:
    found = {name: row for name, row in rows.items() if "gradient" in row}
    exact = [abs(found[name]["gradient"] - influence.PUBLISHED["exact"]) < 1e-3 for name in ("exact",) if name in found]
    told = ", ".join(f"{name} {found[name]['gradient']:.5g}" for name in ("exact", "forward mode") if name in found)
    yield Claim("the exact hypergradient is +24.0", VICOL, *verdict(exact, told))
    short = {name: found[name] for name in SHORT if name in found}
    told = ", ".join(f"{name}: {row['gradient']:.3g} (-{-influence.PUBLISHED[name]:g})" for name, row in short.items())
    wrong = [row["gradient"] < 0 for row in short.values()]
    yield Claim(
        "truncation to 1, 10 and 20 steps has the wrong sign", VICOL, *verdict(wrong, f"{told}; in brackets by hand")
    )
    away = [_distance(row) > abs(influence.THETA - influence.OPTIMUM) for row in short.values()]
    ends = ", ".join(f"{name}: {row['path'][-1]:.3g}" for name, row in short.items())
    yield Claim("descent by it moves away from the optimum -1/6", VICOL, *verdict(away, f"from 0.5 to {ends}"))
    near = [_distance(found[name]) < 0.01 for name in ("exact",) if name in found]
    told = f"theta ends at {found['exact']['path'][-1]:.5f}" if near else ""
    yield Claim("descent by the exact one reaches it", VICOL, *verdict(near, told))
    pairs = {name.rpartition(" ")[2]: row["gradient"] for name, row in found.items() if "Neumann" in name}
    both = [(value, found[f"truncated {k}"]["gradient"]) for k, value in pairs.items() if f"truncated {k}" in found]
    same = [abs(a - b) <= 1e-9 * abs(b) for a, b in both]
    told = f"to nine digits in {sum(same)} of {len(same)} lengths"
    source = "derivations, section 6.1; Lorraine et al. (2020)"
    yield Claim("at rest, k terms of Neumann's series are truncation to k steps", source, *verdict(same, told))
    negative = {name: bool(row["warned"]) for name, row in found.items() if row["gradient"] < 0}
    silent = ", ".join(name for name, warned in negative.items() if not warned)
    told = f"{sum(negative.values())} of {len(negative)} warned; silent: {silent or 'none'}"
    yield Claim("an estimator whose sign is wrong says so by a warning", HERE, *verdict(list(negative.values()), told))


def _distance(row: Row) -> float:
    return abs(float(row["path"][-1]) - influence.OPTIMUM)


def _toy_table(settings: Any, rows: Mapping[str, Row]) -> Table:
    def line(name: str, row: Row) -> tuple[Cell, ...]:
        medians = (row["errors"].get(str(steps), [None])[0] for steps in settings.toy_steps)
        last = row["errors"].get(str(settings.toy_steps[-1]), [None] * 3)
        wrong = None if last[2] is None else 100 * last[2]
        share, middle = reached(row), None if "ends" not in row else median(toy.distances(row["ends"]).tolist())
        return (name, *medians, last[1], wrong, None if share is None else 100 * share, middle)

    last = settings.toy_steps[-1]
    return Table(
        f"Shen and Chen's toy: errors beside the closed form (slopes up to 4.8), and {settings.toy_starts} descents",
        (
            "estimator",
            *(f"median error, T={steps}" for steps in settings.toy_steps),
            f"largest, T={last}",
            f"wrong signs [%], T={last}",
            f"ends within {toy.CLOSE:g} of a local minimum [%]",
            "median distance",
        ),
        tuple(line(name, row) for name, row in rows.items()),
    )


def reached(row: Row) -> float | None:
    """The share of the starts from which a local minimiser was reached; ``None``: the descent failed."""
    if "ends" not in row:
        return None
    return float((toy.distances(row["ends"]) < toy.CLOSE).double().mean())


def _toy_claims(settings: Any, rows: Mapping[str, Row]) -> Iterator[Claim]:
    last = str(settings.toy_steps[-1])
    exact = rows.get("exact", {"errors": {}})
    errors = [exact["errors"][last][1]] if last in exact["errors"] else []
    told = f"largest error {errors[0]:.2g} at T={last}; counted below 0.001" if errors else ""
    yield Claim("the inner solution is -x: h'(x) is found", SHEN, *verdict([e < 1e-3 for e in errors], told))
    shares = {name: share for name, row in rows.items() if (share := reached(row)) is not None}
    of_exact = [shares["exact"]] if "exact" in shares else []
    told = f"{100 * of_exact[0]:.1f} % of {settings.toy_starts} within {toy.CLOSE:g}" if of_exact else ""
    text = "from random starts, descent by the exact estimator ends in local minima of h"
    yield Claim(text, SHEN, *verdict([share == 1 for share in of_exact], told))
    others = {name: share for name, share in shares.items() if name != "exact"}
    told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in others.items() if share < 1)
    missed = f"not from all starts: {told}" if told else "from all starts"
    yield Claim(
        "and so does descent by every other estimator", HERE, *verdict([s == 1 for s in others.values()], missed)
    )
    stays, falls = rows.get("truncated 5"), [row["errors"] for row in rows.values() if last in row["errors"]]
    flags, told = [], ""
    before = str(settings.toy_steps[-2]) if len(settings.toy_steps) > 1 else last
    if falls and stays is not None and {before, last} <= set(stays["errors"]):
        biased, right = ([each[steps][0] for steps in (before, last)] for each in (stays["errors"], exact["errors"]))
        flags = [biased[1] > 0.5 * biased[0], right[1] < 0.5 * right[0]]
        told = (
            f"median error of truncated 5: {biased[0]:.2g} at T={before}, {biased[1]:.2g} at T={last}; of the exact "
            f"estimator: {right[0]:.2g}, {right[1]:.2g}"
        )
    text = "more inner steps do not lower the bias of truncation, which depends on its length alone"
    yield Claim(text, "Shaban et al. (2019), in spirit", *verdict(flags, told))


def _draws(settings: Any, results: Results, corruption: float) -> list[dict[str, Row]]:
    """The rows of cleaning at one corruption, a dictionary for every draw."""
    names = [f"cleaning p={corruption:g} seed={seed}, " for seed in range(settings.seeds)]
    return [found for name in names if (found := part(results, name))]


def _cleaning_tables(settings: Any, results: Results) -> Iterator[Table]:
    plain: list[tuple[Cell, ...]] = []
    for corruption in settings.corruptions:
        fits = [rows["baselines"] for rows in _draws(settings, results, corruption) if "baselines" in rows]
        if fits:
            means = [fmean(fit[key] for fit in fits) for key in ("noisy", "start", "oracle", "wrong")]
            plain.append((f"{corruption:g}", round(100 * means.pop(), 1), *(round(mean, 2) for mean in means)))
    columns = ("redrawn", "wrong labels [%]", "all, weights 1", "all, weights of the start", "right labels only")
    yield Table("Data cleaning: test errors of plain fits [%]", columns, tuple(plain))
    for corruption in settings.corruptions:
        yield _cleaning_table(settings, corruption, _draws(settings, results, corruption))


def _cleaning_table(settings: Any, corruption: float, draws: list[dict[str, Row]]) -> Table:
    names = [name for rows in draws for name in (*rows.get("hypergradients", ()), *rows)]
    order = [name for name in dict.fromkeys(names) if name not in ("baselines", "hypergradients")]

    def line(name: str) -> tuple[Cell, ...]:
        first = [rows["hypergradients"][name] for rows in draws if name in rows.get("hypergradients", {})]
        runs = [rows[name] for rows in draws if name in rows]
        ended = [row for row in runs if "losses" in row]
        failed = ", ".join(sorted({row["diverged"] for row in runs if "diverged" in row})) or None
        middle: list[Cell] = [fmean(each) for each in zip(*first, strict=True)] or [None, None]
        if not ended:
            return (name, *middle, failed, None, None, None)
        ends = [(row["losses"][-1], row["test error"], row["told apart"], row["seconds"][-1]) for row in ended]
        loss, error, told, seconds = (fmean(each) for each in zip(*ends, strict=True))
        return (name, *middle, failed or loss, round(error, 2), told, seconds)

    return Table(
        f"Data cleaning, {100 * corruption:g} % redrawn: the first hypergradient, and {settings.iterations} outer steps"
        + (f"; means of {len(draws)} draws" if len(draws) > 1 else ""),
        ("estimator", "relative error", "cosine", "outer loss", "test error [%]", "told apart", "seconds"),
        tuple(line(name) for name in order),
    )


def plain_fit(baselines: Row) -> float:
    """The lower test error of the two fits to the labels as they are; the larger weights mean less ridge."""
    return float(min(baselines["noisy"], baselines["start"]))


def _cleaning_claims(settings: Any, results: Results) -> Iterator[Claim]:
    draws = [(p, rows) for p in settings.corruptions for rows in _draws(settings, results, p)]
    gains = [
        (p, name, row["test error"] - plain_fit(rows["baselines"]), row["told apart"])
        for p, rows in draws
        for name, row in rows.items()
        if "baselines" in rows and "test error" in row
    ]
    exact = [(p, gain, told) for p, name, gain, told in gains if name == "exact"]
    told = ", ".join(f"{gain:+.2f} points at {p:g}" for p, gain, _ in exact)
    text = "weights learned by the exact estimator lower the test error below that of equal weights (1 or the start's)"
    yield Claim(text, f"{BENCHMARK}, data cleaning", *verdict([gain < 0 for _, gain, _ in exact], told))
    rest = [(p, name, gain) for p, name, gain, _ in gains if name != "exact"]
    told = ", ".join(f"{name} at {p:g} ({gain:+.2f})" for p, name, gain in rest if gain >= 0)
    told = f"lower in {sum(gain < 0 for *_, gain in rest)} of {len(rest)} runs" + (f"; not: {told}" if told else "")
    yield Claim("so do those learned by every other estimator", HERE, *verdict([gain < 0 for *_, gain in rest], told))
    told = ", ".join(f"{area:.3f} at {p:g}" for p, _, area in exact)
    flags = [area > TOLD for *_, area in exact]
    text = f"a right label weighs more than a wrong one with a probability above {TOLD:g} (exact estimator)"
    yield Claim(text, HERE, *verdict(flags, told))
    both = [
        (p, rows["hypergradients"]["implicit, 5 CG"][0], rows["hypergradients"]["exact"][0])
        for p, rows in draws
        if "hypergradients" in rows
    ]
    told = ", ".join(f"{cg:.2g} and {unrolled:.2g} at {p:g}" for p, cg, unrolled in both)
    yield Claim(
        "5 products of conjugate gradients are nearer the hypergradient than back-propagation through all steps is",
        "Grazzi et al. (2020), on AID and ITD",
        *verdict([cg < unrolled for _, cg, unrolled in both], f"relative errors {told}"),
    )
