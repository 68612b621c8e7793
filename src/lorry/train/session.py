"""A training run from its description to a finished directory: open, attach, prepare, train, check,
write.

A run of several jobs is the same with an adapter, data and settings for each; one of a single
adapter is one job.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lorry.adapters.attach import attach, get_bank, list_skipped_modules
from lorry.adapters.bank import Adapter
from lorry.adapters.peft.files import base_digest, start_files
from lorry.adapters.spec import LoraSpec, lora_spec_of
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.trainable import base_parameter_set
from lorry.adapters.variants.new_tokens import begin_rows
from lorry.adapters.variants.starts import rows_read_by_tokens
from lorry.backends.distributed.communicator import (
    ONE_PROCESS,
    Communicator,
    open_communicator,
)
from lorry.backends.distributed.ddp import SharedScorer
from lorry.backends.distributed.fsdp import sharder_of
from lorry.backends.distributed.megatron import converter_of
from lorry.backends.distributed.tensor_ranks import data_ranks, tensor_ranks
from lorry.backends.optim import OptimSettings
from lorry.backends.protocol import Backend
from lorry.backends.registry import BACKENDS
from lorry.config import RunConfig, dump_settings, runs_by_adapter
from lorry.config.schema import DataConfig, LoraConfig, ModelConfig, TrainConfig
from lorry.data.batch import Batch
from lorry.data.prepare import EncodedRows, PreparedData, prepare_data
from lorry.data.stream.joint import JointStream, assign_adapter
from lorry.errors import ConfigError, ContractError, DataError, explain_out_of_memory
from lorry.evaluate.benchmarks.questions import Benchmark
from lorry.evaluate.unlearning.evaluation import SuiteEvaluation
from lorry.kernels import kernel_status
from lorry.models.causal_lm import CausalLM
from lorry.models.converter import ModelConverter
from lorry.models.layer_weights import Sharder
from lorry.models.loading.describe import has_packed_matrices
from lorry.models.loading.open import OpenedModel, open_model, refuse_mixture
from lorry.models.loading.sources import resolve_model
from lorry.models.new_tokens import add_new_tokens
from lorry.notes import NoteCallback, ignore_note
from lorry.plan.constants import MIN_BATCH_TOKENS
from lorry.runs import ownership
from lorry.runs.layout import (
    CARD,
    CONTRACTS,
    EVALUATION,
    LOSSES,
    PREVIOUS,
    RECEIPT,
    RUN_FILE,
    SAMPLES,
    RunDir,
)
from lorry.runs.losses import collect_losses
from lorry.runs.process import RunDirectoryHandle
from lorry.runs.read import read_evaluation
from lorry.tasks.build import BuiltTask, PreparedJob, PreparedJobs, TaskInputs, trained_names
from lorry.tasks.initialization import initialize_jobs, make_room_for_state
from lorry.tasks.ranks import choose_ranks, restore_ranks
from lorry.tasks.registry import TASKS
from lorry.train import artifacts, checkpoint, finish
from lorry.train.card.card import render_run_card
from lorry.train.checks import ContractChecks, tensor_fingerprint
from lorry.train.engine import TrainingEngine
from lorry.train.evaluation.benchmarks import BenchmarkEvaluator, load_eval_benchmarks, main_metric
from lorry.train.evaluation.run_evaluation import Measure, RunEvaluation, default_best_metric
from lorry.train.evaluation.suites import RunSuite, load_run_suite, main_suite_metric
from lorry.train.full import enable_base_training, refuse_adapter_settings
from lorry.train.jobs import RunOutcome, TrainingJob
from lorry.train.monitoring.events import TrainingListener
from lorry.train.monitoring.process import record_process
from lorry.train.monitoring.trackers import open_trackers
from lorry.train.processes import find_shared_checkpoint, place_run, record_processes
from lorry.train.resources.budget import resolve_memory_budget
from lorry.train.resources.peak import tune_allocator
from lorry.train.resources.rate import PlannedRun, StepTimes, record_step_rate
from lorry.train.start import (
    archive_previous_run,
    broken_contracts,
    claim_output_dir,
    is_own_checkpoint,
)

# how far the loss packed and alone may differ (contract 4); of half precision 1e-2
SCORE_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}
# Times that: how far one token's score may move with its neighbours' tokens, where these change
# shapes (`CausalLM.shapes_follow_tokens`): the worst token of 30 layers was seen at 0.93 in
# float32. Elsewhere 0.
LEAK_FACTOR = 10
MAX_NAMED_TOKENS = 8  # in one note


@dataclass
class TrainResult:
    """A finished run: its directory, how it ended, what held, the model with its adapters still in
    memory, the first active.
    """

    path: Path
    outcome: RunOutcome
    contracts: list[dict[str, Any]] = field(repr=False)
    model: CausalLM = field(repr=False)
    tokenizer: Any = field(repr=False)
    adapters: list[str]

    @property
    def adapter(self) -> str:
        """The only adapter, or the first."""
        return self.adapters[0]


def train_run(
    run: RunConfig, settings_notes: Sequence[str] = (), listeners: Sequence[TrainingListener] = ()
) -> TrainResult:
    """Train as described, whatever the task, and write the run directory. ``settings_notes``: of how
    the description was read, for the listeners. Raises LorryError of the kind that fits;
    contracts.json is written even then, once the run has begun.

    Of several processes each runs the whole of this. Rank 0's is the run directory; the others have
    one of their own for what little they write, which goes with them, and nobody listens to them.
    """
    communicator = open_communicator(run.backend)
    with communicator.sharing_failures():
        run = record_processes(run, communicator)
        if communicator.rank == 0:
            return _train_run(run, communicator, run.output_dir, settings_notes, listeners)
        with tempfile.TemporaryDirectory(prefix=f"lorry-rank-{communicator.rank}-") as scratch:
            aside = run.model_copy(update={"output_dir": Path(scratch) / "run"})
            result = _train_run(aside, communicator, run.output_dir, (), ())
        return replace(result, path=run.output_dir)


def _train_run(
    run: RunConfig,
    communicator: Communicator,
    output_dir: Path,
    settings_notes: Sequence[str],
    listeners: Sequence[TrainingListener],
) -> TrainResult:
    """`train_run` on one of its processes. ``output_dir``: of the whole run."""
    # first of all: a directory with somebody's files is refused before a second is spent
    claim_output_dir(run.output_dir, run.job_names)
    notebook = Notebook()
    notebook.add(*settings_notes)
    with record_process(run.output_dir) as process, explain_out_of_memory(suggest_less_memory(run)):
        given, exams, suite = _prepare_run(run, notebook.add)
        run = place_run(given, communicator, notebook.add, output_dir)
        # before the model is loaded: an unfinished run that is not resumed is refused here
        resume_from = find_shared_checkpoint(run, communicator)
        # a listener like the others; what it heard corrects `lorry plan` at the end
        times = StepTimes()
        described = given.model_dump(mode="json")
        trackers = (
            open_trackers(run.train.report_to, run.output_dir, described)
            if communicator.rank == 0
            else []
        )
        notebook.listeners = [*listeners, times, *trackers]
        _set_up_torch(run)
        shard = sharder_of(run.backend, communicator, run.model.device)
        convert = converter_of(run.backend, run.model, communicator, notebook.add)
        opened = open_base(run, notebook.add, tensor_ranks(communicator), shard, convert)
        jobs = prepare_jobs(run, attach_jobs(run, opened, notebook.add), opened, notebook)
        if resume_from is None:
            choose_ranks(opened, jobs, notebook.add)
            initialize_jobs(opened, jobs, notebook.add)
        else:
            # it is verified and read whole when the engine resumes, after what differs was said
            load = partial(checkpoint.load_checkpoint, resume_from)
            # read once, however many jobs ask
            stored = cache(lambda: load()[0])
            restore_ranks(opened, jobs, stored)
            make_room_for_state(opened, jobs, stored, notebook.add)
            stored.cache_clear()
        evaluations: list[RunEvaluation] = [
            Measure(BenchmarkEvaluator(run, opened, exams, communicator))
        ]
        if suite is not None:
            evaluations.append(RunSuite(run, opened, suite, process.home, communicator))
        engine = build_engine(run, opened, jobs, notebook, evaluations, communicator, shard)
        # read before an earlier run moves, which may be what this one begins with
        over = start_files(opened.model)
        # the same of every rank: rank 0 moves it for all of them
        communicator.exchange("everything is read")
        resume_or_make_room(engine, resume_from, run, notebook)
        # the mark before the first file: without one, what a kill leaves would be taken for somebody's
        process.begin(engine.progress.step, engine.total)
        artifacts.write_start(run.output_dir, over, list(jobs))
        # the run's own files are all written in there; the rate below is of this machine
        result = _train_and_finish(given, opened, jobs, engine, notebook, process.home, shard)
        if (counted := planned_run_of(run, opened)) is not None:
            notebook.tell(record_step_rate(times, counted, opened.model, run.backend.threads))
        return result


def planned_run_of(run: RunConfig, opened: OpenedModel) -> PlannedRun | None:
    """What of a run the plan counts FLOPs from; None where it counts none: several jobs, base
    weights that train, an adapter trained further, other tasks than fine-tuning.
    """
    if run.task != "sft" or run.lora is None or run.jobs or opened.adapters:
        return None
    if run.lora.ranks_follow_data:
        return None  # fewer than r
    if run.backend.name != "single":
        return None  # the rate is of one process
    return PlannedRun(run.model.name, run.lora, run.train, run.data.max_length)


def suggest_less_memory(run: RunConfig) -> str:
    """What would make a run smaller, by the settings it has."""
    train, data = run.train, run.data
    size = f"{train.per_device_train_batch_size} rows of up to {data.max_length} tokens in a micro-batch"
    rank = "" if run.lora is None else f", r={run.lora.r}"
    recompute = "" if train.gradient_checkpointing else ", gradient_checkpointing=true"
    return (
        f"The run has {size}{rank}. `lorry plan` with the same settings shows what "
        "needs the memory; lower per_device_train_batch_size (with more "
        f"gradient_accumulation_steps){recompute}, or give memory_budget, such as "
        "3GiB, to have them chosen"
    )


def _prepare_run(
    run: RunConfig, add_note: NoteCallback
) -> tuple[RunConfig, list[Benchmark], SuiteEvaluation | None]:
    """The run with every measured choice made, and the questions it asks while it trains: before
    the model is loaded, which takes longer.
    """
    run = resolve_memory_budget(run, add_note)
    exams, suite = load_eval_benchmarks(run), load_run_suite(run, add_note)
    metrics = [main_metric(exam) for exam in exams] + (
        [main_suite_metric(suite, run)] if suite else []
    )
    return default_best_metric(run, metrics, add_note), exams, suite


def _set_up_torch(run: RunConfig) -> None:
    # before torch allocates or compiles anything: both settings are read once
    tune_allocator()
    if run.backend.threads:
        torch.set_num_threads(run.backend.threads)
    torch.manual_seed(run.train.seed)


def open_base(
    run: RunConfig,
    add_note: NoteCallback,
    ranks: TensorRanks | None = None,
    shard: Sharder | None = None,
    convert: ModelConverter | None = None,
) -> OpenedModel:
    """The model that the run begins with. ``ranks``: those that share it; ``shard``, ``convert``: as in
    `load_model`. Raises ConfigError where it cannot be this run's, and what `open_model` raises.
    """
    if ranks is not None and run.lora is None:
        raise ConfigError(
            f"lora=null with backend.tensor_parallel={ranks.size}: base weights train where each "
            "process has whole ones; leave tensor_parallel out, or train an adapter"
        )
    if run.lora is None:
        _refuse_packed_files(run.model)
    opened = open_model(
        run.model,
        add_note,
        as_start=TASKS[run.task].over_start,
        ranks=ranks,
        shard=shard,
        convert=convert,
    )
    if opened.tokenizer is None:
        raise ConfigError(
            f"{run.model.name} has no tokenizer files; put tokenizer.json beside the weights"
        )
    if opened.mixture is not None:
        refuse_mixture(run.model.name)
    if len(run.jobs) > 1 and opened.adapters:
        raise ConfigError(
            f"{run.model.name} already has an adapter, and jobs start with new "
            "ones; name its base model, or merge it"
        )
    # the files to read would be moved to previous/N, or written over at the end
    begins_with = {Path(opened.source["path"]).resolve()}
    if TASKS[run.task].over_start:
        adapters = (opened.source.get("adapter"), run.model.adapter)
        begins_with |= {Path(path).resolve() for path in adapters if path}
    if run.output_dir.resolve() in begins_with:
        raise ConfigError(
            f"{run.output_dir} holds the model that this run starts from and would "
            "move away; give another output_dir"
        )
    return opened


@dataclass
class Notebook:
    """What a person should know of a run, and who hears it. Notes of the set-up are collected by
    `add` and passed on by `tell`, each once.
    """

    listeners: Sequence[TrainingListener] = ()
    # a dict for its order: {note: whether the listeners have heard it}
    notes: dict[str, bool] = field(default_factory=dict)

    def add(self, *texts: str) -> None:
        """Collect notes for the next `tell`."""
        for text in texts:
            self.notes.setdefault(text, False)

    def tell(self, *texts: str | None) -> None:
        """Pass on the notes that have come since the last time, then these."""
        self.add(*(text for text in texts if text))
        for text, heard in self.notes.items():
            if not heard:
                self.notes[text] = True
                self.repeat(text)

    def repeat(self, text: str) -> None:
        """Pass on something that may be true again."""
        for listener in self.listeners:
            listener.note(text)


def resume_or_make_room(
    engine: TrainingEngine, start: Path | None, run: RunConfig, notebook: Notebook
) -> None:
    """Go on from a checkpoint; or move what an earlier run left in the directory aside. Only now,
    when all that can be wrong with this run has been said, and cost nothing of the last one."""
    if start is not None:
        _resume_engine(engine, start, run.output_dir)
    if is_own_checkpoint(start, run.output_dir):
        return
    # "auto" without any checkpoint: stopped before the first one, so its files are this run's own
    going_on = start is None and run.train.resume_from_checkpoint == "auto"
    if (aside := archive_previous_run(run.output_dir, going_on=going_on)) is not None:
        notebook.tell(f"{run.output_dir} held an earlier run, which was moved to {aside}")


def _resume_engine(engine: TrainingEngine, start: Path, folder: Path) -> None:
    """`TrainingEngine.resume`, with a way out where the directory's own run broke a contract. Raises what
    that raises.
    """
    try:
        engine.resume(start)
    except ConfigError as error:
        if is_own_checkpoint(start, folder) and (broken := broken_contracts(folder)):
            way_out = (
                f"that run broke contract {broken[0]}; without resume_from_checkpoint "
                "it is moved away for this one"
            )
            raise ConfigError(f"{error}; {way_out} ({PREVIOUS}/N)") from None
        raise


def _train_and_finish(
    run: RunConfig,
    opened: OpenedModel,
    jobs: PreparedJobs,
    engine: TrainingEngine,
    notebook: Notebook,
    home: RunDirectoryHandle,
    shard: Sharder | None,
) -> TrainResult:
    """Run the engine between the first and the last contracts; write every file of the run, as long
    as ``home`` is there. ``shard``: as in `build_engine`.
    """
    checks, backend, prepared = (
        engine.checks,
        engine.backend,
        {name: job.data for name, job in jobs.items()},
    )
    home.check()
    # From here on the directory is a run's by its mark, whatever happens next.
    artifacts.write_text(run.output_dir, RUN_FILE, dump_settings(run))
    try:
        checks.begin(
            backend,
            finish.contract_targets(opened.model, trained_names(jobs)),
            finish.describe_unadapted(opened.model, trained_names(jobs)),
        )
        # now already: a run that breaks off has its rows accounted for as well
        checks.held(8, _row_accounting(jobs))
        outcome = engine.run()
        checks.held(8, _row_accounting(jobs))  # a streamed source knows more now
        checks.end(backend, engine.task)
        checks.equal_on_all_ranks(backend, 5, "at the end of training")
        # what is written and read back now takes no more memory than the moments did
        backend.end_steps()
        home.check()
        finish.settle_adapters(opened.model, list(jobs), notebook.tell)
        beside = trained_names(jobs)[len(jobs) :]
        digests = _write_and_check(
            backend.communicator,
            opened.model,
            lambda *ranks: finish.write_and_check_adapters(
                run.output_dir, opened, checks, prepared, beside, *ranks
            ),
            shard,
        )
        finish.displace_measurements(run.output_dir, digests)
        engine.conclude_evaluations()
        backend.communicator.on_main(
            "the newest checkpoint", lambda: finish.check_newest_checkpoint(checks, engine.newest)
        )
        artifacts.write_json(
            run.output_dir,
            SAMPLES,
            finish.collect_samples(backend, jobs, opened.model.context, TASKS[run.task].samples),
        )
    except ContractError as error:
        # of another rank: this one's report has not heard of it
        checks.note_failure(error)
        raise
    finally:
        # also after an error, which it explains; not under the name of a directory that moved
        if home.is_there():
            artifacts.write_json(run.output_dir, CONTRACTS, checks.report())
    contracts = backend.communicator.exchange("contracts", checks.report())[0]
    finished = TrainResult(
        run.output_dir, outcome, contracts, opened.model, opened.tokenizer, list(jobs)
    )
    if backend.communicator.rank:  # rank 0 writes the rest, and is not waited for
        return finished
    home.check()
    if not os.path.lexists(run.output_dir / RUN_FILE):  # somebody removed it: what follows reads it
        artifacts.write_text(run.output_dir, RUN_FILE, dump_settings(run))
    artifacts.write_json(run.output_dir, LOSSES, collect_losses(run.output_dir))
    receipt = finish.run_receipt(
        run.output_dir,
        opened,
        jobs,
        digests,
        engine.identity["digests"].get("teacher"),
        backend.communicator.size,
    )
    # the receipt is what tells a finished run from an unfinished one: after all that it vouches for
    artifacts.write_json(run.output_dir, RECEIPT, receipt)
    if os.path.lexists(run.output_dir / EVALUATION) and not _is_readable_evaluation(run.output_dir):
        ownership.displace_entries(run.output_dir, [EVALUATION])  # the card would read it
    # last of all: it is made from the files above, as `lorry push` would make it again
    artifacts.write_text(run.output_dir, CARD, render_run_card(run.output_dir))
    return finished


def _write_and_check(
    communicator: Communicator,
    model: CausalLM,
    write: Callable[..., dict[str, str]],
    shard: Sharder | None,
) -> dict[str, str]:
    """The digests that ``write`` gives, which takes ranks that write together. Raises what it raises."""
    if shard is not None and base_parameter_set(model) is not None:
        # no rank has the weights: all of them make each whole for rank 0, and read their own back
        return write(communicator, shard)
    if model.ranks is None:
        # rank 0's are the run's; the others wait, and learn whether they hold
        digests: dict[str, str] = communicator.on_main("the trained weights", write)
        return digests
    # no rank can run the model alone: each writes the files, rank 0 the run's, and reads them back
    return communicator.exchange("the trained weights", write())[0]


def _is_readable_evaluation(run_dir: Path) -> bool:
    """Whether evaluation.json is what `lorry eval` writes, down to its values. Raises DiskError."""
    if not ownership.is_evaluation_file(run_dir / EVALUATION):
        return False
    try:
        read_evaluation(run_dir)
    except DataError:
        return False
    return True


def attach_jobs(
    run: RunConfig, opened: OpenedModel, add_note: NoteCallback
) -> dict[str, RunConfig]:
    """What the task trains; else one new adapter for each job (or the one that the model came
    with): {name: the run it would be alone}. Raises what `attach_adapter` raises.
    """
    if (attach_own := TASKS[run.task].attach) is not None:
        return attach_own(run, opened, add_note)
    return {
        attach_adapter(job_run, opened, add_note): job_run
        for job_run in runs_by_adapter(run).values()
    }


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


def _row_accounting(jobs: PreparedJobs) -> str:
    """Contract 8 in words: the rows of the only job, or of each data set a line."""
    lines = [
        data.report.lines() for job in jobs.values() for data in (job.data, *job.row_sets.values())
    ]
    # one line in contracts.json: the first facts of a single set, of several the counts of each
    return "; ".join(
        lines[0][:3] if len(lines) == 1 else dict.fromkeys(facts[0] for facts in lines)
    )


def _refuse_packed_files(model: ModelConfig) -> None:
    """Raises ConfigError for a base whose own weights should train and are packed in its files."""
    directory = resolve_model(model.name, revision=model.revision, add_note=ignore_note).directory
    if has_packed_matrices(directory):
        raise ConfigError(
            f"lora=null: {directory} holds its matrices packed, and packed weights cannot train; give the "
            "unquantised checkpoint, or train an adapter"
        )


def attach_adapter(run: RunConfig, opened: OpenedModel, add_note: NoteCallback) -> str:
    """Attach a new adapter, or go on with the one the model came with; with lora=null, switch the
    base's own weights on. Returns its name. Raises ConfigError."""
    if run.lora is None:
        refuse_adapter_settings(run.train, run.memory_budget)
        return enable_base_training(opened, run.trainable or "all", run.output_dir, add_note)
    if not opened.adapters:
        spec, new = add_new_tokens(opened, run.lora, lora_spec_of(run.lora))
        adapter = attach(
            opened.model,
            spec,
            run.lora.adapter_name,
            seed=run.train.seed,
            # from rows, which are read next
            initialize=False,
        )
        if new is not None:
            begin_rows(opened.model, adapter, new)
        _note_skipped_modules(opened.model, adapter, add_note)
        return adapter.name
    if len(opened.adapters) > 1:
        raise ConfigError(
            f"{run.model.name} holds several adapters "
            f"({', '.join(opened.adapters)}); name the folder of one"
        )
    # by value and not by what was given: settings equal to the defaults ask for nothing else
    if run.lora != LoraConfig(adapter_name=run.lora.adapter_name):
        raise ConfigError(
            f"{run.model.name} already has an adapter, which training continues; "
            "leave out the lora settings"
        )
    add_note(f"training continues the adapter of {run.model.name}")
    adapter = get_bank(opened.model)[opened.adapters[0]]
    _note_skipped_modules(opened.model, adapter, add_note)
    return adapter.name


def _note_skipped_modules(model: CausalLM, adapter: Adapter, add_note: NoteCallback) -> None:
    for module in list_skipped_modules(model, adapter):
        add_note(f"not adapted: {module.what}; {module.why}")


def build_engine(
    run: RunConfig,
    opened: OpenedModel,
    jobs: PreparedJobs,
    notebook: Notebook,
    evaluations: Sequence[RunEvaluation] = (),
    communicator: Communicator = ONE_PROCESS,
    shard: Sharder | None = None,
) -> TrainingEngine:
    """The backend, the task and the loop of this run. ``evaluations``: what it asks of an adapter
    besides the task's own; ``communicator``: its processes; ``shard``: cuts other models of it over
    them.
    """
    opened.model.gradient_checkpointing = run.train.gradient_checkpointing
    opened.model.sequence_parallel = run.backend.sequence_parallel
    # dropout's seed is part of the sequences' keys, job by job
    ends = TASKS[run.task].ends
    training = [_training_job(name, job, ends(job)) for name, job in jobs.items()]
    settings = {
        name: (train, job.total)
        for job in training
        for name, train in {job.name: job.train, **job.beside}.items()
    }
    backend = BACKENDS[run.backend.name](
        opened.model,
        trained_names(jobs),
        {name: optim_settings_of(*of_job) for name, of_job in settings.items()},
        gradient=TASKS[run.task].gradient({name: job.run for name, job in jobs.items()}),
        communicator=communicator,
        moment_ranks=data_ranks(communicator) if run.backend.shard_optimizer else None,
    )
    inputs = _task_inputs(run, opened, jobs, training, backend)
    # `repeat`: what a task tells while it trains may be true again, as a note of the set-up is not
    ranks = tensor_ranks(communicator)
    open_other = partial(open_model, ranks=ranks, shard=shard, must_share=False)
    inputs = replace(inputs, tell=notebook.repeat, open_model=open_other)
    built = TASKS[run.task].build(inputs)
    notebook.tell(*built.notes, *(job.warmup_note() for job in training))
    run_evaluations: list[RunEvaluation] = [
        Measure(built.measure, digests=built.digests),
        *evaluations,
    ]
    tolerance = SCORE_TOLERANCES.get(opened.model.dtype, 1e-2)
    return TrainingEngine(
        backend,
        built.task,
        run.train,
        run.output_dir,
        identity=_run_identity(
            run,
            opened,
            jobs,
            dict(digest for evaluation in run_evaluations for digest in evaluation.digests.items())
            | _held_digest(opened.model, trained_names(jobs)),
            backend,
        ),
        checks=ContractChecks(),
        jobs=training,
        listeners=notebook.listeners,
        tolerance=tolerance,
        leak_tolerance=LEAK_FACTOR * tolerance if opened.model.shapes_follow_tokens else 0.0,
        models=built.models
        if communicator.size == 1
        else {name: SharedScorer(model, communicator) for name, model in built.models.items()},
        evaluations=run_evaluations,
        record=built.record,
        conclude=built.conclude,
        unreached=lambda batches: _unreached(opened.model, backend, built, batches),
    )


def _unreached(
    model: CausalLM, backend: Backend, built: BuiltTask, batches: Sequence[Batch]
) -> dict[str, set[str]]:
    """The targets that no gradient of a step reaches: of the task, and embeddings of which rows train
    whose tokens do not occur."""
    found = {name: set(modules) for name, modules in built.unreached().items()}
    for number, name in enumerate(built.task.adapters):
        if name not in get_bank(model).adapters:
            continue
        for path, ids in rows_read_by_tokens(model, get_bank(model)[name]).items():
            read = [batch.tokens_read(number).cpu() for batch in batches]
            if not any(bool(torch.isin(tokens, ids.cpu()).any()) for tokens in read):
                found.setdefault(name, set()).add(path)
    return found


def _training_job(name: str, job: PreparedJob, ends: Collection[int]) -> TrainingJob:
    train = job.run.train
    total = job.stream.total_steps(train.num_train_epochs, train.max_steps)
    return TrainingJob(
        name,
        train,
        total,
        job.stream.epoch_of,
        job.stream.steps_per_epoch,
        list(ends),
        job.beside,
    )


def _task_inputs(
    run: RunConfig,
    opened: OpenedModel,
    jobs: PreparedJobs,
    training: Sequence[TrainingJob],
    backend: Backend,
) -> TaskInputs:
    """The jobs' rows as one stream, and the held-out ones of all of them."""
    seeds = {name: job.run.train.seed for name, job in jobs.items()}
    # a kind of device without a number is taken for the fastest, which needs the most
    room = run.joint_tokens or MIN_BATCH_TOKENS.get(
        backend.device.type, max(MIN_BATCH_TOKENS.values())
    )
    stream = JointStream({name: job.stream for name, job in jobs.items()}, seeds, room)
    held = [
        # held-out rows carry their job's number, by which `held_out_task` tells them apart again
        assign_adapter(batch, number, seeds[name])
        for number, (name, job) in enumerate(jobs.items())
        for batch in job.data.evaluation
    ]
    total = max(job.total for job in training)
    return TaskInputs(run, opened, jobs, stream, held, total, backend)


def _held_digest(model: CausalLM, names: Sequence[str]) -> dict[str, str]:
    """Of the halves of adapters that do not train, which no checkpoint has: another machine may have made
    others of the base."""
    held = [
        f"{name}/{tensor} {tensor_fingerprint(values.cpu())}"
        for name in names
        if (adapter := get_bank(model).adapters.get(name)) is not None
        for tensor, values in adapter.held_tensors().items()
    ]
    return {"frozen halves": hashlib.sha256("\n".join(held).encode()).hexdigest()} if held else {}


def _run_identity(
    run: RunConfig,
    opened: OpenedModel,
    jobs: PreparedJobs,
    others: Mapping[str, str],
    backend: Backend,
) -> dict[str, Any]:
    """What a checkpoint remembers of its run, and resuming compares. ``others``: digests of what
    else it hangs on.
    """
    digests = {name: job.data.digest for name, job in jobs.items()}
    return {
        # as JSON gives it back: a checkpoint's meta holds no tuples and no paths
        "config": json.loads(run.model_dump_json()),
        "digests": {
            "data": digests if len(jobs) > 1 else next(iter(digests.values())),
            "base": base_digest(opened.model),
            **others,
            "code": checkpoint.code_digest(),
        },
        "environment": checkpoint.numeric_environment(
            device=str(backend.device), kernels=kernel_status().line()
        ),
    }


def optim_settings_of(train: TrainConfig, total_steps: int = 0) -> OptimSettings:
    """The optimizer's numbers from a run's settings and its steps."""
    betas = (train.adam_beta1, train.adam_beta2)
    return OptimSettings(
        betas,
        train.adam_epsilon,
        train.weight_decay,
        train.max_grad_norm,
        train.loraplus_lr_ratio,
        train.l2_regularization,
        total_steps,
    )
