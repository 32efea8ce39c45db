"""Where the few-shot runs differ from the papers' and why, how they were tuned, and what their intervals are."""

from __future__ import annotations

NOTES = (
    "Our +- is half the width of the 95 % interval over starts and test episodes together; differences are taken from "
    "the same start on the same episodes. The multi-step paper's +- is a 95 % interval over episodes, the binomial "
    "paper's is, by its authors' code, one standard error: to be multiplied by 1.96. Neither says anything of starts.",
    "Equal budget: every method has the same number of outer iterations, the same start and the same episodes, and "
    "outer steps that fall to 0. At the standard settings it is a fraction of the papers' (20,000 and 60,000), with "
    "fewer channels and images of 16x16; `--full` has 60,000 at 28x28. `In equal time` is the validation accuracy when "
    "the fastest method of the group had finished. The outer steps of the others were still large then: it is a lower "
    "bound of what they reach in that time.",
    "Characters are drawn at random from all alphabets, turned ones are classes of their own, in tests too (Vinyals', "
    "Santoro's and Finn's protocol, which the multi-step paper follows). `--dataset omniglot` has alphabets that were "
    "never seen, which are harder.",
    "The shared settings were tuned once, with MAML alone, from another start (seed 100), on validation characters, in "
    "40 to 70 seconds of processor time each: inner rate 0.1 (0.2 and 0.4: 1 to 8 points less), outer rate 0.003 "
    "(0.006 and 0.01: 0.5 to 3 less), 4 tasks (2: 4 less; 8: no more), 16 channels (32 are as good in equal time), "
    "16x16 pixels (1 more than 28x28 in equal time, where two thirds more iterations are made), pooling (strided "
    "convolutions with 16 channels: 12 less). First order in the second group and Reptile have rates of their own.",
    "Reptile has its own algorithm: ten inner steps on batches of ten of all a task's images (its support and query "
    "images, for it has no query set), and an outer step of 1, falling, towards the mean solution. As a direction for "
    "Adam, after five steps on the five support images, it ended at 61 %: it then learns to fit five images, which "
    "any start does. Its outer training loss is that of images which it has just learned from.",
    "The best of some checkpoints by validation episodes is tested. Normalisation is by the statistics of the batch at "
    "hand, queries included (transductive), as in the binomial paper's code.",
    "Where the run was cut short, the main methods (exact, FOMAML, truncated, binomial, Krylov, multi-step(4)) have "
    "more starts than the others, which come after them (column `starts`).",
    "The first group is trained with 5 inner steps and tested with 10, as in the binomial paper's code. That costs our "
    "iMAML accuracy, on the training classes too: `--set test_steps=5` tests as it was trained.",
    "Binomial and hybrid have scale 1, as in the theorems; the paper's tables are of the scale L/K, which `--scale "
    "paper` takes. iMAML here descends on the proximal objective, from which its L iterations of conjugate gradients "
    "take the gradient. Multi-step estimation changes the forward pass and is tested with its windows.",
    "Krylov of level 1 is binomial of level 1 in exact arithmetic. Where the two runs part by rounding alone, their "
    "difference is the noise floor, below which methods cannot be told apart. Where it is 0 in every start, both did "
    "the same arithmetic to the last bit, and chance shows in the intervals over starts alone. A run that diverged "
    "counts as 0 %.",
)
