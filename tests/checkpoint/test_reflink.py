"""On file systems that share blocks, a merge copies almost nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from npt_fast.checkpoint import source_file
from npt_fast.checkpoint.merge import merge
from npt_fast.checkpoint.verify import verify
from npt_fast.config import MergeOptions
from tests.checkpoints import adamw_state, layer_weights, write_checkpoint

MB = 1 << 20
LAYER = {"d": 1024, "f": 4096, "rank": 256, "modulation": "single"}  # 6 MB each
Weights = dict[str, torch.Tensor]


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """Mount a file system at ``folder/mnt`` for this process; skips the test if that is refused.

    Args:
        folder: empty directory.
        arguments: arguments of ``mount``, without the mount point.
    """
    point = folder / "mnt"
    point.mkdir()
    try:
        done = subprocess.run(["mount", *arguments, point], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting needs root and loop devices: {done.stderr.strip()}")
    try:
        yield point
    finally:
        # lazily, so that a failed test that still has a file open does not leave the mount
        subprocess.run(["umount", "--lazy", point], check=True)


@contextmanager
def formatted(folder: Path, kind: str) -> Iterator[Path]:
    """A fresh file system of 1 GiB in a sparse file."""
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(1 << 30)
    try:
        subprocess.run([f"mkfs.{kind}", "-q", image], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"there is no mkfs.{kind}")
    try:
        with mounted(folder, "-o", "loop", str(image)) as point:
            yield point
    finally:
        image.unlink()


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    with formatted(tmp_path_factory.mktemp(request.param), request.param) as point:
        source_file._mounts.cache_clear()  # this process may have merged before it was mounted
        yield point


@pytest.fixture
def work(disk: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = disk / f"test{len(os.listdir(disk))}"
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-r", folder], check=True)


def weights_of(layers: range) -> Weights:
    weights: Weights = {}
    for layer in layers:
        weights |= layer_weights(layer, **LAYER)
    return weights


def write(folder: Path, form: str, weights: Weights, note: str = "") -> Path:
    """Write a checkpoint; `note` makes the header of a safetensors file longer."""
    if form == "pt":
        return write_checkpoint(folder, weights)
    folder.mkdir()
    save_file(weights, folder / "npt_weights.safetensors", metadata={"format": "pt" + note})
    return folder


def read(folder: Path) -> Weights:
    """Read the weights with torch or safetensors."""
    pt = folder / "npt_weights.pt"
    if pt.exists():
        return dict(torch.load(pt, weights_only=True))
    found: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(found: Weights, wanted: Weights) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in wanted.items()
    )


def nbytes(weights: Weights) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def used(path: Path) -> int:
    os.sync()
    status = os.statvfs(path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_more_than_99_percent_is_cloned(work: Path, form: str) -> None:
    first, second = weights_of(range(10, 13)), weights_of(range(13, 16))
    inputs = [write(work / "a", form, first), write(work / "b", form, second)]
    before = used(work)
    report = merge(inputs, work / "out", options=MergeOptions(weights_only=True))
    assert used(work) - before < 2 * MB
    assert sum(report.ways.values()) > nbytes(first) + nbytes(second) > 35 * MB
    assert report.ways["reflink"] > 0.99 * sum(report.ways.values())
    assert same(read(work / "out"), first | second)
    assert verify(work / "out").passed


def test_unlike_pt_files_are_cloned_whole(work: Path) -> None:
    """A zip can have padding between its records, so that each keeps its phase."""
    first, second = weights_of(range(3)), layer_weights(12, d=1024, f=4096, rank=100)
    inputs = [write(work / "a", "pt", first), write(work / "b", "pt", second)]
    report = merge(inputs, work / "out", options=MergeOptions(weights_only=True))
    assert report.ways["reflink"] > 0.99 * sum(report.ways.values())
    assert same(read(work / "out"), first | second)


def test_shards_make_unlike_safetensors_cloneable(work: Path) -> None:
    first, second = weights_of(range(2)), weights_of(range(2, 4))
    inputs = [
        write(work / "a", "safetensors", first),
        write(work / "b", "safetensors", second, note="x" * 136),
    ]
    options = MergeOptions(weights_only=True, max_shard_size=13_000_000)
    report = merge(inputs, work / "out", options=options)
    assert report.ways["reflink"] > 0.99 * sum(report.ways.values())
    assert len(list((work / "out").glob("*.safetensors"))) == 2
    assert same(read(work / "out"), first | second)


def test_a_verified_merge_clones_as_well(work: Path) -> None:
    weights = weights_of(range(2))
    inputs = [write(work / "a", "pt", weights)]
    report = merge(inputs, work / "out", verify=True, options=MergeOptions(weights_only=True))
    assert report.ways["reflink"] > 0.99 * sum(report.ways.values())
    assert report.verification is not None and report.verification.compared == len(weights)
    assert same(read(work / "out"), weights)


def test_optimizer_states_are_cloned(work: Path) -> None:
    inputs, states = [], []
    for layer in (1, 2):
        weights = layer_weights(layer, **LAYER)
        states.append(adamw_state(weights, steps=1, seed=layer))
        inputs.append(write_checkpoint(work / f"in{layer}", weights, training_state=states[-1]))
    before = used(work)
    report = merge(inputs, work / "out")
    assert used(work) - before < 2 * MB
    assert report.ways["reflink"] > 0.99 * sum(report.ways.values())
    merged = torch.load(work / "out" / "training_state.pt", weights_only=True)
    found = merged["optimizer_state_dict"]["state"]
    wanted = [
        moments for state in states for moments in state["optimizer_state_dict"]["state"].values()
    ]
    assert list(found) == list(range(6))
    for index, moments in enumerate(wanted):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found[index][name], moments[name])


def test_a_merge_of_merges_is_cloned(work: Path) -> None:
    sets = [weights_of(range(n, n + 1)) for n in range(4)]
    for form in ("pt", "safetensors"):
        inputs = [write(work / f"{form}{n}", form, weights) for n, weights in enumerate(sets)]
        halves = [work / f"{form}-half{n}" for n in (0, 1)]
        options = MergeOptions(weights_only=True)
        merge(inputs[:2], halves[0], options=options)
        merge(inputs[2:], halves[1], options=options)
        report = merge(halves, work / f"{form}-out", options=options)
        assert report.ways["reflink"] > 0.99 * sum(report.ways.values())
        assert same(read(work / f"{form}-out"), sets[0] | sets[1] | sets[2] | sets[3])


def test_the_original_does_not_change_with_the_clone(work: Path) -> None:
    """Shared blocks are copied when one of the files is written."""
    weights = weights_of(range(1))
    source = write(work / "a", "pt", weights)
    merge([source], work / "out", options=MergeOptions(weights_only=True))
    with open(work / "out" / "npt_weights.pt", "r+b") as file:
        file.write(b"\xff" * (2 * MB))
    assert same(read(source), weights)


def test_what_is_copied_does_not_grow_with_the_input(work: Path) -> None:
    """So the time does not depend on the size: a few calls for ranges of any length."""
    copied = []
    for times in (1, 4):
        layer = {**LAYER, "f": LAYER["f"] * times, "d": LAYER["d"] * times}
        weights = layer_weights(7, **layer)
        source = write_checkpoint(work / f"in{times}", weights)
        report = merge([source], work / f"out{times}", options=MergeOptions(weights_only=True))
        copied.append(sum(report.ways.values()) - report.ways["reflink"])
        assert report.ways["reflink"] > 0.99 * nbytes(weights)
        assert same(read(work / f"out{times}"), weights)
    # as many tensors, as many pages at their ends
    assert max(copied) < 3 * 4096 * 3 + 16_384


def test_a_clone_across_devices_is_a_copy(work: Path, tmp_path: Path) -> None:
    weights = weights_of(range(1))
    source = write(work / "a", "pt", weights)
    report = merge([source], tmp_path / "out", options=MergeOptions(weights_only=True))
    assert "reflink" not in report.ways
    assert same(read(tmp_path / "out"), weights)


def test_the_plan_foretells_the_ways_and_the_space(work: Path) -> None:
    first, second = weights_of(range(2)), weights_of(range(2, 4))
    inputs = [write(work / "a", "pt", first), write(work / "b", "pt", second)]
    options = MergeOptions(weights_only=True)
    plan = merge(inputs, work / "out", dry_run=True, options=options)
    report = merge(inputs, work / "out", options=options)
    assert plan.ways["reflink"] == report.ways["reflink"]
    assert plan.needed_bytes < 2 * MB
    assert plan.files == {name: size for name, size in report.files.items() if name in plan.files}


def test_a_clone_needs_no_free_space(work: Path) -> None:
    """The free space is too small for a copy."""
    layer = {**LAYER, "d": 8192, "rank": 512, "f": 40_000}
    weights = layer_weights(1, **layer)
    source = write(work / "a", "pt", weights)
    del weights
    size = (source / "npt_weights.pt").stat().st_size
    with open(work / "filler", "wb") as file:
        filled = 0
        with contextlib.suppress(OSError):
            while True:
                os.posix_fallocate(file.fileno(), filled, 32 * MB)
                filled += 32 * MB
        os.ftruncate(file.fileno(), filled - 32 * MB)  # room for headers, not for a copy
    os.sync()
    assert size > 100 * MB
    report = merge([source], work / "out", options=MergeOptions(weights_only=True))
    assert report.ways["reflink"] > 0.99 * size
