"""Call tokenizers and other libraries that read untrusted files; failures become `ModelError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

from npt_fast.errors import ModelError


def encode(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    """Call a tokenizer on texts.

    Raises:
        ModelError: it cannot encode them, for example because its file is damaged.
    """
    name = getattr(tokenizer, "name_or_path", type(tokenizer).__name__)
    with library_errors(f"{name}: the tokenizer cannot encode the text"):
        return tokenizer(texts, **options)


@contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Turn any exception of a library into an error of one line that begins with `problem`.

    Raises:
        ModelError: the library raised an exception.
    """
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        # the PanicException of libraries in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 300)
        raise ModelError(f"{problem}: {reason}") from error
