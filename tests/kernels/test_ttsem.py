"""The tests of this folder, run again in bfloat16 under ttsem, and tests that ttsem finds faults.

ttsem runs what Triton's compiler makes of a kernel, and stops at accesses out of bounds, races
between programs and undefined results (design.md#checks-without-a-gpu).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

PROGRAM = """
import importlib.util, sys, torch

spec = importlib.util.spec_from_file_location("kernels_copy", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
a, b = torch.randn(2, 2, 3, 40, dtype=torch.bfloat16, device="cuda")
if "swiglu" in sys.argv[1]:
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
    assert counts["tests"] >= 150 and counts["failures"] == counts["errors"] == 0
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
        "s_at = s_ptr + pid_c * stride_sc + offs_t[:, None] * stride_st + offs_c[None, :]\n"
        "    tl.store(s_at, s, mask=whole)",
        "s_at = s_ptr + offs_t[:, None] * stride_st + offs_c[None, :]\n"
        "    tl.store(s_at, s, mask=whole)",
    ),
}
"""Fault -> file, right code, wrong code: a store without its mask; all projections' coefficients in
the same place."""


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("planted", [False, True], ids=["as-it-is", "planted"])
def test_what_is_wrong_is_seen(tmp_path: Path, kind: str, planted: bool) -> None:
    name, right, wrong = PLANTED[kind]
    source = (ROOT / "kernels" / name).read_text()
    assert source.count(right) == 1
    copy, program = tmp_path / name, tmp_path / "program.py"
    text = source.replace(right, wrong) if planted else source
    copy.write_text(text)
    program.write_text(PROGRAM)
    done = sanitize(program, "--", copy)
    said = done.stdout + done.stderr
    if not planted:
        assert done.returncode == 0 and said.startswith("ok: "), said
        return
    # the line of the store: the changed one or the next
    store = text[: text.index("tl.store(", text.index(wrong))].count("\n") + 1
    assert done.returncode == 1 and said.startswith(f"{kind}: "), said
    assert f"{name}:{store}: tl.store(" in said
