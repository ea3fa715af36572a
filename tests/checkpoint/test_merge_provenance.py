"""What a merge records of itself, and records that are malformed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import npt_fast as npt
from npt_fast.checkpoint.digests import read_digests
from tests.checkpoint.merging import json_of, one_layer
from tests.checkpoints import layer_weights, raw, trained_checkpoint, write_checkpoint


def test_provenance_through_three_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for layer in (1, 2, 3, 4):
        trained_checkpoint(Path(f"c{layer}"), layer, steps=layer)
    npt.merge(["c1", "c2"], "v1", verify=True)
    npt.merge(["v1", "c3"], "v2", verify=True)
    npt.merge(["v2", "c4"], "v3", verify=True)
    facts = json_of(tmp_path / "v3" / "merge_summary.json")["layers"]
    assert {n: (f["step"], f["source"], f["chain"]) for n, f in facts.items()} == {
        "1": (1, "v2", ["v1", "c1"]),
        "2": (2, "v2", ["v1", "c2"]),
        "3": (3, "v2", ["c3"]),
        "4": (4, "c4", []),
    }
    digests = [
        json_of(tmp_path / name / "merge_summary.json")["layers"]["1"]["digest"]
        for name in ("v1", "v2", "v3")
    ]
    assert len(set(digests)) == 1 and isinstance(digests[0], str)


def test_digests_travel_through_a_merge_without_verify(tmp_path: Path) -> None:
    paths = [one_layer(tmp_path / str(n), n) for n in (1, 2)]
    npt.merge([paths[0]], tmp_path / "v1", verify=True)
    npt.merge([tmp_path / "v1", paths[1]], tmp_path / "v2")
    first = json_of(tmp_path / "v1" / "merge_summary.json")
    second = json_of(tmp_path / "v2" / "merge_summary.json")
    assert list(read_digests(tmp_path / "v2")) == list(read_digests(tmp_path / "v1"))
    assert second["layers"]["1"]["digest"] == first["layers"]["1"]["digest"]
    assert second["layers"]["2"]["digest"] is None


def test_digests_are_sha256_of_the_bytes(tmp_path: Path) -> None:
    import hashlib

    weights = layer_weights(1, dtype=torch.bfloat16)
    npt.merge([write_checkpoint(tmp_path / "a", weights)], tmp_path / "out", verify=True)
    assert list(read_digests(tmp_path / "out")) == [
        (
            "npt_weights.pt",
            name,
            f"BF16{list(tensor.shape)} {hashlib.sha256(raw(tensor)).hexdigest()}",
        )
        for name, tensor in weights.items()
    ]


def test_npt_config_describes_every_layer(tmp_path: Path) -> None:
    kept = one_layer(tmp_path / "a", 1, modulation="dual", rank=3)
    recorded = {
        "format_version": 1,
        "base_model": {"name": "test/model", "num_hidden_layers": 30, "vocab_size": 99},
        "layers": {"1": {"residual": "kept", "step": 70, "fidelity": 0.5}},
    }
    (kept / "npt_config.json").write_text(json.dumps(recorded))
    triple = trained_checkpoint(tmp_path / "b", 2, steps=4, num_ranks=2)
    unknown = one_layer(tmp_path / "c", 3, modulation="single")
    report = npt.merge([kept, triple, unknown], tmp_path / "out")
    assert json_of(tmp_path / "out" / "npt_config.json") == {
        "format_version": 1,
        "base_model": {
            "name": "test/model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 30,
            "vocab_size": 99,
        },
        "layers": {
            str(layer): dict(
                zip(
                    ("modulation", "num_ranks", "rank", "residual", "step", "source", "fidelity"),
                    values,
                    strict=True,
                )
            )
            for layer, values in {
                1: ("dual", 1, 3, "kept", 70, str(kept), 0.5),
                2: ("triple", 2, 4, "removed", 4, str(triple), None),
                3: ("single", 1, 4, None, None, str(unknown), None),
            }.items()
        },
    }
    (warning,) = [line for line in report.warnings if "residual" in line]
    assert "Layer 3" in warning


def test_a_merge_keeps_the_certificates_of_its_layers(tmp_path: Path) -> None:
    """They say which layers were on: a merge as a whole has been measured by nobody."""
    certificate = {
        "layers": [1, 7], "step": 70, "data": "python-docs", "tokens": 9, "kl": 0.25,
        "perplexity_ratio": 1.5, "texts": {"news": {"tokens": 8, "kl": None,
        "perplexity_ratio": 2.0}}, "worst": {"kl": None, "perplexity_ratio": 2.0},
    }  # fmt: skip
    measured, other = one_layer(tmp_path / "a", 1), one_layer(tmp_path / "b", 2)
    recorded = {"format_version": 1, "layers": {"1": {"certificate": certificate}}}
    (measured / "npt_config.json").write_text(json.dumps(recorded))
    npt.merge([measured, other], tmp_path / "out")
    layers = json_of(tmp_path / "out" / "npt_config.json")["layers"]
    assert layers["1"]["certificate"] == certificate
    assert "certificate" not in layers["2"]
    report = npt.inspect(tmp_path / "out").to_dict()
    assert [layer["certificate"] for layer in report["layers"]] == [certificate, None]


def test_bare_safetensors_carry_their_description(tmp_path: Path) -> None:
    """A weights file that was moved out of its folder still has its description."""
    path = trained_checkpoint(tmp_path / "a", 2, steps=4)
    npt.merge([path], tmp_path / "out", options=npt.MergeOptions(format="safetensors"))
    alone = tmp_path / "alone.safetensors"
    shutil.copy(tmp_path / "out" / "npt_weights.safetensors", alone)
    report = npt.inspect(alone)
    assert report.model_name == "test/model"
    assert (report.layers[0].step, report.layers[0].residual) == (4, "removed")


MALFORMED: dict[str, Any] = {
    "layers-of-text": {"format_version": 1, "layers": {"1": "dual"}},
    "layers-of-lists": {"format_version": 1, "layers": {"1": [1]}},
    "layers-a-list": {"format_version": 1, "layers": [1]},
    "base-of-text": {"format_version": 1, "base_model": "x"},
    "odd-facts": {"format_version": 1, "layers": {"1": {"step": "7", "residual": 3}}},
}


@pytest.mark.parametrize("file", ["npt_config.json", "merge_summary.json"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_records_are_unknown_facts_or_refused(
    tmp_path: Path, file: str, case: str
) -> None:
    path = one_layer(tmp_path / "a", 1)
    (path / file).write_text(json.dumps(MALFORMED[case]))
    try:
        npt.merge([path], tmp_path / "out")
    except npt.NPTError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("version", [2, "1", None, True])
def test_formats_of_the_future_are_refused(tmp_path: Path, version: object) -> None:
    path = one_layer(tmp_path / "a", 1)
    (path / "npt_config.json").write_text(json.dumps({"format_version": version}))
    with pytest.raises(npt.CheckpointError, match="update npt_fast"):
        npt.merge([path], tmp_path / "out")
