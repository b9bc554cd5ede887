"""How Sphinx builds the site: `make docs`. What it adds to the pages is in pages.py, what it checks in site_check.py."""

import re
import sys
from pathlib import Path

import click
from docutils import nodes
from latex2mathml.converter import convert

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # sphinx knows neither this folder nor, without an installation, lorank

import pages  # noqa: E402
import site_check  # noqa: E402

import lorank  # noqa: E402
from lorank.cli import cli  # noqa: E402

project, author, copyright = "lorank", "lorank developers", "lorank developers, Apache-2.0"
version = release = lorank.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_click"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
smartquotes = False  # --flags keep their dashes
default_role = "py:obj"  # docstrings write `names` in single backticks
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
maximum_signature_line_length = 100

html_theme = "furo"
html_title = "lorank"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
exclude_patterns = ["*.py"]


def add_generated(app, docname, content):
    content[0] = pages.expand(docname, content[0])


def as_rst(app, what, name, obj, options, lines):
    """Our docstrings are prose with indented equations: keep the equations' lines, and let no sign mean markup."""
    text, equation, doctest = [], False, False
    for before, line in zip(["", *lines], lines, strict=False):
        indented = line.startswith("    ")
        doctest = line.lstrip().startswith(">>>") or (doctest and line != "")
        if line and not indented:
            equation = False
        elif indented and not before and not equation and not doctest:
            text += ["::", ""]
            equation = True
        text.append(line if equation or doctest else _plain(line))
    comment = (
        ["..", ""] if what == "attribute" else []
    )  # keeps napoleon from reading what comes before a colon as a type
    lines[:] = comment + text


def _plain(line):
    parts = re.split(r"(``?[^`]+``?)", line)
    return "".join(part if i % 2 else re.sub(r"([*|]|_(?!\w))", r"\\\1", part) for i, part in enumerate(parts))


def inline_math(translator, node):
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def display_math(translator, node):
    translator.body.append(f'<div class="equation">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def check(app, error):
    if error is None and app.builder.name == "html":
        site_check.check(Path(app.outdir))


def show_defaults():
    """Sphinx-click knows nothing of the setting of our commands that shows defaults in --help."""
    for command in cli.commands.values():
        for option in command.params:
            if (
                isinstance(option, click.Option)
                and not option.is_flag
                and isinstance(option.default, int | float | str)
            ):
                option.show_default = True


def setup(app):
    show_defaults()
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))  # browsers set MathML by themselves
    app.connect("source-read", add_generated)
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
