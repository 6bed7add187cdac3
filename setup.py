"""Makes the long description of the package; pyproject.toml describes the rest.

README.md has relative links, which hold in every clone and fork; a package index needs absolute ones.
"""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from addresses import absolute_links  # noqa: E402

setup(
    long_description=absolute_links((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
