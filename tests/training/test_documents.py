"""Sources of documents, their order, and sources that are refused."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest

import npt_fast as npt
from npt_fast.training import documents as module
from npt_fast.training.documents import open_documents
from tests.training.texts import random_texts, texts_of, write_texts

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt", "a.md", "A.TXT"])
def test_a_file_of_each_kind(tmp_path: Path, name: str) -> None:
    texts = random_texts(20)
    assert texts_of(write_texts(tmp_path / name, texts)) == texts


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    texts = random_texts(12)
    names = ["a/z.txt", "b.jsonl", "b/c/a.parquet", "c.md", "d.json", "e.txt"]
    for n in reversed(range(6)):
        write_texts(tmp_path / "folder" / names[n], texts[2 * n : 2 * n + 2])
    (tmp_path / "folder" / "image.png").write_bytes(b"no text")
    (tmp_path / "folder" / "empty.jsonl").write_bytes(b"")
    assert texts_of(tmp_path / "folder") == texts
    assert texts_of(tmp_path / "folder" / "**" / "*.txt") == [*texts[:2], *texts[10:]]


def test_names_of_files_are_no_patterns(tmp_path: Path) -> None:
    texts = random_texts(4)
    write_texts(tmp_path / "[ab]*?.jsonl", texts)
    write_texts(tmp_path / "a.jsonl", random_texts(9))
    assert texts_of(tmp_path / "[ab]*?.jsonl") == texts


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = random_texts(3)
    write_texts(tmp_path / "texts" / "a.txt", texts)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "texts")
    assert texts_of("~/texts/a.txt") == texts_of("a.txt") == texts


def test_python_docs_are_always_there() -> None:
    assert texts_of("python-docs") == [topics[name] for name in sorted(topics)]


def test_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        assert options["streaming"] and options["split"] == "train"
        opened.append((path, name, options["revision"]))
        rows = {"id": list(range(9)), "text": [f"{path} {n}" for n in range(9)]}
        return datasets.Dataset.from_dict(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    expected = {"small": 1, "medium": 2, "large": 3, "xlarge": 5}
    for preset, count in expected.items():
        opened.clear()
        rows = list(open_documents(preset, seed=1))
        assert len({path for path, _, _ in opened}) == count
        assert all(set(row) == {"text"} for row in rows)
        texts = [row["text"] for row in rows]
        assert sorted(texts) == sorted(f"{path} {n}" for path, _, _ in opened for n in range(9))
        for path, _, _ in opened:
            own = [text for text in texts if text.startswith(path)]
            assert own == [f"{path} {n}" for n in range(9)]
        assert texts == [row["text"] for row in open_documents(preset, seed=1)]
        if count > 1:
            assert texts != [row["text"] for row in open_documents(preset, seed=2)]
            assert len({text.split()[0] for text in texts[:9]}) > 1
    names = {path: (name, revision) for path, name, revision in opened}
    assert names["wikimedia/wikipedia"] == ("20231101.en", None)
    assert names["bookcorpus/bookcorpus"] == (None, "refs/convert/parquet")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:en.2", ("org/name", "en.2", "train")),
        ("org/name:en:test", ("org/name", "en", "test")),
        ("org/name::test", ("org/name", None, "test")),
    ],
)
def test_a_data_set_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple[str | None, ...]
) -> None:
    opened = []

    def load(path: str, name: str | None, *, split: str, streaming: bool, revision: None) -> Any:
        opened.append((path, name, split))
        assert streaming
        return datasets.Dataset.from_dict({"id": [1], "body": ["a"]}).to_iterable_dataset()

    monkeypatch.setattr(module, "check_hub", lambda source: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(open_documents(source, seed=0, column="body")) == [{"id": 1, "body": "a"}]
    assert opened == [expected]


def test_a_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "org" / "name" / "a.txt", ["here"])
    monkeypatch.chdir(tmp_path)
    assert texts_of("org/name") == ["here"]
    with pytest.raises(npt.DataError, match=r"^org/b\.txt: no such file or folder"):
        open_documents("org/b.txt", seed=0)


def test_a_data_set_without_a_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        npt.DataError,
        match=r"^org/name:en: cannot open org/name .*the network and the name, "
        r"org/name:config:split.*; no file or folder has this name either$",
    ) as e:
        open_documents("org/name:en", seed=0)
    assert "\n" not in str(e.value)


def test_a_preset_without_a_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        npt.DataError, match=r"medium: cannot open Salesforce/wikitext .*network"
    ) as e:
        open_documents("medium", seed=0)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("Dataset scripts are no longer supported\nmore", "supported; check the network, or give"),
        ("Compression type zstd not supported", "supported; install zstandard, or give"),
    ],
)
def test_one_dataset_of_a_preset_that_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch, fault: str, advice: str
) -> None:
    def load(path: str, *args: Any, **options: Any) -> Any:
        if path == "bookcorpus/bookcorpus":
            raise RuntimeError(fault)
        return datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(npt.DataError, match=rf"cannot open bookcorpus/bookcorpus .*{advice}"):
        open_documents("medium", seed=0)


def test_unknown_sources(tmp_path: Path) -> None:
    for source in ("tiny", str(tmp_path / "none.txt"), str(tmp_path / "*.txt")):
        with pytest.raises(npt.DataError, match=r"no such file .*python-docs, small, medium"):
            open_documents(source, seed=0)
    (tmp_path / "a.csv").write_text("text\n")
    for source in (tmp_path, tmp_path / "a.csv", tmp_path / "*.csv"):
        with pytest.raises(npt.DataError, match=r"has no text files; they end in \.txt"):
            open_documents(str(source), seed=0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_file_without_a_column_text(tmp_path: Path, name: str) -> None:
    path = write_texts(tmp_path / name, ["x"], column="content")
    with pytest.raises(npt.DataError, match=rf"{name}: row 0 needs a .*, has .*content \(str\)"):
        open_documents(str(path), seed=0)
    with pytest.raises(npt.DataError, match=r"text \(int\)"):
        open_documents(str(write_texts(tmp_path / name, [1, 2])), seed=0)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", ["fine"])
    cases = {"b.jsonl": b'{"text": \n', "c.txt": "café".encode("latin-1"), "d.parquet": b"PAR1"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(npt.DataError, match=rf"{name}: cannot be read: .+; repair or"):
            open_documents(str(tmp_path), seed=0)
        (tmp_path / name).unlink()
