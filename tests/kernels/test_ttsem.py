"""The tests of this folder, run again in bfloat16 under ttsem, and tests that ttsem finds faults.

ttsem runs what Triton's compiler makes of a kernel, and stops at accesses out of bounds, races
between programs and undefined results (design.md#checks-without-a-gpu).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

PROGRAM = """
import importlib.util, sys, torch

a, b = torch.randn(2, 2, 3, 40, dtype=torch.bfloat16, device="cuda")
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("kernels_copy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "swiglu" in path:
        module.swiglu_fwd(a[0], b[0])
    else:
        module.coefficients_fwd(a, b, 4)
"""


def sanitize(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ttsem in a new process, where Triton is imported with its compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ttsem.sanitize", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_other_tests(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    options = ["-q", "-m", "ttsem", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = sanitize("pytest", Path(__file__).parent, *options)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (suite,) = ElementTree.parse(report).iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors")}
    skipped = {
        case.attrib["name"] for case in suite.iter("testcase") if case.find("skipped") is not None
    }
    print(counts, skipped)
    assert counts["tests"] >= 140 and counts["failures"] == counts["errors"] == 0
    assert skipped <= {"tests.kernels.test_roofline"}  # none of its tests run under ttsem
    assert "too large to be checked for races" not in done.stdout


PLANTED = {
    "oob_write": (
        "swiglu.py",
        "tl.store(inner_ptr + offs_t * stride_it + offs_f, inner, mask=mask)",
        "tl.store(inner_ptr + offs_t * stride_it + offs_f, inner)",
    ),
    "race": (
        "coefficients.py",
        "s_at = s_ptr + pid_c * stride_sc + offs_t[:, None] * stride_st + offs_c[None, :] * "
        "stride_sk\n    tl.store(s_at, s, mask=whole)",
        "s_at = s_ptr + offs_t[:, None] * stride_st + offs_c[None, :] * stride_sk\n"
        "    tl.store(s_at, s, mask=whole)",
    ),
}
"""Fault -> file, right code, wrong code: a store without its mask; all projections' coefficients in
the same place."""


def run_program(folder: Path, texts: Mapping[str, str]) -> tuple[int, str]:
    """Launch a kernel of each text, by the name of its file; the exit code and what was said."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    for name, text in texts.items():
        (folder / name).write_text(text)
    done = sanitize(program, "--", *(folder / name for name in texts))
    return done.returncode, done.stdout + done.stderr


def test_nothing_is_seen_where_nothing_is_wrong(tmp_path: Path) -> None:
    names = [name for name, _, _ in PLANTED.values()]
    code, said = run_program(tmp_path, {n: (ROOT / "kernels" / n).read_text() for n in names})
    assert code == 0 and said.startswith("ok: "), said


@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_wrong_is_seen(tmp_path: Path, kind: str) -> None:
    name, right, wrong = PLANTED[kind]
    source = (ROOT / "kernels" / name).read_text()
    assert source.count(right) == 1
    text = source.replace(right, wrong)
    code, said = run_program(tmp_path, {name: text})
    # the line of the store: the changed one or the next
    store = text[: text.index("tl.store(", text.index(wrong))].count("\n") + 1
    assert code == 1 and said.startswith(f"{kind}: "), said
    assert f"{name}:{store}: tl.store(" in said
