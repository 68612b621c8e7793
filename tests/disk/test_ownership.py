"""Whose a file is: what cannot be read is neither moved nor replaced, and no marker file costs
minutes.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lorry.config import RunConfig, build_settings, dump_settings
from lorry.disk import documents, durable
from lorry.runs import ownership


class Unreadable(durable.DiskCalls):
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
        unlike = [
            name
            for name in sorted(os.listdir(tmp_path))
            if ownership.differs_from(tmp_path / name, content)
        ]
        assert unlike == ["fifo", "folder", "link", "longer", "nowhere", "other"]
        assert not ownership.differs_from(tmp_path / "absent", content)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_what_cannot_be_read_stays_where_it_is(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's README.md, of our size, that we have no right to read: one line and 74, not a
    traceback.
    """
    (tmp_path / "README.md").write_bytes(b"theirs")
    (tmp_path / "new").write_bytes(b"ours!!")
    monkeypatch.setattr(durable, "disk", Unreadable("README.md", code))
    for work in (
        lambda: ownership.write_owned_files(tmp_path, {"README.md": b"ours!!"}),
        lambda: ownership.differs_from(tmp_path / "README.md", tmp_path / "new"),
    ):
        with pytest.raises(durable.DiskError) as failed:
            work()
        assert (failed.value.exit_code, failed.value.errno) == (74, code)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "new"]
    assert (tmp_path / "README.md").read_bytes() == b"theirs"


WHOLE = """output_dir: runs/people
model: {name: m, dtype: auto}
data: {max_length: 64}
train: {learning_rate: 1.0e-4, save_steps: 5, resume_from_checkpoint: null}
"""


def test_a_strange_description_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyYAML reads 50 KB a second: a marker that cannot be ours is known without it."""
    path, parsed = tmp_path / "run.yaml", list[int]()
    real = documents.parse_yaml
    monkeypatch.setattr(
        documents,
        "parse_yaml",
        lambda text, where: (parsed.append(len(text)), real(text, where))[1],
    )
    entries = "".join(f"x{n}: {n}\n" for n in range(60_000))
    for strange in (entries, WHOLE + entries, "[" * 100_000, WHOLE.replace("train:", " train:")):
        path.write_text(strange)
        assert ownership.read_run_description(path) == {}
    assert parsed == []
    path.write_text(WHOLE)
    assert ownership.read_run_description(path)["output_dir"] == "runs/people"
    assert parsed == [len(WHOLE)]


def test_the_largest_runs_of_ours_are_known(tmp_path: Path) -> None:
    own = {"r": 8, "lora_alpha": 16, "learning_rate": 1e-4, "seed": 3, "weight_decay": 0.01}
    jobs = [
        {"name": f"r-8-seed-{n}", "data": f"a/long/enough/path/people-{n}.jsonl", **own}
        for n in range(1000)
    ]
    text = dump_settings(
        build_settings(RunConfig, {"model": "m", "output_dir": str(tmp_path), "jobs": jobs}, print)
    )
    assert 150_000 < len(text) <= ownership.MOST_DESCRIPTION // 2
    # whose parsing takes seconds
    (tmp_path / "run.yaml").write_text(text.replace(jobs_of(text), ""))
    assert ownership.run_description_of(tmp_path)["output_dir"] == str(tmp_path)


def jobs_of(text: str) -> str:
    """All jobs of a description but the first."""
    begin = text.index("\n- name: r-8-seed-1\n")
    return text[begin : text.index("\n- name: r-8-seed-999\n")]
