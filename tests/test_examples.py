"""Every example runs in quick mode, and what its docstring says one sees is there; in full where the data is."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import pytest

Run = Callable[..., dict[str, float]]


@pytest.fixture
def folder(checkout: Path) -> Path:
    return checkout / "examples"


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls an example's ``main`` in quick mode and gives what it returns; it has to print, and to draw its picture."""
    monkeypatch.syspath_prepend(folder)
    mpl.use("Agg")

    def call(name: str, picture: bool = True, **options: object) -> dict[str, float]:
        module = importlib.import_module(name)
        assert Path(module.__file__ or "").parent == folder
        results: dict[str, float] = module.main(quick=True, **({"out": tmp_path} if picture else {}), **options)
        assert capsys.readouterr().out.strip()
        pictures = [(path.name, path.read_bytes()[:4]) for path in tmp_path.iterdir()]
        assert pictures == ([(f"{name}.png", b"\x89PNG")] if picture else [])
        return results

    return call


def test_maml_and_anil_adapt_better_than_random_parameters(run):
    error = run("maml_anil")
    assert max(error["MAML"], error["ANIL"]) < 0.9 * error["random"]


def test_penalties_of_single_features_find_the_decoys_at_any_size(run):
    found = run("feature_penalties")
    assert found["learned"] > found["common"]
    assert found["decoys"] > 1  # log-penalties, all the same at first
    assert found["cosine"] > 0.999


def test_learned_weights_win_back_most_of_what_false_labels_cost(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFOPT_DATA", str(tmp_path))  # no MNIST there: digits
    accuracy = run("hyper_cleaning")
    assert accuracy["noisy"] < accuracy["oracle"]
    assert accuracy["ours"] - accuracy["noisy"] > 0.5 * (accuracy["oracle"] - accuracy["noisy"])
    assert accuracy["f1"] > 0.85


def test_freer_step_sizes_adapt_better(run):
    error = run("learned_learning_rates")
    assert error["one per weight"] < error["one, fixed"]


@pytest.mark.slow
def test_the_meta_network_trusts_the_right_teacher_with_every_window(run):
    found = run("meta_network_loss")
    for window in (1, 2, 4):
        assert found[f"trust {window}"] > 0.55
        assert found[f"window {window}"] > found["alike"]


def test_scales_of_a_scikit_learn_solution_follow_its_gradient(run):
    found = run("implicit_sklearn")
    assert found["error"] < 1e-5  # a central difference of step 1e-4
    assert found["last"] < found["first"]
    assert found["after"] < found["before"]


@pytest.mark.slow
def test_distilled_images_teach_more_than_real_ones(run):
    found = run("distillation")
    assert found["last"] < 0.8 * found["first"]
    assert found["few"] < found["distilled"] < found["all"]


def test_a_learned_loss_beats_squares_on_spoilt_targets(run):
    error = run("learned_loss")
    assert error["learned"] < 0.2 * error["squared"]


def test_an_optimizer_of_ones_own_is_differentiated_exactly_and_learned(run):
    found = run("custom_optimizer", picture=False)
    assert found["error"] < 1e-12  # float64, five steps
    assert found["all four"] < found["lr"] < found["nothing"]


@pytest.mark.slow
def test_an_estimator_of_ones_own_is_unbiased_where_truncation_is_not(run):
    error = run("custom_estimator", picture=False)
    assert error["CoinToss(0.5), mean of 64"] < 0.2 * error["Truncated(10)"]
    assert error["CoinToss(0.5), mean of 64"] < 0.3 * error["CoinToss(0.5), mean of 1"]


def test_a_training_loop_learns_shifts_against_rare_classes(run):
    found = run("training_loop")
    assert found["rare shift"] < -0.1
    assert found["tuned"] > found["plain"]


def test_windows_of_one_training_go_on_and_win_back_what_false_labels_cost(run):
    found = run("online_windows")
    assert found["states"] < 1e-5  # single precision
    assert found["parameters"] > 0.1
    assert found["cut 1"] < found["cut 60"]
    assert found["window 1"] > found["plain"] + 0.02


def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_bits(run):
    assert run("resume", picture=False) == {"same": 1, "stops": 3}


@pytest.mark.slow
def test_weights_learned_one_step_ahead_fall_with_the_loss(run):
    found = run("meta_weight_net")
    assert found["ahead"] < 1e-5
    assert found["false"] < 0.6 < found["true"]
    assert found["weighted"] > found["plain"]


@pytest.mark.slow
def test_one_step_solves_with_statistics_are_a_loop_by_hand(run):
    found = run("maml_plus_plus")
    assert found["exactness"] < 1e-12
    assert found["every step, 5"] < found["every step, 1"]


def test_attributions_predict_what_training_without_images_does(run):
    score = run("attribution")
    assert score["attribute"] > 0.9
    assert score["gradient product"] < score["attribute"] - 0.2


def test_the_loop_runs_under_accelerate(run):
    pytest.importorskip("accelerate")
    assert run("accelerate_recipe", picture=False)["rare shift"] < -0.1


@pytest.mark.slow
def test_accelerate_averages_hypergradients_over_processes(folder, checkout):
    pytest.importorskip("accelerate")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(folder / "accelerate_recipe.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "2 process(es)" in done.stdout
    assert "differ between processes by at most 0.0e+00" in done.stdout


@pytest.mark.data
@pytest.mark.slow
def test_hyper_cleaning_of_mnist_wins_back_six_points(folder, data_folder, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(folder)
    accuracy = importlib.import_module("hyper_cleaning").main(out=tmp_path, data_dir=data_folder)
    assert accuracy["ours"] - accuracy["noisy"] >= 0.06
    assert accuracy["ours"] > accuracy["validation"]


@pytest.mark.slow
def test_an_example_runs_by_itself_and_leaves_its_picture_where_it_is_told(folder, checkout, tmp_path):
    command = [sys.executable, str(folder / "training_loop.py"), "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "MPLBACKEND": "Agg"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert "learned shifts" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["training_loop.png"]


def test_examples_are_short_and_listed_and_say_how_to_run_them(folder):
    table = (folder / "README.md").read_text(encoding="utf-8")
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        docstring, first = ast.get_docstring(tree) or "", tree.body[0].end_lineno or 0
        code = [line for line in text.splitlines()[first:] if line.strip()]
        assert len(code) <= 100, path.name
        for promised in ("\nMeasured", f"examples/{path.name}", "What to see"):
            assert promised in docstring, f"{path.name}: {promised}"
        assert f"[{path.name}]({path.name})" in table
