"""Sphinx configuration.

The build needs no network. With ``AIOMMAP_DOCS_ONLINE=1`` names of Python, anyio and trio become
links into their documentation.
"""

from __future__ import annotations

import inspect
import os
from importlib.metadata import version as installed_version

import aiommap

project = "aiommap"
author = "The aiommap authors"
project_copyright = "2026, The aiommap authors"
version = release = installed_version("aiommap")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
if os.environ.get("AIOMMAP_DOCS_ONLINE") == "1":
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "anyio": ("https://anyio.readthedocs.io/en/stable", None),
        "trio": ("https://trio.readthedocs.io/en/stable", None),
    }
html_theme = "furo"
html_title = "aiommap"
exclude_patterns = ["_build"]

# Public names say that they live in ``aiommap``. Autodoc looks for the order of members, and for
# the comments of attributes, in the module that they were written in.
for _name in aiommap.__all__:
    _public = getattr(aiommap, _name)
    for _member in vars(_public).values() if inspect.isclass(_public) else ():
        _function = getattr(_member, "fget", None) or getattr(_member, "__func__", _member)
        if inspect.isfunction(_function) and _function.__module__.startswith("aiommap."):
            _public.__module__ = _function.__module__
