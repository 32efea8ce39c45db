"""Data hyper-cleaning: half the labels are redrawn at random; a weight per example finds out which.

    min over a   F(w_T(a)) = log-loss on 1,000 images with checked labels
    w_T(a): T steps of SGD on   sum_i sigmoid(a_i) log-loss(x_i, y_i) / n   over 5,000 images, half of them relabelled

The model is softmax regression, the data MNIST: ``mnist.npz`` with Keras' names (``x_train``, ``y_train``, ``x_test``,
``y_test``) in the folder given by --data-dir or DIFFOPT_DATA. Without it, scikit-learn's digits take its place. All
rows of the table are fitted by the same 150 full-batch steps; the weights are learned with shorter runs of random
minibatches, which ``batches`` hands to the loss.

What to see: the weights of true labels go to one, of false ones to zero, and most of the accuracy comes back.

    python examples/hyper_cleaning.py --data-dir DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import diffopt
from diffopt.tasks import data_folder

Params = dict[str, Tensor]
STEPS, BATCH = 60, 500


def load(data_dir: Path | None, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Images as rows in [0, 1] and labels, for training, validation and test."""
    file = data_folder(data_dir) / "mnist.npz"
    if file.exists():
        arrays, sizes = np.load(file, allow_pickle=False), (5000, 1000)
        images, labels = (torch.from_numpy(arrays[name]) for name in ("x_train", "y_train"))
        test = torch.from_numpy(arrays["x_test"]).flatten(1) / 255, torch.from_numpy(arrays["y_test"]).long()
    else:
        print(f"{file} is not there: scikit-learn's digits instead of MNIST")
        images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        images, sizes = images.float() * (255 / 16), (1000, 200)
        test = images[1200:] / 255, labels[1200:]
        images, labels = images[:1200], labels[:1200]
    order = torch.randperm(len(images), generator=generator)[: sum(sizes)]
    parts = zip((images[order].flatten(1) / 255).split(sizes), labels[order].long().split(sizes), strict=True)
    return [*parts, test]


def logits(w: Params, x: Tensor) -> Tensor:
    return x @ w["weight"] + w["bias"]


def loss(w: Params, score: Tensor, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    return (score[rows].sigmoid() * F.cross_entropy(logits(w, x[rows]), y[rows], reduction="none")).mean()


def fit(score: Tensor, x: Tensor, y: Tensor, batches: Tensor) -> Params:
    """Train from zero on the examples weighted by ``sigmoid(score)``, one row of ``batches`` per step."""
    start, sgd = {"weight": torch.zeros(x.shape[1], 10), "bias": torch.zeros(10)}, diffopt.SGD(lr=0.1, momentum=0.9)
    return diffopt.solve(loss, start, score, x, y, optimizer=sgd, steps=len(batches), batches=batches).params


def main(quick: bool = False, out: Path = Path(), data_dir: Path | None = None) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    (x, true), (x_val, y_val), (x_test, y_test) = load(data_dir, generator)
    redrawn = torch.rand(len(x), generator=generator) < 0.5
    y = torch.where(redrawn, torch.randint(10, (len(x),), generator=generator), true)

    def test_accuracy(score: Tensor | None, x: Tensor, y: Tensor) -> float:
        score = torch.full((len(x),), torch.inf) if score is None else score.detach()
        with torch.no_grad():
            w = fit(score, x, y, torch.arange(len(x)).expand(150, -1))
        return float((logits(w, x_test).argmax(1) == y_test).float().mean())

    score = torch.zeros(len(x), requires_grad=True)
    outer = torch.optim.Adam([score], lr=0.3)
    for iteration in range(10 if quick else 60):
        batches = torch.stack([torch.randperm(len(x), generator=generator)[:BATCH] for _ in range(STEPS)])
        w = fit(score, x, y, batches)
        outer_loss = F.cross_entropy(logits(w, x_val), y_val)
        outer.zero_grad()
        outer_loss.backward()
        outer.step()
        if iteration % 10 == 0:
            print(f"iteration {iteration:3}: validation loss {outer_loss.item():.3f}")

    kept = y == true
    accuracy = {
        "noisy": test_accuracy(None, x, y),
        "ours": test_accuracy(score, x, y),
        "oracle": test_accuracy(None, x[kept], y[kept]),
        "validation": test_accuracy(None, x_val, y_val),
    }
    names = ("all labels as they are", "learned weights", "true labels only", "validation images only")
    for name, value in zip(names, accuracy.values(), strict=True):
        print(f"{name:24} test accuracy {100 * value:5.1f} %")
    weight = score.detach().sigmoid()
    accuracy["found"] = float(((weight > 0.5) == kept).float().mean())
    print(f"labels told right from wrong: {100 * accuracy['found']:.1f} %")

    figure, axes = plt.subplot_mosaic("hhh01234\nhhh56789", figsize=(10, 3.2), layout="constrained")
    axes["h"].hist(
        [weight[kept].numpy(), weight[~kept].numpy()], bins=20, stacked=True, label=("label true", "label false")
    )
    axes["h"].set(xlabel="learned weight", ylabel="examples", title="Weights of the training examples")
    axes["h"].legend()
    for place, row in enumerate(weight.argsort()[:10]):
        axes[str(place)].imshow(x[row].reshape(int(x.shape[1] ** 0.5), -1).numpy(), cmap="gray")
        axes[str(place)].set(xticks=[], yticks=[], title=f"labelled {y[row]}")
    figure.suptitle("The ten images of least weight are on the right")
    figure.savefig(out / "hyper_cleaning.png", dpi=120)
    plt.close(figure)
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Data hyper-cleaning.")
    parser.add_argument("--quick", action="store_true", help="a few seconds only")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    parser.add_argument("--data-dir", type=Path, help="folder of mnist.npz (default: DIFFOPT_DATA)")
    main(**vars(parser.parse_args()))
