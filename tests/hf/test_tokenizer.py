"""Reading: a text becomes the tokens that the tokenizer itself makes of it, with one BOS."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaTokenizer

from npt_fast.errors import ModelError, TransferError
from npt_fast.hf.tokenizer import PLAIN, Reading, first_token, read, special_places
from npt_fast.transfer.positions import find
from tests.training import tiny

BOS = 257
TOKENIZER: Any = tiny.bos_tokenizer()
CHAT = Reading(chat=True)


def test_the_tokens_are_those_of_the_tokenizer() -> None:
    """As in `model(**tokenizer(text))`."""
    found = read(TOKENIZER, "the sea")
    assert found.ids == TOKENIZER("the sea")["input_ids"] and found.ids[0] == BOS
    assert found.texts == ["<bos>", *"the sea"]
    none = tiny.tokenizer()  # adds none
    assert read(none, "the sea") == read(none, "the sea", PLAIN)
    assert read(none, "the sea").ids == none("the sea")["input_ids"]


def test_special_tokens_are_left_out() -> None:
    found = read(TOKENIZER, "the sea", PLAIN)
    assert found.ids == TOKENIZER("the sea", add_special_tokens=False)["input_ids"]
    assert found.texts == list("the sea")


@pytest.mark.parametrize("text", ["<bos>the sea", "<bos>", "<bos><bos>x"])
def test_no_second_bos(text: str) -> None:
    """What the user wrote stays as it is; the tokenizer itself would put one more in front."""
    written = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert written[0] == BOS and TOKENIZER(text)["input_ids"] == [BOS, *written]
    assert read(TOKENIZER, text).ids == read(TOKENIZER, text, PLAIN).ids == written


def test_a_front_of_several_tokens() -> None:
    """It is there as a whole, or is put there as a whole."""
    tokenizer: Any = tiny.bos_tokenizer("<bos> <eos> $A")
    assert read(tokenizer, "ab").texts == ["<bos>", "<eos>", "a", "b"]
    assert read(tokenizer, "<bos><eos>ab").texts == ["<bos>", "<eos>", "a", "b"]


@pytest.mark.parametrize("template", ["$A <eos>", "<bos> $A <eos>"])
def test_a_text_that_goes_on_does_not_end_in_eos(template: str) -> None:
    tokenizer: Any = tiny.bos_tokenizer(template)
    assert tokenizer("ab")["input_ids"][-1] == 0
    front = ["<bos>"] if "<bos>" in template else []
    assert read(tokenizer, "ab").texts == [*front, "a", "b"]
    # what the user wrote stays
    assert read(tokenizer, "ab<eos>").texts == [*front, "a", "b", "<eos>"]


def test_a_chat_is_the_tokenizers_own() -> None:
    messages = [{"role": "user", "content": "hi"}]
    expected = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    found = read(TOKENIZER, "hi", CHAT)
    assert found.ids == expected and found.texts == ["<bos>", *"user:hi;me:"]
    # rendered by the user: the template's BOS is the only one
    written = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert read(TOKENIZER, written) == found
    # a template without BOS gets none, as where the model was trained
    other: Any = tiny.bos_tokenizer()
    other.chat_template = "{{ messages[0].content }}?"
    assert read(other, "hi", CHAT).texts == list("hi?")


def test_what_is_refused() -> None:
    with pytest.raises(ModelError, match="the tokenizer has no chat template; leave out the chat"):
        read(tiny.tokenizer(), "hi", CHAT)
    broken: Any = tiny.bos_tokenizer()
    broken.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ModelError, match="chat template cannot be applied: no users here"):
        read(broken, "hi", CHAT)
    for template in ("{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{{ 10**9", 5):
        broken.chat_template = template  # what a stranger's file may hold
        with pytest.raises(ModelError, match="chat template cannot be applied: ") as caught:
            read(broken, "hi", CHAT)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(ValueError, match="a chat template writes special tokens"):
        Reading(special_tokens=False, chat=True)
    for reading in (Reading(), PLAIN, CHAT):
        with pytest.raises(TransferError, match="the text is empty"):
            read(TOKENIZER, "", reading)
        with pytest.raises(TransferError, match="is not valid Unicode text"):
            read(TOKENIZER, "\ud800", reading)


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    class Changing:
        name_or_path = "odd"

        def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1, 5, 6] if add_special_tokens else [4, 5, 6]}

    with pytest.raises(ModelError, match="odd: the tokenizer splits the text in another way"):
        read(Changing(), "text")


def test_a_token_that_follows_has_no_bos() -> None:
    assert first_token(TOKENIZER, " x") == TOKENIZER(" x", add_special_tokens=False)["input_ids"][0]


def test_special_tokens_are_told_from_words() -> None:
    assert special_places(TOKENIZER, TOKENIZER("a<eos>b")["input_ids"]) == {0, 2}


def test_spaces_are_kept() -> None:
    """Llama 2's decoder drops the space of the first token; that of each token is shown."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁t", "▁th", "▁the", "e", "t", "h", "a", "r", "▁a"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer: Any = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    found = read(tokenizer, "the art")
    assert found.texts == ["<s>", " the", " a", "r", "t"]
    assert find("at:the art", found.ids, tokenizer) == [1, 2, 3, 4]
    with pytest.raises(TransferError, match="'heart' does not occur in '<s> the art'"):
        find("at:heart", found.ids, tokenizer)
