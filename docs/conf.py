"""The guide and the API reference as a site: `make docs` builds it into build/docs; a warning is an error."""

from __future__ import annotations

import re

import bitfold

project = "bitfold"
version = release = bitfold.__version__
copyright = "the bitfold authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "index"

myst_heading_anchors = 3
html_theme = "furo"  # light and dark
html_title = f"bitfold {version}"
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True


def plain_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are prose: `code` is code, an indented block after a blank line is an example, and a star or a bar
    is itself, not reStructuredText's markup."""
    result: list[str] = []
    example = False
    for line in lines:
        if not line.strip():
            result.append(line)
            continue
        if line.startswith("    ") and (example or (result and not result[-1].strip())):
            if not example:
                result += ["::", ""]
            example = True
            result.append(line)
            continue
        example = False
        parts = re.split(r"(`[^`]+`)", line)
        result.append(
            "".join(
                f"`{part}`" if part.startswith("`") else re.sub(r"([*|_])", r"\\\1", part) for part in parts
            )
        )
    lines[:] = result


def setup(app) -> None:
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)
