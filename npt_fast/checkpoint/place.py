"""Where a checkpoint is that a user names: on the disk, or on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from npt_fast import hub
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.own_files import CONFIG, PATTERNS, is_checkpoint_file
from npt_fast.checkpoint.strict_json import MAX_BYTES, MAX_SMALL
from npt_fast.checkpoint.tensor_source import WEIGHTS, WHOLE_MODEL, is_on_disk, locate_checkpoint
from npt_fast.checkpoint.whole_model import NPT
from npt_fast.errors import CheckpointError, HubError
from npt_fast.hub import HubName, Listing, UnreachableError, parse_name
from npt_fast.paths import exists, expand, path_errors, user_path

_ADDRESS = re.compile(r"(hf|https?)://")
_FILE = re.compile(r".*\.(pt|safetensors|json)")
_MODEL_SHARD = re.compile(r"(pytorch_)?model-[0-9]+-of-[0-9]+\.(safetensors|bin)")
_WEIGHTS_ENDINGS = (".pt", ".safetensors", ".bin")


class Place(NamedTuple):
    """Where a checkpoint is.

    Attributes:
        name: what messages and records call it: the path as the user wrote it, or
            ``hf://org/repo@commit``.
        path: folder or weights file on the disk.
        note: line that says that it was found elsewhere; "" if it was not.
    """

    name: str
    path: Path
    note: str = ""


def locate(given: str | Path, revision: str | None = None) -> Place:
    """Where a checkpoint is; one on the Hub is brought into the Hub's cache.

    Args:
        given: path, or ``org/repo`` or ``hf://org/repo`` on the Hub, with ``@revision`` behind it.
        revision: branch, tag or commit on the Hub, instead of ``@revision``.

    Raises:
        CheckpointError: there is no checkpoint, or no such revision.
        PathError: `given` is not a valid path.
    """
    name = hub_name(given, revision)
    return on_disk(given) if name is None else _download(name)


def on_disk(given: str | Path) -> Place:
    """Where a checkpoint on the disk is; raises as `locate`."""
    return Place(expand(given), *locate_checkpoint(given))


def hub_name(given: str | Path, revision: str | None = None) -> HubName | None:
    """The repository on the Hub that a user means; None if a path is meant.

    Without ``hf://``, what is on the disk comes first.

    Raises:
        CheckpointError: the name is malformed, `revision` is given for a path, or the path cannot
            be examined.
        PathError: `given` is not a valid path.
    """
    given = expand(given)
    if _ADDRESS.match(given) is None:
        with path_errors(given, CheckpointError):
            is_path = _FILE.fullmatch(given) or is_on_disk(user_path(given))
        if is_path and revision is not None:
            raise CheckpointError(
                f"{given}: is a path, which has no revisions; leave out the revision, or write "
                "hf:// in front to mean the Hub"
            )
        return None if is_path else parse_name(given, revision)
    name = parse_name(given, revision)
    if name is None:
        raise CheckpointError(
            f"{given}: names on the Hub are hf://org/repo or hf://org/repo@revision"
        )
    return name


def list_own_files(name: HubName) -> Listing:
    """Ask the Hub which files a checkpoint has of its own.

    Raises:
        CheckpointError: it holds no NPT weights, or a JSON file is larger than any that is read.
        HubError: the Hub has no such repository or revision, refuses it, or cannot be reached.
    """
    commit, sizes = hub.list_files(name)
    own = {file for file in sizes if is_checkpoint_file(file)}
    if not own & {*WEIGHTS}:
        own |= {file for file in sizes if file in WHOLE_MODEL or _MODEL_SHARD.fullmatch(file)}
    if not own & {*WEIGHTS, *WHOLE_MODEL}:
        raise CheckpointError(
            f"{name.given}: holds no NPT weights on the Hub: expected {WEIGHTS[0]} or {WEIGHTS[2]}"
        )
    for file in own:
        limit = MAX_BYTES if file.endswith(".index.json") else MAX_SMALL
        if file.endswith(".json") and sizes[file] > limit:
            raise CheckpointError(
                f"{name.given}: {file}: {sizes[file]:,} bytes of JSON; more than {limit:,} are "
                "refused"
            )
    return Listing(commit, {file: sizes[file] for file in own})


def cached(given: str) -> Path:
    """The folder of a checkpoint in the Hub's cache; the Hub is not asked.

    Raises:
        HubError: it is not in the cache.
    """
    name = parse_name(given)
    folder = name and hub.in_cache(name, PATTERNS)
    if folder is None:
        raise HubError(f"{given}: is not in the Hub's cache")
    return folder


def _download(name: HubName) -> Place:
    """Bring a checkpoint's own files into the cache; or take it from there without the Hub."""
    try:
        own = list_own_files(name).sizes
    except UnreachableError as error:
        folder = hub.in_cache(name, PATTERNS)
        if folder is None:
            raise
        return Place(name.at(folder.name), folder, f"{error}; using what is in the cache")
    weights = [file for file in own if file.endswith(_WEIGHTS_ENDINGS)]
    # weights last: where they are, the files that say what they mean are too
    folder = hub.download(name, [file for file in own if file not in weights])
    if not own.keys() & {*WEIGHTS} and not _describes_np_layers(folder / CONFIG):
        raise CheckpointError(f"{name.given}: is a model without NP layers, not a checkpoint")
    hub.download(name._replace(revision=folder.name), weights)
    return Place(name.at(folder.name), folder)


def _describes_np_layers(config: Path) -> bool:
    with path_errors(config, CheckpointError):
        return exists(config) and NPT in strict_json.read_foreign(config)
