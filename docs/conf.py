"""Sphinx builds the site: `make docs`."""

project = "mmpretrain"
author = "The mmpretrain authors"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mmpretrain"
html_show_sphinx = False
myst_heading_anchors = 3
