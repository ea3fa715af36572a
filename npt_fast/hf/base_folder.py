"""The files of a base model that an export takes over, in a folder or on the Hub; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npt_fast.checkpoint.npt_config import SIZES
from npt_fast.checkpoint.own_files import is_checkpoint_file
from npt_fast.checkpoint.whole_model import NPT
from npt_fast.errors import ModelError
from npt_fast.hf.exported import ARCHITECTURE_PREFIX, MODEL_TYPE_PREFIX
from npt_fast.hf.model_folder import (
    ADAPTER,
    CONFIG,
    INDEXES,
    READ_WHOLE,
    SMALL_FILES,
    WEIGHTS,
    check_files,
    check_keys,
    check_sizes,
    held,
    read_small,
    weights_of,
)
from npt_fast.hf.model_types import MODEL_TYPES
from npt_fast.hf.tokenizer import library_errors
from npt_fast.paths import exists, is_directory, is_file, path_errors, user_path
from npt_fast.schema import COUNT, checked, or_none, shown

_SMALL_PATTERNS = tuple(f"*{ending}" for ending in READ_WHOLE)
_OTHER_NAMES = {
    "hidden_size": ("n_embd",),
    "intermediate_size": ("n_inner", "ffn_hidden_size"),
    "num_hidden_layers": ("n_layer", "num_layers"),
}


@dataclass(frozen=True, slots=True)
class BaseFolder:
    """A base model on the disk, whose files have been checked.

    Attributes:
        name: its name, as the user wrote it.
        folder: where its files are; of a model of the Hub, in the Hub's cache.
        config: ``config.json`` of this model once it is exported, without its NP layers.
        small: tokenizer, generation config and other small files to take over.
        weights: weights files, with their index if there is one; empty if there are none.
        revision: commit on the Hub; None in a folder.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    small: Sequence[Path]
    weights: Sequence[Path]
    revision: str | None


def open_base(name: str, *, weights: bool) -> BaseFolder:
    """Find and check a base model; of the weights only their headers are read.

    Args:
        name: folder, or id on the Hub.
        weights: whether the weights are taken over; those on the Hub are downloaded only then.

    Raises:
        ModelError: there is no such model, a file is unsafe or cannot be read, the weights are not
            those of its ``config.json``, or it has NP layers itself.
    """
    path, revision = user_path(name), None
    with path_errors(path, ModelError):
        local = is_directory(path)
        if not local and (exists(path) or name.startswith(("/", ".", "~"))):
            raise ModelError(f"{name}: no such folder; give the base model (--model_name)")
    if not local:
        path = download_weights(name) if weights else _download(name)
        revision = path.name
    check_files(path)
    if not is_file(path / CONFIG):
        raise ModelError(f"{name}: has no {CONFIG}: it is no base model")
    contents = {file: read_small(path / file) for file in SMALL_FILES if exists(path / file)}
    for file, content in contents.items():
        check_keys(content, file, name)
    config = contents[CONFIG]
    if NPT in config:
        raise ModelError(f"{name}: has NP layers itself; give its base model (--model_name)")
    exported = _exported(name, config)
    found = base_weights(name, path) if local or weights else []
    with path_errors(path, ModelError):
        small = [file for file in sorted(path.iterdir()) if is_taken(file)]
    return BaseFolder(
        name,
        path,
        exported,
        small,
        found if weights else (),
        revision,
    )


def size_names(config: Mapping[str, Any]) -> dict[str, str]:
    """What the content of a ``config.json`` calls each of `SIZES`."""
    return {
        size: next((name for name in _OTHER_NAMES.get(size, ()) if name in config), size)
        for size in SIZES
    }


def _exported(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    given, architectures = config.get("model_type"), config.get("architectures")
    if given == "mistral" and "layer_types" in config:
        given = "ministral"  # as transformers reads such a file
    if not isinstance(given, str) or given not in MODEL_TYPES:
        raise ModelError(
            f"{name}: {CONFIG}: models of type {shown(given)} cannot be exported; npt-fast models "
            "lists the types"
        )
    own = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(own, str) or not own.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(
            f"{name}: {CONFIG}: architectures must begin with a causal language model, such as "
            f"LlamaForCausalLM, not {shown(own)}"
        )
    names = size_names(config)
    needed = [names.pop(size) for size in SIZES if size != "intermediate_size"]
    kinds = dict.fromkeys(needed, COUNT) | dict.fromkeys(names.values(), or_none(COUNT))
    checked(config, kinds, needed, f"{name}: {CONFIG}", ModelError)
    for key, number in _numbers(config):
        if not math.isfinite(number):
            raise ModelError(
                f"{name}: {CONFIG}: {key} is {number}, which JSON does not have; correct it"
            )
    changed = {
        "architectures": [ARCHITECTURE_PREFIX + own],
        "model_type": MODEL_TYPE_PREFIX + given,
    }
    return {key: value for key, value in {**config, **changed}.items() if key != "auto_map"}


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for inner, item in value.items():
            yield from _numbers(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)


def base_weights(name: str, folder: Path) -> list[Path]:
    """The weights files of a base model, with their index if there is one, after a check.

    Args:
        name: name of the model, for messages.
        folder: folder of the model, which `check_files` has passed.

    Raises:
        ModelError: the folder holds no weights, a file of them is missing or unreadable, or they
            are less than ``config.json`` describes.
    """
    found = weights_of(folder)
    if not found:
        raise ModelError(f"{name}: holds no {' or '.join(WEIGHTS)}")
    for path in found:
        if not exists(path) or path.parent != folder:
            raise ModelError(f"{name}: {path.relative_to(folder)} is not in the folder")
    there = held(folder)
    if there is not None and is_file(folder / CONFIG):
        check_sizes(read_small(folder / CONFIG), there, folder)
    if found[0].name in WEIGHTS:
        return found
    return [*found, *(folder / index for index in INDEXES if f"{found[0].suffix}." in index)]


def is_taken(file: Path) -> bool:
    """Whether an export takes a file of the base model over, apart from config and weights."""
    return (
        file.name.endswith(READ_WHOLE)
        and not file.name.endswith(".index.json")
        and file.name not in (CONFIG, ADAPTER)
        and not is_checkpoint_file(file.name)
        and is_file(file)
    )


def download_weights(name: str, revision: str | None = None, cache: str | None = None) -> Path:
    """Fetch a base model of the Hub, with its weights, unless it is there.

    Args:
        name: id on the Hub.
        revision: commit, branch or tag; the newest commit if None.
        cache: folder to download into; the Hub's cache if None.

    Returns:
        The folder of its files.

    Raises:
        ModelError: it cannot be fetched.
    """
    folder = _download(name, "model*.safetensors", revision=revision, cache=cache)
    if any(path.suffix == ".safetensors" for path in weights_of(folder)):
        return folder
    return _download(name, "pytorch_model*.bin", revision=revision, cache=cache)


def _download(
    name: str, *patterns: str, revision: str | None = None, cache: str | None = None
) -> Path:
    """Fetch a model's small files, and those of the patterns."""
    from huggingface_hub import snapshot_download

    with library_errors(f"{name}: the base model cannot be found"):
        found = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache,
            allow_patterns=[*_SMALL_PATTERNS, *patterns],
            ignore_patterns=["*/*"],
        )
        return Path(found)
