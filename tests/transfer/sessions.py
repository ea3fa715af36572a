"""Sessions on a tiny model with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

import npt_fast as npt
from npt_fast.transfer.session import Session
from tests.checkpoints import layer_weights, write_checkpoint
from tests.training import tiny

SIZES: dict[str, Any] = {"d": 32, "f": 48, "rank": 3, "num_ranks": 2}


def new_session(folder: Path, *layers: int, **changes: Any) -> Session:
    weights: dict[str, Tensor] = {}
    for layer in layers or (1, 2):
        found = layer_weights(layer, **SIZES)
        weights |= {name: tensor * 0.5 for name, tensor in found.items()}
    model = tiny.model(**changes)
    npt.load(model, write_checkpoint(folder, weights))
    return Session(model, tiny.tokenizer())
