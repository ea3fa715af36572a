"""The safetensors file of a modulation, to and from plain records.

``layer.11.gate.v_a`` and ``.v_b`` hold the terms. ``npt_modulation`` in the metadata is JSON with
the base model's sizes, the origin, and the projections of each layer. Opening a file reads only its
header; a layer's tensors are read when they are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from npt_fast.checkpoint import file_kind, strict_json
from npt_fast.checkpoint.keys import PROJECTIONS
from npt_fast.checkpoint.replaced_file import replacing
from npt_fast.checkpoint.safetensors_file import read_safetensors
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.errors import CheckpointError, NPTError, TransferError
from npt_fast.schema import (
    FLAG,
    INDEX,
    MAPPING,
    POSITIVE,
    TEXT,
    Kind,
    checked,
    list_of,
    mapping_of,
    one_of,
    or_none,
    shown,
)
from npt_fast.transfer.base_model import SIZES, BaseModel
from npt_fast.transfer.origin import ORIGIN
from npt_fast.transfer.terms import Layers, Terms

FORMAT = "npt_modulation"
VERSION = 1
_MAX_HEADER = 4 << 20  # bytes: 3 MiB of origin, and about 100 bytes for each of 10,000 tensors
_DTYPES = ("F16", "BF16", "F32", "F64")
_SIZES = {"name": TEXT} | dict.fromkeys(SIZES, POSITIVE)
_BASE_MODEL = {**_SIZES, "fingerprint": or_none(TEXT)}  # earlier versions did not record the last
_DESCRIPTION: dict[str, Kind] = {
    "base": MAPPING,
    "origin": ORIGIN,
    "vectors": FLAG,
    "layers": mapping_of(INDEX, list_of(one_of(PROJECTIONS))),
}


class Contents(NamedTuple):
    """Contents of a file: the fields of `npt_fast.Modulation`, in their order."""

    layers: Layers
    base: BaseModel
    origin: Mapping[str, Any]
    vectors: bool


def write(contents: Contents, path: Path) -> None:
    """Write a file, replacing one of that name in one step.

    Raises:
        TransferError: the folder cannot be written to, or the file could not be read back.
    """
    try:
        with replacing(path) as temporary:
            data = packed(contents, temporary)
            with temporary.open("xb") as file:  # exclusive: follows no link that was planted there
                file.write(data)
            read_back(temporary)
    except NPTError as error:
        problem = str(error).removeprefix(f"{temporary}: ")
        raise TransferError(f"{path}: cannot be written: {problem}") from None
    except OSError as error:
        raise TransferError(f"{path}: cannot be written: {error}") from error


def packed(contents: Contents, path: Path) -> bytes:
    """Serialize contents to the bytes of a file.

    Args:
        contents: Contents of the file.
        path: Path of the file, for messages.

    Raises:
        TransferError: safetensors or JSON cannot hold the contents.
    """
    if not ORIGIN.fits(contents.origin):  # checked first: json follows cycles and shared parts
        raise TransferError(f"{path}: its origin must be {ORIGIN.name}")
    tensors = {
        f"layer.{layer}.{projection}.{name}": tensor.detach().cpu().contiguous()
        for layer, projections in contents.layers.items()
        for projection, terms in projections.items()
        for name, tensor in terms._asdict().items()
    }
    description = {
        "version": VERSION,
        "base": contents.base.to_dict(),
        "origin": contents.origin,
        "vectors": contents.vectors,
        "layers": {str(n): list(projections) for n, projections in contents.layers.items()},
    }
    try:
        return save(tensors, {FORMAT: json.dumps(description, ensure_ascii=False)})
    except KeyError as error:
        raise TransferError(f"{path}: safetensors has no dtype for terms of {error}") from None
    except (SafetensorError, TypeError, ValueError) as error:
        raise TransferError(f"{path}: {error}") from error


def read_back(path: Path) -> None:
    """Read all tensors of a file that was just written.

    Raises:
        CheckpointError: a reader could not use the file.
    """
    # the values, not the keys: reading the header reads no tensor
    for _ in read(SourceFile.of(path)).layers.values():
        pass


def read(source: SourceFile) -> Contents:
    """Read the header of a file; the tensors are read when they are used.

    Raises:
        CheckpointError: the file is no modulation, is damaged, or has another version.
    """
    path = source.path
    if file_kind.is_pickle(source.read(0, min(source.size, file_kind.HEAD))):
        raise CheckpointError(
            f"{path}: is a pickle, which can run code and is not read; extract the modulation "
            "again and save it as .safetensors"
        )
    found = read_safetensors(source, _MAX_HEADER)
    if FORMAT not in found.metadata:
        raise CheckpointError(f"{path}: is not a modulation: its header has no {FORMAT}")
    # lone surrogates are no UTF-8; the parser refuses them with a message
    text = found.metadata[FORMAT].encode("utf-8", "surrogatepass")
    about = _described(strict_json.parse_object(text, str(path)), path)
    _check(about, found.entries, path)
    with source.open() as fd:
        try:
            # by descriptor: this is the file that was checked, even if its name is another's by now
            file: Any = safe_open(f"/dev/fd/{fd}", framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return Contents(_Layers(file, about.layers, path), about.base, about.origin, about.vectors)


class _Description(NamedTuple):
    """The header: like `Contents`, but with the names of each layer's projections."""

    base: BaseModel
    origin: Mapping[str, Any]
    vectors: bool
    layers: Mapping[int, list[str]]


def _described(given: Mapping[str, Any], path: Path) -> _Description:
    where = f"{path}: its header is wrong"
    version = given.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{path}: has version {shown(version)}; this program reads version {VERSION}"
        )
    found = checked(given, _DESCRIPTION, list(_DESCRIPTION), where, CheckpointError)
    sizes = checked(
        found["base"],
        _BASE_MODEL,
        list(_SIZES),
        f"{where}: base",
        CheckpointError,
        closed=True,
    )
    base, layers = BaseModel(**sizes), {}
    for layer, projections in found["layers"].items():
        if int(layer) >= base.num_hidden_layers:
            raise CheckpointError(
                f"{where}: layer {layer} of a model with {base.num_hidden_layers}"
            )
        if not projections or len(set(projections)) < len(projections):
            raise CheckpointError(
                f"{where}: layer {layer}: its projections are empty or repeat one"
            )
        layers[int(layer)] = projections
    if not layers:
        raise CheckpointError(f"{where}: it names no layers")
    return _Description(base, found["origin"], found["vectors"], layers)


def _check(about: _Description, entries: Mapping[str, TensorEntry], path: Path) -> None:
    """Check that the tensors are exactly those described, with fitting shapes and dtypes."""
    where = f"{path}: its header is wrong"
    d, f = about.base.hidden_size, about.base.intermediate_size
    widths = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    shapes = {name: entry.shape for name, entry in entries.items()}
    expected: dict[str, tuple[int, ...]] = {}
    for layer, projections in about.layers.items():
        for projection in projections:
            names = [f"layer.{layer}.{projection}.{name}" for name in ("v_a", "v_b")]
            terms = max((1, *shapes.get(names[0], ())[:1]))
            for name, width in zip(names, widths[projection], strict=True):
                expected[name] = (terms, width)
            dtypes = {entries[name].dtype.name for name in names if name in entries}
            if len(dtypes) > 1 or not dtypes <= {*_DTYPES}:
                raise CheckpointError(
                    f"{where}: {names[0][:-4]} is {' and '.join(sorted(dtypes))}; v_a and v_b "
                    f"must both be one of {', '.join(_DTYPES)}"
                )
    if expected != shapes:
        wrong = next(n for n in (*expected, *shapes) if expected.get(n) != shapes.get(n))
        raise CheckpointError(
            f"{where}: {shown(wrong)} is {_listed(shapes.get(wrong))}, "
            f"{_listed(expected.get(wrong))} expected"
        )


def _listed(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else f"{list(shape)}"


class _Layers(Mapping[int, Mapping[str, Terms]]):
    """Terms that are read when they are used, from the file as it was when it was opened."""

    def __init__(self, file: Any, layers: Mapping[int, list[str]], path: Path) -> None:
        self._file = file
        self._layers = layers
        self._path = path

    def __getitem__(self, layer: int) -> Mapping[str, Terms]:
        return {
            projection: Terms(
                *(self._tensor(f"layer.{layer}.{projection}.{v}") for v in ("v_a", "v_b"))
            )
            for projection in self._layers[layer]
        }

    def _tensor(self, name: str) -> torch.Tensor:
        # cloned: a mapped tensor raises SIGBUS when somebody truncates the file
        tensor: torch.Tensor = self._file.get_tensor(name).clone()
        if not tensor.isfinite().all():
            raise CheckpointError(f"{self._path}: {name} holds NaN or infinity")
        return tensor

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
