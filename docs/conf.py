"""What ``make docs`` builds: every Markdown page of the repository and the API reference.

The source directory is the repository's root, so that a link that works in a checkout works here.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

import npt_fast
from npt_fast.checkpoint import merge_report

# imported there for type checkers only; without it, none of the module's types can be resolved
merge_report.VerifyReport = npt_fast.VerifyReport  # type: ignore[misc]

project = "npt_fast"
author = "The npt_fast developers"
version = release = npt_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/*.rst",
    "kernels/README.md",
    "benchmarks/results/*.md",
]
exclude_patterns = [".*", "build", "demo", "node_modules"]
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}  # what a web server looks for
html_theme = "furo"
html_title = "npt_fast"

nitpicky = (
    True  # a type or an error that leads nowhere is a warning, and `make docs` fails on those
)
myst_heading_anchors = 4  # so does a link to a section that does not exist
nitpick_ignore_regex = [
    # documented elsewhere
    ("py:.*", r"(collections|contextlib|os|pathlib|torch|transformers|typing)\..*|Tensor"),
    ("py:class", r"npt_fast\.hf\.convert\.Model"),  # a type variable: any torch module
    ("py:class", r"npt_fast\.checkpoint\.checkpoint\.Checkpoint"),  # an argument of our own calls
]
suppress_warnings = ["toc.not_included"]  # benchmarks/results are reached from the pages' text
default_role = "literal"  # single backticks in docstrings are code

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as one list, each with its type, like parameters
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

CONTENTS = """
```{toctree}
:hidden:
:glob:
docs/training
docs/merging
docs/transfer
docs/decoding
docs/reference
docs/design
docs/*
kernels/README
CONTRIBUTING
*
```
"""


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """The table of contents, which no reader of README.md needs to see."""
    if page == root_doc:
        source[0] += CONTENTS


def show_factories(
    app: Sphinx,
    kind: str,
    name: str,
    value: object,
    options: object,
    arguments: str | None,
    result: str | None,
) -> tuple[str | None, str | None]:
    """Sphinx shows a signature in full only where it is Python, which ``<factory>`` is not.

    What checks an argument is no part of its type.
    """
    kind = r"~?typ\w+\.Annotated\[((?:(?!Annotated).)*?), Kind\(.*? at 0x[0-9a-f]+>\)\]"
    plain = arguments and re.sub(kind, r"\1", arguments.replace("<factory>", "..."))
    return plain, result


def link_citations(
    app: Sphinx, kind: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """What a docstring cites of design.md becomes a link."""
    lines[:] = [
        re.sub(r"design\.md#([\w-]+)", r"`\g<0> <design.html#\1>`__", line) for line in lines
    ]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", link_citations)
    app.connect("autodoc-process-signature", show_factories)
    app.connect("source-read", add_contents)
