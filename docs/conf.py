"""The documentation site: `make docs`. Pages are MyST Markdown; the reference comes from the docstrings."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "dtokd-kernels"
author = "The dtokd-kernels contributors"
copyright = author
version = release = runpy.run_path(str(ROOT / "dtokd_kernels/_version.py"))["__version__"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
default_role = "code"

pygments_style = "friendly"  # diffs in red and green
pygments_dark_style = "monokai"
html_theme = "furo"
html_title = f"dtokd-kernels {release}"
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#8a3ffc", "color-brand-content": "#6929c4"},
    "dark_css_variables": {"color-brand-primary": "#be95ff", "color-brand-content": "#d4bbff"},
}
html_copy_source = False
html_show_copyright = False
copybutton_prompt_text = ">>> |\\.\\.\\. |\\$ "
copybutton_prompt_is_regexp = True
