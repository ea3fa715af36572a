"""Imports go one way (design.md#layering), and nothing is in the way of other packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "npt_fast"

# part of the library -> the parts it may import, besides itself
ALLOWED = {
    "arguments": {"errors", "schema"},
    "config": {"arguments", "errors", "layer_names", "paths", "schema", "text_sources"},
    "layer_names": {"errors"},
    "errors": set[str](),
    "tables": {"errors"},
    "paths": {"errors"},
    "text_sources": {"errors", "paths"},
    "schema": {"errors"},
    "pictures": {"checkpoint", "errors", "hub", "layer_names", "paths"},
    "report_files": {"checkpoint", "errors", "paths", "schema"},
    "hub": {"errors", "schema"},
    "kernels": set[str](),
    "checkpoint": {
        *("arguments", "config", "errors", "hub", "layer_names", "paths", "schema", "tables"),
    },
    "functional": {"config", "errors", "kernels"},
    "initialization": {"config", "checkpoint"},
    "mlp_layout": {"checkpoint", "errors", "kernels"},
    "called_mlp": {"errors", "functional", "mlp_layout"},
    "moe_mlp": {"called_mlp", "errors", "mlp_layout"},
    "kept_cast": set[str](),
    "modules": {
        *("config", "errors", "checkpoint", "functional", "called_mlp", "initialization"),
        *("kept_cast", "mlp_layout", "moe_mlp"),
    },
    "hf": {
        *("arguments", "config", "errors", "hub", "layer_names", "paths", "schema", "checkpoint"),
        *("called_mlp", "functional", "mlp_layout", "modules", "moe_mlp", "tables"),
    },
    "training": {
        *("arguments", "config", "errors", "layer_names", "paths", "schema", "text_sources"),
        *("called_mlp", "checkpoint", "functional", "modules", "hf", "tables"),
    },
    "transfer": {
        *("arguments", "config", "errors", "layer_names", "paths", "schema", "checkpoint"),
        *("functional", "called_mlp", "mlp_layout", "modules", "moe_mlp", "hf", "pictures"),
        "report_files",
        "tables",
    },
    "vllm": {
        "called_mlp",
        "checkpoint",
        "errors",
        "functional",
        "hf",
        "modules",
        "paths",
        "schema",
    },
}
FOREIGN = {
    "arguments": set[str](),
    "checkpoint": {"numpy"},
    "config": set[str](),
    "errors": set[str](),
    "hub": {"huggingface_hub"},
    "kept_cast": {"torch"},
    "layer_names": set[str](),
    "paths": set[str](),
    "schema": set[str](),
    "tables": set[str](),
    "text_sources": set[str](),
    "kernels": {"torch", "triton"},
    "cli": {"cyclopts", "prompt_toolkit", "rich"},
}
"""Packages outside the standard library that a part may use, for the parts that are settled."""


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py")) + [
        PACKAGE / path.relative_to(ROOT)
        for link in ("benchmarks", "cli", "kernels")  # Path.rglob does not follow links
        for path in sorted((ROOT / link).rglob("*.py"))
    ]


def part_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, at any depth; relative ones made absolute."""
    package = ["npt_fast", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module or ""]))
            yield from (f"{module}.{alias.name}" for alias in node.names)


CASES = sorted(set(sources()))


def test_sources_are_found_through_the_links() -> None:
    assert {"checkpoint", "cli", "config", "errors"} <= {part_of(path) for path in CASES}
    assert PACKAGE / "cli" / "shell" / "commands" / "tokens.py" in CASES


@pytest.mark.parametrize("path", CASES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "npt_fast":
            continue
        target = parts[1] if len(parts) > 1 else "npt_fast"
        if part == "benchmarks":  # measures everything that is below the command line
            assert target != "cli", f"{path} imports {name}"
            continue
        if part in ("__init__", "__main__", "cli", "testing") or target == part:
            continue
        assert part in ALLOWED, f"{path}: say in tests/test_layering.py what {part} may import"
        assert target in ALLOWED[part], f"{path} imports {name}"


def module_of(path: Path) -> str:
    return ".".join(["npt_fast", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(
        ".__init__"
    )


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_have_no_circle() -> None:
    """Those within functions and for type checkers count: a reader meets them all the same."""
    modules = {module_of(path): path for path in CASES}
    graph = {
        name: {
            target
            for found in imports(path)
            for target in (found, found.rpartition(".")[0])
            if target in modules and target not in (name, "npt_fast")
        }
        for name, path in modules.items()
        if name != "npt_fast"  # loads everything on first use, and is what a user imports
    }
    assert circle(graph) == []
    assert circle({**graph, "npt_fast.errors": {"npt_fast.cli.main"}}) != []


@pytest.mark.parametrize(
    "path",
    [*CASES, *sorted((ROOT / "tests").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_stay_readable_at_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("path", CASES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_packages(path: Path) -> None:
    part = part_of(path)
    for name in imports(path):
        root = name.split(".")[0]
        assert root != "kernels", f"{path}: a bare `kernels` is Hugging Face's package"
        if root in sys.stdlib_module_names or root == "npt_fast" or part not in FOREIGN:
            continue
        assert root in FOREIGN[part], f"{path} imports {name}"


def test_checkpoints_are_never_unpickled() -> None:
    for path in CASES:
        if part_of(path) in ("checkpoint", "cli"):
            assert not {"pickle", "marshal", "shelve"} & {n.split(".")[0] for n in imports(path)}
            assert "torch.load" not in {
                ast.unparse(node.func)
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call)
            }


def test_kernels_is_no_package_of_its_own() -> None:
    """A ``kernels/__init__.py`` would shadow the package that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "cli").is_symlink()
    assert (PACKAGE / "benchmarks").is_symlink()
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"


def test_a_bare_import_of_kernels_is_not_ours() -> None:
    """From the repository's root, where a folder of that name is first on the path."""
    code = "import kernels; print(getattr(kernels, '__file__', None))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    # without the real package, Python makes an empty namespace of the folder: that shadows nothing
    assert result.stdout.strip() in ("", "None") or str(ROOT / "kernels") not in result.stdout
