"""Neuro-Plastic Transformers: train layers apart, merge them, transfer knowledge.

``import npt_fast as npt`` is all a user needs; everything is loaded on first use, so that the
import itself brings neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npt_fast.checkpoint.inspect import CheckpointReport, MergeVerdict, can_merge, inspect
    from npt_fast.checkpoint.merge import merge
    from npt_fast.checkpoint.merge_report import MergeReport
    from npt_fast.checkpoint.verify import VerifyReport, verify
    from npt_fast.config import MergeOptions
    from npt_fast.errors import (
        CheckpointError,
        MergeError,
        NPTError,
        StorageError,
        VerificationError,
    )

_HOMES = {
    "CheckpointError": "npt_fast.errors",
    "CheckpointReport": "npt_fast.checkpoint.inspect",
    "MergeError": "npt_fast.errors",
    "MergeOptions": "npt_fast.config",
    "MergeReport": "npt_fast.checkpoint.merge_report",
    "MergeVerdict": "npt_fast.checkpoint.inspect",
    "NPTError": "npt_fast.errors",
    "StorageError": "npt_fast.errors",
    "VerificationError": "npt_fast.errors",
    "VerifyReport": "npt_fast.checkpoint.verify",
    "can_merge": "npt_fast.checkpoint.inspect",
    "inspect": "npt_fast.checkpoint.inspect",
    "merge": "npt_fast.checkpoint.merge",
    "verify": "npt_fast.checkpoint.verify",
}

__all__ = [
    "CheckpointError",
    "CheckpointReport",
    "MergeError",
    "MergeOptions",
    "MergeReport",
    "MergeVerdict",
    "NPTError",
    "StorageError",
    "VerificationError",
    "VerifyReport",
    "can_merge",
    "inspect",
    "merge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("npt_fast")
    if name not in _HOMES:
        raise AttributeError(f"module 'npt_fast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
