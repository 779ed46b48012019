"""Sphinx builds the site: `make docs`."""

import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = "mmpretrain"
author = "The mmpretrain authors"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mmpretrain"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3


def link_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Documents outside docs/ are linked as files, without their anchors: they are no pages of the site."""

    def link(match: re.Match[str]) -> str:
        path = (Path(app.srcdir) / docname).parent / match[1]
        return match[0] if path.resolve().is_relative_to(Path(app.srcdir).resolve()) else f"](path:{match[1]})"

    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)(?:#[^)]*)?\)", link, source[0])


def write_inline_equation(writer: HTML5Translator, node: nodes.math) -> None:
    """Write an equation as MathML, which browsers draw themselves: the pages need no script and no network."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def write_equation(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (write_inline_equation, None), (write_equation, None))
    app.connect("source-read", link_outside)
