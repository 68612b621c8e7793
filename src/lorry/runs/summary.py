"""What a run comes down to: its final figures, what it was about, and where the settings of several
runs differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorry.disk.documents import read_object
from lorry.errors import DataError, RunFilesError
from lorry.formatting import MISSING_VALUE, format_bytes, format_duration, format_number
from lorry.runs.evals import RunEvals
from lorry.runs.layout import ADAPTER_CONFIG
from lorry.runs.read import RunRecord
from lorry.runs.series import EVALUATION_PREFIX, MetricsLog, is_number

# of evaluations of unlearning during training, by their names in metrics.jsonl without eval_
RETENTION_FIGURES = ("forget_probability", "retain_kept")
# of a suite, in the order in which they are looked at; a suite has some of them
SUITE_FIGURES = (
    "forget_quality",
    "model_utility",
    "extraction_strength",
    "privleak",
    "forget_verbmem_ROUGE",
    "forget_knowmem_ROUGE",
    "retain_knowmem_ROUGE",
    "wmdp_bio",
    "wmdp_chem",
    "wmdp_cyber",
    "mmlu",
)
# what a suite's other metrics are made of; its file has them
SUITE_PARTS = ("_PARA_Prob", "_PERT_Prob")
MOST_DIFFERENCES = 300  # settings listed; a run has some 120


@dataclass(frozen=True)
class RunFigure:
    """One number of a run: ``value`` as text, a ``unit`` where it needs one, and ``note``, how it
    came about.
    """

    name: str
    value: str
    note: str = ""
    unit: str = ""

    @property
    def text(self) -> str:
        """The value with its unit."""
        return f"{self.value} {self.unit}" if self.unit else self.value


def final_figures(run: RunRecord) -> list[RunFigure]:
    """The final figures that the run's files give, in the order of interest; none is invented where
    lines lack it.
    """
    return [
        f
        for f in (
            *_loss_figures(run.log),
            *_retention_figures(run.log),
            *_suite_figures(run.evals),
            *_cost_figures(run),
            *_extent_figures(run.log),
        )
        if f.value != MISSING_VALUE
    ]


def _loss_figures(log: MetricsLog) -> Iterable[RunFigure]:
    _, losses = log.series("loss")
    if losses:
        yield from _train_loss_figures(log.series("loss")[0], losses)
    steps, losses = log.series("eval_loss")
    if losses:
        lowest = min((v for v in losses if math.isfinite(v)), default=losses[-1])
        best = (
            f", lowest {format_number(lowest)} at step {format_number(steps[losses.index(lowest)])}"
            # only where it says something: the last one is often the lowest
            if lowest < losses[-1]
            else ""
        )
        yield RunFigure(
            "evaluation loss",
            format_number(losses[-1]),
            f"at step {format_number(steps[-1])}{best}",
        )


def _train_loss_figures(steps: Sequence[float], losses: Sequence[float]) -> Iterable[RunFigure]:
    """The train loss is what TRL and transformers call so, the mean over all steps; a single step's
    is mostly noise, and has a name of its own wherever it is shown: last loss."""
    # divided first: a sum of losses near the largest double would overflow
    mean = sum(v / len(losses) for v in losses)
    yield RunFigure(
        "train loss",
        format_number(mean),
        f"mean over {format_number(len(losses))} steps" if len(losses) > 1 else "of the only step",
    )
    if len(losses) > 1:
        note = f"of step {format_number(steps[-1])}, from {format_number(losses[0])} at step {format_number(steps[0])}"
        yield RunFigure("last loss", format_number(losses[-1]), note)


def _retention_figures(log: MetricsLog) -> Iterable[RunFigure]:
    for name in RETENTION_FIGURES:
        steps, values = log.series(f"{EVALUATION_PREFIX}{name}")
        if values:
            before = f", from {format_number(values[0])} at the start" if steps[0] == 0 else ""
            note = f"at step {format_number(steps[-1])}{before}"
            yield RunFigure(name.replace("_", " "), format_number(values[-1]), note)


def _suite_figures(evals: RunEvals) -> Iterable[RunFigure]:
    """The run's as it is: of its parts and weights the tables of a report have the values."""
    for suite in evals.suites:
        if suite.part:
            continue
        oracle = suite.oracle.values if suite.oracle else {}
        beside = {"start": evals.start_values(suite), "oracle": oracle}
        for name in SUITE_FIGURES:
            if name in suite.values:
                note = [suite.title]
                note += [f"{w} {format_number(v[name])}" for w, v in beside.items() if name in v]
                value = format_number(suite.values[name])
                yield RunFigure(name.replace("_", " "), value, ", ".join(note))


def _cost_figures(run: RunRecord) -> Iterable[RunFigure]:
    log = run.log
    timed = [r for r in log.training if is_number(r.get("tokens")) and is_number(r.get("seconds"))]
    seconds, tokens = (sum(float(r[name]) for r in timed) for name in ("seconds", "tokens"))
    if seconds > 0:
        yield RunFigure(
            "throughput",
            format_number(tokens / seconds),
            f"over {format_number(len(timed))} steps",
            "tokens/s",
        )
    yield _memory_figure(run)
    yield RunFigure(
        "training time",
        format_duration(sum(log.series("seconds")[1]) or None),
        "steps only, without loading and evaluation",
    )


def _memory_figure(run: RunRecord) -> RunFigure:
    """The peak of the process, and where that was before the first step what training came to."""
    peaks = [v for v in run.log.series("peak_memory_bytes")[1] if math.isfinite(v)]
    peak, note = max(peaks, default=None), ""
    loading, trained = (
        (run.receipt or {}).get(name) for name in ("loading_peak_bytes", "trained_bytes")
    )
    if peak is not None and is_number(loading) and peak <= loading:
        # a model used for the first time is converted, and a start may read rows
        note = "before the first step"
        note += f"; {format_bytes(trained)} after the last step" if is_number(trained) else ""
    return RunFigure("peak memory", format_bytes(peak), note)


def _extent_figures(log: MetricsLog) -> Iterable[RunFigure]:
    if not log.training:
        return
    # sums of the lines: a step's tokens are its own, not those so far
    totals = [
        (sum(log.series(name)[1]), what)
        for name, what in (("tokens", "tokens"), ("supervised_tokens", "supervised"))
    ]
    epochs = log.series("epoch")[1]
    note = [f"epoch {format_number(epochs[-1])}"] if epochs else []
    note += [
        f"{format_number(int(total))} {what}" for total, what in totals if 0 < total < math.inf
    ]
    yield RunFigure("steps", format_number(log.training[-1]["step"]), ", ".join(note))


def figures_by_adapter(run: RunRecord) -> list[tuple[str, str, list[RunFigure]]]:
    """(name, its own settings, its final figures) of each adapter of a run of several."""
    return [
        (name, adapter_settings_text(run, name), list(_adapter_figures(run.log, name)))
        for name in run.log.adapters()
    ]


def _adapter_figures(log: MetricsLog, name: str) -> Iterable[RunFigure]:
    steps, losses = log.series("loss", name)
    if losses:
        yield from _train_loss_figures(steps, losses)
    held_at, held = log.series("eval_loss", name)
    if held:
        lowest = min((v for v in held if math.isfinite(v)), default=held[-1])
        yield RunFigure(
            "held-out loss", format_number(held[-1]), f"at step {format_number(held_at[-1])}"
        )
        yield RunFigure(
            "lowest", format_number(lowest), f"at step {format_number(held_at[held.index(lowest)])}"
        )
    if steps:
        yield RunFigure("steps", format_number(steps[-1]))


def adapter_settings_text(run: RunRecord, adapter: str) -> str:
    """What run.yaml says of a job beyond the run's settings: ``r 8, learning_rate 0.001``."""
    jobs = run.config.get("jobs")
    job = (
        next((j for j in jobs if isinstance(j, dict) and j.get("name") == adapter), {})
        if isinstance(jobs, list)
        else {}
    )
    groups = [job[group] for group in ("lora", "data", "train") if isinstance(job.get(group), dict)]
    return ", ".join(
        f"{name} {_plain_value(value)}" for group in groups for name, value in group.items()
    )


def _saved_ranks(folder: Path) -> dict[str, Any]:
    """Rank and alpha of the adapter that a run wrote, where its own settings do not say them; several
    ranks as the lowest and the highest. Empty where there is none, or none that can be read."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return {}
    try:
        saved = read_object(file, error=RunFilesError)
    except DataError:
        return {}  # who loads it is told what is wrong
    pattern = saved.get("rank_pattern")
    ranks = {saved.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())}
    if not all(isinstance(rank, int) for rank in ranks):
        return {}
    low, high = min(ranks), max(ranks)
    if low != high:  # each module has an alpha of its own, so that all have one scale
        return {"r": f"{low} to {high}", "lora_alpha": None}
    return {"r": low, "lora_alpha": saved.get("lora_alpha")}


def describe_run_subject(run: RunRecord) -> dict[str, str]:
    """model, data and adapter in a few words each, where run.yaml says so."""
    config = flatten_config(run.config)
    lora = {
        name.removeprefix("lora."): value
        for name, value in config.items()
        if name.startswith("lora.")
    }
    # what `auto` came to, which says more than the word
    if config.get("resolved.target_modules"):
        lora["target_modules"] = config["resolved.target_modules"]
    chosen = lora.get("rank_by") == "data" or lora.get("variant") == "adalora"
    if chosen or lora.get("r") == "auto" or config.get("model.adapter"):
        lora |= _saved_ranks(run.path)
    adapter = ", ".join(
        f"{name} {_plain_value(lora[key])}"
        for key, name in (("r", "rank"), ("lora_alpha", "alpha"), ("target_modules", "on"))
        if lora.get(key) is not None
    )
    several = run.log.adapters()
    if several:
        adapter = f"{len(several)} in one pass: {', '.join(several)}"
    if "lora" in run.config and run.config["lora"] is None:
        trained = config.get("trainable") or "all"
        adapter = (
            f"none: {trained if isinstance(trained, str) else ', '.join(trained)} of "
            "the base model were trained"
        )
    data = config.get("data.path") or config.get("data.mix") or config.get("data")
    jobs = run.config.get("jobs")
    if jobs and isinstance(jobs, list) and all(isinstance(one, dict) for one in jobs):
        own = [flatten_config(one) for one in jobs]
        if any(one.get("data.path") or one.get("unlearn.forget") for one in own):
            # the run's own is that of the jobs that name none
            each = [one.get("unlearn.forget") or one.get("data.path") or data for one in own]
            rows = [part for one in each for part in (one if isinstance(one, list) else [one])]
            data = [part for at, part in enumerate(rows) if part not in rows[:at]]
    experts = run.config.get("experts")
    if experts and isinstance(experts, list) and all(isinstance(one, dict) for one in experts):
        # a router's run has the first expert's data and the defaults of lora, which nothing reads
        names = ", ".join(str(one.get("name")) for one in experts)
        adapter = f"{config.get('router.kind')} router over {len(experts)} experts: {names}"
        if config.get("router.train_experts"):
            adapter += ", trained with it"
        own = [flatten_config(one) for one in experts]
        rows = [one.get("data.path") or one.get("data.mix") or [] for one in own]
        data = [part for one in rows for part in (one if isinstance(one, list) else [one])]
    subject = {
        "task": config.get("task"),
        "model": config.get("model.name", config.get("model")),
        "data": data,
        "retain": config.get("unlearn.retain"),
        "method": config.get("unlearn.method"),
    }
    return {
        name: _plain_value(value)
        for name, value in {**subject, "adapter": adapter}.items()
        if value not in (None, "")
    }


def flatten_config(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name: ``{"lora": {"r": 8}}`` is ``{"lora.r": 8}``; an empty mapping
    stays a value.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= (
            flatten_config(value, f"{prefix}{name}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{name}": value}
        )
    return flat


def run_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) for the settings that are not the same in all; the output
    directory always differs.
    """
    flat = [flatten_config(run.config) for run in runs]
    # every setting once, in the order of the first run that has it
    names = [
        name
        for name in dict.fromkeys(name for config in flat for name in config)
        if name != "output_dir"
    ]
    rows = [
        (name, [_plain_value(config[name]) if name in config else MISSING_VALUE for config in flat])
        for name in names
    ]
    rows = [(name, values) for name, values in rows if len(set(values)) > 1]
    if len(rows) > MOST_DIFFERENCES:
        more = f"and {len(rows) - MOST_DIFFERENCES} more settings"
        return [*rows[:MOST_DIFFERENCES], (more, [MISSING_VALUE for _ in runs])]
    return rows


def _plain_value(value: Any) -> str:
    """A setting's value as it is typed in YAML, near enough to recognise."""
    if isinstance(value, list):
        return ", ".join(map(_plain_value, value))
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )
