"""The pages of the site without building it: their programs, their tables and pictures, and what they point at."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import diffopt
from diffopt import cli
from diffopt.commands.reproduce import changed
from diffopt.comparing.comparison import brief
from diffopt.estimators import Binomial, Estimator, FirstOrder, Krylov, MultiStep, Reverse, Truncated
from diffopt.experiments.framework import catalogue

CELL = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def module(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules beside the pages, by name."""
    monkeypatch.syspath_prepend(str(checkout / "docs"))
    return importlib.import_module


@pytest.fixture(scope="module")
def pages(checkout: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((checkout / "docs").glob("*.md"))}


def run(page: str) -> dict[str, Any]:
    """Run the programs of a page, without the options and magics that only a notebook knows, and return its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in CELL.findall(page):
        plain = re.sub(r"^(:tags:|%).*$", "", cell, flags=re.MULTILINE)
        exec(compile(plain, "page", "exec", dont_inherit=True), names)
    return names


@pytest.mark.usefixtures("float64_by_default")
def test_the_programs_of_other_libraries_agree(pages):
    pytest.importorskip("higher")
    pytest.importorskip("torchopt")
    names = run(pages["coming_from"])
    other = [names[name] for name in ("by_higher", "by_torchopt")]
    for theirs in other:
        for a, b in zip(names["by_diffopt"], theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    assert names["by_diffopt"][0].norm() > 1e-3


@pytest.mark.slow
def test_the_optimizer_rule_and_solver_of_ones_own_pass_the_battery(pages):
    names = run(pages["write_your_own"])
    assert names["report"].broken == ()
    lion = names["Lion"](lr=0.3, momentum=0.8)
    w = diffopt.solve(lambda w: w.sin().sum(), torch.ones(2).double(), optimizer=lion, steps=1).params
    assert torch.allclose(w, 1 - 0.3 * torch.tanh(10 * 0.2 * torch.ones(2).double().cos()), rtol=1e-12)
    assert names["found"].converged


@pytest.mark.usefixtures("float64_by_default")
def test_games_roots_and_constraints(pages):
    names = run(pages["games"])
    assert abs(names["wrong"] - names["slope"]) > abs(names["slope"])  # what detaching the other player costs
    assert abs(names["logit"].sigmoid().item() - 0.7) < 0.02
    assert float(names["error"].detach()) <= names["grid"][names["best"]]  # of the Lasso: better than the grid's best
    assert names["kept"] < 20
    assert torch.allclose(names["share"].detach(), torch.tensor([6.0, 3.0, 2.0]) / 11)


@pytest.mark.usefixtures("float64_by_default")
def test_outside_solvers(pages):
    names = run(pages["solvers"])
    for other in ("by_scipy", "through_six_steps", "by_implicit"):
        assert torch.allclose(names[other], names["by_lbfgs"], rtol=1e-5)
    assert names["damping"].item() < -1


@pytest.mark.slow
@pytest.mark.usefixtures("float64_by_default")
def test_the_page_of_the_inner_loop_goes_on_looks_inside_and_stops(pages, capsys):
    """Its cells assert what they say; here, that the numbers it prints are those that the text speaks of."""
    pytest.importorskip("rich")
    names = run(pages["inner_loop"])
    assert names["second"].state.step == 10
    assert names["off"] > 0.1  # of a chain of params
    assert len(names["told"]) == 25
    printed = capsys.readouterr().out
    for said in ("`scale`", "Truncated", "the module's own: 0", "the last state is that of step 20"):
        assert said in printed


@pytest.mark.slow
def test_the_front_page_weighs_examples_and_compares_estimators(pages, capsys):
    page = pages["index"].replace("diffopt.compare(", "comparison = diffopt.compare(")
    names = run(page)
    assert names["accuracy"](names["trained"]) > names["accuracy"](names["before"]) + 0.02
    assert re.search(r"of a wrong label: 0\.[01]\d, of a right one: 0\.[6-9]\d", capsys.readouterr().out)
    graph, root, krylov, truncated, first_order = (row.relative_error for row in names["comparison"].complete())
    assert graph == 0
    assert root < 1e-5
    assert krylov < 1e-2 < 0.3 < truncated < first_order == 1  # which has no derivative by what only the loss reads
    assert names["comparison"]._repr_markdown_() == names["comparison"].to_markdown()


def test_the_front_page_links_every_thing_that_only_this_library_does(pages):
    lines = re.findall(r"^- \*\*.*?(?=^- |^$)", pages["index"], re.DOTALL | re.MULTILINE)
    assert 3 <= len(lines) <= 4
    for line in lines:
        assert set(re.findall(r"\]\((\w+)\.md\)", line)) & set(pages), line
    (commands,) = re.findall(r"```sh\n(.*?)```", pages["index"], re.DOTALL)
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == ["pip install '.[cli]'", "diffopt demo"]
    assert cli.build_parser().parse_args(["demo"])


@pytest.mark.slow
def test_the_page_to_start_leads_from_torch_optim_and_from_modules(pages):
    without_picture = re.sub(r"^import matplotlib.*?(?=^```$)", "", pages["start"], flags=re.DOTALL | re.MULTILINE)
    names = run(without_picture.replace("for _ in range(40)", "for _ in range(2)"))
    assert list(names["params"]) == ["2.weight", "2.bias"]
    shown = re.findall(r"diffopt\.from_torch\((\S+?),", pages["start"])
    assert {"torch.optim.NAdam", "TheClass"} == set(shown)
    torch_names = {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad"}
    (row,) = re.findall(r"^\| `torch\.optim\.SGD\(.*$", pages["start"], re.MULTILINE)
    assert torch_names <= set(re.findall(r"\w+", row))
    assert all(issubclass(getattr(diffopt, name), diffopt.Optimizer) for name in torch_names)


def test_pages_import_what_the_reference_lists(pages):
    listed = set(re.findall(r"^   (diffopt[\w.]*)$", pages["reference"], re.MULTILINE))
    modules = [name for name in listed if re.fullmatch(r"diffopt(\.[a-z_]+)?", name)]
    listed |= {f"{name}.{x}" for name in modules for x in importlib.import_module(name).__all__}
    used = [
        f"{module}.{name}"
        for page in pages.values()
        for module, names in re.findall(r"^from (diffopt[\w.]*) import (\([^)]*\)|.*)$", page, re.MULTILINE)
        for name in re.findall(r"\w+", names)
    ]
    used += re.findall(r"\b(diffopt\.optimizer\.[A-Z]+)\b", "".join(pages.values()))
    assert len(used) > 20
    assert set(used) <= listed


def test_the_page_of_the_commands_names_what_they_know(pages):
    """Every command has its section, every flag on the page exists, and what the page runs can be parsed."""
    page, parser = pages["commands"], cli.build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sections = dict(re.findall(r"^## `diffopt (\w+)`$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert sorted(sections) == sorted(commands.choices)
    for name, section in sections.items():
        known, pending = {"--help"}, [commands.choices[name]]
        for action in (action for each in pending for action in each._actions):
            known |= set(action.option_strings)
            pending += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
        own = re.sub(r"torchrun .* -m diffopt", "diffopt", section)
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", own)) <= known, name
    flags = {flag for action in commands.choices["reproduce"]._actions for flag in action.option_strings}
    for flag in ("--list", "--quick", "--full", "--resume", "--minutes", "--set", "--dataset", "--out", "--data-dir"):
        assert flag in flags
        assert flag in sections["reproduce"], flag
    lines = re.findall(r'^(?:show\("|diffopt )(.*?)(?:"\)| +#.*|)$', page, re.MULTILINE)
    assert len(lines) == 11
    for line in lines[1:]:
        given = parser.parse_args(shlex.split(line))
        if line.startswith("reproduce") and given.experiment:
            changed(catalogue.experiment(given.experiment).standard, tuple(getattr(given, "changed", ())))
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert codes == [0, cli.FAILED, cli.INTERRUPTED]


def test_the_page_that_says_how_to_install_knows_the_wheel_and_its_extras(pages, checkout: Path):
    text = (checkout / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"^\[project.optional-dependencies\]$(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    declared = dict(re.findall(r"^(\w+) = \[(.*?)\]", extras.replace("[tasks,plot]", ""), re.MULTILINE | re.DOTALL))
    shown = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", pages["start"], re.MULTILINE))
    assert set(shown) == {"tasks", "plot", "cli"} < set(declared)
    for extra, packages in shown.items():
        named = set(re.findall(r"[\w-]+", packages)) - {"both"}
        assert named == set(re.findall(r'"([\w-]+)', declared[extra])) - {"torch-diffopt"}
    assert set(re.findall(r"\S*\.whl", pages["start"])) == {
        f"./torch_diffopt-{diffopt.__version__}-py3-none-any.whl",
        f"'./torch_diffopt-{diffopt.__version__}-py3-none-any.whl",
    }
    assert not re.search(r"(?<!Never `)pip install diffopt", "".join(pages.values()))


def test_every_page_has_its_place_in_the_contents(pages):
    listed = re.findall(r"^(\w+)$", "\n".join(re.findall(r"```\{toctree\}(.*?)```", pages["index"], re.DOTALL)), re.M)
    assert sorted(listed) == sorted(set(pages) - {"index"})


def test_what_pages_and_docstrings_cite_exists(checkout: Path, pages):
    tags = set(re.findall(r"\\tag\{([\w.]+)\}", pages["derivations"]))
    anchors = {f"equation-{tag.replace('.', '-')}" for tag in tags}
    anchors |= set(re.findall(r"^\(([\w-]+)\)=$", pages["derivations"], re.MULTILINE))
    links = {link for page in pages.values() for link in re.findall(r"\]\(#((?:equation|derivations)-[\w-]+)\)", page)}
    assert len(links) > 15
    assert links <= anchors
    bib = (checkout / "docs" / "references.bib").read_text(encoding="utf-8")
    papers = {
        key for page in pages.values() for part in re.findall(r"\{cite:\w\}`(.*?)`", page) for key in part.split(",")
    }
    assert len(papers) > 10
    assert papers <= set(re.findall(r"^@\w+\{(\w+),$", bib, re.MULTILINE))


def test_what_docstrings_cite_of_the_derivations_exists(module, checkout: Path, pages):
    pytest.importorskip("sphinx")
    equations = module("extensions.equations")
    source = [pages["derivations"]]
    equations.add_anchors(None, "derivations", source)
    anchors = set(re.findall(r"^\(([\w-]+)\)=$", source[0], re.MULTILINE)) | {"derivations"}
    cited: set[str] = set()
    for folder in ("diffopt", "estimators", "tasks"):
        for file in (checkout / folder).rglob("*.py"):
            lines = file.read_text(encoding="utf-8").split("\n")
            equations.link_docstring(None, "", "", None, None, lines)
            cited |= set(re.findall(r":ref:`[^`]*<((?:equation|derivations)[\w-]*)>`", "\n".join(lines)))
    assert {"equation-3-1", "equation-11c", "derivations-6-6", "derivations-2-1", "equation-1-3"} <= cited
    assert cited <= anchors


@pytest.mark.parametrize(
    ("estimator", "amount"),
    [
        (Reverse("sqrt"), lambda s: 1),
        (Truncated(2), lambda s: set(s) <= {3, 4}),
        (Binomial(2), lambda s: len(s) <= 2),
        (Binomial(1, window=2), lambda s: len(s) <= 1 and set(s) <= {3, 4}),
        (FirstOrder(), lambda s: not s),
        (MultiStep(2), lambda s: 2 ** len(s) * (set(s) <= {1, 3})),
    ],
    ids=lambda x: brief(x) if isinstance(x, Estimator) else "",
)
def test_the_pictures_show_the_terms_of_the_definitions(module, estimator, amount):
    idea = module("draw_idea")
    found = idea.terms(estimator, steps=4)
    assert set(found) == {s for size in range(5) for s in combinations(range(1, 5), size)}
    for s, value in found.items():
        assert value == pytest.approx(float(amount(s)), abs=1e-12)


def test_the_terms_of_an_estimator_that_weighs_them_are_not_zero_and_one(module):
    found = module("draw_idea").terms(Krylov(2), steps=4)
    assert any(abs(value - round(value)) > 1e-3 for value in found.values())


def test_the_front_is_what_nothing_beats(module):
    points = [(float(x), float(y)) for x, y in torch.rand(40, 2, generator=torch.Generator().manual_seed(0))]
    kept = {p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)}
    front = module("draw_pareto").front(points)
    assert set(front) == kept
    assert 1 < len(front) < 40


EXPECTED = {
    "Linear, Tanh": ("ok", "ok", "ok"),
    "LayerNorm": ("ok", "ok", "ok"),
    "BatchNorm2d, running statistics, training": ("ok", "`VmapError`", "`VmapError`"),
    "Dropout": ("ok", "`RandomnessError`", "`RandomnessError`"),
    "scaled_dot_product_attention": ("`MissingDerivativeError`",) * 3,
    "weight_norm": ("**wrong**",) * 3,
    "weight norm, written out": ("ok", "ok", "ok"),
    "LSTM": ("ok", "`VmapError`", "`VmapError`"),
    "LSTMCell, in a loop": ("ok", "`VmapError`", "`VmapError`"),
    "GRUCell, in a loop": ("ok", "ok", "ok"),
    "linalg.norm of zero": ("`NonFiniteGradientError`",) * 3,
}


@pytest.mark.filterwarnings("ignore")  # torch's, on what it does not batch well
@pytest.mark.parametrize("name", EXPECTED)
def test_the_table_of_layers(module, name):
    table = module("layer_table")
    (case,) = [case for case in table.CASES if case.name == name]
    row = table.measure(case)
    assert (row.twice, row.tasks, row.steps) == EXPECTED[name]
    assert bool(row.fix) == (EXPECTED[name] != ("ok", "ok", "ok"))


def test_the_verification_page_names_tests_that_exist(checkout: Path, pages):
    named = set(re.findall(r"`(test_\w+)`", pages["verification"]))
    assert len(named) > 15
    assert named <= {path.stem for path in (checkout / "tests").rglob("test_*.py")}


def test_a_recorded_run_is_counted_by_file_and_a_failed_one_is_refused(module, tmp_path: Path):
    tables = module("verification_tables")
    tests, results = tmp_path / "tests", tmp_path / "results"
    tests.mkdir()
    results.mkdir()
    code = '"""What | it holds."""\n\ndef test_one():\n    assert error < 1e-9\n    assert close(rtol=1e-3)\n'
    (tests / "test_a.py").write_text(code)
    assert tables.last_run(results) == {}
    assert (
        tables.files_of_tests(tests, results).split("\n")[-1]
        == "| `test_a` | What \\| it holds. | 1 | 1e-09 to 1e-03 |"
    )
    case = '<testcase classname="tests.test_a" name="{}">{}</testcase>'
    one, two = case.format("test_one", ""), case.format("test_two", "")
    skipped = [case.format(f"test_{name}", "<skipped/>") for name in ("two", "three")]
    (results / "a.xml").write_text(f"<testsuites><testsuite>{one}{skipped[0]}{skipped[1]}</testsuite></testsuites>")
    assert tables.files_of_tests(tests, results).split("\n")[-1].endswith("| 1 | 1e-09 to 1e-03 | 1 | 2 |")
    (results / "b.xml").write_text(f"<testsuites><testsuite>{two}{skipped[1]}</testsuite></testsuites>")
    assert tables.files_of_tests(tests, results).split("\n")[-1].endswith("| 1 | 1e-09 to 1e-03 | 2 | 1 |")
    (results / "c.xml").write_text(f"<testsuites>{case.format('test_one', '<failure/>')}</testsuites>")
    with pytest.raises(ValueError, match="test_one failed"):
        tables.files_of_tests(tests, results)


def test_broken_links_are_found(module, tmp_path: Path):
    links = module("check_links")
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#there">b</a> <a href="#here">a</a>')
    (tmp_path / "b.html").write_text('<p id="there"><a href="https://example.org/x#y">elsewhere</a>')
    assert links.broken(tmp_path) == []
    (tmp_path / "b.html").write_text('<p id="other"><img src="none.png"><a href="a.html#gone">a</a>')
    assert links.broken(tmp_path) == [
        "a.html: b.html#there: no such anchor",
        "b.html: none.png: no such file",
        "b.html: a.html#gone: no such anchor",
    ]


def test_everything_public_has_a_docstring():
    for name in diffopt.__all__:
        assert (getattr(diffopt, name).__doc__ or "").strip(), name
