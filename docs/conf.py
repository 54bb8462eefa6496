"""Sphinx configuration: Markdown pages through MyST, in the furo theme."""

import logging
from importlib.metadata import version as installed_version

project = "Shardwise"
author = "The Shardwise authors"
copyright = "2026, The Shardwise authors"
release = installed_version("shardwise")
version = release

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# A generated page such as coverage.md may not be there yet, and `suppress_warnings` does not reach that warning.
toctrees = logging.getLogger("sphinx.sphinx.directives.other")
toctrees.addFilter(lambda record: getattr(record, "subtype", "") != "empty_glob")

html_theme = "furo"
html_title = "Shardwise"
