"""Turn text into tokens: the one place where a tokenizer is called.

Libraries that read untrusted files fail in their own ways; failures become `ModelError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import Annotated, Any, NamedTuple

from npt_fast.arguments import check_constructor
from npt_fast.errors import ModelError, OptionError, TransferError
from npt_fast.schema import Kind, is_text, shown

Tokenizer = Annotated[Any, Kind("a tokenizer", callable)]


@check_constructor
@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a text becomes the tokens that a model reads.

    Attributes:
        special_tokens: Put the special tokens, such as BOS, in front of a text that the tokenizer
            puts there by itself.
        chat: Make the text one user message of the tokenizer's chat template, which the model is
            to answer; the template alone writes the special tokens.

    Raises:
        OptionError: a chat is to have no special tokens.
    """

    special_tokens: bool = True
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and not self.special_tokens:
            raise OptionError(
                "a chat template writes special tokens; leave them out, or the chat, not both"
            )

    def __str__(self) -> str:
        if self.chat:
            return "as a chat message"
        return f"{'with' if self.special_tokens else 'without'} special tokens"


class Tokens(NamedTuple):
    """The tokens of a text, as a model reads them.

    Attributes:
        ids: Their ids.
        texts: Their texts, each decoded for itself.
    """

    ids: list[int]
    texts: list[str]


DEFAULT_READING = Reading()
PLAIN = Reading(special_tokens=False)


def read(tokenizer: Any, text: str, reading: Reading = DEFAULT_READING) -> Tokens:
    """The tokens of a text that a model reads and goes on with.

    A text that begins with the special tokens that belong in front of it, such as BOS, gets no
    second ones. What a tokenizer would put behind the text, such as EOS, is left out.

    Raises:
        TransferError: the text is empty, or has lone surrogates.
        ModelError: the tokenizer cannot encode the text, or has no chat template for a chat.
    """
    if not is_text(text):
        raise TransferError(f"{shown(text)} is not valid Unicode text")
    ids = _ids(tokenizer, text, reading) if text else []
    if not ids:
        raise TransferError("the text is empty")
    return Tokens(ids, decoded(tokenizer, ids))


def decoded(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each token, as it reads behind another one."""
    found = []
    for i in ids:
        # Llama 2's decoder drops the space of a first token: behind itself each has its own
        alone, twice = tokenizer.decode([i]), tokenizer.decode([i, i])
        found.append(twice[len(alone) :] if twice.startswith(alone) else alone)
    return found


def first_token(tokenizer: Any, text: str) -> int:
    """The first token of a text that follows another; raises like `read`."""
    return read(tokenizer, text, PLAIN).ids[0]


def special_places(tokenizer: Any, ids: Iterable[int]) -> set[int]:
    """Places of special tokens, which are no words of a text."""
    return {
        place
        for place, i in enumerate(ids)
        if not tokenizer.decode([i], skip_special_tokens=True) and tokenizer.decode([i])
    }


def encode(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    """Call a tokenizer on texts.

    Raises:
        ModelError: it cannot encode them, for example because its file is damaged.
    """
    with library_errors(f"{_name(tokenizer)}: the tokenizer cannot encode the text"):
        return tokenizer(texts, **options)


def chat_ids(
    tokenizer: Any, messages: Sequence[Any], *, answer: bool = False, remedy: str
) -> list[int]:
    """The tokens of a chat, as the tokenizer's chat template writes them.

    Args:
        tokenizer: the tokenizer.
        messages: mappings with ``role`` and ``content``.
        answer: whether the beginning of the model's answer follows.
        remedy: what to do without a template, for the message.

    Raises:
        ModelError: the tokenizer has no chat template, or it cannot be applied.
    """
    name = _name(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{name}: the tokenizer has no chat template; {remedy}")
    with library_errors(f"{name}: the chat template cannot be applied"):
        found = tokenizer.apply_chat_template(list(messages), add_generation_prompt=answer)
    return list(found["input_ids"])


def _ids(tokenizer: Any, text: str, reading: Reading) -> list[int]:
    if reading.chat:
        messages = [{"role": "user", "content": text}]
        return chat_ids(tokenizer, messages, answer=True, remedy="leave out the chat")
    plain = list(encode(tokenizer, text, add_special_tokens=False)["input_ids"])
    if not plain or not reading.special_tokens:
        return plain
    whole = list(encode(tokenizer, text)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            front = whole[:start]
            return plain if plain[:start] == front else front + plain
    raise ModelError(
        f"{_name(tokenizer)}: the tokenizer splits the text in another way when it adds special "
        "tokens; leave them out"
    )


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


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
