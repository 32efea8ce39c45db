"""What a rollout keeps, counts and watches for."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, HyperparameterError
from diffopt.rollout.budget import as_bytes
from diffopt.rollout.inputs import Place
from diffopt.rollout.step_graph import Block
from diffopt.rollout.store import Offload as Offload
from diffopt.rollout.store import Store
from diffopt.tensors import derivatives, random_state
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves

Checkpoint: TypeAlias = Literal["graph", "sqrt", "log"] | int | None


@final
@dataclass(frozen=True)
class Keep:
    """What an estimator will revisit: the steps ``first, ..., T``, and how they are kept.

    Attributes:
        first: the earliest step that will be pulled back (from 1); ``T + 1`` keeps nothing.
        checkpoint: ``"graph"``: the steps' graphs; ``k``: every ``k``-th state, blocks recomputed; ``"sqrt"``: ``k``
            near the root of the number of steps; ``"log"``: as many states as the logarithm of that number, where the
            recursion (13.2) wants them; ``None``: graphs while they fit, else ``"sqrt"``.
        gradients: keep also the inner gradient of every step whose state is kept.
        offload: where stored states wait; ``False``: where they are; ``"cpu"``: in the CPU's memory; ``"disk"``: in a
            temporary file.
        memory: of ``"log"``: the bytes that a backward pass may take, from which the number of states is computed.
        stackable: whether what is kept may be one stack, for the estimator goes back by what can be a program only.
        evaluates: whether the backward pass evaluates the loss; if not, no state that the loss keeps can mislead it.
    """

    first: int
    checkpoint: Checkpoint = 1
    gradients: bool = False
    offload: Offload = False
    memory: int | None = None
    stackable: bool = False
    evaluates: bool = True

    @staticmethod
    def of(options: Any, first: int) -> Keep:
        """The steps from ``first`` on, as an estimator's options ``checkpoint``, ``memory`` and ``offload`` say."""
        if options.memory is None:
            return Keep(first, options.checkpoint, offload=options.offload)
        memory = as_bytes(f"{type(options).__name__}: memory", options.memory)
        return Keep(first, "log", offload=options.offload, memory=memory)

    def of_compiled(self, *, traced: bool) -> Keep:
        """The same of compiled steps: states in place of graphs; ``traced``: the estimator can be part of a program."""
        checkpoint = 1 if self.checkpoint == "graph" else self.checkpoint
        return replace(self, checkpoint=checkpoint, stackable=traced and checkpoint != "log")

    def within(self, budget: int, steps: int, state: Leaves) -> Keep:
        """The same with all states if they fit into so many bytes, if it is to be chosen; else as ``"sqrt"`` says."""
        if self.checkpoint is not None:
            return self
        size = sum([x.nbytes for x in state]) * (steps - self.first + 1)
        return replace(self, checkpoint=1 if size <= budget else "sqrt")

    def block(self, steps: int) -> int:
        """Every how many-th state is kept of so many steps, if states are, and not as ``"log"`` says."""
        if self.checkpoint == "sqrt":
            return math.isqrt(max(0, steps - self.first)) + 1
        return self.checkpoint if isinstance(self.checkpoint, int) else 1

    def __post_init__(self) -> None:
        """Check what an estimator asks for."""
        if type(self.first) is not int or self.first < 1:
            Options(self).integer("first", 1)
        if not type(self.gradients) is type(self.stackable) is type(self.evaluates) is bool:
            Options(self).flag("gradients", "stackable", "evaluates")
        named = type(self.checkpoint) is str and self.checkpoint in ("graph", "sqrt", "log")
        if not (named or self.checkpoint is None) or self.offload is not False:
            check_checkpoint(self)
        if self.memory is not None:
            Options(self).integer("memory", 1)
            if self.checkpoint != "log" or self.gradients:
                raise HyperparameterError(
                    "Keep: memory with another checkpoint than 'log', or with gradients", "one of them alone"
                )


def check_storage(options: Any) -> None:
    """Refuse the options ``checkpoint``, ``memory`` and ``offload`` of an estimator that is being made."""
    check_checkpoint(options)
    if options.memory is None:
        return
    where = type(options).__name__
    as_bytes(f"{where}: memory", options.memory)
    if options.checkpoint is not None:
        raise HyperparameterError(
            f"{where}: memory is {options.memory!r} beside checkpoint={options.checkpoint!r}",
            "one of them",
            "memory says how many states are stored; leave checkpoint out",
        )


def check_checkpoint(options: Any) -> None:
    """Refuse options of storage that are none of the allowed ones, in a dataclass that is being made."""
    checked = Options(options)
    checked.integer("checkpoint", 1, also=(None, "graph", "sqrt", "log"))
    if options.offload is True:  # its name when there was no other place
        object.__setattr__(options, "offload", "cpu")
    if options.offload is not False:
        checked.choice("offload", "cpu", "disk", also="False, ")
    if options.offload and options.checkpoint == "graph":
        raise HyperparameterError(
            f"{type(options).__name__}: offload={options.offload!r} with checkpoint='graph'",
            "one that stores states: 1, k, 'sqrt' or 'log'",
        )


@final
@dataclass(frozen=True)
class Kept:
    """How much a rollout kept for the backward pass.

    Attributes:
        checkpoint: ``"graph"``, ``"log"``, or the ``k`` of every ``k``-th state; ``None``: no step was kept.
        states: how many states were stored.
        bytes: bytes of the stored states, or of the graphs as estimated from the first one; all tasks together.
        slots: how many states the recursion (13.2) may hold besides that of the step at hand; ``None``: not used.
    """

    checkpoint: str | int | None = None
    states: int = 0
    bytes: int = 0
    slots: int | None = None


@final
@dataclass
class Counts:
    """What one solve has computed so far, per task; the backward pass adds to it.

    Attributes:
        gradients: evaluations of the inner gradient.
        products: curvature products, of which one gives ``H_t u`` and ``M_t' u`` together.
        depth: how many batches of curvature products had to wait for one another.
        extra_steps: how many steps :class:`Reverse` or :class:`Truncated` took again, those for their graphs included.
    """

    gradients: int = 0
    products: int = 0
    depth: int = 0
    extra_steps: int = 0

    def add(self, other: Counts) -> None:
        """All that has been counted elsewhere."""
        self.gradients += other.gradients
        self.products += other.products
        self.depth += other.depth
        self.extra_steps += other.extra_steps

    def add_products(self, count: int) -> None:
        """One batch of curvature products."""
        self.products += count
        self.depth += 1


@final
@dataclass(frozen=True)
class Rollout:
    """What one rollout left for the backward pass. Only what is stored goes, as the backward pass uses it up.

    Attributes:
        wanted: the inputs besides the state that the graph can be pulled back to.
        first: the earliest step that was kept; ``None``: nothing was.
        kept: how much was kept.
        states: stored states ``s_t`` by ``t``.
        stack: the states ``s_first, ..., s_T`` of a traced rollout, stacked, and behind them, if they are kept, the
            gradients likewise; ``None``: it is another.
        products: what the losses of a traced rollout computed at the same steps, as far as it is kept, stacked.
        numbers: those of the steps' first updates, if a program is given them.
        gradients: stored inner gradients ``g_t`` by ``t``.
        graphs: the retained graph of all steps that are kept, if graphs are; one or none.
        steps: how many steps were made.
        updates: how many updates that is.
        enough: whether each task's gradient was small enough to stop, when last looked at; ``None``: nobody asked.
        losses: the inner losses ``[..., T]``, to which a replay is compared.
        handed_out: what was observed, and what the loss returned besides, ``[..., T, ...]`` each.
        draws: the generators' states before each step that drew random numbers.
        autocast: its state during the rollout.
        hidden_state: the error for whoever computes a step again; ``None``: the loss is not known to keep a state.
        copied_to: the groups of ranks that share the solve, if they do.
        key: what the program was made for that has rolled out, if one has.
        captured: the tensors that it has read besides its inputs, each with how often it had been written to.
        shards: whether each rank holds its own part of the params, in tensors that do not know of it.
    """

    wanted: tuple[Place, ...] = ()
    first: int | None = None
    steps: int = 0
    updates: int = 0
    enough: Tensor | None = None
    kept: Kept = field(default_factory=Kept)
    states: Store = field(default_factory=Store)
    stack: Leaves | None = None
    products: tuple[Tensor, ...] = ()
    numbers: Tensor | None = None
    gradients: dict[int, Leaves] = field(default_factory=dict)
    graphs: list[Block] = field(default_factory=list)
    losses: Tensor | None = None
    handed_out: tuple[Tensor, ...] = ()
    draws: dict[int, random_state.GeneratorStates] = field(default_factory=dict)
    autocast: derivatives.Autocast | None = None
    hidden_state: DiffoptError | None = None
    copied_to: tuple[Any, ...] = ()
    key: Hashable = None
    captured: tuple[tuple[Tensor, int], ...] = ()
    shards: bool = False

    @contextmanager
    def replay(self, step: int | None, device: torch.device) -> Iterator[None]:
        """Evaluate a step's loss as in the rollout: the same random numbers, the same autocast.

        Raises:
            HiddenStateError, RandomnessError: it would give another number.
        """
        if self.hidden_state is not None:
            raise self.hidden_state
        autocast = nullcontext() if self.autocast is None else self.autocast.entered()
        with autocast, random_state.replayed(None if step is None else self.draws.get(step), device):
            yield


@final
@dataclass
class Record:
    """Where a solve leaves what it did, for its backward passes and for its caller.

    Attributes:
        counts: what has been computed so far.
        diagnostics: what the estimator reports of its own quality.
        rollout: the last rollout.
        usable: whether what it kept is still there; the first backward pass uses it up, a later one rolls out again.
        kept: how much the first rollout kept.
    """

    counts: Counts = field(default_factory=Counts)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    rollout: Rollout = field(default_factory=Rollout)
    usable: bool = False
    kept: Kept = field(default_factory=Kept)


@final
@dataclass(frozen=True)
class Watch:
    """Which checks a rollout makes.

    Attributes:
        values: refuse losses and states that are not finite, and a loss that does not depend on params.
        captures: refuse captured tensors that require grad.
        levels: refuse captured tensors of these ``torch.func`` transforms.
        state: note, in a rollout of which steps are kept, state of the loss that its evaluations change.
    """

    values: bool = False
    captures: bool = False
    levels: range = range(0)
    state: bool = False

    def __bool__(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.values or self.captures or self.state or len(self.levels) > 0)
