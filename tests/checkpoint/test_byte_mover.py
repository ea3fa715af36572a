"""Copying ranges: every way gives the same bytes, and the next way is used if one is refused."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from npt_fast.checkpoint import byte_mover, linux, source_file
from npt_fast.checkpoint.byte_mover import PAGE, WAYS, ByteMover, cloneable_bytes, write_all
from npt_fast.checkpoint.source_file import SourceFile
from npt_fast.errors import CheckpointError
from tests.checkpoint.byte_moving import CONTENT, Fake, Ladder, expected, move, refusing

REFUSALS = [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL]


@pytest.fixture
def source(tmp_path: Path) -> SourceFile:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return SourceFile.of(path)


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> Ladder:
    return Ladder(monkeypatch)


RANGES = [
    (0, len(CONTENT), 0),  # everything
    (0, 1, 0),
    (5, 3, 5),  # within a page, same phase
    (0, PAGE, 0),
    (PAGE, 3 * PAGE, 5 * PAGE),  # whole pages
    (100, 3 * PAGE, 100),  # same phase, ragged at both ends
    (100, 3 * PAGE, PAGE + 100),
    (PAGE - 1, PAGE + 2, 7 * PAGE - 1),  # one page and a byte on either side
    (PAGE - 1, 2, PAGE - 1),  # no whole page
    (64, 5 * PAGE, 128),  # phases differ
    (8, 2 * PAGE - 3, 9),
    (20 * PAGE, 77, 3 * PAGE),  # the tail of the file
    (7, 0, 7),  # nothing
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("numbers", RANGES, ids=str)
def test_each_way_alone_gives_the_bytes(
    source: SourceFile, tmp_path: Path, ladder: Ladder, way: str, numbers: tuple[int, int, int]
) -> None:
    ladder.only(way)
    size = len(CONTENT) + 6 * PAGE
    moved = move(source, [numbers], tmp_path, size)
    assert moved.path.read_bytes() == expected([numbers], size)
    offset, length, to = numbers
    cloned = cloneable_bytes(offset, to, length) if way == "reflink" else 0
    assert moved.mover.moved["reflink"] == cloned
    assert moved.mover.moved.total() == sum(moved.progress) == length
    if way != "reflink":
        assert moved.mover.moved[way] == length


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("way", WAYS[1:])
def test_every_kind_of_refusal_leads_to_the_next_way(
    source: SourceFile, tmp_path: Path, ladder: Ladder, way: str, number: int
) -> None:
    ladder.only(way, number)
    moved = move(source, [(0, len(CONTENT), 0)], tmp_path, len(CONTENT))
    assert moved.path.read_bytes() == CONTENT
    assert dict(+moved.mover.moved) == {way: len(CONTENT)}


def test_a_system_without_these_calls_maps(
    source: SourceFile, tmp_path: Path, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder.refuse("reflink", errno.ENOTTY)
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.delattr(os, "sendfile")
    moved = move(source, [(3, 9 * PAGE, 5)], tmp_path, 10 * PAGE)
    assert moved.path.read_bytes() == expected([(3, 9 * PAGE, 5)], 10 * PAGE)
    assert dict(+moved.mover.moved) == {"mapped": 9 * PAGE}


@pytest.mark.parametrize("network", [False, True])
def test_the_last_way_suits_network_file_systems(
    source: SourceFile,
    tmp_path: Path,
    ladder: Ladder,
    network: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ladder.only("mapped")
    monkeypatch.setattr(source_file, "filesystem_type", lambda path: "nfs" if network else "ext4")
    moved = move(source, [(1, 10 * PAGE, 2)], tmp_path, 11 * PAGE)
    assert moved.path.read_bytes() == expected([(1, 10 * PAGE, 2)], 11 * PAGE)


@pytest.mark.parametrize("way", ["copy_file_range", "sendfile"])
def test_a_refused_way_is_not_tried_again(
    source: SourceFile, tmp_path: Path, ladder: Ladder, way: str
) -> None:
    tried: list[int] = []

    def refuse(*args: object) -> int:
        tried.append(1)
        raise OSError(errno.EXDEV, "")

    ladder.only(way)
    ladder.set(way, refuse)
    ladder.set("reflink", refuse)
    ranges = [(number * PAGE, PAGE, number * PAGE) for number in range(5)]
    moved = move(source, ranges, tmp_path, 5 * PAGE)
    assert len(tried) == 2
    assert moved.path.read_bytes() == CONTENT[: 5 * PAGE]


def test_a_refusal_is_remembered_for_that_file_system_only(
    source: SourceFile, tmp_path: Path, ladder: Ladder
) -> None:
    elsewhere = Path("/dev/shm")
    if not os.access(elsewhere, os.W_OK) or os.stat(elsewhere).st_dev == source.identity.device:
        pytest.skip("needs a second file system at /dev/shm")
    ladder.refuse("copy_file_range", errno.EXDEV)
    mover = ByteMover(lambda count: None)
    other_path = elsewhere / f"npt-test-{os.getpid()}"
    other_path.write_bytes(CONTENT)
    try:
        other = SourceFile.of(other_path)
        with open(tmp_path / "out", "wb+") as out:
            with source.open() as fd:
                mover.move(source, fd, 0, PAGE, out.fileno(), 0)
            assert mover.moved["copy_file_range"] == 0
            ladder.set("copy_file_range", Fake().copy_file_range)
            with source.open() as fd:
                mover.move(source, fd, 0, PAGE, out.fileno(), 0)
            assert mover.moved["copy_file_range"] == 0
            with other.open() as fd:
                mover.move(other, fd, 1, PAGE, out.fileno(), 0)
            assert mover.moved["copy_file_range"] == PAGE
    finally:
        other_path.unlink()


def test_a_refusal_halfway_loses_nothing(
    source: SourceFile, tmp_path: Path, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Fake()

    def first_only(way: str) -> Callable[..., int]:
        def call(*args: int) -> int:
            if len(calls := done.setdefault(way, [])) == 2:
                raise OSError(errno.EXDEV, "")
            calls.append(1)
            return int(getattr(real, way)(*args))

        return call

    done: dict[str, list[int]] = {}
    monkeypatch.setattr(byte_mover, "_CHUNK", PAGE)
    ladder.refuse("reflink")
    ladder.set("copy_file_range", first_only("copy_file_range"))
    ladder.set("sendfile", first_only("sendfile"))
    moved = move(source, [(10, 15 * PAGE, 20)], tmp_path, 16 * PAGE)
    assert moved.path.read_bytes() == expected([(10, 15 * PAGE, 20)], 16 * PAGE)
    assert dict(+moved.mover.moved) == {
        "copy_file_range": 2 * PAGE,
        "sendfile": 2 * PAGE,
        "mapped": 11 * PAGE,
    }
    assert sum(moved.progress) == 15 * PAGE


@pytest.mark.parametrize("way", ["copy_file_range", "sendfile"])
@pytest.mark.parametrize("most", [1, 1000, PAGE])
def test_short_counts_are_continued(
    source: SourceFile, tmp_path: Path, ladder: Ladder, way: str, most: int
) -> None:
    fake = ladder.only(way)
    fake.most = most
    ranges = [(33, 2 * PAGE + 1, 8)]
    moved = move(source, ranges, tmp_path, 3 * PAGE)
    assert moved.path.read_bytes() == expected(ranges, 3 * PAGE)
    assert moved.mover.moved[way] == 2 * PAGE + 1
    assert len(fake.calls) == -(-(2 * PAGE + 1) // most)


def test_long_ranges_go_in_steps(
    source: SourceFile, tmp_path: Path, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = ladder.only("copy_file_range")
    monkeypatch.setattr(byte_mover, "_CHUNK", 3 * PAGE)
    moved = move(source, [(0, len(CONTENT), 0)], tmp_path, len(CONTENT))
    assert moved.path.read_bytes() == CONTENT
    assert max(fake.calls) == 3 * PAGE
    assert max(moved.progress) == 3 * PAGE


def test_writeback_starts_behind_the_copy(
    source: SourceFile, tmp_path: Path, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(linux, "start_writeback", lambda fd, at, n: started.append((at, n)))
    monkeypatch.setattr(byte_mover, "_CHUNK", 3 * PAGE)
    ladder.only("copy_file_range")
    ranges = [(number * PAGE, PAGE, number * PAGE) for number in range(20)]
    move(source, ranges, tmp_path, 20 * PAGE)
    assert started == [(number * 3 * PAGE, 3 * PAGE) for number in range(6)]


@pytest.mark.parametrize("call", ["reserve", "start_writeback"])
def test_these_hints_may_be_refused(
    source: SourceFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    name = {"reserve": "fallocate", "start_writeback": "sync_file_range"}[call]
    for number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        with monkeypatch.context() as patch:

            def refuse(called: str, *args: object, number: int = number) -> None:
                assert called == name
                raise OSError(number, "")

            patch.setattr(linux, "_call", refuse)
            with open(tmp_path / "out", "wb+") as file:
                getattr(linux, call)(file.fileno(), 0, PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(linux, "_call", refusing(errno.ENOSPC))
        with open(tmp_path / "out", "wb+") as file, pytest.raises(OSError, match="No space"):
            getattr(linux, call)(file.fileno(), 0, PAGE)


def test_a_reserved_file_has_its_blocks_and_the_same_bytes(
    source: SourceFile, tmp_path: Path
) -> None:
    mover = ByteMover(lambda count: None, reserve=True)
    path = tmp_path / "out"
    with open(path, "wb+") as file, source.open() as source_fd:
        mover.start_file(file.fileno(), 1 << 20)
        reserved = os.fstat(file.fileno()).st_blocks * 512
        mover.move(source, source_fd, 0, len(CONTENT), file.fileno(), 100)
    content = path.read_bytes()
    assert content == expected([(0, len(CONTENT), 100)], 1 << 20)
    assert reserved >= 1 << 20


# --- errors


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_real_errors_are_not_taken_for_refusals(
    source: SourceFile, tmp_path: Path, ladder: Ladder, way: str, number: int
) -> None:
    ladder.only(way)
    ladder.refuse(way, number)
    with pytest.raises(OSError) as caught:
        move(source, [(0, 4 * PAGE, 0)], tmp_path, 4 * PAGE)
    assert caught.value.errno == number


def truncating(fake: Fake, way: str, path: Path) -> Callable[..., int]:
    """A replacement of `way`; the source is truncated to one page during its first call."""

    def call(*args: int) -> int:
        count = int(getattr(fake, way)(*args))
        os.truncate(path, PAGE)
        return count

    return call


@pytest.mark.parametrize("way", ["copy_file_range", "sendfile"])
def test_a_source_truncated_meanwhile_is_an_error(
    source: SourceFile, tmp_path: Path, ladder: Ladder, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = ladder.only(way)
    monkeypatch.setattr(byte_mover, "_CHUNK", PAGE)
    ladder.set(way, truncating(fake, way, source.path))
    with pytest.raises(CheckpointError, match="truncated"):
        move(source, [(0, 4 * PAGE, 0)], tmp_path, 4 * PAGE)


def test_a_mapped_source_truncated_meanwhile_is_an_error(
    source: SourceFile, tmp_path: Path, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder.only("mapped")
    real = SourceFile.windows
    written: list[int] = []

    def small(self: SourceFile, offset: int, length: int) -> Iterator[memoryview | bytes]:
        return real(self, offset, length, PAGE)

    def write(fd: int, data: bytes | memoryview, offset: int) -> None:
        write_all(fd, data, offset)
        written.append(len(data))
        os.truncate(source.path, PAGE)

    monkeypatch.setattr(SourceFile, "windows", small)
    monkeypatch.setattr(byte_mover, "write_all", write)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        move(source, [(0, 4 * PAGE, 0)], tmp_path, 4 * PAGE)
    assert written == [PAGE]


def test_a_clone_that_finds_the_source_truncated_is_an_error(
    source: SourceFile, tmp_path: Path, ladder: Ladder
) -> None:
    """The kernel refuses such a clone with EINVAL; the next ways then reach the end of the file."""
    fake = ladder.only("reflink")

    def clone(fd: int, request: int, argument: bytes) -> int:
        os.truncate(source.path, PAGE)
        return fake.ioctl(fd, request, argument)

    ladder.set("reflink", clone)
    with pytest.raises(CheckpointError, match=r"truncated|changed"):
        move(source, [(0, 4 * PAGE, 0)], tmp_path, 4 * PAGE)


def test_a_source_rewritten_meanwhile_is_an_error(
    source: SourceFile, tmp_path: Path, ladder: Ladder
) -> None:
    fake = ladder.only("copy_file_range")

    def rewriting(*args: int) -> int:
        with open(source.path, "r+b") as file:
            file.write(b"other")
        os.utime(source.path)
        return fake.copy_file_range(*args)

    ladder.set("copy_file_range", rewriting)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        move(source, [(0, 4 * PAGE, 0)], tmp_path, 4 * PAGE)


# --- the real kernel


def test_what_this_kernel_offers_gives_the_bytes(source: SourceFile, tmp_path: Path) -> None:
    ranges = [(0, 1000, 0), (1000, 9 * PAGE, PAGE + 1000), (77, 5 * PAGE, 12 * PAGE)]
    moved = move(source, ranges, tmp_path, 20 * PAGE)
    assert moved.path.read_bytes() == expected(ranges, 20 * PAGE)
    assert moved.mover.moved.total() == 1000 + 14 * PAGE


def test_another_file_system_gives_the_bytes(source: SourceFile) -> None:
    folder = Path("/dev/shm") / f"npt-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"needs a second file system at /dev/shm: {error}")
    try:
        moved = move(source, [(11, 10 * PAGE, 12)], folder, 11 * PAGE)
        assert moved.path.read_bytes() == expected([(11, 10 * PAGE, 12)], 11 * PAGE)
        assert moved.mover.moved["reflink"] == 0
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize("way", WAYS[1:])
def test_the_real_call_gives_the_bytes(
    source: SourceFile, tmp_path: Path, ladder: Ladder, way: str
) -> None:
    for above in WAYS[: WAYS.index(way)]:
        ladder.refuse(above)
    moved = move(source, [(5, 18 * PAGE, 6)], tmp_path, 19 * PAGE)
    assert moved.path.read_bytes() == expected([(5, 18 * PAGE, 6)], 19 * PAGE)


def test_random_ranges(source: SourceFile, tmp_path: Path, ladder: Ladder) -> None:
    """The ranges follow each other at random phases, like the records of a .pt file."""
    ladder.only("reflink")
    numbers = random.Random(7)
    ranges, to = [], 0
    for _ in range(60):
        length = numbers.choice([1, 64, PAGE - 1, PAGE, numbers.randrange(6 * PAGE)])
        offset = numbers.randrange(len(CONTENT) - length)
        to += numbers.randrange(100)
        if numbers.random() < 0.7:  # as the layout does it: at the source's phase
            to += (offset - to) % PAGE
        ranges.append((offset, length, to))
        to += length
    moved = move(source, ranges, tmp_path, to)
    assert moved.path.read_bytes() == expected(ranges, to)
    assert moved.mover.moved["reflink"] == sum(cloneable_bytes(o, t, n) for o, n, t in ranges)
    assert moved.mover.moved["reflink"] > 0
    assert moved.mover.moved.total() == sum(n for _, n, _ in ranges)


# --- small helpers


def test_write_all_continues_after_short_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:999], at))
    with open(tmp_path / "out", "wb+") as file:
        write_all(file.fileno(), CONTENT, 3)
        write_all(file.fileno(), memoryview(CONTENT)[:1000], len(CONTENT) + 3)
        write_all(file.fileno(), b"", 0)
    assert (tmp_path / "out").read_bytes() == b"\0\0\0" + CONTENT + CONTENT[:1000]


@pytest.mark.parametrize(
    ("offset", "to", "length", "pages"),
    [
        (0, 0, 0, 0), (0, 0, PAGE - 1, 0), (0, 0, PAGE, 1), (0, 4 * PAGE, 3 * PAGE + 1, 3),
        (8, 8, PAGE, 0), (8, 8, 2 * PAGE - 9, 0), (8, 8, 2 * PAGE - 8, 1), (8, 8, 3 * PAGE, 2),
        (0, 8, 9 * PAGE, 0), (PAGE - 1, PAGE - 1, 1, 0), (PAGE - 1, PAGE - 1, PAGE + 1, 1),
    ],
)  # fmt: skip
def test_cloneable_bytes(offset: int, to: int, length: int, pages: int) -> None:
    assert cloneable_bytes(offset, to, length) == pages * PAGE
