"""Exact reverse mode, the default estimator; ``diffopt.estimators`` re-exports it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.rollout.record import Checkpoint, Keep, Offload, check_storage
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Reverse(Adjoint):
    r"""The exact hypergradient, by the adjoint recursion over every inner step.

    .. math:: \Lambda_T = \frac{\partial F}{\partial s_{T+1}},\quad \Lambda_{t-1} = J_t^\top \Lambda_t,\quad
              \nabla = \sum_t B_t^\top\Lambda_t + \Big(\frac{\partial s_1}{\partial\theta}\Big)^\top\Lambda_0

    Exact. Cost: ``T`` gradients and ``T`` HVPs, one after the other; storing less than the graphs costs up to ``T``
    gradients more, ``"log"`` about ``log2(T) / 3`` times ``T``. Depth ``T``.

    Args:
        checkpoint: what is kept of the rollout. ``"graph"``: the graph of every step, no recomputation (memory: ``T``
            graphs). ``1``: every state, each step's graph recorded again when needed (``T`` states and one graph).
            ``k``: every ``k``-th state, blocks of ``k`` steps recomputed (``T / k`` states and ``k`` graphs).
            ``"sqrt"``: ``k`` near the root of ``T``. ``"log"``: ``ceil(log2(T))`` states and that of the step at hand,
            stored and computed again by the recursion (13.2) that takes the fewest steps, and one graph. ``None``:
            ``"graph"`` while the graphs take less than 1 GiB, judged by the first, else ``"sqrt"``. All give the same
            numbers; ``Solution.counts.extra_steps`` says how many steps were taken again.
        memory: in place of ``checkpoint``, the bytes that the backward pass may take, as a number or a text such as
            ``"2GB"`` (``10**9`` each; ``"2GiB"`` is ``2**30`` each): as many states are stored by that recursion as fit
            beside one step's graph, measured on the first step, and the adjoint. What the outer loss itself holds is
            not counted, nor are more cotangents than one. ``Solution.kept`` says what was chosen.
        offload: where stored states wait, those between them in the backward pass as well, if not (``False``) where
            they are. ``"cpu"`` (or ``True``): in the CPU's pinned memory, copied beside the computation; no effect on
            what runs on the CPU. ``"disk"``: in a temporary file without a name, in the folder that ``TMPDIR`` names,
            written and read beside the computation; a few states remain in memory. No effect on retained graphs;
            ``memory`` counts the states all the same.

    Not for: very long inner loops of which only the end matters (``Truncated``) or whose end is a stationary point
    (``Implicit``); differentiating twice (``Unrolled``).

    Raises:
        HyperparameterError: an option is none of these, or (by ``solve``) ``memory`` is less than the least possible.
        StorageError: (by ``solve`` or the backward pass) the disk has no room for the states.

    References: LeCun (1988), "A theoretical framework for back-propagation"; Franceschi et al. (2017), "Forward and
    Reverse Gradient-Based Hyperparameter Optimization", algorithm 1. Derivations (1.1)-(1.3).
    """

    checkpoint: Checkpoint = None
    memory: int | str | None = None
    offload: Offload = False
    takes_running_costs: ClassVar[bool] = True
    traced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check all options."""
        check_storage(self)

    def keep(self, steps: int) -> Keep:
        """All steps."""
        return Keep.of(self, 1)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The recursion over all steps."""
        return trajectory.sweep(cotangent)

    def pullbacks(self, trajectory: Trajectory, cotangents: Sequence[Leaves]) -> list[Cotangents]:
        """The same for many, with each step taken again once."""
        return trajectory.sweeps(cotangents)
