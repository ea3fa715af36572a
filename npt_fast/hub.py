"""The Hugging Face Hub: names of repositories, their files, the cache, and errors of one line.

huggingface_hub does the transfer. It is imported only where a name of the Hub is met, since merging
what is on the disk works without it.
"""

from __future__ import annotations

import errno
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from npt_fast.errors import CheckpointError, HubError, NPTError, StorageError
from npt_fast.schema import is_count

_PREFIX = "hf://"
_NAME = re.compile(
    rf"({_PREFIX})?(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_COMMIT = re.compile("[0-9a-f]{40,64}")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_SMALL = 4 << 20  # bytes of a file that is taken whole from a server that cannot send parts
LOG_IN = "log in (hf auth login, or HF_TOKEN)"
"""What to do where the Hub refuses somebody unknown."""
_REMEDIES = {401: f"; {LOG_IN}", 403: f"; {LOG_IN}", 429: f"; wait some minutes, or {LOG_IN}"}


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
    """The files of a repository.

    Attributes:
        commit: the commit that its revision is now.
        sizes: size in bytes of each file.
    """

    commit: str
    sizes: Mapping[str, int]


class UnreachableError(HubError):
    """The Hub has not answered, or may not be asked; the cache may hold what is wanted."""


def is_hub_name(text: str) -> bool:
    """Whether a text begins with ``hf://``, as names of checkpoints on the Hub do in records."""
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


def list_files(name: HubName) -> Listing:
    """Ask the Hub which files a repository has.

    Raises:
        HubError: as `hub_errors`, or the Hub's answer is not a list of files.
    """
    with hub_errors(name):
        from huggingface_hub import HfApi, constants

        info = HfApi().model_info(
            name.repo,
            revision=name.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    sizes: dict[str, Any] = {file.rfilename: file.size for file in info.siblings or ()}
    commit = str(info.sha)
    named = all(isinstance(file, str) and is_count(size) for file, size in sizes.items())
    if not named or _COMMIT.fullmatch(commit) is None:
        raise HubError(f"{name.given}: the Hub's answer lacks a commit, or a file's name or size")
    return Listing(commit, sizes)


def download(name: HubName, files: Sequence[str]) -> Path:
    """Bring files into the Hub's cache, except those that are there.

    Returns:
        The folder in the cache, whose name is the commit.

    Raises:
        HubError: as `hub_errors`.
        StorageError: the disk is full.
    """
    with hub_errors(name, listed=True):
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(name.repo, revision=name.revision, allow_patterns=list(files))
        )


def in_cache(name: HubName, patterns: Sequence[str]) -> Path | None:
    """The folder of a repository in the Hub's cache; the Hub is not asked.

    Args:
        name: the repository.
        patterns: files that must be there if the repository has them, as for `fnmatch`.
    """
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            name.repo,
            revision=name.revision,
            local_files_only=True,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )
    except Exception:
        return None
    return Path(found)


def all_in_cache(name: HubName, commit: str, files: Collection[str]) -> bool:
    """Whether the Hub's cache holds all these files of a commit."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name.repo, file, revision=commit) for file in files)
    return all(isinstance(path, str) for path in found)


def read_part(
    name: HubName, commit: str, file: str, size: int, begin: int, end: int
) -> tuple[int, bytes]:
    """Fetch the bytes of a file from `begin` to `end`; nothing of it goes into the cache.

    Args:
        name: the repository.
        commit: commit of the file.
        file: name of the file.
        size: size of the whole file in bytes.
        begin: first byte.
        end: byte behind the last one.

    Returns:
        The place of the first byte that came, and the bytes, which may be all of a small file.

    Raises:
        HubError: as `hub_errors`; or the server sends whole files only, or too little or too much.
    """
    with hub_errors(name._replace(revision=commit), listed=True):
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        headers = {
            **build_hf_headers(),
            "Range": f"bytes={begin}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        with http_stream_backoff(
            "GET",
            hf_hub_url(name.repo, file, revision=commit),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            max_retries=2,
            retry_on_exceptions=(),
        ) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                if size > _SMALL:
                    raise HubError(
                        f"{name.given}: {file}: its server sends whole files only, so that headers "
                        "cannot be read alone; fetch it first (hf download)"
                    )
                begin, end = 0, size
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > end - begin:
                    break
    if len(data) != end - begin:
        raise HubError(
            f"{name.given}: {file}: {end - begin} bytes were asked for, {len(data)} came"
        )
    return begin, bytes(data)


@contextmanager
def hub_errors(name: HubName, *, listed: bool = False) -> Iterator[None]:
    """Turn what the Hub and its library raise into an error of one line.

    Args:
        name: the repository.
        listed: whether the Hub has listed its files before, and what fails is a download.

    Raises:
        HubError: the Hub has no such repository or revision, or refuses it; or the cache cannot be
            written.
        StorageError: the disk is full.
        UnreachableError: there was no answer, or one that says to come back later.
    """
    # a name without hf:// may be that of a file or folder, mistyped
    path = "" if listed or is_hub_name(name.given) else "no such path, and "
    try:
        from huggingface_hub import constants, errors
    except ModuleNotFoundError as error:
        raise HubError(
            f"{name.given}: {path}the Hub needs the package huggingface_hub; "
            "pip install 'npt_fast[hf]'"
        ) from error
    try:
        with quiet_hub(bars=not sys.stderr.isatty()), _cause_of(errors.LocalEntryNotFoundError):
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
            f"{name.given}: {path}the Hub has no such repository, or a private one: correct the "
            f"name, or {LOG_IN}"
        ) from None
    except errors.HFValidationError as error:
        raise HubError(f"{name.given}: {path}no name on the Hub: {_reason(error)}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        said = f"{error.response.reason_phrase} {error.server_message or ''}".strip()
        kind = UnreachableError if status == 429 or status >= 500 else HubError
        remedy = _REMEDIES.get(status, "")
        raise kind(
            f"{name.given}: {path}the Hub answers {status} {_reason(said)}{remedy}"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise UnreachableError(
            f"{name.given}: {path}the Hub is turned off (HF_HUB_OFFLINE)"
        ) from None
    except Exception as error:  # the network and its library fail in their own ways
        full = isinstance(error, OSError) and error.errno in _NO_SPACE
        if isinstance(error, OSError) and (full or error.filename):  # of the cache
            local = StorageError if full else HubError
            place = error.filename or constants.HF_HUB_CACHE
            raise local(f"{name.given}: {place}: {error.strerror}") from None
        problem = "the download was interrupted" if listed else "the Hub cannot be reached"
        raise UnreachableError(f"{name.given}: {path}{problem}: {_reason(error)}") from None


@contextmanager
def _cause_of(kind: type[Exception]) -> Iterator[None]:
    """Replace an error by that which led to it, which says more."""
    try:
        yield
    except kind as error:
        raise error.__cause__ or error from None


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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
            yield
    finally:
        logging.set_verbosity(verbosity)
        restore()


def _reason(error: Exception | str) -> str:
    return shorten(" ".join(str(error).split()) or type(error).__name__, 200)
