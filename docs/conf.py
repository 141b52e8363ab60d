"""Settings of Sphinx: `make docs` builds the pages into build/docs and stops at the first run with a warning."""

from erde_hub import __version__

project = "erde_hub"
author = copyright = "The erde_hub authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "erde_hub"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
default_role = "code"  # docstrings write code between single backticks
myst_heading_anchors = 3
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]
napoleon_use_ivar = True  # attributes are listed with their class, and not once more by themselves
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
