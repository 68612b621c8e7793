"""Building the kernels: opt-out, no compiler, a compiler that fails, and what the digest covers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorry.kernels import build


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path))
    monkeypatch.delenv("LORRY_KERNELS", raising=False)
    monkeypatch.setattr(build, "_load", build._load.__wrapped__)


def test_opting_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_KERNELS", "0")
    assert build.library() is None
    assert build.status().line() == "torch only (LORRY_KERNELS=0)"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.library() is None
    assert "no C++ compiler" in build.status().line()


def test_a_compiler_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(broken))
    assert build.library() is None
    assert "no such flag" in build.status().line()
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.mark.skipif(build.shutil.which("g++") is None, reason="no g++ on this machine")
def test_built_once_by_the_command(tmp_path: Path) -> None:
    line = subprocess.run([sys.executable, "-m", "lorry.kernels"], capture_output=True, text=True, check=True).stdout
    assert line.startswith("compiled C++")
    (made,) = (tmp_path / "kernels").iterdir()
    stamp = made.stat().st_mtime_ns
    assert build.library() is not None
    assert made.name.startswith(f"{build.status().digest}-")
    assert made.stat().st_mtime_ns == stamp
    cut = made.read_bytes()[:30000]
    made.unlink()  # what this process has mapped stays as it is
    made.write_bytes(cut)  # loading this one would kill a process
    assert build.library() is not None
    assert made.stat().st_size > 30000


@pytest.mark.skipif(build.shutil.which("g++") is None, reason="no g++ on this machine")
def test_another_processor_or_source_has_a_library_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = str(build.shutil.which("g++"))
    digests = {build._digest(compiler)}
    monkeypatch.setattr(build, "_processor", lambda: "another processor")
    digests.add(build._digest(compiler))
    (tmp_path / "one.cpp").write_text("int one() { return 1; }")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    digests.add(build._digest(compiler))
    assert len(digests) == 3
