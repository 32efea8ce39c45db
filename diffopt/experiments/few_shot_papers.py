"""The accuracies in the papers' tables, in per cent, as printed.

The multi-step paper's "+-" are 95 % confidence intervals over 600 episodes. The binomial paper's are, by its authors'
code, ``std / sqrt(600)``: one standard error, so that its 95 % interval is 1.96 times as wide.
"""

from __future__ import annotations

OMNIGLOT = ("omniglot", "omniglot-vinyals")
BINOMIAL_SPREAD, MULTI_STEP_SPREAD = "one standard error", "95 % interval"

_OMNIGLOT = ((5, 1), (5, 5), (20, 1), (20, 5))
_MULTI_STEP_OMNIGLOT = {
    "momentum: MAML": "99.10+-0.77 99.66+-0.44 95.80+-0.81 98.73+-0.37",
    "momentum: first-order": "98.40+-1.11 99.46+-0.58 90.53+-1.13 96.73+-0.55",
    "multi-step 2": "99.10+-0.81 99.66+-0.43 95.60+-0.78 98.70+-0.38",
    "multi-step 4": "98.97+-1.02 99.66+-0.47 95.75+-0.77 98.60+-1.03",
    "multi-step 8": "98.70+-1.03 99.50+-0.52 94.24+-0.95 97.70+-0.51",
    "MAML": "98.7+-0.4 99.9+-0.1 95.8+-0.3 98.9+-0.2",
    "FOMAML": "98.3+-0.5 99.2+-0.2 89.4+-0.5 97.9+-0.1",
    "Reptile": "97.68+-0.04 99.48+-0.06 89.43+-0.14 97.12+-0.32",
}
"""Multi-step paper, table 4; the last three rows are quoted there from the methods' own papers."""
_MULTI_STEP_MINI = {
    "momentum: MAML": "48.49+-0.83 63.43+-0.71",
    "momentum: first-order": "44.90+-0.75 61.57+-0.68",
    "multi-step 2": "48.68+-0.82 63.70+-0.73",
    "multi-step 4": "48.90+-0.82 63.67+-0.75",
    "multi-step 8": "46.85+-0.79 60.84+-0.71",
}
"""Multi-step paper, table 5."""
_BINOMIAL = {
    "FOMAML": "44.57+-0.92 62.97+-0.50 43.53+-0.94 63.31+-0.52",
    "Reptile": "42.11+-0.92 61.07+-0.51 45.06+-0.91 61.27+-0.50",
    "iMAML 1": "44.47+-0.92 60.32+-0.49 44.77+-0.98 60.81+-0.50",
    "truncated 1": "44.53+-0.89 62.43+-0.50 43.67+-0.96 64.15+-0.51",
    "binomial 1": "45.50+-0.91 62.36+-0.48 46.23+-0.95 64.49+-0.51",
    "iMAML 2": "44.57+-0.95 60.63+-0.48 44.13+-0.93 61.15+-0.50",
    "truncated 2": "44.93+-0.90 63.61+-0.48 45.93+-0.99 64.81+-0.49",
    "binomial 2": "46.23+-0.92 63.49+-0.48 46.20+-0.92 64.41+-0.52",
    "iMAML 3": "45.03+-0.92 62.77+-0.48 44.80+-0.95 62.38+-0.50",
    "truncated 3": "44.33+-0.92 63.67+-0.48 45.62+-0.98 63.69+-0.51",
    "binomial 3": "46.00+-0.92 64.17+-0.47 46.43+-0.93 65.37+-0.49",
    "iMAML 4": "45.43+-0.92 62.64+-0.47 45.40+-0.95 61.80+-0.51",
    "truncated 4": "44.83+-0.93 63.44+-0.48 44.93+-0.95 64.83+-0.51",
    "binomial 4": "46.24+-0.94 63.86+-0.48 46.73+-0.94 64.63+-0.50",
    "MAML": "46.50+-0.93 64.23+-0.50 47.03+-0.91 65.12+-0.50",
    "hybrid 1": "45.17+-0.91 62.41+-0.49 44.30+-0.91 63.78+-0.49",
}
"""Binomial paper, table 1 (hybrid: table 2): miniImageNet 1 and 5 shots, tieredImageNet 1 and 5 shots."""


def printed(dataset: str, way: int, shot: int, method: str) -> str | None:
    """What a paper prints for a method; ``None``: nothing."""
    if dataset in OMNIGLOT and (way, shot) in _OMNIGLOT:
        return _part(_MULTI_STEP_OMNIGLOT.get(method), _OMNIGLOT.index((way, shot)))
    if dataset in ("mini-imagenet", "tiered-imagenet") and way == 5 and shot in (1, 5):
        place = (1, 5).index(shot)
        if dataset == "mini-imagenet" and method in _MULTI_STEP_MINI:
            return _part(_MULTI_STEP_MINI[method], place)
        return _part(_BINOMIAL.get(method), place + 2 * (dataset == "tiered-imagenet"))
    return None


def spread(dataset: str) -> str:
    """What the "+-" of :func:`printed` are."""
    if dataset in OMNIGLOT:
        return f"multi-step paper, table 4: {MULTI_STEP_SPREAD}"
    return f"binomial paper, tables 1 and 2: {BINOMIAL_SPREAD}; multi-step paper, table 5: {MULTI_STEP_SPREAD}"


def _part(row: str | None, place: int) -> str | None:
    return None if row is None else row.split(" ")[place]
