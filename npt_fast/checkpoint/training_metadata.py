"""``training_metadata.json``, in which some of the original's tools tell what a layer adds.

The file is untrusted; nothing else in it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npt_fast.errors import CheckpointError
from npt_fast.schema import checked, one_of, or_none

TRAINING_METADATA = "training_metadata.json"
_VERSION = "architecture_version"
_RESIDUALS = {"v1": "kept", "OLD": "kept", "v2": "removed", "NEW": "removed"}


def parse_residual(content: Mapping[str, Any], where: str) -> str | None:
    """The residual of a checkpoint's layers, ``"removed"`` or ``"kept"`` (design.md#old-files).

    Args:
        content: JSON object of the file.
        where: name of the file, for messages.

    Returns:
        None if the file does not tell.

    Raises:
        CheckpointError: ``architecture_version`` is none that the original has.
    """
    known = {_VERSION: or_none(one_of(list(_RESIDUALS)))}
    version = checked(content, known, (), where, CheckpointError).get(_VERSION)
    return None if version is None else _RESIDUALS[version]
