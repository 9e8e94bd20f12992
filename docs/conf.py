"""Sphinx configuration: Markdown pages, and two pages generated from the code at each build."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import reference  # noqa: E402 - a module beside this file

project = "z4j-bare"
author = "the z4j-bare authors"
release = installed("z4j-bare")
extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "*.in.md", "diagrams/*"]
html_theme = "furo"
html_title = f"z4j-bare {release}"
nitpicky = True

reference.write(HERE)
