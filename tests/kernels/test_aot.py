"""Compiled kernels; CI compiles all of them by `npt-fast kernels`."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from npt_fast.kernels import aot
from tests.processes import run_python

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels.md"


def compiler(code: str) -> Any:
    """Run a script in a process where Triton compiles, and parse the JSON it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    setup = (
        "import json\nfrom npt_fast.kernels import aot\nfrom npt_fast.kernels._launch import *\n"
    )
    result = run_python(setup + code, environment=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


SOME = """
names, some = [], {}
for number, arch in enumerate(aot.TARGETS):
    chosen = {}
    for index, case in enumerate(aot.cases(Target.parse(arch))):
        kernel = case.launch.kernel.fn.__name__
        names.append([arch, kernel, case.config])
        chosen.setdefault(kernel, index)
    third = list(chosen.values())[number % 3 :: 3]
    found = [aot.compile_case(arch, index) for index in third]
    some[arch] = [[c.kernel, c.registers, c.mma, c.problems] for c in found]
print(json.dumps([names, some]))
"""


@pytest.fixture(scope="module")
def compiled() -> Any:
    """Arch, kernel and config of all that can be launched; a third of the kernels, for each."""
    return compiler(SOME)


@pytest.mark.slow
def test_the_table_has_all_that_can_be_launched_and_nothing_wrong(compiled: Any) -> None:
    lines = [line.split("|") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line[1:-1]] for line in lines[2:]]
    names = [[arch, f"_{kernel}_kernel", config] for arch, kernel, config, *_ in rows]
    assert names == compiled[0]
    assert {row[-1] for row in rows} == {"ok"}
    assert {row[4] for row in rows} == {"0"}
    assert len({tuple(name) for name in names}) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.TARGETS)
def test_the_table_is_what_the_compiler_says(compiled: Any, arch: str) -> None:
    """Some rows; another Triton gives other numbers, but no problems."""
    found = compiled[1][arch]
    assert len(found) >= (2 if arch == "sm_75" else 3)  # of the 4 of `gemm`, or of all 11
    for kernel, registers, mma, problems in found:
        assert registers > 0 and problems == [], kernel
        kinds = "modulated", "probe", "decode_products", "decode_inner", "decode_low_rank"
        assert (mma > 0) == kernel.startswith(kinds)


@pytest.mark.slow
def test_every_kernel_is_compiled_for_two_gpus(compiled: Any) -> None:
    names = {name for _, name, _ in compiled[0]}
    found = Counter(f"_{kernel}_kernel" for some in compiled[1].values() for kernel, *_ in some)
    assert len(names) == 11 and set(found) == names and min(found.values()) >= 2


WRONG = """
from npt_fast.kernels import _tuning
found = []
for arch, tiles in ("sm_80", Tiles(128, 256, 64, 4, 3)), ("sm_120", Tiles(128, 128, 64, 8, 4)):
    with _tuning.forced_tiles(tiles):
        cases = aot.cases(Target.parse(arch))
        names = [case.launch.kernel.fn.__name__ for case in cases]
        index = names.index("_modulated_gate_up_kernel")
        c = aot.compile_case(arch, index)
        allowed = aot.compile_case(arch, index, max_spill=c.spill_bytes)
        found.append([c.ok, *c.problems])
        found.append([allowed.ok, *allowed.problems])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_what_is_wrong_is_named() -> None:
    spilled, allowed, too_large, still_too_large = compiler(WRONG)
    assert spilled[0] is False and any("bytes are spilled" in line for line in spilled[1:])
    assert allowed == [True]
    for ok, *said in (too_large, still_too_large):
        assert ok is False and any("bytes of shared memory" in line for line in said), said
