"""Names on the Hub, parts of files, and how the library's errors and noise are passed on."""

from __future__ import annotations

import errno
import warnings

import pytest
from huggingface_hub.errors import HFValidationError

from npt_fast.errors import CheckpointError, HubError, NPTError, StorageError
from npt_fast.hub import HubName, UnreachableError, hub_errors, parse_name, quiet_hub, read_part
from tests.hub import Hub, Repo

NAME = HubName("hf://org/repo", "org/repo")


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/repo", "org/repo", None),
        ("org/repo@v1.0", "org/repo", "v1.0"),
        ("hf://org/repo", "org/repo", None),
        ("hf://o/r@refs/pr/1", "o/r", "refs/pr/1"),
    ],
)
def test_names(text: str, repo: str, revision: str | None) -> None:
    assert parse_name(text) == HubName(text, repo, revision)


@pytest.mark.parametrize(
    "text", ["repo", "/a/b", "a/b/c", "./a", "a/../b", "a/b@", "a/b@..", "hf://a", "a/b\n", "é/b"]
)
def test_other_texts_are_no_names(text: str) -> None:
    assert parse_name(text) is None


def test_a_revision_of_its_own() -> None:
    assert parse_name("org/repo", "v1") == HubName("org/repo@v1", "org/repo", "v1")
    for text in ("org/repo@v2", "repo"):
        with pytest.raises(CheckpointError, match=f"{text}: revision v1 needs a name of the form"):
            parse_name(text, "v1")


def test_parts_of_a_file(hub: Hub) -> None:
    data = bytes(range(200))
    repo = hub.repos["org/repo"] = Repo()
    commit = repo.commit({"a": data})
    assert read_part(NAME, commit, "a", 200, 30, 50) == (30, data[30:50])
    hub.ranges = False
    assert read_part(NAME, commit, "a", 200, 30, 50) == (0, data)
    with pytest.raises(HubError, match="a: 150 bytes were asked for"):
        read_part(NAME, commit, "a", 150, 30, 50)
    with pytest.raises(HubError, match="its server sends whole files only"):
        read_part(NAME, commit, "a", 5 << 20, 30, 50)


@pytest.mark.parametrize(
    ("given", "raised", "kind", "problem"),
    [
        ("a/b", OSError(errno.ENOSPC, "full", "/cache"), StorageError, "a/b: /cache: full"),
        ("a/b", OSError(errno.ENOSPC, "full"), StorageError, ": full"),
        ("a/b", PermissionError(errno.EACCES, "no", "/cache"), HubError, "a/b: /cache: no"),
        ("a/b", ValueError("x\n y"), UnreachableError, "a/b: no such path, and the Hub cannot be"),
        ("hf://a/b", ValueError(), UnreachableError, "the Hub cannot be reached: ValueError"),
        ("a/b", HFValidationError("x"), HubError, "a/b: no such path, and no name on the Hub: x"),
        ("hf://a/b", HFValidationError("x"), HubError, "hf://a/b: no name on the Hub: x"),
        ("a/b", CheckpointError("own"), CheckpointError, "own"),
    ],
)
def test_errors(given: str, raised: Exception, kind: type[NPTError], problem: str) -> None:
    with pytest.raises(kind) as caught, hub_errors(HubName(given, "a/b")):
        raise raised
    assert problem in str(caught.value) and "\n" not in str(caught.value)
    assert type(caught.value) is kind


def test_a_download_that_fails_is_of_a_repository_that_there_is() -> None:
    with pytest.raises(UnreachableError, match=r"^a/b: the download was interrupted: closed$"):
        with hub_errors(HubName("a/b", "a/b"), listed=True):
            raise ConnectionError("closed")


def test_the_librarys_warnings_are_not_shown(recwarn: pytest.WarningsRecorder) -> None:
    with quiet_hub():
        warnings.warn_explicit("x", UserWarning, "f.py", 1, "huggingface_hub.file_download")
    assert not recwarn.list


@pytest.mark.parametrize("shown", [True, False])
def test_noise_is_as_before(shown: bool) -> None:
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = logging.get_verbosity()
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        with quiet_hub():
            assert are_progress_bars_disabled() and logging.get_verbosity() == logging.ERROR
        assert are_progress_bars_disabled() is not shown and logging.get_verbosity() == before
        with quiet_hub(bars=False):
            assert are_progress_bars_disabled() is not shown
    finally:
        enable_progress_bars()
