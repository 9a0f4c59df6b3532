"""Sphinx configuration of the documentation: ``make docs`` builds it, offline, with warnings as errors."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from fastattn.version import __version__  # noqa: E402

project = "fastattn"
author = "the fastattn maintainers"
project_copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",  # docs/_ext/: indented drawings as code, formulas as mathematics
    "mathml",  # LaTeX to MathML while building, so that pages need no script and no network
    "drawings",  # masks and import rules, drawn from the code
]
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header"]  # pages made of other files, such as the changelog, begin with their own headings
nitpick_ignore_regex = [("py:.*", ".*")]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_mock_imports = ["opacus"]  # an optional package
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_use_rtype = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = "fastattn"
html_static_path = ["_static"]
html_css_files = ["fastattn.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5394", "color-brand-content": "#0b5394"},
    "dark_css_variables": {"color-brand-primary": "#7db7e8", "color-brand-content": "#7db7e8"},
}
pygments_style = "default"
pygments_dark_style = "monokai"
