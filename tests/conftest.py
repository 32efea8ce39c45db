"""Settings every test runs under, and the fixtures that every kind of test may need."""

from __future__ import annotations

import functools
import gc
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from interpreted import Interpreted

import diffopt
from diffopt.cli import main
from diffopt.rollout import compiler_paths, known_programs

# One thread: the tensors are small, several test processes share the machine, and sums keep their order.
torch.set_num_threads(1)

# No deadline: the first call of a torch transform takes a second, which says nothing about the test.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("ci", derandomize=True, max_examples=50, database=None, **common)
settings.register_profile("dev", max_examples=25, **common)
settings.register_profile("nightly", max_examples=1000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="module", autouse=True)
def _others_are_old() -> None:
    """Let the garbage collector pass over what other modules have made and still hold: a million objects.

    What measures memory, and a refusal of captured tensors, collects garbage first, which would take half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the checkout; a test that asks for it is skipped where only the installed library is."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".ci" / "run").is_file():
        pytest.skip("needs the checkout, and these tests run outside it")
    return root


@functools.cache
def cannot_compile() -> str | None:
    """Why torch's compiler cannot run here, if a path with a space is why; tried only where there is one."""
    if not compiler_paths.any_space():
        return None
    w = torch.ones(1, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # between these checkpoints steps are compiled one by one, as no program is that stands in for inductor's
        by = {"optimizer": diffopt.SGD(0.1), "estimator": diffopt.estimators.Reverse("log")}
        diffopt.solve(lambda w: w.square().sum(), w, steps=3, compile=True, **by)
    told = (str(warned.message) for warned in caught)
    return next((message for message in told if "a path with a space" in message), None)


@pytest.fixture(autouse=True)
def _skip_what_torch_cannot_compile(request: pytest.FixtureRequest) -> None:
    reason = cannot_compile() if request.node.get_closest_marker("compiler") else None
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _programs_are_interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solve with ``compile=True`` is traced as a whole, and inductor asked by the tests only that ask for it."""
    if "inductor" not in request.fixturenames:
        monkeypatch.setattr(known_programs, "Program", Interpreted)


@pytest.fixture
def inductor() -> None:
    """Programs of whole solves are compiled by inductor, which takes many seconds."""


@pytest.fixture
def steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No solve is a program as a whole: its steps are compiled one by one."""
    monkeypatch.setattr(known_programs, "find", lambda *given: None)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, with exit code 2 and one line on stderr, which it returns."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"diffopt[^\n]*: error: [^\n]+\n", error), error
        return error

    return run


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """Numbers that a library makes for itself are in float64 meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the real data: ``DIFFOPT_DATA``, or a ``data`` folder next to the checkout."""
    checkout = Path(__file__).resolve().parents[1]
    named = os.environ.get("DIFFOPT_DATA")
    candidates = [Path(named)] if named else sorted(checkout.parent.glob("*/data"))
    for folder in candidates:
        if (folder / "omniglot_28.npz").is_file():
            return folder
    pytest.skip("the real data is not here; say where it is with the environment variable DIFFOPT_DATA")
