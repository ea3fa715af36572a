"""Windows against plain lists: their content, their order, and resuming after a stop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

import npt_fast as npt
from npt_fast.training import documents, token_windows
from npt_fast.training.token_windows import TokenWindows
from tests.training.texts import WORDS, random_texts, texts_of, write_texts

BOS, PAD = 0, 1


pytestmark = pytest.mark.usefixtures("offline")


@cache
def real_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<bos>": BOS, "<pad>": PAD, **{f"w{n}": n + 2 for n in range(WORDS)}}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<bos>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")


class Words:
    """A tokenizer with one token per word that puts BOS before each text and keeps the texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.pad_token_id: int | None = PAD
        self.eos_token_id: int | None = None

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += texts
        return real_tokenizer()(texts, **options)


def ids(texts: Sequence[str]) -> list[int]:
    return list(chain.from_iterable([BOS, *(int(w[1:]) + 2 for w in t.split())] for t in texts))


def cut(tokens: list[int], length: int, stride: int) -> list[list[int]]:
    """The truth: windows in the order of the text, the last one not padded."""
    starts = list(range(0, len(tokens), stride))
    full = [tokens[at : at + length] for at in starts if at + length <= len(tokens)]
    tail = tokens[len(full) * stride :]
    covered = (len(full) - 1) * stride + length if full else 0
    if len(tail) >= (32 if length >= 32 else 2) and covered < len(tokens):
        return [*full, tail]
    return full


def plain(window: Mapping[str, torch.Tensor]) -> tuple[int, list[int]]:
    """Return number and tokens of a window, after checking and removing its padding."""
    tokens, mask = window["input_ids"], window["attention_mask"]
    assert tokens.dtype == mask.dtype == window["window"].dtype == torch.int64
    assert tokens.shape == mask.shape and tokens.ndim == 1 and window["window"].ndim == 0
    length = int(mask.sum())
    assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
    assert set(tokens[length:].tolist()) <= {PAD}
    return int(window["window"]), tokens[:length].tolist()


def take(stream: TokenWindows | Iterator[Any], count: int) -> list[tuple[int, list[int]]]:
    return [plain(window) for window in islice(stream, count)]


def stream(source: str | Path, **options: Any) -> TokenWindows:
    tokenizer = options.pop("tokenizer", None) or Words()
    return TokenWindows(str(source), tokenizer, **{"max_length": 8, "block": 4, **options})


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


# ---- order ----


def epochs(source: Path, count: int, **options: Any) -> list[list[int]]:
    """Return the numbers of the windows in their order, by epoch."""
    one = len(cut(ids(texts_of(source)), 8, 8))
    windows = iter(stream(source, **options))
    return [[number for number, _ in take(windows, one)] for _ in range(count)]


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


# ---- resuming ----


def only_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str for key in value) and all(map(only_plain, value.values()))
    if isinstance(value, list):
        return all(map(only_plain, value))
    return value is None or type(value) in (str, float) or (type(value) is int and value < 1 << 63)


SETTINGS: list[dict[str, Any]] = [
    {"block": 1},
    {"block": 4},
    {"block": 4, "stride": 3},
    {"block": 4, "held_out": 3},
    {"block": 5, "held_out": 2, "stride": 5, "max_length": 9},
    {"block": 2048},
    {"block": 2048, "held_out": 3, "max_length": 40, "stride": 30},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_going_on_after_every_window(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed stream can be resumed too, and windows that were read ahead are read again."""

    def open_quickly(source: str, *, seed: int) -> datasets.IterableDataset:
        rows = {"text": random_texts(16, longest=20)}
        return datasets.IterableDataset.from_dict(rows, num_shards=3)

    monkeypatch.setattr(token_windows, "open_documents", open_quickly)
    monkeypatch.setattr(token_windows, "_BATCH", 3)  # many reads per block, and blocks per read
    whole = stream("memory", **settings)
    truth = take(whole, 75)
    for used in range(55):  # more than two epochs
        state = json.loads(json.dumps(whole.state_after(used)))
        assert only_plain(state) and state["windows"] == used
        assert len(state["tokens"]) < settings.get("max_length", 8)
        again = stream("memory", start=state, **settings)
        assert again.position == used
        assert again.state_after(used) == state  # before it begins, too
        ahead = used % 17
        assert take(again, ahead) == truth[used : used + ahead]
        further = used + ahead * 2 // 3
        third = stream("memory", start=again.state_after(further), **settings)
        assert take(third, 3) == truth[further : further + 3]


def test_batches_are_of_few_documents_or_little_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of a batch changes neither the windows nor resuming."""
    texts = random_texts(100)
    source = write_texts(tmp_path / "a.jsonl", texts)
    truth = take(stream(source), 60)
    state = stream(source).state_after(0)
    monkeypatch.setattr(token_windows, "_BATCH_TEXT", 100)
    tokenizer, calls = Words(), []

    class Counting(Words):
        def __call__(self, texts: list[str], **options: Any) -> Any:
            calls.append(texts)
            return tokenizer(texts, **options)

    windows = stream(source, tokenizer=Counting(), start=state)
    assert take(windows, 60) == truth
    assert len(calls) > 10
    assert all(sum(map(len, texts[:-1])) < 100 for texts in calls)
    monkeypatch.undo()
    again = stream(source, start=windows.state_after(33))
    assert take(again, 27) == truth[33:]


def test_going_on_with_datasets_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = random_texts(50)

    def load(path: str, *args: Any, **options: Any) -> Any:
        own = texts[:37] if "wikitext" in path else texts[37:]
        return datasets.Dataset.from_dict({"text": own}).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(token_windows, "_BATCH", 4)
    whole = stream("medium", block=3)
    truth = take(whole, 110)
    for used in range(0, 100, 3):
        state = json.loads(json.dumps(whole.state_after(used)))
        assert only_plain(state)
        assert take(stream("medium", block=3, start=state), 10) == truth[used : used + 10]


def test_going_on_does_not_read_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_windows, "_BATCH", 5)
    texts = random_texts(200)
    for n in range(10):
        write_texts(tmp_path / f"{n}.jsonl", texts[20 * n : 20 * n + 20])
    whole = stream(tmp_path, block=4)
    count = len(cut(ids(texts), 8, 8))
    truth = take(whole, count)
    opened = []
    read = documents._read_rows

    def watch(files: list[str]) -> Iterator[dict[str, str]]:
        opened.extend(files)
        yield from read(files)

    monkeypatch.setattr(documents, "_read_rows", watch)
    for used in range(0, count - 1, 9):
        tokenizer = Words()
        again = stream(tmp_path, block=4, start=whole.state_after(used), tokenizer=tokenizer)
        tokenizer.texts.clear()
        opened.clear()
        assert take(again, 1) == truth[used : used + 1]
        # texts of the block itself, and at most one batch more on either side
        tokens = chain.from_iterable(sorted(truth)[n][1] for n in range(used // 4 * 4, used + 1))
        words = {f"w{token - 2}" for token in tokens if token > PAD}
        block = [n for n, text in enumerate(texts) if words & set(text.split())]
        positions = [texts.index(text) for text in tokenizer.texts]
        assert min(block) - 5 <= min(positions) and max(positions) <= max(block) + 4 * 8 + 5
        # the reader stands behind a document until it is asked for the next one
        behind = max(0, min(positions) - 1)
        assert [int(Path(file).stem) for file in opened] == list(
            range(behind // 20, max(positions) // 20 + 1)
        )


def test_what_is_far_behind_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_windows, "_REMEMBERED", 10)
    source = write_texts(tmp_path / "a.jsonl", random_texts(60))
    windows = stream(source, block=4)
    with pytest.raises(AssertionError):
        windows.state_after(-1)
    take(windows, 41)
    assert windows.state_after(31)["windows"] == 31
    with pytest.raises(AssertionError, match="forgotten"):
        windows.state_after(25)
    assert len(windows._marks) < 5


def test_settings_must_be_the_same(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", random_texts(60))
    other = write_texts(tmp_path / "b.jsonl", random_texts(60))
    windows = stream(source, held_out=2)
    state = windows.state_after(0)
    assert windows.accepts(state)
    changes: dict[str, Any] = {
        "max_length": 9,
        "stride": 4,
        "seed": 1,
        "held_out": 3,
        "block": 5,
    }
    for field, value in changes.items():
        settings = {"held_out": 2, field: value}
        assert not stream(source, **settings).accepts(state)
        with pytest.raises(ValueError, match=f": {field} is not as it was"):
            stream(source, start=state, **settings)
    with pytest.raises(ValueError, match=": source is not as it was"):
        stream(other, held_out=2, start=state)
    for field in state:
        for wrong in (None, 1.5, "x", [1.5]):
            damaged = {**state, field: wrong}
            if field in ("documents", "tokens") and type(wrong) is type(state[field]):
                continue
            assert not windows.accepts(damaged)
        assert not windows.accepts({name: state[name] for name in state if name != field})
    assert not windows.accepts(None)  # type: ignore[arg-type]


def test_a_damaged_position_is_one_clear_error(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", random_texts(60))
    state = stream(source).state_after(0)
    begin = json.loads(state["documents"])

    def put(**changes: Any) -> str:
        inner = {**begin["examples_iterable"], **changes}
        return json.dumps({**begin, "examples_iterable": inner})

    for position in (
        "1", "[1]", "{}", "null", "{", '{"epoch": 0, "examples_iterable": {"x": 1}}',
        put(shard_idx=-1), put(shard_idx="0"), put(shard_example_idx=0.5), put(type="Other"),
        put(shard_idx=[0]), put(more=1), json.dumps({**begin, "epoch": None}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"documents is not a position in it|Expecting"):
            stream(source, start={**state, "documents": position})
    for position in (put(shard_idx=10**400), put(shard_example_idx=10**400)):
        with pytest.raises(npt.DataError, match=r"a\.jsonl: (reading broke off|has no text any)"):
            take(stream(source, start={**state, "documents": position}), 1)


def test_numbers_out_of_range() -> None:
    for options in (
        {"max_length": 0},
        {"stride": 0},
        {"stride": 9},
        {"held_out": -1},
        {"block": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            stream("python-docs", **options)


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
    monkeypatch.setattr(token_windows, "open_documents", lambda source, seed: broken)
    with pytest.raises(npt.DataError, match="anything: reading broke off: connection reset; "):
        take(stream("anything"), 10_000)


def test_text_that_goes_away(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", random_texts(60))
    windows = iter(stream(source))
    take(windows, 1)
    source.write_bytes(b"")
    with pytest.raises(npt.DataError, match=r"a\.jsonl: has no text any more"):
        take(windows, 10_000)
