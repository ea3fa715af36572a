"""Data sets as objects: their rows, chats, what is refused, and places in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import npt_fast as npt
from npt_fast.hf.base_model import load_base_model
from npt_fast.text_sources import data_name
from npt_fast.training.data import open_windows
from tests.checkpoints import load_state
from tests.training import runs, tiny
from tests.training.runs import LENGTH, Place
from tests.training.texts import write_texts

TOKENIZER = tiny.bos_tokenizer()
MODEL = tiny.model(vocab_size=258)
TEXTS = [f"{n:>40}" for n in range(60)]
IDS = [TOKENIZER(text).input_ids for text in TEXTS]
QUESTION = {"role": "user", "content": "why?"}
ANSWER = {"role": "assistant", "content": "so"}
CHAT = TOKENIZER.apply_chat_template([QUESTION, ANSWER])["input_ids"]


def tokens(data: Any, **options: Any) -> list[int]:
    """The tokens of all windows held out: a tenth of the text, from its beginning."""
    windows = open_windows(data, MODEL, TOKENIZER, max_length=8, held_out=10**6, **options)
    return [int(i) for window in windows.held_out_windows() for i in window["input_ids"]]


EXPECTED = tokens(TEXTS)


class Anew:
    """Rows that start anew whenever they are iterated."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def dataset(**columns: Any) -> Any:
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(IDS, id="ids"),
        pytest.param([torch.tensor(ids) for ids in IDS], id="tensors"),
        pytest.param([*TEXTS[:7], *IDS[7:]], id="texts and ids"),
        pytest.param(Anew(TEXTS), id="an iterable"),
        pytest.param([{"text": text, "n": 1} for text in TEXTS], id="mappings"),
        pytest.param(dataset(text=TEXTS, n=[1] * 60), id="Dataset"),
        pytest.param(dataset(input_ids=IDS).with_format("torch"), id="tokenised Dataset"),
        pytest.param(dataset(text=TEXTS).to_iterable_dataset(), id="IterableDataset"),
        pytest.param(dataset(text=TEXTS[::-1]).select(range(59, -1, -1)), id="chosen rows"),
    ],
)
def test_data_sets_of_the_same_text(rows: Any) -> None:
    assert tokens(rows) == EXPECTED
    assert EXPECTED[:41] == IDS[0][:41]


def test_a_column_of_a_name(tmp_path: Path) -> None:
    both = dataset(text=["no"] * 60, body=TEXTS)
    assert tokens(both, text_column="body") == EXPECTED
    for name in ("a.jsonl", "a.json", "a.parquet"):
        path = write_texts(tmp_path / name, TEXTS, column="body")
        assert tokens(path, text_column="body") == EXPECTED
    write_texts(tmp_path / "a.txt", TEXTS)
    assert tokens(tmp_path / "a.txt", text_column="body") == EXPECTED


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [[QUESTION, ANSWER]] * 40},
        {"prompt": ["why?"] * 40, "completion": ["so"] * 40},
        {"prompt": [[QUESTION]] * 40, "completion": [[ANSWER]] * 40},
    ],
)
def test_chats(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    """The chat template writes them, with its own special tokens."""
    expected = (CHAT * 40)[: len(tokens(dataset(**columns)))]
    assert len(expected) > len(CHAT)
    assert tokens(dataset(**columns)) == expected
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert tokens(path) == expected
    path = tmp_path / "chats.parquet"
    dataset(**columns).to_parquet(path)
    assert tokens(path) == expected


@pytest.mark.parametrize("column", [{"input_ids": IDS}, {"messages": [[{"content": [TEXTS]}]]}])
def test_other_lists_in_parquet(tmp_path: Path, column: dict[str, Any]) -> None:
    """They are refused in a line that names the way that works."""
    path = tmp_path / "a.parquet"
    dataset(**column).to_parquet(path)
    (name,) = column
    with pytest.raises(npt.DataError, match=rf"row 0 .*has {name} \(.*load_dataset\("):
        tokens(path)
    if name == "input_ids":
        loaded = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert tokens(loaded) == EXPECTED


def test_a_message_may_call_a_tool() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert len(tokens([[QUESTION, call]] * 40)) > 8


def test_a_chat_template_of_a_file(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    plain, own = tiny.tokenizer(), TOKENIZER.chat_template
    rows = [[QUESTION, ANSWER]] * 40
    expected = plain("why?!so!" * 40).input_ids
    windows = open_windows(
        rows, MODEL, plain, max_length=8, held_out=3, chat_template=template
    ).held_out_windows()
    assert [int(i) for w in windows for i in w["input_ids"]] == expected[:24]
    assert plain.chat_template is None
    assert tokens(rows, chat_template=template) == tokens(["why?!so!"] * 40, special_tokens=False)
    assert TOKENIZER.chat_template == own
    with pytest.raises(npt.ModelError, match=r"^list: .*has no chat template; give one with "):
        open_windows(rows, MODEL, plain, max_length=8, held_out=3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"^list: is empty; give a data set with texts$"),
        (dataset(text=[]), r"^Dataset: is empty"),
        (dataset(body=["a"]), r"^Dataset: row 0 needs a text in a column text, .*has body \(str\)"),
        ([{}], "has nothing$"),
        (dataset(text=[1]), r"^Dataset: row 0 is of type int, not a text, a chat or token ids$"),
        ([["a", "b"]], r"^list: row 0 is of type list of str, not a text"),
        ([[1, 258]], r"^list: row 0 has token ids from 1 to 258, the model has 0 to 257$"),
        ([[-1, 2]], "has token ids from -1 to 2"),
        ([[[1], [2, 3]]], "is of type list of list, not"),
        ([1.5], "is of type float, not"),
        ([*TEXTS[:5], 1.5], r"^list: row 5 is of type float, not"),
        (["ab", None], "has 3 tokens, "),
        (
            [[{"from": "human", "value": "a"}]],
            r"^list: row 0 has a message without role and content: .* from \(str\), value \(str\)$",
        ),
        ([[QUESTION, {"role": "user"}]], r"without role and content: it has role \(str\)$"),
        ([[{"role": "user", "content": None}]], r"has role \(str\), content \(NoneType\)$"),
        ([[{"content": "a"}]], r"it has content \(str\)$"),
        ([[QUESTION, "b"]], "has a message of type str$"),
        (datasets.Dataset.to_pandas(dataset(a=["x"], b=["y"])), "^DataFrame: .* of them: a, b$"),
        ((text for text in TEXTS), r"^generator: can be read once, .* give a list, or an"),
        (
            datasets.DatasetDict(a=dataset(text=["a"]), b=dataset(text=["a"])),
            r"^DatasetDict: is several .* of them: a, b$",
        ),
        (b"text", r"^bytes: is no text; give a data set"),
        (5, r"^int: is no text; give a data set"),
    ],
)
def test_what_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(npt.DataError, match=message) as caught:
        open_windows(rows, MODEL, TOKENIZER, max_length=8, held_out=3)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(npt.ModelError, match=r"^list: .* a token 257, the model knows 100 tokens;"):
        open_windows(TEXTS, tiny.model(vocab_size=100), TOKENIZER, max_length=8, held_out=3)


def test_a_padding_token_that_the_model_does_not_know() -> None:
    padded = tiny.bos_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert padded.pad_token_id == 258
    windows = open_windows([IDS[0]], MODEL, padded, max_length=30, held_out=0)
    window = next(w for w in islice(windows, 2) if not all(w["attention_mask"]))
    assert window["input_ids"][-1] == padded.eos_token_id


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be opened: No such file"),
        (b"\xff", "chat: .*can't decode"),
        (b"x" * 2**20 + b"x", "more than 1,048,576 are refused"),
    ],
)
def test_templates_that_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "chat").write_bytes(content)
    with pytest.raises(npt.DataError, match=f"{message}.*; give a file with a chat template"):
        tokens([[QUESTION]] * 40, chat_template=tmp_path / "chat")


def test_rows_that_break_off() -> None:
    class Breaking(Anew):
        def __iter__(self) -> Iterator[Any]:
            yield from self.rows
            raise OSError("the cable\nand more")

    with pytest.raises(npt.DataError, match=r"^Breaking: reading broke off: the cable; resume"):
        tokens(Breaking(TEXTS))


def test_options_take_names_alone() -> None:
    with pytest.raises(npt.OptionError, match=r"data must be the name of a text .*, not a list"):
        npt.TrainOptions(train_layers="1", data=TEXTS)  # type: ignore[arg-type]
    assert data_name(dataset(text=["a"])) == "Dataset"


# --- training and evaluation


def rows_of(kind: str, place: Place) -> Any:
    text = place.text.read_text()
    texts = [text[n : n + 60] for n in range(0, len(text), 60)]
    whole = dataset(text=texts)
    kinds = {
        "list": lambda: texts,
        "Dataset": lambda: whole,
        "IterableDataset": whole.to_iterable_dataset,
        "shuffled": lambda: whole.to_iterable_dataset().shuffle(seed=3, buffer_size=7),
    }
    return kinds[kind]()


def train(place: Place, output: Path, rows: Any, **changes: Any) -> Path:
    options = npt.TrainOptions(**place.settings(output, data=None, **changes))
    return npt.train(options, train_dataset=rows).checkpoint


@pytest.mark.parametrize("kind", ["list", "Dataset", "IterableDataset", "shuffled"])
def test_a_run_resumes_exactly(place: Place, tmp_path: Path, kind: str, capsys: Any) -> None:
    """24 windows of an epoch of 36 are used before it resumes."""
    settings = {"max_steps": 12, "save_steps": 6}
    whole = train(place, tmp_path / "whole", rows_of(kind, place), **settings)
    half = str(whole.with_name("checkpoint-6"))
    rest = train(place, tmp_path / "rest", rows_of(kind, place), resume_from=half, **settings)
    runs.assert_same_end(whole, rest)
    assert load_state(whole)["data_state"] == load_state(rest)["data_state"]
    assert "starts over" not in capsys.readouterr().err
    train(
        place,
        tmp_path / "other",
        rows_of(kind, place)[::-1] if kind == "list" else ["x"] * 999,
        resume_from=half,
        **settings,
    )
    assert "so the text starts over" in capsys.readouterr().err
    with pytest.raises(npt.TrainingError, match=r"was trained on '\w+'; name it with --data"):
        train(place, tmp_path / "none", None, resume_from=half, **settings)


def test_evaluate_measures_what_training_holds_out(place: Place, tmp_path: Path) -> None:
    rows = rows_of("Dataset", place)
    options = npt.TrainOptions(
        **place.settings(tmp_path / "run", data=None, max_steps=2, eval_steps=2)
    )
    report = npt.train(options, train_dataset=rows)
    assert report.evaluation is not None and report.data == "Dataset"
    model, tokenizer = load_base_model(str(place.base))
    npt.load(model, report.checkpoint)
    found = npt.evaluate(model, tokenizer, rows, windows=4, max_length=LENGTH)
    assert found.kl == pytest.approx(report.evaluation.kl, rel=1e-5)
    described = json.loads((report.checkpoint / "npt_config.json").read_text())
    assert described["layers"]["1"]["certificate"]["data"] == "Dataset"


def test_held_out_rows_of_their_own(place: Place, tmp_path: Path) -> None:
    options = npt.TrainOptions(**place.settings(tmp_path / "run", max_steps=1, eval_steps=1))
    report = npt.train(options, eval_dataset=rows_of("list", place)[::-1])
    assert report.data == "list" and report.evaluation is not None
    with pytest.raises(npt.TrainingError, match=r"^data is named, and a data set is given; leave"):
        npt.train(options, train_dataset=["a"])
