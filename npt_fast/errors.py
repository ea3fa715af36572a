"""The errors npt_fast raises for what a user, a file or a machine did wrong.

Each message is one line that names the file and key, what is wrong and what to do. The command
line prints the message and exits with ``exit_code``; anything else that escapes is our own bug.
"""

from __future__ import annotations

from collections.abc import Iterable


def printable(text: str) -> str:
    """`text` on one line without control characters: names in a checkpoint are anybody's choice."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing."""
    # here: only a mistake pays for the import
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


EXTRAS = {
    "accelerate": "hf",
    "huggingface_hub": "hf",
    "safetensors": "hf",
    "torch": "hf",
    "transformers": "hf",
    "yaml": "hf",
    "datasets": "train",
    "pyarrow": "train",
    "zstandard": "train",
    "prompt_toolkit": "interact",
    "triton": "kernels",
    "matplotlib": "plot",
    "gguf": "demo",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Packages that only parts of npt_fast import, and the extra of pyproject.toml that has each."""


def missing_package(error: ModuleNotFoundError, user: str, *, trains: bool = False) -> str | None:
    """Which extra to install, in one line; None if `error` is about no package of an extra.

    Args:
        error: What importing has raised.
        user: Who needs the package: a verb or a name.
        trains: Whether it needs the extra ``train`` anyway, which includes ``hf``.
    """
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        return None
    extra = "train" if trains and extra == "hf" else extra
    return f"{user} needs the package {package}; pip install 'npt_fast[{extra}]'"


class NPTError(Exception):
    """Base of all errors that npt_fast raises on purpose."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class PathError(NPTError, ValueError):
    """What is given as a path is none; a ValueError, as options with a wrong value are."""


class CheckpointError(NPTError):
    """A checkpoint cannot be read: broken, unsafe, incomplete, or changed while being read."""


class MergeError(NPTError):
    """The inputs cannot be merged as asked, or the output cannot be put where asked."""


class ModelError(NPTError):
    """A model cannot be converted, or does not fit a checkpoint."""


class TrainingError(NPTError):
    """Training cannot start as asked, or had to stop."""


class DataError(NPTError):
    """Training data cannot be read, or is too little."""


class TransferError(NPTError):
    """Modulations do not fit together, or cannot be put where asked."""


class BenchmarkError(NPTError):
    """Nothing can be measured as asked, or a file of results is none."""


class StorageError(NPTError):
    """The disk is full, or would be."""

    exit_code = 4


class VerificationError(NPTError):
    """What was written is not what it should be; the message says the first reason.

    Attributes:
        problems: one line for each reason.
    """

    exit_code = 3

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(f"{message}: {problems[0]}")
        self.problems = [printable(problem) for problem in problems]
