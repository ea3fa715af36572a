"""Texts that were sampled from a base model, kept on disk: every run with one samples it once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from npt_fast.checkpoint.publish import disk_errors, lock
from npt_fast.checkpoint.safetensors_file import read_safetensors
from npt_fast.checkpoint.source_file import NearbyReader, SourceFile
from npt_fast.config import Progress
from npt_fast.errors import CheckpointError, DataError
from npt_fast.hf.convert import components
from npt_fast.hf.weights_file import read_tensor
from npt_fast.paths import exists
from npt_fast.text_sources import DEFAULT_TOKENS
from npt_fast.training.sampling import marks, sample_text

FORMAT = "npt_self_text"
VERSION = 1
"""Of the draw: another one gives other texts."""
_IDS = "ids"
_DIGEST = "sha256"
_MAX_HEADER = 1 << 20  # bytes
_NUMBERS = 4096  # of each weight: few to hash, and enough to notice that it was trained


class SelfText(NamedTuple):
    """A text that was sampled from a base model.

    Attributes:
        ids: int32 ``(rows, max_length)``, on the CPU.
        key: SHA-256, in hexadecimal, of all that decides the text.
        path: file that keeps it.
    """

    ids: Tensor
    key: str
    path: Path


def cache_folder() -> Path:
    """Folder of the sampled texts: ``$XDG_CACHE_HOME/npt_fast``, where that is an absolute path."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "npt_fast"


def self_text(
    model: Any,
    tokenizer: Any,
    tokens: int = DEFAULT_TOKENS,
    *,
    max_length: int,
    seed: int = 42,
    first_tokens: Sequence[str] = (),
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> SelfText:
    """Take a base model's text from the disk; the first time, sample it and keep it there.

    Of several processes that need a text one samples it, and the others wait. The system takes the
    lock from a process that dies, and then the next one samples.

    Args:
        model: causal language model; its NP layers do not matter.
        tokenizer: the model's tokenizer.
        tokens: number of tokens, as for `sample_text`, and so are the arguments that follow.
        max_length: tokens per row.
        seed: seed of the draws.
        first_tokens: texts that rows begin with.
        progress: called while the text is sampled.
        say: called with a line before that.

    Raises:
        DataError: the file is damaged or holds another text, or cannot be written; or as
            `sample_text`.
        ModelError: as `sample_text`.
        StorageError: the disk is full.
    """
    found = marks(model, tokenizer, first_tokens)
    shape = (-(-tokens // max_length), max_length)
    facts = {
        "version": VERSION,
        "weights": _digest(model),
        "positions": getattr(model.config.get_text_config(), "rope_parameters", None),
        "dtype": str(model.dtype),
        "starts": found.starts,
        "end": found.end,
        "unknown": found.unknown,
        "seed": seed,
        "shape": shape,
    }
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path = cache_folder() / f"self-{key[:32]}.safetensors"
    with disk_errors(path, DataError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not exists(path):
            with _being_written(path, say) as file:
                if file is not None:
                    say(f"Sampling {tokens:,} tokens from the base model; {path} keeps them")
                    ids = sample_text(
                        model, tokenizer, tokens,
                        max_length=max_length, seed=seed, first_tokens=first_tokens,
                        progress=progress,
                    ).int()  # fmt: skip
                    file.write(save({_IDS: ids}, {FORMAT: key, _DIGEST: _sha256(ids)}))
    return SelfText(_read(path, key, shape, model), key, path)


@contextmanager
def _being_written(path: Path, say: Callable[[str], None]) -> Iterator[BinaryIO | None]:
    """A file that gets the name `path` at the end; None if another process has written it.

    Processes lock the file while it is written, under another name. What a killed process leaves
    there, the next one writes anew.
    """
    part = path.with_suffix(".part")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        with open(os.open(part, flags, 0o644), "wb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{part}: not a regular file; remove it")
            _wait_for_lock(file, path, say)
            # until it was locked, another process may have written it and its name be gone
            named = _has_name(file, part)
            if exists(path):
                if named:  # opened after the other process had renamed its own
                    part.unlink()
                yield None
                return
            if named:
                try:
                    file.truncate()
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                    part.replace(path)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                return


def _has_name(file: BinaryIO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _wait_for_lock(file: BinaryIO, path: Path, say: Callable[[str], None]) -> None:
    try:
        lock(file.fileno())
    except BlockingIOError:
        say(f"Another process samples this text; waiting for {path}")
        fcntl.flock(file, fcntl.LOCK_EX)


def _read(path: Path, key: str, shape: tuple[int, int], model: Any) -> Tensor:
    try:
        found = read_safetensors(SourceFile.of(path, follow_links=True), _MAX_HEADER)
        entry = found.entries.get(_IDS)
        if (
            found.metadata.get(FORMAT) != key
            or entry is None
            or (entry.dtype.name, entry.shape, len(found.entries)) != ("I32", shape, 1)
        ):
            raise CheckpointError(f"{path}: is not the text of this model that its name says")
        ids = read_tensor(entry, NearbyReader())
        if found.metadata.get(_DIGEST) != _sha256(ids):
            raise CheckpointError(f"{path}: is damaged: its SHA-256 is another")
        if not 0 <= int(ids.min()) <= int(ids.max()) < model.get_input_embeddings().num_embeddings:
            raise CheckpointError(f"{path}: holds tokens that the model does not know")
    except CheckpointError as error:
        raise DataError(f"{error}; remove it, and the text is sampled anew") from None
    return ids


def _sha256(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().data).hexdigest()


@torch.no_grad()
def _digest(model: nn.Module) -> str:
    """SHA-256 of some numbers of each weight of the base model.

    `fingerprint` would not do: models that share norms and embeddings write different texts.
    """
    added = {id(p) for part in components(model).values() for p in part.parameters()}
    found = hashlib.sha256()
    for parameter in model.parameters():
        if id(parameter) not in added:
            flat = parameter.detach().flatten()
            some = flat[:: -(-flat.numel() // _NUMBERS) or 1].cpu().contiguous()
            found.update(some.view(torch.uint8).numpy().data)
    return found.hexdigest()
