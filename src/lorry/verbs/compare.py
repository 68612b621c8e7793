"""`lorry compare RUN RUN ...`: what runs cost and reached, side by side; or `lorry compare data=FILE` to train each way first.

    lorry compare data=people.jsonl max_steps=100 ways=[lora,full,mlp] learning_rates={lora: 1e-3, full: 5e-5}

Every way is trained by a process of its own, so that its peak memory is its own, into a folder of its name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lorry.config import dump
from lorry.config.schema import Run
from lorry.config.settings import CompareSettings
from lorry.console import Console
from lorry.errors import ConfigError, DataError
from lorry.verbs.open_model import tell
from lorry.visible import escaped

RECORD = "compare.json"
PROGRAM = "import sys; from lorry.cli import main; sys.exit(main())"


def main(settings: CompareSettings, notes: list[str]) -> int:
    """Train what is to be trained, compare, print. Returns the exit code of a way that failed, else 0; that of a DataError where
    a run is damaged: the others are compared, and it is named.
    """
    from lorry.disk import durable
    from lorry.report.compare import ratios, row_of, side_by_side
    from lorry.runs.read import load_readable

    trained = [settings.way(name) for name in _ways(settings)]
    _refuse(settings, trained)
    refuse_foreign(settings.output_dir, trained)
    for run in trained:
        if code := train(run, settings.output_dir):
            return code
    runs, damaged = load_readable([Path(path) for path in settings.runs] or [run.output_dir for run in trained])
    rows = [row_of(run) for run in runs]
    record: dict[str, Any] = {"runs": [{**row, "ratios": over} for row, over in zip(rows, ratios(rows), strict=True)]}
    if damaged:
        record["damaged"] = [{"name": one.name, "path": str(one.path), "why": one.why} for one in damaged]
    if trained:
        durable.write_files(settings.output_dir, {RECORD: (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()})
    if settings.format == "json":
        print(escaped(json.dumps(record, indent=1, ensure_ascii=False)))
    else:
        Console(soft_wrap=True).print(side_by_side(rows))
    for one in damaged:
        tell(f"{one.name} is damaged and left out: {one.why}")
    return DataError.exit_code if damaged else 0


def _ways(settings: CompareSettings) -> list[str]:
    """The ways to train: none where runs are named. Raises ConfigError where there is neither a run nor data."""
    given = settings.data.path is not None or bool(settings.data.mix)
    if settings.runs:
        if given:
            raise ConfigError("runs and data are both given: name finished runs, or give data to train each way on; keep one")
        return []
    if not given:
        raise ConfigError("nothing to compare: name run directories, or give data=FILE to train each way first")
    if not settings.ways or len(set(settings.ways)) < len(settings.ways):
        raise ConfigError(f"ways=[{', '.join(settings.ways)}]: name every way to train once")
    return list(settings.ways)


def _refuse(settings: CompareSettings, trained: list[Run]) -> None:
    """Raise ConfigError for what some way cannot do, before any other has trained for nothing."""
    alone = {"jobs": settings.jobs, "background": settings.background, "train.push_to_hub": settings.train.push_to_hub}
    if trained and (odd := [name for name, value in alone.items() if value]):
        raise ConfigError(f"{odd[0]}: ways are trained one after the other, waited for and compared; leave it out")
    if whole := [run for run in trained if run.lora is None]:
        from lorry.train.full import refuse_adapters_settings

        refuse_adapters_settings(whole[0])


def refuse_foreign(folder: Path, trained: list[Run]) -> None:
    """Raise ConfigError for files of others where descriptions, runs and the record would go, before anything has trained."""
    from lorry.runs import ownership
    from lorry.train.start import OTHERWISE, claim

    if trained:
        described = {folder / f"{run.output_dir.name}.yaml": lambda path: bool(ownership.description(path)) for run in trained}
        ownership.refuse_foreign({**described, folder / RECORD: ownership.has_keys("runs")}, OTHERWISE)
        for run in trained:
            claim(run)


def train(run: Run, folder: Path) -> int:
    """`lorry sft` on a description written beside its directory, in a process of its own. Returns its exit code."""
    from lorry.disk import durable

    durable.make_directory(folder)
    file = folder / f"{run.output_dir.name}.yaml"
    durable.write_files(folder, {file.name: dump(run).encode()})
    tell(f"training {run.output_dir.name} at a learning rate of {run.train.learning_rate:g}")
    return subprocess.run([sys.executable, "-c", PROGRAM, "sft", str(file)], stdout=subprocess.DEVNULL, check=False).returncode
