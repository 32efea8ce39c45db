"""The experiment ``sinusoid``: its errors beside those of plain loops, and which levels it looks at."""

from __future__ import annotations

import pytest
import torch

from diffopt.experiments import sinusoid
from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import MLP, Sinusoid, functional


def test_errors_are_those_of_plain_loops():
    settings = sinusoid.Settings((3,), (0.05,), batches=1, tasks=2, hidden=4)
    row = sinusoid.measure(settings, 3, 0.05, Work(0))
    generator = Work(0).generator("start")
    apply, params = functional(MLP((1, 4, 4, 1), generator=generator).double())
    waves = Sinusoid().sample(2, Work(0).generator("tasks"), dtype=torch.float64)

    def gradient(wave, detached):
        """The meta-gradient, the first ``detached`` steps a constant added to the start."""
        x, y, query_x, query_y = wave
        start = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        now = start
        for step in range(3):
            loss = (apply(now, x) - y).square().mean()
            slopes = torch.autograd.grad(loss, list(now.values()), create_graph=True)
            slopes = [s.detach() if step < detached else s for s in slopes]
            now = {name: value - 0.05 * s for (name, value), s in zip(now.items(), slopes, strict=True)}
        loss = (apply(now, query_x) - query_y).square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(start.values()))])

    tasks = list(zip(*waves, strict=True))
    for name, level, detached in (("first-order", "0", 3), ("truncated", "1", 2), ("truncated", "2", 1)):
        expected = sum((gradient(t, detached) - gradient(t, 0)).norm().item() for t in tasks) / 2
        # float64, differences of gradients of norm 1 to 10
        assert row["errors"][name][level] == [pytest.approx(expected, rel=1e-9)]
    norm = sum(gradient(t, 0).norm().item() for t in tasks) / 2
    assert row["norm"] == [pytest.approx(norm, rel=1e-12)]


def test_levels_and_windows():
    assert sinusoid.levels(5) == [0, 1, 2, 3, 4]
    assert sinusoid.levels(20) == [0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 19]
    assert (sinusoid.hybrid_window(5), sinusoid.hybrid_window(10)) == (4, 8)
    assert "hybrid" not in sinusoid.estimators(5, 5)
