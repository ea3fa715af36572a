"""The guide's code runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import npt_fast as npt
from npt_fast.hf.convert import components
from tests.training import tiny

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"


def test_own_trainer_and_own_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = GUIDE.read_text().partition("### Your own Trainer, or your own loop")[2]
    trainer, loop = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.S)
    assert len(loop.splitlines()) == 10
    tokenizer, model = tiny.tokenizer(), tiny.model(initializer_range=0.2)
    rows = [{"input_ids": tokenizer(f"{n} words of a text"[: 9 + n]).input_ids} for n in range(8)]
    names = {
        "npt": npt, "torch": torch, "DataLoader": DataLoader,
        "model": model, "tokenizer": tokenizer, "rows": rows,
    }  # fmt: skip
    exec(trainer, names)
    loaded = npt.load(tiny.model(initializer_range=0.2), "trained", dtype=torch.float32)
    before = components(loaded)[1].w_down.clone()
    assert torch.equal(before, components(model)[1].w_down)
    exec(loop, names)
    assert not torch.equal(before, components(model)[1].w_down)
