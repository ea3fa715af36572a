"""A tiny base model in a folder, and a checkpoint of its layers 1 and 2, to export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import npt_fast as npt
from tests.checkpoints import write_checkpoint
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


def change(folder: Path, **content: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def without_fingerprint(parts: Parts, folder: Path) -> Path:
    """The same weights as the original writes them, which knows no fingerprint and no base."""
    weights = load_file(parts.checkpoint / "npt_weights.safetensors")
    return write_checkpoint(folder, weights)


def refuse(match: str, out: Path, checkpoint: Path | str, **options: Any) -> None:
    """An export raises one line, and leaves nothing."""
    with pytest.raises(npt.NPTError, match=match) as raised:
        npt.export(checkpoint, out, **options)
    assert "\n" not in str(raised.value)
    assert not out.exists() and not list(out.parent.glob(".*"))
