"""What the page says that one run cannot: what limits the goals that are missed, and ratios on another processor."""

from __future__ import annotations

REASONS: dict[str, str] = {}
"""By the key that a goal names: what limits it, from profiles."""

_EPYC, _PROGRAMS = "64a108f", "42b25ce"
_FUNCTORCH, _LOOP = "functorch, backward outside", "plain loop"

EARLIER: dict[tuple[str, str, str], tuple[float, str]] = {
    ("W1 T=5 B=4", _LOOP, _FUNCTORCH): (1.62, _EPYC),
    ("W1 T=5 B=4", "by hand (a limit)", _FUNCTORCH): (0.70, _EPYC),
    ("W1 T=5 B=100", _LOOP, _FUNCTORCH): (15.69, _EPYC),
    ("W1 T=5 B=100", "by hand (a limit)", _FUNCTORCH): (0.96, _EPYC),
    ("W1 T=20 B=100", _LOOP, _FUNCTORCH): (15.87, _EPYC),
    ("W1 T=20 B=100", "by hand (a limit)", _FUNCTORCH): (0.97, _EPYC),
    ("W1 T=20 B=4", "ours, compiled program", "JAX, remat"): (1.18, _PROGRAMS),
    ("W1 T=20 B=25", "ours, compiled program", "JAX, remat"): (0.92, _PROGRAMS),
    ("W1 T=20 B=100", "ours, compiled program", "JAX, remat"): (0.65, _PROGRAMS),
    ("W1 T=20 B=4", "JAX", "JAX, remat"): (1.16, _PROGRAMS),
    ("W1 T=20 B=100", "JAX", "JAX, remat"): (1.09, _PROGRAMS),
    ("W2 T=5 B=8", "by hand, chunks of 2 (a limit)", _LOOP): (1.05, _EPYC),
    ("W3 T=5 B=2", "higher", _LOOP): (0.99, _EPYC),
    ("W4 reverse T=100", "hypertorch style, states", _LOOP): (1.75, _EPYC),
    ("W4 CG(20)", "TorchOpt CG", "hypertorch style CG"): (1.44, _EPYC),
    ("W5 T=10", "higher", _LOOP): (1.10, _EPYC),
}
"""``(cell, method, other method)``: the ratio of their times on an AMD EPYC, and the commit that measured it."""
