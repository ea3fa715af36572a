"""Descriptions of checkpoints from their headers are right, layer by layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import npt_fast as npt
from tests.checkpoints import (
    PROJECTIONS,
    adamw_state,
    layer_weights,
    multi_layer_state,
    trained_checkpoint,
    write_checkpoint,
)


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("modulation", PROJECTIONS)
@pytest.mark.parametrize("num_ranks", [1, 3, 17])
def test_k_r_and_type(tmp_path: Path, modulation: str, num_ranks: int) -> None:
    """The original reports one rank for every dual and triple checkpoint."""
    weights = layer_weights(11, modulation=modulation, num_ranks=num_ranks, rank=5)
    report = npt.inspect(write_checkpoint(tmp_path / "a", weights))
    assert (report.modulation, report.num_ranks, report.rank) == (modulation, num_ranks, 5)
    (info,) = report.layers
    found = info.architecture
    assert (found.modulation, found.num_ranks, found.rank) == (modulation, num_ranks, 5)
    # design.md#definition: c k r (2 D + F)
    projections = len(PROJECTIONS[modulation])
    assert info.parameters == projections * num_ranks * 5 * (2 * 16 + 24)
    assert info.tensors == report.total_keys == 3 * projections * num_ranks
    assert info.nbytes == 4 * info.parameters
    assert (report.hidden_size, report.intermediate_size) == (16, 24)


def test_layers_that_differ(tmp_path: Path) -> None:
    weights = {
        **layer_weights(2, modulation="single", rank=3),
        **layer_weights(9, modulation="triple", num_ranks=2, dtype=torch.bfloat16),
    }
    report = npt.inspect(write_checkpoint(tmp_path / "a", weights))
    assert (report.modulation, report.num_ranks, report.rank) == ("mixed", None, None)
    found = [
        (
            i.layer,
            i.architecture.modulation,
            i.architecture.num_ranks,
            i.architecture.rank,
            i.dtypes,
        )
        for i in report.layers
    ]
    assert found == [(2, "single", 1, 3, ["F32"]), (9, "triple", 2, 4, ["BF16"])]


def test_the_older_spelling(tmp_path: Path) -> None:
    """The original finds no layers in such files, and reads the layer's index as num_ranks."""
    weights = layer_weights(11, num_ranks=2, prefix="model.layers.{}.np_component.")
    report = npt.inspect(write_checkpoint(tmp_path / "a", weights))
    assert [(info.layer, info.architecture.num_ranks) for info in report.layers] == [(11, 2)]
    assert report.layers[0].details[0].name == "model.layers.11.np_component.W_down_gate.0"


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_norms_equal_those_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = layer_weights(1, d=300, f=700, rank=9, dtype=dtype)
    report = npt.inspect(write_checkpoint(tmp_path / "a", weights), values=True)
    details = report.layers[0].details
    assert [tensor.name for tensor in details] == list(weights)
    for tensor in details:
        truth = float(weights[tensor.name].double().norm())
        assert tensor.norm == pytest.approx(truth, rel=1e-12)
        assert tensor.non_finite == 0


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8], ids=str
)
def test_nan_counts_of_every_bit_pattern(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = layer_weights(1, d=256, f=24, rank=4, dtype=dtype)
    name = "layer_1_np.W_down_gate"
    width = torch.empty((), dtype=dtype).element_size()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    # all 256 leading bytes, with a low bit that tells NaN from infinity
    leading = (torch.arange(256, dtype=torch.int64) - 128) << (8 * width - 8)
    patterns = leading if width > 1 else torch.arange(256)
    weights[name] = torch.stack([patterns, patterns, patterns + (width > 1), patterns], 1).to(
        integer
    ).view(dtype)  # fmt: skip
    report = npt.inspect(write_checkpoint(tmp_path / "a", weights), values=True)
    (found,) = [tensor for tensor in report.layers[0].details if tensor.name == name]
    assert found.non_finite == int((~weights[name].double().isfinite()).sum())
    assert sum(tensor.non_finite or 0 for tensor in report.layers[0].details) == found.non_finite
    if dtype in FP8:
        assert found.norm is None


@pytest.mark.usefixtures("headers_only")
def test_training_state_facts(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 11, steps=4, numpy_lr=True)
    assert npt.inspect(path).training_state == {
        "global_step": 4,
        "batch_count": 16,
        "optimizer": {
            "num_param_groups": 1,
            "learning_rate": 1e-3 / 5,
            "layers_with_moments": [11],
        },
        "has_scheduler": True,
        "mixed_precision": False,  # the key is there, the value is None
    }


def test_a_scaler_and_no_scheduler(tmp_path: Path) -> None:
    weights = layer_weights(1)
    state = {**adamw_state(weights), "scheduler_state_dict": None, "scaler_state_dict": {"s": 1.0}}
    facts = npt.inspect(write_checkpoint(tmp_path / "a", weights, training_state=state))
    assert facts.training_state is not None
    assert facts.training_state["has_scheduler"] is False
    assert facts.training_state["mixed_precision"] is True


def test_a_state_that_cannot_be_read_is_a_problem_not_an_error(tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "a", layer_weights(1), multi_layer_state=multi_layer_state([1])
    )
    (path / "training_state.pt").write_bytes(b"garbage")
    report = npt.inspect(path)
    assert report.training_state is None
    (problem,) = report.problems
    assert "training_state.pt" in problem
    # what can be read still is
    assert report.multi_layer_state == multi_layer_state([1])


def test_files_config_and_curriculum(tmp_path: Path) -> None:
    config = {"model_name": "m", "batch_size": 4}
    state = multi_layer_state([1])
    path = write_checkpoint(
        tmp_path / "a", layer_weights(1), multi_layer_state=state, config=config
    )
    report = npt.inspect(path)
    assert report.config == config and report.model_name == "m"
    assert report.multi_layer_state == state
    assert report.files == {p.name: p.stat().st_size for p in path.iterdir()}
    assert list(report.files) == sorted(report.files)
    assert report.format == "pt"


def test_a_merge_tells_where_its_layers_come_from(tmp_path: Path) -> None:
    paths = [trained_checkpoint(tmp_path / str(n), n, steps=n) for n in (1, 2)]
    npt.merge(paths, tmp_path / "v1")
    npt.merge([tmp_path / "v1"], tmp_path / "v2")
    report = npt.inspect(tmp_path / "v2")
    found = [(info.step, info.source, info.chain) for info in report.layers]
    assert found == [
        (1, str(tmp_path / "v1"), [str(paths[0])]),
        (2, str(tmp_path / "v1"), [str(paths[1])]),
    ]
    assert report.merge is not None and report.merge["merged_layers"] == [1, 2]


def test_real_checkpoints(layer11: Path) -> None:
    report = npt.inspect(layer11)
    assert (report.modulation, report.num_ranks, report.rank) == ("triple", 4, 32)
    assert (report.hidden_size, report.intermediate_size) == (576, 1536)
    assert report.total_parameters == 3 * 4 * 32 * (2 * 576 + 1536)
    assert report.model_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert report.layers[0].residual == "removed"  # follows from triple modulation


def test_reports_are_json(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 1)
    npt.merge([path], tmp_path / "out", verify=True)
    for values in (False, True):
        plain = npt.inspect(tmp_path / "out", values=values).to_dict()
        again = json.loads(json.dumps(plain, allow_nan=False))
        assert again["layers"] == plain["layers"]
        assert again["training_state"]["global_step"] == 3


def test_reports_of_broken_numbers_are_json_too(tmp_path: Path) -> None:
    """JSON has no NaN, so a report about NaN must not contain one."""
    weights = layer_weights(1)
    weights["layer_1_np.W_down_up"][0, 0] = torch.nan
    weights["layer_1_np.W_a_up_up"][0, 0] = -torch.inf
    path = write_checkpoint(tmp_path / "a", weights)
    report = npt.inspect(path, values=True)
    counts = {tensor.name: tensor.non_finite for tensor in report.layers[0].details}
    assert counts["layer_1_np.W_down_up"] == counts["layer_1_np.W_a_up_up"] == 1
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_infinities_raise_no_warnings_of_numpy(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = layer_weights(1, d=64, dtype=dtype)
    weights["layer_1_np.W_down_up"][::3] = torch.inf
    weights["layer_1_np.W_down_up"][1::3] = torch.nan
    weights["layer_1_np.W_down_up"][2::3] = torch.finfo(dtype).max
    report = npt.inspect(write_checkpoint(tmp_path / "a", weights), values=True)
    (found,) = [t for t in report.layers[0].details if t.name.endswith("W_down_up")]
    assert found.non_finite == 43 * 4


# can these be merged? ---------------------------------------------------------------------------


@pytest.mark.usefixtures("headers_only")
def test_yes(tmp_path: Path) -> None:
    paths = [trained_checkpoint(tmp_path / str(n), n) for n in (3, 1)]
    verdict = npt.can_merge(paths)
    assert (verdict.mergeable, verdict.layers, verdict.remarks) == (True, [1, 3], [])


@pytest.mark.usefixtures("headers_only")
def test_yes_with_a_conflict(tmp_path: Path) -> None:
    paths = [trained_checkpoint(tmp_path / name, 7, seed=n) for n, name in enumerate("ab")]
    verdict = npt.can_merge(paths)
    assert verdict.mergeable and verdict.layers == [7]
    assert any("Layer 7 already exists" in remark for remark in verdict.remarks)


def other_width(root: Path) -> Path:
    save_file(layer_weights(2, d=18), root / "b.safetensors")
    return root / "b.safetensors"


def other_model(root: Path) -> Path:
    return write_checkpoint(root / "b", layer_weights(2), config={"model_name": "other"})


def not_there(root: Path) -> Path:
    return root / "b"


def unsafe_state(root: Path) -> Path:
    path = write_checkpoint(root / "b", layer_weights(2))
    torch.save({"global_step": 1, "config": Path("x")}, path / "training_state.pt")
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (other_width, "hidden_size 18, 16 in"),
        (other_model, "model_name"),
        (not_there, "Checkpoint not found"),
        (unsafe_state, "--weights_only"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_with_the_reason(tmp_path: Path, make: Any, reason: str) -> None:
    first = trained_checkpoint(tmp_path / "a", 1)
    verdict = npt.can_merge([first, make(tmp_path)])
    assert not verdict.mergeable and verdict.layers == []
    (remark,) = verdict.remarks
    assert reason in remark


def test_numbers_of_a_curriculum_are_json(tmp_path: Path) -> None:
    state = multi_layer_state([1], layer_weights={1: math.nan})
    path = write_checkpoint(tmp_path / "a", layer_weights(1), multi_layer_state=state)
    json.dumps(npt.inspect(path).to_dict(), allow_nan=False)
