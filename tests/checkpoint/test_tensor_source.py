"""Every format of weights gives the same tensors; ambiguous files are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import npt_fast as npt
from npt_fast.checkpoint.tensor_source import locate_checkpoint, open_tensors
from tests.checkpoints import layer_weights, raw, write_checkpoint, write_shards

WEIGHTS = {**layer_weights(11, num_ranks=2), **layer_weights(13, modulation="dual")}
INDEX = "npt_weights.safetensors.index.json"


def as_directory(root: Path) -> Path:
    return write_checkpoint(root / "c", WEIGHTS)


def as_accumulated(root: Path) -> Path:
    write_checkpoint(root / "c", WEIGHTS)
    (root / "c" / "npt_weights.pt").rename(root / "c" / "accumulated_npt_weights.pt")
    return root / "c"


def as_bare_pt(root: Path) -> Path:
    torch.save(WEIGHTS, root / "anything.pt")
    return root / "anything.pt"


def as_safetensors_directory(root: Path) -> Path:
    (root / "c").mkdir()
    save_file(WEIGHTS, root / "c" / "npt_weights.safetensors")
    return root / "c"


def as_bare_safetensors(root: Path) -> Path:
    save_file(WEIGHTS, root / "anything.safetensors")
    return root / "anything.safetensors"


def as_shards(root: Path) -> Path:
    names = list(WEIGHTS)
    halves = [{n: WEIGHTS[n] for n in names[:7]}, {n: WEIGHTS[n] for n in names[7:]}]
    return write_shards(root / "c", halves)


def as_index(root: Path) -> Path:
    return as_shards(root) / INDEX


def with_form_2_keys(root: Path) -> Path:
    renamed = {
        name.replace("layer_", "model.layers.").replace("_np.", ".np_component."): tensor
        for name, tensor in WEIGHTS.items()
    }
    return write_checkpoint(root / "c", renamed)


def as_parameters(root: Path) -> Path:
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in WEIGHTS.items()}
    return write_checkpoint(root / "c", parameters)


def as_views(root: Path) -> Path:
    """Write the weights as transposed, sliced and shared tensors."""
    views = {}
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        if number % 3 == 0:
            views[name] = tensor.T.contiguous().T
        elif number % 3 == 1:
            wide = torch.full((tensor.shape[0] + 2, 2 * tensor.shape[1]), 7.0)
            wide[1:-1, ::2] = tensor
            views[name] = wide[1:-1, ::2]
        else:
            views[name] = torch.cat([torch.ones(5), tensor.reshape(-1)])[5:].view(tensor.shape)
    return write_checkpoint(root / "c", views)


FORMS = [
    as_directory, as_accumulated, as_bare_pt, as_safetensors_directory, as_bare_safetensors,
    as_shards, as_index, with_form_2_keys, as_parameters, as_views,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_holds_the_same_tensors(tmp_path: Path, form: Callable[[Path], Path]) -> None:
    path = form(tmp_path)
    npt.merge([path], tmp_path / "out", verify=True, options=npt.MergeOptions(format="pt"))
    merged = torch.load(tmp_path / "out" / "npt_weights.pt", weights_only=True)
    assert list(merged) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert raw(merged[name]) == raw(tensor), name


@pytest.mark.parametrize("form", [as_directory, as_bare_safetensors], ids=["pt", "safetensors"])
def test_byte_ranges_hold_the_tensors(tmp_path: Path, form: Callable[[Path], Path]) -> None:
    source = open_tensors(form(tmp_path))
    for name, entry in source.tensors.items():
        assert entry.shape == tuple(WEIGHTS[name].shape)
        assert entry.file.read(entry.offset, entry.nbytes) == raw(WEIGHTS[name])


USUAL = ["npt_weights.pt", "accumulated_npt_weights.pt"]


@pytest.mark.parametrize("name", USUAL)
def test_a_bare_file_of_a_usual_name_has_its_folder_around_it(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path / "c", WEIGHTS, config={"model_name": "test/model"})
    (path / "npt_weights.pt").rename(path / name)
    assert npt.inspect(path).model_name == "test/model"
    assert npt.inspect(path / name).model_name == "test/model"


def test_the_usual_weights_are_taken_and_a_note_names_the_accumulated_ones(tmp_path: Path) -> None:
    """Sequential training leaves both files."""
    path = write_checkpoint(tmp_path / "c", layer_weights(13))
    torch.save(WEIGHTS, path / "accumulated_npt_weights.pt")
    inspected, verified = npt.inspect(path), npt.verify(path)
    merged = npt.merge([path], tmp_path / "out")
    assert [info.layer for info in inspected.layers] == [13]
    assert [info.layer for info in merged.layers] == [13]
    for notes in (inspected.notes, merged.notes, verified.notes):
        (note,) = [line for line in notes if line.startswith(f"{path}: using npt_weights.pt")]
        assert "accumulated_npt_weights.pt" in note
    for name, layers in (("accumulated_npt_weights.pt", [11, 13]), ("npt_weights.pt", [13])):
        named = npt.inspect(path / name)
        assert [info.layer for info in named.layers] == layers and named.notes == []


def test_accumulated_weights_alone_are_taken_without_a_note(tmp_path: Path) -> None:
    assert npt.inspect(as_accumulated(tmp_path)).notes == []


def test_a_note_for_the_place_and_a_note_for_the_weights(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoints" / "checkpoint-8", WEIGHTS)
    torch.save(WEIGHTS, path / "accumulated_npt_weights.pt")
    for notes in (
        npt.inspect(tmp_path / "checkpoint-8").notes,
        npt.verify(tmp_path / "checkpoint-8").notes,
        npt.merge([tmp_path / "checkpoint-8"], tmp_path / "out").notes,
    ):
        assert [line for line in notes if "using" in line] == [
            f"{tmp_path / 'checkpoint-8'}: using {path}",
            f"{path}: using npt_weights.pt; to use accumulated_npt_weights.pt beside it, "
            "name that file",
        ]


def test_the_guide_leaves_out_a_folder(tmp_path: Path) -> None:
    real = write_checkpoint(tmp_path / "run" / "checkpoints" / "checkpoint-800", WEIGHTS)
    report = npt.merge([tmp_path / "run" / "checkpoint-800"], tmp_path / "out")
    assert any(str(real) in note for note in report.notes)
    assert [info.layer for info in report.layers] == [11, 13]


def test_a_checkpoint_in_its_place_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / "checkpoints" / "best", layer_weights(1))
    here = write_checkpoint(tmp_path / "run" / "best", layer_weights(2))
    assert locate_checkpoint(here) == (here, "")


@pytest.mark.parametrize(
    "name", ["npt_weights.pt.incomplete", "npt_weights.bin", "npt_weights-00001-of-2.safetensors"]
)
def test_weights_under_another_name_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(npt.CheckpointError, match=f"NPT weights not found at .*it holds {name}"):
        npt.inspect(tmp_path)


@pytest.mark.parametrize("name", [*USUAL, "npt_weights.safetensors", INDEX])
def test_a_directory_or_a_broken_link_of_a_usual_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "a" / name).mkdir(parents=True)
    with pytest.raises(npt.CheckpointError, match=f"{name}: is a directory"):
        npt.inspect(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / name).symlink_to("gone")
    with pytest.raises(npt.CheckpointError, match=f"{name}: is a symbolic link"):
        npt.inspect(tmp_path / "b")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(npt.CheckpointError, match=r"Checkpoint not found: .*missing"):
        npt.inspect(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(npt.CheckpointError, match=r"NPT weights not found at .*empty"):
        npt.inspect(tmp_path / "empty")


def two_formats(root: Path) -> None:
    save_file(WEIGHTS, root / "npt_weights.safetensors")


def file_and_shards(root: Path) -> None:
    (root / "npt_weights.pt").unlink()
    save_file(WEIGHTS, root / "npt_weights.safetensors")
    shards = write_shards(root / "shards", [WEIGHTS])
    for path in shards.iterdir():
        shutil.move(path, root / path.name)


def accumulated_and_another_format(root: Path) -> None:
    (root / "npt_weights.pt").rename(root / "accumulated_npt_weights.pt")
    two_formats(root)


def all_three(root: Path) -> None:
    shutil.copy(root / "npt_weights.pt", root / "accumulated_npt_weights.pt")
    two_formats(root)


def a_broken_link_beside_it(root: Path) -> None:
    two_formats(root)
    (root / "npt_weights.pt").unlink()
    (root / "npt_weights.pt").symlink_to("gone")


AMBIGUOUS = [
    two_formats, file_and_shards, accumulated_and_another_format, all_three,
    a_broken_link_beside_it,
]  # fmt: skip


@pytest.mark.parametrize("spoil", AMBIGUOUS, ids=lambda f: f.__name__)
def test_two_sets_of_weights_are_ambiguous(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = as_directory(tmp_path)
    spoil(path)
    with pytest.raises(npt.CheckpointError, match="name the file that you mean"):
        npt.inspect(path)
    assert len(npt.inspect(path / "npt_weights.safetensors").layers) == 2


@pytest.mark.parametrize("content", [[1], WEIGHTS["layer_13_np.W_down_up"], None, 3], ids=type)
def test_a_file_without_a_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "npt_weights.pt")
    with pytest.raises(npt.CheckpointError, match="holds no dict of tensors"):
        npt.inspect(tmp_path)


NAMES = list(WEIGHTS)
SHARD_1, SHARD_2 = (f"npt_weights-0000{n}-of-00002.safetensors" for n in (1, 2))


def edit_index(directory: Path, **changes: object) -> None:
    path = directory / INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD_MAPS: dict[str, dict[str, object]] = {
    "traversal": {NAMES[0]: "../npt_weights.safetensors"},
    "absolute": {NAMES[0]: "/etc/npt_weights.safetensors"},
    "backslash": {NAMES[0]: "..\\npt_weights.safetensors"},
    "sub-folder": {NAMES[0]: "a/npt_weights.safetensors"},
    "other-suffix": {NAMES[0]: "npt_weights.pt"},
    "not-a-string": {NAMES[0]: 1},
    "no-such-shard": {NAMES[0]: "npt_weights-00003-of-00003.safetensors"},
    "wrong-shard": {NAMES[0]: SHARD_2},
    "tensor-in-no-shard": {"layer_9_np.W_down": SHARD_1},
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_an_index_that_lies(tmp_path: Path, case: str) -> None:
    halves = [{n: WEIGHTS[n] for n in NAMES[:7]}, {n: WEIGHTS[n] for n in NAMES[7:]}]
    path = write_shards(tmp_path / "c", halves, **BAD_MAPS[case])
    with pytest.raises(npt.CheckpointError) as caught:
        npt.merge([path], tmp_path / "out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """Other readers take one copy or the other (design.md#file-readers)."""
    path = write_shards(tmp_path / "c", [WEIGHTS, {NAMES[3]: torch.zeros(16, 4)}])
    with pytest.raises(npt.CheckpointError, match="the index says"):
        npt.inspect(path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"], ids=repr)
def test_an_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    path = as_shards(tmp_path)
    edit_index(path, weight_map=weight_map)
    with pytest.raises(npt.CheckpointError, match="has no weight_map"):
        npt.inspect(path)
