"""What is to be known beside the tables of meta-transfer: deviations from the paper, and how the problem was chosen."""

from __future__ import annotations

NOTES = (
    "The paper transfers from ImageNet to six sets of thousands of images, with ResNet-34 and ResNet-18; none can be "
    "had here. Ours goes from the 964 background characters of Omniglot at 14x14, all 20 drawings of each, to 50 "
    "characters of other alphabets with three drawings of each, other ones at every start, from a small residual to a "
    "small VGG-like network. A linear layer on the source's features says how much there is to gain. The paper's "
    "figures in the table are those on Bird.",
    "The problem was chosen on validation alphabets by a rule that was written down first (in the module "
    "`meta_transfer_source`): a source that is worth more to a linear layer than scratch comes to; the inner step "
    "sizes that are best for scratch; the paper's beta of 0.5 if, at three starts, transfer at fixed weights then "
    "gains five points or more, with 5 or else 3 images per class. What was seen there, accuracies by start: with 5 "
    "images scratch 59.6 and transfer at fixed weights 64.0 (one start, Adam); with 3 images scratch 42.4, 41.9, 45.2 "
    "with Adam and 44.6, 40.6, 44.6 with momentum SGD, transfer at fixed weights 51.3, 52.0, 53.1 and 52.4, 48.7, "
    "51.9; with beta 2 it was 54.5, 52.5, 56.8 and 52.1, 52.6, 54.5. A linear layer on the source's features: 74.0 "
    "(the first start).",
    "The outer step size is the paper's for small images, 0.001. On validation alphabets learned transfer with 0.003 "
    "came to 43.9 at the first start, and the weights of the three pairs fell from 1 to 0.60, 0.26 and 0.00: the outer "
    "loss is that of the training images, which the target soon knows by heart, and with three images per class it "
    "says that there is nothing to match. The paper has thousands of images.",
    "Pairs of stages of equal number are matched, three in all, where the paper matches all with all: with nine pairs "
    "at weight one an iteration of the baseline takes twice the time (`--set pairs=all`), and transfer at fixed "
    "weights came to 52.4, 52.7, 51.2 on the validation alphabets (Adam): as much.",
    "No augmentation, and no validation images to select a model by: accuracy is that after the last iteration. "
    "Normalisation is by batch statistics, the test images being one batch.",
    "The paper's 0.65 is of a whole epoch on a GPU, loading included. Ours is processor time of one iteration: the "
    "source's features, the step on the total loss, both kinds of inner steps and the hypergradient. Counting predicts "
    "about 2/3 at best at T=2: the baseline takes three Hessian-vector products, one of them on the task's loss, the "
    "estimate two; and what both do besides does not shrink.",
    "The step size is annealed to zero, and with it the difference of Fig. 1; divided by the step size, it says how "
    "fast the gradient turns.",
    "The windowed solve and the step on the task's loss are two calls of diffopt.solve, the second started from the "
    "first's parameters and buffers; errors of hypergradients are beside the exact one of T steps, at one point and "
    "on one batch. First order's is that of the total loss, as in the paper: the task's loss after the steps does "
    "not read the meta-networks.",
)
