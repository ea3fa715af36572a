"""Tokenizers are read from somebody's files: what goes wrong in one is an error of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

from npt_fast.errors import ModelError


def encode(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    """What the tokenizer makes of texts.

    Raises:
        ModelError: it cannot encode them, as where its file is damaged.
    """
    name = getattr(tokenizer, "name_or_path", type(tokenizer).__name__)
    with library_errors(f"{name}: the tokenizer cannot encode the text"):
        return tokenizer(texts, **options)


@contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Whatever a library raises, as one line that begins with `problem`.

    Raises:
        ModelError: it raised something.
    """
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        # a panic of a library in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 300)
        raise ModelError(f"{problem}: {reason}") from error
