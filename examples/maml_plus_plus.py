"""MAML++ on sine waves: Adam inside, a loss at every step, and batch-norm statistics as a part of the inner state.

    step t:    (w, buffers, statistics) <- Adam with a learned step size a_t on the support set; statistics <- averages
    outer:     min over w_1, statistics_1, a of  sum_t  weight_t * query loss(w_t, statistics_t)

The layers normalise by running statistics, so that a single query can be predicted, too. No gradient moves them: the
loss returns what they become beside its value (``has_aux``), and each solve, of *one* step, goes on from the state of
the one before and takes the statistics of its ``aux``. The weights of the steps move to the last one during training.

What to see: the chain of one-step solves is a loop written by hand, to round-off; and a loss at every step adapts
better after any number of steps than the loss of the last step alone.

Measured (30 November 2026, 2 cores, CPU; 34 s of processor time on one thread): hypergradients 1e-15 apart in double
precision; error on new waves after five steps 0.812 by the last step's loss and 0.670 by that of every step, after
one step 2.27 and 1.85.

    python examples/maml_plus_plus.py

Reference: Antoniou et al. (2019), "How to train your MAML".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import diffopt

Params = dict[str, Tensor]
STEPS, WIDTH, EPS = 5, 40, 1e-2


def meta_parameters() -> Params:
    """The weights to start from, the first statistics, and the logarithm of each step's size."""
    torch.manual_seed(0)
    sizes = {"in": (1, WIDTH), "middle": (WIDTH, WIDTH), "out": (WIDTH, 1)}
    weights = {name: torch.randn(size) / size[0] ** 0.5 for name, size in sizes.items()}
    weights |= {"bias": torch.randn(WIDTH), "scale": torch.ones(2, WIDTH), "shift": torch.zeros(2, WIDTH)}
    rest = {"mean": torch.zeros(2, WIDTH), "log_var": torch.zeros(2, WIDTH), "log_rate": torch.full((STEPS,), -3.5)}
    return {name: value.requires_grad_() for name, value in {**weights, **rest}.items()}


def predict(w: Params, statistics: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction by these statistics (mean and variance of each layer), and what the batch makes of them."""
    hidden, left = x @ w["in"] + w["bias"], []
    for layer, (mean, var) in enumerate(statistics.unbind(1)):
        left.append(statistics[:, layer].lerp(torch.stack([hidden.mean(0), hidden.var(0)]), 0.1))
        hidden = torch.tanh((hidden - mean) / (var + 0.01).sqrt() * w["scale"][layer] + w["shift"][layer])
        hidden = hidden @ w["middle"] if layer == 0 else hidden
    return hidden @ w["out"], torch.stack(left, 1)


def loss(w: Params, statistics: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The inner loss, and beside it the statistics for the next step."""
    prediction, left = predict(w, statistics, x)
    return (prediction - y).square().mean(), left


def start(meta: Params) -> tuple[Params, Tensor]:
    weights = {name: value for name, value in meta.items() if name not in ("mean", "log_var", "log_rate")}
    return weights, torch.stack([meta["mean"], meta["log_var"].exp()])


def query_losses(meta: Params, x: Tensor, y: Tensor, x_query: Tensor, y_query: Tensor) -> Tensor:
    state, statistics = start(meta)
    adam, losses = diffopt.Adam(diffopt.Schedule(meta["log_rate"].exp()), eps=EPS), []
    for _ in range(STEPS):
        found = diffopt.solve(loss, state, statistics, x, y, optimizer=adam, steps=1, has_aux=True)
        state, statistics = found.state, found.aux[0]
        losses.append((predict(state.params, statistics, x_query)[0] - y_query).square().mean())
    return torch.stack(losses)


def by_hand(meta: Params, x: Tensor, y: Tensor, x_query: Tensor, y_query: Tensor) -> Tensor:
    """The same as a loop of plain autograd, Adam written out."""
    (w, statistics), losses, rates = start(meta), [], meta["log_rate"].exp()
    mean, square = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in range(2))
    for t in range(1, STEPS + 1):
        value, left = loss(w, statistics, x, y)
        grads = dict(zip(w, torch.autograd.grad(value, list(w.values()), create_graph=True), strict=True))
        mean = {name: 0.9 * mean[name] + 0.1 * g for name, g in grads.items()}
        square = {name: 0.999 * square[name] + 0.001 * g**2 for name, g in grads.items()}
        root = {name: (s / (1 - 0.999**t)).sqrt() + EPS for name, s in square.items()}
        w = {name: p - rates[t - 1] * mean[name] / (1 - 0.9**t) / root[name] for name, p in w.items()}
        statistics = left.detach()
        losses.append((predict(w, statistics, x_query)[0] - y_query).square().mean())
    return torch.stack(losses)


def waves(tasks: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    x = 10 * torch.rand(tasks, 40, 1, generator=generator) - 5
    size, phase = torch.rand(2, tasks, 1, 1, generator=generator)
    y = (0.1 + 4.9 * size) * torch.sin(x + torch.pi * phase)
    return x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]


def meta_train(iterations: int, every_step: bool) -> Params:
    meta, generator = meta_parameters(), torch.Generator().manual_seed(1)
    outer = torch.optim.Adam(meta.values(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, iterations)
    for i in range(iterations):
        last = min(1, 2 * i / iterations) if every_step else 1  # from all steps alike to the last alone
        weights = (1 - last) / STEPS + last * torch.eye(STEPS)[-1]
        losses = torch.func.vmap(query_losses, (None, 0, 0, 0, 0))(meta, *waves(25, generator))
        outer.zero_grad()
        (losses @ weights).mean().backward()
        outer.step()
        schedule.step()
    return meta


def exactness() -> float:
    """How far the hypergradient is from the loop written by hand: one task, in double precision."""
    meta = {name: value.detach().double().requires_grad_() for name, value in meta_parameters().items()}
    task = [part[0].double() for part in waves(1, torch.Generator().manual_seed(2))]
    losses = query_losses(meta, *task).sum(), by_hand(meta, *task).sum()
    ours, theirs = (torch.autograd.grad(value, list(meta.values())) for value in losses)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def main(quick: bool = False, out: Path = Path()) -> dict[str, float]:
    results = {"exactness": exactness()}
    print(f"one-step solves that go on, against a loop by hand: {results['exactness']:.0e}")
    tasks = waves(50 if quick else 500, torch.Generator().manual_seed(3))
    figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for name, every_step in (("last step", False), ("every step", True)):
        meta = meta_train(20 if quick else 300, every_step)
        curve = torch.func.vmap(query_losses, (None, 0, 0, 0, 0))(meta, *tasks).mean(0).detach()
        results |= {f"{name}, {t + 1}": float(value) for t, value in enumerate(curve)}
        print(f"loss of {name}: error on new waves", " ".join(f"{value:.3f}" for value in curve))
        ax.semilogy(range(1, STEPS + 1), curve, marker="o", label=f"loss of {name}")
    ax.set(xlabel="inner steps of Adam", ylabel="squared error on new waves", xticks=range(1, STEPS + 1))
    ax.legend()
    figure.savefig(out / "maml_plus_plus.png", dpi=120)
    plt.close(figure)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="MAML++ on sine waves.")
    parser.add_argument("--quick", action="store_true", help="a few seconds only")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    main(**vars(parser.parse_args()))
