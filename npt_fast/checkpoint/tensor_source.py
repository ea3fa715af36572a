"""Find and open the weights of a checkpoint in any format; only headers are read.

A path may name a checkpoint directory, a ``.pt`` file, a ``.safetensors`` file, or the index of a
sharded set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from npt_fast import paths
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.safetensors_file import read_safetensors
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.tensor_entry import Record, TensorEntry
from npt_fast.checkpoint.torch_symbols import TensorRef
from npt_fast.checkpoint.torch_zip import TorchZip, read_torch_zip
from npt_fast.checkpoint.training_run import BEST, CHECKPOINTS, FINAL, checkpoints_in
from npt_fast.errors import CheckpointError
from npt_fast.paths import path_errors, user_path

PT_WEIGHTS = "npt_weights.pt"
SAFETENSORS_WEIGHTS = "npt_weights.safetensors"
SAFETENSORS_INDEX = "npt_weights.safetensors.index.json"
_ACCUMULATED = "accumulated_npt_weights.pt"  # of the original's sequential training: all layers
WEIGHTS = (PT_WEIGHTS, _ACCUMULATED, SAFETENSORS_WEIGHTS, SAFETENSORS_INDEX)
# of a whole model, as transformers looks for them
WHOLE_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# a name without a slash or a leading dot: no index leads out of the checkpoint's folder
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.(safetensors|bin)")


@dataclass(frozen=True, slots=True)
class TensorSource:
    """The tensors of one set of weights.

    Attributes:
        path: path of the file, or of the index of the shards.
        format: ``"pt"`` or ``"safetensors"``.
        files: all files that hold data.
        tensors: tensors by name, in file order.
        metadata: strings from the safetensors header, the first one if there are shards.
        headers: place of the header or pickle that describes the tensors, for each file.
        note: line that says which other weights beside them were not read; "" if there are none.
    """

    path: Path
    format: str
    files: tuple[SourceFile, ...]
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    headers: tuple[Record, ...]
    note: str = ""


def locate_checkpoint(given: str | Path) -> tuple[Path, str]:
    """Path of the checkpoint that a user means by `given`, and a note if it is another path.

    Training writes checkpoints into the folder ``checkpoints``, which the users' guide leaves out.
    So ``run/checkpoint-800`` also means ``run/checkpoints/checkpoint-800``.

    Raises:
        CheckpointError: there is no checkpoint, or the path cannot be examined.
        PathError: `given` is not a valid path.
    """
    path = user_path(given)
    with path_errors(path, CheckpointError):
        return _locate(path)


def _locate(path: Path) -> tuple[Path, str]:
    if paths.is_file(path) or find_weights(path):
        return path, ""
    nested = _nested(path)
    if find_weights(nested):
        return nested, f"{path}: using {nested}"
    if not paths.exists(path):
        raise CheckpointError(f"Checkpoint not found: {path}")
    if newest := newest_checkpoint(path):
        raise CheckpointError(
            f"{path}: is the folder of a run; name a checkpoint of it, such as {newest}"
        )
    similar = sorted(file.name for file in path.glob("*npt_weights*"))
    raise CheckpointError(
        f"NPT weights not found at {path}: expected {PT_WEIGHTS} or {SAFETENSORS_WEIGHTS} in it"
        + (f"; it holds {similar[0]:.80}" if similar else "")
    )


def _nested(path: Path) -> Path:
    return path.parent / CHECKPOINTS / path.name


def is_on_disk(path: Path) -> bool:
    """Whether `locate_checkpoint` finds anything for a path.

    Raises:
        CheckpointError: a folder holds weights in two formats.
        OSError: the path cannot be examined.
    """
    return paths.exists(path) or find_weights(_nested(path)) is not None


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint in the folder of a training run, or in its folder ``checkpoints``.

    Returns:
        The checkpoint with weights and the highest step; without any, ``final`` or ``best``. None
        if `run` is a checkpoint itself, or no folder of a run.

    Raises:
        CheckpointError: a folder cannot be listed, or holds weights in two formats.
        OSError: a path cannot be examined.
    """
    if find_weights(run):
        return None
    for folder in (run / CHECKPOINTS, run):
        by_step = reversed(checkpoints_in(folder).values())
        for checkpoint in (*by_step, folder / FINAL, folder / BEST):
            if find_weights(checkpoint):
                return checkpoint
    return None


def find_weights(directory: Path) -> Path | None:
    """The weights file in a checkpoint directory, or the index of its shards; None without weights.

    Weights of a whole model count if there are none of NPT.

    Raises:
        CheckpointError: the directory holds weights in two formats, which may differ.
        OSError: the directory cannot be examined.
    """
    # a broken link or a folder of that name counts too: opening it reports what is wrong
    present = [name for name in WEIGHTS if paths.exists(directory / name)]
    if len(present) > 1 and present != [PT_WEIGHTS, _ACCUMULATED]:
        names = " and ".join(present)
        raise CheckpointError(f"{directory}: holds {names}; name the file that you mean")
    present += [name for name in WHOLE_MODEL if paths.exists(directory / name)]
    return directory / present[0] if present else None


def open_tensors(path: Path) -> TensorSource:
    """Read the headers of the weights at `path`, but no tensor data.

    Raises:
        CheckpointError: there are no weights, or a file is broken, unsafe or ambiguous.
    """
    weights = path if paths.is_file(path) else find_weights(path)
    if weights is None:
        raise CheckpointError(f"NPT weights not found at {path}")
    note = ""
    if weights != path and weights.name == PT_WEIGHTS:
        other = weights.with_name(_ACCUMULATED)
        if paths.exists(other):
            note = f"{path}: using {PT_WEIGHTS}; to use {_ACCUMULATED} beside it, name that file"
    if weights.name.endswith(".index.json"):
        return _open_shards(weights)
    file = SourceFile.of(weights, follow_links=weights == path)
    tensors, metadata, header = _read(file)
    format = "safetensors" if weights.suffix == ".safetensors" else "pt"
    return TensorSource(weights, format, (file,), tensors, metadata, (header,), note)


def _read(file: SourceFile) -> tuple[Mapping[str, TensorEntry], Mapping[str, str], Record]:
    if file.path.suffix == ".safetensors":
        content = read_safetensors(file)
        return content.entries, content.metadata, content.header
    archive = read_torch_zip(file)
    return _tensors(archive), {}, archive.header


def _tensors(archive: TorchZip) -> dict[str, TensorEntry]:
    file = archive.file
    if not isinstance(archive.content, dict):
        raise CheckpointError(f"{file.path}: holds no dict of tensors")
    tensors = {}
    for name, value in archive.content.items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise CheckpointError(f"{file.path}: {name!r:.80} is not a named tensor")
        tensors[name] = archive.entry(name, value)
    return tensors


def _open_shards(index: Path) -> TensorSource:
    weight_map = strict_json.read_foreign(index, strict_json.MAX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            shown = shard if isinstance(shard, str) else "something else"
            raise CheckpointError(f"{index}: {name:.80} is in {shown:.80}, not a file beside it")
    files = []
    headers = []
    tensors: dict[str, TensorEntry] = {}
    metadata: Mapping[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        file = SourceFile.of(index.parent / shard)
        files.append(file)
        found, about, header = _read(file)
        headers.append(header)
        metadata = metadata or about
        for name, entry in found.items():
            if weight_map.get(name) != shard:
                # other readers would take either copy (design.md#file-readers)
                says = f"says it is in {weight_map[name]}" if name in weight_map else "lacks it"
                raise CheckpointError(f"{index}: {name:.80} is in {shard}, but the index {says}")
            tensors[name] = entry
    if missing := weight_map.keys() - tensors.keys():
        name = min(missing)
        raise CheckpointError(f"{index}: {name:.80} is not in {weight_map[name]}")
    format = "safetensors" if files[0].path.suffix == ".safetensors" else "pt"
    return TensorSource(index, format, tuple(files), tensors, metadata, tuple(headers))
