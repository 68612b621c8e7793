"""`report.write_report` end to end: what it writes and where, what a browser makes of it, and that
it needs no torch.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lorry.errors import DataError
from lorry.report import write_report
from lorry.report.plots import render_png
from lorry.runs.read import read_readable_runs
from tests.support.runs import HOSTILE, full, metrics

PNG = b"\x89PNG\r\n\x1a\n"


def names(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def test_one_run_gets_its_page_and_picture(tmp_path: Path) -> None:
    run = full(tmp_path / "r")
    before = names(run)
    assert write_report([run]) == run / "report.html"
    assert names(run) - before == {"report.html", "report.png"}
    assert (run / "report.png").read_bytes().startswith(PNG)
    assert (run / "report.html").read_text("utf-8").startswith("<!doctype html>")


def test_building_twice_gives_the_same_page(tmp_path: Path) -> None:
    run = full(tmp_path / "r")
    first = write_report([run]).read_bytes()
    assert write_report([run]).read_bytes() == first


def test_where_the_page_goes(tmp_path: Path) -> None:
    one, two = full(tmp_path / "runs" / "one"), full(tmp_path / "runs" / "two")
    assert write_report([one, two]) == tmp_path / "runs" / "comparison.html"
    assert write_report([one], tmp_path / "out") == tmp_path / "out" / "report.html"
    assert write_report([one], tmp_path / "deep" / "page.html") == tmp_path / "deep" / "page.html"
    assert names(tmp_path / "deep") == {"page.html", "page.png"}


def test_a_bad_run_writes_nothing(tmp_path: Path) -> None:
    good, bad = full(tmp_path / "good"), full(tmp_path / "bad")
    (bad / "samples.json").write_text("[")
    with pytest.raises(DataError, match=r"samples\.json:1"):
        write_report([bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    page = write_report([good, bad], tmp_path / "out").read_text("utf-8")
    assert "bad is damaged and not shown" in page
    assert "samples.json:1" in page


@pytest.mark.parametrize("steps", [0, 1, 2, 15])
def test_pictures_of_short_runs(tmp_path: Path, steps: int) -> None:
    metrics(tmp_path / "r", steps)
    assert render_png(read_readable_runs([tmp_path / "r"])[0]).startswith(PNG)


def test_pictures_of_hostile_names_and_values(tmp_path: Path) -> None:
    paths = [full(tmp_path / name, text=HOSTILE[4]) for name in ("_$x^{$", "_b", "c<script>")]
    lines = [
        {"step": i, "loss": v} for i, v in enumerate(["NaN", 1e308, -1e308, "Infinity", 0.5], 1)
    ]
    (paths[0] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert render_png(read_readable_runs(paths)[0]).startswith(PNG)


def test_the_picture_shows_the_curve(tmp_path: Path) -> None:
    """The panels' colours are there: as many blue pixels as a line across the panels needs at
    least.
    """
    from PIL import Image

    metrics(tmp_path / "r", 50)
    image = Image.open(io.BytesIO(render_png(read_readable_runs([tmp_path / "r"])[0]))).convert(
        "RGB"
    )
    blue = sum(
        count for count, color in image.getcolors(2**24) or [] if color == (0x2A, 0x78, 0xD6)
    )
    assert image.width > 1000
    assert blue > 1500


def test_the_report_needs_neither_torch_nor_the_trainer(tmp_path: Path) -> None:
    run = full(tmp_path / "r")
    code = (
        "import sys\nfrom pathlib import Path\nimport lorry.report, lorry.report.table\n"
        "lorry.report.write_report([Path(sys.argv[1])])\n"
        "bad = {'torch', 'transformers', 'datasets', 'lorry.train'} & set(sys.modules)\nsys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next(
        (
            path
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (path := shutil.which(name))
        ),
        None,
    )
    if found is None:
        pytest.skip("no Chromium on this machine: the page is not opened in a browser")
    return found


def in_browser(chromium: str, page: Path) -> tuple[str, str]:
    """(the document after its script ran, the browser's log of console messages)."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr --dump-dom"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium, *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_a_browser_shows_every_section_and_asks_for_nothing(tmp_path: Path, chromium: str) -> None:
    dom, console = in_browser(
        chromium, write_report([full(tmp_path / "people", text=" ".join(HOSTILE[:4]))])
    )
    for section in (
        "figures",
        "curves",
        "evaluation",
        "samples",
        "training-rows",
        "contracts",
        "settings",
        "receipt",
    ):
        assert re.search(rf'<section[^>]* id="{section}"', dom), section
    assert "<title>people · Lorry</title>" in dom  # every hostile text tries to change it
    # the page's own script ran in every chart
    assert dom.count('class="tip"') == dom.count("<svg") >= 6
    assert console == ""  # a blocked or failed request, or a script error, would be here


def test_a_browser_shows_a_comparison(tmp_path: Path, chromium: str) -> None:
    dom, console = in_browser(
        chromium, write_report([full(tmp_path / "a"), full(tmp_path / "b", rank=4)])
    )
    assert '<section id="differences">' in dom
    assert console == ""


def test_the_browser_check_can_fail(tmp_path: Path, chromium: str) -> None:
    page = write_report([full(tmp_path / "r")])
    page.write_text(
        page.read_text().replace(
            "</main>",
            '<img src="http://127.0.0.1:9/x.png"><script>document.title="hacked"</script></main>',
        )
    )
    dom, console = in_browser(chromium, page)
    assert "Content Security Policy" in console
    assert "hacked</title>" not in dom  # the policy alone stopped the foreign script
