"""Lay out output files: decide the offset of everything in them, before they are written.

Offsets are chosen so that a file system can share blocks. It shares whole 4096-byte pages, so a
tensor gets the same offset modulo 4096 (its phase) as in its source. A zip file can have any
padding, so every record of a ``.pt`` gets its own phase. A safetensors file can have none between
tensors, so its whole data section gets the phase that suits the most bytes, and each shard of a
sharded set is made of tensors with one phase.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.byte_mover import PAGE
from npt_fast.checkpoint.dtypes import BY_TORCH_NAME
from npt_fast.checkpoint.recipe import Recipe
from npt_fast.checkpoint.safetensors_file import build_header
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.checkpoint.tensor_entry import TensorEntry
from npt_fast.checkpoint.tensor_source import SAFETENSORS_INDEX, SAFETENSORS_WEIGHTS
from npt_fast.checkpoint.torch_pickle_writer import encode
from npt_fast.checkpoint.torch_symbols import StorageRef, TensorRef
from npt_fast.checkpoint.torch_zip import (
    CENTRAL,
    END,
    END64,
    END64_LOCATOR,
    LOCAL,
    Members,
    dense_strides,
    read_members,
)
from npt_fast.errors import CheckpointError

_RECORD_ALIGNMENT = 64  # bytes, as in files of torch.save
_MAX_32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor in an output file; `offset` is its first byte there."""

    recipe: Recipe
    offset: int


class OutputFile(Protocol):
    """A file to be written: `pieces` are its tensors, and `frame` gives all other bytes.

    `header` is the part of the frame that describes the content: a pickle, a safetensors header, or
    the whole file if it has no tensors.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def header(self) -> bytes: ...

    @property
    def pieces(self) -> Iterable[Piece]: ...

    def frame(self, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of everything but tensors.

        Args:
            crcs: CRC-32 of each computed tensor, by name.
        """
        ...


def runs(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Groups of pieces, each of which is one contiguous range in one source and in the output."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not _continues(run[-1], piece):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _continues(last: Piece, piece: Piece) -> bool:
    a, b = last.recipe.source, piece.recipe.source
    # one system call then copies both, and a page that they share can be cloned
    return (
        a is not None
        and b is not None
        and last.recipe.is_copy
        and piece.recipe.is_copy
        and a.file == b.file
        and a.offset + a.nbytes == b.offset
        and last.offset + a.nbytes == piece.offset
    )


@dataclass(frozen=True, slots=True)
class BytesFile:
    """A small file without tensors."""

    name: str
    data: bytes
    pieces: Sequence[Piece] = ()

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def header(self) -> bytes:
        return self.data

    def frame(self, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        yield 0, self.data


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """A file that is copied as a whole, whatever it holds."""

    name: str
    source: SourceFile
    header: bytes = b""

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def pieces(self) -> Sequence[Piece]:
        content = TensorEntry(self.name, BY_TORCH_NAME["uint8"], (self.size,), self.source, 0)
        return [Piece(Recipe.unchanged(content), 0)]

    def frame(self, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        yield from ()


@dataclass(slots=True)
class TorchZipLayout:
    """The layout of a ``.pt`` file, which `seal` makes."""

    name: str
    size: int = 0
    _recipes: list[Recipe] = field(default_factory=list)
    _small: dict[bytes, bytes] = field(default_factory=dict)
    _headers_at: array[int] = field(default_factory=lambda: array("Q"))
    _offsets: array[int] = field(default_factory=lambda: array("Q"))
    _directory_at: int = 0

    @classmethod
    def seal(cls, name: str, content: Any) -> TorchZipLayout:
        """Lay out a file that holds `content`.

        Args:
            name: name of the file.
            content: plain data, with a `Recipe` in place of every tensor, or a `TensorEntry` if the
                tensor is only copied.

        Raises:
            CheckpointError: our reader could not read `content` again.
        """
        layout = cls(name)

        def place(item: Any) -> TensorRef | None:
            if isinstance(item, TensorEntry):
                item = Recipe.unchanged(item)
            return layout._add(item) if isinstance(item, Recipe) else None

        try:
            layout._lay_out(encode(content, place))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        return layout

    def find(self, file: SourceFile) -> Iterator[TensorEntry] | None:
        """The tensors of a file with the same pickle as this layout; None if its pickle differs.

        An equal pickle need not be decoded: it has the same meaning in every file.

        Raises:
            CheckpointError: the file is broken or lacks a tensor.
        """
        members, _, data = read_members(file)
        return self._find(file, members) if data == self.pickled else None

    def _find(self, file: SourceFile, members: Members) -> Iterator[TensorEntry]:
        for key, recipe in enumerate(self._recipes):
            record = members.get(f"data/{key}")
            if record is None or record.nbytes != recipe.nbytes:
                problem = "is missing" if record is None else f"has {record.nbytes} bytes"
                raise CheckpointError(
                    f"{file.path}: {recipe.name}: its record data/{key} {problem}"
                )
            name, dtype, shape = recipe.name, recipe.dtype, recipe.shape
            yield TensorEntry(name, dtype, shape, file, record.offset, record.crc32)

    @property
    def pieces(self) -> Iterable[Piece]:
        return map(Piece, self._recipes, self._offsets[len(self._small) :])

    @property
    def header(self) -> bytes:
        if self._recipes:
            return self.pickled
        return b"".join(data for _, data in sorted(self.frame({})))

    @property
    def pickled(self) -> bytes:
        """The bytes of the pickle that describes the content."""
        return next(iter(self._small.values()))

    def _add(self, recipe: Recipe) -> TensorRef:
        key = str(len(self._recipes))
        self._recipes.append(recipe)
        dtype = recipe.dtype
        numel = math.prod(recipe.shape) if dtype.storage else recipe.nbytes
        storage = StorageRef(dtype if dtype.storage else None, key, numel)
        return TensorRef(storage, dtype, 0, recipe.shape, dense_strides(recipe.shape))

    def _lay_out(self, pickled: bytes) -> None:
        root = self.name.removesuffix(".pt").encode()
        self._small = {
            root + b"/data.pkl": pickled,
            root + b"/byteorder": b"little",
            root + b"/version": b"3\n",
        }
        cursor = 0
        for name, size, phase in self._members():
            start = cursor + LOCAL.size + len(name) + len(_wide_sizes(size)) + 4
            # at most 4095 bytes, which fit the 16-bit length of an extra field
            pad = -start % _RECORD_ALIGNMENT if phase is None else (phase - start) % PAGE
            self._headers_at.append(cursor)
            self._offsets.append(start + pad)
            cursor = start + pad + size
        self._directory_at = cursor
        self.size = cursor + len(self._directory({}))

    def _members(self) -> Iterator[tuple[bytes, int, int | None]]:
        """Name, size in bytes and wanted phase of every member; None if any phase will do."""
        for name, data in self._small.items():
            yield name, len(data), None
        root = self.name.removesuffix(".pt").encode()
        for key, recipe in enumerate(self._recipes):
            phase = None
            # a smaller tensor has no whole page to share, and padding may take 4095 bytes
            if recipe.is_copy and recipe.source is not None and recipe.nbytes >= PAGE:
                phase = recipe.source.offset % PAGE
            yield root + b"/data/%d" % key, recipe.nbytes, phase

    def frame(self, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        rows = zip(self._members(), self._headers_at, self._offsets, self._crcs(crcs), strict=True)
        for (name, size, _), header_at, offset, crc in rows:
            wide = _wide_sizes(size)
            # padding as torch.save writes it: an extra field "FB", which zip readers skip
            pad = offset - header_at - LOCAL.size - len(name) - len(wide) - 4
            extra = wide + struct.pack("<2sH", b"FB", pad) + b"Z" * pad
            narrow = min(size, _MAX_32)
            # version 4.5 is the first with zip64; no time stamp, so that equal inputs give equal
            # bytes
            yield header_at, LOCAL.pack(
                b"PK\x03\x04", 45 if wide else 20, 0, 0, 0, 0, crc, narrow, narrow,
                len(name), len(extra),
            ) + name + extra  # fmt: skip
        yield from zip(self._offsets, self._small.values(), strict=False)
        yield self._directory_at, self._directory(crcs)

    def _crcs(self, computed: Mapping[str, int]) -> Iterator[int]:
        """CRC-32 of every member; a copied tensor has that of its source, 0 if not recorded."""
        for data in self._small.values():
            yield zlib.crc32(data)
        for recipe in self._recipes:
            if recipe.is_copy and recipe.source is not None:
                yield recipe.source.crc32
            else:
                yield computed.get(recipe.name, 0)

    def _directory(self, crcs: Mapping[str, int]) -> bytes:
        out = bytearray()
        rows = zip(self._members(), self._headers_at, self._crcs(crcs), strict=True)
        for (name, size, _), header_at, crc in rows:
            wide = [value for value in (size, size, header_at) if value >= _MAX_32]
            extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            version = 45 if wide else 20
            narrow = min(size, _MAX_32)
            out += CENTRAL.pack(
                b"PK\x01\x02", version, version, 0, 0, 0, 0, crc, narrow, narrow, len(name),
                len(extra), 0, 0, 0, 0, min(header_at, _MAX_32),
            )  # fmt: skip
            out += name + extra
        size, count, start = len(out), len(self._headers_at), self._directory_at
        out += END64.pack(
            b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, size, start
        )  # fmt: skip
        out += END64_LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
        few = min(count, 0xFFFF)
        out += END.pack(
            b"PK\x05\x06", 0, 0, few, few, min(size, _MAX_32), min(start, _MAX_32), 0
        )  # fmt: skip
        return bytes(out)


def _wide_sizes(size: int) -> bytes:
    """The zip64 field of a local header; empty if the size fits 32 bits."""
    return struct.pack("<HHQQ", 1, 16, size, size) if size >= _MAX_32 else b""


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """The layout of a safetensors file."""

    name: str
    header: bytes
    pieces: Sequence[Piece]

    @property
    def size(self) -> int:
        return len(self.header) + sum(piece.recipe.nbytes for piece in self.pieces)

    def frame(self, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        yield 0, self.header


def lay_out_safetensors(
    recipes: Sequence[Recipe], metadata: Mapping[str, str], max_shard_size: int
) -> list[OutputFile]:
    """Lay out one safetensors file, or shards and an index if one file would be too large.

    Args:
        recipes: recipes of all tensors.
        metadata: strings for ``__metadata__`` of every file.
        max_shard_size: maximum bytes of data in a file; a larger tensor gets a shard of its own.

    Raises:
        CheckpointError: a header exceeds what the format allows.
    """
    ordered = _in_storage_order(recipes)
    if sum(recipe.nbytes for recipe in ordered) <= max_shard_size:
        return [_one_file(SAFETENSORS_WEIGHTS, ordered, metadata)]
    shards: list[list[Recipe]] = []
    for _, group in sorted(_by_phase(ordered).items()):
        room = 0
        for recipe in group:
            if recipe.nbytes > room:
                shards.append([])
                room = max_shard_size
            shards[-1].append(recipe)
            room -= recipe.nbytes
    files: list[OutputFile] = []
    weight_map = {}
    stem = SAFETENSORS_WEIGHTS.removesuffix(".safetensors")
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        files.append(_one_file(name, shard, metadata))
        weight_map.update({recipe.name: name for recipe in shard})
    total = sum(recipe.nbytes for recipe in recipes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return [
        *files,
        BytesFile(SAFETENSORS_INDEX, strict_json.dump(index, limit=strict_json.MAX_BYTES)),
    ]


def _in_storage_order(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes, wide types first, which aligns all; then in source order, which joins ranges."""
    files: dict[SourceFile, int] = {}
    for recipe in recipes:
        if recipe.source is not None:
            files.setdefault(recipe.source.file, len(files))

    def order(recipe: Recipe) -> tuple[int, bool, int, int]:
        source = recipe.source
        if source is None or not recipe.is_copy:
            return -recipe.dtype.bits, True, 0, 0
        return -recipe.dtype.bits, False, files[source.file], source.offset

    return sorted(recipes, key=order)


def _by_phase(ordered: Sequence[Recipe]) -> dict[int, list[Recipe]]:
    """Recipes grouped by phase, so that each group can be cloned; one group if that is no use."""
    groups: dict[int, list[Recipe]] = {}
    files = set()
    phase = end = -1
    for recipe in ordered:
        offset = -1
        if recipe.is_copy and recipe.source is not None:
            offset = recipe.source.offset
            files.add(recipe.source.file)
        if offset < 0 or offset != end:  # a new range begins
            phase = max(offset, 0) % PAGE
        end = offset + recipe.nbytes if offset >= 0 else -1
        groups.setdefault(phase, []).append(recipe)
    # every record of a .pt has a phase of its own, which would give one shard per tensor
    return groups if len(groups) <= len(files) + 1 else {0: list(ordered)}


def _one_file(name: str, recipes: Sequence[Recipe], metadata: Mapping[str, str]) -> OutputFile:
    placed = []
    begin = 0
    # 0: phase for a file in which nothing is copied
    votes: Counter[int] = Counter({0: 0})
    for recipe in recipes:
        placed.append((recipe.name, recipe.dtype, recipe.shape, begin, begin + recipe.nbytes))
        if recipe.is_copy and recipe.source is not None:
            votes[(recipe.source.offset - begin) % PAGE] += recipe.nbytes
        begin += recipe.nbytes
    # by the format, the length of the header is a multiple of 8, so the phase of the data is too
    # -p: the same choice every time where two phases have as many bytes
    phase = max((p for p in votes if p % 8 == 0), key=lambda p: (votes[p], -p))
    header = build_header(placed, metadata, PAGE, phase)
    pieces = [
        Piece(recipe, len(header) + place[3]) for recipe, place in zip(recipes, placed, strict=True)
    ]
    return SafetensorsLayout(name, header, pieces)


def compact_json(value: Any) -> str:
    """JSON on one line, for safetensors metadata."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
