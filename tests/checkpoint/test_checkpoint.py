"""The small files beside the weights, written by other programs or damaged."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import npt_fast as npt
from tests.checkpoints import (
    contents,
    layer_weights,
    read_weights,
    run,
    trained_checkpoint,
    write_checkpoint,
    write_shards,
)

CONFIG = '{"model_name": "test/model",\n "batch_size": 8, "gradient_clip_value": %s}'


def foreign(path: Path, layer: int, name: str, content: bytes) -> Path:
    """A complete checkpoint in which one file has the given content."""
    trained_checkpoint(path, layer)
    (path / name).write_bytes(content)
    return path


def strictly(text: str) -> Any:
    """Parse JSON without Python's extensions NaN and Infinity."""
    return json.loads(text, parse_constant=lambda number: pytest.fail(number))


# config.json: what can be read is carried over ----------------------------------------------------

READABLE = {
    "byte-order-mark": (CONFIG % "0.5").encode("utf-8-sig"),
    "crlf": (CONFIG % "0.5").replace("\n", "\r\n").encode(),
    "utf-16": (CONFIG % "0.5").encode("utf-16"),
    "utf-16-big-endian": (CONFIG % "0.5").encode("utf-16-be"),
    "utf-32": (CONFIG % "0.5").encode("utf-32"),
    "infinity": (CONFIG % "Infinity").encode(),
    "nan-in-utf-16": (CONFIG % "[NaN, -Infinity]").encode("utf-16"),
    "negative-zero": (CONFIG % "-0.0").encode(),
    "38-digits": (CONFIG % ("9" * 38)).encode(),
    "half-a-character": (CONFIG % r'"\ud800"').encode(),
    "98-deep": (CONFIG % ("[" * 98 + "]" * 98)).encode(),
}


@pytest.mark.parametrize("case", READABLE)
def test_a_config_is_carried_over_whoever_wrote_it(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(tmp_path / "a", 11, "config.json", READABLE[case])
    report = npt.merge([path], tmp_path / "out", verify=True)
    assert report.warnings == []
    carried = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert carried.pop("merge_info")["merged_from"] == [str(path)]
    assert repr(carried) == repr(json.loads(READABLE[case]))
    assert npt.inspect(path).model_name == npt.inspect(tmp_path / "out").model_name == "test/model"
    assert npt.verify(tmp_path / "out").passed
    npt.merge([tmp_path / "out"], tmp_path / "again", verify=True)
    code, out, err = run(capsys, "analyze", "--checkpoint", path, tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    assert strictly(out)["checkpoints"][0]["config"]["batch_size"] == 8


# config.json: what cannot be read is left out, with a warning -------------------------------------

UNREADABLE = {
    "empty": (b"", "is empty"),
    "zeros": (b"\0" * 300, "never reached the disk"),
    "cut": ((CONFIG % "0.5").encode()[:-1], "not valid JSON"),
    "latin-1": ((CONFIG % '"Zürich"').encode("latin-1"), "not utf-8"),
    "list": (b"[]", "not a JSON object"),
    "key-twice": (b'{"a": 1, "a": 2}', "key 'a' occurs twice"),
    "number-too-large": ((CONFIG % "1e400").encode(), "1e400 does not fit a 64-bit float"),
    "number-too-small": ((CONFIG % "1e-400").encode(), "1e-400 does not fit a 64-bit float"),
    "5000-digits": ((CONFIG % ("9" * 5000)).encode(), "not valid JSON"),
    "100-deep": ((CONFIG % ("[" * 100 + "]" * 100)).encode(), "nested more than 100 deep"),
    "100000-deep": ((CONFIG % ("[" * 100_000 + "]" * 100_000)).encode(), "nested too deep"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a", "git lfs pull"),
}


def no_file(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return replace


OTHER_THINGS = {
    "large": (lambda path: os.truncate(path, 100_000_001), "bytes of JSON; more than"),
    "directory": (no_file(Path.mkdir), "is a directory"),
    "pipe": (no_file(os.mkfifo), "not a regular file"),
    "link": (no_file(lambda path: path.symlink_to("/etc/passwd")), "is a symbolic link"),
    "broken-link": (no_file(lambda path: path.symlink_to("gone")), "is a symbolic link"),
}  # fmt: skip
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = OTHER_THINGS | {
    case: (lambda path, content=content: path.write_bytes(content), reason)
    for case, (content, reason) in UNREADABLE.items()
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_config_that_cannot_be_read_stops_nothing(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next input's config is used; in every verb, the line names the file and the reason."""
    spoil, reason = SPOILT[case]
    paths = [trained_checkpoint(tmp_path / "a", 11), trained_checkpoint(tmp_path / "b", 13)]
    spoil(paths[0] / "config.json")
    report = npt.merge(paths, tmp_path / "out", verify=True)
    (warning,) = report.warnings
    assert warning.startswith(f"{paths[0] / 'config.json'}: ") and reason in warning
    assert warning.endswith("; the file is not used")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config.pop("merge_info")["merged_layers"] == [11, 13]
    assert config == json.loads((paths[1] / "config.json").read_bytes())
    merged = read_weights(tmp_path / "out")
    assert list(merged) == [*layer_weights(11), *layer_weights(13)]
    assert npt.verify(tmp_path / "out").passed
    assert warning in npt.inspect(paths[0]).problems
    checked = npt.verify(paths[0])
    assert checked.passed == (case != "broken-link") and warning in checked.notes
    assert warning in npt.can_merge(paths).remarks
    code, out, err = run(capsys, "analyze", "--checkpoint", *paths, "--json")
    assert code == 0 and err.startswith(f"Warning: {paths[0] / 'config.json'}: ")
    assert strictly(out)["checkpoints"][0]["config"] is None


def test_no_config_is_written_where_none_can_be_read(tmp_path: Path) -> None:
    paths = [foreign(tmp_path / str(n), n, "config.json", b"{") for n in (1, 2)]
    report = npt.merge(paths, tmp_path / "out", verify=True)
    assert [line.partition(": ")[0] for line in report.warnings] == [
        str(path / "config.json") for path in paths
    ]
    assert not (tmp_path / "out" / "config.json").exists()
    assert npt.verify(tmp_path / "out").passed


def test_a_config_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    """Indentation makes it longer than the reader's limit."""
    path = foreign(tmp_path / "a", 1, "config.json", f'{{"a": [{"1," * 900_000}1]}}'.encode())
    assert npt.inspect(path).problems == []
    report = npt.merge([path, trained_checkpoint(tmp_path / "b", 2)], tmp_path / "out")
    (warning,) = report.warnings
    assert warning.startswith(f"{path / 'config.json'} with its merge_info: ")
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["learning_rate"] == 1e-3


def test_a_name_that_cannot_be_read_is_no_difference(tmp_path: Path) -> None:
    """A name in UTF-16 can be read and compared."""
    a = foreign(tmp_path / "a", 1, "config.json", '{"model_name": "other"}'.encode("utf-16"))
    b = trained_checkpoint(tmp_path / "b", 2)
    with pytest.raises(npt.MergeError, match="model_name is 'other' in"):
        npt.merge([a, b], tmp_path / "out")
    (a / "config.json").write_bytes(b"")
    npt.merge([a, b], tmp_path / "out")
    assert npt.inspect(tmp_path / "out").model_name == "test/model"


# npt_config.json: without it, residuals would be lost --------------------------------------------

KEPT = '{"format_version": 1, "layers": {"11": {"residual": "kept", "fidelity": %s}}}'


def with_kept_residual(path: Path, content: bytes) -> Path:
    write_checkpoint(path, layer_weights(11, modulation="dual"))
    (path / "npt_config.json").write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("fidelity", ["0.25", "NaN", "Infinity", "null"])
def test_the_record_of_the_residual_is_read(tmp_path: Path, encoding: str, fidelity: str) -> None:
    content = (KEPT % fidelity).replace(" ", "\r\n").encode(encoding)
    path = with_kept_residual(tmp_path / "a", content)
    report = npt.merge([path], tmp_path / "out", verify=True)
    assert not any("residual" in line for line in report.warnings)
    written = strictly((tmp_path / "out" / "npt_config.json").read_text())["layers"]["11"]
    assert written["residual"] == "kept"
    known = float(fidelity) if fidelity == "0.25" else None
    assert written["fidelity"] == npt.inspect(path).layers[0].fidelity == known


@pytest.mark.parametrize("case", SPOILT)
def test_without_the_record_of_the_residual_nothing_goes_on(tmp_path: Path, case: str) -> None:
    spoil, reason = SPOILT[case]
    path = with_kept_residual(tmp_path / "a", (KEPT % 1).encode())
    spoil(path / "npt_config.json")
    for verb in (npt.inspect, lambda path: npt.merge([path], tmp_path / "out")):
        with pytest.raises(npt.CheckpointError) as caught:
            verb(path)
        line = str(caught.value)
        assert line.startswith(f"{path / 'npt_config.json'}: ") and reason in line
        assert line.endswith("restore it, or, if none does, remove it")
    report = npt.verify(path)
    assert report.problems == [line]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("metadata", ["{", '{"format_version": 1, "format_version": 1}'])
def test_a_record_in_the_weights_that_cannot_be_read(tmp_path: Path, metadata: str) -> None:
    save_file(layer_weights(1), tmp_path / "plain.safetensors", {"npt_config": "@"})
    raw = (tmp_path / "plain.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps({**json.loads(raw[8 : 8 + size]), "__metadata__": {"npt_config": metadata}})
    header += " " * (-len(header) % 8)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + raw[8 + size :])
    with pytest.raises(npt.CheckpointError, match=f"{path}: metadata npt_config: "):
        npt.inspect(path)


# merge_summary.json: provenance and proof ---------------------------------------------------------


@pytest.mark.parametrize("case", SPOILT)
def test_without_a_summary_merging_goes_on_and_nothing_is_proved(tmp_path: Path, case: str) -> None:
    spoil, reason = SPOILT[case]
    path = tmp_path / "merged"
    npt.merge([trained_checkpoint(tmp_path / "a", 11)], path, verify=True)
    spoil(path / "merge_summary.json")
    report = npt.merge([path, trained_checkpoint(tmp_path / "b", 13)], tmp_path / "out")
    (warning,) = report.warnings
    assert warning.startswith(f"{path / 'merge_summary.json'}: ") and reason in warning
    assert warning in npt.inspect(path).problems
    checked = npt.verify(path)
    assert not checked.passed and warning in checked.problems
    assert len(checked.problems) == 1 + (case == "broken-link")
    assert checked.tensors == 36  # tensors are checked without the summary too


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
def test_a_summary_that_an_editor_saved_still_proves(tmp_path: Path, encoding: str) -> None:
    npt.merge([trained_checkpoint(tmp_path / "a", 11)], tmp_path / "out", verify=True)
    file = tmp_path / "out" / "merge_summary.json"
    file.write_bytes(file.read_text().replace("\n", "\r\n").encode(encoding))
    report = npt.verify(tmp_path / "out")
    assert report.passed and report.digests_matched == report.tensors == 36


# the index of shards ------------------------------------------------------------------------------

INDEX = "npt_weights.safetensors.index.json"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("metadata", ['"metadata": {"total_size": NaN},\r\n', ""], ids=["nan", "-"])
def test_an_index_is_read_whoever_wrote_it(tmp_path: Path, encoding: str, metadata: str) -> None:
    path = write_shards(tmp_path / "a", [layer_weights(1), layer_weights(2)])
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    text = "{" + metadata + json.dumps({"weight_map": weight_map}, indent=1)[1:]
    (path / INDEX).write_bytes(text.encode(encoding))
    options = npt.MergeOptions(format="safetensors", max_shard_size=2000)
    npt.merge([path], tmp_path / "out", verify=True, options=options)
    merged = read_weights(tmp_path / "out")
    assert merged.keys() == weight_map.keys()
    strictly((tmp_path / "out" / INDEX).read_text())


@pytest.mark.parametrize("case", SPOILT)
def test_an_index_that_cannot_be_read_is_refused_by_name(tmp_path: Path, case: str) -> None:
    spoil, reason = SPOILT[case]
    path = write_shards(tmp_path / "a", [layer_weights(1), layer_weights(2)])
    spoil(path / INDEX)
    with pytest.raises(npt.CheckpointError) as caught:
        npt.merge([path], tmp_path / "out")
    assert str(caught.value).startswith(f"{path / INDEX}: ") and reason in str(caught.value)


# written JSON is strict ---------------------------------------------------------------------------


def test_all_json_that_a_merge_writes_is_what_every_reader_reads(tmp_path: Path) -> None:
    """The only exception: a config that is carried over keeps its NaN."""
    a = foreign(tmp_path / "a", 1, "config.json", (CONFIG % "NaN").encode("utf-16"))
    (a / "npt_config.json").write_text('{"format_version": 1, "layers": {"1": {"fidelity": NaN}}}')
    options = npt.MergeOptions(format="safetensors", max_shard_size=1000)
    npt.merge([a, trained_checkpoint(tmp_path / "b", 2)], tmp_path / "out", options=options)
    files = contents(tmp_path / "out")
    for name in ("npt_config.json", "merge_summary.json", INDEX):
        strictly(files[name].decode("utf-8"))
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    for name in shards:
        assert load_file(tmp_path / "out" / name)
        raw = files[name]
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        strictly(header["__metadata__"]["npt_config"])
    assert math.isnan(json.loads(files["config.json"])["gradient_clip_value"])


def test_a_description_that_npt_fast_did_not_write(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(11))
    (path / "npt_config.json").write_text('{"error": "not found"}')
    told = r"npt_config\.json: has no format_version; .*restore it, or, if none does, remove it"
    with pytest.raises(npt.CheckpointError, match=told):
        npt.inspect(path)
    (path / "npt_config.json").write_text('{"format_version": 99}')
    with pytest.raises(npt.CheckpointError, match=r"update npt_fast$"):
        npt.inspect(path)
