"""The report of a run: reads the files of run directories and writes one offline HTML page and a
PNG beside it.

Try: ``lorry.report.write_report([Path("runs/people")])``. Nothing here imports torch, transformers
or the trainer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorry.disk import durable
from lorry.report.html import render_page
from lorry.report.plots import render_png
from lorry.runs import ownership
from lorry.runs.layout import REPORT
from lorry.runs.read import read_readable_runs


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side, and return the page's path; the PNG
    has its name.

    output: the page (``.html``), or a directory for ``report.html``. By default a run's own
    directory; for several runs ``comparison.html`` in the directory they share. Both files replace
    older reports atomically; files of their names that are no reports are refused, or in a run's
    directory moved to its previous/N. A live run may be reported on. Among several, a run that is
    damaged is named on the page and left out. Raises ConfigError for files that are not ours to
    replace, DataError when a directory is no run, or none can be read; nothing is written then.
    Raises DiskError when the disk refuses.
    """
    runs, damaged = read_readable_runs(run_dirs)
    target = _report_path(run_dirs, output)
    picture = target.with_suffix(".png")
    if not ownership.is_run(target.parent):
        ownership.refuse_foreign(
            {target: ownership.is_report_page, picture: ownership.is_report_picture},
            "name another output_dir",
        )
    text, image = render_page(runs, damaged), render_png(runs)
    durable.make_directory(target.parent)
    ownership.write_owned_files(
        target.parent,
        {picture.name: image, target.name: text.encode("utf-8")},
        ours=_is_report_file,
    )
    return target


def _is_report_file(path: Path) -> bool:
    return ownership.is_report_page(path) or ownership.is_report_picture(path)


def _report_path(paths: Sequence[Path], output: Path | None) -> Path:
    if output is not None:
        return output if output.suffix in (".html", ".htm") else output / REPORT
    if len(paths) == 1:
        return paths[0] / REPORT
    return Path(os.path.commonpath([path.resolve().parent for path in paths])) / "comparison.html"
