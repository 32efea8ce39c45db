"""A quadratic bilevel problem whose hypergradients are known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffopt.tasks.errors import ProblemError
from diffopt.tensors.arguments import check_floating, check_generator, check_integer


class QuadraticHypergradient(NamedTuple):
    """Derivatives of the outer loss after the last inner step.

    Attributes:
        initial: with respect to the initial parameters, ``[dimension]``.
        linear: with respect to the linear term of the inner loss, ``[dimension]``.
        lr: with respect to the learning rate, a scalar tensor.
    """

    initial: Tensor
    linear: Tensor
    lr: Tensor


@final
@dataclass(frozen=True, eq=False)
class Quadratic:
    """Inner loss ``1/2 phi' A phi - b' phi``, outer loss ``1/2 ||phi - target||^2``.

    Gradient descent from ``phi_1`` with learning rate ``lr`` is linear, ``phi_{t+1} = M phi_t + lr b`` with
    ``M = I - lr A``, so every hypergradient after ``T`` steps is a polynomial in ``A``; see
    :meth:`hypergradient`.

    Attributes:
        hessian: ``A``, symmetric, ``[dimension, dimension]``, floating.
        target: where the outer loss is zero, ``[dimension]``, same dtype.

    Raises:
        ProblemError: the hessian is not square, not symmetric, or does not match the target.
    """

    hessian: Tensor
    target: Tensor

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit and a hessian that is not symmetric."""
        check_floating(ProblemError, hessian=self.hessian, target=self.target)
        dimension = self.target.numel()
        if self.target.shape != (dimension,) or self.hessian.shape != (dimension, dimension):
            shapes = f"{tuple(self.hessian.shape)} and {tuple(self.target.shape)}"
            raise ProblemError(f"hessian and target have shapes {shapes}", "[d, d] and [d] with one d")
        if not torch.allclose(self.hessian, self.hessian.mT):
            raise ProblemError(
                "the hessian is not symmetric", "A = A'", "pass (A + A') / 2, which gives the same inner loss"
            )

    @classmethod
    def random(
        cls, dimension: int, *, definite: bool, generator: torch.Generator, dtype: torch.dtype = torch.float64
    ) -> Quadratic:
        """A random problem: eigenvectors uniform on the orthogonal group, target standard normal.

        Args:
            dimension: number of parameters; at least 1, or 2 if not definite.
            definite: eigenvalues are uniform in ``[0.1, 1]``; otherwise in ``[-1, 1]`` with both signs
                present.
            generator: source of all randomness; the tensors live on its device.
            dtype: of the tensors.

        Raises:
            ProblemError: the dimension is too small.
        """
        check_generator("generator", generator, ProblemError)
        note = " (at least 2 if not definite)"
        dimension = check_integer("dimension", dimension, 1 if definite else 2, kind=ProblemError, note=note)
        device = generator.device
        uniform = torch.rand(dimension, generator=generator, dtype=dtype, device=device)
        if definite:
            eigenvalues = 0.1 + 0.9 * uniform
        else:
            # The first two get opposite signs and stay away from zero; the others are free.
            eigenvalues = 2 * uniform - 1
            eigenvalues[0], eigenvalues[1] = -0.1 - 0.9 * uniform[0], 0.1 + 0.9 * uniform[1]
        normal = torch.randn(dimension, dimension, generator=generator, dtype=dtype, device=device)
        orthogonal, triangular = torch.linalg.qr(normal)
        orthogonal = orthogonal * torch.sign(torch.diagonal(triangular))  # without it QR is not uniform
        hessian = (orthogonal * eigenvalues) @ orthogonal.mT
        target = torch.randn(dimension, generator=generator, dtype=dtype, device=device)
        return cls((hessian + hessian.mT) / 2, target)

    def loss(self, params: Tensor, linear: Tensor) -> Tensor:
        """The inner loss ``1/2 phi' A phi - b' phi`` of ``params`` and ``linear``, both ``[dimension]``."""
        self._check_shape(params=params, linear=linear)
        return 0.5 * params @ (self.hessian @ params) - linear @ params

    def outer_loss(self, params: Tensor) -> Tensor:
        """The outer loss ``1/2 ||phi - target||^2`` of ``params``, ``[dimension]``."""
        self._check_shape(params=params)
        return 0.5 * (params - self.target).square().sum()

    def minimiser(self, linear: Tensor) -> Tensor:
        """The minimiser ``A^{-1} b`` of the inner loss, ``[dimension]``.

        Raises:
            ProblemError: the hessian is not positive definite, so there is none.
        """
        smallest = float(torch.linalg.eigvalsh(self.hessian.detach())[0])
        if smallest <= 0:
            raise ProblemError(
                f"the smallest eigenvalue is {smallest:.3g}",
                "one above 0",
                "the inner loss has no unique minimiser; use Quadratic.random(..., definite=True)",
            )
        self._check_shape(linear=linear)
        minimiser: Tensor = torch.linalg.solve(self.hessian, linear)
        return minimiser

    def hypergradient(self, initial: Tensor, linear: Tensor, lr: float | Tensor, steps: int) -> QuadraticHypergradient:
        """The exact hypergradient after exactly ``steps`` steps of gradient descent, without autograd.

        With ``T = steps``, ``M = I - lr A`` and ``g = phi_{T+1} - target``::

            phi_{T+1} = M^T phi_1 + lr S b,    S = I + M + ... + M^{T-1}
            dF/dphi_1 = M^T g
            dF/db     = lr S g
            dF/dlr    = T (b - A phi_1)' M^{T-1} g

        which is the adjoint recursion (1.1)-(1.2) of the derivations, summed. All powers are taken in the
        eigenbasis of ``A``. Exact for definite and indefinite ``A`` and any ``lr``. Cost: one
        eigendecomposition and ``steps * dimension`` multiplications.

        Args:
            initial: ``phi_1``, ``[dimension]``.
            linear: ``b``, ``[dimension]``.
            lr: learning rate, a number or a scalar tensor.
            steps: number of inner steps ``T >= 0``.

        Raises:
            ProblemError: ``steps`` is negative.
        """
        steps = check_integer("steps", steps, 0, kind=ProblemError)
        self._check_shape(initial=initial, linear=linear)
        with torch.no_grad():
            eigenvalues, basis = torch.linalg.eigh(self.hessian)
            start, slope, target = basis.mT @ initial, basis.mT @ linear, basis.mT @ self.target
            factor = 1 - lr * eigenvalues
            # NOTE [why the powers are summed one by one]
            # (1 - factor^T) / eigenvalue is the same sum, but loses all digits where the eigenvalue is near
            # zero.
            exponents = torch.arange(steps, dtype=eigenvalues.dtype, device=eigenvalues.device)
            summed = lr * (factor[None, :] ** exponents[:, None]).sum(dim=0)
            residual = factor**steps * start + summed * slope - target
            last = steps * factor ** max(steps - 1, 0)
            return QuadraticHypergradient(
                initial=basis @ (factor**steps * residual),
                linear=basis @ (summed * residual),
                lr=((slope - eigenvalues * start) * last * residual).sum(),
            )

    def _check_shape(self, **vectors: Tensor) -> None:
        """Refuse vectors that do not fit the hessian."""
        for name, vector in vectors.items():
            if vector.shape != self.target.shape:
                expected = f"{tuple(self.target.shape)}, one entry per dimension of the hessian"
                raise ProblemError(f"{name} has shape {tuple(vector.shape)}", expected)
