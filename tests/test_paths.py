"""Paths that users give: one meaning everywhere, and one line where the file system refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import npt_fast as npt
from npt_fast.cli.shell.commands.scripts import read_script
from npt_fast.errors import NPTError, PathError
from npt_fast.hf.base_model import load_base_model
from npt_fast.paths import expand, path_list, user_path
from npt_fast.training.token_windows import TokenWindows
from npt_fast.transfer import check, journal, report, suite
from npt_fast.transfer.session import Session
from tests.checkpoints import layer_weights, read_weights, write_checkpoint
from tests.transfer import models


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "a", layer_weights(11))


def test_the_home_directory(home: Path) -> None:
    assert expand("~/a:11") == f"{home}/a:11"
    assert user_path(Path("~")) == home
    assert user_path("~root/x") == Path("/root/x")
    # a folder of that name, as in a shell; also when the path passes a second time
    assert user_path(user_path("./~/a~")) == Path.cwd() / "~" / "a~"


@pytest.mark.parametrize("given", ["", " ", "\t\n", "a\0b", "~nosuchuser/x", "~nosuchuser"])
def test_what_is_no_path(given: str) -> None:
    with pytest.raises(PathError, match=r"^[^\n\0]+$"):
        user_path(given)


def test_one_path_is_not_its_letters() -> None:
    assert path_list("one") == ["one"]
    assert path_list(Path("one")) == ["one"]
    assert path_list(("one", Path("two"))) == ["one", "two"]


USES: dict[str, Callable[[str], object]] = {
    "inspect": npt.inspect,
    "verify": npt.verify,
    "merge": lambda path: npt.merge([path], "out"),
    "merge-selection": lambda path: npt.merge(f"{path}:11", "out"),
    "merge-output": lambda path: npt.merge("a", path, force=True),
    "curriculum": lambda path: npt.merge(
        "a", "out", options=npt.MergeOptions(copy_multi_layer_state=path)
    ),
}


@pytest.mark.parametrize("use", [use for use in USES if use != "merge-selection"])
@pytest.mark.parametrize("given", ["", "a\0b", "~nosuchuser/x"])
def test_no_path_anywhere(
    use: str, given: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    with pytest.raises(PathError):
        USES[use](given)
    assert os.listdir() == ["a"]


def test_a_home_directory_anywhere(
    home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    checkpoint.rename(home / "a")
    report = npt.merge(["~/a:11"], "~/out", verify=True)
    assert report.output == str(home / "out")
    assert set(read_weights(home / "out")) == set(layer_weights(11))
    assert npt.verify("~/out").compared == 9
    assert npt.inspect("~/a").path == str(home / "a")
    assert npt.can_merge("~/a").mergeable
    assert os.listdir() == ["home"]


def obstacles(folder: Path) -> dict[str, Path]:
    """Paths that nobody can look at, whoever it is."""
    (folder / "circle").symlink_to("circle")
    (folder / "file").write_bytes(b"")
    return {
        "name too long": folder / ("x" * 256),
        "parent too long": folder / ("x" * 256) / "b",
        "path too long": folder / "/".join(["x" * 200] * 30),
        "circle of links": folder / "circle",
        "below a circle": folder / "circle" / "b",
        "below a file": folder / "file" / "b",
        "not UTF-8": folder / os.fsdecode(b"\xff\xfe"),
    }


OBSTACLES = [
    *("name too long", "parent too long", "path too long", "circle of links", "below a circle"),
    *("below a file", "not UTF-8"),
]


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("use", [use for use in USES if use != "merge-output"])
def test_a_path_that_cannot_be_read(
    use: str, obstacle: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    path = obstacles(checkpoint.parent)[obstacle]
    with pytest.raises(npt.CheckpointError) as caught:
        USES[use](str(path))
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


@pytest.mark.parametrize("obstacle", [name for name in OBSTACLES if name != "not UTF-8"])
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_cannot_be_written(
    obstacle: str, force: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    path = obstacles(checkpoint.parent)[obstacle]
    before = sorted(os.listdir())
    with pytest.raises(npt.MergeError) as caught:
        npt.merge("a", path, force=force)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir()) == before


def test_names_that_are_not_utf_8(tmp_path: Path, checkpoint: Path) -> None:
    path, out = (tmp_path / os.fsdecode(name) for name in (b"in\xff", b"out\xff"))
    checkpoint.rename(path)
    npt.merge(path, out, verify=True)
    assert npt.verify(out).compared == 9
    npt.inspect(out).to_dict()


@pytest.fixture(scope="module")
def session() -> Session:
    """With one modulation, named x."""
    session = Session(models.converted(layers=(1, 2)), models.tokenizer)
    session.extract("x", "a blue boat")
    return session


WRITE: dict[str, Callable[[Session, str], object]] = {
    "save": lambda session, path: npt.save(session.model, path),
    "modulation": lambda session, path: session.modulation("x").save(path),
    "session": lambda session, path: session.save(path),
    "lora": lambda session, path: npt.export_lora(session.modulation("x"), session.model, path),
    "report": lambda _, path: report.write("<p>", path),
    "junit": lambda _, path: check.write_junit([], path, "facts"),
    "journal": lambda _, path: journal.Journal(path, {}).close(),
}
READ: dict[str, Callable[[Session, str], object]] = {
    "load": lambda session, path: npt.load(session.model, path),
    "modulation": lambda _, path: npt.load_modulation(path),
    "session": lambda session, path: session.load(path),
    "facts": lambda _, path: suite.read_suite(path),
    "journal": lambda _, path: journal.read(path),
    "script": lambda _, path: read_script(path),
    "base-model": lambda _, path: load_base_model(f"{path}.gguf"),
    "base-model-folder": lambda _, path: load_base_model(path),
    "text": lambda _, path: TokenWindows(path, models.tokenizer, max_length=8),
}


@pytest.mark.parametrize("use", WRITE)
def test_everything_is_written_to_the_home_directory(
    use: str, session: Session, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.parent)
    WRITE[use](session, "~/out")
    assert os.listdir(home) == ["out"]
    assert os.listdir() == ["home"]


@pytest.mark.parametrize("use", READ)
def test_everything_is_read_from_the_home_directory(use: str, session: Session, home: Path) -> None:
    """What is looked for there, and missed."""
    with pytest.raises(NPTError, match=rf"{re.escape(str(home / 'none'))}|~/none"):
        READ[use](session, "~/none")


WAYS = [
    (way, use, obstacle)
    for way, uses in (("write", WRITE), ("read", READ))
    for use in uses
    for obstacle in OBSTACLES
    if obstacle != "not UTF-8"  # that is no obstacle to writing
    and (way, use, obstacle) != ("write", "modulation", "circle of links")  # it replaces the link
]


@pytest.mark.parametrize(("way", "use", "obstacle"), WAYS)
def test_obstacles_everywhere(
    way: str, use: str, obstacle: str, session: Session, tmp_path: Path
) -> None:
    path = obstacles(tmp_path)[obstacle]
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(NPTError) as caught:
        (WRITE if way == "write" else READ)[use](session, str(path))
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """Where another user may look too: pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


AS_NOBODY = """
import importlib, os, pkgutil
import numpy
import npt_fast as npt, npt_fast.checkpoint as package
for module in pkgutil.iter_modules(package.__path__):  # nobody may be unable to read them later
    importlib.import_module(f"{package.__name__}.{module.name}")
os.setgroups([])
os.setresgid(*[65534] * 3)
os.setresuid(*[65534] * 3)
for use in (
    lambda: npt.inspect("private/a"),
    lambda: npt.verify("private/a"),
    lambda: npt.merge(["private/a"], "free/out"),
    lambda: npt.merge(["private/a:11"], "free/out"),
    lambda: npt.merge("open", "private/out"),
    lambda: npt.merge("open", "private/new/out", force=True),
    lambda: npt.merge("open", "closed/out"),
    lambda: npt.inspect("linked"),
):
    try:
        use()
    except npt.NPTError as error:
        print(error)
print(npt.can_merge(["open", "private/a"]).remarks[0])
print(npt.inspect("unlisted").problems[0])
report = npt.verify("merged")
print(report.passed, report.compared, report.notes[0])
print(npt.verify("half_linked").problems[0])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_what_another_user_may_not_see(shared_folder: Path) -> None:
    """In a process of its own, which gives up root's right to see everything."""
    for name in ("private/a", "open", "unlisted", "linked", "half_linked"):
        write_checkpoint(shared_folder / name, layer_weights(11))
    npt.merge(shared_folder / "private" / "a", shared_folder / "merged", verify=True)
    (shared_folder / "linked" / "npt_weights.pt").unlink()
    (shared_folder / "linked" / "npt_weights.pt").symlink_to(f"../blobs/{'0' * 40}")
    (shared_folder / "half_linked" / "training_state.pt").symlink_to("../private/x")
    (shared_folder / "free").mkdir()
    (shared_folder / "free").chmod(0o777)
    (shared_folder / "closed").mkdir(mode=0o755)
    (shared_folder / "blobs").mkdir(mode=0o700)
    (shared_folder / "private").chmod(0o700)
    (shared_folder / "unlisted").chmod(0o711)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY],
        cwd=shared_folder,
        env={**os.environ, "PYTHONPATH": str(Path(npt.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    *refused, compared, linked = done.stdout.splitlines()
    assert len(refused) == 10
    for line in refused:
        assert "Permission denied" in line
    assert compared.startswith("True 0 not compared with its sources: ")
    assert "Permission denied" in compared
    assert "symbolic link" in linked
