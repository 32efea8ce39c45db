"""The layout of the checkout: arrows between the layers go one way, and packaging names every package once.

The source is parsed, never imported, so imports inside functions and under ``TYPE_CHECKING`` count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_places import Places
from faults import FAULTS
from mutations import NAMES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LINKS = {"diffopt/estimators": "../estimators", "diffopt/tasks": "../tasks"}
FOLDERS = {"diffopt": "diffopt", "estimators": "diffopt.estimators", "tasks": "diffopt.tasks"}
PRIVATE = ["torch._functorch", "torch._C._functorch", "torch.utils._pytree"]
TRANSFORMS = ["torch.func", "torch.vmap", "functorch", *PRIVATE]


@pytest.fixture(scope="session")
def pyproject(checkout: Path) -> dict[str, Any]:
    return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def files(checkout: Path) -> dict[str, Path]:
    """Every module by its installed name; what lies behind the links comes once, under its own folder."""
    found = {
        ".".join([package, *path.relative_to(checkout / folder).with_suffix("").parts]): path
        for folder, package in FOLDERS.items()
        for path in sorted((checkout / folder).rglob("*.py"))
        if path.resolve().is_relative_to(checkout / folder)
    }
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


@pytest.fixture(scope="session")
def trees(files: dict[str, Path]) -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in files.items()}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


FLOORS = [
    ["errors"],
    ["tensors"],
    ["optimizers", "linear_solve", "nn", "retraining", "distributed"],
    ["lifting", "rollout"],
    ["adjoint"],
    ["calls", "estimators"],
    ["checking", "comparing"],
    ["tasks", "testing"],
    ["facade"],
    ["framework"],
    ["experiments"],
    ["commands"],
]
"""The floors of the house, from the ground up: a folder may import those on the floors below it, and nothing else."""


def floor(module: str) -> str:
    """The folder of a module; files beside the folders are the calls, the facade (``__init__``), the command line."""
    parts = module.split(".")[1:]
    if not parts:
        return "facade"
    if parts[:2] == ["experiments", "framework"]:
        return "framework"
    if any(parts[0] in folders for folders in FLOORS):
        return parts[0]
    return "commands" if parts[0] in {"cli", "__main__"} else "calls"


def imports(tree: ast.Module) -> Iterator[str]:
    """The full name of everything imported: ``from a import b`` gives ``a.b``, module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def mentions(tree: ast.Module) -> Iterator[str]:
    """Everything imported, and every dotted name in the code, such as ``torch.func.vmap``."""
    yield from imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def arrows(trees: dict[str, ast.Module]) -> Iterator[tuple[str, str]]:
    """The arrows inside the library: a module, and what it imports from ``diffopt``."""
    for module, tree in trees.items():
        yield from ((module, name) for name in imports(tree) if within(name, "diffopt"))


def target(name: str, trees: dict[str, ast.Module]) -> str:
    """The floor of what is imported: a name in a module is the module's."""
    while name not in trees:
        name = name.rpartition(".")[0]
    return floor(name)


def test_arrows_between_folders_go_one_way(trees):
    height = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
    wrong = []
    for module, name in arrows(trees):
        own, other = floor(module), target(name, trees)
        if own != other and height[other] >= height[own]:
            wrong.append(f"{module} ({own}) imports {name} ({other})")
    assert wrong == []


def test_estimators_never_import_each_other(trees):
    wrong = [
        f"{module} imports {name}: what two estimators share belongs in the core"
        for module, name in arrows(trees)
        if module.startswith("diffopt.estimators.") and within(name, "diffopt.estimators")
    ]
    assert wrong == []


def test_imports_use_the_installed_name(trees):
    relative = [
        f"{module}, line {node.lineno}"
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    bare = [
        f"{module} imports {name}"
        for module, tree in trees.items()
        for name in imports(tree)
        if within(name, "estimators") or within(name, "tasks")
    ]
    assert relative == []
    assert bare == [], "a second copy of every class would exist"


def test_only_tree_imports_optree(trees):
    wrong = [
        module
        for module, tree in trees.items()
        if module != "diffopt.tensors.tree" and any(within(name, "optree") for name in imports(tree))
    ]
    assert wrong == []


def test_only_one_module_touches_torch_transforms(trees):
    wrong = [
        f"{module} uses {name}"
        for module, tree in trees.items()
        if floor(module) not in {"tasks", "testing", "framework", "experiments", "commands"}
        and module != "diffopt.tensors.transforms"
        for name in mentions(tree)
        if any(within(name, transform) for transform in TRANSFORMS)
    ]
    assert wrong == []


def test_every_folder_of_modules_is_named_in_pyproject(checkout, files, pyproject):
    folders = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        folders[package] = path.parent.relative_to(checkout).as_posix()
    setuptools = pyproject["tool"]["setuptools"]
    assert setuptools["package-dir"] == folders
    assert sorted(setuptools["packages"]) == sorted(folders)


SHORT = ["truncated", "first_order", "reptile", "implicit", "multi_step", "unrolled"]
LONG = ["binomial", "krylov", "forward_mode", "es_jacobian"]


@pytest.mark.parametrize(
    ("estimator", "most"), [*((estimator, 90) for estimator in SHORT), *((estimator, 110) for estimator in LONG)]
)
def test_an_estimator_is_short(files, estimator, most):
    """Docstrings and checks of options included; Neumann's is ``Implicit(Neumann())``."""
    assert len(files[f"diffopt.estimators.{estimator}"].read_text(encoding="utf-8").splitlines()) <= most


def test_every_estimator_has_a_length(files):
    estimators = {name.removeprefix("diffopt.estimators.") for name in files if name.startswith("diffopt.estimators.")}
    assert estimators == {*SHORT, *LONG}


def test_every_deliberate_fault_has_one_line_to_stand_in(checkout):
    """``tests/mutations.py``, which is run by hand, stops at the first that has not."""
    places = Places(checkout)
    assert [fault.what for fault in FAULTS if len(places.found(fault)) != 1] == []
    for fault in FAULTS:
        assert ast.parse(places.planted(*places.found(fault), fault)), f"{fault.what}: no program"


def test_every_deliberate_fault_has_tests_that_go_first():
    assert {fault.tests for fault in FAULTS if not any(name.startswith(fault.tests) for name in NAMES)} == set()


@pytest.mark.parametrize(("link", "target"), LINKS.items())
def test_the_links_point_at_the_folders(checkout, link, target):
    path = checkout / link
    assert path.is_symlink(), f"{link} must be a symbolic link (on Windows: git config core.symlinks true)"
    assert path.readlink() == Path(target)
    assert (path / "__init__.py").is_file()


def test_the_version_is_the_same_in_both_places(pyproject, trees):
    versions = [
        ast.literal_eval(node.value)
        for node in trees["diffopt"].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert versions == [pyproject["project"]["version"]]
