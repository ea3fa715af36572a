"""The API reference names what the library offers; ``make docs`` resolves what it names."""

from __future__ import annotations

import re
from pathlib import Path

import npt_fast as npt

REFERENCE = Path(__file__).parents[2] / "docs" / "reference.rst"


def test_every_public_name_is_there_once() -> None:
    names = re.findall(r"^\.\. auto\w+:: npt_fast\.(\w+)$", REFERENCE.read_text(), re.M)
    assert sorted(names) == sorted(npt.__all__)
