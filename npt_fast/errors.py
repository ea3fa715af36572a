"""The errors that npt_fast raises if a user, a file or a machine is at fault, and its warnings.

Each message is one line that names the file and key, what is wrong and what to do. The command
line prints the message and exits with ``exit_code``. Any other exception is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Iterable


def printable(text: str) -> str:
    """`text` with control characters escaped: names in a checkpoint are untrusted."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the known word nearest to `word`; "" if none is near."""
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
    "datasets": "train",
    "pyarrow": "train",
    "zstandard": "train",
    "prompt_toolkit": "interact",
    "triton": "kernels",
    "pydantic": "serve",
    "vllm": "serve",
    "matplotlib": "plot",
    "gguf": "demo",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Packages that only parts of npt_fast import, and the extra of pyproject.toml for each."""


def missing_package(error: ModuleNotFoundError, user: str, *, needs: str = "hf") -> str | None:
    """One line that says which extra to install; None if no extra has the missing package.

    Args:
        error: exception that the import raised.
        user: verb or name that needs the package.
        needs: extra that `user` needs anyway; each of them includes ``hf``.
    """
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        return None
    extra = needs if extra == "hf" else extra
    return f"{user} needs the package {package}; pip install 'npt_fast[{extra}]'"


class NPTWarning(UserWarning):
    """What a user should know of, though nothing failed; the command line prints it on stderr."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NPTError(Exception):
    """Base class of all errors that npt_fast raises on purpose."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OptionError(NPTError, ValueError):
    """An option or an argument has a value that is not allowed, or has another type, or is unknown.

    It is a ValueError too, which other libraries raise then.
    """


class PathError(OptionError):
    """A value is not a valid path."""


class CheckpointError(NPTError):
    """A checkpoint cannot be read: broken, unsafe, incomplete, or changed while being read."""


class HubError(CheckpointError):
    """The Hugging Face Hub has no such checkpoint, refuses it, or cannot be reached."""


class MergeError(NPTError):
    """The inputs cannot be merged as asked, or the output cannot be written."""


class ModelError(NPTError):
    """A model cannot be converted, or does not fit a checkpoint."""


class TrainingError(NPTError):
    """Training cannot start as asked, or had to stop."""


class DataError(NPTError):
    """Training data cannot be read, or there is too little."""


class TransferError(NPTError):
    """Modulations do not fit together, or cannot be injected as asked."""


class BenchmarkError(NPTError):
    """A benchmark cannot be run as asked, or a file is not a file of results."""


class StorageError(NPTError):
    """The disk is full, or would become full."""

    exit_code = 4


class VerificationError(NPTError):
    """A written checkpoint did not pass its verification; the message has the first problem.

    Attributes:
        problems: one line for each problem.
    """

    exit_code = 3

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(f"{message}: {problems[0]}")
        self.problems = [printable(problem) for problem in problems]
