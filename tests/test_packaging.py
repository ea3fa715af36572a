"""The wheel, installed where nothing else is: what a user gets from pip."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import npt_fast as npt

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def output_of(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, since setuptools would put into it what older builds left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("npt_fast", "benchmarks", "cli", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True)
    output_of(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", folder, copy)
    (found,) = folder.glob("*.whl")
    return found


def test_what_is_in_it(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    for part in ("benchmarks", "cli", "kernels"):  # links in the tree
        modules = {path.name for path in (ROOT / part).glob("*.py")}
        assert modules and {f"npt_fast/{part}/{module}" for module in modules} <= set(names)
    assert "npt_fast/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "npt_fast",
        f"npt_fast-{npt.__version__}.dist-info",
    }
    assert not [name for name in names if "/results/" in name]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_it_merges_and_verifies(
    version: str, wheel: Path, layer11: Path, layer13: Path, tmp_path: Path
) -> None:
    python = f"python{version}"
    if subprocess.run(["sh", "-c", f"{python} -c ''"], capture_output=True).returncode:
        pytest.skip(f"there is no {python} here")
    environment = tmp_path / "venv"
    output_of(python, "-m", "venv", environment)
    constraints = ROOT / "constraints.txt"
    output_of(environment / "bin" / "python", *PIP, "install", "-c", constraints, wheel)
    program, merged = environment / "bin" / "npt-fast", tmp_path / "merged"
    assert output_of(program, "--version") == f"{npt.__version__}\n"
    output_of(program, "merge", "--checkpoints", layer11, layer13, "--output", merged, "--verify")
    assert "Verification passed" in output_of(program, "verify", merged)
