"""`lorry compare RUN RUN ...`: what runs cost and reached, side by side; or `lorry compare
data=FILE` to train each way first.

    lorry compare data=people.jsonl max_steps=100 ways=[lora,full,mlp] learning_rates={lora: 1e-3, full: 5e-5}

Every way is trained by a process of its own, so that its peak memory is its own, into a folder of
its name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lorry.config import dump_settings
from lorry.config.schema.run import RunConfig
from lorry.config.settings import CompareSettings
from lorry.console import VisibleConsole
from lorry.errors import ConfigError, DataError
from lorry.verbs.open_model import print_note
from lorry.visible import escape_document

COMPARE_RECORD_FILE = "compare.json"
CLI_PROGRAM = "import sys; from lorry.cli import main; sys.exit(main())"


def main(settings: CompareSettings) -> int:
    """Train what is to be trained, compare, print. Returns the exit code of a way that failed, else
    0; that of a DataError where a run is damaged: the others are compared, and it is named.
    """
    from lorry.disk import durable
    from lorry.report.compare import compare_runs_table, comparison_row, figure_ratios
    from lorry.runs.read import read_readable_runs

    ways = _training_ways(settings)
    if ways:
        _refuse_unsupported(settings)
    trained = [settings.run_of_way(name) for name in ways]
    if full_runs := [run for run in trained if run.lora is None]:
        from lorry.train.full import refuse_adapter_settings

        refuse_adapter_settings(full_runs[0].train, full_runs[0].memory_budget)
    # all that may be refused is refused before the first way has trained
    refuse_foreign_files(settings.output_dir, trained)
    for run in trained:
        # the ways that did train stay where they are, to be compared by name
        if code := train_in_subprocess(run, settings.output_dir):
            return code
    runs, damaged = read_readable_runs(
        [Path(path) for path in settings.runs] or [run.output_dir for run in trained]
    )
    rows = [comparison_row(run) for run in runs]
    record: dict[str, Any] = {
        "runs": [
            {**row, "ratios": ratios} for row, ratios in zip(rows, figure_ratios(rows), strict=True)
        ]
    }
    if damaged:
        record["damaged"] = [
            {"name": damaged_run.name, "path": str(damaged_run.path), "why": damaged_run.why}
            for damaged_run in damaged
        ]
    # of runs that were named, no folder is ours to write in
    if trained:
        durable.write_files(
            settings.output_dir,
            {
                COMPARE_RECORD_FILE: (
                    json.dumps(record, indent=1, ensure_ascii=False) + "\n"
                ).encode()
            },
        )
    if settings.format == "json":
        print(escape_document(json.dumps(record, indent=1, ensure_ascii=False)))
    else:
        VisibleConsole(soft_wrap=True).print(compare_runs_table(rows))
    for damaged_run in damaged:
        print_note(f"{damaged_run.name} is damaged and not shown: {damaged_run.why}")
    return DataError.exit_code if damaged else 0


def _training_ways(settings: CompareSettings) -> list[str]:
    """The ways to train: none where runs are named. Raises ConfigError where there is neither a run
    nor data.
    """
    has_data = settings.data.path is not None or bool(settings.data.mix)
    if settings.runs:
        if settings.backend.name != "single":
            raise ConfigError(
                f"backend={settings.backend.name}: finished runs are compared by their files, in one "
                "process; leave it out, or give data=FILE to train each way on"
            )
        if has_data:
            raise ConfigError(
                "runs and data are both given: name finished runs, or give data to train each way on; "
                "keep one"
            )
        return []
    if not has_data:
        raise ConfigError(
            "nothing to compare: name run directories, or give data=FILE to train each way first"
        )
    if not settings.ways or len(set(settings.ways)) < len(settings.ways):
        raise ConfigError(f"ways=[{', '.join(settings.ways)}]: name every way to train once")
    return list(settings.ways)


def _refuse_unsupported(settings: CompareSettings) -> None:
    """Raise ConfigError for what no way can do, before any has trained for nothing."""
    unsupported = {
        "jobs": settings.jobs,
        "background": settings.background,
        "train.push_to_hub": settings.train.push_to_hub,
    }
    if unsupported_names := [name for name, value in unsupported.items() if value]:
        raise ConfigError(
            f"{unsupported_names[0]}: all ways are trained one after the other in "
            "this command; leave it out"
        )
    whole = [way for way in settings.ways if way != "lora"]
    if settings.model.quantize is not None and whole:
        raise ConfigError(
            f"model.quantize={settings.model.quantize} with ways=[{', '.join(settings.ways)}]: packed weights "
            f"cannot train; leave quantize out, or compare with a run of {whole[0]} that is finished"
        )


def refuse_foreign_files(folder: Path, trained: list[RunConfig]) -> None:
    """Raise ConfigError for files of others where descriptions, runs and the record would go,
    before anything has trained.
    """
    from lorry.runs import ownership
    from lorry.train.start import MOVE_AWAY_HINT, claim_output_dir

    if trained:
        description_files = {
            folder / f"{run.output_dir.name}.yaml": lambda path: bool(
                ownership.read_run_description(path)
            )
            for run in trained
        }
        ownership.refuse_foreign(
            {**description_files, folder / COMPARE_RECORD_FILE: ownership.recognise_keys("runs")},
            MOVE_AWAY_HINT,
        )
        for run in trained:
            claim_output_dir(run.output_dir, run.job_names)


def train_in_subprocess(run: RunConfig, folder: Path) -> int:
    """`lorry sft` on a description written beside its directory, in a process of its own. Returns
    its exit code.
    """
    from lorry.disk import durable

    durable.make_directory(folder)
    file = folder / f"{run.output_dir.name}.yaml"
    durable.write_files(folder, {file.name: dump_settings(run).encode()})
    print_note(f"training {run.output_dir.name} at a learning rate of {run.train.learning_rate:g}")
    return subprocess.run(
        [sys.executable, "-c", CLI_PROGRAM, "sft", str(file)],
        # its last line is the run directory, which here is no result
        stdout=subprocess.DEVNULL,
        check=False,
    ).returncode
