"""Settings of the documentation site; `make docs` builds it."""

import pathlib
import re
import shutil

import sparserec

ROOT = pathlib.Path(__file__).parent.parent

project = "sparserec"
author = "The sparserec authors"
copyright = "2026, The sparserec authors"
version = release = sparserec.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "sparserec"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"navigation_with_keys": True}
templates_path = []

# The notebooks are committed with their outputs.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
# Fences without a language hold output and drawings.
myst_fence_as_directive = []
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False
napoleon_use_ivar = True
nitpicky = False


def _as_restructured_text(text: str) -> str:
    """Docstrings write mathematics and code as Markdown does; autodoc does not."""
    text = re.sub(r"(?<!`)`([^`\n]+)`(?!`)", r"``\1``", text)
    return re.sub(r"(?<![$\\])\$([^$\n]+)\$(?!\$)", r":math:`\1`", text)


def _displays(lines: list[str]) -> list[str]:
    """Formulas between `$$` become directives, with the indentation of their text."""
    text = "\n".join(lines)

    def directive(found: re.Match) -> str:
        indent = found.group(1)
        inner = [line.strip() for line in found.group(2).strip().splitlines()]
        body = "\n".join(f"{indent}   {line}" for line in inner)
        return f"{indent}.. math::\n\n{body}\n"

    def code(found: re.Match) -> str:
        indent, lines = found.group(1), found.group(2).rstrip().splitlines()
        return f"{indent}::\n\n" + "\n".join(f"   {line}" for line in lines) + "\n"

    text = re.sub(r"(?ms)^( *)```python\n(.*?)^ *```$", code, text)
    text = re.sub(r"(?ms)^( *)\$\$(.*?)\$\$[ ]*$", directive, text)
    # Formulas may also run over a line break.
    text = re.sub(
        r"(?s)(?<![$\\`])\$([^$`]+?)\$(?!\$)",
        lambda found: "$" + " ".join(found.group(1).split()) + "$",
        text,
    )
    return [_as_restructured_text(line) for line in text.split("\n")]


def _docstring(app, what, name, value, options, lines):
    del app, what, name, value, options
    lines[:] = _displays(lines)


def _copy_notebooks(app) -> None:
    """Sphinx reads below its own folder only."""
    target = pathlib.Path(app.srcdir) / "tutorials"
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        copy = target / notebook.name
        if not copy.exists() or copy.read_bytes() != notebook.read_bytes():
            shutil.copyfile(notebook, copy)


def setup(app):
    # Before napoleon, which turns the sections into fields.
    app.connect("autodoc-process-docstring", _docstring, priority=100)
    app.connect("builder-inited", _copy_notebooks)
