"""How Sphinx builds the site: ``make docs``. Nothing here needs the network unless ``DIFFOPT_INTERSPHINX`` is set."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE)]

import diffopt  # noqa: E402

# Pages show bad estimates on purpose, in numbers: their cells need no warning of them (EstimateWarnings begin so).
os.environ["PYTHONWARNINGS"] = "ignore:Binomial,ignore:Krylov,ignore:the hypergradient of"

project = "diffopt"
author = "The diffopt developers"
project_copyright = "The diffopt developers, Apache-2.0"
version = release = diffopt.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "equations",
    "public_names",
]
exclude_patterns = ["_build", "extensions"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"diffopt {version}"

# MathJax comes from a package that carries it (and whose own extension would keep Sphinx from reading in parallel).
mathjax_package = find_spec("sphinx-mathjax-offline")
if mathjax_package is None or mathjax_package.origin is None:
    raise SystemExit("the site needs: pip install sphinx-mathjax-offline")
mathjax_path = "mathjax/tex-chtml.js"
html_static_path = ["_static", str(Path(mathjax_package.origin).parent / "static")]
html_css_files = ["wide.css"]
html_show_sourcelink = False

# Every cell runs when the site is built, and an error in one stops the build.
nb_execution_mode = "cache" if os.environ.get("DIFFOPT_DOCS_CACHE") else "force"
nb_execution_timeout = 900  # seconds, only against hanging: a busy machine takes minutes for a page
nb_execution_raise_on_error = True
nb_output_stderr = "remove-warn"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
bibtex_reference_style = "author_year"

autosummary_generate = True
autosummary_imported_members = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# A public name that leads nowhere is an error. Names of others lead somewhere only with intersphinx, and some types in
# signatures belong to the inside of the core.
nitpicky = True
inside = r"diffopt\..*\.(Autocast|Graph|Block(Terms)?|BoundOptimizer|HookUse|Images|Loaded|Params|ModuleFunction|Store)"
nitpick_ignore_regex = [(r"py:.*", r"(?!diffopt).*"), (r"py:.*", inside)]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

if os.environ.get("DIFFOPT_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
    }
