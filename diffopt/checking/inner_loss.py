"""One inner loss as the probes of :func:`diffopt.check` look at it: its tensors by path, and how to evaluate it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, LossError
from diffopt.inner_problem import checked_problem
from diffopt.optimizers import SGD
from diffopt.rollout.dynamics import Dynamics
from diffopt.tensors import derivatives, random_state
from diffopt.tensors.in_double import InDouble, doubled


@final
@dataclass(frozen=True)
class Subject:
    """A loss with copies of everything it is given, cut off from whatever made it.

    Attributes:
        dynamics: the inner problem, of which only the loss is used.
        params: the leaves of the parameters.
        args: the tensors among the arguments.
        params_paths: what to call the former, such as ``params['weight']``.
        args_paths: what to call the latter, such as ``args[0]['data']``.
        wanted: the arguments that require grad.
        double: whether to evaluate in double precision.
        generators: the generators' state under which the loss is evaluated.
    """

    dynamics: Dynamics
    params: tuple[Tensor, ...]
    args: tuple[Tensor, ...]
    params_paths: tuple[str, ...]
    args_paths: tuple[str, ...]
    wanted: tuple[int, ...]
    generators: random_state.GeneratorStates
    double: bool = False

    @classmethod
    def of(cls, loss: Callable[..., Tensor], params: Any, args: tuple[Any, ...]) -> Subject:
        """Flatten and check what a loss is given, as :func:`diffopt.solve` does."""
        problem = checked_problem(loss, params, args, SGD(0.0), 1, None, True)
        params, read, names = problem.inputs.params, problem.inputs.read, problem.dynamics.layout.names()
        return cls(
            problem.dynamics,
            tuple(leaf.detach().clone() for leaf in params),
            tuple(x.detach().clone() for x in read),
            names.params,
            names.read,
            tuple(i for i, x in enumerate(read) if x.requires_grad),
            random_state.snapshot(params[0].device),
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """What to call what :meth:`gradients` returns."""
        return (*self.params_paths, *(self.args_paths[i] for i in self.wanted))

    def loss(self, params: Sequence[Tensor], args: Sequence[Tensor]) -> Tensor:
        """The loss there, on the same random numbers at every call."""
        with self.replayed(), InDouble() if self.double else nullcontext():
            return self.dynamics.losses(params, args)

    def value(self) -> Tensor:
        """The loss at these parameters, evaluated with its graph as a solve does."""
        with torch.enable_grad():
            roots, args = self.roots()
            return self.loss(roots[: len(self.params)], args).detach()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The same random numbers at every entry; the generators are left as they were."""
        with random_state.replayed(self.generators, self.params[0].device), _named_faults():
            yield

    def roots(self) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """New parameters and arguments to evaluate at, from which a graph grows."""
        roots = derivatives.make_roots([*self.params, *(self.args[i] for i in self.wanted)])
        args = list(self.args)
        for i, root in zip(self.wanted, roots[len(self.params) :], strict=True):
            args[i] = root
        return roots, args

    def gradients(self, *, differentiable: bool) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor | None, ...]]:
        """The roots, the loss, and its gradient in the parameters and the arguments that require grad."""
        with torch.enable_grad():
            roots, args = self.roots()
            loss = self.loss(roots[: len(self.params)], args)
            with _named_faults():  # a checkpoint runs the loss again here
                return roots, loss, derivatives.gradient(loss, roots, differentiable=differentiable)

    def at(self, params: Sequence[Tensor], wanted: Sequence[Tensor] | None = None) -> Subject:
        """The same with other parameters, and other values of the arguments that require grad."""
        new = {} if wanted is None else dict(zip(self.wanted, wanted, strict=True))
        return replace(self, params=tuple(params), args=tuple(new.get(i, x) for i, x in enumerate(self.args)))

    def in_double(self) -> Subject:
        """The same in double precision."""
        return replace(self, params=tuple(map(doubled, self.params)), args=tuple(map(doubled, self.args)), double=True)

    def of_two(
        self, others: Sequence[Tensor], along: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        """The losses at these parameters and at others, by one vmapped call, and the gradients of both, stacked.

        With vectors ``along``, one for each parameter, also the gradients' curvature products with them, stacked, and
        the mixed ones for the arguments that require grad, summed over both.
        """
        stacked = [torch.stack(pair) for pair in zip(self.params, others, strict=True)]
        dynamics, count = self.dynamics.over(2), len(stacked)
        with torch.enable_grad(), self.replayed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap says which operations it loops over
            roots, args = self.at(stacked).roots()
            losses = dynamics.losses(roots[:count], args)
            grads = derivatives.gradient(losses, roots[:count], differentiable=bool(along))
            twice = [u.expand_as(x) for u, x in zip(along, stacked, strict=False)]
            return losses.detach(), grads, derivatives.pullback(grads, roots, twice) if along else ()

    def products(self, along: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The curvature products of the gradient at these parameters, and the mixed ones."""
        with torch.enable_grad():
            roots, _, grads = self.gradients(differentiable=True)
            return derivatives.pullback(grads[: len(self.params)], roots, along)


@contextmanager
def _named_faults() -> Iterator[None]:
    """Errors of the loss itself, whatever they are, as this library's."""
    try:
        with derivatives.named_in_place_changes():
            yield
    except DiffoptError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:150]
        raise LossError(
            f"the inner loss raised {type(error).__name__} ({said})",
            "it to run as loss(params, *args)",
            "check its arguments' order, shapes and dtypes",
        ) from error
