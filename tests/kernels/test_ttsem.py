"""The tests of this folder again, in bfloat16, under ttsem; and that ttsem sees what is wrong.

ttsem runs what Triton's compiler makes of a kernel, and stops at accesses out of bounds, races
between programs and results that are undefined (KERNELS 4).
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
from npt_fast.testing import Problem, make_inputs

spec = importlib.util.spec_from_file_location("kernels_copy", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
problem = Problem(tokens=3, hidden=40, intermediate=300)
x, h, base, modulation = make_inputs(
    problem, dtype=torch.bfloat16, device="cuda", requires_grad=False
)
if "swiglu" in sys.argv[1]:
    module.swiglu_fwd(x, h)
else:
    module.decode_mlp(x, h, *base, *modulation)
"""


def sanitize(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where Triton is imported with its compiler."""
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
    counts = {name: int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors")}
    print(counts)
    assert counts.pop("tests") >= 150
    assert not any(counts.values())
    assert "too large to be checked for races" not in done.stdout


PLANTED = {
    "oob_write": (
        "swiglu.py",
        "tl.store(inner_ptr + offs_t * stride_it + offs_f, inner, mask=mask)",
        "tl.store(inner_ptr + offs_t * stride_it + offs_f, inner)",
    ),
    "race": (
        "decode.py",
        "at = out_ptr + pid_s * stride_os + offs_m",
        "at = out_ptr + 0 * stride_os + offs_m",
    ),
}
"""What is wrong -> a file, what it says, what it says instead: a store without its mask; parts of
K that are all written to the same place."""


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
    # the line of the store, be it the one that was changed or the next
    store = text[: text.index("tl.store(", text.index(wrong))].count("\n") + 1
    assert done.returncode == 1 and said.startswith(f"{kind}: "), said
    assert f"{name}:{store}: tl.store(" in said
