"""Muon, with the formula of ``torch.optim.Muon`` in the dtype of the parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError, ShapeError
from diffopt.optimizers.base import EACH, Buffers, Hyperparameter, Optimizer
from diffopt.optimizers.checks import FINITE, POSITIVE, check_eps, check_one_number, check_range, is_zero
from diffopt.optimizers.norm import one_number
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves, root
from diffopt.tensors.tree import describe


@final
@dataclass(frozen=True)
class Muon(Optimizer):
    r"""Momentum made (nearly) orthogonal by Newton-Schulz steps, for matrices, as ``torch.optim.Muon``.

    .. math:: b^+ = \mu b + (1-\mu) g,\quad d = (1-\mu) g + \mu b^+ \text{ (Nesterov), or } b^+,\quad
              \phi^+ = (1 - \eta\omega)\,\phi - \eta\, r\, \mathrm{NS}(d)

    ``NS`` starts from ``X = d / max(|d|_F, eps)``, transposed if it has more rows than columns, and repeats
    ``ns_steps`` times ``X = a X + b (X X') X + c (X X')^2 X``. The factor ``r`` is ``sqrt(max(1, rows / columns))``, or
    ``0.2 sqrt(max(rows, columns))`` with ``adjust_lr_fn="match_rms_adamw"``.

    It calculates in the dtype of the parameters, where ``torch.optim.Muon`` rounds to bfloat16 within ``NS``: that
    leaves three digits of a number, and no useful derivative. At a gradient of zero the norm's derivative is zero.

    Every parameter is a matrix; for others use :class:`diffopt.Groups`:
    ``Groups(lambda path: "other" if "bias" in path else "matrices", {"matrices": Muon(0.02), "other": AdamW(1e-3)})``.

    Cost: an update is ``3 ns_steps`` matrix products for each parameter; its pullback twice that. Not elementwise.

    Args:
        lr: step size ``eta``.
        weight_decay: ``omega``, decoupled.
        momentum: ``mu``.
        nesterov: look ahead by the momentum.
        ns_coefficients: ``(a, b, c)``, each one number.
        eps: the least norm that is divided by, one number.
        ns_steps: how many Newton-Schulz steps, below 100.
        adjust_lr_fn: ``None`` or ``"original"``, or ``"match_rms_adamw"``.

    Raises:
        HyperparameterError: an option that ``torch.optim.Muon`` refuses.
        ShapeError: by ``solve``: a parameter is no matrix.

    Reference: Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks"; Liu et al. (2025), "Muon
    is Scalable for LLM Training", for ``"match_rms_adamw"``.

    Example:
        With coefficients (1.5, -0.5, 0) it is the classical Newton-Schulz iteration, whose limit is orthogonal:

        >>> import torch, diffopt
        >>> optimizer = diffopt.Muon(1.0, weight_decay=0.0, ns_coefficients=(1.5, -0.5, 0.0), ns_steps=20)
        >>> slope = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> solution = diffopt.solve(lambda w, a: (a * w).sum(), torch.zeros(2, 2), slope, optimizer=optimizer, steps=1)
        >>> (solution.params + torch.diag(torch.tensor([1.0, -1.0]))).abs().max().item() < 1e-6
        True
    """

    lr: Hyperparameter = 1e-3
    weight_decay: Hyperparameter = 0.1
    momentum: Hyperparameter = 0.95
    nesterov: bool = True
    ns_coefficients: Any = field(default=(3.4445, -4.7750, 2.0315), metadata=EACH)
    eps: Hyperparameter = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str | None = None

    def __post_init__(self) -> None:
        """Refuse options that ``torch.optim.Muon`` refuses."""
        options = Options(self)
        options.flag("nesterov")
        options.integer("ns_steps", 0, high=100, note=" and < 100")
        check_range(self, lr=POSITIVE, weight_decay=POSITIVE, momentum=POSITIVE, eps=POSITIVE, ns_coefficients=FINITE)
        check_one_number(self, "eps", self.eps)
        if not isinstance(self.ns_coefficients, tuple | list) or len(self.ns_coefficients) != 3:
            raise HyperparameterError(f"Muon: ns_coefficients is {describe(self.ns_coefficients)}", "three numbers")
        for value in self.ns_coefficients:
            check_one_number(self, "ns_coefficients", value)
        if self.adjust_lr_fn is not None:
            options.choice("adjust_lr_fn", "original", "match_rms_adamw")

    def init(self, params: Leaves) -> Buffers:
        """A zero momentum."""
        check_eps(self, params)
        for leaf in params:
            if leaf.ndim != 2:
                raise ShapeError(
                    f"Muon: a parameter has shape {tuple(leaf.shape)}",
                    "matrices only",
                    'give the others an optimizer of their own: Groups(function_of_path, {"matrices": Muon(), ...})',
                )
        return {"momentum": params.virtual_zeros()}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        average = self.momentum * buffers["momentum"] + (1 - self.momentum) * grads
        direction = (1 - self.momentum) * grads + self.momentum * average if self.nesterov else average
        move = direction.map(self._orthogonal)
        shrunk = params if is_zero(self.weight_decay) else params.minus(self.lr * self.weight_decay, params)
        return shrunk.minus(self.lr, move), {"momentum": average}

    def _orthogonal(self, direction: Tensor) -> Tensor:
        """``r NS(d)`` of one matrix."""
        rows, columns = direction.shape
        x = direction.mT if rows > columns else direction
        size, least = root(x.square().sum()), one_number(self.eps, x)
        x = x / torch.where(size < least, torch.as_tensor(least, dtype=x.dtype, device=x.device), size)
        a, b, c = (one_number(value, x) for value in self.ns_coefficients)
        for _ in range(self.ns_steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return self._factor(rows, columns) * (x.mT if rows > columns else x)

    def _factor(self, rows: int, columns: int) -> float:
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))
