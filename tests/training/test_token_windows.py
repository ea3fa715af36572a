"""Windows against plain lists: their content, their order, and resuming after a stop."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import pytest
from torch.utils.data import DataLoader

import npt_fast as npt
from npt_fast.training import token_windows
from tests.training.texts import random_texts, write_texts
from tests.training.windows import BOS, Words, cut, epochs, ids, plain, stream, take

pytestmark = pytest.mark.usefixtures("offline")


# ---- windows ----


@pytest.mark.parametrize(
    ("length", "stride"), [(8, 8), (8, 3), (8, 1), (2, 2), (1, 1), (40, 40), (40, 7), (1000, 900)]
)
def test_windows_are_those_of_the_whole_text(tmp_path: Path, length: int, stride: int) -> None:
    texts = random_texts(60)
    source = write_texts(tmp_path / "a.jsonl", texts)
    expected = list(enumerate(cut(ids(texts), length, stride)))
    windows = iter(stream(source, max_length=length, stride=stride, block=5))
    for _ in range(3):
        assert sorted(take(windows, len(expected))) == expected


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_every_length_of_tail(tmp_path: Path, length: int, overlap: int) -> None:
    """The tail is padded if long enough and not in the window before, also in a short text."""
    least = 32 if length == 40 else 2
    for tokens in range(least, 3 * length):
        text = " ".join(f"w{n}" for n in range(tokens - 1))
        source = write_texts(tmp_path / f"{tokens}.jsonl", [text])
        expected = cut(ids([text]), length, length - overlap)
        windows = iter(stream(source, max_length=length, stride=length - overlap, block=100))
        for _ in range(2):
            assert sorted(take(windows, len(expected))) == list(enumerate(expected))


def test_padding_without_a_padding_token(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", ["w0 w1 w2"])
    tokenizer = Words()
    for pad, eos, expected in ((None, 7, 7), (None, None, 0), (0, 7, 0)):
        tokenizer.pad_token_id, tokenizer.eos_token_id = pad, eos
        (window,) = islice(stream(source, tokenizer=tokenizer, max_length=6), 1)
        assert window["input_ids"].tolist() == [BOS, 2, 3, 4, expected, expected]


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    source = write_texts(
        tmp_path / "a.jsonl", ["", "w0 w1", " \n", "w2"] + [""] * 600 + ["w3 w4 w5"]
    )
    assert take(stream(source), 1) == [(0, ids(["w0 w1", "w2", "w3 w4 w5"])[:8])]


def test_a_real_loader(tmp_path: Path) -> None:
    texts = random_texts(60)
    source = write_texts(tmp_path / "a.jsonl", texts)
    batch = next(iter(DataLoader(stream(source), batch_size=4)))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 8)
    expected = cut(ids(texts), 8, 8)
    assert batch["input_ids"].tolist() == [expected[n] for n in batch["window"].tolist()]


def test_order_differs_by_epoch_and_seed_only(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", random_texts(60))
    for block in (7, 2048):
        orders = epochs(source, 4, block=block) + epochs(source, 4, block=block, seed=43)
        assert len({tuple(order) for order in orders}) == 8
        assert epochs(source, 4, block=block) == orders[:4]
    assert epochs(source, 2, block=1) == [sorted(orders[0])] * 2


def test_windows_move_within_their_block(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", random_texts(60))
    for order in epochs(source, 3, block=7):
        blocks = [order[at : at + 7] for at in range(0, len(order), 7)]
        assert [number for block in blocks for number in sorted(block)] == sorted(order)
        assert any(block != sorted(block) for block in blocks)
        within = [tuple(n - min(block) for n in block) for block in blocks[:-1]]
        assert len(set(within)) > 1  # each block in its own order


def test_an_epoch_that_fits_in_a_block_is_tokenised_once(tmp_path: Path) -> None:
    texts = random_texts(60)
    source, count = write_texts(tmp_path / "a.jsonl", texts), len(cut(ids(texts), 8, 8))
    for block, epochs_tokenised in ((count, 1), (count + 5, 1), (count - 1, 3)):
        tokenizer = Words()
        windows = stream(source, tokenizer=tokenizer, block=block)
        tokenizer.texts.clear()  # texts that were read to hold windows out
        take(windows, 3 * count)
        assert len(tokenizer.texts) == epochs_tokenised * len(texts)


# ---- held-out text ----


@pytest.mark.parametrize("stride", [8, 3])
@pytest.mark.parametrize("held_out", [1, 5])
def test_held_out_text_is_never_trained_on(tmp_path: Path, stride: int, held_out: int) -> None:
    texts = random_texts(60)
    tokens = ids(texts)
    source = write_texts(tmp_path / "a.jsonl", texts)
    windows = stream(source, stride=stride, held_out=held_out)
    assert windows.held_out == held_out
    held = [plain(window) for window in windows.held_out_windows()]
    first = tokens[: held_out * 8]
    assert held == [(n - held_out, first[8 * n : 8 * n + 8]) for n in range(held_out)]
    expected = list(enumerate(cut(tokens[held_out * 8 :], 8, stride)))
    training = iter(windows)
    for _ in range(3):
        assert sorted(take(training, len(expected))) == expected


@pytest.mark.parametrize(
    ("tokens", "wanted", "held"),
    [(88, 10, 10), (82, 10, 10), (81, 10, 1), (80, 10, 1), (200, 100, 2), (18, 100, 1), (10, 9, 1)],
)
def test_of_a_short_text_a_tenth_is_held_out(
    tmp_path: Path, tokens: int, wanted: int, held: int
) -> None:
    text = " ".join(f"w{n}" for n in range(tokens - 1))
    windows = stream(write_texts(tmp_path / "a.jsonl", [text]), held_out=wanted)
    assert windows.held_out == len(windows.held_out_windows()) == held
    expected = cut(ids([text])[held * 8 :], 8, 8)
    assert sorted(take(windows, len(expected))) == list(enumerate(expected))


@pytest.mark.parametrize(
    ("tokens", "length", "held_out", "needed"),
    [(9, 8, 1, 10), (31, 40, 0, 32), (71, 40, 1, 72), (0, 8, 0, 2), (0, 8, 3, 10)],
)
def test_too_short_a_text(
    tmp_path: Path, tokens: int, length: int, held_out: int, needed: int
) -> None:
    source = write_texts(tmp_path / "a.jsonl", [" ".join("w0" for _ in range(tokens - 1)) or "\n"])
    with pytest.raises(npt.DataError, match=f"has {tokens} tokens, {needed} are needed .*{length}"):
        stream(source, max_length=length, held_out=held_out)


def test_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    for held_out in (0, 3):
        with pytest.raises(npt.DataError, match="has 0 tokens"):
            stream(tmp_path, held_out=held_out)


# ---- text that fails ----


def test_a_fault_further_on_is_named_when_it_is_reached(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", [*random_texts(600), None])
    windows = stream(path)
    with pytest.raises(npt.DataError, match=r"a\.jsonl: row 600 needs .* text \(NoneType\)"):
        take(windows, 10_000)


def test_reading_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in random_texts(300))
        raise ConnectionError("connection reset\nby peer")

    broken = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(token_windows, "open_documents", lambda source, **options: broken)
    with pytest.raises(npt.DataError, match="anything: reading broke off: connection reset; "):
        take(stream("anything"), 10_000)


def test_text_that_goes_away(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", random_texts(60))
    windows = iter(stream(source))
    take(windows, 1)
    source.write_bytes(b"")
    with pytest.raises(npt.DataError, match=r"a\.jsonl: has no text any more"):
        take(windows, 10_000)
