"""Full disks, huge sources, little memory: the needs of a merge are small and known in advance."""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from npt_fast.benchmarks.bench_merge import measure
from npt_fast.checkpoint import linux
from npt_fast.checkpoint import merge as merge_module
from npt_fast.checkpoint.merge import merge
from npt_fast.config import MergeOptions
from npt_fast.errors import MergeError, StorageError
from tests.checkpoint.test_reflink import mounted
from tests.checkpoints import adamw_state, layer_weights, write_checkpoint

CLI = Path(sys.executable).with_name("npt-fast")
MB = 1 << 20
TB = 1 << 40
SMALL_MEMORY = 64 * MB
LAYER: dict[str, Any] = {"d": 256, "f": 1024, "rank": 64}  # 1.2 MB


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Two checkpoints of 4 MB each; two thirds of that are optimizer state."""
    made = []
    for layer in (1, 2):
        weights = layer_weights(layer, **LAYER)
        made.append(
            write_checkpoint(
                tmp_path / f"in{layer}",
                weights,
                training_state=adamw_state(weights, steps=1),
                config={"model_name": "m"},
            )
        )
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for the output."""
    path = tmp_path / "work"
    path.mkdir()
    return path


def cli(*arguments: object) -> list[str]:
    return [str(CLI), *map(str, arguments)]


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if not line.startswith("Warning: ")]


# --- full disks

_WITH_LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from npt_fast.cli.main import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("limit", [0, 1000, 4096, 1_000_000, 3_000_000])
@pytest.mark.parametrize("force", [False, True])
def test_a_file_size_limit_is_a_full_disk(
    inputs: list[Path], folder: Path, limit: int, force: bool
) -> None:
    target = folder / "out"
    if force:
        target.mkdir()
        (target / "npt_weights.pt").write_bytes(b"old")
    command = [sys.executable, "-c", _WITH_LIMIT, limit, "merge", "--output", target]
    command += ["--checkpoints", *inputs, *(["--force"] if force else [])]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    (line,) = error_lines(done.stderr)
    assert line.startswith(f"Error: {target}: ") and "nothing was written" in line
    assert os.listdir(folder) == (["out"] if force else [])
    assert not force or (target / "npt_weights.pt").read_bytes() == b"old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize(
    "call", ["pwrite", "copy_file_range", "ftruncate", "fsync", "mkdir", "reserve", "rename"]
)
def test_no_space_at_any_step(
    inputs: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    owner = linux if call in ("reserve", "rename") else os
    monkeypatch.setattr(owner, call, refuse)
    with pytest.raises(StorageError, match="nothing was written") as caught:
        merge(inputs, folder / "new" / "out")
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert os.listdir(folder) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync", "mkdir"])
def test_a_broken_disk_at_any_step(
    inputs: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(MergeError, match="nothing was written"):
        merge(inputs, folder / "out")
    monkeypatch.undo()
    assert os.listdir(folder) == []


@pytest.fixture
def tiny_disk(folder: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    with mounted(folder, "-t", "tmpfs", "-o", "size=3m", "tmpfs") as point:
        yield point


def plenty(path: Path) -> SimpleNamespace:
    return SimpleNamespace(f_bavail=1 << 30, f_frsize=4096)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_disk_that_fills_up_meanwhile(
    inputs: list[Path], tiny_disk: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was enough free space when the merge was planned, but not when it writes."""
    monkeypatch.setattr(os, "statvfs", plenty)
    with pytest.raises(StorageError, match="No space left on device; nothing was written"):
        merge(inputs, tiny_disk / "out", options=MergeOptions(format=form))
    assert os.listdir(tiny_disk) == []


def test_a_disk_that_fills_up_without_reservation(
    inputs: list[Path], tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", plenty)
    monkeypatch.setattr(linux, "reserve", lambda *args: None)
    with pytest.raises(StorageError, match="No space left on device; nothing was written"):
        merge(inputs, tiny_disk / "out", verify=True)
    assert os.listdir(tiny_disk) == []


def test_too_little_space_is_refused_before_the_first_byte(
    inputs: list[Path], tiny_disk: Path
) -> None:
    before = tiny_disk.stat().st_mtime_ns
    done = subprocess.run(
        cli("merge", "--checkpoints", *inputs, "--output", tiny_disk / "new" / "out"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    (line,) = error_lines(done.stderr)
    assert "bytes needed" in line and "free on its file system" in line
    assert os.listdir(tiny_disk) == []
    assert tiny_disk.stat().st_mtime_ns == before  # not even for a moment


def test_the_space_that_a_plan_asks_for_is_enough_and_little_more(
    inputs: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = merge(inputs, folder / "out", dry_run=True).needed_bytes
    written = sum(path.stat().st_size for path in inputs[0].iterdir()) * 2
    assert written < needed < written + 2 * MB

    def exactly(free: int) -> None:
        status = SimpleNamespace(f_bavail=free, f_frsize=1)
        monkeypatch.setattr(merge_module.os, "statvfs", lambda path: status)

    exactly(needed - 1)
    with pytest.raises(StorageError, match=f"{needed:,} bytes needed, {needed - 1:,} free"):
        merge(inputs, folder / "out")
    assert os.listdir(folder) == []
    exactly(needed)
    merge(inputs, folder / "out")
    output = sum(path.stat().st_size for path in (folder / "out").iterdir())
    assert output < needed < output + 2 * MB


def test_a_read_only_file_system(inputs: list[Path], folder: Path) -> None:
    with mounted(folder, "-t", "tmpfs", "-o", "ro", "tmpfs") as point:
        for target in (point / "out", point / "new" / "out"):
            done = subprocess.run(
                cli("merge", "--checkpoints", *inputs, "--output", target),
                capture_output=True,
                text=True,
            )
            assert done.returncode == 1
            (line,) = error_lines(done.stderr)
            assert "Read-only file system" in line and "nothing was written" in line
        assert os.listdir(point) == []


# --- huge sources


def sparse_safetensors(path: Path) -> None:
    """Write a file of 1.1 TB in a few blocks: a header, and a hole for the data."""
    d, f, r = 1 << 20, 1 << 21, 1 << 16
    header, at = {}, 0
    for stem, shape in (("W_down", (d, r)), ("W_a_up", (r, d)), ("W_b_up", (r, f))):
        end = at + 4 * shape[0] * shape[1]
        fields = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        header[f"layer_1_np.{stem}"] = fields
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + at)
        except OSError as error:
            pytest.skip(f"this file system has no files of 1 TB: {error.strerror}")


def sparse_pt(path: Path) -> None:
    """Write the same as a ``.pt`` file with torch, which can leave out the data."""
    d, f, r = 1 << 20, 1 << 21, 1 << 16
    path.parent.mkdir()
    backing = path.with_name("backing")
    try:
        with open(backing, "wb") as file:
            file.truncate(4 * r * f)
    except OSError as error:
        pytest.skip(f"this file system has no files of 1 TB: {error.strerror}")

    def tensor(rows: int, columns: int) -> torch.Tensor:
        flat = torch.from_file(str(backing), shared=True, size=rows * columns)
        return flat.view(rows, columns)

    shapes = {"W_down": (d, r), "W_a_up": (r, d), "W_b_up": (r, f)}
    with torch.serialization.skip_data():
        torch.save({f"layer_1_np.{stem}": tensor(*s) for stem, s in shapes.items()}, path)
    backing.unlink()


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_terabyte_is_planned_at_once(tmp_path: Path, folder: Path, form: str) -> None:
    path = tmp_path / "huge" / f"npt_weights.{form}"
    (sparse_pt if form == "pt" else sparse_safetensors)(path)
    assert path.stat().st_size >= TB and path.stat().st_blocks * 512 < MB
    other = "safetensors" if form == "pt" else "pt"
    for arguments in ([], ["--format", other], ["--dtype", "bfloat16"], ["--uniform"]):
        done = measure(
            cli(
                "merge", "--checkpoints", path.parent, "--output", folder / "out",
                "--dry-run", "--json", *arguments,
            )
        )  # fmt: skip
        assert done.code == 0, done.stderr
        report = json.loads(done.stdout)
        assert sum(report["ways"].values()) >= (TB // 2 if "bfloat16" in arguments else TB)
        assert done.cpu < 20  # to read it takes minutes
        assert done.peak <= SMALL_MEMORY
    refused = measure(cli("merge", "--checkpoints", path.parent, "--output", folder / "out"))
    if os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize < TB:
        assert refused.code == 4
    assert os.listdir(folder) == []


# --- memory


@pytest.fixture(scope="module", params=["pt", "safetensors"])
def large(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Path]]:
    """Two checkpoints of 90 MB each; a single tensor is larger than the memory limit."""
    folder = tmp_path_factory.mktemp("large")
    made = []
    for layer in (1, 2):
        weights = layer_weights(layer, d=2048, f=18_432, rank=1000, modulation="single")
        path = folder / f"in{layer}"
        if request.param == "pt":
            write_checkpoint(path, weights)
        else:
            path.mkdir()
            save_file(weights, path / "npt_weights.safetensors")
        made.append(path)
    yield made
    subprocess.run(["rm", "-r", *made], check=True)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--verify"], ["--on-conflict", "mean"], ["--dtype", "bfloat16"]],
    ids=lambda arguments: " ".join(arguments) or "copy",
)
def test_memory_does_not_depend_on_the_input(
    large: list[Path], folder: Path, arguments: Sequence[str]
) -> None:
    total = sum(path.stat().st_size for source in large for path in source.iterdir())
    assert total > 2.5 * SMALL_MEMORY
    sources = [large[0], large[0]] if "mean" in arguments else large
    done = measure(cli("merge", "--checkpoints", *sources, "--output", folder / "out", *arguments))
    assert done.code == 0, done.stderr
    assert done.peak <= SMALL_MEMORY
    verified = measure(cli("verify", folder / "out"))
    assert verified.code == 0, verified.stdout
    assert verified.peak <= SMALL_MEMORY


def test_what_is_measured_is_the_process_itself() -> None:
    """The measured memory is not that of this process, which has imported torch."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > 2 * SMALL_MEMORY
    nothing = measure([sys.executable, "-S", "-c", "pass"])
    assert nothing.peak < 20 * MB
    some = measure([sys.executable, "-S", "-c", "x = bytearray(100 << 20)"])
    assert 100 * MB < some.peak < 120 * MB
    assert measure([sys.executable, "-c", "raise SystemExit(7)"]).code == 7


# --- what is imported

_IMPORTS = """
import sys
from npt_fast.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print(end.code, *sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ([], "torch safetensors transformers numpy rich.progress hypothesis pickle"),
        (["--dry-run"], "torch safetensors transformers numpy rich.progress"),
        (["--format", "safetensors", "--json"], "torch safetensors transformers numpy"),
        (["--verify"], "torch safetensors transformers"),
        (["--dtype", "bfloat16", "--verify"], "torch safetensors transformers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_heavy_packages_are_not_imported(
    inputs: list[Path], folder: Path, arguments: list[str], absent: str
) -> None:
    command = [sys.executable, "-c", _IMPORTS, "merge", "--output", folder / "out"]
    command += ["--checkpoints", *inputs, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0", done.stderr
    assert "npt_fast.checkpoint.merge" in modules
    assert not set(absent.split()) & set(modules)


@pytest.mark.parametrize("verb", ["analyze", "verify"])
def test_reading_does_not_import_torch_either(inputs: list[Path], folder: Path, verb: str) -> None:
    merge(inputs, folder / "out")
    name = ["--checkpoint"] if verb == "analyze" else []
    command = [sys.executable, "-c", _IMPORTS, verb, *name, str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0", done.stderr
    assert not {"torch", "safetensors", "transformers"} & set(modules)
