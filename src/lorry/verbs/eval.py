"""`lorry eval RUN data=FILE`: loss, perplexity and accuracy of a file's rows, and how its questions are answered, greedily.

A model with adapters is evaluated without them and with each, in one process on the same weights, side by side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lorry.config.evaluation import EvalSettings
from lorry.console import Console
from lorry.disk import documents, ownership, receipt
from lorry.errors import ConfigError
from lorry.evaluate.bootstrap import FEWEST_ROWS, TOO_FEW
from lorry.report.run import load
from lorry.report.text import number
from lorry.verbs import exams
from lorry.verbs.opening import opened, tell
from lorry.visible import visible

if TYPE_CHECKING:
    from lorry.bank.mix import Mix
    from lorry.data.sources import Source
    from lorry.evaluate.exam import Exam
    from lorry.evaluate.rows import EvalRows, Evaluated
    from lorry.models.open import Opened

BASE = "base"
EVALUATION = "evaluation.json"  # what the report reads
RESULTS, FILE_SUFFIXES = "results.json", (".json", ".csv")
NEW_TOKENS = 64


def main(settings: EvalSettings, notes: list[str]) -> int:
    """Read, evaluate each side, print the table, write what was asked for and the run's evaluation.json."""
    import torch

    refuse_wrong_kind(settings.output_dir)
    refuse_foreign_results(settings)
    if settings.backend.threads:
        torch.set_num_threads(settings.backend.threads)
    if settings.tasks:
        return on_sets(settings)
    source = open_rows(settings)  # before the model, which takes longer: a wrong path is told at once
    found = opened(settings.model)
    tell_other_dtype(found)
    rows = read(settings, found, source)
    for line in rows.tokens.report.lines():
        tell(line)
    sides = evaluate(settings, found, rows)
    Console(soft_wrap=True).print(side_by_side(label(settings), rows, sides))
    write(settings, found, rows, sides)
    return 0


def refuse_wrong_kind(output: Path | None) -> None:
    """Before anything is measured: a folder where a file is named, or the reverse. Raises ConfigError."""
    if output is None:
        return
    if output.suffix in FILE_SUFFIXES and output.is_dir():
        raise ConfigError(f"output_dir={output} is a directory with a file's name; give another name")
    if output.suffix not in FILE_SUFFIXES and output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir={output} is a file; give a folder, or a .json file")


def refuse_foreign_results(settings: EvalSettings) -> None:
    """Before anything is measured: files where results would go that no `lorry eval` wrote. Raises ConfigError."""
    output = settings.output_dir
    if output is None:
        return
    files = (
        [output] if output.suffix in FILE_SUFFIXES else [output / name for name in (exams.FILES if settings.tasks else [RESULTS])]
    )
    ownership.refuse_foreign({file: exams.RECOGNISED[file.suffix] for file in files}, "name another output_dir")


def on_sets(settings: EvalSettings) -> int:
    """The same on named sets."""
    read = exams.read(settings)
    found = opened(settings.model)
    tell_other_dtype(found)
    tell_learnt(settings, found, read)
    results = exams.take(settings, found, read, mixes(found))
    how = f", {settings.n_shot} worked examples" if settings.n_shot else ""
    Console(soft_wrap=True).print(exams.table(f"{settings.model.name}{how}: value [95% interval]", read, results))
    write_beside(found, exams.entries(settings, read, results))
    exams.write(settings, read, results)
    return 0


def tell_learnt(settings: EvalSettings, found: Opened, read: list[Exam]) -> None:
    """A warning where a run is asked rows of the file or split it was trained on."""
    from lorry.config.data import DataConfig
    from lorry.data.mixtures import learnt
    from lorry.data.places import Places

    run = run_of(found)
    if run is None:
        return
    config = load(run).config
    jobs = [job for job in config.get("jobs") or [] if isinstance(job, dict)]
    datas = [{**config.get("data", {}), **job.get("data", {})} for job in jobs] or [config.get("data", {})]
    spots = [spot for data in datas for spot in learnt(DataConfig.model_validate(data))]
    places = Places(settings.local, field="local")
    for exam in read:
        if any(places.of(exam.one, exam.split).overlaps(spot) for spot in spots):
            tell(
                f"warning: {exam.one.name}: {run} was trained on rows of {exam.source}; what it has learnt by heart is no measure"
            )


def run_of(found: Opened) -> Path | None:
    """The run directory that is evaluated, if it is one."""
    run = Path(found.source.get("adapter") or found.source["path"])
    return run if ownership.described(run) else None


def mixes(found: Opened) -> dict[str, Mix]:
    """What is asked: the base, and each adapter under its name."""
    from lorry.bank.mix import Mix

    return {BASE: Mix.none()} | {side(name, found): Mix.one(name) for name in found.adapters}


def tell_other_dtype(found: Opened) -> None:
    """A note when a run is evaluated in another number format than it was trained in: its numbers then differ a little."""
    file = Path(found.source.get("adapter", "")) / "receipt.json"
    if not found.source.get("adapter") or not file.is_file():
        return
    trained, now = receipt.part(load(file.parent).receipt, "base").get("dtype"), found.source["dtype"]
    if trained is not None and trained != now:
        tell(f"note: trained in {trained}, evaluated in {now}; dtype={trained} gives the numbers of the training")


def open_rows(settings: EvalSettings) -> Source:
    """The rows, not read yet. Raises DataError for a path that is not there."""
    from lorry.data.sources import open_source

    data = settings.data
    return open_source(data.path or [], name=data.name, split=data.split, on_bad_row=data.on_bad_row, limit=settings.limit)


def read(settings: EvalSettings, found: Opened, source: Source) -> EvalRows:
    """The rows, encoded as training would; never longer than the model's context."""
    from lorry.data.encode import Encoder
    from lorry.data.formats import chosen
    from lorry.evaluate.rows import EvalRows

    data, context = settings.data, found.model.context
    length = data.max_length if context is None else min(data.max_length, context)
    only = True if data.completion_only_loss is None else data.completion_only_loss
    rows = found.model.vocabulary
    encoder = Encoder(
        found.tokenizer, max_length=length, completion_only_loss=only, system=data.system, embeddings=rows, tell=tell
    )
    return EvalRows.read(source, encoder, chosen(data.format, data.text_field))


def evaluate(settings: EvalSettings, found: Opened, rows: EvalRows) -> dict[str, Evaluated]:
    """{base, and each adapter's name: its result}."""
    from lorry.evaluate.rows import evaluate_rows

    longest = settings.max_new_tokens or NEW_TOKENS
    asked, notes = rows.askable(found.model.context, longest)
    for note in notes:
        tell(f"note: {note}")
    done = {}
    with Console(stderr=True).status("evaluating") as status:
        for name, mix in mixes(found).items():
            status.update(f"evaluating {name}: {len(rows.rows)} rows, {len(asked)} answers")
            done[name] = evaluate_rows(
                found.model, rows, mix, asked=asked, max_new_tokens=longest, batch_rows=settings.batch_size
            )
    return done


def side(name: str, found: Opened) -> str:
    """What an adapter's column is called: its name, also where that is the base's."""
    return f"adapter {name}" if name == BASE else name


def label(settings: EvalSettings) -> str:
    """The data in a few words."""
    path = settings.data.path if isinstance(settings.data.path, str) else ", ".join(settings.data.path or [])
    split = f" [{settings.data.split}]" if settings.data.split != "train" else ""
    return path + split + (f", the first {settings.limit} rows" if settings.limit else "")


def side_by_side(title: str, rows: EvalRows, sides: Mapping[str, Evaluated]) -> Table:
    """A row per metric, a column per side; 95% intervals where there are any."""
    first = next(iter(sides.values()))
    answered = f", {len(first.said)} answered" if first.said else ""
    heading = Text(visible(f"{title}: {len(rows.rows)} rows{answered}"))
    table = Table(title=heading, title_justify="left", header_style="dim", box=SIMPLE_HEAD)
    for column in ("metric", *sides):
        table.add_column(Text(visible(column)), justify="left" if column == "metric" else "right")
    for metric in first.metrics:
        cells = [_cell(one, metric) for one in sides.values()]
        table.add_row(Text(metric.replace("_", " ")), *map(Text, cells))
    if 0 < len(first.said) < FEWEST_ROWS:
        table.caption, table.caption_justify = Text(TOO_FEW), "left"
    return table


def _cell(one: Evaluated, metric: str) -> str:
    value = number(one.metrics[metric])
    if metric not in one.intervals:
        return value
    low, high = one.intervals[metric]
    return f"{value} [{number(low)}, {number(high)}]"


def write(settings: EvalSettings, found: Opened, rows: EvalRows, sides: Mapping[str, Evaluated]) -> None:
    """The run's evaluation.json where a run was evaluated, and results.json where ``output_dir`` was given."""
    write_beside(found, _entries(label(settings), sides))
    if settings.output_dir is not None:
        path = settings.output_dir if settings.output_dir.suffix in FILE_SUFFIXES else settings.output_dir / RESULTS
        _put(path, _whole(settings, rows, sides))
        tell(f"written to {path}")


def write_beside(found: Opened, entries: list[dict[str, Any]]) -> None:
    """Into the evaluation.json of the run, where a run was evaluated."""
    if (run := run_of(found)) is not None:
        merge_into(run / EVALUATION, entries)
        tell(f"written to {run / EVALUATION}; `lorry report {run}` shows it")


def _entries(name: str, sides: Mapping[str, Evaluated]) -> list[dict[str, Any]]:
    """Entries of evaluation.json, one per adapter: every metric before (base) and after."""
    before, *after = sides.items()
    if not after:  # a base that was trained itself: there is no before
        return [{"name": name, "metrics": {m: {"before": None, "after": _finite(v)} for m, v in before[1].metrics.items()}}]
    names = [name] if len(after) == 1 else [f"{name} ({adapter})" for adapter, _ in after]
    return [
        {
            "name": entry,
            "metrics": {
                metric: {
                    "before": _finite(before[1].metrics[metric]),
                    "after": _finite(one.metrics[metric]),
                    **({"interval": list(one.intervals[metric])} if metric in one.intervals else {}),
                }
                for metric in one.metrics
            },
        }
        for entry, (_, one) in zip(names, after, strict=True)
    ]


def merge_into(path: Path, entries: list[dict[str, Any]]) -> None:
    """Add entries to an evaluation.json; those of the same name are replaced. Raises DataError when it is damaged."""
    kept: list[dict[str, Any]] = []
    if path.is_file():
        load(path.parent)  # every field checked, so that reading it plainly is safe
        kept = documents.read_json(path)
    names = {entry["name"] for entry in entries}
    _put(path, [*(entry for entry in kept if entry["name"] not in names), *entries])


def _whole(settings: EvalSettings, rows: EvalRows, sides: Mapping[str, Evaluated]) -> dict[str, Any]:
    """Everything: settings, metrics with their intervals, and per row what was asked, expected, said and scored."""
    summaries = {
        name: {"metrics": {m: _finite(v) for m, v in one.metrics.items()}, "intervals": one.intervals}
        for name, one in sides.items()
    }
    return {
        "model": settings.model.name, "data": label(settings), "rows": len(rows.rows), "left_out": rows.tokens.report.left_out,
        "max_new_tokens": settings.max_new_tokens or NEW_TOKENS, "sides": summaries,
        "predictions": [_row(rows, at, sides) for at in range(len(rows.rows))],
    }  # fmt: skip


def _row(rows: EvalRows, at: int, sides: Mapping[str, Evaluated]) -> dict[str, Any]:
    row = rows.rows[at]
    shown: dict[str, Any] = {"where": row.where, "supervised_tokens": next(iter(sides.values())).forced[at].tokens}
    if row.references:
        shown |= {"question": row.question, "references": row.references}
    for name, one in sides.items():
        loss = {"loss": _finite(one.forced[at].metrics()["loss"])}
        shown[name] = loss | ({"answer": one.said[at], **one.scores[at]} if at in one.said else {})
    return shown


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _put(path: Path, value: Any) -> None:
    from lorry.disk import durable

    durable.make_directory(path.parent)
    durable.write_files(path.parent, {path.name: (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()})
