"""A training run from its description to a finished directory: open, attach, prepare, train, check,
write.

A run of several jobs is the same with an adapter, data and settings for each; one of a single
adapter is one job.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lorry.adapters.peft.start_files import start_files
from lorry.adapters.trainable import base_parameter_set
from lorry.backends.distributed.communicator import Communicator, open_communicator
from lorry.backends.distributed.fsdp import sharder_of
from lorry.backends.distributed.megatron import converter_of
from lorry.backends.distributed.tensor_ranks import tensor_ranks
from lorry.config import RunConfig, dump_settings
from lorry.errors import ConfigError, ContractError, DataError, explain_out_of_memory
from lorry.evaluate.benchmarks.questions import Benchmark
from lorry.evaluate.unlearning.evaluation import SuiteEvaluation
from lorry.models.causal_lm import CausalLM
from lorry.models.layer_weights import Sharder
from lorry.models.loading.open import OpenedModel
from lorry.notes import NoteCallback
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
)
from lorry.runs.losses import collect_losses
from lorry.runs.process import RunDirectoryHandle
from lorry.runs.read import read_evaluation
from lorry.tasks.build import PreparedJobs, trained_names
from lorry.tasks.initialization import initialize_jobs, make_room_for_state
from lorry.tasks.ranks import choose_ranks, restore_ranks
from lorry.tasks.registry import TASKS
from lorry.train import artifacts, checkpoint, finish
from lorry.train.card.card import render_run_card
from lorry.train.engine import TrainingEngine
from lorry.train.evaluation.benchmarks import BenchmarkEvaluator, load_eval_benchmarks, main_metric
from lorry.train.evaluation.run_evaluation import Measure, RunEvaluation, default_best_metric
from lorry.train.evaluation.suites import RunSuite, load_run_suite, main_suite_metric
from lorry.train.jobs import RunOutcome
from lorry.train.monitoring.events import TrainingListener
from lorry.train.monitoring.process import record_process
from lorry.train.monitoring.trackers import open_trackers
from lorry.train.processes import find_shared_checkpoint, place_run, record_processes
from lorry.train.resources.budget import resolve_memory_budget
from lorry.train.resources.peak import tune_allocator
from lorry.train.resources.rate import PlannedRun, StepTimes, record_step_rate
from lorry.train.setup.adapters import attach_jobs
from lorry.train.setup.base import open_base
from lorry.train.setup.loop import build_engine
from lorry.train.setup.notebook import Notebook
from lorry.train.setup.rows import prepare_jobs, row_accounting
from lorry.train.start import (
    archive_previous_run,
    broken_contracts,
    claim_output_dir,
    is_own_checkpoint,
)


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
        checks.held(8, row_accounting(jobs))
        outcome = engine.run()
        checks.held(8, row_accounting(jobs))  # a streamed source knows more now
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
    receipt |= engine.memory
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
