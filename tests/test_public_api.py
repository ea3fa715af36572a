"""``import npt_fast``: what it offers, and what it must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import npt_fast as npt

ROOT = Path(__file__).parent.parent
SOURCE = Path(npt.__file__)


def python(code: str, *options: str) -> str:
    result = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


@pytest.mark.parametrize("name", npt.__all__)
def test_every_name_resolves_to_its_home(name: str) -> None:
    value = getattr(npt, name)
    assert value.__name__ == name
    assert value.__module__ == npt._HOMES[name]


def test_three_lists_of_names_agree() -> None:
    """Type checkers, the loader and ``import *`` see the same names from the same modules."""
    (guarded,) = [
        node
        for node in ast.parse(SOURCE.read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    for_type_checkers = {
        alias.asname or alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert for_type_checkers == npt._HOMES
    assert sorted(npt.__all__) == list(npt.__all__) == sorted(npt._HOMES)
    assert set(dir(npt)) == {*npt.__all__, "__version__"}


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'merges'"):
        _ = npt.merges  # type: ignore[attr-defined]


def test_version_of_a_source_tree(tmp_path: Path) -> None:
    """Where nothing is installed, and so no metadata can be asked."""
    (tmp_path / "npt_fast").symlink_to(SOURCE.parent)
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import npt_fast as n"
    assert python(f"{code}; print(n.__version__)", "-I", "-S") == npt.__version__
    assert npt.__version__[0].isdigit()


HEAVY = ("torch", "numpy", "triton", "transformers", "safetensors", "cyclopts", "rich")


def test_import_loads_nothing_heavy() -> None:
    loaded = python("import npt_fast, sys; print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


def test_merging_verifying_and_describing_load_no_torch(tmp_path: Path, layer11: Path) -> None:
    code = f"""
import sys, npt_fast as npt
npt.merge([{str(layer11)!r}], {str(tmp_path / "out")!r}, verify=True)
assert npt.verify({str(tmp_path / "out")!r}).passed
npt.inspect({str(layer11)!r}, values=True)
print(*sys.modules)
"""
    assert not {"torch", "triton", "transformers", "safetensors"} & set(python(code).split())


def test_a_plain_copy_loads_no_numpy(tmp_path: Path, layer11: Path) -> None:
    code = f"""
import sys, npt_fast as npt
npt.merge([{str(layer11)!r}], {str(tmp_path / "out")!r})
print(*sys.modules)
"""
    assert "numpy" not in python(code).split()


def test_errors_are_one_family() -> None:
    for error in (npt.CheckpointError, npt.MergeError, npt.StorageError, npt.VerificationError):
        assert issubclass(error, npt.NPTError)
    codes = [npt.NPTError.exit_code, npt.VerificationError.exit_code, npt.StorageError.exit_code]
    assert codes == [1, 3, 4]


def test_paths_may_be_text(tmp_path: Path, layer11: Path) -> None:
    npt.merge([str(layer11)], str(tmp_path / "out"), verify=True)
    assert npt.verify(str(tmp_path / "out")).passed
    assert npt.inspect(str(tmp_path / "out")).layers[0].layer == 11
    assert npt.can_merge([str(layer11), str(tmp_path / "out")]).mergeable
