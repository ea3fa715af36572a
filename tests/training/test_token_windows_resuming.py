"""Windows go on after a stop where they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest

import npt_fast as npt
from npt_fast.training import documents, token_windows
from tests.training.texts import random_texts, write_texts
from tests.training.windows import BOS, PAD, Words, cut, ids, stream, take

pytestmark = pytest.mark.usefixtures("offline")


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
def test_windows_are_skipped(settings: dict[str, Any], tmp_path: Path) -> None:
    """Over blocks and epochs, also by a stream that goes on from there."""
    source = write_texts(tmp_path / "a.jsonl", random_texts(16, longest=20))
    truth = take(stream(source, **settings), 75)
    for skipped in (0, 1, 3, 5, 17, 50):
        windows = stream(source, **settings)
        windows.skip(skipped)
        assert take(windows, 20) == truth[skipped : skipped + 20]
        again = stream(source, start=windows.state_after(skipped + 4), **settings)
        again.skip(2)
        assert take(again, 10) == truth[skipped + 6 : skipped + 16]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_going_on_after_every_window(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed stream can be resumed too, and windows that were read ahead are read again."""

    def open_quickly(source: str, **options: Any) -> datasets.IterableDataset:
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

    def watch(files: list[str], column: None) -> Iterator[dict[str, str]]:
        opened.extend(files)
        yield from read(files, column)

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


def test_special_tokens_are_a_setting(tmp_path: Path) -> None:
    """States of before do not have it: they go on with special tokens, and are as they were."""
    source = write_texts(tmp_path / "a.jsonl", random_texts(100))
    with_bos, without = (stream(source, special_tokens=given) for given in (True, False))
    tokens = [token for _, window in take(without, 40) for token in window]
    assert tokens and BOS not in tokens
    assert "special_tokens" not in with_bos.state_after(0)
    state = without.state_after(17)
    assert not with_bos.accepts(state) and not without.accepts(with_bos.state_after(0))
    again = stream(source, special_tokens=False, start=json.loads(json.dumps(state)))
    assert take(again, 20) == take(stream(source, special_tokens=False), 37)[17:]
