"""Sphinx's settings for the documentation site; `scripts/docs_site.py` prepares the pages and calls Sphinx."""

import re

# autodoc changes the annotations of pydantic's BaseModel while it documents models; libraries that define models are loaded before
import fastapi  # noqa: F401
import mcp.server  # noqa: F401

project = "cryptoresearch"
author = "cryptoresearch developers"
copyright = "2026 onwards, cryptoresearch developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "cryptoresearch"
html_copy_source = False
html_show_sphinx = False
nb_execution_mode = "off"  # the notebooks hold the outputs of their last run, and every test run executes them
nb_merge_streams = True
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the sections of the docstrings have them
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "code"
# plotly's pictures are in the notebooks twice, for JupyterLab and as PNG; a page needs no script from elsewhere for the second
nb_mime_priority_overrides = [("html", "image/png", 0), ("html", "application/vnd.plotly.v1+json", None)]
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]  # types such as `Feature` are exported by two modules

_SPECIAL = re.compile(r"(`[^`]*`)|([*|\\])|(\w)_(?=\W|$)")


def escape(app, what, name, obj, options, lines):
    "Keep what reStructuredText would take for markup: docstrings are plain text with code between backticks."
    lines[:] = [_SPECIAL.sub(lambda m: m[1] or (f"\\{m[2]}" if m[2] else f"{m[3]}\\_"), line) for line in lines]


def skip(app, what, name, obj, skip, options):
    "Leave out what scikit-learn adds to every estimator: its texts link to pages of scikit-learn."
    return True if name.startswith(("set_", "get_metadata_routing")) and "sklearn" in (getattr(obj, "__module__", "") or "") else None


def setup(app):
    "Escape docstrings before napoleon reads them."
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", escape, priority=100)
