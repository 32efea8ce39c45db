"""The accuracies in the papers' tables, in per cent, as printed.

The multi-step paper's "+-" are 95 % confidence intervals over 600 episodes. The binomial paper's are, by its authors'
code, ``std / sqrt(600)``: one standard error, so that its 95 % interval is 1.96 times as wide.
"""

from __future__ import annotations

from diffopt.experiments.framework.texts import texts

OMNIGLOT = ("omniglot", "omniglot-vinyals")
BINOMIAL_SPREAD, MULTI_STEP_SPREAD = "one standard error", "95 % interval"


def printed(dataset: str, way: int, shot: int, method: str) -> str | None:
    """What a paper prints for a method; ``None``: nothing."""
    for table in texts("few-shot")["printed"]:
        if dataset in table["datasets"] and [way, shot] in table["shapes"] and method in table["rows"]:
            return str(table["rows"][method].split(" ")[table["shapes"].index([way, shot])])
    return None


def spread(dataset: str) -> str:
    """What the "+-" of :func:`printed` are."""
    if dataset in OMNIGLOT:
        return f"multi-step paper, table 4: {MULTI_STEP_SPREAD}"
    return f"binomial paper, tables 1 and 2: {BINOMIAL_SPREAD}; multi-step paper, table 5: {MULTI_STEP_SPREAD}"
