"""What the page says that one run cannot: what limits the goals that are missed, and ratios on another processor."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "ours, compile=True": "With 4 tasks and 20 steps the two programs take 2.7 of a call's 6.0 ms under the profiler; "
    "the rest is the eager outer loss with its `vmap` and autograd, about 1.1 ms, and the Python around the "
    "programs, none of whose parts is more than 6 %. `diffopt.compiled` has the outer loss in the program.",
    "eager": "Not the operators of torch: with 4 tasks and one step we call 725 of them and the fastest peer 619, "
    "with five steps 2,317 and 2,435, matrix products among them 136 and 161. Half of the one-step call, "
    "2.1 of 4.2 ms under the profiler, is the own time of `_Solve` and its backward pass, which is "
    "Python. It is a fixed cost of a call.",
    "CG": "44 products, as the peer makes; with 2,000 unknowns they take nine tenths of its time. The rest of ours is "
    "fixed: a call of `implicit` with its checks and the record of its backward pass, about a millisecond of Python. "
    "With 50 unknowns, where a product takes two microseconds, that is nearly all there is. The peak, 20 vectors "
    "beside the peer's 15, lies within one product: eight are what autograd saves for products, which both hold, and "
    "four what a product makes; nine would be 0.6. `diffopt.compiled` has none of the Python.",
    "CG, compiled": "Products of a matrix and a vector, as of W4.",
    "W4": "In the code that the compiler writes, products of a matrix and a vector are loops of its own: those "
    "with the transposed matrix go down 2,000 rows for 16 columns at a time, across the order in which "
    "they lie in memory, where eager torch calls a library. The data are copied twice in a call, too (a "
    "peak of 34 MB).",
}
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
