"""An optimizer of one's own, in ten lines, with everything it is tuned by learned by hypergradient.

    s_{t+1} = U(s_t, g_t; eta),    eta = (lr, beta1, beta2, sharpness) by dF(w_T)/d eta

The rule is a smooth Lion: the sign of an averaged gradient, with tanh for the sign. Only the update is written; the
adjoint, checkpoints, vmap and every estimator come with it. ``check_optimizer`` holds it to the contract, a plain loop
under plain autograd to its hypergradients. Then a small network is trained on scikit-learn's digits for 30 steps, again
and again, each time moving the optimizer's hyperparameters down the gradient of the validation loss.

What to see: the hypergradients agree to round-off, and with all four learned the 30 steps get further than with the
step size alone.

Measured (21 November 2026, 2 cores, CPU; 11 s of processor time on one thread): hypergradient equal to the plain
loop's (difference 0.0e+00); validation loss after 30 steps 1.126 with the first guess, 0.255 with the step size
learned, 0.206 with all four.

    python examples/custom_optimizer.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import diffopt
from diffopt.optimizers.base import Buffers, Hyperparameter, Leaves
from diffopt.testing import check_optimizer


@dataclass(frozen=True)
class SmoothLion(diffopt.Optimizer):
    lr: Hyperparameter
    beta1: Hyperparameter
    beta2: Hyperparameter
    sharpness: Hyperparameter
    elementwise = True  # every coordinate by itself: batches of tasks are then updated as one

    def init(self, params: Leaves) -> Buffers:
        return {"mean": params.zeros()}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        mean = buffers["mean"]
        direction = self.sharpness * (self.beta1 * mean + (1 - self.beta1) * grads)
        return params - self.lr * direction.map(torch.tanh), {"mean": self.beta2 * mean + (1 - self.beta2) * grads}


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images = images / 16
    train, validation = (images[:600], labels[:600]), (images[600:1200], labels[600:1200])
    start = {"hidden": 0.2 * torch.randn(64, 32, dtype=torch.float64), "out": torch.zeros(32, 10, dtype=torch.float64)}

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(torch.tanh(data[0] @ params["hidden"]) @ params["out"], data[1])

    def hyperparameters(raw: Tensor) -> tuple[Tensor, ...]:
        return raw[0].exp(), raw[1].sigmoid(), raw[2].sigmoid(), raw[3].exp()  # each stays in its range

    def by_diffopt(raw: Tensor, steps: int) -> Tensor:
        optimizer = SmoothLion(*hyperparameters(raw))
        return loss(diffopt.solve(loss, start, train, optimizer=optimizer, steps=steps).params, validation)

    def by_plain_loop(raw: Tensor, steps: int) -> Tensor:
        lr, beta1, beta2, sharpness = hyperparameters(raw)
        params = {name: value.clone().requires_grad_() for name, value in start.items()}
        means = {name: torch.zeros_like(value) for name, value in start.items()}
        for _ in range(steps):
            grads = torch.autograd.grad(loss(params, train), list(params.values()), create_graph=True)
            for name, grad in zip(start, grads, strict=True):
                params[name] = params[name] - lr * torch.tanh(sharpness * (beta1 * means[name] + (1 - beta1) * grad))
                means[name] = beta2 * means[name] + (1 - beta2) * grad
        return loss(params, validation)

    guess = torch.tensor([0.01, 0.9, 0.95, 100.0], dtype=torch.float64)
    guess = torch.cat([guess[:1].log(), guess[1:3].logit(), guess[3:].log()])
    raw = guess.clone().requires_grad_()
    ours, plain = (torch.autograd.grad(outer_loss(raw, 5), raw)[0] for outer_loss in (by_diffopt, by_plain_loop))
    results = {"error": float((ours - plain).norm() / plain.norm())}
    print(f"all {len(check_optimizer(SmoothLion(0.01, 0.9, 0.95, 10.0)).findings)} claims of SmoothLion hold")
    print(f"relative difference to a plain unrolled loop, 5 steps: {results['error']:.1e}")

    print("learned    loss after 30 steps        lr  beta1  beta2  sharpness")
    for name, learned in (("nothing", [0, 0, 0, 0]), ("lr", [1, 0, 0, 0]), ("all four", [1, 1, 1, 1])):
        raw = guess.clone().requires_grad_()
        outer = torch.optim.Adam([raw], lr=0.1)
        for _ in range((5 if quick else 40) if any(learned) else 0):
            (raw.grad,) = torch.autograd.grad(by_diffopt(raw, 30), raw)
            raw.grad *= torch.tensor(learned)
            outer.step()
        results[name] = by_diffopt(raw, 30).item()
        values = (value.item() for value in hyperparameters(raw))
        print("{:10} {:19.3f} {:9.4f} {:6.2f} {:6.2f} {:10.0f}".format(name, results[name], *values))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An optimizer of one's own, learned.")
    parser.add_argument("--quick", action="store_true", help="a few seconds only")
    main(**vars(parser.parse_args()))
