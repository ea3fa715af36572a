"""A tiny base model in a folder, and a checkpoint of its layers 1 and 2, to export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import npt_fast as npt
from tests.training import tiny
from tests.transfer import models

IDS = torch.arange(3, 23)[None]


@dataclass(frozen=True)
class Parts:
    """What an export is made of.

    Attributes:
        base: folder of the base model.
        checkpoint: folder of the checkpoint, which records the base model's name.
    """

    base: Path
    checkpoint: Path

    def by_hand(self, **options: Any) -> Any:
        """The base model, by transformers' own loader, with the NP layers, by `npt.load`."""
        return npt.load(load(self.base, **options), self.checkpoint)


def write_parts(folder: Path, family: str = "llama", **saving: Any) -> Parts:
    """Write the parts into a folder, the base model with these options of save_pretrained."""
    parts = Parts(folder / "base", folder / "np")
    models.base(family).float().save_pretrained(parts.base, **saving)
    tiny.tokenizer().save_pretrained(parts.base)
    model = models.converted(family).float()
    model.config._name_or_path = str(parts.base)
    npt.save(model, parts.checkpoint)
    return parts


def load(folder: Path | str, **options: Any) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found
