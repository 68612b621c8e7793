"""The kernels on aarch64: cross-compiled and run under qemu-user, against the references of arm/driver.cpp.

Part of `make test-arm`, not of `make test`; skipped where Debian's cross compiler and qemu-user are
missing. Right results are what it shows, and no speed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lorry.kernels import build

pytestmark = pytest.mark.arm
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DRIVER = Path(__file__).parent / "arm" / "driver.cpp"


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=600)


# every aarch64 processor's instructions; and those of newer ones, which have bfloat16
@pytest.fixture(scope="module", params=["armv8-a", "armv8.6-a"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of all cases, built as `build.py` builds the kernels."""
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(
                f"no {tool}; apt-get install g++-aarch64-linux-gnu libc6-arm64-cross qemu-user"
            )
    folder = tmp_path_factory.mktemp(request.param)
    for source in [*sorted(build.SOURCES.glob("*.cpp")), DRIVER]:
        flags = [*build.FLAGS, f"-march={request.param}", "-std=c++17", "-Wall", "-Werror"]
        if source == DRIVER:
            # whose references round where they say, and nowhere less; GCC 12 fails at its loops with -O3
            flags += ["-ffp-contract=off", "-O1"]
        made = run(COMPILER, *flags, "-c", source, "-o", folder / f"{source.stem}.o")
        assert made.returncode == 0, made.stderr
    # static: the emulator then needs no libraries of another system
    program = folder / "driver"
    made = run(COMPILER, "-static", "-fopenmp", *folder.glob("*.o"), "-o", program)
    assert made.returncode == 0, made.stderr
    return program


def test_every_kernel_gives_what_plain_loops_give(driver: Path) -> None:
    done = run(EMULATOR, "-cpu", "max", driver)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert "FAILED" not in done.stdout
    assert done.stdout.count("ok ") >= 14


def test_every_case_sees_a_wrong_result(driver: Path) -> None:
    done = run(EMULATOR, "-cpu", "max", driver, "wrong")
    assert done.returncode == 1, done.stdout
    assert "ok " not in done.stdout


def test_every_kernel_has_a_case() -> None:
    """A kernel for some processors alone (inside #if) needs none."""
    named = DRIVER.read_text().partition("CASES[]")[2].replace('"', " ").split()
    missing = set(build._exported_functions()) - {*named, "lorry_amx"}
    assert not missing, f"no line in CASES of {DRIVER.name} for {', '.join(sorted(missing))}"
