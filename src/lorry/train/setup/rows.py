"""What every job of a run reads, and what is to be said of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import chain

from lorry.adapters.attach import get_bank
from lorry.adapters.spec import LoraSpec
from lorry.config import RunConfig
from lorry.config.data import DataConfig
from lorry.data.prepare import EncodedRows, PreparedData, prepare_data
from lorry.errors import ConfigError, DataError
from lorry.models.causal_lm import CausalLM
from lorry.models.loading.open import OpenedModel
from lorry.notes import NoteCallback
from lorry.runs.layout import RunDir
from lorry.tasks.build import PreparedJob, PreparedJobs
from lorry.tasks.registry import TASKS
from lorry.train.setup.notebook import Notebook

MAX_NAMED_TOKENS = 8  # in one note


def prepare_jobs(
    run: RunConfig, attached: Mapping[str, RunConfig], opened: OpenedModel, notebook: Notebook
) -> PreparedJobs:
    """What every job reads; data that several of them share is read once. Raises what
    `prepare_data` raises.
    """
    # by what encoded rows hang on, so that jobs with the same data read it once
    task, rows_by_settings = TASKS[run.task], dict[str, EncodedRows]()
    make = partial(task.encoder(run, opened, notebook.add), tell=notebook.tell)

    def prepare(job_run: RunConfig, data: DataConfig, name: str) -> PreparedData:
        # a second set of rows makes the name part of the file's, or one would write over the other
        aside = RunDir(run.output_dir).quarantine(name, len(attached) + len(task.row_sets(job_run)))
        return prepare_data(
            data,
            job_run.train,
            opened.tokenizer,
            quarantine=aside,
            known=rows_by_settings,
            make=make,
        )

    jobs = dict[str, PreparedJob]()
    for name, job_run in attached.items():
        data = prepare(job_run, job_run.data, name)
        row_sets = {
            role: prepare(job_run, settings, f"{name}-{role}")
            for role, settings in task.row_sets(job_run).items()
        }
        stream = task.stream(job_run, data, row_sets)
        _check_invocation(job_run, data, opened.model, notebook.add)
        # a router or the base's weights have none
        if (adapter := get_bank(opened.model, create=True).adapters.get(name)) is not None:
            _note_absent_tokens(adapter.spec, data, notebook.add)
        jobs[name] = PreparedJob(job_run, data, row_sets, stream, task.beside(job_run))
    notebook.tell(*_data_notes(jobs))
    return jobs


def _check_invocation(
    run: RunConfig, data: PreparedData, model: CausalLM, add_note: NoteCallback
) -> None:
    """Say in how many rows an adapter that tokens invoke counts at all. Raises ConfigError for ids outside
    the vocabulary, and DataError where it is none."""
    ids = [] if run.lora is None else run.lora.alora_invocation_tokens or []
    if outside := [token for token in ids if token >= model.vocab_size]:
        raise ConfigError(
            f"lora.alora_invocation_tokens names the token {outside[0]}; this model has "
            f"{model.vocab_size} (0 to {model.vocab_size - 1})"
        )
    if not ids or data.tokens is None:
        return
    rows, held = len(data.tokens.edges) - 1, data.tokens.count_holding(ids)
    text = data.encoder.tokenizer.decode(ids)
    if not held:
        raise DataError(
            f"{data.report.source}: none of the {rows} rows holds the invocation tokens {ids} "
            f"({text!r:.60}), so the adapter would never count; give ids that the chat template or the "
            "rows contain"
        )
    if held < rows:
        add_note(
            f"{data.report.source}: {rows - held} of {rows} rows do not hold the invocation tokens "
            f"{ids} ({text!r:.60}) and train nothing"
        )


def _note_absent_tokens(spec: LoraSpec, data: PreparedData, add_note: NoteCallback) -> None:
    """Say which of the tokens whose rows an adapter trains are in no row of the data."""
    asked = spec.trainable_token_indices or ()
    ids = dict.fromkeys(
        chain.from_iterable(asked.values()) if isinstance(asked, Mapping) else asked
    )
    if not ids or data.tokens is None:
        return
    if absent := data.tokens.absent(list(ids)):
        named = ", ".join(
            f"{token} ({data.encoder.tokenizer.decode([token])!r:.60})"
            for token in absent[:MAX_NAMED_TOKENS]
        )
        more = (
            f" and {len(absent) - MAX_NAMED_TOKENS} more" if len(absent) > MAX_NAMED_TOKENS else ""
        )
        add_note(
            f"{data.report.source}: no row holds {len(absent)} of the {len(ids)} tokens whose rows train: "
            f"{named}{more}; as inputs they learn nothing"
        )


def _data_notes(jobs: PreparedJobs) -> list[str]:
    """What became of the rows, each data set once."""
    return list(
        dict.fromkeys(
            line
            for job in jobs.values()
            for data in (job.data, *job.row_sets.values())
            for line in data.report.lines()
        )
    )


def row_accounting(jobs: PreparedJobs) -> str:
    """Contract 8 in words: the rows of the only job, or of each data set a line."""
    lines = [
        data.report.lines() for job in jobs.values() for data in (job.data, *job.row_sets.values())
    ]
    # one line in contracts.json: the first facts of a single set, of several the counts of each
    return "; ".join(
        lines[0][:3] if len(lines) == 1 else dict.fromkeys(facts[0] for facts in lines)
    )
