"""Training runs on the tiny model, and readers of their files that use torch alone."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import npt_fast as npt
from npt_fast.training.checkpoint_writer import write_checkpoint as write_files
from tests.checkpoints import (
    assert_same_tensors,
    layer_weights,
    load_state,
    read_weights,
    write_checkpoint,
)
from tests.training import tiny

LENGTH = 24
"""Tokens per window: fewer than 32, so that the last window of an epoch may be short."""
SIZES: dict[str, Any] = {"d": 32, "f": 48, "rank": 3, "num_ranks": 2}
"""Sizes of the layers, for `tests.checkpoints.layer_weights`."""


@dataclass(frozen=True)
class Place:
    """A base model and texts.

    Attributes:
        base: folder of the tiny Llama, with weights so large that its layers do something.
        text: 40 windows.
        short: 1 window to hold out, 7 to train on, and an eighth of which 5 tokens are text.
    """

    base: Path
    text: Path
    short: Path

    def settings(self, output: Path, **changes: Any) -> dict[str, Any]:
        """Return options of a quick run; its steps are so large that any difference shows."""
        settings = {
            "train_layers": "1,2",
            "model_name": str(self.base),
            "data": str(self.text),
            "max_length": LENGTH,
            "num_eval_samples": 4,
            "np_rank": 3,
            "num_ranks": 2,
            "sink_weight": 0.0,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_steps": 8,
            "logging_steps": 100,
            "eval_steps": 0,
            "save_steps": 100,
            "generation_steps": 0,
            "cpu": True,
            "output_dir": output,
        }
        return {**settings, **changes}

    def train(self, output: Path, **changes: Any) -> Path:
        """Train and return the last checkpoint."""
        return npt.train(npt.TrainOptions(**self.settings(output, **changes))).checkpoint

    def arguments(self, output: Path, **changes: Any) -> list[str]:
        """Return the arguments of `npt-fast` for the same run."""
        arguments = ["train"]
        for name, value in self.settings(output, **changes).items():
            if value is not False:
                arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return arguments


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    """Make a place. Within, torch uses one thread: on a busy machine two wait for each other."""
    tiny.save(folder / "base", initializer_range=0.2)
    generator = random.Random(0)
    texts = {}
    for name, tokens in (("text", 40 * LENGTH), ("short", 8 * LENGTH + 5)):
        letters = generator.choices("abcdefgh   ", k=tokens - 1)
        texts[name] = folder / f"{name}.txt"
        texts[name].write_text("x" + "".join(letters))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Place(folder / "base", texts["text"], texts["short"])
    torch.set_num_threads(before)


def start(folder: Path, *layers: int, **changes: Any) -> Path:
    """Write a checkpoint of random layers without training state, where no gradient is 0."""
    weights: dict[str, torch.Tensor] = {}
    for layer in layers:
        weights |= layer_weights(layer, **{**SIZES, **changes})
    return write_checkpoint(folder, {name: tensor * 0.15 for name, tensor in weights.items()})


def write(target: Path, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]) -> Path:
    """Write a checkpoint of these weights and this AdamW state."""
    write_files(
        target,
        weights=weights,
        format="pt",
        training_state={
            "global_step": 1,
            **({"optimizer_state_dict": optimizer} if optimizer else {}),
        },
        multi_layer_state={"layers_to_train": []},
        config={},
        npt_config={"format_version": 1},
    )
    return target


def moments(checkpoint: Path) -> list[dict[str, torch.Tensor]]:
    """Return AdamW's state of each parameter, in order."""
    optimizer = load_state(checkpoint)["optimizer_state_dict"]
    return [optimizer["state"][index] for index in optimizer["param_groups"][0]["params"]]


def gradient(checkpoint: Path) -> torch.Tensor:
    """Return all gradients of the first step; AdamW's first moments are a tenth of them."""
    states = moments(checkpoint)
    assert {state["step"].item() for state in states} == {1}
    found = 10 * torch.cat([state["exp_avg"].double().ravel() for state in states])
    assert found.norm() > 0.1
    return found


def by_name(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return AdamW's state by name of the weight."""
    return dict(zip(read_weights(checkpoint), moments(checkpoint), strict=True))


def assert_same_end(one: Path, other: Path) -> None:
    """Compare weights, optimizer, schedule and data position bit for bit."""
    assert_same_tensors(read_weights(one), read_weights(other))
    for ours, theirs in zip(moments(one), moments(other), strict=True):
        assert_same_tensors(ours, theirs)
    states = [load_state(path) for path in (one, other)]
    for state in states:
        del state["scheduler_state_dict"]["_step_count"]  # counts calls in this process
    for name in ("global_step", "batch_count", "scheduler_state_dict"):
        assert states[0][name] == states[1][name], name
    assert states[0]["data_state"]["windows"] == states[1]["data_state"]["windows"]


def log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of ``training_log.jsonl``."""
    return [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Let no file grow beyond a size: to a program, the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Give new files no more permissions than this mask leaves."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
