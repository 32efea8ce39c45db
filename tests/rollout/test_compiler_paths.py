"""``compile=True`` where a path has a space, at which torch's compiler cannot read its own command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import PATIENCE

from diffopt.rollout import compiler_paths

PROGRAM = """
import warnings, torch, diffopt
w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    end = diffopt.solve(lambda w: (w**2).sum(), w, optimizer=diffopt.SGD(0.05), steps=3, compile=True).params
    end.sum().backward()
assert torch.allclose(w.grad, torch.full((2,), 0.9**3, dtype=torch.float64)), w.grad
assert all(x.category is diffopt.CompileWarning for x in caught), [str(x.message) for x in caught]
print(torch.__file__, *sorted({str(x.message) for x in caught}), sep="\\n")
"""


def run(
    folder: Path, python: Path | str = sys.executable, cwd: Path | None = None, **environment: str
) -> tuple[Path, list[str]]:
    """Where torch was, and what was warned of, in a process whose other folders have no space."""
    folders = {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    done = subprocess.run(
        [str(python), "-c", PROGRAM],
        env={**os.environ, **folders, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    where, *warned = done.stdout.splitlines()
    return Path(where), warned


def failure(*command: str, output: str = "") -> RuntimeError:
    """What torch raises of a failed command, the command among its causes."""
    error = RuntimeError(f"CppCompileError: C++ compile error\n\nCommand:\n{' '.join(command)}\n\nOutput:\n{output}")
    error.__context__ = subprocess.CalledProcessError(1, list(command))
    return error


def test_only_a_path_that_came_apart_is_blamed(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/a/b c/d")
    assert compiler_paths.any_space()
    for broken in (("g++", "/a/b", "c/d/x.cpp"), ("g++", "-L/a/b", "c/d")):
        assert "TORCHINDUCTOR_CACHE_DIR is '/a/b c/d'" in str(compiler_paths.explanation(failure(*broken)))
    whole = failure("g++", "/a/b c/d/x.cpp", "-L/a/b c/d")
    assert compiler_paths.explanation(whole) is None
    assert compiler_paths.explanation(RuntimeError("/a/b c/d")) is None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/a/bc/d")
    assert compiler_paths.explanation(failure("g++", "/a/b", "c/d/x.cpp")) is None


@pytest.fixture
def spaced(tmp_path):
    folder = tmp_path / "a path with a space"
    folder.mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize(
    ("variable", "told"),
    [("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR is"), ("TMPDIR", "temporary files go to")],
)
def test_folders_of_the_compiler(tmp_path, spaced, variable, told):
    _, warned = run(tmp_path, **{variable: str(spaced)})
    if not warned:
        pytest.skip("this version of torch compiles there")
    (line,) = warned
    assert f"a path with a space, and {told} '{spaced}': set " in line
    assert line.endswith("the solve runs without")


@pytest.mark.slow
@pytest.mark.compiler
def test_the_environment_itself(tmp_path, spaced):
    """By a link to it: Python takes the path by which it was called for the one at which it stands."""
    (spaced / "environment").symlink_to(sys.prefix)
    where, warned = run(tmp_path, spaced / "environment" / Path(sys.executable).relative_to(sys.prefix))
    if not warned or " " not in str(where):
        pytest.skip("torch stands elsewhere, or this version of it compiles there")
    (line,) = warned
    assert f"a path with a space, and torch stands in '{where.parent}': make the environment anew" in line


@pytest.mark.slow
@pytest.mark.compiler
def test_the_folder_in_which_a_program_runs_may_have_a_space(tmp_path, spaced):
    assert run(tmp_path, cwd=spaced)[1] == []
