"""The exact recursion over a finished rollout, from its last step back, derivations (1.1)-(1.3).

What is found is given as the fields of ``Cotangents``. There are four ways: over what a program has stacked, in a graph
that is being traced, by one compiled call a step, and by the graphs of blocks of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from diffopt.adjoint import sweep_program
from diffopt.adjoint.direct_terms import DirectTerms
from diffopt.adjoint.traced_sweep import TracedSweep
from diffopt.errors import EstimatorError
from diffopt.rollout import compiled
from diffopt.rollout.inputs import Place
from diffopt.rollout.record import Counts
from diffopt.rollout.step_graph import Block
from diffopt.tensors import tracing
from diffopt.tensors.leaves import Leaves

if TYPE_CHECKING:
    from diffopt.adjoint.trajectory import Trajectory

Swept: TypeAlias = "tuple[Leaves | None, Mapping[Place, Tensor]]"
"""The adjoint of the state before the first of the steps, if it is wanted, and the direct terms."""


def sweep(trajectory: Trajectory, cotangent: Leaves, first: int) -> Swept:
    """From step ``T`` down to step ``first``.

    Raises:
        EstimatorError: the estimator keeps the steps from another one on.
    """
    rollout = trajectory.rollout
    if rollout.stack is not None:
        return sweeps(trajectory, [cotangent], first)[0]
    if first != rollout.first:
        raise EstimatorError(
            f"sweep(first={first}): the estimator keeps steps from {rollout.first} on",
            "the same number",
            f"return Keep(first={first}) from keep()",
        )
    if trajectory.dynamics.compile and not rollout.graphs and trajectory.running is None:
        return _compiled_sweep(trajectory, cotangent, first)
    return _sweep_of_blocks(trajectory, [cotangent], first)[0]


def sweeps(trajectory: Trajectory, cotangents: Sequence[Leaves], first: int) -> list[Swept]:
    """The same for each of many cotangents; what is recorded again is recorded once."""
    if trajectory.rollout.stack is None:
        return _sweep_of_blocks(trajectory, cotangents, first)
    if tracing.current() is not None:
        return [_traced_sweep(trajectory, cotangent, first) for cotangent in cotangents]
    return [(found.initial, found.direct) for found in sweep_program.sweeps(trajectory, cotangents, first)]


def _traced_sweep(trajectory: Trajectory, cotangent: Leaves, first: int) -> Swept:
    """In a graph that is being traced."""
    initial, direct = TracedSweep(trajectory, first).pull(cotangent)
    _count_sweep(trajectory, first)
    return initial if trajectory.wants_initial else None, direct


def _count_sweep(trajectory: Trajectory, first: int) -> None:
    steps = trajectory.steps - first + 1
    again = steps - trajectory.rollout.kept.states  # what lies between the states that are kept
    trajectory.record.counts.add(Counts(again, steps, steps, again + steps))


def _sweep_of_blocks(trajectory: Trajectory, cotangents: Sequence[Leaves], first: int) -> list[Swept]:
    adjoints, counts, wanted = list(cotangents), trajectory.record.counts, trajectory.wants_initial
    direct, last = [DirectTerms(trajectory) for _ in adjoints], len(adjoints) - 1
    for block, start, end in _blocks_backwards(trajectory, first):
        state = range(trajectory.layout.state_count if start > first or wanted else 0)
        for i, adjoint in enumerate(adjoints):
            terms = block.pullback(adjoint, state=state, running=trajectory.running, retain=i < last)
            direct[i].add_block(terms)
            adjoints[i] = terms.state
        counts.products += (end - start + 1) * len(adjoints)
        counts.depth += (end - start + 1) * len(adjoints)
    return [(x if wanted else None, d.collect()) for x, d in zip(adjoints, direct, strict=True)]


def _compiled_sweep(trajectory: Trajectory, cotangent: Leaves, first: int) -> Swept:
    """From stored states, each step one compiled call; a step that cannot be compiled, by its graph."""
    inputs, adjoint = trajectory.inputs.detached(), cotangent
    pullbacks = compiled.Pullbacks(trajectory.dynamics, inputs, trajectory.wanted)
    direct, replay, again = DirectTerms(trajectory), trajectory.replay(), trajectory.losses_to_replay()
    seen, device, record = again.clone(), trajectory.final[0].device, trajectory.record
    for step, state in replay.backwards(first, trajectory.steps, again):
        record.usable = False
        with trajectory.rollout.replay(None, device):
            terms = pullbacks.pull(state, step, adjoint)
        if terms is None:
            block, _ = replay.block(state, step, step, again)
            pulled = block.pullback(adjoint, state=range(trajectory.layout.state_count))
            adjoint = pulled.state
            direct.add_block(pulled)
        else:
            record.counts.extra_steps += 1
            adjoint, seen[..., step - 1] = terms[0], terms[2]
            direct.add(step, terms[1])
        record.counts.add_products(1)
    trajectory.refuse_other_losses(again)
    trajectory.refuse_other_losses(seen)
    return adjoint if trajectory.wants_initial else None, direct.collect()


def _blocks_backwards(trajectory: Trajectory, first: int) -> Iterator[tuple[Block, int, int]]:
    """The graphs of steps ``first, ..., T`` in blocks, the last first, retained or recorded again one by one.

    # NOTE [one graph at a time]
    What lies between two stored states is one graph where a step's graph is no larger than a state, which the first
    one says: nothing is then computed twice. Where it is larger, or states are offloaded, those between are stored
    for a while, and each step's graph is recorded, used and freed: so the graphs of a block never outweigh the
    states of all steps, and those of an offloaded block take the memory of one.
    """
    end, kept, record, running = trajectory.steps, trajectory.rollout, trajectory.record, trajectory.running
    if kept.graphs:
        record.usable = False
        yield kept.graphs.pop(), first, end
        return
    replay, again, states = trajectory.replay(), trajectory.losses_to_replay(), kept.states
    observes = running is not None and any([x is not None for x in running.observed])
    linked = kept.kept.slots is None and not states.elsewhere  # until a graph is seen to be larger than a state
    while end >= first:
        record.usable = False
        start, block = states.latest, None
        assert start <= end, "no state is stored that a step which is left begins at"
        if linked and start < end:
            state = states.take(start)
            block, after = replay.block_of_small(state, start, end, again, observes=observes)
            if block is None:
                linked, states[start], states[start + 1] = False, state, after
            del state, after
        if block is not None:
            yield block, start, end
        for step, state in replay.backwards(start, end, again) if block is None else ():
            one, _ = replay.block(state, step, step, again, observes=observes)
            del state  # the graph has what it needs of it
            yield one, step, step
        end = start - 1
    trajectory.refuse_other_losses(again)
