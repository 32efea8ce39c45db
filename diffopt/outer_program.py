"""``compiled``: an outer loss that contains solves, and its hypergradient, as one program."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffopt.errors import CompileWarning, GradModeError, HyperparameterError, LeafError, LossError
from diffopt.rollout import compiler_paths
from diffopt.rollout.hidden_state import left_alone
from diffopt.rollout.program import Program
from diffopt.rollout.refusals import refuse_captures
from diffopt.tensors import autograd_graph, derivatives, hints, tracing, transforms, tree
from diffopt.tensors.arguments import check_function
from diffopt.tensors.first_derivative import with_gradients
from diffopt.tensors.plain_numbers import is_integer
from diffopt.tensors.reads import Reads


def compiled(outer: Callable[..., Tensor]) -> Compiled:
    r"""``outer(params, *args)``, an outer loss that contains solves, and its hypergradient, as one compiled program.

    .. math:: (\theta, x) \mapsto \big(F(\theta, x),\ \nabla_\theta F(\theta, x)\big)

    The steps of every :func:`diffopt.solve` in it (under ``torch.func.vmap`` and :func:`diffopt.mean_over_tasks` too)
    become one compiled loop, their adjoint another one, and both stand with the outer loss in one program, so that
    nothing of a call is left to Python. For small problems, whose time is overhead. The numbers are those of plain
    calls, to round-off; the first call is a plain one, and raises what that raises.

    A program is made (in many seconds) for each structure, shape, dtype and device of the arguments, each argument that
    is no tensor, each number or object that ``outer`` reads by closure, and each state of autocast. Tensors that it
    reads without being given them may change in place. It must be a pure function: what it prints or stores happens in
    the calls that run plainly, which are the first one, and, to compare the two, the 2nd, 4th, 8th and so on.

    What cannot be compiled (estimators but ``Reverse``, ``Truncated``, ``FirstOrder``, ``Reptile``, ``Binomial``,
    ``Krylov``, ``MultiStep`` of these, and ``Implicit``; ``GMRES``, ``Dense``; ``"log"``, ``memory``, ``chunk_size``
    and, of ``Krylov``, ``rtol``; ``tol``, ``on_step``, ``micro_batches``; batches that are a function; a solve within
    the loss of another; random numbers; code that looks at the numbers in a tensor) runs plainly, after one
    :class:`diffopt.CompileWarning`. All states are stored, unless a ``checkpoint`` of ``"sqrt"`` or ``k`` says fewer.

    Args:
        outer: ``outer(params, *args)``, one floating scalar. ``params`` and ``args`` are trees.

    Returns:
        A :class:`Compiled`.

    Raises:
        LossError: ``outer`` is no function.

    Example:
        The learning rate's hypergradient for one step on ``w**2`` is ``-2w * 2 (w - 0.1 * 2w)``; here of one that is
        not compiled yet.

        >>> import torch, diffopt
        >>> def outer(lr, w):
        ...     return diffopt.solve(lambda w: w**2, w, optimizer=diffopt.SGD(lr), steps=1).params ** 2
        >>> program = diffopt.compiled(outer)
        >>> value, gradient = program.value_and_grad(torch.tensor(0.1), torch.tensor(1.0))  # doctest: +SKIP
        >>> gradient  # doctest: +SKIP
        tensor(-3.2000)
    """
    check_function("outer", outer, "a function outer(params, *args)", LossError)
    return Compiled(outer)


class _Given(NamedTuple):
    """The arguments of one call, taken apart.

    Attributes:
        wanted: the leaves whose gradient is asked for, by number.
        alone: whether it is an error if the value depends on other tensors that require grad.
    """

    leaves: list[Any]
    structure: tree.Structure
    wanted: tuple[int, ...]
    alone: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """Those among the leaves."""
        return [x for x in self.leaves if isinstance(x, Tensor)]

    def key(self) -> Hashable:
        """What a program is made for."""
        places = {x.device.type for x in self.tensors}
        casts = tuple([(p, torch.is_autocast_enabled(p), torch.get_autocast_dtype(p)) for p in sorted(places)])
        state = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        return self.structure, self.wanted, self.alone, tuple(map(_kind, self.leaves)), casts, state


class _Entry:
    """The program for one kind of call, while what is read by closure is as it was; ``None``: it runs plainly."""

    def __init__(self, reads: Reads, program: Program | None) -> None:
        self.reads, self.program, self.calls = reads, program, 1

    @property
    def fits(self) -> bool:
        """Whether it is for what is read now."""
        return self.reads.unchanged and (self.program is None or self.program.fits)


@final
class Compiled:
    """An outer loss and its hypergradient as one program; :func:`diffopt.compiled` makes it."""

    __slots__ = ("__weakref__", "_entries", "_outer", "_told")

    def __init__(self, outer: Callable[..., Tensor]) -> None:
        """Nothing is compiled yet: shapes are known once it is called."""
        self._outer, self._told = outer, False
        self._entries: dict[Hashable, list[_Entry]] = {}

    @transforms.outside_compile
    def __call__(self, params: Any, *args: Any) -> Tensor:
        """``outer(params, *args)``; its gradient has been computed once ``backward()`` is called.

        It can be differentiated once, in every argument that requires grad.

        Raises:
            CapturedTensorError: ``outer`` depends on a tensor that requires grad and is no argument.
            GradModeError: called under a ``torch.func`` transform.
            LossError: ``outer`` did not return one floating scalar.
            DiffoptError: whatever the plain call raises.
        """
        given = _taken_apart((params, *args), ())
        if torch.is_grad_enabled():
            wanted = [i for i, x in enumerate(given.leaves) if isinstance(x, Tensor) and x.requires_grad]
            given = given._replace(wanted=tuple(wanted), alone=True)
        value, gradients = self._run(given)
        return with_gradients(value, gradients, [given.leaves[i] for i in given.wanted])

    @transforms.outside_compile
    def value_and_grad(self, params: Any, *args: Any, argnums: int | Sequence[int] = 0) -> tuple[Tensor, Any]:
        """``outer(params, *args)`` and its gradient in one call, neither with a graph.

        Args:
            params: the first argument.
            args: the others.
            argnums: of which argument the gradient is taken (0: ``params``); of several: a sequence.

        Returns:
            The value, and a tree like that argument; a tuple of such trees if ``argnums`` is a sequence.

        Raises:
            HyperparameterError: ``argnums`` are no numbers of arguments.
            LeafError: an argument to be differentiated has a leaf that is not a floating tensor.
            GradModeError, LossError, DiffoptError: as for the call.
        """
        arguments = (params, *args)
        single, count = is_integer(argnums), len(arguments)
        given_numbers: Any = [argnums] if single else argnums
        if not isinstance(given_numbers, list | tuple) or not all(
            [is_integer(i) and -count <= i < count for i in given_numbers]
        ):
            raise HyperparameterError(
                f"argnums is {tree.describe(argnums)}", f"numbers of {count} arguments, from 0", ""
            )
        numbers = [int(i) % count for i in given_numbers]
        given = _taken_apart(arguments, numbers)
        value, gradients = self._run(given)
        found = dict(zip(given.wanted, gradients, strict=True))
        trees = tree.unflatten(given.structure, [found.get(i) for i in range(len(given.leaves))])
        return value, trees[numbers[0]] if single else tuple([trees[i] for i in numbers])

    def _run(self, given: _Given) -> tuple[Tensor, list[Tensor]]:
        if transforms.transforms_active():
            raise GradModeError(
                "a compiled outer loss was called under a torch.func transform",
                "plain code",
                "put vmap inside of it; value_and_grad differentiates by itself",
            )
        known = self._entries.setdefault(given.key(), [])
        entry = next((entry for entry in known if entry.fits), None)
        if entry is None:
            return self._anew(given, known)
        if entry.program is None:
            return self._plainly(given)
        try:
            value, unsound, *gradients = entry.program(given.tensors)
        except Exception:  # such as of a matrix that is singular: the plain way raises its own
            return self._plainly(given)
        entry.calls += 1
        if unsound.isfinite().item() and entry.calls & (entry.calls - 1):
            entry.program.warn()
            return value, gradients
        plain = self._plainly(given)  # which raises, if numbers are not finite
        try:
            entry.program.compare([value, *gradients], [plain[0], *plain[1]])
        except ArithmeticError as error:
            _warn(error, "what it reads has changed since; pass it as an argument")
            entry.program = None
        return plain

    def _anew(self, given: _Given, known: list[_Entry]) -> tuple[Tensor, list[Tensor]]:
        """A plain call, of which a program is made, unless there are too many for one kind of call."""
        if len(known) == _MOST and not self._told:
            self._told = True
            _warn(_ChangingError("what it reads by closure keeps changing"), "pass it as an argument")
        if len(known) == _MOST:
            return self._plainly(given)
        reads = Reads(self._functions(given))
        plain = self._plainly(given)
        if reads.unseen is not None:
            _warn(_ChangingError(f"of `{reads.unseen}` no change can be seen"), "pass what it gives as an argument")
        known.append(_Entry(reads, self._made(given) if reads.unseen is None else None))
        return plain

    def _function(self, given: _Given) -> Callable[..., list[Tensor]]:
        """``(*tensors) -> (value, 0 if all is finite, *gradients)``."""

        def function(*tensors: Tensor) -> list[Tensor]:
            now = iter(tensors)
            leaves = [next(now).detach() if isinstance(x, Tensor) else x for x in given.leaves]
            with torch.set_grad_enabled(bool(given.wanted)):
                roots = [leaves[i].requires_grad_() for i in given.wanted]
                born = autograd_graph.newest()
                value = _scalar(self._outer(*tree.unflatten(given.structure, leaves)))
                trace = tracing.current()
                if given.alone and roots and trace is None:
                    part = autograd_graph.GraphPart.of(value, roots)
                    refuse_captures("outer", [self._outer], autograd_graph.captured_nodes([part], born))
                found = derivatives.gradient(value, roots, differentiable=False)
            unsound = value.new_zeros((), dtype=torch.float64) if trace is None else trace.unsound(value)
            return [value.detach(), unsound, *derivatives.or_zeros(found, roots)]

        return function

    def _plainly(self, given: _Given) -> tuple[Tensor, list[Tensor]]:
        value, _, *gradients = self._function(given)(*given.tensors)
        return value, gradients

    def _functions(self, given: _Given) -> list[object]:
        """What is called, and what is given that is no tensor."""
        return [self._outer, *[x for x in given.leaves if not isinstance(x, Tensor)]]

    def _made(self, given: _Given) -> Program | None:
        function = self._function(given)
        try:
            with left_alone(self._functions(given)):
                program = Program(function, given.tensors)
                program.check(function, given.tensors)
        except Exception as error:  # whatever the compiler stumbles over: the plain way is always there
            _warn(error, "")
            return None
        return program


_MOST = 4
"""How many programs are made for one kind of call, while what is read by closure changes."""


class _ChangingError(Exception):
    """What a program was made from does not stay as it was."""


@final
class _Same:
    """An object that is no tensor, equal to itself only."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.layout
    plain = isinstance(leaf, bool | int | float | complex | str | bytes | torch.dtype | torch.device | None)
    # (by what is printed: 0.0 equals -0.0, and NaN not itself)
    return (type(leaf), repr(leaf)) if plain else _Same(leaf)


def _taken_apart(arguments: tuple[Any, ...], numbers: Sequence[int]) -> _Given:
    leaves, structure = tree.flatten(arguments)
    if not numbers:
        return _Given(leaves, structure, ())
    counts = [child.num_leaves for child in structure.children()]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    wanted = sorted({i for n in numbers for i in range(starts[n], starts[n] + counts[n])})
    for i in wanted:
        if not isinstance(leaves[i], Tensor) or not leaves[i].is_floating_point():
            raise LeafError(
                f"the gradient is asked for in {tree.describe(leaves[i])}",
                "arguments whose leaves are floating tensors",
                "check argnums, or give what is no number of its own as another argument",
            )
    return _Given(leaves, structure, tuple(wanted))


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
        raise LossError(f"outer returned {tree.describe(value)}", "one floating scalar tensor", hints.for_loss(value))
    return value


def _warn(error: Exception, fix: str) -> None:
    said = " ".join(str(error).rpartition("Output:")[2].split())[:200]
    name = "" if isinstance(error, tracing.NotTraceableError | _ChangingError) else f"{type(error).__name__}: "
    if type(error).__name__ in ("GuardOnDataDependentSymNode", "DataDependentOutputException"):
        name, said = "", "code looks at the numbers in a tensor"
    reason = compiler_paths.explanation(error) or f"{name}{said}{_line(error)}"
    warnings.warn(
        f"compiled(outer) runs plainly: {reason}{fix and f'; {fix}'}",
        CompileWarning,
        stacklevel=2,
    )


def _line(error: Exception) -> str:
    """The last line of the user's own code on the way to an error, in words."""
    ours = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(".py")]
    own = [frame for frame in frames if not frame.filename.startswith(ours)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
