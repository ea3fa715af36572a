"""What a user gets from pip: sdists and wheels, however the source tree came to the builder."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest

import npt_fast as npt
from tests.test_layering import part_of, sources

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
TEXTS = ("README.md", "code.txt", "french.txt", "news.txt", "story.txt")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
TREES = ("git archive", "links as text", "links lost")
WHEELS = (*TREES, "sdist")
CLASSIFIER = "Programming Language :: Python :: 3."
VERSIONS = [line.split(" :: ")[-1] for line in PROJECT["classifiers"] if CLASSIFIER in line]

NEEDS = {
    **dict.fromkeys(("__init__", "__main__", "checkpoint", "config", "errors"), "core"),
    **dict.fromkeys(("layer_names", "paths", "report_files", "schema"), "core"),
    **dict.fromkeys(("arguments", "tables", "text_sources"), "core"),
    **dict.fromkeys(("called_mlp", "functional", "hf", "initialization"), "hf"),
    **dict.fromkeys(("kept_cast", "mlp_layout", "modules", "moe_mlp"), "hf"),
    **dict.fromkeys(("hub", "testing"), "hf"),
    "vllm": "serve",
    "transfer": "hf",
    "kernels": "kernels",
    "training": "train",
    "pictures": "plot",
    "cli": "interact",
    "benchmarks": "dev",
}
"""Part of the library -> the extra that brings what it imports."""
IF_THERE = {"_typeshed", "liger_kernel", "ttsem", "vllm", "httpx", "openai", "psutil"}
"""What no extra of the tests brings: type checkers know the first; the others are used where they
are installed, the last three with vLLM."""


def output_of(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(tree: Path, out: Path, *kinds: str) -> None:
    hooks = "; ".join(f"backend.build_{kind}({str(out)!r})" for kind in kinds)
    output_of(sys.executable, "-c", f"import setuptools.build_meta as backend; {hooks}", cwd=tree)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of ``WHEELS``, with its wheel and, if it was built from a tree, its sdist.

    The trees are archives of the tracked files as they are now. A tree in use would not do: what
    older builds left in ``build/`` gets into the wheel.
    """
    folder = tmp_path_factory.mktemp("built")
    author = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    commit = output_of("git", *author, "stash", "create").strip() or "HEAD"  # stashes nothing
    archives = {kind: folder / f"tree.{kind}" for kind in ("tar", "zip")}
    for kind, archive in archives.items():
        output_of("git", "archive", f"--format={kind}", f"--output={archive}", commit)
    for name in TREES:
        tree = folder / "trees" / name
        if name == "git archive":
            tarfile.open(archives["tar"]).extractall(tree, filter="data")
        else:
            ZipFile(archives["zip"]).extractall(tree)  # writes the target of a link as a file
        links = [tree / "npt_fast" / link for link in ("benchmarks", "cli", "kernels")]
        assert all(link.is_symlink() == (name == "git archive") for link in links)
        if name == "links lost":
            for link in links:
                link.unlink()
        build(tree, folder / name, "sdist", "wheel")
    (archive,) = (folder / "git archive").glob("*.tar.gz")
    tarfile.open(archive).extractall(folder / "trees" / "sdist", filter="data")
    (tree,) = (folder / "trees" / "sdist").iterdir()
    build(tree, folder / "sdist", "wheel")
    return folder


def wheel_of(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_every_wheel_holds_the_same_files(built: Path) -> None:
    contents = [
        {one.filename: one.CRC for one in ZipFile(wheel_of(built / name)).infolist()}
        for name in WHEELS
    ]
    assert contents == [contents[0]] * len(WHEELS)
    modules = {f"npt_fast/{path.relative_to(ROOT / 'npt_fast')}" for path in sources()}
    assert {name for name in contents[0] if ".dist-info/" not in name} == {
        *modules,
        "npt_fast/py.typed",
        *(f"npt_fast/training/texts/{name}" for name in TEXTS),
        "npt_fast/transfer/default_suite.yaml",
    }


@pytest.mark.slow
def test_every_sdist_holds_the_same_files(built: Path) -> None:
    lists = []
    for name in TREES:
        (archive,) = (built / name).glob("*.tar.gz")
        lists.append(sorted(tarfile.open(archive).getnames()))
    assert lists == [lists[0]] * len(TREES)
    inside = {name.partition("/")[2] for name in lists[0]}
    assert {"CHANGELOG.md", "LICENSE", "pyproject.toml", "cli/main.py"} <= inside
    assert not [name for name in inside if name.startswith(("tests", "npt_fast/cli"))]


@pytest.mark.slow
def test_links_of_the_description_work_where_there_is_no_repository(built: Path) -> None:
    wheel = ZipFile(wheel_of(built / "git archive"))
    (name,) = (one for one in wheel.namelist() if one.endswith(".dist-info/METADATA"))
    text = wheel.read(name).decode()
    assert "# npt_fast" in text and "docs/security.md" in text
    assert re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", text) == []


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_it_merges_and_verifies(
    version: str, built: Path, layer11: Path, layer13: Path, tmp_path: Path
) -> None:
    """With the core requirements, from one of the wheels, which all hold the same files."""
    python = f"python{version}"
    if subprocess.run(["sh", "-c", f"{python} -c ''"], capture_output=True).returncode:
        pytest.skip(f"there is no {python} here")
    output_of(python, "-m", "venv", "--without-pip", tmp_path / "environment")
    programs = tmp_path / "environment" / "bin"
    # with the pip of these tests: making one in every environment takes longer than the rest
    wheel, constraints = wheel_of(built / WHEELS[0]), ROOT / "constraints.txt"
    output_of(*PIP, "--python", programs / "python", "install", "-c", constraints, wheel)
    program, merged = programs / "npt-fast", tmp_path / "merged"
    run = ("-m", "npt_fast")  # from a folder that holds no npt_fast
    assert output_of(program, "--version", cwd=tmp_path) == f"{npt.__version__}\n"
    assert output_of(programs / "python", *run, "--version", cwd=tmp_path) == f"{npt.__version__}\n"
    merge = ("merge", "--checkpoints", layer11, layer13, "--output", merged, "--verify")
    output_of(program, *merge, cwd=tmp_path)
    assert "Verification passed" in output_of(program, "verify", merged, cwd=tmp_path)


def test_every_folder_of_modules_is_a_listed_package() -> None:
    settings = PYPROJECT["tool"]["setuptools"]
    places = {name: Path(folder) for name, folder in settings["package-dir"].items()}
    assert places == {
        f"npt_fast.{link.name}": link.resolve().relative_to(ROOT)
        for link in (ROOT / "npt_fast").iterdir()
        if link.is_symlink()
    }
    found = {
        ".".join([name, *module.relative_to(ROOT / folder).parent.parts])
        for name, folder in [("npt_fast", Path("npt_fast")), *places.items()]
        for module in (ROOT / folder).rglob("*.py")
    }
    assert sorted(found) == settings["packages"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(extra: str) -> set[str]:
    """Names of the distributions that an extra declares, those of other extras included."""
    names = {"npt-fast"} | {
        normal(re.split(r"[^\w.-]", line)[0]) for line in PROJECT["dependencies"]
    }
    for line in EXTRAS.get(extra, ()):
        name, others = re.match(r"([\w.-]+)(?:\[(.*)\])?", line).groups()
        names |= {normal(name)}.union(*map(required, others.split(",") if others else ()))
    return names


@cache
def distributions() -> dict[str, str]:
    return {root: normal(names[0]) for root, names in packages_distributions().items()}


def undeclared(path: Path, extra: str) -> set[str]:
    """Distributions that a file imports, at any depth, and that the extra does not declare."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - IF_THERE
    roots -= {"npt_fast", "tests", "benchmarks", "docs", "examples"}
    return {distributions().get(root, normal(root)) for root in roots} - required(extra)


def test_what_the_library_imports_is_declared() -> None:
    assert {part_of(path) for path in sources()} == NEEDS.keys()
    wrong = {path.name: undeclared(path, NEEDS[part_of(path)]) for path in sources()}
    assert not {path: names for path, names in wrong.items() if names}
    assert undeclared(ROOT / "npt_fast" / "modules.py", "core") == {"torch"}


def test_what_the_tests_import_is_declared() -> None:
    paths = [path for folder in ("examples", "tests") for path in (ROOT / folder).rglob("*.py")]
    wrong = {path.name: undeclared(path, "dev") for path in paths}
    assert not {path: names for path, names in wrong.items() if names}


def pinned(name: str) -> set[tuple[str, ...]]:
    """Names and versions in a file of constraints."""
    lines = (ROOT / name).read_text().splitlines()
    return {(normal(line.split("==")[0]), line.split("==")[1]) for line in lines if "==" in line}


def test_the_oldest_libraries_are_those_that_the_makefile_chooses_tests_for() -> None:
    older = {name for name, _ in pinned("constraints-oldest.txt") - pinned("constraints.txt")}
    (chosen,) = re.findall(r"^OLDER = (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert older & required("dev") == {normal(name) for name in chosen.split()}


def test_extras_that_texts_name_exist() -> None:
    texts = [*sources(), ROOT / "pyproject.toml", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        extra
        for path in texts
        for group in re.findall(r"npt_fast\[([\w,]+)\]", path.read_text())
        for extra in group.split(",")
    }
    assert {"hf", "interact", "plot"} <= named <= EXTRAS.keys()


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {npt.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(
        rf"^## \[{re.escape(npt.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
