"""The named sets of `lorry eval RUN tasks=[...]`: every set asked of every side (the base, each
adapter); a table, JSON, CSV and bars.

The base and each adapter answer in one process on the same weights, the same rows, the same worked
examples.
"""

from __future__ import annotations

import csv
import io
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
from lorry.disk import durable
from lorry.evaluate.metrics.bootstrap import MIN_INTERVAL_ROWS, TOO_FEW_ROWS_MESSAGE
from lorry.formatting import format_number
from lorry.runs import ownership
from lorry.verbs.open_model import print_note
from lorry.visible import make_visible

if TYPE_CHECKING:
    from lorry.backends.distributed.communicator import Communicator
    from lorry.evaluate.benchmarks.questions import Benchmark
    from lorry.evaluate.benchmarks.run import BenchmarkResult
    from lorry.models.loading.open import OpenedModel

# of results.csv; RECOGNISED_FILES knows the file by them
CSV_COLUMNS = ("set", "metric", "side", "value", "low", "high", "questions")
BENCHMARK_FILES = ("results.json", "results.csv", "results.png")
# what tells a file of results, of sets or of a file's rows, from somebody else's of its name
RECOGNISED_FILES = {
    ".json": ownership.recognise_mark(rb'\A\{\n "model": "[^\n]*",\n "(data|asked)": '),
    ".csv": ownership.recognise_mark(rb"\A" + ",".join(CSV_COLUMNS).encode() + rb"\n"),
    ".png": ownership.is_report_picture,
}

BenchmarkResults = dict[str, "dict[str, BenchmarkResult]"]  # set -> side -> its result


def load_benchmarks(settings: EvalSettings) -> list[Benchmark]:
    """The questions of every set. Raises ConfigError and DataError before any model is loaded."""
    from lorry.data.catalog import open_catalog
    from lorry.data.reading.places import DataLocations
    from lorry.evaluate.benchmarks.questions import load_benchmark

    catalog = open_catalog(settings.catalog, field="catalog")
    # field: errors name the setting as it is called here, not in a training run
    places = DataLocations(settings.local, field="local", catalog=catalog)
    benchmarks = [
        load_benchmark(
            name,
            places,
            split=settings.task_split,
            limit=settings.limit,
            n_shot=settings.n_shot,
            template=settings.template,
            seed=settings.seed,
            on_bad_row=settings.data.on_bad_row,
        )
        for name in catalog.expand_suites(settings.tasks)
    ]
    for benchmark in benchmarks:
        left = "".join(
            f"; left out {n} ({reason})" for reason, n in sorted(benchmark.left_out.items())
        )
        print_note(
            f"{benchmark.named_set.name}: {len(benchmark.questions)} questions of {benchmark.source} [{benchmark.split}]{left}"
        )
        for note in benchmark.notes:
            print_note(f"note: {note}")
    return benchmarks


def evaluate_benchmarks(
    settings: EvalSettings,
    opened: OpenedModel,
    benchmarks: list[Benchmark],
    mixes: Mapping[str, Any],
    communicator: Communicator,
) -> BenchmarkResults:
    """Every set, asked of every side, by the ranks of ``communicator`` together."""
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.evaluate.benchmarks.run import evaluate_benchmark

    context = opened.model.context
    encoder = ExampleEncoder(
        opened.tokenizer,
        # beyond any context: a model that names none takes what there is
        max_length=context or 1 << 20,
        system=settings.data.system,
        chat=settings.chat,
        embeddings=opened.model.vocab_size,
    )
    results: BenchmarkResults = {benchmark.named_set.name: {} for benchmark in benchmarks}
    with VisibleConsole(stderr=True).status("evaluating") as status:
        for benchmark in benchmarks:
            for side, mix in mixes.items():
                status.update(
                    f"{benchmark.named_set.name}: {len(benchmark.questions)} questions, {side}"
                )
                results[benchmark.named_set.name][side] = evaluate_benchmark(
                    opened.model,
                    encoder,
                    benchmark,
                    mix,
                    max_new_tokens=settings.max_new_tokens,
                    batch_rows=settings.batch_size,
                    seed=settings.seed,
                    communicator=communicator,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=settings.top_k,
                )
    for name, sides in results.items():
        # of all sides alike, since the prompt is; max, not a sum
        if shortened := max(result.shortened for result in sides.values()):
            print_note(
                f"note: {name}: {shortened} prompts were cut from the left to fit the model's context of {context} tokens"
            )
        if too_long := max(result.too_long for result in sides.values()):
            print_note(
                f"note: {name}: perplexity leaves out {too_long} right answers that "
                f"are longer than the context of {context} tokens"
            )
    return results


def benchmark_table(title: str, benchmarks: list[Benchmark], results: BenchmarkResults) -> Table:
    """A row per set and metric, a column per side, each value with its 95% interval."""
    table = Table(
        title=Text(make_visible(title)), title_justify="left", header_style="dim", box=SIMPLE_HEAD
    )
    sides = list(next(iter(results.values())))
    for column in ("set", "metric", *sides):
        table.add_column(
            Text(make_visible(column)), justify="left" if column in ("set", "metric") else "right"
        )
    for benchmark in benchmarks:
        by_side = results[benchmark.named_set.name]
        for position, metric in enumerate(next(iter(by_side.values())).metrics):
            cells = [
                _metric_cell(result.metrics[metric].value, result.metrics[metric].interval)
                for result in by_side.values()
            ]
            # the set's name once; its other metrics stand below it
            name = (
                f"{benchmark.named_set.name} ({len(benchmark.questions)})" if position == 0 else ""
            )
            table.add_row(Text(name), Text(metric.replace("_", " ")), *map(Text, cells))
    small_sets = [
        benchmark.named_set.name
        for benchmark in benchmarks
        if len(benchmark.questions) < MIN_INTERVAL_ROWS
    ]
    table.caption = (
        Text(make_visible(f"{', '.join(small_sets)}: {TOO_FEW_ROWS_MESSAGE}"))
        if small_sets
        else None
    )
    table.caption_justify = "left"
    return table


def _metric_cell(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return (
        f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"
        if math.isfinite(low)
        else format_number(value)
    )


def benchmark_label(settings: EvalSettings, benchmark: Benchmark) -> str:
    """A set as it was asked, in a few words: what tells a run's evaluations of it apart."""
    # only where it surprises: elsewhere the split is one nobody trains on
    split = f" [{benchmark.split}]" if benchmark.split == "train" else ""
    shots = f", {settings.n_shot} few-shot examples" if settings.n_shot else ""
    share = "" if settings.weight == 1 else f", weight={settings.weight:g}"
    return (
        benchmark.named_set.name
        + split
        + shots
        + share
        + (f", the first {settings.limit} rows" if settings.limit else "")
    )


def benchmark_entries(
    settings: EvalSettings, benchmarks: list[Benchmark], results: BenchmarkResults
) -> list[dict[str, Any]]:
    """Entries of evaluation.json: per set and adapter every metric before (base) and after."""
    entries = []
    for benchmark in benchmarks:
        # a base that was trained itself (lora=null) has nothing after it: it is the result
        base, *after = results[benchmark.named_set.name].items()
        for adapter, result in after or [base]:
            name = benchmark_label(settings, benchmark) + (
                f" ({adapter})" if len(after) > 1 else ""
            )
            sides = {"before": base[1] if after else None, "after": result}
            metrics: dict[str, dict[str, Any]] = {
                metric: {
                    side: None
                    if side_result is None
                    else _finite_or_none(side_result.metrics[metric].value)
                    for side, side_result in sides.items()
                }
                for metric in result.metrics
            }
            for metric, estimate in result.metrics.items():
                # too few rows have no interval
                if all(map(math.isfinite, estimate.interval)):
                    metrics[metric]["interval"] = list(estimate.interval)
            entries.append({"name": name, "metrics": metrics})
    return entries


def write_benchmark_results(
    settings: EvalSettings, benchmarks: list[Benchmark], results: BenchmarkResults
) -> None:
    """Into ``output_dir``, where it was given: JSON with every answer, the table as CSV, and a
    picture; or one of the first two, where a file of its kind was named."""
    output = settings.output_dir
    if output is None:
        return
    if output.suffix in (".json", ".csv"):
        text = (
            benchmark_csv(benchmarks, results)
            if output.suffix == ".csv"
            else benchmark_json(settings, benchmarks, results)
        )
        _write_files(output.parent, {output.name: text.encode()})
        return
    from lorry.report.bars import draw_bars

    # one bar a side and set, of the first metric in the set's list
    groups = {benchmark.named_set.name: benchmark.named_set.metrics[0] for benchmark in benchmarks}
    values = {
        side: {
            name: (result.metrics[groups[name]].value, result.metrics[groups[name]].interval)
            for name, result in column.items()
        }
        for side, column in _results_by_side(results).items()
    }
    files = [
        benchmark_json(settings, benchmarks, results).encode(),
        benchmark_csv(benchmarks, results).encode(),
        draw_bars({name: f"{name}\n{metric}" for name, metric in groups.items()}, values),
    ]
    _write_files(output, dict(zip(BENCHMARK_FILES, files, strict=True)))


def _results_by_side(results: BenchmarkResults) -> dict[str, dict[str, BenchmarkResult]]:
    sides = list(next(iter(results.values())))
    return {side: {name: column[side] for name, column in results.items()} for side in sides}


def benchmark_csv(benchmarks: list[Benchmark], results: BenchmarkResults) -> str:
    """set, metric, side, value, low, high, questions: a line each."""
    buffer = io.StringIO()
    # csv ends lines with \r\n otherwise, by which RECOGNISED_FILES does not know them
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(CSV_COLUMNS)
    for benchmark in benchmarks:
        for side, result in results[benchmark.named_set.name].items():
            for metric, estimate in result.metrics.items():
                lines.writerow(
                    [
                        benchmark.named_set.name,
                        metric,
                        side,
                        estimate.value,
                        *_interval_cells(estimate.interval),
                        len(benchmark.questions),
                    ]
                )
    return buffer.getvalue()


def _interval_cells(interval: tuple[float, float]) -> list[float | str]:
    """The cells of an interval; empty where there is none."""
    return [end if math.isfinite(end) else "" for end in interval]


def benchmark_json(
    settings: EvalSettings, benchmarks: list[Benchmark], results: BenchmarkResults
) -> str:
    """Everything: how it was asked, each metric with its interval, and each question with what
    every side said.
    """
    question_settings = {
        "tasks",
        "catalog",
        "local",
        "task_split",
        "n_shot",
        "template",
        "chat",
        "limit",
        "seed",
    }
    # what decides the numbers, and no place on this machine but the model's
    settings_asked = settings.model_dump(
        mode="json", include={*question_settings, "max_new_tokens", "temperature", "top_p", "top_k"}
    )
    sets = {
        benchmark.named_set.name: {
            "split": benchmark.split,
            "source": benchmark.source,
            "questions": len(benchmark.questions),
            "left_out": benchmark.left_out,
            "sides": {
                side: {
                    "metrics": {
                        metric: {
                            "value": _finite_or_none(estimate.value),
                            "low": _finite_or_none(estimate.interval[0]),
                            "high": _finite_or_none(estimate.interval[1]),
                            **({"signature": estimate.signature} if estimate.signature else {}),
                        }
                        for metric, estimate in result.metrics.items()
                    },
                    "rows": result.rows,
                    "shortened_prompts": result.shortened,
                    "answers_too_long": result.too_long,
                }
                for side, result in results[benchmark.named_set.name].items()
            },
        }
        for benchmark in benchmarks
    }
    return (
        json.dumps(
            {"model": settings.model.name, "asked": settings_asked, "sets": sets},
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )


def _finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    durable.make_directory(folder)
    durable.write_files(folder, dict(files))
    for file in files:
        print_note(f"written to {folder / file}")
