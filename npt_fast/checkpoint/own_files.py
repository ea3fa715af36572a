"""The names of the files of a checkpoint: by them, other files beside it are told apart."""

from __future__ import annotations

import re

from npt_fast.checkpoint.digests import DIGESTS
from npt_fast.checkpoint.merge_summary import MERGE_SUMMARY
from npt_fast.checkpoint.npt_config import NPT_CONFIG
from npt_fast.checkpoint.tensor_source import WEIGHTS
from npt_fast.checkpoint.training_metadata import TRAINING_METADATA
from npt_fast.checkpoint.training_state import MULTI_LAYER_STATE, TRAINING_STATE

CONFIG = "config.json"
_FILES = {
    *WEIGHTS,
    TRAINING_STATE,
    MULTI_LAYER_STATE,
    CONFIG,
    NPT_CONFIG,
    MERGE_SUMMARY,
    DIGESTS,
    TRAINING_METADATA,
}
_OWN_SHARD = re.compile(r"npt_weights-[0-9]+-of-[0-9]+\.safetensors")
PATTERNS = (*sorted(_FILES), "npt_weights-*-of-*.safetensors")
"""The same names for `fnmatch`."""


def is_checkpoint_file(name: str) -> bool:
    """Whether npt_fast or the original gives a file in a checkpoint this name."""
    return name in _FILES or _OWN_SHARD.fullmatch(name) is not None
