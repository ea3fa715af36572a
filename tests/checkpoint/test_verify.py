"""Damage of a checkpoint is found, wherever it is and wherever the checkpoint was moved."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import npt_fast as npt
from tests.checkpoints import (
    flip_byte,
    layer_weights,
    offset_of,
    read_weights,
    trained_checkpoint,
    write_checkpoint,
)

FORMS: dict[str, dict[str, Any]] = {
    "pt": {},
    "safetensors": {"format": "safetensors"},
    "shards": {"format": "safetensors", "max_shard_size": 2000},
}


def merged(root: Path, *, verify: bool = True, **options: Any) -> Path:
    paths = [trained_checkpoint(root / f"in{n}", n, steps=n, num_ranks=n) for n in (1, 2)]
    npt.merge(paths, root / "out", verify=verify, options=npt.MergeOptions(**options))
    return root / "out"


def forget_sources(root: Path) -> Path:
    """Move the output and remove its inputs, as if on another machine."""
    shutil.move(root / "out", root / "elsewhere" / "copy")
    for path in root.glob("in*"):
        shutil.rmtree(path)
    return root / "elsewhere" / "copy"


@pytest.fixture(params=FORMS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return merged(tmp_path, **FORMS[request.param])


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


def train_on(checkpoint: Path, layer: int, **architecture: Any) -> None:
    """Replace a checkpoint by one with other weights and another training state."""
    shutil.rmtree(checkpoint)
    trained_checkpoint(checkpoint, layer, steps=9, seed=99, **architecture)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", [{}, {"rank": 5}, {"num_ranks": 3}], ids=str)
def test_a_source_that_was_trained_on_is_a_note(
    tmp_path: Path, form: str, architecture: dict[str, Any]
) -> None:
    path = merged(tmp_path, **FORMS[form])
    train_on(tmp_path / "in1", 1, **architecture)
    report = npt.verify(path)
    assert report.passed, report.problems
    assert report.digests_matched == 27 * 4
    assert any(str(tmp_path / "in1") in note and "changed" in note for note in report.notes) or (
        any("the sources have changed since the merge: " in note for note in report.notes)
    )
    file = next(path.glob("npt_weights*.[ps]*t*"))
    flip_byte(file, file.stat().st_size // 2)
    assert not npt.verify(path).passed


def test_one_changed_tensor_of_a_source_is_counted(tmp_path: Path) -> None:
    path = merged(tmp_path)
    weights = read_weights(tmp_path / "in1")
    weights["layer_1_np.W_down_up"] += 1
    torch.save(weights, tmp_path / "in1" / "npt_weights.pt")
    report = npt.verify(path)
    assert report.passed and report.compared == 27 * 4 - 1
    (note,) = report.notes
    source = tmp_path / "in1" / "npt_weights.pt"
    assert note.startswith(f"{source} has changed since the merge, or is another file (1 tensor")


@pytest.mark.parametrize("damage", ["layer gone", "unreadable", "another base"])
def test_a_source_that_cannot_be_planned_with_is_a_note(tmp_path: Path, damage: str) -> None:
    path = merged(tmp_path)
    if damage == "layer gone":
        train_on(tmp_path / "in1", 7)
    elif damage == "unreadable":
        (tmp_path / "in1" / "npt_weights.pt").write_bytes(b"version https://git-lfs.github.com/")
    else:
        train_on(tmp_path / "in1", 1, d=32)
    report = npt.verify(path)
    assert report.passed and report.digests_matched == 27 * 4
    assert report.notes[0].startswith("not compared with its sources: ")


def test_crcs_prove_a_pt_whose_source_was_trained_on(tmp_path: Path) -> None:
    path = merged(tmp_path, verify=False)
    train_on(tmp_path / "in1", 1)
    assert npt.verify(path).passed
    name = "layer_1_np.W_a_up_up"
    flip_byte(path / "npt_weights.pt", offset_of(path / "npt_weights.pt", read_weights(path)[name]))
    report = npt.verify(path)
    assert any(f"npt_weights.pt: {name}: damaged" in line for line in report.problems)


def test_without_any_record_nobody_knows_which_side_changed(tmp_path: Path) -> None:
    path = merged(tmp_path, verify=False, format="safetensors", weights_only=True)
    train_on(tmp_path / "in1", 1)
    report = npt.verify(path)
    assert len(report.problems) == 9
    assert all(
        line.endswith("nothing recorded tells which of the two has changed")
        for line in report.problems
    )


def damage_one(checkpoint: Path) -> str:
    """Flip a byte of a tensor and keep its CRC-32; returns the tensor's name."""
    file = checkpoint / "npt_weights.pt"
    name, tensor = list(read_weights(checkpoint).items())[4]
    flip_byte(file, offset_of(file, tensor) + 2)
    return name


def test_a_source_damaged_since_is_not_the_outputs_fault(tmp_path: Path) -> None:
    path = merged(tmp_path, verify=False, format="safetensors")
    name = damage_one(tmp_path / "in1")
    report = npt.verify(path)
    assert report.passed and report.compared == 27 * 4 - 1
    source = tmp_path / "in1" / "npt_weights.pt"
    assert f"{source}: {name}: damaged, its CRC-32 differs" in report.notes
    assert any(f"{name}: neither its source nor a record proves it" in n for n in report.notes)


def test_what_was_copied_from_a_damaged_source_is_damaged(tmp_path: Path) -> None:
    trained_checkpoint(tmp_path / "in1", 1)
    name = damage_one(tmp_path / "in1")
    options = npt.MergeOptions(format="safetensors")
    npt.merge([tmp_path / "in1"], tmp_path / "out", options=options)
    (problem,) = npt.verify(tmp_path / "out").problems
    assert f"{name}: damaged, its CRC-32 differs" in problem


def test_a_lost_source_state_names_its_file(tmp_path: Path) -> None:
    path = merged(tmp_path)
    (tmp_path / "in1" / "training_state.pt").unlink()
    report = npt.verify(path)
    assert report.passed and report.compared == 27 + 18 * 3
    (note,) = report.notes
    assert note.startswith(
        "training_state.pt: the sources have changed since the merge: 27 tensors"
    )


def test_sources_are_found_whatever_names_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output may be named by its weights file or through links, also with ``..`` after one."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    for layer in (1, 2):
        trained_checkpoint(tmp_path / "far" / str(layer), layer)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path)
    npt.merge(["far/1", "link/../2"], "link/out", verify=True)
    monkeypatch.chdir("/")
    for name in ("link/out", "far/away/out", "far/away/out/npt_weights.pt"):
        report = npt.verify(tmp_path / name)
        assert report.passed and report.compared == 18 * 4, report.notes


@pytest.mark.parametrize("whole_tree_moved", [False, True])
def test_relative_sources_are_those_of_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_tree_moved: bool
) -> None:
    for place, seed in (("one", 1), ("two", 2)):
        for layer in (1, 2):
            trained_checkpoint(tmp_path / place / str(layer), layer, seed=seed)
    monkeypatch.chdir(tmp_path / "one")
    npt.merge(["1", "2"], "sub/out", verify=True)
    monkeypatch.chdir(tmp_path / "two")  # the same names, another experiment
    tree = tmp_path / "one"
    if whole_tree_moved:
        tree = tree.rename(tmp_path / "moved")
    report = npt.verify(tree / "sub" / "out")
    assert report.passed and report.notes == [] and report.compared == 18 * 4


STATE_DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "lost": Path.unlink,
}


@pytest.mark.parametrize("damage", STATE_DAMAGE)
@pytest.mark.parametrize("proven", [True, False])
def test_a_state_that_cannot_be_read_is_one_problem_of_the_output(
    tmp_path: Path, proven: bool, damage: str
) -> None:
    output = merged(tmp_path, verify=proven)
    STATE_DAMAGE[damage](output / "training_state.pt")
    report = npt.verify(output)
    assert not any("sources have changed" in note for note in report.notes)
    about = [line for line in report.problems if line != "training_state.pt has changed"]
    assert len(about) == 1 and "training_state.pt" in about[0]


DIGEST_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a digest": lambda raw: raw[:-2] + (b"0" if raw[-2:-1] != b"0" else b"1") + b"\n",
    "a file's name": lambda raw: b"~" + raw[1:],
    "the end": lambda raw: raw[:-20],
    "a line more": lambda raw: raw + b"\n",
    "all of it": lambda raw: b"",
}


@pytest.mark.parametrize("damage", DIGEST_DAMAGE)
def test_damaged_digests_do_not_blame_the_tensors(tmp_path: Path, damage: str) -> None:
    output = merged(tmp_path)
    path = output / "merge_digests.txt"
    path.write_bytes(DIGEST_DAMAGE[damage](path.read_bytes()))
    report = npt.verify(output)
    assert report.problems == ["merge_digests.txt has changed"]
    (note,) = report.notes
    assert "not compared with merge_digests.txt" in note


def test_lost_digests_were_recorded(tmp_path: Path) -> None:
    output = merged(tmp_path)
    (output / "merge_digests.txt").unlink()
    report = npt.verify(output)
    assert report.problems == ["merge_digests.txt is missing"]
    assert not any("without --verify" in note or "made with" in note for note in report.notes)


def test_without_a_summary_structure_is_checked(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1))
    report = npt.verify(path)
    assert report.passed
    assert report.crcs_matched == 9
    assert report.notes == [
        "no merge_summary.json: not written by a merge",
        "nothing to compare with for npt_weights.pt: no source and no digest is known; structure, "
        "CRCs and values were checked",
    ]
    flip_byte(path / "npt_weights.pt", offset_of(path / "npt_weights.pt", layer_weights(1)[
        "layer_1_np.W_b_up_up"]) + 2)  # fmt: skip
    assert not npt.verify(path).passed


def test_what_nothing_is_known_of_is_named(tmp_path: Path) -> None:
    trained = trained_checkpoint(tmp_path / "a", 1)
    names = "npt_weights.pt, training_state.pt, multi_layer_state.pt, config.json"
    assert f"nothing to compare with for {names}: " in npt.verify(trained).notes[-1]
    npt.merge([trained], tmp_path / "out", verify=True)
    assert not npt.verify(tmp_path / "out").notes
    npt.merge([trained], tmp_path / "plain")
    assert not any("nothing to compare" in note for note in npt.verify(tmp_path / "plain").notes)
    trained.rename(tmp_path / "b")
    report = npt.verify(tmp_path / "plain")
    assert report.passed
    assert "nothing to compare with for npt_weights.pt, training_state.pt: " in report.notes[-1]


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


def test_without_digests_the_sources_are_the_proof(tmp_path: Path) -> None:
    path = merged(tmp_path, verify=False, format="safetensors")
    report = npt.verify(path)
    assert report.passed and report.compared == 27 * 4
    assert any("not made with --verify" in note for note in report.notes)
    file = path / "npt_weights.safetensors"
    flip_byte(file, file.stat().st_size - 3)
    assert not npt.verify(path).passed


@pytest.mark.parametrize("name", ["config.json", "npt_config.json", "multi_layer_state.pt"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_without_digests_the_sources_prove_small_files(
    tmp_path: Path, name: str, damage: str
) -> None:
    """All small files can be made again from the sources."""
    path = merged(tmp_path, verify=False)
    if damage == "missing":
        (path / name).unlink()
    else:
        data = (path / name).read_bytes()
        old = {"config.json": b"test/model", "npt_config.json": b"removed"}.get(name, b"teacher")
        (path / name).write_bytes(data.replace(old, old[:-1] + b"x", 1))
    assert not npt.verify(path).passed


def lose_a_shard(path: Path) -> None:
    next(iter(sorted(path.glob("*.safetensors")))).unlink()


def lose_the_state(path: Path) -> None:
    (path / "training_state.pt").unlink()


def lose_the_config(path: Path) -> None:
    (path / "config.json").unlink()


def lose_the_npt_config(path: Path) -> None:
    (path / "npt_config.json").unlink()


def lose_the_curriculum(path: Path) -> None:
    (path / "multi_layer_state.pt").unlink()


def lose_all_weights(path: Path) -> None:
    for file in path.glob("npt_weights*"):
        file.unlink()


LOSSES = [
    lose_a_shard, lose_the_state, lose_the_config, lose_the_npt_config, lose_the_curriculum,
]  # fmt: skip


@pytest.mark.parametrize("with_sources", [True, False], ids=["sources", "copy"])
@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_a_lost_file(tmp_path: Path, lose: Callable[[Path], None], with_sources: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = merged(tmp_path, format="safetensors", max_shard_size=2000)
    if not with_sources:
        path = forget_sources(tmp_path)
    lose(path)
    report = npt.verify(path)
    assert not report.passed
    assert all("\n" not in problem for problem in report.problems)


def test_lost_weights(tmp_path: Path) -> None:
    path = merged(tmp_path)
    lose_all_weights(path)
    with pytest.raises(npt.CheckpointError, match="NPT weights not found"):
        npt.verify(path)


@pytest.mark.parametrize("with_sources", [True, False], ids=["sources", "copy"])
def test_a_lost_layer(tmp_path: Path, with_sources: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = merged(tmp_path, weights_only=True)
    if not with_sources:
        path = forget_sources(tmp_path)
    kept = {n: t for n, t in read_weights(path).items() if n.startswith("layer_1_")}
    torch.save(kept, path / "npt_weights.pt")
    report = npt.verify(path)
    assert "Missing layers: [2]" in report.problems
    assert (report.expected_layers, report.found_layers) == ([1, 2], [1])


def test_a_layer_too_many(tmp_path: Path) -> None:
    path = merged(tmp_path, weights_only=True)
    torch.save({**read_weights(path), **layer_weights(7)}, path / "npt_weights.pt")
    assert "Unexpected layers: [7]" in npt.verify(path).problems


def test_a_lost_tensor(tmp_path: Path) -> None:
    path = merged(tmp_path, weights_only=True)
    weights = read_weights(path)
    del weights["layer_2_np.W_a_up_gate.1"]
    torch.save(weights, path / "npt_weights.pt")
    report = npt.verify(path)
    assert any("layer_2_np.W_a_up_gate.1 is missing" in problem for problem in report.problems)


def test_a_lost_moment(tmp_path: Path) -> None:
    path = merged(tmp_path)
    state = torch.load(path / "training_state.pt", weights_only=True)
    del state["optimizer_state_dict"]["state"][3]
    torch.save(state, path / "training_state.pt")
    assert any("optimizer.3.exp_avg" in problem for problem in npt.verify(path).problems)


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


ODD_SUMMARIES: dict[str, Any] = {
    "empty": {},
    "options-of-the-future": {"inputs": [], "options": {"warp": 9}},
    "layers-a-number": {"inputs": [{"path": "x", "layers": 5}], "options": {}},
    "layers-of-text": {"inputs": [{"path": "x", "layers": ["1"]}], "options": {}},
    "place-a-number": {"inputs": [], "options": {}, "working_directory": 7},
    "inputs-a-number": {"inputs": 3, "options": {}},
    "layers-odd": {"inputs": [{"path": "x", "layers": {"a": 1}}], "options": {}},
    "bad-choice": {"inputs": [{"path": "x", "layers": None}], "options": {"dtype": "int3"}},
    "bad-choice-type": {"inputs": [], "options": {"dtype": [1]}},
    "size-of-text": {"inputs": [], "options": {"max_shard_size": "5"}},
    "tensors-odd": {"tensors": {"npt_weights.pt": [1]}, "files": [2]},
    "digest-odd": {"tensors": {"npt_weights.pt": {"layer_1_np.W_down_up": 3}}},
    "merged-layers-odd": {"merged_layers": [1, "2", None]},
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_SUMMARIES)
def test_an_odd_summary_does_not_break_verify(tmp_path: Path, case: str) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1))
    (path / "merge_summary.json").write_text(json.dumps(ODD_SUMMARIES[case]))
    report = npt.verify(path)
    assert report.tensors == 9


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
