"""Building the kernels: opt-out, no compiler, a compiler that fails, and what the digest covers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorry.kernels import build


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORRY_HOME", str(tmp_path))
    monkeypatch.delenv("LORRY_KERNELS", raising=False)
    monkeypatch.setattr(build, "_build_and_load", build._build_and_load.__wrapped__)


def test_opting_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_KERNELS", "0")
    assert build.load_library() is None
    assert build.kernel_status().line() == "torch only (LORRY_KERNELS=0)"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.load_library() is None
    assert "no C++ compiler" in build.kernel_status().line()


def test_a_compiler_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "g++"
    broken.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such flag' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(broken))
    assert build.load_library() is None
    assert "no such flag" in build.kernel_status().line()
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.mark.skipif(build.shutil.which("g++") is None, reason="no g++ on this machine")
def test_built_once_by_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice here, without optimisation: every other test with kernels has those of a real build. For
    LORRY_ISA, of which no instruction may be more than that."""
    monkeypatch.setenv("LORRY_ISA", "portable")
    flags = (*build.EXTRA_FLAGS, "-O0")
    monkeypatch.setattr(build, "EXTRA_FLAGS", flags)
    monkeypatch.setenv("LORRY_KERNELS_FLAGS", shlex.join(flags))
    build_now = [sys.executable, "-m", "lorry.kernels"]
    said = subprocess.run(build_now, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("compiled C++ for portable (")
    # who waits is told why; what is read by programs is standard output
    (told,) = said.stderr.splitlines()
    assert told.startswith("compiling the kernels for this processor (portable), ")
    (made,) = (tmp_path / "kernels").iterdir()
    if nm := build.shutil.which("nm"):
        lines = subprocess.run(
            [nm, "-D", "--defined-only", str(made)], capture_output=True, text=True
        ).stdout.splitlines()
        # the linker's own, and C++ functions, begin with an underscore
        names = {line.split()[-1] for line in lines}
        kernels = {name for name in names if not name.startswith("_")}
        assert kernels == set(build._exported_functions())
    if objdump := build.shutil.which("objdump"):
        machine_code = subprocess.run(
            [objdump, "-d", "--no-show-raw-insn", str(made)], capture_output=True, text=True
        ).stdout
        assert "ret" in machine_code
        assert "%ymm" not in machine_code
        assert "%zmm" not in machine_code
    stamp = made.stat().st_mtime_ns
    assert build.load_library() is not None
    assert not caplog.records
    assert made.name.startswith(f"{build.kernel_status().digest}-")
    assert made.stat().st_mtime_ns == stamp
    cut = made.read_bytes()[:30000]
    made.unlink()  # what this process has mapped stays as it is
    made.write_bytes(cut)  # loading this one would kill a process
    assert build.load_library() is not None
    assert made.stat().st_size > 30000


@pytest.mark.skipif(build.shutil.which("g++") is None, reason="no g++ on this machine")
def test_another_processor_or_source_has_a_library_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = str(build.shutil.which("g++"))
    monkeypatch.delenv("LORRY_ISA", raising=False)
    digests = {build._build_digest(compiler)}
    monkeypatch.setattr(build, "processor_flags", lambda: {"another processor"})
    digests.add(build._build_digest(compiler))
    monkeypatch.setenv("LORRY_ISA", "portable")
    digests.add(build._build_digest(compiler))
    (tmp_path / "one.cpp").write_text("int one() { return 1; }")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    digests.add(build._build_digest(compiler))
    assert len(digests) == 4


def compiler_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> Path:
    """A compiler of our own: what it does after `--version`."""
    made = tmp_path / "g++"
    made.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    made.chmod(0o755)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(made))
    return made


def kept(folder: Path, digest: str, content: bytes, mode: int = 0o700) -> Path:
    """A file whose name says that it is the library of this digest."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{digest}-{hashlib.sha256(content).hexdigest()[:16]}.so"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("at_once", [True, False])
def test_a_compiler_that_hangs_is_stopped_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at_once: bool
) -> None:
    """Every command hung before."""
    pids = tmp_path / "pids"
    made = compiler_of(monkeypatch, tmp_path, f"sleep 300 & echo $! > {pids}; wait")
    if at_once:
        made.write_text(f"#!/bin/sh\nsleep 300 & echo $! > {pids}; wait\n")
    # a loaded machine may need more than the first to start the shell at all
    for limit in (
        1,
        5,
        25,
        100,
    ):
        monkeypatch.setattr(build, "PROBE_SECONDS" if at_once else "COMPILE_SECONDS", float(limit))
        loaded, status = build._build_and_load()
        assert loaded is None
        assert f"did not finish within {limit} s and was stopped" in status.line()
        if pids.is_file() and pids.read_text().endswith("\n"):
            break
    assert_ends(int(pids.read_text()))


def assert_ends(child: int) -> None:
    """It is gone, or a zombie until its new parent looks."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{child}/stat").read_text().split(")")[1].split()[0] != "Z":
                time.sleep(0.05)
                continue
        break
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the compiler's child lives on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_signal_that_ends_a_program_ends_its_compilers(
    tmp_path: Path, number: signal.Signals, at_once: bool
) -> None:
    """Compilers went on for minutes before, and half a library lay there for an hour. Of a program that
    says nothing of signals: the command has handlers of its own."""
    pids, home = tmp_path / "pids", tmp_path / "home"
    compiler = tmp_path / "g++"
    probe = "" if at_once else '[ "$1" = --version ] && exit 0\n'
    compiler.write_text(f"#!/bin/sh\n{probe}sleep 300 & echo $! >> {pids}; wait\n")
    compiler.chmod(0o755)
    # what runs the tests may ignore a hangup (nohup), which a program inherits
    code = f"""
import signal
signal.signal({int(number)}, signal.SIG_DFL)
from lorry.kernels import kernel_status
kernel_status()
"""
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LORRY_HOME": str(home),
        },
        stderr=subprocess.PIPE,
    )
    wanted = 1 if at_once else len(list(build.SOURCES.glob("*.cpp")))
    until = time.monotonic() + 120
    while time.monotonic() < until and not (
        pids.is_file() and pids.read_text().count("\n") == wanted
    ):
        assert program.poll() is None
        time.sleep(0.05)
    program.send_signal(number)
    program.communicate(timeout=60)
    assert program.returncode == -number
    started = pids.read_text().split()
    assert len(started) == wanted
    for child in started:
        assert_ends(int(child))
    assert list(home.glob("kernels/*")) == []


def test_a_second_signal_waits_until_all_is_cleared_up(tmp_path: Path) -> None:
    """Handlers are put back, and nested blocks clear up from the innermost out."""
    code = f"""
import os, signal
from lorry.kernels import build
with build._end_by_exception():
    pass
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
try:
    with build._end_by_exception():
        try:
            with build._end_by_exception():
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            open({str(tmp_path / "cleared")!r}, "w").close()
finally:
    open({str(tmp_path / "gone")!r}, "w").close()
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["cleared"]


@pytest.mark.parametrize("known", [False, True])
def test_dot_products_that_the_compiler_does_not_know_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: bool
) -> None:
    """An older one builds for a processor that has them without the functions that want them."""
    functions = {"lorry_amx": lambda: 0} | ({"attention_forward": print} if known else {})
    library = SimpleNamespace(**functions)
    compiler_of(monkeypatch, tmp_path, "exit 1")
    monkeypatch.setattr(build, "_load_intact", lambda folder, digest: library)
    monkeypatch.setattr(build, "has_fast_dots", lambda: True)
    assert build.kernel_status().attention == ("dots" if known else "vectors")


def test_a_library_without_our_functions_is_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A traceback before. Here the compiler's own is such a library too, so that there are no
    kernels and one line.
    """
    gcc = build.shutil.which("gcc")
    if gcc is None:
        pytest.skip("no gcc on this machine")
    (tmp_path / "one.c").write_text("int one(void) { return 1; }")
    subprocess.run(
        [gcc, "-shared", "-fPIC", "-o", str(tmp_path / "one.so"), str(tmp_path / "one.c")],
        check=True,
    )
    compiler = compiler_of(
        monkeypatch,
        tmp_path,
        f'for last; do :; done; echo made >> {tmp_path}/made; cp {tmp_path}/one.so "$last"',
    )
    planted = kept(
        tmp_path / "kernels", build._build_digest(str(compiler)), (tmp_path / "one.so").read_bytes()
    )
    assert build.load_library() is None
    assert "lack functions of this version" in build._build_and_load()[1].line()
    assert (tmp_path / "made").is_file(), "it was built again"
    assert not planted.exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"\x7fELF" + bytes(200)])
def test_junk_under_a_fitting_name_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    compiler = compiler_of(monkeypatch, tmp_path, "echo 'no more' >&2; exit 1")
    planted = kept(tmp_path / "kernels", build._build_digest(str(compiler)), content)
    assert build.load_library() is None
    assert "no more" in build._build_and_load()[1].line()
    assert not planted.exists()


def test_nothing_that_others_could_have_written_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = compiler_of(monkeypatch, tmp_path, "echo 'no more' >&2; exit 1")
    loaded: list[str] = []
    monkeypatch.setattr(build.ctypes, "CDLL", lambda name: loaded.append(name))
    digest, folder = build._build_digest(str(compiler)), tmp_path / "kernels"
    for mode in (0o720, 0o702, 0o777):
        planted = kept(folder, digest, b"evil", mode)
        assert build.load_library() is None
        assert not planted.exists()
    target = kept(tmp_path / "elsewhere", digest, b"evil")
    (folder / target.name).symlink_to(target)
    assert build.load_library() is None
    assert target.exists()
    real = os.fstat

    def foreign(file: int) -> os.stat_result:
        found = real(file)
        return os.stat_result((*found[:4], 4321, *found[5:]))  # st_uid

    with monkeypatch.context() as patched:
        patched.setattr(build.os, "fstat", foreign)
        kept(folder, digest, b"evil")
        assert build.load_library() is None
    assert loaded == []


def test_a_folder_of_ours_is_closed_and_one_of_others_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler_of(monkeypatch, tmp_path, "echo 'no more' >&2; exit 1")
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    assert build.load_library() is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    real = os.lstat

    def foreign(path: Path) -> os.stat_result:
        found = real(path)
        return os.stat_result((*found[:4], 4321, *found[5:]))

    monkeypatch.setattr(build.os, "lstat", foreign)
    assert "does not belong to this user; set LORRY_HOME" in build._build_and_load()[1].line()
    monkeypatch.setattr(build.os, "lstat", real)
    folder.rmdir()
    folder.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    assert "does not belong to this user" in build._build_and_load()[1].line()


def test_what_a_killed_build_left_is_removed_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler_of(monkeypatch, tmp_path, "echo 'no more' >&2; exit 1")
    for name, age in (("building-old", 7200), ("tmpold", 7200), ("building-new", 10)):
        (tmp_path / "kernels" / name).mkdir(parents=True)
        (tmp_path / "kernels" / name / "made.so").write_bytes(b"half")
        os.utime(tmp_path / "kernels" / name, (time.time() - age,) * 2)
    assert build.load_library() is None
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == ["building-new"]
