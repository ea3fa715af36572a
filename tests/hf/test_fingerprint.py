"""Base models of equal sizes are told apart, and what leaves a base as it is changes nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.checkpoint.checkpoint import open_checkpoint
from npt_fast.errors import NPTWarning
from npt_fast.hf.fingerprint import fingerprint
from tests.hf.test_convert import converted, tiny


def other(seed: int = 5) -> Any:
    model = tiny()
    torch.manual_seed(seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    return model


def with_norms(value: float) -> Any:
    model = tiny()
    with torch.no_grad():
        model.model.layers[3].input_layernorm.weight[7] = value
    return model


def resized(tokens: int) -> Any:
    model = tiny()
    model.resize_token_embeddings(tokens)
    return model


SAME: dict[str, Callable[[], Any]] = {
    "converted": converted,
    "converted and taken back": lambda: npt.unload(converted()),
    "bfloat16": lambda: tiny().bfloat16(),
    "float64": lambda: tiny().double(),
    "bfloat16 and back": lambda: tiny().bfloat16().float(),
    "one token more": lambda: resized(129),
    "64 tokens more": lambda: resized(192),
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME.keys())
def test_the_same_base(make: Callable[[], Any]) -> None:
    found = fingerprint(make())
    assert found is not None and found == fingerprint(tiny())


@pytest.mark.parametrize("make", [other, lambda: with_norms(1.01), lambda: with_norms(0.0)])
def test_another_base(make: Callable[[], Any]) -> None:
    found = fingerprint(make())
    assert found is not None and found != fingerprint(tiny())


@pytest.mark.parametrize("make", [lambda: tiny().half(), lambda: tiny().to("meta")])
def test_nothing_is_known(make: Callable[[], Any]) -> None:
    assert fingerprint(make()) is None


def notes(function: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NPTWarning)
        function()
    return [str(each.message) for each in caught if isinstance(each.message, NPTWarning)]


def test_a_checkpoint_of_another_base_is_loaded_with_a_note(tmp_path: Path) -> None:
    model = tiny()
    model.config._name_or_path = "meta/base"
    npt.convert(model, npt.NPTConfig(layers=[1, 2], rank=4))
    npt.save(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "out", tmp_path / "model"):
        assert open_checkpoint(path).fingerprint == fingerprint(tiny())
        assert notes(lambda path=path: npt.load(tiny(), path)) == []  # type: ignore[misc]
        assert notes(lambda path=path: npt.load(tiny().half(), path)) == []  # type: ignore[misc]
        assert notes(lambda path=path: npt.load(other(), path)) == [  # type: ignore[misc]
            f"{path} belongs to another base model of the same sizes (meta/base): "
            "its weights are not this model's"
        ]


def test_what_is_known_stays_known(tmp_path: Path) -> None:
    """A model that was moved away cannot tell, but its config does."""
    model = converted()
    found = fingerprint(model)
    model.half()
    npt.save(model, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").fingerprint == found


def test_a_merge_keeps_it_and_refuses_two(tmp_path: Path) -> None:
    npt.save(converted(layers=(1,)), tmp_path / "a")
    npt.save(converted(layers=(2,)), tmp_path / "b")
    npt.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").fingerprint == fingerprint(tiny())
    npt.save(npt.convert(other(), npt.NPTConfig(layers=[3])), tmp_path / "c")
    inputs = [tmp_path / "a", tmp_path / "c"]
    with pytest.raises(npt.MergeError, match=r"fingerprint is .*--allow_different_base"):
        npt.merge(inputs, tmp_path / "again")
    options = npt.MergeOptions(allow_different_base=True)
    npt.merge(inputs, tmp_path / "again", options=options)
    assert open_checkpoint(tmp_path / "again").fingerprint == fingerprint(tiny())


def test_a_file_without_it_works(tmp_path: Path) -> None:
    model = converted()
    model.half()
    del model.config.npt["base_model"]["fingerprint"]
    npt.save(model, tmp_path / "out")
    assert "fingerprint" not in (tmp_path / "out" / "npt_config.json").read_text()
    assert notes(lambda: npt.load(copy.deepcopy(other()), tmp_path / "out")) == []
