"""`lorry eval RUN data=FILE`: loss, perplexity and accuracy of a file's rows, and how its questions
are answered, greedily.

A model with adapters is evaluated without them and with each, in one process on the same weights,
side by side.
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
from lorry.console import VisibleConsole
from lorry.disk import documents, receipt
from lorry.errors import ConfigError
from lorry.evaluate.metrics.bootstrap import MIN_INTERVAL_ROWS, TOO_FEW_ROWS_MESSAGE
from lorry.formatting import format_count, format_number
from lorry.runs import ownership
from lorry.runs.layout import EVALUATION, RECEIPT
from lorry.runs.read import read_run
from lorry.verbs import benchmarks
from lorry.verbs.open_model import MIXTURE_SIDE, base_side, open_on_ranks, print_note
from lorry.verbs.unlearning_suite import evaluate_suite
from lorry.visible import make_visible

if TYPE_CHECKING:
    from lorry.adapters.mix import Mix
    from lorry.backends.distributed.communicator import Communicator
    from lorry.data.reading.sources import DataSource
    from lorry.evaluate.benchmarks.questions import Benchmark
    from lorry.evaluate.rows import EvalRows, EvaluationResult
    from lorry.models.loading.open import OpenedModel

RESULTS_FILE, FILE_SUFFIXES = "results.json", (".json", ".csv")
# as `generate_answers` has it; enough for an answer, not for an essay
EVAL_NEW_TOKENS = 64


def main(settings: EvalSettings) -> int:
    """Read, evaluate each side, print the table, write what was asked for and the run's
    evaluation.json.
    """
    from lorry.train.processes import share_command

    with share_command(settings) as (placed, communicator):
        refuse_wrong_kind(placed.output_dir)
        if placed.suite.name is None:  # which has files of its own
            refuse_foreign_results(placed)
        # whoever sees files that were there before has seen them before rank 0 writes any
        communicator.exchange("the place of the results")
        if placed.tasks:
            evaluate_named_sets(placed, communicator)
        elif placed.suite.name is not None:
            evaluate_suite(placed, communicator)
        else:
            evaluate_file(placed, communicator)
    return 0


def evaluate_file(settings: EvalSettings, communicator: Communicator) -> None:
    """The rows of a file."""
    from lorry.train.processes import refuse_other_questions

    # before the model, which takes longer: a wrong path is told at once
    source = open_eval_source(settings)
    opened = open_on_ranks(settings, communicator)
    note_other_dtype(opened)
    rows = encode_eval_rows(settings, opened, source)
    for line in rows.tokens.report.lines():
        print_note(line)
    refuse_other_questions(communicator, opened.model, rows.tokens.digest)
    sides = evaluate_sides(settings, opened, rows, communicator)
    if communicator.rank:  # rank 0 shows and writes
        return
    VisibleConsole(soft_wrap=True).print(evaluation_sides_table(data_label(settings), rows, sides))
    write_evaluation(settings, opened, rows, sides)


def refuse_wrong_kind(output: Path | None) -> None:
    """Before anything is measured: a folder where a file is named, or the reverse. Raises
    ConfigError.
    """
    if output is None:
        return
    if output.suffix in FILE_SUFFIXES and output.is_dir():
        raise ConfigError(
            f"output_dir={output} is a directory, where a file is to be written; give another name"
        )
    if output.suffix not in FILE_SUFFIXES and output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir={output} is a file; give a folder, or a .json file")


def refuse_foreign_results(settings: EvalSettings) -> None:
    """Before anything is measured: files where results would go that no `lorry eval` wrote. Raises
    ConfigError.
    """
    output = settings.output_dir
    if output is None:
        return
    files = (
        [output]
        if output.suffix in FILE_SUFFIXES
        else [
            output / name
            for name in (benchmarks.BENCHMARK_FILES if settings.tasks else [RESULTS_FILE])
        ]
    )
    ownership.refuse_foreign(
        {file: benchmarks.RECOGNISED_FILES[file.suffix] for file in files},
        "name another output_dir",
    )


def evaluate_named_sets(settings: EvalSettings, communicator: Communicator) -> None:
    """The same on named sets."""
    from lorry.train.processes import refuse_other_questions

    loaded = benchmarks.load_benchmarks(settings)
    opened = open_on_ranks(settings, communicator)
    note_other_dtype(opened)
    warn_trained_rows(settings, opened, loaded)
    asked = " ".join(benchmark.digest for benchmark in loaded)
    refuse_other_questions(communicator, opened.model, asked)
    results = benchmarks.evaluate_benchmarks(
        settings, opened, loaded, evaluation_mixes(opened, settings.weight), communicator
    )
    if communicator.rank:
        return
    shots = f", {settings.n_shot} few-shot examples" if settings.n_shot else ""
    VisibleConsole(soft_wrap=True).print(
        benchmarks.benchmark_table(
            f"{settings.model.name}{shots}: value [95% interval]", loaded, results
        )
    )
    write_run_evaluation(opened, benchmarks.benchmark_entries(settings, loaded, results))
    benchmarks.write_benchmark_results(settings, loaded, results)


def warn_trained_rows(settings: EvalSettings, opened: OpenedModel, loaded: list[Benchmark]) -> None:
    """A warning where a run is asked rows of the file or split it was trained on."""
    from lorry.config.data import DataConfig
    from lorry.data.catalog import open_catalog
    from lorry.data.reading.places import DataLocations
    from lorry.data.stream.mixtures import training_locations

    run = evaluated_run_dir(opened)
    if run is None:
        return
    config = read_run(run).config
    # run.yaml of a directory from elsewhere is text like any other
    entries = [
        entry
        for key in ("jobs", "experts")
        for entry in config.get(key) or []
        if isinstance(entry, dict)
    ]
    data_settings = [{**config.get("data", {}), **entry.get("data", {})} for entry in entries] or [
        config.get("data", {})
    ]
    try:
        trained_on = [
            spot
            for data in data_settings
            # an expert that was brought along may have none
            if data.get("path") or data.get("mix")
            for spot in training_locations(DataConfig.model_validate(data))
        ]
    except ConfigError as error:  # the run's own catalogue is not what it was
        print_note(f"note: cannot tell whether {run} was trained on rows of these sets: {error}")
        return
    catalog = open_catalog(settings.catalog, field="catalog")
    places = DataLocations(settings.local, field="local", catalog=catalog)
    for benchmark in loaded:
        if any(
            places.of(benchmark.named_set, benchmark.split).overlaps(spot) for spot in trained_on
        ):
            print_note(
                f"warning: {benchmark.named_set.name}: {run} was trained on rows of "
                f"{benchmark.source}; its results on rows that it was trained on "
                "say nothing about new ones"
            )


def evaluated_run_dir(opened: OpenedModel) -> Path | None:
    """The run directory that is evaluated, if it is one."""
    run = Path(opened.source.get("adapter") or opened.source["path"])
    return run if ownership.run_description_of(run) else None


def evaluation_mixes(opened: OpenedModel, weight: float = 1.0) -> dict[str, Mix]:
    """What is asked: the base (or start), and each adapter, times ``weight``, under its name."""
    from lorry.adapters.mix import Mix

    sides = {base_side(opened): Mix.none()} | {
        side_label(name, opened, weight): Mix.constants({name: weight}) for name in opened.adapters
    }
    return sides if opened.mixture is None else {**sides, MIXTURE_SIDE: opened.mixture}


def note_other_dtype(opened: OpenedModel) -> None:
    """A note when a run is evaluated in another number format than it was trained in: its numbers
    then differ a little.
    """
    file = Path(opened.source.get("adapter", "")) / RECEIPT
    if not opened.source.get("adapter") or not file.is_file():
        return
    trained, now = (
        receipt.part(read_run(file.parent).receipt, "base").get("dtype"),
        opened.source["dtype"],
    )
    # receipts of early versions have no dtype
    if trained is not None and trained != now:
        print_note(
            f"note: trained in {trained}, evaluated in {now}; dtype={trained} gives "
            "the same numbers as in training"
        )


def open_eval_source(settings: EvalSettings) -> DataSource:
    """The rows, not read yet. Raises DataError for a path that is not there."""
    from lorry.data.reading.sources import open_source

    data = settings.data
    return open_source(
        data.path or [],
        name=data.name,
        split=data.split,
        on_bad_row=data.on_bad_row,
        limit=settings.limit,
    )


def encode_eval_rows(settings: EvalSettings, opened: OpenedModel, source: DataSource) -> EvalRows:
    """The rows, encoded as training would; never longer than the model's context."""
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.data.reading.formats import format_named
    from lorry.evaluate.rows import EvalRows

    data, context = settings.data, opened.model.context
    # beyond its context a model with learned positions has none, and others were not trained
    length = data.max_length if context is None else min(data.max_length, context)
    # answers only, as training does for rows with answers; plain text has no prompt to leave out
    only = True if data.completion_only_loss is None else data.completion_only_loss
    rows = opened.model.vocab_size
    encoder = ExampleEncoder(
        opened.tokenizer,
        max_length=length,
        completion_only_loss=only,
        system=data.system,
        embeddings=rows,
        tell=print_note,
    )
    return EvalRows.read(source, encoder, format_named(data.format, data.text_field))


def evaluate_sides(
    settings: EvalSettings, opened: OpenedModel, rows: EvalRows, communicator: Communicator
) -> dict[str, EvaluationResult]:
    """{base, and each adapter's name: its result}."""
    from lorry.evaluate.rows import evaluate_rows

    max_new_tokens = settings.max_new_tokens or EVAL_NEW_TOKENS
    answer_rows, notes = rows.askable(opened.model.context, max_new_tokens)
    for note in notes:
        print_note(f"note: {note}")
    results = {}
    with VisibleConsole(stderr=True).status("evaluating") as status:
        for name, mix in evaluation_mixes(opened, settings.weight).items():
            status.update(
                f"evaluating {name}: {format_count(len(rows.rows), 'row')}, "
                f"{format_count(len(answer_rows), 'answer')}"
            )
            results[name] = evaluate_rows(
                opened.model,
                rows,
                mix,
                answer_rows=answer_rows,
                max_new_tokens=max_new_tokens,
                batch_rows=settings.batch_size,
                communicator=communicator,
            )
    return results


def side_label(name: str, opened: OpenedModel, weight: float = 1.0) -> str:
    """What an adapter's column is called: its name, also where that is the base's, and its weight
    where that is not 1."""
    # two columns of one name would be one in a dict
    own = f"adapter {name}" if name == base_side(opened) else name
    return own if weight == 1 else f"{own} x {weight:g}"


def data_label(settings: EvalSettings) -> str:
    """The data in a few words."""
    path = (
        settings.data.path
        if isinstance(settings.data.path, str)
        else ", ".join(settings.data.path or [])
    )
    split = f" [{settings.data.split}]" if settings.data.split != "train" else ""
    # part of the name: another weight's numbers do not take the place of the whole adapter's
    share = "" if settings.weight == 1 else f", weight={settings.weight:g}"
    return path + split + (f", the first {settings.limit} rows" if settings.limit else "") + share


def evaluation_sides_table(
    title: str, rows: EvalRows, sides: Mapping[str, EvaluationResult]
) -> Table:
    """A row per metric, a column per side; 95% intervals where there are any."""
    first = next(iter(sides.values()))
    answered = f", {len(first.answers)} answered" if first.answers else ""
    heading = Text(make_visible(f"{title}: {format_count(len(rows.rows), 'row')}{answered}"))
    table = Table(title=heading, title_justify="left", header_style="dim", box=SIMPLE_HEAD)
    for column in ("metric", *sides):
        table.add_column(
            Text(make_visible(column)), justify="left" if column == "metric" else "right"
        )
    for metric in first.metrics:
        cells = [_side_cell(result, metric) for result in sides.values()]
        table.add_row(Text(metric.replace("_", " ")), *map(Text, cells))
    if 0 < len(first.answers) < MIN_INTERVAL_ROWS:
        table.caption, table.caption_justify = Text(TOO_FEW_ROWS_MESSAGE), "left"
    return table


def _side_cell(result: EvaluationResult, metric: str) -> str:
    value = format_number(result.metrics[metric])
    if metric not in result.intervals:
        return value
    low, high = result.intervals[metric]
    return f"{value} [{format_number(low)}, {format_number(high)}]"


def write_evaluation(
    settings: EvalSettings,
    opened: OpenedModel,
    rows: EvalRows,
    sides: Mapping[str, EvaluationResult],
) -> None:
    """The run's evaluation.json where a run was evaluated, and results.json where ``output_dir``
    was given.
    """
    write_run_evaluation(opened, _evaluation_entries(data_label(settings), sides))
    if settings.output_dir is not None:
        path = (
            settings.output_dir
            if settings.output_dir.suffix in FILE_SUFFIXES
            else settings.output_dir / RESULTS_FILE
        )
        _write_results(path, _full_results(settings, rows, sides))
        print_note(f"written to {path}")


def write_run_evaluation(opened: OpenedModel, entries: list[dict[str, Any]]) -> None:
    """Into the evaluation.json of the run, where a run was evaluated."""
    if (run := evaluated_run_dir(opened)) is not None:
        merge_evaluation_entries(run / EVALUATION, entries)
        print_note(f"written to {run / EVALUATION}; `lorry report {run}` shows it")


def _evaluation_entries(name: str, sides: Mapping[str, EvaluationResult]) -> list[dict[str, Any]]:
    """Entries of evaluation.json, one per adapter: every metric before (base) and after."""
    before, *after = sides.items()
    if not after:  # a base that was trained itself: there is no before
        return [
            {
                "name": name,
                "metrics": {
                    m: {"before": None, "after": _finite_or_none(v)}
                    for m, v in before[1].metrics.items()
                },
            }
        ]
    names = [name] if len(after) == 1 else [f"{name} ({adapter})" for adapter, _ in after]
    return [
        {
            "name": entry,
            "metrics": {
                metric: {
                    "before": _finite_or_none(before[1].metrics[metric]),
                    "after": _finite_or_none(result.metrics[metric]),
                    **(
                        {"interval": list(result.intervals[metric])}
                        if metric in result.intervals
                        else {}
                    ),
                }
                for metric in result.metrics
            },
        }
        for entry, (_, result) in zip(names, after, strict=True)
    ]


def merge_evaluation_entries(path: Path, entries: list[dict[str, Any]]) -> None:
    """Add entries to an evaluation.json; those of the same name are replaced. Raises DataError when
    it is damaged.
    """
    existing: list[dict[str, Any]] = []
    if path.is_file():
        read_run(path.parent)  # every field checked, so that reading it plainly is safe
        existing = documents.read_json_document(path)
    names = {entry["name"] for entry in entries}
    # by name: the same data evaluated again stands in the place of the old result
    _write_results(path, [*(entry for entry in existing if entry["name"] not in names), *entries])


def _full_results(
    settings: EvalSettings, rows: EvalRows, sides: Mapping[str, EvaluationResult]
) -> dict[str, Any]:
    """Everything: settings, metrics with their intervals, and per row what was asked, expected,
    said and scored.
    """
    summaries = {
        name: {
            "metrics": {m: _finite_or_none(v) for m, v in result.metrics.items()},
            "intervals": result.intervals,
        }
        for name, result in sides.items()
    }
    return {
        "model": settings.model.name,
        "data": data_label(settings),
        "rows": len(rows.rows),
        "left_out": rows.tokens.report.left_out,
        "max_new_tokens": settings.max_new_tokens or EVAL_NEW_TOKENS,
        "sides": summaries,
        "predictions": [_row_results(rows, at, sides) for at in range(len(rows.rows))],
    }


def _row_results(
    rows: EvalRows, number: int, sides: Mapping[str, EvaluationResult]
) -> dict[str, Any]:
    row = rows.rows[number]
    record: dict[str, Any] = {
        "where": row.where,
        "supervised_tokens": next(iter(sides.values())).teacher_forced[number].tokens,
    }
    if row.references:
        record |= {"question": row.question, "references": row.references}
    for name, result in sides.items():
        loss = {"loss": _finite_or_none(result.teacher_forced[number].metrics()["loss"])}
        record[name] = loss | (
            {"answer": result.answers[number], **result.scores[number]}
            if number in result.answers
            else {}
        )
    return record


def _finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _write_results(path: Path, value: Any) -> None:
    from lorry.disk import durable

    durable.make_directory(path.parent)
    # indent=1 and a model first: by these bytes RECOGNISED_FILES knows the file again
    durable.write_files(
        path.parent, {path.name: (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()}
    )
