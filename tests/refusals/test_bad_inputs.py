"""Every bad input in the tables meets a typed error that says what was got, what was expected, and the mend."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import bad_inputs
import pytest
import torch
from bad_inputs import COMMAND_LINES, ROWS
from bad_row import MOST, backward, solve, tensor
from in_parts import was_raised_there

import diffopt
from diffopt import SGD, DiffoptError
from diffopt.estimators import Binomial, ForwardMode, Reverse, Unrolled


def state() -> tuple[object, ...]:
    """What a failed call must leave as it was, besides the tensors that it was given."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch._C._functorch.maybe_current_level(),
        torch._C._len_torch_function_stack(),
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_input_is_answered_by_a_typed_error(name: str) -> None:
    row, before = ROWS[name], state()
    error = row.check()
    assert "expected" in str(error)
    if was_raised_there(error):
        assert "" not in (error.got, error.expected)
        assert str(error) == f"{error.got}, expected {error.expected}{'; ' * bool(error.fix)}{error.fix}"
    # a loss that draws moves torch's generator as a plain loop would; nothing else moves it, and nothing else moves
    assert (state() != before) == row.moves
    assert state()[:-1] == before[:-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    bad_inputs.finished_run(folder)
    return folder / "run"


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with a run in ``run``, which a command may read but not change."""
    shutil.copytree(run, tmp_path / "run")
    yield tmp_path
    for path in run.iterdir():
        assert (tmp_path / "run" / path.name).read_bytes() == path.read_bytes(), f"{path.name} was changed"


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_a_bad_command_line_is_answered_in_one_line(folder: Path, name: str) -> None:
    command = COMMAND_LINES[name]
    argv = command.argv(folder)
    copy = folder / "copy"
    before = {path.name: path.read_bytes() for path in copy.iterdir()} if copy.exists() else {}
    code, error = bad_inputs.answer(argv)
    line = error.replace(str(folder), "DIR")
    assert code == 2
    assert re.fullmatch(r"diffopt[^\n]*: error: [^\n]+\n", line), line
    assert "Traceback" not in line
    assert re.search(command.says, line), line
    assert len(line) < MOST
    for part, content in before.items():
        assert (copy / part).read_bytes() == content, f"{part} was changed"


def test_the_tables_are_as_long_as_they_claim_to_be_and_no_name_stands_twice() -> None:
    assert len(ROWS) == sum(len(table.refused.rows) for table in bad_inputs.TABLES) >= 500
    assert len(COMMAND_LINES) >= 40


def test_every_error_of_the_library_has_a_row() -> None:
    """But for those of ``diffopt.check``, batteries, adapters, ranks and the disk, which have tests of their own."""
    classes = {kind for kind in vars(diffopt).values() if isinstance(kind, type) and issubclass(kind, DiffoptError)}
    apart = {DiffoptError, diffopt.WrongDerivativeError, diffopt.SmoothnessError, diffopt.PrecisionError}
    apart |= {diffopt.ConformanceError, diffopt.LiftError, diffopt.RanksError, diffopt.StorageError}
    missing = classes - {row.error for row in ROWS.values()} - apart
    assert not missing


def test_the_list_can_be_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: ROWS[f"loss: {name}"] for name in ("vector", "number", "nan_params")}
    monkeypatch.setattr(bad_inputs, "ROWS", few)
    monkeypatch.setattr(bad_inputs, "COMMAND_LINES", {"command_fly": COMMAND_LINES["command_fly"]})
    bad_inputs.main()
    told = capsys.readouterr().out
    assert all(name in told for name in few)
    assert "LossError: the inner loss returned a float64 tensor of shape (2,)" in told
    assert "diffopt: error: argument COMMAND: invalid choice: 'fly'" in told
    assert "3 bad inputs and 1 bad command lines" in told


# --------------------------------------------------------------------------- what a failed call leaves behind


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled(), ForwardMode(), Binomial(1)])
def test_after_a_failed_call_the_same_tensors_give_the_same_result(estimator: diffopt.estimators.Estimator) -> None:
    """The error comes in the last step; no tensor given to the call has moved, nor has it a gradient."""
    w, x = tensor(1, 2).requires_grad_(), tensor(0.5, 0.3).requires_grad_()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batches = tensor(1, 1, 1).requires_grad_()

    def loss(w: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (w - x).square().sum() * b

    def run(batches: torch.Tensor) -> list[torch.Tensor]:
        found = diffopt.solve(loss, w, x, optimizer=SGD(lr), steps=3, batches=batches, estimator=estimator).params
        return [found, *torch.autograd.grad(found.square().sum(), [w, x, lr])]

    before = run(batches)
    given = [value.detach().clone() for value in (w, x, lr)]
    with pytest.raises(diffopt.DivergenceError):
        run(tensor(1, 1, float("inf")))
    assert all(torch.equal(value, old) for value, old in zip((w, x, lr), given, strict=True))
    assert all(value.grad is None for value in (w, x, lr, batches))
    assert all(torch.equal(new, old) for new, old in zip(run(batches), before, strict=True))


def test_random_numbers_after_a_failure_go_on_where_a_plain_loop_would_be() -> None:
    """As ``docs/errors.md`` says: a failed rollout has drawn what its steps drew; a failed replay draws nothing."""
    torch.manual_seed(0)
    torch.rand(2), torch.rand(2)
    expected = torch.rand(3)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (w * torch.rand(2)).sum() ** 2 * 1e200

    torch.manual_seed(0)
    with pytest.raises(diffopt.DivergenceError):
        solve(loss, optimizer=SGD(1e200), steps=2)
    assert torch.equal(torch.rand(3), expected)

    numbers = iter(range(100))
    torch.manual_seed(0)
    with pytest.raises(diffopt.RandomnessError):
        backward(loss=lambda w: (w * torch.rand(2)).sum() * next(numbers), estimator=Reverse(1), steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_an_error_names_what_a_long_path_leads_to() -> None:
    params = {"layer1": {"weight": torch.ones(2, dtype=torch.int32)}}
    with pytest.raises(diffopt.LeafError, match=r"params\['layer1'\]\['weight'\] is a int32 tensor"):
        solve(params=params)
