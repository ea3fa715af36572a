"""The readers to fuzz: how a file reaches each, and which second reader it is compared with.

An input is one or several valid files, changed by a few edits. The reader must refuse it in one
line, or agree with the second reader.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import npt_fast as npt
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.checkpoint.digests import read_digests
from npt_fast.checkpoint.tensor_source import TensorSource, open_tensors
from npt_fast.checkpoint.training_state import (
    TrainingState,
    read_multi_layer_state,
    read_training_state,
)
from npt_fast.cli.analyze import analyze
from npt_fast.cli.shell.commands import find, scripts
from npt_fast.cli.shell.loop import bare
from npt_fast.cli.verify import verify
from npt_fast.errors import CheckpointError, NPTError, VerificationError
from npt_fast.hf.base_model import load_base_model
from npt_fast.training.documents import open_documents
from npt_fast.training.progress import read_progress
from npt_fast.transfer import journal
from npt_fast.transfer.facts import read_facts
from npt_fast.transfer.modulation import Modulation, load_modulation
from npt_fast.transfer.session import Session
from tests import checkpoints
from tests.fuzz import mutations
from tests.fuzz.mutations import Edit
from tests.fuzz.watch import watched
from tests.second_readers import as_bytes, same
from tests.training import tiny
from tests.transfer import models

MOST_EDITS = 6
LONGEST_LINE = 500
"""Characters of a message."""

Recipe = tuple[int, list[tuple[int, int]]]
"""Which valid file, and which edits with the seed of each."""


@dataclass(frozen=True)
class Target:
    """A reader to fuzz.

    Attributes:
        name: name in reports.
        file: name of the file that is changed.
        edits: edits that suit the file's format.
        prepare: function that writes the other files into a folder, and returns valid contents of
            the file.
        read: function that reads the file at a path; if it returns, the file was accepted.
        compare: function that compares the result of `read` with that of a second reader.
    """

    name: str
    file: str
    edits: Sequence[Edit]
    prepare: Callable[[Path], Sequence[bytes]]
    read: Callable[[Path], Any]
    compare: Callable[[Path, Any], None]


@dataclass
class Place:
    """A target's folder, with all that its inputs need.

    Attributes:
        target: the target.
        folder: folder for its files; it is empty at first.
        valid: contents of the file that are accepted.
        accepted: number of inputs that the reader accepted so far.
        refused: number of inputs that the reader refused so far.
    """

    target: Target
    folder: Path
    valid: Sequence[bytes] = field(init=False)
    accepted: int = field(default=0, init=False)
    refused: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.valid = self.target.prepare(self.folder)

    @property
    def path(self) -> Path:
        return self.folder / self.target.file

    def recipes(self) -> st.SearchStrategy[Recipe]:
        """Every input, the simplest first."""
        edit = st.tuples(st.integers(0, len(self.target.edits) - 1), st.integers(0, (1 << 32) - 1))
        return st.tuples(
            st.integers(0, len(self.valid) - 1), st.lists(edit, min_size=1, max_size=MOST_EDITS)
        )

    def build(self, recipe: Recipe) -> bytes:
        number, steps = recipe
        data = self.valid[number]
        for edit, seed in steps:
            data = self.target.edits[edit](data, Random(seed), self.valid)[: mutations.MAX_BYTES]
        return data

    def run(self, data: bytes) -> bool:
        """Whether the reader accepts the file; raises what is wrong with reading it."""
        self.path.unlink(missing_ok=True)  # whoever has mapped the last one keeps it
        self.path.write_bytes(data)
        try:
            with watched():
                found = self.target.read(self.path)
        except NPTError as error:
            for line in (str(error), *getattr(error, "problems", ())):
                _check_line(line)
            self.refused += 1
            return False
        self.target.compare(self.path, found)
        self.accepted += 1
        return True


def _check_line(line: str) -> None:
    assert line and line.isprintable(), f"not one printable line: {line!r:.300}"
    assert len(line) < LONGEST_LINE, f"{len(line)} characters: {line:.300}"


def _same_values(ours: Any, others: Any) -> None:
    """Whether values are equal, including types, order and NaN."""
    assert repr(ours) == repr(others), f"{ours!r:.300} is not {others!r:.300}"


# --- weights

_SMALL: dict[str, Any] = {"d": 4, "f": 6, "rank": 2}


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _safetensors(folder: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> bytes:
    path = folder / "seed"
    save_file(dict(tensors), path, metadata or None)
    data = path.read_bytes()
    path.unlink()
    return data


def _layers() -> list[dict[str, torch.Tensor]]:
    """Weights of layers with every modulation type."""
    single = checkpoints.layer_weights(3, modulation="single", **_SMALL)
    triple = checkpoints.layer_weights(5, num_ranks=2, dtype=torch.bfloat16, **_SMALL)
    return [single, single | triple]


def _pt_weights(folder: Path) -> list[bytes]:
    views = {name: tensor.t().contiguous().t() for name, tensor in _layers()[0].items()}
    together = dict(zip(views, torch.zeros(3, 2, 4), strict=True))
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in _layers()[0].items()}
    return [_saved(value) for value in (*_layers(), views, together, parameters)]


def _same_as_torch(path: Path, found: TensorSource) -> None:
    same(found.tensors, torch.load(path, weights_only=True, map_location="cpu"))


def _described() -> dict[str, Any]:
    return {
        "format_version": 1,
        "base_model": {"name": "a/b", "hidden_size": 4, "intermediate_size": 6},
        "layers": {"3": {"modulation": "single", "rank": 2, "step": 3, "fidelity": 0.5,
                         "residual": "kept"}},
    }  # fmt: skip


def _safetensors_weights(folder: Path) -> list[bytes]:
    described = json.dumps(_described())
    kinds = {str(kind): torch.ones(2, 3).to(kind) for kind in (torch.int8, torch.float16)}
    return [
        *(_safetensors(folder, weights, format="pt") for weights in _layers()),
        _safetensors(folder, _layers()[0], npt_config=described),
        _safetensors(folder, {**kinds, "none": torch.zeros(0, 2), "one": torch.tensor(1.5)}),
    ]


def _same_as_safetensors(path: Path, found: TensorSource) -> None:
    same(found.tensors, load_file(path))


def _shards(folder: Path) -> list[bytes]:
    single, both = _layers()
    other = {name: tensor for name, tensor in both.items() if name not in single}
    made = checkpoints.write_shards(folder / "made", [single, other])
    for file in made.iterdir():
        shutil.copy(file, folder)
    return [(folder / "npt_weights.safetensors.index.json").read_bytes()]


def _same_as_the_index(path: Path, found: TensorSource) -> None:
    where = json.loads(path.read_bytes())["weight_map"]
    same(found.tensors, {name: load_file(path.parent / where[name])[name] for name in where})


# --- a checkpoint's other files


def _trained(folder: Path) -> None:
    """Write a checkpoint with all files; the file to change is replaced later."""
    merged = folder / "merged"
    made = checkpoints.trained_checkpoint(folder / "made", 3, modulation="single", **_SMALL)
    npt.merge([made], merged, verify=True)
    for file in merged.iterdir():
        shutil.copy(file, folder)


def _beside(name: str, *more: Mapping[str, Any]) -> Callable[[Path], list[bytes]]:
    """The content of a file as a merge writes it, and other valid contents."""

    def prepare(folder: Path) -> list[bytes]:
        _trained(folder)
        return [(folder / name).read_bytes(), *(json.dumps(content).encode() for content in more)]

    return prepare


def _every_verb(path: Path) -> Any:
    """The checkpoint that the file belongs to, after every verb has read it."""
    folder = path.parent
    checkpoint = open_checkpoint(folder)
    if path.name in checkpoint.unread:
        raise CheckpointError(checkpoint.unread[path.name])
    # as the command line prints
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")
    with redirect_stdout(printed), redirect_stderr(printed):
        analyze(checkpoint=[str(folder)], verbose=True)
        analyze(checkpoint=[str(folder)], json=True)
        verify(str(folder))
        _merged(folder)
    return checkpoint


def _merged(folder: Path) -> None:
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    try:
        npt.merge([folder], output, verify=True)
    except NPTError as error:
        assert not isinstance(error, VerificationError)
        return
    again = npt.verify(output)
    assert again.passed, again.problems


def _same_as_json(path: Path, found: Any) -> None:
    _same_values(strict_json.read_foreign(path), json.loads(path.read_bytes()))


def _training_states(folder: Path) -> list[bytes]:
    _trained(folder)
    weights = _layers()[0]
    plain = checkpoints.adamw_state(weights)
    scaled = checkpoints.adamw_state(weights, numpy_lr=True, amsgrad=True) | {
        "scaler_state_dict": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                              "growth_interval": 2000, "_growth_tracker": 0},
        "best_val_loss": torch.tensor(0.5),
        "merge_info": {"sources": [1, 2.5, None], "step": torch.tensor(3)},
        "data_state": {
            "source": "x", "seed": 1, "max_length": 8, "stride": 8, "held_out": 0, "block": 4,
            "windows": 3, "before": 2, "epoch": 0, "window": 1, "skip": 0, "documents": "{}",
            "tokens": [1, 2],
        },
    }  # fmt: skip
    return [(folder / "training_state.pt").read_bytes(), _saved(plain), _saved(scaled)]


def _training_state(path: Path) -> TrainingState:
    checkpoint = open_checkpoint(path.parent)
    state = read_training_state(path, checkpoint.modules)
    assert state is not None
    _every_verb(path)
    read_progress(state)
    return state


def _loaded(path: Path) -> Any:
    """The content as torch reads it, with the numpy scalars of a cosine schedule."""
    scalar = np.float64(0).__reduce__()[0]  # its module has moved between versions of numpy
    numbers: Any = [scalar, np.dtype, *map(type, map(np.dtype, "fdiq?"))]
    with torch.serialization.safe_globals(numbers):
        return torch.load(path, weights_only=True, map_location="cpu")


def _named_tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested data, by the keys that lead to it; a shared one only once."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _named_tensors(
                item, f"{name}.{str(key)[:80]}" if name else str(key)[:80], seen
            )


def _same_state(path: Path, found: TrainingState) -> None:
    loaded = _loaded(path)
    assert found.global_step == int(loaded.pop("global_step"))
    optimizer = loaded.pop("optimizer_state_dict", None)
    moments = {
        f"optimizer.{index}.{name}": value
        for index, state in (optimizer or {}).get("state", {}).items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    ours = {entry.name: entry for entry in found.tensors() if entry.name.startswith("optimizer.")}
    same(ours, moments)
    content = dict(_named_tensors(loaded, "", set()))
    others = {
        entry.name: entry
        for entry in found.tensors()
        if not entry.name.startswith(("optimizer.", "optimizer_state_dict."))
    }
    same(others, content)


def _multi_layer_states(folder: Path) -> list[bytes]:
    _trained(folder)
    own = checkpoints.multi_layer_state([3], losses=[0.5, (1, None, True)], note="x")
    as_json = json.loads(json.dumps(own))
    return [_saved(own), _saved(as_json)]


def _multi_layer_state(path: Path) -> Any:
    state = read_multi_layer_state(path)
    _every_verb(path)
    return state


def _same_multi_layer_state(path: Path, found: Any) -> None:
    loaded = _loaded(path)
    weights = {int(layer): weight for layer, weight in loaded.get("layer_weights", {}).items()}
    layers = [int(layer) for layer in loaded["layers_to_train"]]
    expected = {**loaded, "layers_to_train": layers, "layer_weights": weights}
    _same_values(_plain(found), _plain(expected))


def _plain(value: Any) -> Any:
    """Nested data in Python's own types."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _digests(path: Path) -> list[tuple[str, ...]]:
    found = [*read_digests(path.parent)]
    _every_verb(path)
    return list(found)


def _same_lines(path: Path, found: list[tuple[str, ...]]) -> None:
    assert "".join("\t".join(line) + "\n" for line in found).encode() == path.read_bytes()


# --- what the shell reads


def _modulations(folder: Path) -> list[bytes]:
    found = []
    for layers, projections in (((1, 2), models.PROJECTIONS), ((2,), ("down",))):
        modulation = models.random_modulation(layers=layers, projections=projections)
        modulation.save(folder / "seed.safetensors")
        found.append((folder / "seed.safetensors").read_bytes())
    return found


def _modulation(path: Path) -> Modulation:
    """Read a modulation with its terms, which are checked when they are used."""
    found = load_modulation(path)
    for _ in found.walk():
        pass
    return found


def _same_terms(path: Path, found: Modulation) -> None:
    ours = {
        f"layer.{layer}.{projection}.{name}": tensor
        for layer, projection, terms in found.walk()
        for name, tensor in terms._asdict().items()
    }
    others = load_file(path)
    assert ours.keys() == others.keys()
    for name, tensor in others.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(ours[name]) == as_bytes(tensor)


_MODEL: Any = None


def _session() -> Session:
    global _MODEL
    _MODEL = _MODEL or models.converted()
    return Session(_MODEL, models.tokenizer)


def _sessions(folder: Path) -> list[bytes]:
    found = []
    session = _session()
    for name in ("a", "b c"):
        session.extract(name, "the red house")
        session.track(["x", " y"])
        for file in session.save(folder / "saved").iterdir():
            shutil.copy(file, folder)
        found.append((folder / "session.json").read_bytes())
    return found


def _load_session(path: Path) -> Session:
    session = _session()
    session.load(path.parent)
    return session


def _same_session(path: Path, found: Session) -> None:
    index = json.loads(path.read_bytes())
    assert list(found.state.shelf) == [entry["name"] for entry in index["modulations"]]
    assert list(found.state.tracked) == index["tracked"]
    assert list(found.state.layers) == sorted(index["layers"])


def _journals(folder: Path) -> list[bytes]:
    log = journal.Journal(folder / "log", _session().description())
    entry = {"seed": 1, "digests": {"a": "0" * 64}, "result": {"tokens": ["é", 1.5, None]}}
    for command in ("extract a the red house", "list", 'inject a "x" -alpha 0.5'):
        log.write({"command": command, **entry})
    log.write({"command": "x", "seed": 1, "error": "Unknown command: x"})
    log.close()
    return [(folder / "log").read_bytes()]


def _journal(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log, and compare each with the next like a replay does."""
    header, entries = journal.read(path)
    lines = [header, *entries]
    for one, other in pairwise(lines):
        journal.difference(one, other)
    return lines


def _same_journal(path: Path, found: list[dict[str, Any]]) -> None:
    *lines, _ = path.read_bytes().split(b"\n")
    for ours, other in zip(found, map(json.loads, lines), strict=True):
        _same_values(ours, {key: other[key] for key in ours})


_FACTS = """facts:
  - name: Paris for Germany           # of the guide
    prompt: The capital of Germany is
    inject:
      from: The capital of France is
      sequence: false
      position: last
      mode: replace
      strength: 1.0
      when: prefill
    expect: {contains: Paris}
    must_not_change:
      - Two plus two is
      - |
        A text of
        two lines
    tokens: 10
  - {prompt: "a", inject: {from: 'b', position: 2:5}, expect: c}
"""


def _same_facts(path: Path, found: Sequence[Any]) -> None:
    given = yaml.safe_load(path.read_text("utf-8"))["facts"]
    assert len(found) == len(given)
    for fact, other in zip(found, given, strict=True):
        injection, expected = other["inject"], other.get("expect") or {}
        expected = {"contains": expected} if isinstance(expected, str) else expected
        _same_values(
            (fact.prompt, fact.source, fact.tokens, list(fact.must_not_change),
             fact.injection.strength),
            (
                other["prompt"], injection["from"], other.get("tokens", 10),
                other.get("must_not_change", []), injection.get("strength", 1.0),
            ),
        )  # fmt: skip
        _same_values(
            (fact.contains, fact.begins, fact.injection.position),
            (
                expected.get("contains"), expected.get("begins"),
                injection.get("position", "last"),
            ),
        )  # fmt: skip


_SCRIPT = """# a comment
extract a "the red house"
/extract-seq b the blue boat
calc c = 2 * a - b / 3
inject a the red -pos at:red -alpha 0.5 -tokens 3

set temperature 0.7
compare a "x"
"""


def _script(path: Path) -> list[str]:
    """Read lines and parse each like the shell, without running it."""
    lines = scripts.read_script(str(path))
    for line in map(bare, lines):
        name, _, rest = line.partition(" ")
        try:
            find(name).parse(rest)
        except NPTError as error:
            _check_line(str(error))
    return lines


def _same_script(path: Path, found: list[str]) -> None:
    assert "".join(found).split() == "".join(path.read_bytes().decode().splitlines()).split()


# --- text to train on

_ROWS = [
    {"text": "the red house", "n": 1},
    {"text": "", "more": {"a": [None, 0.5]}},
    {"text": "é\n"},
]


def _documents(path: Path) -> list[str]:
    return [row["text"] for row in open_documents(str(path), seed=0)]


def _json_rows(path: Path) -> list[Any]:
    text = path.read_bytes().decode("utf-8-sig")
    decoder, rows, at = json.JSONDecoder(), [], 0
    while text[at:].strip(" \t\r\n"):
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n"))
        row, at = decoder.raw_decode(text, at)
        rows.append(row)
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows


def _same_json_texts(path: Path, found: list[str]) -> None:
    rows = _json_rows(path)
    assert found == [row if isinstance(row, str) else row["text"] for row in rows]


def _parquet_files(folder: Path) -> list[bytes]:
    rows = [[row["text"] for row in _ROWS] * 20, ["a", "b"], [str(n) for n in range(300)]]
    ways: list[dict[str, Any]] = [
        {}, {"compression": "zstd", "use_dictionary": False}, {"data_page_version": "2.0"},
        {"compression": "gzip", "row_group_size": 7},
    ]  # fmt: skip
    found = []
    for texts in rows:
        for way in ways:
            file = io.BytesIO()
            table = pa.table({"n": list(range(len(texts))), "text": texts})
            pq.write_table(table, file, **way)
            found.append(file.getvalue())
    return found


def _same_parquet_texts(path: Path, found: list[str]) -> None:
    empty = not path.stat().st_size  # a file without documents
    assert found == ([] if empty else pq.read_table(path, columns=["text"])["text"].to_pylist())


def _same_paragraphs(path: Path, found: list[str]) -> None:
    assert " ".join(found).split() == path.read_bytes().decode().split()


# --- base models


def _model_file(name: str) -> Callable[[Path], list[bytes]]:
    def prepare(folder: Path) -> list[bytes]:
        tiny.save(folder, layers=1)
        return [(folder / name).read_bytes()]

    return prepare


def _base_model(path: Path) -> Any:
    return load_base_model(str(path.parent))[0]


def _same_weights(path: Path, found: Any) -> None:
    """Every parameter equals that in the file, unless the config ties it to another."""
    weights = load_file(path.parent / "model.safetensors")
    tied = {"lm_head.weight"} if found.config.tie_word_embeddings else set()
    for name, tensor in found.state_dict().items():
        assert name in tied or as_bytes(tensor) == as_bytes(weights[name].float()), name


_CONFIG = {"model_name": "a/b", "max_steps": 3, "learning_rate": 1e-3, "x": {"y": [1.5, None]}}
_ORIGINAL_SUMMARY = {
    "merged_layers": [3], "layer_sources": {"3": "/x/checkpoint-800"}, "total_parameters": 3,
}  # fmt: skip


def _fixed(*contents: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [content.encode() for content in contents]


_J, _L = mutations.JSON, mutations.JSON_LINES
_LINES = "".join(json.dumps(row) + "\n" for row in _ROWS)
TARGETS = {
    target.name: target
    for target in (
        Target("pt", "npt_weights.pt", mutations.TORCH, _pt_weights, open_tensors, _same_as_torch),
        Target("safetensors", "npt_weights.safetensors", mutations.SAFETENSORS,
               _safetensors_weights, open_tensors, _same_as_safetensors),
        Target("index", "npt_weights.safetensors.index.json", _J, _shards, open_tensors,
               _same_as_the_index),
        Target("training_state", "training_state.pt", mutations.TORCH, _training_states,
               _training_state, _same_state),
        Target("multi_layer_state", "multi_layer_state.pt", mutations.TORCH, _multi_layer_states,
               _multi_layer_state, _same_multi_layer_state),
        Target("npt_config", "npt_config.json", _J, _beside("npt_config.json", _described()),
               _every_verb, _same_as_json),
        Target("merge_summary", "merge_summary.json", _J,
               _beside("merge_summary.json", _ORIGINAL_SUMMARY), _every_verb, _same_as_json),
        Target("merge_digests", "merge_digests.txt", mutations.TEXT, _beside("merge_digests.txt"),
               _digests, _same_lines),
        Target("config", "config.json", _J, _beside("config.json", _CONFIG), _every_verb,
               _same_as_json),
        Target("modulation", "m.safetensors", mutations.SAFETENSORS, _modulations,
               _modulation, _same_terms),
        Target("session", "session.json", _J, _sessions, _load_session, _same_session),
        Target("journal", "log.jsonl", _L, _journals, _journal, _same_journal),
        Target("facts", "facts.yaml", mutations.YAML, _fixed(_FACTS), read_facts, _same_facts),
        Target("script", "script.txt", mutations.TEXT, _fixed(_SCRIPT), _script, _same_script),
        Target("jsonl", "text.jsonl", _L, _fixed(_LINES), _documents, _same_json_texts),
        Target("json", "text.json", _J, _fixed(json.dumps(_ROWS), json.dumps(_ROWS, indent=1)),
               _documents, _same_json_texts),
        Target("parquet", "text.parquet", mutations.BINARY, _parquet_files, _documents,
               _same_parquet_texts),
        Target("txt", "text.txt", mutations.TEXT, _fixed(_SCRIPT, "a\n\nb\n\n\n c"), _documents,
               _same_paragraphs),
        Target("model_config", "config.json", _J, _model_file("config.json"), _base_model,
               _same_weights),
        Target("tokenizer_config", "tokenizer_config.json", _J,
               _model_file("tokenizer_config.json"), _base_model, _same_weights),
    )
}  # fmt: skip
