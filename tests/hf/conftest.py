"""What tests of exports share."""

from __future__ import annotations

import pytest

from tests.hf.exports import Parts, write_parts


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Parts that no test changes."""
    return write_parts(tmp_path_factory.mktemp("parts"))
