"""Whatever the small files contain, the parsed objects have the types that they declare."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import npt_fast as npt
from npt_fast.checkpoint.merge_summary import MergeSummary
from npt_fast.checkpoint.npt_config import Description, LaterVersionError
from npt_fast.errors import CheckpointError
from tests.checkpoints import layer_weights, write_checkpoint

DESCRIPTION = {
    "format_version": 1,
    "base_model": {
        "name": "m", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4,
        "vocab_size": 32,
    },
    "layers": {
        "1": {
            "modulation": "dual", "num_ranks": 1, "rank": 4, "residual": "kept", "step": 5,
            "fidelity": 0.5,
        },
    },
}  # fmt: skip
SUMMARY = {
    "merged_layers": [1, 2],
    "layer_sources": {"1": "a", "2": "b"},
    "total_parameters": 10,
    "checkpoint_keys": 2,
    "layers": {"1": {"step": 3, "source": "a", "chain": ["x"]}, "2": {"chain": None}},
    "working_directory": "..",
    "inputs": [{"path": "a", "layers": [1]}, {"path": "b", "layers": None}],
    "options": {"uniform": False, "max_shard_size": 5, "copy_multi_layer_state": None},
    "files": {"npt_weights.pt": "00"},
    "tensors": {"npt_weights.pt": {"x": "F32[1] 00"}},
}
ODD = [
    None, True, -1, 5, 1 << 126, 0.5, 1e308, float("nan"), float("inf"), "", "x", "1", "\ud800",
    "\0", [], [None], [5], [[5]], ["x"], {}, {"": 1}, {"1": 1}, {"1": {}}, {"-1": {}}, {"01": {}},
    {"\ud800": "x"}, {"9" * 30: {}}, {"x": {"y": 5}}, json.loads("[" * 90 + "]" * 90),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


def spoilt(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(document)
    *above, last = path
    target = changed
    for key in above:
        target = target[key]
    target[last] = value
    return dict(changed)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type, and its items too."""
    if is_dataclass(hint):
        assert isinstance(hint, type)
        hints = get_type_hints(hint)
        return type(value) is hint and all(
            fits(getattr(value, f.name), hints[f.name]) for f in fields(hint)
        )
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(fits(value, option) for option in inner)
    if origin is tuple and inner[-1] is ...:
        return isinstance(value, tuple) and all(fits(item, inner[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and all(map(fits, value, inner))
    if origin is Mapping:
        assert isinstance(value, (dict, NoneType))
        return value is not None and all(
            fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items()
        )
    return hint is Any or type(value) is hint


@pytest.mark.parametrize(
    ("kind", "document"), [(Description, DESCRIPTION), (MergeSummary, SUMMARY)]
)
def test_what_is_parsed_has_its_types_or_is_refused_by_key(kind: Any, document: Any) -> None:
    assert fits(kind.parse(document, "file"), kind)
    refused = 0
    for path in places(document):
        for value in ODD:
            content = spoilt(document, path, value)
            try:
                parsed = kind.parse(content, "file")
            except CheckpointError as error:
                refused += 1
                line = str(error)
                assert line.startswith("file: ") and len(line) < 300 and line.isprintable()
                assert str(path[0]) in line, (path, line)
            else:
                assert fits(parsed, kind), (path, value)
    assert refused > 300


def test_a_sound_file_is_what_it_says() -> None:
    found = Description.parse(DESCRIPTION, "file")
    assert (found.base_name, dict(found.base_sizes)["vocab_size"]) == ("m", 32)
    assert found.layers is not None and found.layers[1].fidelity == 0.5
    summary = MergeSummary.parse(SUMMARY, "file")
    assert summary.layers[1].chain == ("x",) and summary.layers[2].source == "b"
    assert summary.inputs == (("a", (1,)), ("b", None))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), None])
def test_a_fidelity_that_is_no_number_is_unknown(number: float | None) -> None:
    content = spoilt(DESCRIPTION, ("layers", "1", "fidelity"), number)
    found = Description.parse(content, "file").layers
    assert found is not None and found[1].fidelity is None


@pytest.mark.parametrize("version", [0, 2, True, "1", None])
def test_another_version_is_no_damage(version: Any) -> None:
    with pytest.raises(LaterVersionError, match="format_version"):
        Description.parse({**DESCRIPTION, "format_version": version}, "file")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("npt_config.json", '{"format_version": 1, "layers": 5}', "layers must be a mapping"),
        ("npt_config.json", '{"format_version": 1, "layers": {"1": {"residual": "x"}}}', "not 'x'"),
        (
            "npt_config.json",
            '{"format_version": 1, "layers": {"1": {"fidelity": 1%s}}}' % ("0" * 400),
            "the number 1000",
        ),
        ("merge_summary.json", '{"inputs": [{"path": "a", "layers": 5}]}', "layers must"),
        ("merge_summary.json", '{"options": {"copy_multi_layer_state": 5}}', "copy_multi"),
        ("merge_summary.json", '{"tensors": {"x.pt": {"x": "\\ud800"}}}', "tensors must"),
        ("merge_summary.json", '{"files": [], "merged_layers": "12"}', "must be a"),
    ],
)  # fmt: skip
def test_every_verb_says_it_in_one_line(tmp_path: Path, name: str, content: str, told: str) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1))
    (path / name).write_text(content)
    lines = npt.verify(path).problems
    if name == "npt_config.json":
        for verb in (npt.inspect, lambda path: npt.merge([path], tmp_path / "out")):
            with pytest.raises(CheckpointError) as caught:
                verb(path)
            lines.append(str(caught.value))
    else:
        lines += npt.inspect(path).problems
        lines += npt.merge([path], tmp_path / "out").warnings[:1]
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(f"{path / name}: ") and told in line
