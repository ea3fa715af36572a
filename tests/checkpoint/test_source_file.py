"""Source files: reads give the bytes on the disk, and changes of a file are noticed."""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from npt_fast.checkpoint import source_file
from npt_fast.checkpoint.source_file import WINDOW, NearbyReader, SourceFile
from npt_fast.errors import CheckpointError

LONG_AGO = 1_600_000_000_000_000_000
SHA1 = "0123456789abcdef" * 2 + "01234567"
SHA256 = "0123456789abcdef" * 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of random bytes with an old modification time, so that every write changes it."""
    file = tmp_path / "weights.bin"
    file.write_bytes(random.Random(1).randbytes(50_001))
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    return file


@pytest.fixture
def no_hanging() -> Iterator[None]:
    """Fail instead of waiting forever."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def on_network(monkeypatch: pytest.MonkeyPatch, kind: str = "nfs4") -> None:
    monkeypatch.setattr(source_file, "filesystem_type", lambda path: kind)


# --- reading


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize(
    ("offset", "length", "size"),
    [
        (0, 50_001, WINDOW), (0, 50_001, 4096), (1, 50_000, 4096), (4095, 2, 4096),
        (4096, 8192, 4096), (4097, 12_289, 5000), (50_000, 1, 7), (123, 0, 4096), (0, 100, 7),
    ],
)  # fmt: skip
def test_windows_are_the_bytes_of_the_file(
    path: Path, offset: int, length: int, size: int, network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if network:
        on_network(monkeypatch)
    pieces = [bytes(window) for window in SourceFile.of(path).windows(offset, length, size)]
    assert b"".join(pieces) == path.read_bytes()[offset : offset + length]
    assert all(0 < len(piece) <= size for piece in pieces)
    assert len(pieces) == -(-length // size)


def test_default_windows_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(3 * WINDOW + 5)
    sizes = [len(window) for window in SourceFile.of(path).windows(3, 3 * WINDOW)]
    assert sizes == [WINDOW] * 3


def mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_windows_are_released_behind(path: Path) -> None:
    windows = SourceFile.of(path).windows(0, 50_001, 4096)
    seen = []
    while (window := next(windows, None)) is not None:
        seen.append(mappings_of(path))
        assert window.nbytes <= 4096
    assert 1 <= max(seen) <= 2  # the one in hand, and the one just made
    assert mappings_of(path) == 0


def test_network_file_systems_are_read_not_mapped(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("mapped")

    on_network(monkeypatch)
    monkeypatch.setattr(mmap, "mmap", refuse)
    windows = list(SourceFile.of(path).windows(5, 20_000, 4096))
    assert all(type(window) is bytes for window in windows)
    assert b"".join(windows) == path.read_bytes()[5:20_005]


@pytest.mark.parametrize("network", [False, True])
def test_short_reads_are_continued(
    path: Path, network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if network:
        on_network(monkeypatch)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: real(fd, min(n, 997), offset))
    file = SourceFile.of(path)
    content = path.read_bytes()
    assert file.read(10, 20_000) == content[10:20_010]
    assert b"".join(map(bytes, file.windows(1, 50_000, 9000))) == content[1:]


def test_reading_past_the_end_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights\.bin: ends at byte 50001, 50002 needed"):
        SourceFile.of(path).read(50_000, 2)


def test_no_descriptors_are_left_open(path: Path) -> None:
    file = SourceFile.of(path)
    before = set(os.listdir("/proc/self/fd"))
    file.read(0, 10)
    list(file.windows(0, 50_001, 4096))
    unfinished = file.windows(0, 50_001, 4096)
    next(unfinished)
    unfinished.close()
    with pytest.raises(CheckpointError):
        file.read(50_000, 2)
    assert set(os.listdir("/proc/self/fd")) == before


# --- changes


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def extend(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def replace_by_equal_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(LONG_AGO, LONG_AGO))
    os.replace(other, path)


def rewrite_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"\0" * 50_001)


def remove(path: Path) -> None:
    path.unlink()


CHANGES = [truncate, extend, replace_by_equal_file, rewrite_in_place, remove]


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_reading_is_noticed(
    path: Path, change: Callable[[Path], None], network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if network:
        on_network(monkeypatch)
    file = SourceFile.of(path)
    change(path)
    expected = "cannot be opened" if change is remove else "changed while it was being read"
    for read in (lambda: file.read(0, 10), lambda: list(file.windows(0, 10))):
        with pytest.raises(CheckpointError, match=expected):
            read()


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_windows_is_noticed(
    path: Path, change: Callable[[Path], None], network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if network:
        on_network(monkeypatch)
    windows = SourceFile.of(path).windows(0, 50_001, 4096)
    next(windows)
    change(path)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        next(windows)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_during_a_copy_is_noticed_at_its_end(
    path: Path, change: Callable[[Path], None]
) -> None:
    file = SourceFile.of(path)
    with pytest.raises(CheckpointError, match="changed while it was being read"), file.open():
        change(path)


def test_an_error_of_the_consumer_is_not_masked(path: Path) -> None:
    file = SourceFile.of(path)
    with pytest.raises(KeyError), file.open():
        truncate(path)
        raise KeyError


def test_reading_alone_is_no_change(path: Path) -> None:
    file = SourceFile.of(path)
    path.read_bytes()
    path.chmod(0o400)
    os.link(path, path.with_name("second name"))
    assert file.read(0, 50_001) == path.read_bytes()


# --- links


def test_links_in_a_checkpoint_are_refused(path: Path, tmp_path: Path) -> None:
    for number, goal in enumerate((path.name, str(path), f"./{path.name}", "/etc/passwd")):
        link = tmp_path / f"link{number}"
        link.symlink_to(goal)
        with pytest.raises(CheckpointError, match="is a symbolic link"):
            SourceFile.of(link)


def test_a_link_that_the_user_names_is_followed(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    assert SourceFile.of(link, follow_links=True).read(0, 50_001) == path.read_bytes()


def hub_cache(root: Path, name: str, blob: str) -> tuple[Path, Path]:
    """Paths of a link `name` and its blob, as in the Hugging Face cache."""
    repo = root / "models--someone--merged"
    link = repo / "snapshots" / SHA1 / name
    link.parent.mkdir(parents=True)
    (repo / "blobs").mkdir()
    up = "../" * (2 + name.count("/"))
    link.symlink_to(f"{up}blobs/{blob}")
    return link, repo / "blobs" / blob


@pytest.mark.parametrize("blob", [SHA1, SHA256])
@pytest.mark.parametrize("name", ["npt_weights.pt", "run/checkpoint-800/npt_weights.safetensors"])
def test_links_of_the_hub_cache_are_followed(tmp_path: Path, name: str, blob: str) -> None:
    link, file = hub_cache(tmp_path, name, blob)
    file.write_bytes(b"content")
    assert SourceFile.of(link).read(0, 7) == b"content"


@pytest.mark.parametrize(
    "goal",
    [
        f"../../blobs/{SHA1[:-1]}",
        f"../../blobs/{SHA1.upper()}",
        "../../blobs/passwd",
        f"../../blobs/{SHA1}/../secret",
        f"../../blobs/../blobs/{SHA1}",
        f"blobs/{SHA1}",
        f"/tmp/blobs/{SHA1}",
        f"../../other/blobs/{SHA1}",
        f"../../blobs/{SHA1}\n",
    ],
)
def test_links_that_only_look_like_the_hub_cache_are_refused(tmp_path: Path, goal: str) -> None:
    link = tmp_path / "snapshots" / "x" / "npt_weights.pt"
    link.parent.mkdir(parents=True)
    link.symlink_to(goal)
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        SourceFile.of(link)


def test_a_hub_blob_that_is_itself_a_link_is_refused(tmp_path: Path) -> None:
    """Otherwise an untrusted checkpoint with its own folder ``blobs`` could lead anywhere."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"content")
    link, blob = hub_cache(tmp_path, "npt_weights.pt", SHA1)
    blob.symlink_to(secret)
    with pytest.raises(CheckpointError, match="symbolic link"):
        SourceFile.of(link)


def test_a_replaced_hub_blob_is_noticed(tmp_path: Path) -> None:
    link, blob = hub_cache(tmp_path, "npt_weights.pt", SHA1)
    blob.write_bytes(b"content")
    file = SourceFile.of(link)
    other = blob.with_name("other")
    other.write_bytes(b"CONTENT")
    os.replace(other, blob)
    with pytest.raises(CheckpointError, match="changed"):
        file.read(0, 7)


# --- not files


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            listener.bind(path.name)
        finally:
            os.chdir(before)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("device nodes need root")


@pytest.mark.parametrize("make", [make_fifo, make_directory, make_socket, make_device])
def test_what_is_no_file_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], None], no_hanging: None
) -> None:
    path = tmp_path / "npt_weights.pt"
    make(path)
    with pytest.raises(
        CheckpointError, match=r"not a regular file|is a directory|cannot be opened"
    ):
        SourceFile.of(path, follow_links=True)


def test_a_file_that_became_a_pipe_is_refused_without_waiting(path: Path, no_hanging: None) -> None:
    file = SourceFile.of(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="changed"):
        file.read(0, 1)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: cannot be opened: No such file") as error:
        SourceFile.of(tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_reading_is_safe_from_several_threads(path: Path) -> None:
    content = path.read_bytes()
    file = SourceFile.of(path)
    wrong: list[int] = []

    def read(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(50):
            offset = numbers.randrange(50_000)
            length = numbers.randrange(50_001 - offset)
            if (
                b"".join(map(bytes, file.windows(offset, length, 4096)))
                != content[offset : offset + length]
            ):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- many small ranges


def test_nearby_ranges_are_the_bytes_of_their_files(tmp_path: Path) -> None:
    contents = [random.Random(seed).randbytes(200_001) for seed in (1, 2)]
    files = []
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
        files.append(SourceFile.of(tmp_path / str(number)))
    dice = random.Random(3)
    reader = NearbyReader()
    for _ in range(500):
        which = dice.choice((0, 0, 0, 1))
        offset = dice.randrange(200_001)
        length = min(dice.choice((0, 1, 100, 16_384, 16_385, 70_000)), 200_001 - offset)
        got = b"".join(bytes(w) for w in reader.windows(files[which], offset, length))
        assert got == contents[which][offset : offset + length]


def test_nearby_ranges_open_the_file_rarely(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *args: opened.append(args[0]) or real(*args))
    file = SourceFile.of(path)
    reader = NearbyReader()
    for offset in range(0, 50_000, 50):
        list(reader.windows(file, offset, 32))
    assert len(opened) == 2  # once by `SourceFile.of`, once to read


def test_a_change_before_a_nearby_read_is_noticed(path: Path) -> None:
    file = SourceFile.of(path)
    path.write_bytes(b"other")
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        list(NearbyReader().windows(file, 0, 4))
