"""Results as a folder of files that is complete or absent."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npt_fast.checkpoint.publish import StagedDirectory, disk_errors
from npt_fast.errors import NPTError
from npt_fast.paths import exists, path_errors, user_path
from npt_fast.schema import finite


@contextmanager
def report_folder(
    output: str | Path, error: type[NPTError]
) -> Iterator[Callable[[Mapping[str, bytes]], None]]:
    """Make a folder, hidden until files are written to it.

    So a folder that cannot be written is found before a model is loaded, and nothing is left if
    the work fails.

    Args:
        output: Folder to create.
        error: What is raised if that cannot be done.

    Yields:
        Writes all files, given as contents by name.

    Raises:
        NPTError: the folder exists already or cannot be written; it is an `error`.
    """
    target = user_path(output)
    with path_errors(target, error):
        if exists(target):
            raise error(f"{target}: exists already; choose another folder")
    with disk_errors(target, error), StagedDirectory(target, replace=False) as staged:

        def write(files: Mapping[str, bytes]) -> None:
            for name, content in files.items():
                with staged.file(name) as file:
                    file.write(content)
            staged.publish()

        yield write


def json_file(value: Any) -> bytes:
    """A JSON document as a file; NaN and infinity, which JSON does not have, become null."""
    return f"{json.dumps(finite(value), indent=1, ensure_ascii=False)}\n".encode()


def csv_file(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A table as a file; None is an empty cell."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return out.getvalue().encode()
