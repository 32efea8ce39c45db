"""References by the name under which something is defined lead to the name under which it is public.

``diffopt.tensors.leaves.Leaves`` in a signature is documented as ``diffopt.Leaves``.
"""

import importlib
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PACKAGES = (
    "diffopt",
    *(f"diffopt.{name}" for name in ("errors", "estimators", "linear_solve", "nn", "prox", "tasks", "testing")),
)


def public_names() -> dict[str, str]:
    """The first public name of everything public, by the name under which it is defined."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            defined = f"{getattr(value, '__module__', package)}.{getattr(value, '__qualname__', name)}"
            found.setdefault(defined, f"{package}.{name}")
    return found


def resolve(app: Sphinx, env: BuildEnvironment, node: Any, contnode: nodes.Element) -> nodes.Element | None:
    """Try a missing name of the library again by its public name, and as whatever kind of object it is."""
    if node.get("refdomain") != "py":
        return None
    target = str(node["reftarget"])
    names = public_names()
    within = node.get("py:module") or ""
    candidates = [target, f"{within}.{target}", f"diffopt.{target}", f"diffopt.estimators.{target}"]
    candidates.append(f"diffopt.errors.{target.rpartition('.')[2]}")  # written diffopt.LossError, too
    domain = env.domains.python_domain
    for candidate in candidates:
        defined, _, member = candidate.rpartition(".")
        for name in (names.get(candidate), names.get(defined, "-") + f".{member}", candidate):
            if name in domain.objects:
                entry = domain.objects[name]
                from sphinx.util.nodes import make_refnode

                return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Join Sphinx."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
