"""Sphinx builds the documentation from the root of the repository, so that docs/ and benchmarks/ link to each other:

pip install '.[docs]' && sphinx-build -W --keep-going -c docs . docs/_build

Nothing is fetched, and what can be generated is: the reference is read from the code at each build.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from sphinx.domains.python import PyObject

import agl_bench

project = "agl-bench"
author = "the agl-bench authors"
copyright = "the agl-bench authors, MIT licence"
version = release = agl_bench.__version__

root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/*.md"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["docs/_build", "agl_bench", "plugins", "tests", ".*", "build", "dist", "agl-bench-work"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "generated"]

# Markdown
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# Docstrings: Google style, with single backticks for code as everywhere in the project.
default_role = "code"
smartquotes = False  # "--option" is no dash
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
add_module_names = False

# References are checked, but no other project's inventory is asked for (builds need no network): names of Python,
# torch, numpy and so on are no links, and neither are what the root of the package does not export.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|np|numpy|scipy|pandas|anndata|pathlib|collections|typing|abc|click|enum)\..*"),
    (r"py:.*", r"dict\[str"),  # how a ClassVar of a dict is taken apart
    (r"py:exc", r"(BadPlugin|UnknownName)"),
    (r"py:.*", r"(NoGradients|agl_bench\.maths\.hypergradient\.(Moments|Dual))"),
    (r"py:.*", r"(Tensor|AnnData|Path|Any|Callable|Iterable|Iterator|Mapping|Sequence|ABC|Generator|ndarray)"),
]

# Pages
html_theme = "furo"
html_title = "agl-bench"
html_static_path = ["_static"]
html_css_files = ["agl-bench.css"]
html_additional_pages = {"index": "door.html"}
templates_path = ["_templates"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5394", "color-brand-content": "#0b5394"},
    "dark_css_variables": {"color-brand-primary": "#8ab8f0", "color-brand-content": "#8ab8f0"},
}
highlight_language = "text"


def _folders_are_no_links(app: Any, page: str, source: list[str]) -> None:
    """A link to a folder of the repository is for readers of the repository; here its words alone stand."""
    here = Path(app.srcdir, page).parent

    def shown(link: re.Match[str]) -> str:
        return link[1] if here.joinpath(link[2]).is_dir() else link[0]

    source[0] = re.sub(r"\[([^\]\n]+)\]\(([\w./-]+)\)", shown, source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _folders_are_no_links)
    for kind in PyObject.doc_field_types:
        if kind.name == "variable":
            kind.label = "Attributes"  # as the docstrings call them
