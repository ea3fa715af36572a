"""What pyproject.toml cannot say: README for PyPI, without links into the repository."""

import re
from pathlib import Path

from setuptools import setup

README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
PICTURE, LINK = (rf"{mark}\[([^\]]*)\]\((?![a-z]+:|#)[^)]*\)" for mark in ("!", ""))

setup(
    long_description=re.sub(LINK, r"\1", re.sub(PICTURE, "", README)),
    long_description_content_type="text/markdown",
)
