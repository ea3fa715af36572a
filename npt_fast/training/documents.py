"""Streams of rows by name: Hugging Face datasets, local files, or Python's own help texts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from threading import Thread
from typing import Any, NamedTuple

import datasets  # type: ignore[import-untyped]
from huggingface_hub import constants, get_session

from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.errors import CheckpointError, DataError
from npt_fast.paths import exists, is_directory, is_file, path_errors, user_path
from npt_fast.training import text_files


class _HubDataset(NamedTuple):
    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"


_BOOKCORPUS = _HubDataset(
    "bookcorpus/bookcorpus",
    # the main branch has a loading script, which `datasets` no longer runs
    revision="refs/convert/parquet",
)
_LARGE = (
    _HubDataset("wikimedia/wikipedia", "20231101.en"),
    _BOOKCORPUS,
    _HubDataset("Skylion007/openwebtext"),
)
_PRESETS = {
    "small": (_HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1"),),
    "medium": (_HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1"), _BOOKCORPUS),
    "large": _LARGE,
    "xlarge": (
        *_LARGE,
        _HubDataset("vblagoje/cc_news"),
        _HubDataset("monology/pile-uncopyrighted"),
    ),
}

WITHOUT_A_PATH = ("python-docs", *_PRESETS)
"""Sources that name no files of the user."""

_PATIENCE = 4  # seconds
_HUB_NAME = re.compile(
    r"(?P<path>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<name>[\w.-]*))?(:(?P<split>[\w.-]+))?", re.ASCII
)


def open_documents(
    source: str, *, seed: int, column: str | None = None
) -> datasets.IterableDataset:
    """Open a stream of rows, in the same order every time.

    In presets and text files a row is ``{"text": str}``; in others it holds what
    `npt_fast.training.rows.content_of` finds.

    Args:
        source: ``python-docs``: Python's own help texts, always available; ``small``, ``medium``,
            ``large`` or ``xlarge``: presets of Hugging Face datasets; a file, folder or glob of
            .txt and .md (a paragraph is a document), .jsonl, .json and .parquet (with a column
            ``text``); or a data set of the Hub, ``org/name:config:split``, whose split is
            ``train`` if it is not given. A file or folder of that name wins.
        seed: seed of the order in which the datasets of a preset are drawn, each equally likely.
        column: column that holds the documents, as for `npt_fast.training.rows.content_of`.

    Raises:
        DataError: the source does not exist, or cannot be read.
    """
    if source == "python-docs":
        texts = [text for _, text in sorted(topics.items())]
        return datasets.IterableDataset.from_dict({"text": texts})
    if source in _PRESETS:
        streams = [_open_on_hub(source, dataset) for dataset in _PRESETS[source]]
        return datasets.interleave_datasets(
            streams,
            probabilities=[1 / len(streams)] * len(streams),
            seed=seed,
            # each document once: held-out text must not come again
            stopping_strategy="all_exhausted_without_replacement",
        )
    if (named := _on_hub(source)) is not None:
        try:
            if not constants.HF_HUB_OFFLINE:  # then it may be in the cache
                check_hub(source)
            return _open_on_hub(source, named)
        except DataError as error:
            raise DataError(f"{error}; no file or folder has this name either") from error
    files = _find_files(source)
    for file in files:
        # a file of the wrong kind must fail now, not after hours
        next(_read_rows([file], column), None)
    return datasets.IterableDataset.from_generator(
        _read_rows, gen_kwargs={"files": files, "column": column}
    )


def _on_hub(source: str) -> _HubDataset | None:
    """The data set of the Hub that a source names, if it is no file, folder or pattern."""
    match = _HUB_NAME.fullmatch(source)
    if match is None or Path(source).suffix.lower() in text_files.READERS:
        return None
    path = user_path(source)
    with path_errors(path, DataError):
        if exists(path):
            return None
    return _HubDataset(match["path"], match["name"] or None, split=match["split"] or "train")


def check_hub(source: str) -> None:
    """Ask the Hub for one answer, whatever it is: the libraries try for half a minute.

    Args:
        source: preset that is wanted, for the message.

    Raises:
        DataError: there is no answer within 4 seconds, or the Hub is turned off (HF_HUB_OFFLINE).
    """
    problems: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            problems.append(None)
        except Exception as error:  # the network and its library fail in their own ways
            problems.append(reason(error))

    # the request's own limit counts for each address anew, and not for looking up the name
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    problem = problems[0] if problems else f"no answer within {_PATIENCE} seconds"
    if problem is not None:
        raise DataError(f"{source}: cannot reach {constants.ENDPOINT}: {problem.rstrip('.')}")


def _open_on_hub(source: str, dataset: _HubDataset) -> datasets.IterableDataset:
    try:
        stream = datasets.load_dataset(
            dataset.path,
            dataset.name,
            revision=dataset.revision,
            split=dataset.split,
            streaming=True,
        )
        # wikipedia also has ids, addresses and titles
        return stream.select_columns(["text"]) if source in _PRESETS else stream
    except Exception as error:  # the network, the Hub and every loader fail in their own way
        remedy = "install zstandard" if "zstd" in str(error) else "check the network"
        if source not in _PRESETS:
            remedy += " and the name, org/name:config:split"
        raise DataError(
            f"{source}: cannot open {dataset.path} of the Hugging Face Hub: {reason(error)}; "
            f"{remedy}, or give a file or folder of text, python-docs or self"
        ) from error


def _find_files(source: str) -> list[str]:
    """List the text files of a source by name, including unreadable ones, which fail later."""
    path = user_path(source)
    with path_errors(path, DataError):
        folder = is_directory(path)
        found = _files_in(path) if folder else [path] if exists(path) else _matches(path)
        files = sorted(
            str(path)
            for path in found
            if path.suffix.lower() in text_files.READERS and not is_directory(path)
        )
        if not files and not folder and any(not is_file(path) for path in found):
            raise DataError(f"{source}: not a regular file; give a file or folder of text")
    if not files and not found and not folder:
        raise DataError(
            f"{source}: no such file or folder, and no file matches; give one, a data set of the "
            f"Hub as org/name, or one of {', '.join(WITHOUT_A_PATH)}, self"
        )
    if not files:
        raise DataError(f"{source}: has no text files; they end in {', '.join(text_files.READERS)}")
    return files


def _files_in(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    # os.walk leaves out in silence what it may not list
    walk = os.walk(folder, onerror=refuse)
    return [Path(parent, name) for parent, _, names in walk for name in names]


def _matches(pattern: Path) -> list[Path]:
    """Like `glob.glob`, except that ``**`` does not follow links to folders: they may be cyclic."""
    try:
        found = list(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except ValueError as error:
        raise DataError(f"{pattern}: {error}") from None
    named = set(pattern.parts)
    return [p for p in found if not any(n.startswith(".") and n not in named for n in p.parts)]


def _read_rows(files: list[str], column: str | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of local files, opening each file when its turn comes."""
    for name in files:
        try:
            file = SourceFile.of(Path(name), follow_links=True)
            for content in text_files.read_contents(file, column) if file.size else ():
                yield {column or "text": content}
        except CheckpointError as error:
            raise DataError(str(error)) from None
        except DataError:
            raise
        except Exception as error:  # pyarrow fails in its own ways
            raise DataError(
                f"{name}: cannot be read: {reason(error)}; repair or remove it"
            ) from error


def reason(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
