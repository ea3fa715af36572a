"""Windows of several texts, in turn, against each text alone."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from npt_fast.training.mixed_windows import MixedWindows
from npt_fast.training.self_text import SelfText
from npt_fast.training.token_windows import TokenWindows
from tests.training.texts import random_texts, write_texts
from tests.training.windows import BOS, Words, plain, stream, take

LENGTH = 8
IDS = torch.randint(2, 50, (13, LENGTH), generator=torch.Generator().manual_seed(0)).int()
SAMPLED = SelfText(IDS, "a key", Path("nowhere"))


def sampled(**options: Any) -> TokenWindows:
    return stream("self:104", sampled=SAMPLED, **options)


def texts(source: Path, start: Any = None, **options: Any) -> list[TokenWindows]:
    parts = [None, None] if start is None else start["parts"]
    return [sampled(start=parts[0], **options), stream(source, start=parts[1], **options)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "a.jsonl", random_texts(60))


def test_windows_of_a_sampled_text_are_its_rows() -> None:
    """Nothing is tokenised, no special token is added, and rows are not joined."""
    tokenizer = Words()
    windows = sampled(tokenizer=tokenizer, held_out=3)
    assert [plain(w)[1] for w in windows.held_out_windows()] == IDS[:3].tolist()
    for _ in range(2):  # epochs
        found = take(windows, 10)
        assert [ids for _, ids in sorted(found)] == IDS[3:].tolist()
        assert found != sorted(found)
    assert tokenizer.texts == [] and BOS not in IDS


def test_a_sampled_text_resumes_anywhere() -> None:
    whole = take(sampled(held_out=2), 40)
    for used in (0, 1, 10, 11, 25):
        stream_ = sampled(held_out=2)
        take(stream_, used)
        state = json.loads(json.dumps(stream_.state_after(used)))
        assert take(sampled(held_out=2, start=state), 15) == whole[used:][:15]


def test_another_sampled_text_is_not_resumed() -> None:
    state = sampled().state_after(0)
    other = stream("self:104", sampled=SAMPLED._replace(key="another"))
    assert sampled().accepts(state) and not other.accepts(state)
    assert not stream("python-docs").accepts({**state, "source": "python-docs"})


def test_windows_of_all_texts_are_skipped(source: Path) -> None:
    truth = take(iter(MixedWindows(texts(source), "both")), 40)
    for skipped in (0, 1, 2, 7):
        mixed = MixedWindows(texts(source), "both")
        mixed.skip(skipped)
        assert take(iter(mixed), 20) == truth[skipped : skipped + 20]
        state = mixed.state_after(skipped + 3)
        again = MixedWindows(texts(source, state), "both", state["windows"])
        again.skip(2)
        assert take(iter(again), 10) == truth[skipped + 5 : skipped + 15]


def test_texts_take_turns(source: Path) -> None:
    mixed = MixedWindows(texts(source), "both")
    alone = [take(text, 30) for text in texts(source)]
    found = take(iter(mixed), 60)
    assert [ids for _, ids in found[::2]] == [ids for _, ids in alone[0]]
    assert [ids for _, ids in found[1::2]] == [ids for _, ids in alone[1]]
    # a number stands for one window, whatever the epoch
    by_number: dict[int, list[int]] = {}
    assert all(by_number.setdefault(number, ids) == ids for number, ids in found)
    assert len(by_number) == len({number for number, _ in alone[0]}) + len(
        {number for number, _ in alone[1]}
    )


def test_held_out_windows_take_turns(source: Path) -> None:
    mixed = MixedWindows(texts(source, held_out=2), "both")
    parts = [[plain(w)[1] for w in t.held_out_windows()] for t in texts(source, held_out=2)]
    held = [plain(window) for window in mixed.held_out_windows()]
    assert mixed.held_out == 4 and [number for number, _ in held] == [-4, -3, -2, -1]
    assert [ids for _, ids in held] == [parts[0][0], parts[1][0], parts[0][1], parts[1][1]]


@pytest.mark.parametrize("used", [0, 1, 2, 7, 33])
def test_a_mixture_resumes_anywhere(source: Path, used: int) -> None:
    whole = take(iter(MixedWindows(texts(source), "both")), 60)
    first = MixedWindows(texts(source), "both")
    take(iter(first), used + 3)  # loaders read ahead
    state = json.loads(json.dumps(first.state_after(used)))
    assert first.accepts(state)
    again = MixedWindows(texts(source, state), "both", state["windows"])
    assert take(islice(iter(again), 20), 20) == whole[used:][:20]
    assert again.state_after(used) == state


def test_states_of_other_mixtures(source: Path) -> None:
    mixed = MixedWindows(texts(source), "both")
    state = mixed.state_after(0)
    for wrong in (
        None, {}, state["parts"][0], {**state, "parts": state["parts"][::-1]},
        {**state, "parts": state["parts"][:1]}, {**state, "windows": 1}, {**state, "windows": None},
    ):  # fmt: skip
        assert not mixed.accepts(wrong)  # type: ignore[arg-type]
    assert not texts(source)[0].accepts(state)
