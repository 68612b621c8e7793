"""Fixtures every test may use: where the shared data lies, quiet, deterministic torch, and the same
examples on every machine.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from lorry.disk import durable
from lorry.disk.home import lorry_home
from lorry.kernels import kernel_status
from lorry.models.loading.load import pick_dtype

# pytest explains a failed assert of a test module only, unless told otherwise
pytest.register_assert_rewrite("tests.support", "tests.fuzz")

# The suite draws the same examples everywhere, so that it says one thing of one commit.
# LORRY_EXPLORE=1000 draws new ones, more of them. How long an example takes says something of the machine's load
# alone: neither a deadline for it nor hypothesis' own check of slowness.
CLOCKLESS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("same", derandomize=True, max_examples=50, **CLOCKLESS)
settings.register_profile(
    "explore", max_examples=int(os.environ.get("LORRY_EXPLORE", "100")), **CLOCKLESS
)
settings.load_profile("explore" if "LORRY_EXPLORE" in os.environ else "same")

# tiny models: a second thread only waits, and results stay the same on any machine
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
KILLING = (
    "test_kill_and_resume.py",
    "test_disasters.py",
    "test_foreign_files.py",
    "test_unlearn_killed.py",
    "test_durable.py",
)
# a minute each, which nothing else could share if they came last
LONG = ("test_layouts.py", "test_base_layouts.py", "test_layout_runs.py", "test_verbs_on_ranks.py")
# folders whose tests look at charts; of verbs some do, and ask for them
DRAWING = ("report", "fuzz", "benchmarks")
FLAT = ROOT / "examples" / "flat.py"
# how wide and coloured whoever runs the suite wants a terminal to be: what tests read is neither
TERMINAL = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")


def pytest_configure() -> None:
    """A LORRY_HOME of the checkout's own: tests neither fill the cache of whoever runs them nor
    hang on what is in it. It outlives the run, as built kernels and proofs should. Only converted
    models are the user's (270 MB, 20 s), and kernels that are built already are copied: a link to
    them would be refused.
    """
    for name in TERMINAL:
        os.environ.pop(name, None)
    users, own = lorry_home(), ROOT / ".pytest_cache" / "lorry_home"
    if users == own:  # a worker of xdist
        return
    own.mkdir(parents=True, exist_ok=True)
    (users / "models").mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (own / "models").symlink_to((users / "models").resolve())
    if (users / "kernels").is_dir() and not (own / "kernels").exists():
        shutil.copytree(users / "kernels", own / "kernels")
    os.environ["LORRY_HOME"] = str(own)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that kill processes go first, then the rest of tests/train: they fork hundreds of
    times, which is slow once the process has grown to gigabytes. Then those that are long.
    """
    items.sort(
        key=lambda item: (
            item.path.name not in KILLING,
            (ROOT / "tests" / "train") not in item.path.parents,
            item.path.name not in LONG,
        )
    )


def pytest_collectstart() -> None:
    """What imports and tests' descriptions are made of stays until the end: until it is all there
    the collector would find nothing.
    """
    gc.disable()


def pytest_collection_finish() -> None:
    """Nor need it go through half a million objects again and again (a twentieth of all the time),
    and copy their pages in every fork.
    """
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    """Which kind of machine this run was: what dtype=auto means here (LORRY_DTYPE), and whether
    kernels run (LORRY_KERNELS).
    """
    return f"dtype=auto is {pick_dtype('auto', torch.device('cpu'))}; kernels: {kernel_status().line()}"


@pytest.fixture(scope="session", autouse=True)
def without_fsync() -> Iterator[None]:
    """Nothing that a test writes outlives its machine, and a run waits for some thirty of them.
    Tests of what fsync is for count it (tests/disk, tests/train/test_disasters.py); the processes
    of others make it.
    """
    from tests.support.faults import QuietDisk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "disk", QuietDisk())
        yield


@pytest.fixture(scope="module", autouse=True)
def blank_charts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports without charts, but where charts are what is tested."""
    from tests.support.charts import without_charts

    with contextlib.nullcontext() if request.path.parent.name in DRAWING else without_charts():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared data sets; the test is skipped, visibly, where it is absent."""
    from tests.support.shared_data import find_shared_data

    path = find_shared_data()
    if path is None:
        pytest.skip("shared data not found (set LORRY_DATA to its folder)")
    return path


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """The Hugging Face directory of stories260K, a real trained Llama of 260 K parameters."""
    return shared_data / "models" / "stories260K" / "hf"


@pytest.fixture(scope="module")
def flat() -> Any:
    """The 150-line twin as a module, to hold others to it and it to others."""
    spec = importlib.util.spec_from_file_location("flat", FLAT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The test runs with one thread of torch, and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
