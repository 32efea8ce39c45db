"""How long work takes: the processor's own time here, and on a GPU that between two events, waited for."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

import diffopt
from diffopt.estimators import Reverse
from diffopt.tensors.timing import seconds_of

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def test_on_a_cpu_waiting_is_not_counted_and_work_is():
    def work():
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass

    assert seconds_of(lambda: time.sleep(0.1), CPU) < 0.05
    assert 0.03 <= seconds_of(work, CPU) < 0.06


@pytest.fixture
def cuda(monkeypatch):
    """A GPU that notes what is asked of it, and says that 250 ms lie between two events."""
    log = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, last):
            assert isinstance(last, Event)
            log.append("read")
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return log


def test_on_a_gpu_events_stand_around_the_work_and_are_waited_for(cuda):
    assert seconds_of(lambda: cuda.append("work"), GPU) == 0.25
    assert cuda == ["wait", "event", "work", "event", "wait", "read"]


def test_an_error_of_the_work_passes(cuda):
    def work():
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        seconds_of(work, GPU)
    with pytest.raises(ValueError, match="of the work"):
        seconds_of(work, CPU)


def test_compare_times_on_the_device_of_the_outer_loss(monkeypatch):
    from diffopt.comparing import compare as module

    seen = []

    def fake(work, device):
        seen.append(device)
        work()
        return 0.125

    monkeypatch.setattr(module, "seconds_of", fake)
    w = torch.tensor([1.0, 2.0], requires_grad=True)

    def problem(estimator):
        options = {"optimizer": diffopt.SGD(0.1), "steps": 3, "estimator": estimator}
        return diffopt.solve(lambda p: (p**4).sum(), w, **options).params.sum()

    rows = diffopt.compare(problem, [Reverse("graph")], repeats=2).rows
    assert {row.seconds for row in rows} == {0.125}
    assert set(seen) == {w.device}
