"""Files of modulations with wrong headers or tensors."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import npt_fast as npt
from tests.transfer.models import (
    nested,
    random_modulation,
    tensors_of,
)


def refuse(path: Path, message: str) -> None:
    with pytest.raises(npt.CheckpointError, match=message) as caught:
        npt.load_modulation(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_other_safetensors(tmp_path: Path) -> None:
    save_file({"layer.1.up.v_a": torch.zeros(1, 32)}, tmp_path / "m")
    refuse(tmp_path / "m", "is not a modulation: its header has no npt_modulation")


def description() -> dict[str, Any]:
    return {
        "version": 1,
        "base": asdict(random_modulation().base),
        "origin": {},
        "vectors": False,
        "layers": {"1": ["gate", "down"]},
    }


def tensors() -> dict[str, Tensor]:
    m = random_modulation(layers=(1,), projections=("gate", "down"))
    return {f"layer.1.{p}.v_{'ab'[i]}": v for (_, p, i), v in tensors_of(m).items()}


def written(path: Path, text: str, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path, {"npt_modulation": text})
    return path


def test_the_cases_below_are_fine_but_for_one_thing(tmp_path: Path) -> None:
    m = npt.load_modulation(written(tmp_path / "m", json.dumps(description()), tensors()))
    assert [(layer, p) for layer, p, _ in m.walk()] == [(1, "gate"), (1, "down")]


TENSORS: dict[str, dict[str, Tensor | None]] = {
    "missing": {"layer.1.down.v_b": None},
    "a projection too many": {
        "layer.1.up.v_a": torch.zeros(2, 32),
        "layer.1.up.v_b": torch.zeros(2, 48),
    },
    "a layer too many": {"layer.2.gate.v_a": torch.zeros(2, 32)},
    "another name": {"layer.1.gate.v_c": torch.zeros(2, 32)},
    "too narrow": {"layer.1.gate.v_a": torch.zeros(2, 31)},
    "sides swapped": {
        "layer.1.down.v_a": torch.zeros(2, 32),
        "layer.1.down.v_b": torch.zeros(2, 48),
    },
    "other number of terms": {"layer.1.gate.v_b": torch.zeros(3, 48)},
    "flat": {"layer.1.gate.v_a": torch.zeros(64)},
    "no dimension": {"layer.1.gate.v_a": torch.tensor(0.0)},
    "three dimensions": {"layer.1.gate.v_a": torch.zeros(2, 32, 1)},
    "no terms": {"layer.1.gate.v_a": torch.zeros(0, 32), "layer.1.gate.v_b": torch.zeros(0, 48)},
    "one of less precision": {"layer.1.gate.v_a": torch.zeros(2, 32)},
    **{
        f"of {dtype}": {
            f"layer.1.gate.v_{letter}": torch.zeros(2, width).to(dtype)
            for letter, width in (("a", 32), ("b", 48))
        }
        for dtype in (torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn)
    },
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_not_those_of_the_description(what: str, tmp_path: Path) -> None:
    changed = {**tensors(), **TENSORS[what]}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    path = written(tmp_path / "m", json.dumps(description()), kept)
    refuse(path, "its header is wrong: ")


def test_the_tensor_is_named(tmp_path: Path) -> None:
    changed = {**tensors(), "layer.1.gate.v_a": torch.zeros(2, 31).double()}
    path = written(tmp_path / "m", json.dumps(description()), changed)
    refuse(path, r"'layer.1.gate.v_a' is \[2, 31\], \[2, 32\] expected$")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_terms_that_are_not_finite(value: float, tmp_path: Path) -> None:
    changed = tensors()
    changed["layer.1.gate.v_b"][1, 3] = value
    m = npt.load_modulation(written(tmp_path / "m", json.dumps(description()), changed))
    with pytest.raises(npt.CheckpointError, match=r"m: layer\.1\.gate\.v_b holds NaN or infinity"):
        m.magnitude(1)


BASE = asdict(random_modulation().base)
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "no base": {"base": None},
    "base of other names": {"base": {"width": 3}},
    "base with more": {"base": {**BASE, "extra": 1}},
    "size zero": {"base": {**BASE, "hidden_size": 0}},
    "size negative": {"base": {**BASE, "hidden_size": -32}},
    "size a truth": {"base": {**BASE, "num_hidden_layers": True}},
    "size a text": {"base": {**BASE, "hidden_size": "32"}},
    "size a fraction": {"base": {**BASE, "hidden_size": 32.0}},
    "layer outside": {"layers": {"4": ["gate", "down"]}},
    "size of 400 digits": {"base": {**BASE, "hidden_size": 10**400}},
    "name no text": {"base": {**BASE, "name": 5}},
    "layer of 5,000 digits": {"layers": {"9" * 5000: ["gate", "down"]}},
    "layer in another script": {"layers": {"\u0661": ["gate", "down"]}},
    "layer with a zero before it": {"layers": {"01": ["gate", "down"]}},
    "layer negative": {"layers": {"-1": ["gate", "down"]}},
    "layer no number": {"layers": {"one": ["gate", "down"]}},
    "layer fails to name projections": {"layers": {"1": []}},
    "layers a list": {"layers": [1]},
    "no layers": {"layers": {}},
    "layers nothing": {"layers": None},
    "projection unknown": {"layers": {"1": ["gate", "../../etc"]}},
    "projection no text": {"layers": {"1": [7, "down"]}},
    "projection twice": {"layers": {"1": ["gate", "gate", "down"]}},
    "projections no list": {"layers": {"1": 7}},
    "origin no object": {"origin": 7},
    "origin nothing": {"origin": None},
    "origin 65 deep": {"origin": nested(65)},
    "origin with a number of 400 digits": {"origin": {"factor": 10**400, "of": {}}},
    "vectors a number": {"vectors": 1},
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_descriptions_that_do_not_hold(what: str, tmp_path: Path) -> None:
    text = json.dumps({**description(), **DESCRIPTIONS[what]})
    refuse(written(tmp_path / "m", text, tensors()), "its header is wrong|number")


@pytest.mark.parametrize("name", ["base", "origin", "vectors", "layers"])
def test_a_description_that_lacks_something(name: str, tmp_path: Path) -> None:
    text = json.dumps({key: value for key, value in description().items() if key != name})
    refuse(written(tmp_path / "m", text, tensors()), f"its header is wrong: {name} is missing")


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], True, 1.0])
def test_versions(version: Any, tmp_path: Path) -> None:
    text = json.dumps({**description(), "version": version})
    refuse(written(tmp_path / "m", text, tensors()), "has version .*; this program reads version 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"version": 1, "version": 1}', "occurs twice"),
        ('{"version": NaN}', "not allowed here"),
        ('{"version": 1, "origin": ' + '{"of": ' * 100_000 + "1" + "}" * 100_001, "not valid JSON"),
        ('{"version": 1, "origin": [' + "[]," * 500_000 + "[]]}", "too many"),
    ],
    ids=["empty", "open", "a list", "twice", "NaN", "deep", "wide"],
)
def test_hostile_json(text: str, message: str, tmp_path: Path) -> None:
    refuse(written(tmp_path / "m", text, tensors()), message)


def test_an_origin_that_says_anything_still_loads(tmp_path: Path) -> None:
    """An origin is only shown; control characters do not reach the terminal."""
    origin = {"sum": [{"factor": "\x1b[2J"}]}
    text = json.dumps({**description(), "origin": origin})
    m = npt.load_modulation(written(tmp_path / "m", text, tensors()))
    assert m.description == "unknown" and m.origin == origin
    for control in ("\x1b[2J", "\x9b2J", "\x7f"):
        text = json.dumps({**description(), "origin": {"text": control}})
        shown = npt.load_modulation(written(tmp_path / "n", text, tensors())).description
        assert shown.isprintable()
