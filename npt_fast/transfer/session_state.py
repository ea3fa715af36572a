"""The state of a session, and the folder that it is saved in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.publish import StagedDirectory, disk_errors
from npt_fast.checkpoint.source_file import SourceFile, read_file
from npt_fast.config import SamplingStrategy
from npt_fast.errors import CheckpointError, NPTError, TransferError
from npt_fast.hf.tokenizer import PLAIN, Reading
from npt_fast.paths import exists, is_directory, path_errors
from npt_fast.schema import (
    COUNT,
    FLAG,
    MAPPING,
    NUMBER,
    POSITIVE,
    TEXT,
    WHOLE,
    Kind,
    checked,
    is_text,
    list_of,
    one_of,
)
from npt_fast.transfer import modulation_file
from npt_fast.transfer.base_model import BaseModel
from npt_fast.transfer.generate import Sampling
from npt_fast.transfer.modulation import Modulation, open_modulation

FORMAT = "npt_shelf"
VERSION = 1
_INDEX = "session.json"
_MAX_INDEX = 4 << 20  # bytes
_FILE_NAME = Kind(
    "the name of a .safetensors file in this folder",
    lambda value: is_text(value) and re.fullmatch(r"[\w-]+\.safetensors", value) is not None,
)
_INDEX_KINDS = {
    "modulations": list_of(MAPPING),
    "tracked": list_of(TEXT),
    "layers": list_of(COUNT),
    "settings": MAPPING,
}
_READING = {"special_tokens": FLAG, "chat": FLAG}
_MODULATION = {"name": TEXT, "file": _FILE_NAME, "created": TEXT}
_SETTINGS = {
    "tokens": POSITIVE,
    "strategy": one_of(get_args(SamplingStrategy)),
    "temperature": NUMBER,
    "top_k": POSITIVE,
    "top_p": NUMBER,
    "seed": WHOLE,
}


@dataclass(frozen=True)
class Item:
    """A modulation on the shelf.

    Attributes:
        modulation: The modulation.
        created: Time when it was made, as ISO 8601.
    """

    modulation: Modulation
    created: str


@dataclass(frozen=True)
class State:
    """Everything that commands change, except base weights; immutable, so that undo is simple.

    Attributes:
        shelf: Modulations by name.
        tracked: Texts; the probability of each one's first token is reported.
        layers: NP layers that are on.
        settings: How tokens are chosen, where a command does not say.
        reading: How texts become tokens.
    """

    shelf: Mapping[str, Item]
    tracked: tuple[str, ...]
    layers: tuple[int, ...]
    settings: Sampling
    reading: Reading


def write_state(state: State, model: Any, target: Path) -> None:
    """Write a folder of safetensors files and a JSON index, replacing an older session.

    Raises:
        TransferError: the folder exists and holds something else, or cannot be written.
    """
    with path_errors(target, TransferError):
        if exists(target) and not _is_session(target):
            raise TransferError(
                f"{target}: exists and is not a saved session; choose another folder"
            )
    # numbers: a modulation's name may hold what no file's name can
    files = {name: f"{number}.safetensors" for number, name in enumerate(state.shelf)}
    index = {
        FORMAT: VERSION,
        "base": BaseModel.of(model).to_dict(),
        "modulations": [
            {"name": name, "file": files[name], "created": item.created}
            for name, item in state.shelf.items()
        ],
        "tracked": list(state.tracked),
        "layers": list(state.layers),
        "settings": asdict(state.settings),
        "reading": asdict(state.reading),
    }
    with disk_errors(target, TransferError), StagedDirectory(target, replace=True) as staged:
        try:
            for name, item in state.shelf.items():
                path = staged.path / files[name]
                with staged.file(files[name]) as file:
                    file.write(modulation_file.packed(item.modulation.contents, path))
                modulation_file.read_back(path)
            with staged.file(_INDEX) as file:
                file.write(strict_json.dump(index))
            _read_index(staged.path)
        except NPTError as error:
            problem = str(error).replace(f"{staged.path}/", "")
            raise TransferError(f"{target}: cannot be written: {problem}") from None
        staged.publish()


def read_state(folder: Path, model: Any) -> State:
    """Read a saved session.

    Raises:
        CheckpointError: a file is missing, damaged, or a pickle.
        ModelError: a modulation belongs to another base model.
    """
    index = _read_index(folder)
    shelf = {
        entry["name"]: Item(
            read_modulation(SourceFile.of(folder / entry["file"]), model), entry["created"]
        )
        for entry in index["modulations"]
    }
    return State(
        MappingProxyType(shelf),
        tuple(index["tracked"]),
        tuple(sorted(index["layers"])),
        index["settings"],
        index["reading"],
    )


def read_modulation(file: SourceFile, model: Any) -> Modulation:
    """Read a whole file, which may be replaced later, onto the model's device."""
    found = open_modulation(file)
    found.check_base_model(model)
    return found.to(model.device)


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a saved session, with all values checked."""
    where = folder / _INDEX
    given = strict_json.parse_object(read_file(where, _MAX_INDEX), str(where))
    if given.get(FORMAT) != VERSION:
        raise CheckpointError(f"{where}: is not a saved session of version {VERSION}")

    def part(
        given: Any, kinds: Mapping[str, Kind], name: str = "", *, closed: bool = False
    ) -> dict[str, Any]:
        about = f"{where}: is wrong{name}"
        return checked(given, kinds, list(kinds), about, CheckpointError, closed=closed)

    index = part(given, _INDEX_KINDS)
    index["modulations"] = [part(m, _MODULATION, ": modulations") for m in index["modulations"]]
    for key in ("name", "file"):
        if len({entry[key] for entry in index["modulations"]}) < len(index["modulations"]):
            raise CheckpointError(f"{where}: is wrong: two modulations have one {key}")
    settings = part(index["settings"], _SETTINGS, ": settings", closed=True)
    try:
        index["settings"] = Sampling(**settings)
    except TransferError as error:
        raise CheckpointError(f"{where}: is wrong: settings: {error}") from None
    # sessions of before have no such entry, and added no special tokens
    reading = part(given.get("reading", asdict(PLAIN)), _READING, ": reading", closed=True)
    try:
        index["reading"] = Reading(**reading)
    except ValueError as error:
        raise CheckpointError(f"{where}: is wrong: reading: {error}") from None
    return index


def _is_session(folder: Path) -> bool:
    """Whether a folder holds only what `write_state` writes, and so may be replaced."""
    if not is_directory(folder):
        return False
    names = {file.name for file in folder.iterdir()}
    return _INDEX in names and all(n.endswith(".safetensors") for n in names - {_INDEX})
