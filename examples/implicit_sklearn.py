"""Implicit differentiation of a scikit-learn solution: a scale for each feature, tuned by gradient.

    min over s   F(w*(s), s),   w*(s) = argmin_w L(w, s),   L = mean_i log-loss(y_i, (x_i * s)' w) + |w|^2 / (2 C n)
    dF/ds = direct term - (d^2 L / ds dw) (d^2 L / dw^2)^{-1} dF/dw

scikit-learn finds w*, as it always does; ``diffopt.implicit`` is told what was minimised and attaches the derivative,
by conjugate gradients. It refuses a point that is not stationary, such as one of another loss. The task is to tell odd
from even digits by 300 images; 64 scales (one per pixel) are learned on 750 others and judged on the remaining 747.

What to see: the hypergradient agrees with finite differences of scikit-learn's own solutions; 64 scales go well
beyond the best C of a grid, and no grid could search them.

Measured (21 November 2026, 2 cores, CPU; 7 s of processor time on one thread): relative error against differences
9e-08; test loss 0.2634 with the best C (1) and no scales, 0.2312 with scales.

    python examples/implicit_sklearn.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import diffopt
from diffopt.linear_solve import ConjugateGradient

Data = tuple[Tensor, Tensor]
Params = dict[str, Tensor]


def outer_loss(params: Params, log_scale: Tensor, data: Data) -> Tensor:
    x, y = data
    return F.binary_cross_entropy_with_logits((x * log_scale.exp()) @ params["w"] + params["b"], y)


def inner_loss(params: Params, log_scale: Tensor, data: Data, strength: float) -> Tensor:
    """What scikit-learn minimises, divided by ``C n``; its ``C`` is ``strength``."""
    penalty = params["w"].square().sum() / (2 * strength * len(data[1]))
    return outer_loss(params, log_scale, data) + penalty


def fit(log_scale: Tensor, data: Data, strength: float = 1.0) -> Params:
    """scikit-learn's solution, differentiable in ``log_scale``."""
    x, y = (data[0] * log_scale.detach().exp()).numpy(), data[1].numpy()
    model = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-9, max_iter=1000).fit(x, y)
    found = {"w": torch.from_numpy(model.coef_[0]), "b": torch.tensor(model.intercept_[0])}
    return diffopt.implicit(inner_loss, found, log_scale, data, strength, solver=ConjugateGradient(rtol=1e-9))


def main(quick: bool = False, out: Path = Path()) -> dict[str, float]:
    images, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, odd = images[order] / 16, (digits[order] % 2).double()
    train, validation, test = zip(images.split([300, 750, 747]), odd.split([300, 750, 747]), strict=True)
    log_scale = torch.zeros(64, dtype=torch.float64, requires_grad=True)

    def judged(log_scale: Tensor, data: Data, strength: float = 1.0) -> Tensor:
        return outer_loss(fit(log_scale, train, strength), log_scale, data)

    direction = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(judged(log_scale, validation), log_scale)
    with torch.no_grad():
        there, back = (judged(log_scale + step * direction, validation) for step in (1e-4, -1e-4))
        slope, grid = float((there - back) / 2e-4), [10**power for power in (-2.0, -1.0, 0.0, 1.0, 2.0)]
        best = min(grid, key=lambda strength: float(judged(log_scale, validation, strength)))
        before = judged(log_scale, test, best).item()
    error = abs(float(gradient @ direction) - slope) / abs(slope)
    print(f"slope along a random direction {slope:.6f}, relative error of the hypergradient {error:.0e}")

    outer, curves = torch.optim.SGD([log_scale], lr=2, momentum=0.9), []
    for _ in range(5 if quick else 50):
        loss = judged(log_scale, validation)
        outer.zero_grad()
        loss.backward()
        with torch.no_grad():
            curves.append((loss.item(), judged(log_scale, test).item()))
        outer.step()
    print(
        f"test loss: {before:.4f} with no scales and the best C of the grid ({best:g}), {curves[-1][1]:.4f} with scales"
    )

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(curves, label=("validation (minimised)", "test"))
    left.axhline(before, color="black", linestyle=":", label="test, best C, no scales")
    left.set(xlabel="outer step", ylabel="loss of scikit-learn's solution", title="64 scales learned by gradient")
    left.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    picture = right.imshow(log_scale.detach().reshape(8, 8).numpy(), cmap="coolwarm", vmin=-3, vmax=3)
    right.set(xticks=[], yticks=[], title="logarithm of each pixel's scale")
    figure.colorbar(picture)
    figure.savefig(out / "implicit_sklearn.png", dpi=120)
    plt.close(figure)
    return {"error": error, "before": before, "first": curves[0][0], "last": curves[-1][0], "after": curves[-1][1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Implicit differentiation of a scikit-learn solution.")
    parser.add_argument("--quick", action="store_true", help="a few seconds only")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    main(**vars(parser.parse_args()))
