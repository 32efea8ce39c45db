"""Ridge regression with one penalty per feature, whose implicit hypergradient is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.tasks.errors import ProblemError
from diffopt.tensors.arguments import check_floating, check_generator, check_integer, check_number


@final
@dataclass(frozen=True, eq=False)
class Ridge:
    """Fit weights under per-feature penalties, judge them on validation data.

    Inner loss ``1/n ||X w - y||^2 + sum_j exp(p_j) w_j^2`` (a mean, and no factor 1/2), outer loss
    ``1/m ||X_v w - y_v||^2``. The meta-parameter is ``log_penalty = p``, ``[features]``; for one penalty
    common to all features pass ``p.expand(features)`` and let autograd, or a sum, collect the hypergradient.

    Attributes:
        inputs: ``X``, ``[samples, features]``, floating.
        targets: ``y``, ``[samples]``.
        validation_inputs: ``X_v``, ``[validation samples, features]``.
        validation_targets: ``y_v``, ``[validation samples]``.

    Raises:
        ProblemError: the shapes do not fit together.
    """

    inputs: Tensor
    targets: Tensor
    validation_inputs: Tensor
    validation_targets: Tensor

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit together."""
        check_floating(
            ProblemError,
            inputs=self.inputs,
            targets=self.targets,
            validation_inputs=self.validation_inputs,
            validation_targets=self.validation_targets,
        )
        for inputs, targets in (
            (self.inputs, self.targets),
            (self.validation_inputs, self.validation_targets),
        ):
            if inputs.ndim != 2 or targets.shape != inputs.shape[:1] or inputs.shape[1] != self.inputs.shape[-1]:
                shapes = f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
                raise ProblemError(
                    f"inputs and targets have shapes {shapes}",
                    "[samples, features] and [samples], with as many features in training as in validation",
                )

    @classmethod
    def random(
        cls,
        samples: int,
        features: int,
        *,
        generator: torch.Generator,
        validation_samples: int | None = None,
        noise: float = 0.5,
        dtype: torch.dtype = torch.float64,
    ) -> Ridge:
        """Standard normal inputs; the second half of the true weights is zero, so that penalties matter.

        Args:
            samples: number of training rows.
            features: number of columns.
            generator: source of all randomness; the tensors live on its device.
            validation_samples: number of validation rows; as many as ``samples`` if not given.
            noise: standard deviation of the noise on the targets.
            dtype: of the tensors.

        Raises:
            ProblemError: a size is below 1.
        """
        rows = samples if validation_samples is None else validation_samples
        sizes = {"samples": samples, "features": features, "validation_samples": rows}
        samples, features, rows = (check_integer(name, size, 1, kind=ProblemError) for name, size in sizes.items())
        check_generator("generator", generator, ProblemError)
        noise = check_number("noise", noise, 0, kind=ProblemError)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype, device=generator.device)

        weights = normal(features)
        weights[(features + 1) // 2 :] = 0
        inputs, validation_inputs = normal(samples, features), normal(rows, features)
        return cls(
            inputs,
            inputs @ weights + noise * normal(samples),
            validation_inputs,
            validation_inputs @ weights + noise * normal(rows),
        )

    def loss(self, params: Tensor, log_penalty: Tensor) -> Tensor:
        """The inner loss of the weights ``params`` under ``log_penalty``, both ``[features]``."""
        self._check_penalty(log_penalty)
        error = (self.inputs @ params - self.targets).square().mean()
        penalty = (log_penalty.exp() * params.square()).sum()
        return error + penalty

    def outer_loss(self, params: Tensor) -> Tensor:
        """The mean squared validation error of the weights ``params``, ``[features]``."""
        return (self.validation_inputs @ params - self.validation_targets).square().mean()

    def solution(self, log_penalty: Tensor) -> Tensor:
        """The minimiser ``w`` of the inner loss, ``[features]``, from ``(X'X/n + diag(exp p)) w = X'y/n``."""
        moment = self.inputs.mT @ self.targets / len(self.targets)
        weights: Tensor = torch.linalg.solve(self._matrix(log_penalty), moment)
        return weights

    def hypergradient(self, log_penalty: Tensor) -> Tensor:
        """The derivative of the outer loss at the inner solution by ``log_penalty``, without autograd.

        With ``K = X'X/n + diag(exp p)`` (half the inner Hessian), differentiating ``K w = X'y/n`` gives
        ``dw/dp_j = -exp(p_j) w_j K^{-1} e_j``, hence::

            dF/dp = -exp(p) * w * K^{-1} (2/m) X_v'(X_v w - y_v)

        Exact at convergence only: after finitely many inner steps the hypergradient of the unrolled loop
        differs.
        Cost: two dense solves, ``O(features^3)``.

        Args:
            log_penalty: ``p``, ``[features]``.

        Returns:
            The hypergradient, ``[features]``.
        """
        with torch.no_grad():
            weights = self.solution(log_penalty)
            residual = self.validation_inputs @ weights - self.validation_targets
            outer_gradient = 2 / len(residual) * self.validation_inputs.mT @ residual
            adjoint: Tensor = torch.linalg.solve(self._matrix(log_penalty), outer_gradient)
            return -log_penalty.exp() * weights * adjoint

    def _matrix(self, log_penalty: Tensor) -> Tensor:
        """``X'X/n + diag(exp p)``, half the Hessian of the inner loss."""
        self._check_penalty(log_penalty)
        return self.inputs.mT @ self.inputs / len(self.targets) + torch.diag(log_penalty.exp())

    def _check_penalty(self, log_penalty: Tensor) -> None:
        features = self.inputs.shape[1]
        if log_penalty.shape != (features,):
            shape = tuple(log_penalty.shape)
            raise ProblemError(f"log_penalty has shape {shape}", f"one entry per feature, ({features},)")
