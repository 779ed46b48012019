"""Sphinx builds the site: `make docs`."""

import re
from pathlib import Path

from sphinx.application import Sphinx

project = "mmpretrain"
author = "The mmpretrain authors"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mmpretrain"
html_show_sphinx = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3


def link_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Documents outside docs/ are linked as files, without their anchors: they are no pages of the site."""

    def link(match: re.Match[str]) -> str:
        path = (Path(app.srcdir) / docname).parent / match[1]
        return match[0] if path.resolve().is_relative_to(Path(app.srcdir).resolve()) else f"](path:{match[1]})"

    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)(?:#[^)]*)?\)", link, source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_outside)
