"""Whose a file is: what cannot be read is neither moved nor replaced, and no marker file costs minutes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lorry.disk import durable, ownership


class Unreadable(durable.Disk):
    """A disk that opens nothing of this name."""

    def __init__(self, name: str, code: int) -> None:
        self.name, self.code = name, code

    def open_to_read(self, path: Path) -> int:
        if path.name == self.name:
            raise OSError(self.code, os.strerror(self.code))
        return super().open_to_read(path)


def test_what_has_a_name_differs_unless_it_is_a_file_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "same").write_bytes(b"abc")
    (tmp_path / "other").write_bytes(b"abd")
    (tmp_path / "longer").write_bytes(b"abcd")
    (tmp_path / "link").symlink_to("same")
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "new").write_bytes(b"abc")
    for content in (b"abc", tmp_path / "new"):
        unlike = [name for name in sorted(os.listdir(tmp_path)) if ownership.differs(tmp_path / name, content)]
        assert unlike == ["fifo", "folder", "link", "longer", "nowhere", "other"]
        assert not ownership.differs(tmp_path / "absent", content)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_what_cannot_be_read_stays_where_it_is(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's README.md, of our size, that we have no right to read: one line and 74, not a traceback."""
    (tmp_path / "README.md").write_bytes(b"theirs")
    (tmp_path / "new").write_bytes(b"ours!!")
    monkeypatch.setattr(durable, "disk", Unreadable("README.md", code))
    for work in (
        lambda: ownership.put(tmp_path, {"README.md": b"ours!!"}),
        lambda: ownership.differs(tmp_path / "README.md", tmp_path / "new"),
    ):
        with pytest.raises(durable.DiskError) as failed:
            work()
        assert (failed.value.exit_code, failed.value.errno) == (74, code)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "new"]
    assert (tmp_path / "README.md").read_bytes() == b"theirs"
