"""Checkpoints on the Hugging Face Hub: their names, their files, and the way into the Hub's cache.

huggingface_hub does the transfer. It is imported only where a name of the Hub is met, since merging
what is on the disk works without it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from npt_fast.checkpoint.own_files import PATTERNS, is_checkpoint_file
from npt_fast.checkpoint.strict_json import MAX_BYTES, MAX_SMALL
from npt_fast.checkpoint.tensor_source import WEIGHTS, WHOLE_MODEL, is_on_disk
from npt_fast.errors import CheckpointError, HubError, NPTError
from npt_fast.paths import user_path

_PREFIX = "hf://"
_NAME = re.compile(
    rf"({_PREFIX})?(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_FILE = re.compile(r".*\.(pt|safetensors|json)")
_MODEL_SHARD = re.compile(r"(pytorch_)?model-[0-9]+-of-[0-9]+\.(safetensors|bin)")
_WEIGHTS_ENDINGS = (".pt", ".safetensors", ".bin")
LOG_IN = "log in (hf auth login, or HF_TOKEN)"
"""What to do where the Hub refuses somebody unknown."""


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


class HubName(NamedTuple):
    """The name of a repository on the Hub.

    Attributes:
        given: as the user wrote it.
        repo: ``org/repo``.
        revision: branch, tag or commit; None for the default branch.
    """

    given: str
    repo: str
    revision: str | None = None

    def at(self, commit: str) -> str:
        """The name of one commit, which never means anything else."""
        return f"{_PREFIX}{self.repo}@{commit}"


class Listing(NamedTuple):
    """The files of a checkpoint in a repository.

    Attributes:
        name: the repository.
        commit: the commit that its revision is now.
        sizes: size in bytes of each of the checkpoint's own files.
    """

    name: HubName
    commit: str
    sizes: Mapping[str, int]


class UnreachableError(HubError):
    """The Hub has not answered, or may not be asked; the cache may hold what is wanted."""


def is_hub_name(text: str) -> bool:
    """Whether a text begins as the names do that records have for checkpoints on the Hub."""
    return text.startswith(_PREFIX)


def parse_name(text: str, revision: str | None = None) -> HubName | None:
    """A text as a name on the Hub, with or without ``hf://``; None if it has not the form of one.

    Raises:
        CheckpointError: `revision` is given, but not to a name on the Hub without one.
    """
    match = None if ".." in text else _NAME.fullmatch(text)
    if revision is None:
        return HubName(text, match["repo"], match["revision"]) if match else None
    if match is None or match["revision"] is not None:
        raise CheckpointError(f"{text}: revision {revision} needs a name of the form org/repo")
    return parse_name(f"{text}@{revision}")


def hub_name(given: str, revision: str | None = None) -> HubName | None:
    """The repository on the Hub that a user means; None if a path is meant.

    Without ``hf://``, what is on the disk comes first.

    Raises:
        CheckpointError: the name is malformed, or `revision` is given for a path on the disk.
        OSError: the path cannot be examined.
    """
    if not is_hub_name(given) and (_FILE.fullmatch(given) or is_on_disk(user_path(given))):
        if revision is not None:
            raise CheckpointError(
                f"{given}: is on the disk, which has no revisions; "
                "leave out the revision, or write hf:// in front to mean the Hub"
            )
        return None
    name = parse_name(given, revision)
    if name is None and is_hub_name(given):
        raise CheckpointError(
            f"{given}: names on the Hub are hf://org/repo or hf://org/repo@revision"
        )
    return name


def list_files(name: HubName) -> Listing:
    """Ask the Hub which files a checkpoint has.

    Raises:
        CheckpointError: it holds no NPT weights, or a JSON file is larger than any that is read.
        HubError: the Hub has no such repository or revision, refuses it, or cannot be reached.
    """
    with hub_errors(name):
        from huggingface_hub import HfApi, constants

        info = HfApi().model_info(
            name.repo,
            revision=name.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
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
    return Listing(name, str(info.sha), {file: sizes[file] for file in own})


def download(name: HubName) -> Place:
    """Bring a checkpoint's own files into the Hub's cache; those that are there are not fetched.

    If the Hub cannot be reached, what the cache holds is taken.

    Raises:
        CheckpointError: as `list_files`.
        HubError: as `list_files`; or the download is interrupted. Whole files are kept then.
    """
    try:
        listing = list_files(name)
    except UnreachableError as error:
        folder = _in_cache(name)
        if folder is None:
            raise
        return Place(name.at(folder.name), folder, f"{error}; using what is in the cache")
    weights = [file for file in listing.sizes if file.endswith(_WEIGHTS_ENDINGS)]
    small = [file for file in listing.sizes if file not in weights]
    with hub_errors(name):
        from huggingface_hub import snapshot_download

        # weights last: where they are, the files that say what they mean are too
        folder = Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=small))
        snapshot_download(name.repo, revision=folder.name, allow_patterns=weights)
    return Place(name.at(folder.name), folder)


def cached(given: str) -> str:
    """The folder of a checkpoint in the Hub's cache; the Hub is not asked.

    Raises:
        HubError: it is not in the cache.
    """
    name = parse_name(given)
    folder = name and _in_cache(name)
    if folder is None:
        raise HubError(f"{given}: is not in the Hub's cache")
    return str(folder)


def _in_cache(name: HubName) -> Path | None:
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            name.repo,
            revision=name.revision,
            local_files_only=True,
            allow_patterns=list(PATTERNS),
            ignore_patterns=["*/*"],
        )
    except Exception:
        return None
    return Path(found)


@contextmanager
def hub_errors(name: HubName) -> Iterator[None]:
    """Turn what the Hub and its library raise into an error of one line.

    Raises:
        HubError: the Hub has no such repository or revision, or refuses it.
        UnreachableError: there was no answer.
    """
    # a name without hf:// may be that of a file or folder, mistyped
    and_hub = "the Hub" if is_hub_name(name.given) else "no such path, and the Hub"
    try:
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise HubError(
            f"{name.given}: {and_hub} needs the package huggingface_hub; pip install 'npt_fast[hf]'"
        ) from error
    try:
        with quiet_hub(bars=not sys.stderr.isatty()):
            yield
    except NPTError:
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"{name.given}: is gated on the Hub: ask for access on its page, and {LOG_IN}"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{name.given}: has no revision {name.revision} on the Hub") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"Checkpoint not found: {name.given}: {and_hub} has no such repository, or a private "
            f"one: correct the name, or {LOG_IN}"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = f"; {LOG_IN}" if status in (401, 403) else ""
        kind = UnreachableError if status >= 500 else HubError
        raise kind(f"{name.given}: the Hub answers {status}: {_reason(error)}{remedy}") from None
    except Exception as error:  # the network and its library fail in their own ways
        off = isinstance(error, errors.OfflineModeIsEnabled)
        problem = (
            "is turned off (HF_HUB_OFFLINE)" if off else f"cannot be reached: {_reason(error)}"
        )
        raise UnreachableError(f"{name.given}: {and_hub} {problem}") from None


@contextmanager
def quiet_hub(*, bars: bool = True) -> Iterator[None]:
    """Silence huggingface_hub within the block; afterwards it is as the caller had it.

    Args:
        bars: whether its progress bars are silenced, as well as its warnings.
    """
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    verbosity = logging.get_verbosity()
    restore = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        restore()


def _reason(error: Exception) -> str:
    return shorten(" ".join(str(error).split()) or type(error).__name__, 200)
