"""What the page says that one run cannot: what limits the goals that are missed, and ratios on another processor."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "ours, compile=True": "With 4 tasks and 20 steps a call takes 3.4 ms, and 6.8 under a profiler of Python, of which "
    "the two programs take 2.3; the rest is the eager outer loss with its `vmap` and autograd, about a millisecond, "
    "and the Python around the programs, 2,000 function calls, none of whose parts takes more than 5 %. This Python is "
    "a fixed cost: with 100 tasks a tenth of a call. `diffopt.compiled` has the outer loss in the program.",
    "eager": "Not the operators of torch: with 4 tasks and one step we call 725 of them and the fastest peer 619, "
    "with five steps 2,317 and 2,435, matrix products among them 136 and 161. Half of the one-step call, "
    "2.1 of 4.2 ms under the profiler, is the own time of `_Solve` and its backward pass, which is "
    "Python. It is a fixed cost of a call.",
    "CG": "44 products, as the peer makes; with 2,000 unknowns they take nine tenths of its time. The rest of ours is "
    "fixed: a call of `implicit` with its checks and the record of its backward pass, about a millisecond of Python. "
    "With 50 unknowns, where a product takes two microseconds, that is nearly all there is. The peak, 20 vectors "
    "beside the peer's 15, lies within one product: eight are what autograd saves for products, which both hold, and "
    "four what a product makes; nine would be 0.6. `diffopt.compiled` has none of the Python.",
    "CG, compiled": "Products of the large matrix with a vector are the library's. What an iteration makes is "
    "allocated anew, as at the steps of W1.",
    "ours, compiled program": "With 4 tasks and 20 steps, of the samples of a profiler of the processor, 22 % are in "
    "`malloc` and `free` of the steps' intermediate tensors, which torch's C++ allocates at every step, 17 % in the "
    "library's products of matrices and 10 % in the loops that the compiler has written; the others are in torch's "
    "handles of tensors and in the Python around a call. With 5 steps this Python is about a quarter of the "
    "0.64 ms: arguments are taken apart, looked up and put together again, and what the functions read is "
    "looked at, a thirtieth of the call.",
    "arithmetic": "Of a profiler's samples, 45 % are in the library's batched products of 10 by 40 by 40 numbers, "
    "which alone take three times as long as the square products of as many multiplications that they are compared "
    "with; 34 % in the compiler's loops, 7 % in `malloc` and `free`.",
    "compiled checkpoints": "On the way back there are at once the states before the 10 blocks, those of one block as "
    "its loop has stacked them, and the same once more, with the block's first one in front. The second would go if a "
    "loop could write into a stack that is there, for which torch's `scan` has no form.",
    "checkpoints": "Nearly every step is taken twice: 4,601 products of matrices where `torch.func` makes 3,011 and "
    "the form that keeps every graph 2,511, and 73,600 operators where it calls 45,600, which is 1.6 times as many. "
    "What is not kept has to be computed again, here for a seventh of the memory.",
    "convolutions": "On W2 with 5 steps and 8 tasks in chunks of 2, 57 % of the operators' time is in convolutions, "
    "pooling and normalisation, and the whole takes as long as the same arithmetic written out by hand: a convolution "
    "of two groups is, on this processor, no faster than two. Of W2's memory with states, 60.7 MB are the gradient "
    "of one outer loss, of 75 images that batch statistics do not allow to be taken apart: 0.64 of the loop's peak.",
    "W4 eager": "Of the memory: a step leaves seven vectors of 2,000 numbers in autograd's graph, where the plain loop "
    "leaves five. The two others belong to the value of the step's loss: `Solution.losses` can be differentiated after "
    "the call, so that its graph must be there, which the plain loop lets go.",
    "W5 eager": "With 10 steps both make 249 products of matrices; ours calls 4,604 operators where the plain loop "
    "calls 4,292, and a quarter of the call, under the profiler, is the own time of `_Solve` and its backward pass, "
    "which is Python. A step leaves the same 190 kB in the graph, so that the ratio of memory goes to 1 as steps are "
    "added: what we save, 0.3 MB, is fixed.",
    "leaves": "Ours calls 106,171 operators where the plain loop calls 107,861. Under a profiler of Python three "
    "quarters of the call are autograd's engine; a twentieth is what looks at the first graph, for captured tensors "
    "and for how much memory it holds, and as much the letting go of the steps' graphs one after the other.",
    "W4": "A call copies the data once, for what torch's loops are given must be no view of an argument.",
    "W5": "A step takes four products of 128 by 784 by 128 numbers, as in JAX. The states, 0.8 MB each with their "
    "momentum, are written and read once.",
    "binomial": "Of what the states alone take, the rollout with the outer loss is 0.29, and each order, a batch of "
    "100 products, a tenth: written out by hand, on another processor, 0.58.",
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
