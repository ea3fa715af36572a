"""Modulations as files: safetensors, with everything that is known about them in the header.

``layer.11.gate.v_a`` and ``.v_b`` hold the terms; ``npt_modulation`` in the metadata is JSON with
the base model's sizes, the origin and the layers. Reading opens the header alone; a layer's tensors
are mapped when they are asked for.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from npt_fast.checkpoint import file_kind, strict_json
from npt_fast.errors import CheckpointError, TransferError
from npt_fast.paths import user_path
from npt_fast.transfer.modulation import FORMAT, PROJECTIONS, VERSION, Base, Modulation, Terms


def save_modulation(modulation: Modulation, path: Path) -> None:
    """Write a modulation; a file of that name is replaced in one step.

    Raises:
        TransferError: the folder cannot be written to, or its origin is not JSON.
    """
    data = packed(modulation, path)
    temporary = path.with_name(f".{secrets.token_hex(16)}.npt-fast")
    try:
        with temporary.open("xb") as file:  # follows no link that somebody has put there
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        raise TransferError(f"{path}: cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def packed(modulation: Modulation, path: Path) -> bytes:
    """What the file of a modulation holds.

    Args:
        path: of the file, for messages.

    Raises:
        TransferError: its origin is not JSON.
    """
    tensors = {
        f"layer.{layer}.{projection}.{name}": tensor.detach().cpu().contiguous()
        for layer, projection, terms in modulation.walk()
        for name, tensor in terms._asdict().items()
    }
    description = {
        "version": VERSION,
        "base": asdict(modulation.base),
        "origin": modulation.origin,
        "vectors": modulation.vectors,
        "layers": {str(n): list(projections) for n, projections in modulation.layers.items()},
    }
    try:
        return save(tensors, {FORMAT: json.dumps(description, allow_nan=False)})
    except (SafetensorError, RecursionError, ValueError) as error:  # of an odd origin
        raise TransferError(f"{path}: cannot be written: {error}") from error


def load_modulation(path: str | Path) -> Modulation:
    """Read a modulation's header; tensors come when they are used.

    Raises:
        CheckpointError: the file is none, is broken, or is of a later version.
    """
    path = user_path(path)
    if path.suffix in (".pkl", ".pickle", ".pt"):
        raise CheckpointError(
            f"{path}: pickles can run code and are not read; extract the modulation again and "
            "save it as .safetensors"
        )
    try:
        with path.open("rb") as opened:
            head = opened.read(file_kind.HEAD)
        if not file_kind.may_be_safetensors(head):
            raise CheckpointError(f"{path}: cannot be read: it is {file_kind.describe(head)}")
        file: Any = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if FORMAT not in metadata:
        raise CheckpointError(f"{path}: is no modulation: its header has no {FORMAT}")
    description = strict_json.parse_object(metadata[FORMAT].encode(), str(path))
    if description.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {description.get('version')}, this program reads {VERSION}"
        )
    try:
        base = Base(**description["base"])
        layers = {
            int(layer): [str(projection) for projection in projections]
            for layer, projections in description["layers"].items()
        }
        origin, vectors = dict(description["origin"]), bool(description["vectors"])
        _check(base, layers, shapes)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its description does not hold: {error}") from error
    return Modulation(_Layers(file, layers), base, origin, vectors)


def _check(base: Base, layers: Mapping[int, list[str]], shapes: Mapping[str, Any]) -> None:
    """The tensors are those of the description, no more and no fewer, and of fitting shapes."""
    if not all(type(size) is int and size > 0 for size in base.sizes):
        raise ValueError("sizes of the base model")
    if not layers:
        raise ValueError("no layers")
    d, f = base.hidden_size, base.intermediate_size
    widths = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    expected = {}
    for layer, projections in layers.items():
        if not 0 <= layer < base.num_hidden_layers or not projections:
            raise ValueError(f"layer {layer}")
        for projection in projections:
            if projection not in PROJECTIONS:
                raise ValueError(f"projection {projection!r:.40}")
            first = shapes.get(f"layer.{layer}.{projection}.v_a", [0])
            for name, width in zip(("v_a", "v_b"), widths[projection], strict=True):
                expected[f"layer.{layer}.{projection}.{name}"] = [first[0], width]
    if expected != dict(shapes):
        wrong = next(n for n in {*expected, *shapes} if expected.get(n) != shapes.get(n))
        raise ValueError(f"{wrong!r:.80} is {shapes.get(wrong)}, {expected.get(wrong)} expected")


class _Layers(Mapping[int, Mapping[str, Terms]]):
    """Terms that are read when they are asked for, from the file as it was when it was opened."""

    def __init__(self, file: Any, layers: Mapping[int, list[str]]) -> None:
        self._file = file
        self._layers = layers

    def __getitem__(self, layer: int) -> Mapping[str, Terms]:
        projections = self._layers[layer]
        return {
            projection: Terms(
                *(self._file.get_tensor(f"layer.{layer}.{projection}.{v}") for v in ("v_a", "v_b"))
            )
            for projection in projections
        }

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
