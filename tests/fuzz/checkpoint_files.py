"""Files of a checkpoint, and what torch, safetensors and json read from them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import npt_fast as npt
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.checkpoint.digests import read_digests
from npt_fast.checkpoint.tensor_source import TensorSource, open_tensors
from npt_fast.checkpoint.training_state import (
    TrainingState,
    read_multi_layer_state,
    read_training_state,
)
from npt_fast.cli.analyze import analyze
from npt_fast.cli.verify import verify
from npt_fast.errors import CheckpointError, NPTError, VerificationError
from npt_fast.training.progress import read_progress
from tests import checkpoints
from tests.fuzz import mutations
from tests.fuzz.target import Target, same_values
from tests.second_readers import same

_SMALL: dict[str, Any] = {"d": 4, "f": 6, "rank": 2}


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _safetensors(folder: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> bytes:
    path = folder / "seed"
    save_file(dict(tensors), path, metadata or None)
    data = path.read_bytes()
    path.unlink()
    return data


def _layers() -> list[dict[str, torch.Tensor]]:
    """Weights of layers with every modulation type."""
    single = checkpoints.layer_weights(3, modulation="single", **_SMALL)
    triple = checkpoints.layer_weights(5, num_ranks=2, dtype=torch.bfloat16, **_SMALL)
    return [single, single | triple]


def _pt_weights(folder: Path) -> list[bytes]:
    views = {name: tensor.t().contiguous().t() for name, tensor in _layers()[0].items()}
    together = dict(zip(views, torch.zeros(3, 2, 4), strict=True))
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in _layers()[0].items()}
    return [_saved(value) for value in (*_layers(), views, together, parameters)]


def _same_as_torch(path: Path, found: TensorSource) -> None:
    same(found.tensors, torch.load(path, weights_only=True, map_location="cpu"))


def _described() -> dict[str, Any]:
    return {
        "format_version": 1,
        "base_model": {"name": "a/b", "hidden_size": 4, "intermediate_size": 6},
        "layers": {"3": {"modulation": "single", "rank": 2, "step": 3, "fidelity": 0.5,
                         "residual": "kept", "certificate": {
                             "layers": [3], "tokens": 9, "kl": 0.5, "perplexity_ratio": 1.5,
                             "texts": {"a": {"tokens": 9, "kl": 0.5, "perplexity_ratio": 2}},
                         }}},
    }  # fmt: skip


def _safetensors_weights(folder: Path) -> list[bytes]:
    described = json.dumps(_described())
    kinds = {str(kind): torch.ones(2, 3).to(kind) for kind in (torch.int8, torch.float16)}
    return [
        *(_safetensors(folder, weights, format="pt") for weights in _layers()),
        _safetensors(folder, _layers()[0], npt_config=described),
        _safetensors(folder, {**kinds, "none": torch.zeros(0, 2), "one": torch.tensor(1.5)}),
    ]


def _same_as_safetensors(path: Path, found: TensorSource) -> None:
    same(found.tensors, load_file(path))


def _shards(folder: Path) -> list[bytes]:
    single, both = _layers()
    other = {name: tensor for name, tensor in both.items() if name not in single}
    made = checkpoints.write_shards(folder / "made", [single, other])
    for file in made.iterdir():
        shutil.copy(file, folder)
    return [(folder / "npt_weights.safetensors.index.json").read_bytes()]


def _same_as_the_index(path: Path, found: TensorSource) -> None:
    where = json.loads(path.read_bytes())["weight_map"]
    same(found.tensors, {name: load_file(path.parent / where[name])[name] for name in where})


# --- a checkpoint's other files

_CONFIG = {"model_name": "a/b", "max_steps": 3, "learning_rate": 1e-3, "x": {"y": [1.5, None]}}
_ORIGINAL_SUMMARY = {
    "merged_layers": [3], "layer_sources": {"3": "/x/checkpoint-800"}, "total_parameters": 3,
}  # fmt: skip


def _trained(folder: Path) -> None:
    """Write a checkpoint with all files; the file to change is replaced later."""
    merged = folder / "merged"
    made = checkpoints.trained_checkpoint(folder / "made", 3, modulation="single", **_SMALL)
    npt.merge([made], merged, verify=True)
    for file in merged.iterdir():
        shutil.copy(file, folder)
    # one of the original's tools writes it, and merges do not
    (folder / "training_metadata.json").write_text('{"architecture_version": "v2"}')


def _beside(name: str, *more: Mapping[str, Any]) -> Callable[[Path], list[bytes]]:
    """The content of a file of `_trained`, and other valid contents."""

    def prepare(folder: Path) -> list[bytes]:
        _trained(folder)
        return [(folder / name).read_bytes(), *(json.dumps(content).encode() for content in more)]

    return prepare


def _every_verb(path: Path) -> Any:
    """The checkpoint that the file belongs to, after every verb has read it."""
    folder = path.parent
    checkpoint = open_checkpoint(folder)
    if path.name in checkpoint.unread:
        raise CheckpointError(checkpoint.unread[path.name])
    # as the command line prints
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")
    with redirect_stdout(printed), redirect_stderr(printed):
        analyze(checkpoint=[str(folder)], verbose=True)
        analyze(checkpoint=[str(folder)], json=True)
        verify(str(folder))
        _merged(folder)
    return checkpoint


def _merged(folder: Path) -> None:
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    try:
        npt.merge([folder], output, verify=True)
    except NPTError as error:
        assert not isinstance(error, VerificationError)
        return
    again = npt.verify(output)
    assert again.passed, again.problems


def _same_as_json(path: Path, found: Any) -> None:
    same_values(strict_json.read_foreign(path), json.loads(path.read_bytes()))


def _training_states(folder: Path) -> list[bytes]:
    _trained(folder)
    weights = _layers()[0]
    plain = checkpoints.adamw_state(weights)
    scaled = checkpoints.adamw_state(weights, numpy_lr=True, amsgrad=True) | {
        "scaler_state_dict": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                              "growth_interval": 2000, "_growth_tracker": 0},
        "best_val_loss": torch.tensor(0.5),
        "merge_info": {"sources": [1, 2.5, None], "step": torch.tensor(3)},
        "data_state": {
            "source": "x", "seed": 1, "max_length": 8, "stride": 8, "held_out": 0, "block": 4,
            "windows": 3, "before": 2, "epoch": 0, "window": 1, "skip": 0, "documents": "{}",
            "tokens": [1, 2],
        },
    }  # fmt: skip
    return [(folder / "training_state.pt").read_bytes(), _saved(plain), _saved(scaled)]


def _training_state(path: Path) -> TrainingState:
    checkpoint = open_checkpoint(path.parent)
    state = read_training_state(path, checkpoint.modules)
    assert state is not None
    _every_verb(path)
    read_progress(state)
    return state


def _loaded(path: Path) -> Any:
    """The content as torch reads it, with the numpy scalars of a cosine schedule."""
    scalar = np.float64(0).__reduce__()[0]  # its module has moved between versions of numpy
    numbers: Any = [scalar, np.dtype, *map(type, map(np.dtype, "fdiq?"))]
    with torch.serialization.safe_globals(numbers):
        return torch.load(path, weights_only=True, map_location="cpu")


def _named_tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested data, by the keys that lead to it; a shared one only once."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _named_tensors(
                item, f"{name}.{str(key)[:80]}" if name else str(key)[:80], seen
            )


def _same_state(path: Path, found: TrainingState) -> None:
    loaded = _loaded(path)
    assert found.global_step == int(loaded.pop("global_step"))
    optimizer = loaded.pop("optimizer_state_dict", None)
    moments = {
        f"optimizer.{index}.{name}": value
        for index, state in (optimizer or {}).get("state", {}).items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    ours = {entry.name: entry for entry in found.tensors() if entry.name.startswith("optimizer.")}
    same(ours, moments)
    content = dict(_named_tensors(loaded, "", set()))
    others = {
        entry.name: entry
        for entry in found.tensors()
        if not entry.name.startswith(("optimizer.", "optimizer_state_dict."))
    }
    same(others, content)


def _multi_layer_states(folder: Path) -> list[bytes]:
    _trained(folder)
    own = checkpoints.multi_layer_state([3], losses=[0.5, (1, None, True)], note="x")
    as_json = json.loads(json.dumps(own))
    return [_saved(own), _saved(as_json)]


def _multi_layer_state(path: Path) -> Any:
    state = read_multi_layer_state(path)
    _every_verb(path)
    return state


def _same_multi_layer_state(path: Path, found: Any) -> None:
    loaded = _loaded(path)
    weights = {int(layer): weight for layer, weight in loaded.get("layer_weights", {}).items()}
    layers = [int(layer) for layer in loaded["layers_to_train"]]
    expected = {**loaded, "layers_to_train": layers, "layer_weights": weights}
    same_values(_plain(found), _plain(expected))


def _plain(value: Any) -> Any:
    """Nested data in Python's own types."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _digests(path: Path) -> list[tuple[str, ...]]:
    found = [*read_digests(path.parent)]
    _every_verb(path)
    return list(found)


def _same_lines(path: Path, found: list[tuple[str, ...]]) -> None:
    assert "".join("\t".join(line) + "\n" for line in found).encode() == path.read_bytes()


TARGETS = [
    Target("pt", "npt_weights.pt", mutations.TORCH, _pt_weights, open_tensors, _same_as_torch),
    Target("safetensors", "npt_weights.safetensors", mutations.SAFETENSORS,
           _safetensors_weights, open_tensors, _same_as_safetensors),
    Target("index", "npt_weights.safetensors.index.json", mutations.JSON, _shards, open_tensors,
           _same_as_the_index),
    Target("training_state", "training_state.pt", mutations.TORCH, _training_states,
           _training_state, _same_state),
    Target("multi_layer_state", "multi_layer_state.pt", mutations.TORCH, _multi_layer_states,
           _multi_layer_state, _same_multi_layer_state),
    Target("npt_config", "npt_config.json", mutations.JSON,
           _beside("npt_config.json", _described()), _every_verb, _same_as_json),
    Target("training_metadata", "training_metadata.json", mutations.JSON,
           _beside("training_metadata.json", {"architecture_version": "v1", "more": [1]}),
           _every_verb, _same_as_json),
    Target("merge_summary", "merge_summary.json", mutations.JSON,
           _beside("merge_summary.json", _ORIGINAL_SUMMARY), _every_verb, _same_as_json),
    Target("merge_digests", "merge_digests.txt", mutations.TEXT, _beside("merge_digests.txt"),
           _digests, _same_lines),
    Target("config", "config.json", mutations.JSON, _beside("config.json", _CONFIG), _every_verb,
           _same_as_json),
]  # fmt: skip
