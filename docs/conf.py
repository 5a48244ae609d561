"""Configuration of the documentation: sphinx-build -W -b html docs docs/_build/html."""

import shutil
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent

project = "discover-sc"
author = "The discover-sc authors"
project_copyright = author
version = release = installed_version("discover-sc")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinxcontrib.bibtex",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]
intersphinx_mapping = {}  # the build needs no network

# Markdown and notebooks. The notebooks are shown with the outputs that they were saved with.
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

# The API pages list the names of __all__ and no others, see _templates/autosummary/module.rst.
autosummary_generate = True
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_numpy_docstring = True
# Types stand in the signature; napoleon would read the first line under "Returns" as one.
napoleon_custom_sections = ["Returns"]

html_theme = "sphinx_book_theme"
html_title = "discover-sc"
html_theme_options = {"show_toc_level": 2}


def copy_tutorials() -> None:
    """Copy the notebooks beside the pages, where Sphinx finds them; git ignores the copies."""
    target = HERE / "tutorials"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
        shutil.copy2(notebook, target / notebook.name)


copy_tutorials()
