"""An ordinary training loop with a hypergradient inside: nn.Module, DataLoader, scheduler, and learned class shifts.

    every step:       w <- a step of torch.optim.SGD on  log-loss(logits(x; w) + h, y)
    every few steps:  h <- a step of torch.optim.Adam along  d/dh log-loss(logits(x_val; w_K(h)), y_val)

The training digits are few and unbalanced: 80 zeros, 57 ones, ..., 4 nines. A shift ``h`` per class enters the training
loss, so that rare classes have to win by a margin. ``look_ahead`` takes K steps of SGD from where the module is, on the
loader's last K batches; ``functional_call`` runs the module on parameters that are passed in. The module, the loader,
the optimizers and the scheduler are torch's and know nothing of it.

What to see: the five rarer classes get a shift below zero, and more of the two rarest are recognised.

Measured (21 November 2026, 2 cores, CPU; 7 s of processor time on one thread): 80.2 % of the test images recognised by
the plain loop and 82.7 % by the tuned one; of the eights and nines 39.7 % and 50.5 %.

    python examples/training_loop.py
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset, default_collate

import diffopt

LOOKAHEAD, EVERY = 5, 4
Data = tuple[Tensor, Tensor]


def data() -> tuple[TensorDataset, Data, Data]:
    """A balanced validation and test set, and a training set with fewer of each digit than of the one before."""
    images, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, first = images.float() / 16, digits[:900]
    rows = torch.cat([torch.nonzero(first == digit)[: round(80 / 2 ** (digit / 2)), 0] for digit in range(10)])
    validation, test = (slice(900, 1100), slice(1100, None))
    return (
        TensorDataset(images[rows], digits[rows]),
        (images[validation], digits[validation]),
        (images[test], digits[test]),
    )


def look_ahead(
    module: nn.Module, shift: Tensor, recent: Iterable[Data], validation: Data, lr: float | Tensor
) -> Tensor:
    """The validation loss some steps of SGD ahead of the module, differentiable in ``shift``."""

    def loss(params: dict[str, Tensor], shift: Tensor, batch: Data) -> Tensor:
        return F.cross_entropy(functional_call(module, params, batch[0]) + shift, batch[1])

    params = {name: value.detach() for name, value in module.named_parameters()}
    batches, sgd = default_collate(list(recent)), diffopt.SGD(lr=lr, momentum=0.9)  # stacked: the first axis is steps
    ahead = diffopt.solve(loss, params, shift, optimizer=sgd, steps=len(batches[0]), batches=batches).params
    return F.cross_entropy(functional_call(module, ahead, validation[0]), validation[1])


def train(epochs: int, tuned: bool) -> tuple[Tensor, Tensor]:
    """The share of each digit's test images that is recognised, and the shifts."""
    torch.manual_seed(0)
    training, validation, (x_test, y_test) = data()
    loader = DataLoader(training, batch_size=32, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    shift = torch.zeros(10, requires_grad=True)
    outer, recent = torch.optim.Adam([shift], lr=0.05), deque[Data](maxlen=LOOKAHEAD)
    for _ in range(epochs):
        for step, (x, y) in enumerate(loader):
            recent.append((x, y))
            if tuned and step % EVERY == 0:
                outer.zero_grad()
                look_ahead(model, shift, recent, validation, scheduler.get_last_lr()[0]).backward()
                outer.step()
            optimizer.zero_grad()
            F.cross_entropy(model(x) + shift.detach(), y).backward()
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        right = model(x_test).argmax(1) == y_test
    return torch.stack([right[y_test == digit].float().mean() for digit in range(10)]), shift.detach()


def main(quick: bool = False, out: Path = Path()) -> dict[str, float]:
    figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    results = {}
    for name, tuned, side in (("plain", False, -0.2), ("tuned", True, 0.2)):
        recognised, shift = train(5 if quick else 60, tuned)
        results[name], results["rare shift"] = float(recognised.mean()), float(shift[5:].mean() - shift[:5].mean())
        mean, rare = 100 * recognised.mean(), 100 * recognised[-2:].mean()
        print(f"{name} loop: {mean:.1f} % of the test images recognised, {rare:.1f} % of the eights and nines")
        ax.bar([digit + side for digit in range(10)], recognised.tolist(), 0.4, label=f"{name} loop, mean {mean:.1f} %")
    print("learned shifts:", " ".join(f"{value:+.2f}" for value in shift.tolist()))
    ax.set(xlabel="digit (80 training images of 0, 4 of 9)", ylabel="share of test images recognised", xticks=range(10))
    ax.set(ylim=(0, 1.15), yticks=[0, 0.25, 0.5, 0.75, 1])
    ax.legend(loc="upper center", ncols=2)
    figure.savefig(out / "training_loop.png", dpi=120)
    plt.close(figure)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A training loop with a hypergradient inside.")
    parser.add_argument("--quick", action="store_true", help="a few seconds only")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    main(**vars(parser.parse_args()))
