"""``npt_config.json``: what is read has its types, and what is written stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from npt_fast.checkpoint import strict_json
from npt_fast.checkpoint.npt_config import Description, LaterVersionError
from npt_fast.errors import CheckpointError
from tests.checkpoints import layer_weights, write_checkpoint
from tests.spoilt import check_types, spoilt

CHECKPOINTS = Path(__file__).parent.parent / "data" / "formats" / "checkpoint"
DESCRIPTION = {
    "format_version": 1,
    "base_model": {
        "name": "m", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4,
        "vocab_size": 32,
    },
    "layers": {
        "1": {
            "modulation": "dual", "num_ranks": 1, "rank": 4, "residual": "kept", "step": 5,
            "source": "a", "fidelity": 0.5,
            "certificate": {
                "layers": [1, 2], "step": 5, "data": "b", "tokens": 9, "kl": 0.25,
                "perplexity_ratio": 1.5, "worst": {"kl": 0.5, "perplexity_ratio": 2.0},
                "texts": {"news": {"tokens": 8, "kl": 0.5, "perplexity_ratio": 2.0}},
            },
        },
    },
}  # fmt: skip


def test_what_is_parsed_has_its_types_or_is_refused_by_key() -> None:
    check_types(Description, DESCRIPTION)


@pytest.mark.parametrize("name", ["joined", "trained"])
def test_a_file_that_is_read_and_written_again_is_the_same_to_the_byte(name: str) -> None:
    path = CHECKPOINTS / name / "npt_config.json"
    read = Description.parse(strict_json.read_foreign(path), str(path))
    assert strict_json.dump(read.to_dict()) == path.read_bytes()


def test_a_sound_file_is_what_it_says() -> None:
    found = Description.parse(DESCRIPTION, "file")
    assert (found.base_name, found.base_sizes["vocab_size"]) == ("m", 32)
    assert found.layers is not None and found.layers[1].fidelity == 0.5


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
    ("content", "told"),
    [
        ({"layers": 5}, "layers must be a mapping"),
        ({"layers": {"1": {"residual": "x"}}}, "not 'x'"),
        ({"layers": {"1": {"source": 5}}}, "source must be a path"),
        ({"layers": {"1": {"fidelity": 10**400}}}, "the number 1000"),
    ],
)
def test_every_verb_says_it_in_one_line(tmp_path: Path, content: dict[str, Any], told: str) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1))
    (path / "npt_config.json").write_text(json.dumps({"format_version": 1, **content}))
    lines = npt.verify(path).problems
    for verb in (npt.inspect, lambda path: npt.merge([path], tmp_path / "out")):
        with pytest.raises(CheckpointError) as caught:
            verb(path)
        lines.append(str(caught.value))
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(f"{path / 'npt_config.json'}: ") and told in line
