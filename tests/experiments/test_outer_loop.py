"""What the experiments' outer loops make of their losses."""

from __future__ import annotations

from diffopt.experiments.framework.outer_loop import first_below, smoothed


def test_smoothing_and_first_below():
    assert smoothed([3.0, 0.0, 3.0, 9.0], 3) == [1.5, 2.0, 4.0, 6.0]
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]
    assert first_below([3.0, 2.0, 1.0], 2.0, [0.1, 0.2, 0.3]) == 0.3
    assert first_below([3.0], 2.0, [0.1]) is None
