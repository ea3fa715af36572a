"""Hostile and broken checkpoints are refused in one line, without much time, and run no code.

Every case of `tests.hostile` is opened in a child process without torch, so that a crash, a hang
or a gigabyte of memory fails one test instead of ending all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from npt_fast.checkpoint.np_module import Architecture, collect_modules
from npt_fast.checkpoint.tensor_source import open_tensors
from npt_fast.errors import CheckpointError
from tests.hostile import index_cases, pickle_cases, pickles, safetensors_cases, zip_cases
from tests.hostile.valid_files import CONTROLS, NO_WEIGHTS
from tests.second_readers import as_bytes, content, same

ROOT = Path(__file__).parents[2]
PT_CASES = [*pickle_cases.CASES, *zip_cases.CASES]
ST_CASES = [*safetensors_cases.CASES, *index_cases.CASES]
CASES = {f"pt/{name}": build for name, build in PT_CASES} | {
    f"st/{name}": build for name, build in ST_CASES
}
MAX_MEMORY = 64 << 20  # plus `MAX_MULTIPLE` times the size of the file, as docs/merging.md says
MAX_MULTIPLE = 32
MAX_SECONDS = 25  # of CPU time for one file; the slowest needs a tenth of it

CHILD = """
import json, os, sys, time

def resident(name):
    status = dict(row.split(":", 1) for row in open("/proc/self/status"))
    return int(status[name].split()[0]) << 10

sys.path[0] = sys.argv[1]
from npt_fast.checkpoint.tensor_source import open_tensors
from npt_fast.errors import CheckpointError
from pathlib import Path
for line in sys.stdin:
    path = Path(json.loads(line))
    os.chdir(path.parent)
    try:
        open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    except OSError:
        pass  # a sandbox without it: from the highest so far
    at_first = resident("VmHWM")
    before = time.process_time()
    try:
        open_tensors(path)
        error, message = "accepted", ""
    except Exception as caught:
        error, message = type(caught).__name__, str(caught)
    print(json.dumps({
        "error": error,
        "message": message,
        "seconds": time.process_time() - before,
        "memory": resident("VmHWM") - at_first,
        "imported": sorted({"torch", "pickle", "numpy"} & sys.modules.keys()),
    }), flush=True)
"""


def open_all(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Outcome for each file, opened one after another in as few processes as possible."""
    waiting, outcomes = list(paths), {}
    while waiting:
        lines = "".join(json.dumps(str(paths[name])) + "\n" for name in waiting)
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(ROOT)],
            input=lines, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        done = [json.loads(line) for line in child.stdout.splitlines()]
        outcomes |= dict(zip(waiting, done, strict=False))
        waiting = waiting[len(done) :]
        if waiting and not (done or child.returncode < 0):
            raise RuntimeError(child.stderr)
        if waiting:
            died = f"the process died with {child.returncode}"
            empty = {"message": child.stderr, "seconds": 0.0, "memory": 0, "imported": []}
            outcomes[waiting.pop(0)] = {"error": died, **empty}
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, dict[str, Any]]]:
    """Outcome of `open_all` for every case, with its path and whether its payload ran."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = {}
        for number, (name, build) in enumerate(CASES.items()):
            directory = Path(temporary) / str(number)
            directory.mkdir()
            paths[name] = build(directory)
        found = open_all(paths)
        for name, path in paths.items():
            found[name]["path"] = path
            found[name]["ran"] = (path.parent / "canary").exists()
        yield found


def test_there_are_many_cases() -> None:
    assert len(PT_CASES) >= 60
    assert len(ST_CASES) >= 60
    assert len(CASES) == len(PT_CASES) + len(ST_CASES)  # no name twice


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes[name]
    assert outcome["error"] == "CheckpointError", outcome
    message, path = outcome["message"], outcome["path"]
    # also keeps line separators, terminal escapes and lone surrogates from what is printed
    assert message.isprintable()
    # for an index, one of the shards may be to blame
    assert (f"{path.parent}/" if name.startswith("st/index-") else str(path)) in message
    assert len(message.replace(str(path), "")) < 500
    assert not outcome["ran"]
    assert outcome["seconds"] < MAX_SECONDS


def test_memory_stays_within_a_multiple_of_the_file(outcomes: dict[str, dict[str, Any]]) -> None:
    greedy = {}
    for name, outcome in outcomes.items():
        files = [file for file in outcome["path"].parent.iterdir() if file.is_file()]
        size = sum(min(file.stat().st_size, file.stat().st_blocks * 512) for file in files)
        if outcome["memory"] > MAX_MEMORY + MAX_MULTIPLE * size:
            greedy[name] = (outcome["memory"], size)
    assert not greedy
    assert max(outcome["memory"] for outcome in outcomes.values()) > 32 << 20  # it is measured


def test_neither_torch_nor_pickle_is_needed(outcomes: dict[str, dict[str, Any]]) -> None:
    assert {module for outcome in outcomes.values() for module in outcome["imported"]} == set()


# --- the cases are what they claim to be


def built(name: str, directory: Path) -> Path:
    return CASES[name](directory)


@pytest.mark.parametrize(("name", "build"), CONTROLS, ids=[n for n, _ in CONTROLS])
def test_without_anything_wrong_they_are_accepted(
    name: str, build: pickles.Builder, tmp_path: Path
) -> None:
    path = build(tmp_path)
    source = open_tensors(path)
    modules = collect_modules(source.tensors, str(path))
    assert {layer: module.architecture for layer, module in modules.items()} == {
        3: Architecture("single", 1, 2, 8, 12)
    }
    for (tensor, shape), data in zip(pickles.SHAPES.items(), pickles.PIECES, strict=True):
        assert source.tensors[tensor].shape == shape
        assert content(source.tensors[tensor]) == data
    if source.format == "pt":
        same(source.tensors, torch.load(path, weights_only=True))
    elif path.suffix == ".safetensors":
        same(source.tensors, load_file(path))


@pytest.mark.parametrize(("name", "build"), NO_WEIGHTS, ids=[name for name, _ in NO_WEIGHTS])
def test_well_formed_files_without_weights(
    name: str, build: pickles.Builder, tmp_path: Path
) -> None:
    path = build(tmp_path)
    tensors = open_tensors(path).tensors
    with pytest.raises(CheckpointError, match=str(path)):
        collect_modules(tensors, str(path))


@pytest.mark.parametrize("name", pickles.PAYLOADS)
def test_payloads_do_run_in_torch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(f"pt/{name}", tmp_path)
    monkeypatch.chdir(tmp_path)
    loaded = torch.load(path, weights_only=False)
    assert list(loaded) == list(pickles.SHAPES)  # the result looks like a good checkpoint
    assert (tmp_path / "canary").exists()


def test_a_bare_pickle_runs_in_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    path = built("pt/file-bare-pickle", tmp_path)
    monkeypatch.chdir(tmp_path)
    pickle.loads(path.read_bytes())
    assert (tmp_path / "canary").exists()


ACCEPTED_BY_TORCH = [
    "second-pickle-after-stop", "zeros-after-stop", "key-duplicate", "deflated-data-pkl",
    "tensor-strides-zero-of-2-40", "tensor-strides-overlap", "member-duplicate-pickle",
    "member-duplicate-data", "members-overlap", "crc-differs-in-local", "size-differs-in-local",
    "encrypted-by-local-only", "comment", "values-left-on-the-stack",
]  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED_BY_TORCH)
def test_torch_accepts_what_is_refused_here(name: str, tmp_path: Path) -> None:
    assert len(torch.load(built(f"pt/{name}", tmp_path), weights_only=True)) == 3


def test_a_duplicate_means_two_things(tmp_path: Path) -> None:
    path = built("pt/member-duplicate-pickle", tmp_path)
    with zipfile.ZipFile(path) as archive:  # zipfile takes the last member
        assert archive.read("archive/data.pkl") != pickles.VALID
    loaded = torch.load(path, weights_only=True)  # torch takes the first member
    assert as_bytes(loaded[pickles.W_DOWN]) == pickles.PIECES[0]


@pytest.mark.parametrize("name", ["prefix", "prefix-not-counted"])
def test_a_prefix_is_fine_for_zipfile(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(built(f"pt/{name}", tmp_path)) as archive:
        assert archive.read("archive/data.pkl") == pickles.VALID


@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning")
def test_a_torchscript_archive_is_something_else_for_torch(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="TorchScript"):
        torch.load(built("pt/member-torchscript", tmp_path), weights_only=True)


ACCEPTED_BY_SAFETENSORS = [
    "duplicate-tensor", "shape-0-2-63-4", "shape-2-64-less-1-and-0", "unknown-field",
    "metadata-null", "name-empty", "name-nul", "name-parent", "name-parent-by-backslash",
    "name-escape", "name-newline", "name-of-5000-bytes", "leading-space", "leading-newline",
    "data-start-misaligned", "data-start-odd", "f32-at-odd-offset", "rank-100000", "rank-65",
]  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED_BY_SAFETENSORS)
def test_safetensors_accepts_what_is_refused_here(name: str, tmp_path: Path) -> None:
    with safe_open(built(f"st/{name}", tmp_path), framework="pt") as opened:
        assert set(pickles.SHAPES) <= set(opened.keys())


# --- every byte of a valid file, changed


def flips(path: Path, untouched: set[int]) -> Iterator[tuple[int, int]]:
    """Change one byte after another; yields position and mask while the change is in the file."""
    whole = path.read_bytes()
    for position, byte in enumerate(whole):
        if position in untouched:
            continue
        for mask in (0x01, 0x20, 0xFF):
            changed = bytearray(whole)
            changed[position] = byte ^ mask
            path.write_bytes(changed)
            yield position, mask
    path.write_bytes(whole)


def flip_everything(path: Path, untouched: set[int]) -> tuple[int, int]:
    """Numbers of refused and accepted changes; the libraries must agree on accepted files."""
    refused, accepted, problems = 0, 0, []
    for position, mask in flips(path, untouched):
        try:
            source = open_tensors(path)
        except CheckpointError as error:
            assert str(path) in str(error) and str(error).isprintable(), (position, mask)
            refused += 1
            continue
        accepted += 1
        try:
            if path.suffix == ".safetensors":
                same(source.tensors, load_file(path))
            else:
                same(
                    source.tensors,
                    torch.load(path, weights_only=True, mmap=False, map_location="cpu"),
                )
        except Exception as error:
            problems.append(f"byte {position} ^ {mask:#04x}: {type(error).__name__} {error!s:.100}")
    assert not problems
    return refused, accepted


def tiny_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in pickles.SHAPES.items()}


def test_flips_in_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "npt_weights.safetensors"
    save_file(tiny_weights(), path, {"format": "pt"})
    data = {
        entry.offset + place
        for entry in open_tensors(path).tensors.values()
        for place in range(entry.nbytes)
    }
    refused, accepted = flip_everything(path, data)
    # a letter of a name, or of the metadata, may become another one
    assert refused > 2 * accepted > 0


def test_flips_in_pt(tmp_path: Path) -> None:
    path = tmp_path / "npt_weights.pt"
    torch.save(tiny_weights(), path)
    data = {
        entry.offset + place
        for entry in open_tensors(path).tensors.values()
        for place in range(entry.nbytes)
    }
    refused, accepted = flip_everything(path, data)
    # padding, times, descriptors after the data, and the CRCs of tensors that nobody reads yet
    assert refused > 1000 and accepted > 1000


# --- whatever torch and safetensors write

IN_BOTH = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.uint16, torch.uint32,
    torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip
NAMES = st.lists(
    st.text("abcXYZ019_-.é漢", min_size=1, max_size=12).filter(lambda name: ".." not in name),
    max_size=5, unique=True,
)  # fmt: skip
FIXED = settings(
    max_examples=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype]) -> torch.Tensor:
    """A contiguous tensor of random bits."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    numel = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@st.composite
def views(draw: st.DrawFn, dtypes: list[torch.dtype], others: list[torch.Tensor]) -> torch.Tensor:
    """A tensor, a Parameter, or a view of a new tensor or of one of `others`."""
    tensor = draw(st.sampled_from(others)) if others and draw(st.booleans()) else None
    if tensor is None:
        tensor = draw(tensors(dtypes))
    ways = ["itself", "transposed", "from-1", "every-2nd", "flat", "parameter"]
    way = draw(st.sampled_from(ways))
    if way == "transposed":
        return tensor.permute(list(reversed(range(tensor.dim()))))
    if way == "from-1" and tensor.dim():
        return tensor[1:]
    if way == "every-2nd" and tensor.dim():
        return tensor[..., ::2]
    if way == "flat" and tensor.is_contiguous():
        return tensor.view(-1)
    if way == "parameter" and (tensor.is_floating_point() or tensor.is_complex()):
        return torch.nn.Parameter(tensor.detach())
    return tensor


@FIXED
@given(drawn=st.data())
def test_whatever_torch_saves(
    drawn: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected: dict[str, torch.Tensor] = OrderedDict() if drawn.draw(st.booleans()) else {}
    for name in drawn.draw(NAMES):
        detached = [tensor.detach() for tensor in expected.values()]
        expected[name] = drawn.draw(views([*IN_BOTH, torch.complex128], detached))
    path = tmp_path_factory.getbasetemp() / "drawn.pt"
    torch.save(expected, path)
    source = open_tensors(path)
    assert list(source.tensors) == list(expected)
    same(source.tensors, expected)
    for entry in source.tensors.values():
        offset, nbytes, crc = entry.offset, entry.nbytes, entry.crc32
        if entry.record is not None:
            offset, nbytes, crc = entry.record.offset, entry.record.nbytes, entry.record.crc32
        assert crc == zlib.crc32(entry.file.read(offset, nbytes))


def test_empty_views(tmp_path: Path) -> None:
    """Their offset may lie outside the storage; torch accepts this."""
    path = tmp_path / "npt_weights.pt"
    expected = {"a": torch.zeros(1, 0)[1:], "b": torch.zeros(3)[3:], "c": torch.zeros(2, 3)[:, 3:]}
    torch.save(expected, path)
    assert list(torch.load(path, weights_only=True)) == list(expected)
    same(open_tensors(path).tensors, expected)


@FIXED
@given(drawn=st.data())
def test_whatever_safetensors_saves(
    drawn: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = {name: drawn.draw(tensors(IN_BOTH)) for name in drawn.draw(NAMES)}
    words = st.text(max_size=5)
    # not an empty dict: of nothing at all and {}, safetensors 0.8 writes broken JSON
    metadata = drawn.draw(st.none() | st.dictionaries(words, words, min_size=1))
    path = tmp_path_factory.getbasetemp() / "drawn.safetensors"
    save_file(expected, path, metadata)
    source = open_tensors(path)
    same(source.tensors, expected)
    assert dict(source.metadata) == (metadata or {})
    assert all(entry.crc32 == 0 for entry in source.tensors.values())
