"""Which states to store so that few steps are taken twice: numbers only, derivations (13.2)."""

from __future__ import annotations

from math import comb


def least_steps(steps: int, slots: int) -> int:
    r"""The fewest forward steps by which ``steps`` steps are pulled back with ``slots`` stored states, (13.2).

    .. math:: rT - \binom{S+r}{S+1},\qquad \binom{S+r-1}{S} < T \le \binom{S+r}{S}

    The first sweep's ``T - 1`` are among them, the ``T`` graphs are not, and the initial state takes a slot.
    """
    if steps <= 1:
        return 0
    rounds = _rounds(steps, slots)
    return rounds * steps - comb(slots + rounds, slots + 1)


def split(steps: int, slots: int) -> int:
    """After how many of ``steps >= 2`` steps the next state is stored, if ``slots >= 2`` are free, this one's too.

    # NOTE [where a least schedule splits]
    With ``r`` rounds, the piece before the new state keeps all slots and at most ``r - 1`` further rounds, the piece
    after it one slot less and at most ``r``. A split is least if neither piece is too long for that, and neither so
    short that it could do with a round less: what it saves is then not what the other one pays. Of those, the longest
    first piece is taken, except that a state that spares no step is not stored.
    """
    rounds = _rounds(steps, slots)
    longest = comb(slots + rounds - 1, slots)
    least_after = comb(slots + rounds - 2, slots - 1)
    return max(1, min(longest, steps - least_after))


def stored(steps: int, slots: int) -> list[int]:
    """The numbers (from 0) of the states that the first sweep over ``steps`` steps stores, the initial one first."""
    found, free = [0], slots
    while free > 1 and steps - found[-1] > 1:
        found.append(found[-1] + split(steps - found[-1], free))
        free -= 1
    return found


def logarithmic(steps: int) -> int:
    """The slots of ``"log"``: ``ceil(log2(steps))``, and one at least."""
    return max(1, (steps - 1).bit_length())


def _rounds(steps: int, slots: int) -> int:
    """The least ``r`` with ``steps <= comb(slots + r, slots)``: how often the first step is taken."""
    if slots == 1:
        return steps - 1
    rounds = 0
    while comb(slots + rounds, slots) < steps:
        rounds += 1
    return rounds
