"""``WarmStarts``: hypergradients from few inner steps and few iterations of the solver, from where both were left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffopt.errors import CapturedTensorError, DisconnectedError, LossError
from diffopt.implicit import implicit_gradients
from diffopt.linear_solve import ConjugateGradient, LinearSolver
from diffopt.optimizers.base import Optimizer
from diffopt.rollout.given import params_leaves
from diffopt.solve import solve
from diffopt.tensors import hints, transforms, tree
from diffopt.tensors.arguments import Options, check_function


class Warm(NamedTuple):
    """Where an inner problem was left.

    Attributes:
        params: the inner iterate.
        multiplier: the iterate of the linear system, a tree like ``params``.
    """

    params: Any
    multiplier: Any


class WarmGradients(NamedTuple):
    """What one call of a :class:`WarmStarts` gives.

    Attributes:
        value: the outer loss at the inner iterate.
        gradients: the hypergradient of every argument, trees like ``args`` (``None``: it is no floating tensor).
        warm: where the inner problem has been left now: what the next call starts from.
    """

    value: Tensor
    gradients: tuple[Any, ...]
    warm: Warm


@final
@dataclass(frozen=True)
class WarmStarts:
    r"""Hypergradients without any inner history: the memory-reduced method, a single loop of warm starts.

    .. math:: \phi \leftarrow \text{steps on } \ell(\cdot, \theta) \text{ from } \phi,\qquad
              v \leftarrow \text{iterations on } \nabla^2_{\phi}\ell\, v = \partial_\phi F \text{ from } v,\qquad
              h = \partial_\theta F - (\partial_\theta\partial_\phi \ell)\, v

    for every outer step. With fixed numbers of steps and iterations a cold start leaves a bias that no number of outer
    steps removes; from warm starts both errors follow the outer variable and vanish as it settles. With some of the
    tasks at a time it comes as near to a stationary point as one over their number.

    A pure function of ``(warm, *args)``: a batch of tasks is ``torch.func.vmap`` of it, and what is kept of a task is
    what it returns. Memory: two vectors like ``params`` for each task, and the graph of one gradient. Cost: ``steps``
    gradients, the solver's iterations in HVPs, and one mixed product. Not for: inner losses that are not strongly
    convex near their minimum, or outer steps so large that the minimum runs away.

    Args:
        loss: the inner loss, ``loss(params, *args)``.
        outer_loss: ``outer_loss(params, *args)``, of the same arguments; each takes of them what it needs.
        optimizer: of the inner steps; its buffers start anew at every call.
        steps: how many inner steps a call makes.
        solver: of the linear system; default: one iteration of conjugate gradients.
        check: as in :func:`diffopt.solve`.

    Raises:
        LossError, HyperparameterError, StepsError: an option is not what was expected.
        CapturedTensorError: a loss reads a tensor that requires grad and that it was not given.

    Example:
        The outer loss ``(w - 1)**2`` at the minimum ``w = a`` of ``(w - a)**2``; ``a`` goes to 1.

        >>> import torch, diffopt
        >>> method = diffopt.WarmStarts(
        ...     lambda w, a: (w - a) ** 2, lambda w, a: (w - 1) ** 2, optimizer=diffopt.SGD(0.2), steps=1
        ... )
        >>> a, warm = torch.tensor(3.0), method.start(torch.tensor(0.0))
        >>> for _ in range(100):
        ...     value, (gradient,), warm = method(warm, a)
        ...     a = a - 0.1 * gradient
        >>> a
        tensor(1.)

    Reference: Yang, Ma and Yu (2024), arXiv 2412.12030. Derivations, section 6.3.
    """

    loss: Callable[..., Tensor]
    outer_loss: Callable[..., Tensor]
    optimizer: Optimizer = field(kw_only=True)
    steps: int = field(kw_only=True)
    solver: LinearSolver = field(
        default_factory=lambda: ConjugateGradient(max_iterations=1, rtol=0.0, throw=False), kw_only=True
    )
    check: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options; the others are checked where they are used."""
        check_function("loss", self.loss, "a function loss(params, *args)", LossError)
        check_function("outer_loss", self.outer_loss, "a function outer_loss(params, *args)", LossError)
        options = Options(self)
        options.integer("steps", 0)
        options.instance("solver", LinearSolver, "a diffopt.linear_solve object")
        options.flag("check")

    def start(self, params: Any) -> Warm:
        """A cold start: the inner problem at ``params``, the linear system at zero."""
        leaves, structure = params_leaves(params)
        return Warm(params, tree.unflatten(structure, [torch.zeros_like(x) for x in leaves]))

    def __call__(self, warm: Warm, *args: Any) -> WarmGradients:
        """One hypergradient, from where ``warm`` was left."""
        with torch.no_grad():
            moved = solve(
                self.loss, warm.params, *args, optimizer=self.optimizer, steps=self.steps, check=self.check
            ).params
        value, cotangent, direct = self._outer(moved, args)
        found = implicit_gradients(
            self.loss, moved, *args, cotangent=cotangent, solver=self.solver, start=warm.multiplier, check=self.check
        )
        leaves, structure = tree.flatten(found.args)
        total = [None if x is None else x + y for x, y in zip(leaves, direct, strict=True)]
        return WarmGradients(value, tuple(tree.unflatten(structure, total)), Warm(moved, found.multiplier))

    def _outer(self, params: Any, args: tuple[Any, ...]) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """The outer loss, its gradient in ``params``, and in the leaves of ``args`` (``None``: no floating one)."""
        own, structure = tree.flatten(params)
        leaves, read = tree.flatten(args)
        floating = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        rest = [x.detach() if isinstance(x, Tensor) else x for x in leaves]

        def outer(*roots: Tensor) -> tuple[Tensor]:
            now = list(rest)
            for i, root in zip(floating, roots[len(own) :], strict=True):
                now[i] = root
            value = self.outer_loss(tree.unflatten(structure, roots[: len(own)]), *tree.unflatten(read, now))
            if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
                got = f"outer_loss returned {tree.describe(value)}"
                raise LossError(got, "one floating scalar tensor", hints.for_loss(value))
            return (value,)

        roots = [x.detach() for x in (*own, *(leaves[i] for i in floating))]
        grads, (value,) = transforms.functional_gradient(outer, tuple(roots))
        if self.check and transforms.unwrapped(value).requires_grad:
            raise CapturedTensorError(
                "outer_loss reads a tensor that requires grad without being given it",
                "among the arguments",
                "pass it in *args",
            )
        if all(grad is None for grad in grads):
            raise DisconnectedError("outer_loss depends on nothing that it is given", "a gradient", "use params")
        filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, roots, strict=True)]
        direct: list[Tensor | None] = [None] * len(leaves)
        for i, grad in zip(floating, filled[len(own) :], strict=True):
            direct[i] = grad
        return value.detach(), tree.unflatten(structure, filled[: len(own)]), direct
