"""The named sets of `lorry eval RUN tasks=[...]`: every side asked every set, a table, JSON, CSV
and bars.

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
    from lorry.evaluate.benchmarks.questions import Benchmark
    from lorry.evaluate.benchmarks.run import BenchmarkResult
    from lorry.models.loading.open import OpenedModel

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
    places = DataLocations(settings.local, field="local", catalog=catalog)
    exams = [
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
    for exam in exams:
        left = "".join(f"; left out {n} ({reason})" for reason, n in sorted(exam.left_out.items()))
        print_note(
            f"{exam.named_set.name}: {len(exam.questions)} questions of {exam.source} [{exam.split}]{left}"
        )
        for note in exam.notes:
            print_note(f"note: {note}")
    return exams


def evaluate_benchmarks(
    settings: EvalSettings, found: OpenedModel, exams: list[Benchmark], mixes: Mapping[str, Any]
) -> BenchmarkResults:
    """Every set, asked of every side."""
    from lorry.data.encoding.encode import ExampleEncoder
    from lorry.evaluate.benchmarks.run import evaluate_benchmark as ask

    context = found.model.context
    encoder = ExampleEncoder(
        found.tokenizer,
        max_length=context or 1 << 20,
        system=settings.data.system,
        chat=settings.chat,
        embeddings=found.model.vocab_size,
    )
    done: BenchmarkResults = {exam.named_set.name: {} for exam in exams}
    with VisibleConsole(stderr=True).status("evaluating") as status:
        for exam in exams:
            for side, mix in mixes.items():
                status.update(f"{exam.named_set.name}: {len(exam.questions)} questions, {side}")
                done[exam.named_set.name][side] = ask(
                    found.model,
                    encoder,
                    exam,
                    mix,
                    max_new_tokens=settings.max_new_tokens,
                    batch_rows=settings.batch_size,
                    seed=settings.seed,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=settings.top_k,
                )
    for name, sides in done.items():
        if cut := max(one.shortened for one in sides.values()):
            print_note(
                f"note: {name}: {cut} prompts were cut from the left to fit the model's context of {context} tokens"
            )
        if over := max(one.too_long for one in sides.values()):
            print_note(
                f"note: {name}: perplexity is without {over} right answers that are longer than the context of {context} tokens"
            )
    return done


def benchmark_table(title: str, exams: list[Benchmark], results: BenchmarkResults) -> Table:
    """A row per set and metric, a column per side, each value with its 95% interval."""
    made = Table(
        title=Text(make_visible(title)), title_justify="left", header_style="dim", box=SIMPLE_HEAD
    )
    sides = list(next(iter(results.values())))
    for column in ("set", "metric", *sides):
        made.add_column(
            Text(make_visible(column)), justify="left" if column in ("set", "metric") else "right"
        )
    for exam in exams:
        by_side = results[exam.named_set.name]
        for at, metric in enumerate(next(iter(by_side.values())).metrics):
            cells = [
                _metric_cell(one.metrics[metric].value, one.metrics[metric].interval)
                for one in by_side.values()
            ]
            name = f"{exam.named_set.name} ({len(exam.questions)})" if at == 0 else ""
            made.add_row(Text(name), Text(metric.replace("_", " ")), *map(Text, cells))
    few = [exam.named_set.name for exam in exams if len(exam.questions) < MIN_INTERVAL_ROWS]
    made.caption = Text(make_visible(f"{', '.join(few)}: {TOO_FEW_ROWS_MESSAGE}")) if few else None
    made.caption_justify = "left"
    return made


def _metric_cell(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return (
        f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"
        if math.isfinite(low)
        else format_number(value)
    )


def benchmark_label(settings: EvalSettings, exam: Benchmark) -> str:
    """A set as it was asked, in a few words: what tells a run's evaluations of it apart."""
    split = f" [{exam.split}]" if exam.split == "train" else ""
    shots = f", {settings.n_shot} worked examples" if settings.n_shot else ""
    return (
        exam.named_set.name
        + split
        + shots
        + (f", the first {settings.limit} rows" if settings.limit else "")
    )


def benchmark_entries(
    settings: EvalSettings, exams: list[Benchmark], results: BenchmarkResults
) -> list[dict[str, Any]]:
    """Entries of evaluation.json: per set and adapter every metric before (base) and after."""
    made = []
    for exam in exams:
        base, *after = results[exam.named_set.name].items()
        for adapter, one in after or [base]:
            name = benchmark_label(settings, exam) + (f" ({adapter})" if len(after) > 1 else "")
            sides = {"before": base[1] if after else None, "after": one}
            metrics: dict[str, dict[str, Any]] = {
                metric: {
                    side: None if taken is None else _finite_or_none(taken.metrics[metric].value)
                    for side, taken in sides.items()
                }
                for metric in one.metrics
            }
            for metric, got in one.metrics.items():
                if all(map(math.isfinite, got.interval)):
                    metrics[metric]["interval"] = list(got.interval)
            made.append({"name": name, "metrics": metrics})
    return made


def write_benchmark_results(
    settings: EvalSettings, exams: list[Benchmark], results: BenchmarkResults
) -> None:
    """Into ``output_dir``, where it was given: JSON with every answer, the table as CSV, and a
    picture; or one of the first two, where a file of its kind was named."""
    output = settings.output_dir
    if output is None:
        return
    if output.suffix in (".json", ".csv"):
        text = (
            benchmark_csv(exams, results)
            if output.suffix == ".csv"
            else benchmark_json(settings, exams, results)
        )
        _write_files(output.parent, {output.name: text.encode()})
        return
    from lorry.report.bars import draw_bars

    groups = {exam.named_set.name: exam.named_set.metrics[0] for exam in exams}
    values = {
        side: {
            name: (one.metrics[groups[name]].value, one.metrics[groups[name]].interval)
            for name, one in column.items()
        }
        for side, column in _results_by_side(results).items()
    }
    files = [
        benchmark_json(settings, exams, results).encode(),
        benchmark_csv(exams, results).encode(),
        draw_bars({name: f"{name}\n{metric}" for name, metric in groups.items()}, values),
    ]
    _write_files(output, dict(zip(BENCHMARK_FILES, files, strict=True)))


def _results_by_side(results: BenchmarkResults) -> dict[str, dict[str, BenchmarkResult]]:
    sides = list(next(iter(results.values())))
    return {side: {name: column[side] for name, column in results.items()} for side in sides}


def benchmark_csv(exams: list[Benchmark], results: BenchmarkResults) -> str:
    """set, metric, side, value, low, high, questions: a line each."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(CSV_COLUMNS)
    for exam in exams:
        for side, one in results[exam.named_set.name].items():
            for metric, got in one.metrics.items():
                lines.writerow(
                    [
                        exam.named_set.name,
                        metric,
                        side,
                        got.value,
                        *_interval_cells(got.interval),
                        len(exam.questions),
                    ]
                )
    return out.getvalue()


def _interval_cells(interval: tuple[float, float]) -> list[float | str]:
    """The cells of an interval; empty where there is none."""
    return [end if math.isfinite(end) else "" for end in interval]


def benchmark_json(
    settings: EvalSettings, exams: list[Benchmark], results: BenchmarkResults
) -> str:
    """Everything: how it was asked, each metric with its interval, and each question with what
    every side said.
    """
    asked = {
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
    how = settings.model_dump(
        mode="json", include={*asked, "max_new_tokens", "temperature", "top_p", "top_k"}
    )
    sets = {
        exam.named_set.name: {
            "split": exam.split,
            "source": exam.source,
            "questions": len(exam.questions),
            "left_out": exam.left_out,
            "sides": {
                side: {
                    "metrics": {
                        metric: {
                            "value": _finite_or_none(got.value),
                            "low": _finite_or_none(got.interval[0]),
                            "high": _finite_or_none(got.interval[1]),
                            **({"signature": got.signature} if got.signature else {}),
                        }
                        for metric, got in one.metrics.items()
                    },
                    "rows": one.rows,
                    "shortened_prompts": one.shortened,
                    "answers_too_long": one.too_long,
                }
                for side, one in results[exam.named_set.name].items()
            },
        }
        for exam in exams
    }
    return (
        json.dumps(
            {"model": settings.model.name, "asked": how, "sets": sets}, indent=1, ensure_ascii=False
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
