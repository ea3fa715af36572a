"""Damage of a checkpoint is found, wherever it is and wherever the checkpoint was moved."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import npt_fast as npt
from tests.checkpoint.merging import forget_sources, merged
from tests.checkpoints import (
    flip_byte,
    layer_weights,
    offset_of,
    read_weights,
    trained_checkpoint,
    write_checkpoint,
)


def test_an_intact_output_passes(output: Path) -> None:
    report = npt.verify(output)
    assert report.passed
    assert report.problems == [] and report.notes == []
    assert report.expected_layers == report.found_layers == [1, 2]
    assert report.checkpoint_keys == 27
    # 27 weights; step and two moments of each
    assert report.tensors == report.compared == report.digests_matched == 27 * 4


def test_a_copy_without_sources_passes(output: Path, tmp_path: Path) -> None:
    copy = forget_sources(tmp_path)
    report = npt.verify(copy)
    assert report.passed
    assert report.compared == 0
    assert report.digests_matched == 27 * 4
    (note,) = report.notes
    assert "not compared with its sources" in note


def test_merge_verify_equals_verify(tmp_path: Path) -> None:
    paths = [trained_checkpoint(tmp_path / str(n), n) for n in (1, 2)]
    report = npt.merge(paths, tmp_path / "out", verify=True)
    again = npt.verify(tmp_path / "out")
    assert report.verification is not None
    assert report.verification.path == str(tmp_path / "out")
    assert report.verification.tensors == again.tensors == again.digests_matched
    assert report.verification.crcs_matched == again.crcs_matched > 0


def files_of(output: Path) -> list[Path]:
    return sorted(path for path in output.iterdir() if path.name != "merge_summary.json")


@pytest.mark.parametrize("with_sources", [True, False], ids=["sources", "copy"])
def test_a_flipped_byte_in_the_data_of_any_file(
    output: Path, tmp_path: Path, with_sources: bool
) -> None:
    path = output if with_sources else forget_sources(tmp_path)
    weights = read_weights(path)
    for file in files_of(path):
        before = file.read_bytes()
        if file.suffix == ".json" or file.name == "multi_layer_state.pt":
            places = [len(before) // 2, 3 * len(before) // 4]
        elif file.name == "training_state.pt":
            state = torch.load(file, weights_only=True)
            slots = state["optimizer_state_dict"]["state"]
            places = [offset_of(file, slots[n]["exp_avg_sq"]) + 5 for n in (0, 13, 26)]
            places.append(before.index(b"global_step") + 14)
        else:
            mine = [
                tensor for tensor in weights.values() if before.find(tensor.numpy().tobytes()) >= 0
            ]
            places = [offset_of(file, tensor) + 7 for tensor in mine[::3]]
        for place in places:
            flip_byte(file, place)
            report = npt.verify(path)
            assert not report.passed, f"{file.name}: byte {place}"
            named = [p for p in report.problems if file.name in p or "the index says" in p]
            assert named, report.problems
            file.write_bytes(before)
    assert npt.verify(path).passed


@pytest.mark.parametrize("name", ["npt_weights.pt", "training_state.pt"])
def test_a_flipped_byte_anywhere_in_a_pt(tmp_path: Path, name: str) -> None:
    """The change is found, or has no effect: torch then reads the same values."""
    path = merged(tmp_path) / name
    before = path.read_bytes()
    truth = repr(torch.load(path, weights_only=True))
    silent = 0
    places = range(17, len(before), len(before) // 45)
    for place in places:
        flip_byte(path, place)
        if npt.verify(path.parent).passed:
            silent += 1
            assert repr(torch.load(path, weights_only=True)) == truth
        path.write_bytes(before)
    assert silent < len(places)


def test_a_flipped_bit_names_the_tensor_and_the_source(tmp_path: Path) -> None:
    path = merged(tmp_path)
    name = "layer_2_np.W_a_up_up.1"
    flip_byte(path / "npt_weights.pt", offset_of(path / "npt_weights.pt", read_weights(path)[name]))
    report = npt.verify(path)
    lines = "\n".join(report.problems)
    assert all(name in problem for problem in report.problems)
    assert "differs from" in lines and str(tmp_path / "in2") in lines
    assert "CRC-32" in lines and "recorded digest" in lines
    assert npt.verify(path).to_dict()["passed"] is False


@pytest.mark.parametrize("file", ["npt_weights.pt", "training_state.pt"])
def test_a_damaged_source_is_found_though_torch_takes_it(tmp_path: Path, file: str) -> None:
    path = trained_checkpoint(tmp_path / "a", 1)
    if file == "npt_weights.pt":
        tensor = read_weights(path)["layer_1_np.W_b_up_down"]
    else:
        state = torch.load(path / file, weights_only=True)
        tensor = state["optimizer_state_dict"]["state"][4]["exp_avg"]
    flip_byte(path / file, offset_of(path / file, tensor) + 9)
    torch.load(path / file, weights_only=True)  # does not mind
    with pytest.raises(npt.VerificationError) as caught:
        npt.merge([path], tmp_path / "out", verify=True)
    assert any(str(path / file) in line and "CRC-32" in line for line in caught.value.problems)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["transposed", "shared", "cast"])
def test_damage_is_found_under_any_change(tmp_path: Path, case: str) -> None:
    """The tensor uses its record in another order, in part, or with another type."""
    weights = layer_weights(1)
    name = "layer_1_np.W_a_up_up"
    stored = weights[name].clone()
    if case == "transposed":
        weights[name] = stored.T.contiguous().T
    elif case == "shared":
        whole = torch.cat([torch.full((3, 16), 1.5), stored])
        weights[name] = whole[3:]
    path = write_checkpoint(tmp_path / "a", weights)
    data = (path / "npt_weights.pt").read_bytes()
    row = (stored.T if case == "transposed" else stored).contiguous()[0].numpy().tobytes()
    flip_byte(path / "npt_weights.pt", data.index(row) + 1)
    options = npt.MergeOptions(dtype="float64" if case == "cast" else None)
    with pytest.raises(npt.VerificationError) as caught:
        npt.merge([path], tmp_path / "out", verify=True, options=options)
    assert any("CRC-32" in problem for problem in caught.value.problems)


def test_files_without_crcs_pass(tmp_path: Path) -> None:
    """After ``torch.serialization.set_crc32_options(False)`` there are no sums to compare with."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = write_checkpoint(tmp_path / "a", layer_weights(1))
    finally:
        torch.serialization.set_crc32_options(before)
    report = npt.merge([path], tmp_path / "out", verify=True)
    assert report.verification is not None and report.verification.passed
    assert npt.verify(tmp_path / "out").passed


@pytest.mark.parametrize("verified", [True, False], ids=["verified", "plain"])
def test_the_curriculum_is_read_and_not_only_hashed(tmp_path: Path, verified: bool) -> None:
    path = tmp_path / "a"
    if verified:
        npt.merge([trained_checkpoint(tmp_path / "b", 1)], path, verify=True)
    else:
        trained_checkpoint(path, 1)
    file = path / "multi_layer_state.pt"
    for content, told in (
        ({"layers_to_train": 5}, "its layers_to_train are not a list"),
        ({"layers_to_train": [1], "x": torch.zeros(1)}, "is a tensor, plain data expected"),
        ({"layers_to_train": [1], "x": {1, 2}}, "refers to"),
    ):
        torch.save(content, file)
        problems = npt.verify(path).problems
        assert any(line.startswith(f"{file}: ") and told in line for line in problems), problems
    file.write_bytes(b"\x80\x04cos\nsystem\n(Vtouch pwned\ntR.")
    assert any("a plain pickle, which can run code" in p for p in npt.verify(path).problems)


@pytest.mark.parametrize("name", ["config.json", "multi_layer_state.pt", "README.md"])
@pytest.mark.parametrize("target", ["gone", "itself"])
def test_a_link_that_leads_nowhere_fails(tmp_path: Path, name: str, target: str) -> None:
    npt.merge([trained_checkpoint(tmp_path / "a", 1)], tmp_path / "out", verify=True)
    path = tmp_path / "out" / name
    path.unlink(missing_ok=True)
    path.symlink_to(name if target == "itself" else target)
    assert f"{path}: is a broken link" in npt.verify(tmp_path / "out").problems


def test_a_changed_step_is_found(tmp_path: Path) -> None:
    """Scalars of the training state are verified too."""
    path = merged(tmp_path)
    state = torch.load(path / "training_state.pt", weights_only=True)
    torch.save({**state, "global_step": 10_000}, path / "training_state.pt")
    assert not npt.verify(path).passed


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    weights = layer_weights(1)
    weights["layer_1_np.W_down_up"][:2, 0] = torch.inf
    path = write_checkpoint(tmp_path / "a", weights)
    (problem,) = npt.verify(path).problems
    assert "layer_1_np.W_down_up: 2 values are NaN or infinite" in problem


def test_a_description_that_contradicts_the_tensors(tmp_path: Path) -> None:
    path = merged(tmp_path, verify=False)
    facts = json.loads((path / "npt_config.json").read_text())
    facts["layers"]["1"]["rank"] = 99
    (path / "npt_config.json").write_text(json.dumps(facts))
    assert any("layer 1: rank is not 4" in problem for problem in npt.verify(path).problems)


def test_damage_on_the_way_of_a_merge_of_merges(tmp_path: Path) -> None:
    """Digests of the first merge are checked in the third, though safetensors has no CRCs."""
    path = merged(tmp_path, format="safetensors")
    file = path / "npt_weights.safetensors"
    flip_byte(file, file.stat().st_size - 3)
    with pytest.raises(npt.VerificationError) as caught:
        npt.merge([path], tmp_path / "again", verify=True)
    assert any("recorded digest" in problem for problem in caught.value.problems)


@pytest.mark.parametrize("verb", ["concat", "mean", "uniform", "dtype"])
def test_recomputed_tensors_are_compared_with_their_recomputation(
    tmp_path: Path, verb: str
) -> None:
    options: dict[str, Any] = {"uniform": True} if verb == "uniform" else {"dtype": "float16"}
    if verb in ("concat", "mean"):
        options = {"on_conflict": verb}
    paths = [trained_checkpoint(tmp_path / str(n), 1, seed=n, rank=n) for n in (2, 3)]
    paths.append(trained_checkpoint(tmp_path / "9", 9, num_ranks=2))
    npt.merge(paths, tmp_path / "out", verify=True, options=npt.MergeOptions(**options))
    assert npt.verify(tmp_path / "out").passed
    name = list(read_weights(tmp_path / "out"))[-1]
    file = tmp_path / "out" / "npt_weights.pt"
    flip_byte(file, offset_of(file, read_weights(tmp_path / "out")[name]) + 1)
    report = npt.verify(tmp_path / "out")
    assert any("differs from" in problem and name in problem for problem in report.problems)


def test_outputs_are_what_other_readers_expect(tmp_path: Path) -> None:
    path = merged(tmp_path)
    for file in path.glob("*.pt"):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
        torch.load(file, weights_only=True)


def test_a_bare_safetensors_file(tmp_path: Path) -> None:
    save_file(layer_weights(1), tmp_path / "alone.safetensors")
    report = npt.verify(tmp_path / "alone.safetensors")
    assert report.passed and report.tensors == 9
