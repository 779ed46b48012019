"""Sphinx builds the site: `make docs`."""

import re

from sphinx.application import Sphinx

project = "mmpretrain"
author = "The mmpretrain authors"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mmpretrain"
html_show_sphinx = False
myst_heading_anchors = 3


def link_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Documents outside docs/ are linked as files: they are no pages of the site."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_outside)
