"""The public names: what ``dir(diffopt)`` shows, where the errors are, and that no name of a release has gone."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import diffopt
from diffopt import DiffoptError, errors

OF_0_1 = {
    "diffopt": """
        Adagrad Adam AdamW BatchesError CapturedTensorError Comparison CompileWarning ConformanceError DeviceError
        DiffoptError DisconnectedError DivergenceError DtypeError EstimatorError Finding GradModeError
        HyperparameterError ImplicitGradients InPlaceError Kept LeafError Leaves LiftError LinearSolveError LossError
        MissingDerivativeError NonFiniteGradientError NonFiniteLossError Optimizer OptimizerError Preconditioned
        ProximalGD RMSprop RandomnessError Report SGD Schedule SecondDerivativeError ShapeError Solution State
        StationarityError StepsError StructureError VmapError WrongDerivativeError check cite compare from_torch
        from_torchopt implicit implicit_gradients mean_over_tasks solve
    """,
    "diffopt.estimators": """
        Adjoint Binomial Claims Cotangents ESJacobian Estimator FirstOrder ForwardMode Implicit Keep Krylov MultiStep
        Reptile Reverse StepByStep Trajectory Truncated Unrolled
    """,
    "diffopt.linear_solve": """
        ConjugateGradient Dense GMRES LinearSolution LinearSolver Matvec Neumann Nystrom Tasks all_stopped check_options
        largest_eigenvalue leaves_like minimal_residual refuse_not_finite refuse_unsolved with_wide_vectors
    """,
    "diffopt.tasks": """
        BatchStatisticsNorm2d CIFARFS Caltech101 Conv4 DataError Episodes FC100 HyperCleaning MLP MNIST MetaTransfer
        MiniImageNet Omniglot PlainStages ProblemError Quadratic QuadraticHypergradient RaggedImages ResNet12
        ResidualStages Ridge Sinusoid Staged TieredImageNet data_folder functional sample_episodes
    """,
    "diffopt.testing": """
        Finding Report check_estimator check_optimizer
    """,
    "diffopt.errors": """
        BatchesError CapturedTensorError CompileWarning ConformanceError DeviceError DiffoptError DisconnectedError
        DivergenceError DtypeError EstimatorError GradModeError HyperparameterError InPlaceError LeafError LiftError
        LinearSolveError LossError MissingDerivativeError NonFiniteGradientError NonFiniteLossError OptimizerError
        RandomnessError SecondDerivativeError ShapeError StationarityError StepsError StructureError VmapError
        WrongDerivativeError
    """,
}
"""Everything that was public in commit e199cc0, by the module it was imported from."""
PUBLIC = [(module, name) for module, names in OF_0_1.items() for name in names.split()]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda x: x)
def test_every_public_name_of_0_1_can_be_imported_as_before(module: str, name: str) -> None:
    names: dict[str, object] = {}
    exec(f"from {module} import {name}", names)
    assert getattr(importlib.import_module(module), name) is names[name]


def test_they_are_at_hand_after_one_import() -> None:
    """In an interpreter of its own, where nothing else has imported anything."""
    expressions = [f"{module}.{name}" for module, name in PUBLIC]
    code = f"import diffopt\nfor x in {expressions}: eval(x)\nprint('all')"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert printed.stdout == "all\n", printed.stderr


def test_what_the_pages_of_0_1_called_a_constant_for_optimizers_is_there() -> None:
    from diffopt.optimizers import base

    assert diffopt.optimizer.EACH is base.EACH
    assert diffopt.optimizer.PREFIX is base.PREFIX
    assert diffopt.optimizer.TREE is base.TREE


# ------------------------------------------------------------------------------------------------------ what dir shows

SUBPACKAGES = {"distributed", "errors", "estimators", "linear_solve", "nn", "prox", "tasks", "testing"}


def test_dir_shows_the_public_names_and_nothing_of_the_inside() -> None:
    shown = {name for name in dir(diffopt) if not name.startswith("__")}
    assert shown == set(diffopt.__all__) | SUBPACKAGES
    modules = {name for name in shown if inspect.ismodule(getattr(diffopt, name))}
    assert modules == SUBPACKAGES
    assert "__version__" in dir(diffopt)


def test_dir_is_the_same_whatever_has_been_imported() -> None:
    code = (
        "import diffopt; print(*dir(diffopt)); import diffopt.cli, diffopt.tasks, diffopt.testing; print(*dir(diffopt))"
    )
    before, after = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert before == after == " ".join(dir(diffopt))


def test_no_module_of_the_inside_is_shown() -> None:
    inside = {module.name for module in pkgutil.iter_modules(diffopt.__path__)} - SUBPACKAGES
    shown = {name for name in dir(diffopt) if inspect.ismodule(getattr(diffopt, name))}
    assert len(inside) > 10
    assert inside & shown == set()


@pytest.mark.parametrize("name", sorted(SUBPACKAGES))
def test_a_subpackage_is_an_attribute(name: str) -> None:
    assert getattr(diffopt, name) is importlib.import_module(f"diffopt.{name}")


# ---------------------------------------------------------------------------------------------------- the errors


def classes() -> dict[str, type]:
    """Every error and warning that ``diffopt.errors`` defines."""
    return {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and kind.__module__ == errors.__name__
    }


def test_of_the_errors_the_list_of_public_names_has_only_the_base() -> None:
    listed = {name for name in diffopt.__all__ if isinstance(getattr(diffopt, name), type)}
    kinds = {name for name in listed if issubclass(getattr(diffopt, name), BaseException)}
    assert kinds == {"DiffoptError"}
    assert not {name for name in dir(diffopt) if name.endswith(("Error", "Warning"))} - {"DiffoptError"}


def test_the_errors_live_in_one_module_and_are_importable_from_the_package() -> None:
    assert sorted(errors.__all__) == sorted(classes())
    assert len(errors.__all__) > 30
    for name, kind in classes().items():
        assert getattr(diffopt, name) is kind
    assert all(issubclass(kind, DiffoptError) for name, kind in classes().items() if name.endswith("Error"))


def test_a_name_that_nothing_has_is_an_attribute_error() -> None:
    for name in ("estimator_", "nothing", "NoSuchError"):
        with pytest.raises(AttributeError, match=f"module 'diffopt' has no attribute '{name}'"):
            getattr(diffopt, name)
    with pytest.raises(ImportError, match="cannot import name 'NoSuchError'"):
        from diffopt import NoSuchError  # noqa: F401
