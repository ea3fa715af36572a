"""The program as a whole: spellings, exit codes, streams, and how failures look."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import npt_fast as npt
from tests.checkpoints import layer_weights, run, trained_checkpoint, write_checkpoint

PROGRAM = [sys.executable, "-m", "npt_fast"]


def shell(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_python_m(tmp_path: Path, layer11: Path, layer13: Path) -> None:
    result = shell("merge", "--checkpoints", layer11, layer13, "--output", tmp_path / "out")
    assert result.returncode == 0
    assert "Successfully merged 2 NPT layers" in result.stdout
    assert "Traceback" not in result.stderr


def test_the_installed_program_is_the_same(layer11: Path) -> None:
    program = Path(sys.executable).parent / "npt-fast"
    result = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == npt.__version__


@pytest.mark.parametrize("verb", [[], ["merge"], ["analyze"], ["verify"]], ids=" ".join)
def test_help(capsys: Any, verb: list[str]) -> None:
    code, out, _ = run(capsys, *verb, "--help")
    assert code == 0
    assert "Usage: npt-fast" in out
    assert "\x1b" not in out


def test_help_of_a_verb_shows_its_example(capsys: Any) -> None:
    _, out, _ = run(capsys, "compare", "--help")
    assert "npt-fast compare --checkpoint experiments/merged_11_13_23" in out
    code, out, _ = run(capsys, "--help")  # after that too, the list of verbs has its own lines
    assert code == 0 and "npt-fast compare --" not in out


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    code = """
import sys
from npt_fast.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    print(*sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    *shown, modules = result.stdout.splitlines()
    assert any("merge" in line for line in shown)
    loaded = modules.split()
    assert not {"torch", "numpy", "triton", "transformers"} & set(loaded)
    assert len(loaded) < 500  # 329, in 0.4 s; torch alone would add 1,000


USAGE = {
    "unknown-verb": (["frobnicate"], "frobnicate"),
    "unknown-option": (["merge", "--checkpoints", "a", "--output", "b", "--warp"], "--warp"),
    "no-output": (["merge", "--checkpoints", "a"], "--output"),
    "no-checkpoints": (["merge", "--output", "b"], "--checkpoints"),
    "an-empty-list": (["merge", "--checkpoints", "--output", "b"], "--checkpoints"),
    "an-empty-list-to-analyze": (["analyze", "--checkpoint", "--json"], "--checkpoint"),
    "an-empty-list-to-evaluate": (["evaluate", "--checkpoint"], "--checkpoint"),
    "bad-choice": (
        ["merge", "--checkpoints", "a", "--output", "b", "--on-conflict", "newest"],
        "newest",
    ),
    "bad-size": (
        ["merge", "--checkpoints", "a", "--output", "b", "--max-shard-size", "5 apples"],
        "apples",
    ),
    "nothing-to-verify": (["verify"], "checkpoint"),
    "nothing-to-analyze": (["analyze"], "--checkpoint"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_exit_code_2(capsys: Any, case: str) -> None:
    arguments, expected = USAGE[case]
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and err.count("\n") == 1
    assert expected.lower() in err.lower()


HELP = {
    "frobnicate": "npt-fast --help lists verbs",
    "--help frobnicate": "npt-fast --help lists verbs",
    "merge": "npt-fast merge --help lists its options",
    "merge --checkpoints a --output b --warp": "npt-fast merge --help lists its options",
    "train --train_layers 1 --np_rank 0": "npt-fast train --help lists its options",
    "verify a b": "npt-fast verify --help lists its options",
    "kernels --warp": "npt-fast kernels --help lists its options",
    "kernels roofline --tokens x": "npt-fast kernels roofline --help lists its options",
}


@pytest.mark.parametrize("line", HELP)
def test_wrong_usage_points_to_the_help_of_its_verb(capsys: Any, line: str) -> None:
    code, out, err = run(capsys, *line.split())
    assert (code, out) == (2, "")
    assert err.endswith(f" ({HELP[line]})\n") and err.count("\n") == 1


def test_a_failure_is_one_line_on_stderr_and_exit_code_1(capsys: Any, tmp_path: Path) -> None:
    for arguments in (
        ["merge", "--checkpoints", tmp_path / "x", "--output", tmp_path / "out"],
        ["analyze", "--checkpoint", tmp_path / "x"],
        ["verify", tmp_path / "x"],
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (1, "")
        assert err == f"Error: Checkpoint not found: {tmp_path / 'x'}\n"


def test_a_full_disk_is_exit_code_4(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "a", layer_weights(1))
    real = os.statvfs(tmp_path)
    full = os.statvfs_result([*real[:4], 0, *real[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    code, _, err = run(capsys, "merge", "--checkpoints", path, "--output", tmp_path / "out")
    assert code == 4
    assert "bytes needed, 0 free" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(MemoryError(), 4), (KeyboardInterrupt(), 130)], ids=["memory", "ctrl-c"]
)
def test_other_ends(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: int
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("npt_fast.checkpoint.hub_headers.open_checkpoint", fail)
    found, out, err = run(capsys, "analyze", "--checkpoint", tmp_path)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1 and "Traceback" not in err


def test_our_own_bugs_are_not_hidden(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("npt_fast.checkpoint.hub_headers.open_checkpoint", fail)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "analyze", "--checkpoint", tmp_path)


@pytest.mark.parametrize("end", ["sys.exit(3)", "sys.exit(None)", "raise RuntimeError"])
@pytest.mark.parametrize("before", [True, False])
def test_what_is_registered_for_the_end_is_called(before: bool, end: str) -> None:
    """The program then ends at once, unless something was registered before it began."""
    code = f"""
import atexit, sys
from npt_fast import __main__
from npt_fast.cli import main
class Module:
    def __del__(self):
        print("taken down")
kept = Module()
if {before}:
    atexit.register(print, "registered before")
def program():
    atexit.register(print, "registered by a library")
    {end}
main.main = program
__main__.main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = {"sys.exit(3)": 3, "sys.exit(None)": 0, "raise RuntimeError": 1}
    assert ended.returncode == expected[end] and ("Traceback" in ended.stderr) == ("raise" in end)
    also = "registered before\ntaken down\n" if before else ""
    assert ended.stdout == "registered by a library\n" + also


def test_a_terminal_that_knows_only_ascii(tmp_path: Path, layer11: Path) -> None:
    arguments = ["merge", "--checkpoints", layer11, "--output", tmp_path / "out", "--verify"]
    result = shell(*arguments, PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert result.returncode == 0
    assert "? Verification passed!" in result.stdout
    assert "Traceback" not in result.stderr


def test_a_reader_that_goes_away(layer11: Path) -> None:
    """``npt-fast analyze ... | head -1``"""
    process = subprocess.Popen(
        [*PROGRAM, "analyze", "--checkpoint", *[str(layer11)] * 40],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() != 0
    assert err == b""


@pytest.mark.parametrize("variable", ["", "FORCE_COLOR"])
def test_no_colour_in_a_pipe(tmp_path: Path, layer11: Path, variable: str) -> None:
    arguments = ["merge", "--checkpoints", layer11, "--output", tmp_path / "out", "--verify"]
    result = shell(*arguments, **({variable: "1"} if variable else {}))
    assert result.returncode == 0
    assert "\x1b" not in result.stdout + result.stderr
    assert all(line.startswith("Warning: ") for line in result.stderr.splitlines())


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path / "a", 1, d=512, f=2048, rank=128)
    process = subprocess.Popen(
        [*PROGRAM, "merge", "--checkpoints", str(path), "--output", str(tmp_path / "out"),
         "--verify"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.npt-fast-*")) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (143, 0)  # 0: it was done already
    assert b"Traceback" not in err
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["a"] or (left == ["a", "out"] and npt.verify(tmp_path / "out").passed)


def test_tracebacks_never_come_from_bad_files(capsys: Any, tmp_path: Path) -> None:
    for number, data in enumerate((b"", b"\x00" * 999, b"PK\x03\x04" + b"x" * 99)):
        for suffix in ("pt", "safetensors"):
            path = tmp_path / f"{number}.{suffix}"
            path.write_bytes(data)
            code, out, err = run(capsys, "analyze", "--checkpoint", path)
            assert (code, out) == (1, "")
            assert err.startswith(f"Error: {path}: ") and err.count("\n") == 1
