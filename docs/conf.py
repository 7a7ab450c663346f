"""Sphinx configuration."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "aiommap"
author = "The aiommap authors"
copyright = "2026, The aiommap authors"
version = release = installed_version("aiommap")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
html_theme = "furo"
html_title = "aiommap"
exclude_patterns = ["_build"]
