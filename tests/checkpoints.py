"""Make checkpoints as the original writes them, with torch, for tests and benchmarks.

Independent of the code under test: keys and shapes are written out here once more (design.md#keys),
and what a merge wrote is read back with torch and safetensors alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PROJECTIONS = {
    "single": [""],
    "dual": ["_gate", "_up"],
    "triple": ["_gate", "_up", "_down"],
    "plain": ["_up", "_down"],
}


def layer_weights(
    layer: int,
    *,
    d: int = 16,
    f: int = 24,
    rank: int = 4,
    num_ranks: int = 1,
    modulation: str = "triple",
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    prefix: str = "layer_{}_np.",
) -> dict[str, torch.Tensor]:
    """Random weights of one layer, keys in the order in which the original saves them."""
    generator = torch.Generator().manual_seed(layer if seed is None else seed)
    weights = {}
    for projection in PROJECTIONS[modulation]:
        wide = (f, d) if projection == "_down" else (d, f)
        shapes = {"W_down": (d, rank), "W_a_up": (rank, wide[0]), "W_b_up": (rank, wide[1])}
        for stem, shape in shapes.items():
            for component in range(num_ranks):
                suffix = f".{component}" if num_ranks > 1 else ""
                name = f"{prefix.format(layer)}{stem}{projection}{suffix}"
                weights[name] = torch.randn(shape, generator=generator).to(dtype)
    return weights


def adamw_state(
    weights: Mapping[str, torch.Tensor],
    *,
    steps: int = 3,
    lr: float = 1e-3,
    seed: int = 0,
    numpy_lr: bool = False,
    amsgrad: bool = False,
) -> dict[str, Any]:
    """A training state from real AdamW steps over the weights in key order, random gradients.

    With `numpy_lr`, learning rates are ``numpy.float64``, as after the original's warm-up
    (design.md#training-state).
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(tensor.clone().float()) for tensor in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, amsgrad=amsgrad)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        scheduler.step()
    optimizer_state, scheduler_state = optimizer.state_dict(), scheduler.state_dict()
    if numpy_lr:
        import numpy as np

        for group in optimizer_state["param_groups"]:
            group["lr"] = np.float64(group["lr"])
        scheduler_state["_last_lr"] = [np.float64(rate) for rate in scheduler_state["_last_lr"]]
    return {
        "global_step": steps,
        "batch_count": 4 * steps,
        "optimizer_state_dict": optimizer_state,
        "scheduler_state_dict": scheduler_state,
        "scaler_state_dict": None,
    }


def write_checkpoint(
    directory: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    training_state: Mapping[str, Any] | None = None,
    multi_layer_state: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A checkpoint directory in the original's layout."""
    directory.mkdir(parents=True)
    torch.save(dict(weights), directory / "npt_weights.pt")
    if training_state is not None:
        torch.save(dict(training_state), directory / "training_state.pt")
    if multi_layer_state is not None:
        torch.save(dict(multi_layer_state), directory / "multi_layer_state.pt")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def multi_layer_state(layers: Sequence[int], **changes: Any) -> dict[str, Any]:
    """A ``multi_layer_state.pt`` as the original's multi-layer trainer writes it."""
    state: dict[str, Any] = {
        "layers_to_train": sorted(layers),
        "curriculum_schedule": [{"name": "teacher", "until_step": 50, "mixing_ratio": 0.0}],
        "current_stage_index": 0,
        "layer_weights": {layer: 1.0 for layer in layers},
        "teacher_cache_hits": 0,
        "teacher_cache_misses": 0,
    }
    return {**state, **changes}


def trained_checkpoint(
    directory: Path, layer: int, *, steps: int = 3, numpy_lr: bool = False, **architecture: Any
) -> Path:
    """A complete checkpoint of one layer, with the state of real AdamW steps."""
    weights = layer_weights(layer, **architecture)
    return write_checkpoint(
        directory,
        weights,
        training_state=adamw_state(weights, steps=steps, seed=layer, numpy_lr=numpy_lr),
        multi_layer_state=multi_layer_state([layer]),
        config={"model_name": "test/model", "max_steps": steps, "learning_rate": 1e-3},
    )


def write_shards(
    directory: Path, shards: Sequence[Mapping[str, torch.Tensor]], **index_changes: Any
) -> Path:
    """A sharded safetensors checkpoint; the index lists every tensor unless told otherwise."""
    directory.mkdir(parents=True)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"npt_weights-{number:05}-of-{len(shards):05}.safetensors"
        save_file(dict(shard), directory / name)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {}, "weight_map": {**weight_map, **index_changes}}
    (directory / "npt_weights.safetensors.index.json").write_text(json.dumps(index))
    return directory


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, by torch or safetensors."""
    if (directory / "npt_weights.pt").exists():
        loaded = torch.load(directory / "npt_weights.pt", weights_only=True)
        assert isinstance(loaded, dict)
        return loaded
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("npt_weights*.safetensors")):
        shard = load_file(file)
        assert not merged.keys() & shard.keys()
        merged.update(shard)
    return merged


def load_state(directory: Path) -> dict[str, Any]:
    """The training state of a checkpoint, without any allow-list."""
    state = torch.load(directory / "training_state.pt", weights_only=True)
    assert isinstance(state, dict)
    return state


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row-major."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_tensors(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Same names, types, shapes and bytes; the order of names is not looked at."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(actual[name]) == raw(tensor), name


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory with its bytes."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def flip_byte(path: Path, offset: int) -> None:
    """Damage one byte of a file, as a failing disk would."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def offset_of(path: Path, tensor: torch.Tensor) -> int:
    """Where the bytes of a tensor begin in a file."""
    return path.read_bytes().index(raw(tensor))


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Run ``npt-fast`` in this process: exit code, stdout, stderr."""
    from npt_fast.cli.main import main

    capsys.readouterr()
    code: object = None
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    assert isinstance(code, int), "main() must exit with a number"
    captured = capsys.readouterr()
    return code, captured.out, captured.err
