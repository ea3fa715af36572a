"""What the commands of a session change, and the folder that it is saved in."""

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
from npt_fast.paths import exists, is_directory, path_errors
from npt_fast.schema import (
    COUNT,
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
_MAX_INDEX = 4 << 20
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
        modulation: the thing itself.
        created: when, as ISO 8601.
    """

    modulation: Modulation
    created: str


@dataclass(frozen=True)
class State:
    """All of a session that commands change, besides base weights; never changed in place.

    Attributes:
        shelf: modulations by name.
        tracked: texts whose first token's probability is followed.
        layers: NP layers that are on.
        settings: how text is continued, where a command does not say.
    """

    shelf: Mapping[str, Item]
    tracked: tuple[str, ...]
    layers: tuple[int, ...]
    settings: Sampling


def write_state(state: State, model: Any, target: Path) -> None:
    """Write a folder: safetensors and an index in JSON; an older one of a session is replaced.

    Raises:
        TransferError: the folder exists and is not that of a session, or cannot be written.
    """
    with path_errors(target, TransferError):
        if exists(target) and not _is_session(target):
            raise TransferError(f"{target}: exists and is no saved session; choose another folder")
    files = {name: f"{number}.safetensors" for number, name in enumerate(state.shelf)}
    index = {
        FORMAT: VERSION,
        "base": asdict(BaseModel.of(model)),
        "modulations": [
            {"name": name, "file": files[name], "created": item.created}
            for name, item in state.shelf.items()
        ],
        "tracked": list(state.tracked),
        "layers": list(state.layers),
        "settings": asdict(state.settings),
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
    """Read a saved session, for a model.

    Raises:
        CheckpointError: a file is missing, broken, or a pickle.
        ModelError: a modulation is of another base model.
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
    )


def read_modulation(file: SourceFile, model: Any) -> Modulation:
    """Into the model's memory: the file may be replaced while the session goes on."""
    found = open_modulation(file)
    found.check_base_model(model)
    return found.to(model.device)


def _read_index(folder: Path) -> dict[str, Any]:
    """What the index of a saved session holds, of the types that it has."""
    where = folder / _INDEX
    given = strict_json.parse_object(read_file(where, _MAX_INDEX), str(where))
    if given.get(FORMAT) != VERSION:
        raise CheckpointError(f"{where}: is no saved session of version {VERSION}")

    def part(
        given: Any, kinds: Mapping[str, Kind], name: str = "", *, closed: bool = False
    ) -> dict[str, Any]:
        about = f"{where}: does not hold{name}"
        return checked(given, kinds, list(kinds), about, CheckpointError, closed=closed)

    index = part(given, _INDEX_KINDS)
    index["modulations"] = [part(m, _MODULATION, ": modulations") for m in index["modulations"]]
    for key in ("name", "file"):
        if len({entry[key] for entry in index["modulations"]}) < len(index["modulations"]):
            raise CheckpointError(f"{where}: does not hold: two modulations of one {key}")
    try:
        index["settings"] = Sampling(
            **part(index["settings"], _SETTINGS, ": settings", closed=True)
        )
    except TransferError as error:
        raise CheckpointError(f"{where}: does not hold: settings: {error}") from None
    return index


def _is_session(folder: Path) -> bool:
    """Whether it holds what `save` writes and nothing else, so that it may be replaced."""
    if not is_directory(folder):
        return False
    names = {file.name for file in folder.iterdir()}
    return _INDEX in names and all(n.endswith(".safetensors") for n in names - {_INDEX})
