"""How the documentation is built; the build needs no network."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "Flask-CommonDB"
copyright = "the Flask-CommonDB contributors"
(release,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
version = release

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

html_theme = "furo"
html_title = f"Flask-CommonDB {release}"
html_show_sphinx = False
html_copy_source = False
