"""How the house is laid out: ``python -m benchmarks.house`` counts it, and draws its map into CONTRIBUTING.md.

Counted: files, lines, folders and import arrows of the library, and the arrows that run back. The map is a Mermaid
diagram of the folders, from the ground up. Of its arrows it has those that no longer way says as well.
``--counts`` prints what :mod:`benchmarks.counts` counts, and draws nothing.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import diffopt

ROOT = Path(diffopt.__file__).resolve().parent.parent
BEGIN, END = "<!-- the map: python -m benchmarks.house -->", "<!-- the end of the map -->"


def arrows(package: Path = ROOT) -> tuple[set[tuple[str, str]], dict[str, set[str]]]:
    """The import arrows between modules, and between folders; a folder's facade counts as the folder."""
    modules = {name: path for folder in ("diffopt", "estimators", "tasks") for name, path in _modules(package, folder)}
    found: set[tuple[str, str]] = set()
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            known = [target for target in targets if target in modules and target != name]
            found.update((name, target) for target in known if target != "diffopt")
    folders: dict[str, set[str]] = {}
    for a, b in found:
        if _folder(a, modules) != _folder(b, modules):
            folders.setdefault(_folder(a, modules), set()).add(_folder(b, modules))
    return found, folders


def _modules(package: Path, folder: str) -> list[tuple[str, Path]]:
    top = "diffopt" if folder == "diffopt" else f"diffopt.{folder}"
    found = []
    for path in sorted((package / folder).rglob("*.py")):
        parts = path.relative_to(package / folder).with_suffix("").parts
        if parts[0] not in ("estimators", "tasks") or folder != "diffopt":
            found.append((".".join([top, *parts]).removesuffix(".__init__"), path))
    return found


def _folder(module: str, modules: dict[str, Path]) -> str:
    return module if modules[module].name == "__init__.py" else module.rpartition(".")[0]


def running_back(folders: dict[str, set[str]]) -> list[str]:
    """Pairs of folders that import each other, on any way through others; the top's own files are not counted."""
    reach = {name: set(targets) for name, targets in folders.items() if name != "diffopt"}
    changed = True
    while changed:
        changed = False
        for name, targets in reach.items():
            further = set().union(targets, *(reach.get(target, set()) for target in targets))
            changed, reach[name] = changed or further != targets, further
    return sorted(name for name, targets in reach.items() if name in targets)


def needed(folders: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows of the map: what a folder imports, without what it would reach through another one that it imports.

    The facade ``diffopt`` imports all that it shows, and stands above everything: it is left out.
    """
    nearest = {name: targets - {"diffopt"} for name, targets in folders.items() if name != "diffopt"}
    below: dict[str, set[str]] = {}

    def reached(name: str) -> set[str]:
        if name not in below:
            targets = nearest.get(name, set())
            below[name] = set().union(targets, *map(reached, targets))
        return below[name]

    return sorted(
        (name, target)
        for name, targets in nearest.items()
        for target in targets
        if not any(target in reached(other) for other in targets)
    )


def drawn(folders: dict[str, set[str]]) -> str:
    """The map as Mermaid text."""
    arrows = [f"  {_short(name)} --> {_short(target)}" for name, target in needed(folders)]
    return "\n".join([BEGIN, "```mermaid", "graph TD", *arrows, "```", END])


def _short(folder: str) -> str:
    return folder.removeprefix("diffopt.").replace("experiments.framework", "framework")


def main() -> None:
    """Print the counts, and draw the map."""
    found, folders = arrows()
    modules = [path for folder in ("diffopt", "estimators", "tasks") for _, path in _modules(ROOT, folder)]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules)
    between = sum(len(targets) for targets in folders.values())
    print(f"{len(modules)} files, {lines} lines, {len({path.parent for path in modules})} folders")
    circles = ", ".join(running_back(folders)) or "none"
    print(f"{len(found)} import arrows between files, {between} between folders; folders in circles: {circles}")
    page = ROOT / "CONTRIBUTING.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text[: text.index(BEGIN)] + drawn(folders) + text[text.index(END) + len(END) :], encoding="utf-8")
    print(f"the map in {page.name} has {len(needed(folders))} arrows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.house")
    parser.add_argument("--counts", action="store_true", help="print what there is, and draw nothing")
    parser.add_argument("--of", metavar="REVISION", help="also count the test files that stood there, in git")
    options = parser.parse_args()
    if options.counts:
        from benchmarks import counts

        counts.main(options.of)
    else:
        main()
