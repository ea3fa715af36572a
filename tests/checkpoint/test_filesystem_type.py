"""The type of the file system under a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from npt_fast.checkpoint import source_file
from npt_fast.checkpoint.source_file import filesystem_type, on_network_filesystem


def test_filesystem_type_is_what_the_kernel_says(tmp_path: Path) -> None:
    if not Path("/proc/self/mountinfo").exists():
        assert filesystem_type(tmp_path) == ""
        return
    assert filesystem_type(Path("/proc/self/status")) == "proc"
    assert filesystem_type(tmp_path) != ""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/x", "nfs4"), ("/data", "nfs4"), ("/database/x", "ext4"), ("/data/local/x", "xfs"),
        ("/with space/x", "fuse.sshfs"), ("/", "ext4"), ("/over/x", "btrfs"),
    ],
)  # fmt: skip
def test_the_innermost_mount_counts(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw",
        "30 22 0:40 / /data rw - nfs4 server:/data rw",
        "31 30 8:1 / /data/local rw - xfs /dev/sdb rw",
        r"32 22 0:41 / /with\040space rw master:1 - fuse.sshfs x rw",
        "33 22 8:2 / /over rw - ext4 /dev/sdc rw",
        "34 33 8:3 / /over rw - btrfs /dev/sdd rw",
    ]
    monkeypatch.setattr(Path, "read_text", lambda self, **kwargs: "\n".join(lines))
    source_file._mounts.cache_clear()
    try:
        assert filesystem_type(Path(path)) == kind
        assert on_network_filesystem(Path(path)) == kind.startswith(("nfs", "fuse"))
    finally:
        source_file._mounts.cache_clear()
