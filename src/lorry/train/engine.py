"""The one loop: gather a step's batches, forward_backward, step; log, evaluate, save, stop. Every
task and backend uses it.

    batches = task.step_batches(step, models)
    stats = backend.forward_backward(batches, task, step)
    norms = backend.step(rates)

Everything a step does is a function of (config, data, step, state), so a run killed anywhere goes
on from its last checkpoint as if it had never stopped, bit for bit on one CPU. Several adapters are
several jobs (`jobs.py`): each has its own rate, its own evaluation and its own end, after which it
is absent from the batches and does not step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lorry.backends.protocol import Backend, GradientNorms, ScoringBackend, StepStats, Task
from lorry.config.schema.train import TrainConfig
from lorry.data.batch import Batch
from lorry.data.stream.joint import count_adapter_tokens, keep_adapters
from lorry.disk import durable
from lorry.errors import ConfigError, ModelError, NonFiniteError, RunInterruptedError
from lorry.evaluate.loss import evaluate_task
from lorry.runs.layout import METRICS, RunDir
from lorry.runs.metrics import MetricsWriter, drop_metrics_after, iter_metrics
from lorry.runs.process import RunDirectoryHandle
from lorry.train import checkpoint
from lorry.train.checks import ContractChecks
from lorry.train.evaluation.run_evaluation import RunEvaluation, join_measures
from lorry.train.jobs import (
    JobProgress,
    RunOutcome,
    RunProgress,
    TrainingJob,
    held_out_task,
    mean_evaluations,
    mean_value,
)
from lorry.train.monitoring.events import TrainingListener
from lorry.train.monitoring.signals import StopRequest, watch_signals
from lorry.train.resources.peak import peak_memory, release_freed_memory, resident_memory

EQUALITY_STEPS = 2  # after each of which ranks compare what they hold


class TrainingEngine:
    """Runs a task on a backend. ``identity``: {"config", "digests"} of this run, stored in
    checkpoints and compared on resume; ``jobs``: one per adapter of the task, in its order; left
    out, all are alike: ``train``'s settings, the task's steps, ``epoch_of(step)``, the epoch a step
    belongs to, counted from 0, and ``ends`` (contract 4, as ``tolerance`` and ``leak_tolerance``);
    ``models``: frozen ones the task scores with besides the backend; ``evaluations``: what is asked
    of an adapter besides the loss of held-out rows; ``record(step)``: what the task adds to the
    line of a step; ``conclude``: what it does with the values that the run ends with;
    ``unreached(batches)``: which targets no gradient of a step with these could reach.
    """

    def __init__(
        self,
        backend: Backend,
        task: Task,
        train: TrainConfig,
        run_dir: Path,
        *,
        identity: Mapping[str, Any],
        checks: ContractChecks,
        jobs: Sequence[TrainingJob] = (),
        epoch_of: Callable[[int], int] = lambda step: 0,
        steps_per_epoch: int | None = None,
        listeners: Sequence[TrainingListener] = (),
        ends: Sequence[int] = (),
        tolerance: float = 1e-5,
        leak_tolerance: float = 0.0,
        models: Mapping[str, ScoringBackend] | None = None,
        evaluations: Sequence[RunEvaluation] = (),
        record: Callable[[int], Mapping[str, Any]] = lambda step: {},
        conclude: Callable[[], None] = lambda: None,
        unreached: Callable[[Sequence[Batch]], Mapping[str, Collection[str]]] = lambda batches: {},
    ) -> None:
        self.record_task, self.conclude_task, self.unreached = record, conclude, unreached
        self.communicator = backend.communicator
        self.models, self.evaluations = {"self": backend, **(models or {})}, evaluations
        self.backend, self.task, self.train, self.run_dir = backend, task, train, run_dir
        self.identity, self.checks, self.listeners = identity, checks, listeners
        self.tolerance, self.leak_tolerance = tolerance, leak_tolerance
        alike = [
            TrainingJob(name, train, task.total_steps, epoch_of, steps_per_epoch, ends)
            for name in task.adapters
        ]
        self.jobs = {job.name: job for job in jobs or alike}
        self.progress = RunProgress(0, {name: JobProgress() for name in self.jobs})
        self.total = max(job.total for job in self.jobs.values())
        self.ended_with: dict[str, int] = {}  # by job, the step of the adapter that stays
        self.epochs: dict[str, int] = {}  # of the step just made, by the jobs that took part
        self.newest: Path | None = None  # the checkpoint this run last wrote, or went on from
        self.origin: Path | None = None
        # bytes: the peak of all that came before the first step, and what is held after the last one
        self.memory: dict[str, int] = {}
        self.home: RunDirectoryHandle | None = None  # the run directory, while the loop runs

    # --- the loop

    def run(self) -> RunOutcome:
        """Train to the end. Raises RunInterruptedError after a signal (the state is saved), ContractError,
        NonFiniteError, DiskError.
        """
        release_freed_memory()
        self.memory["loading_peak_bytes"] = peak_memory()
        self.checks.same_run_on_all_ranks(self.communicator, self.identity)
        self.checks.equal_on_all_ranks(self.backend, 2, "before the first step")
        durable.make_directory(self.run_dir)
        durable.recover_writes(self.run_dir)
        # Steps behind the checkpoint are made again, and so are their lines. At the start not even
        # the line of step 0 stays, of an evaluation before training (hence -1).
        drop_metrics_after(self.run_dir / METRICS, self.progress.step if self.progress.step else -1)
        with (
            RunDirectoryHandle(self.run_dir) as self.home,
            MetricsWriter(self.run_dir / METRICS) as metrics,
            watch_signals() as stop,
        ):
            self._tell("start", self.progress.step, self.total)
            try:
                if self.train.eval_on_start and self.progress.step == 0:
                    self._evaluate(metrics, list(self.jobs))
                while self.active():
                    self._one_step(metrics)
                    self._after(metrics, stop)
            finally:
                self._tell("finish")
        self.memory["trained_bytes"] = resident_memory()
        # Before the best adapter is put back: both speak of the weights that training ended with.
        self.checks.finite(self.backend, self.progress.step)
        self.checks.prove(self.backend)
        best = {
            name: self._standing(name).best_step
            for name, job in self.jobs.items()
            if job.train.load_best_model_at_end
        }
        for name, step in best.items():
            # a job that was ended because it is no good any more, and never was: nothing to keep
            if step is None and self._standing(name).stopped_early:
                raise ConfigError(
                    f"{name}: the model had already collapsed at its first "
                    f"evaluation, at step {self._standing(name).steps}, so there is "
                    "no adapter to save and none is written; lower learning_rate, "
                    "or evaluate sooner (eval_steps)"
                )
        chosen = {name: step for name, step in best.items() if step is not None}
        self._load_best(chosen)
        self.conclude_task()
        self.ended_with = {n: chosen.get(n, self._standing(n).steps) for n in self.jobs}
        return RunOutcome.of({name: self._outcome(name, best.get(name)) for name in self.jobs})

    def conclude_evaluations(self) -> None:
        """Tell what evaluates which step's adapters the run has ended with. Raises what
        `RunEvaluation.conclude` raises.
        """
        for evaluation in self.evaluations:
            for name, step in self.ended_with.items():
                evaluation.conclude(name, step)

    def active(self) -> list[TrainingJob]:
        """The jobs that have a step to make."""
        return [
            j
            for j in self.jobs.values()
            if self.progress.step < j.total and not self._standing(j.name).stopped_early
        ]

    def _one_step(self, metrics: MetricsWriter) -> None:
        began, step, active = time.perf_counter(), self.progress.step, self.active()
        self.epochs = {job.name: job.epoch_of(step) for job in active}
        batches = self._batches(step, active)
        # once in a run's life: what a checkpoint's checks found is not checked again after resuming
        if 4 not in self.checks.results:
            self.checks.first_batches(
                self.backend,
                batches,
                [j.ends for j in self.jobs.values()],
                tolerance=self.tolerance,
                leak_tolerance=self.leak_tolerance,
                ranks=self.communicator.mesh.data_size,
            )
            # the checks of the first batch are not part of a step's time
            began = time.perf_counter()
        rates = {name: rate for job in active for name, rate in job.rates(step).items()}
        try:
            stats = self.backend.forward_backward(batches, self.task, step)
            norms = self.backend.step(rates)
        except NonFiniteError as error:
            # nobody was updated; contracts.json has to say which contract broke
            self.checks.fail(7, str(error))
            raise
        self.task.after_step(stats)
        self.checks.after_step(self.backend, norms, rates, self.unreached(batches))
        self.progress.step += 1
        # what is not added up over ranks drifts apart from the first step on; later, each
        # checkpoint
        if step < EQUALITY_STEPS:
            self.checks.equal_on_all_ranks(self.backend, 3, f"after step {self.progress.step}")
        for job in active:
            standing = self._standing(job.name)
            standing.steps = self.progress.step
            # a job without a supervised token in this step keeps its last loss
            standing.loss = stats.loss[job.name] if job.name in stats.present else standing.loss
        record = self._record(stats, norms, rates, batches, time.perf_counter() - began)
        # after the work and before the line: under the old name nothing may be made anew
        self._check_home()
        metrics.write(record)
        self._tell("step", record)

    def _batches(self, step: int, active: Sequence[TrainingJob]) -> list[Batch]:
        """The step's micro-batches, without the sequences of jobs that are done."""
        batches = self.task.step_batches(step, self.models)
        names = {job.name for job in active}
        return (
            batches
            if len(names) == len(self.jobs)
            else keep_adapters(batches, [k for k, n in enumerate(self.jobs) if n in names])
        )

    def _record(
        self,
        stats: StepStats,
        norms: GradientNorms,
        rates: Mapping[str, float],
        batches: Sequence[Batch],
        seconds: float,
    ) -> dict[str, Any]:
        """One line of metrics.jsonl: plain numbers for one adapter, a mapping under `adapters` as
        well for several.
        """
        names, step = [name for name in self.jobs if name in stats.present], self.progress.step
        # several jobs have no common epoch: the line shows the one that goes on longest
        longest = max((self.jobs[name] for name in self.epochs), key=lambda job: job.total)
        record: dict[str, Any] = {
            "step": step,
            "epoch": longest.epochs(step),
            "loss": mean_value([stats.loss[n] for n in names]) if names else 0.0,
            "learning_rate": max(rates[name] for name in self.epochs),
            # the norm of all adapters' gradients as one vector; each is clipped by its own
            "grad_norm": sum(n * n for n in norms.norms.values()) ** 0.5,
            "tokens": stats.tokens,
            "supervised_tokens": stats.supervised,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(),
        }
        # a single term is the loss, and would only say it twice
        if len(stats.terms) > 1:
            record |= {
                f"loss_{term}": sum(values[n] for n in names) / max(len(names), 1)
                for term, values in stats.terms.items()
            }
        record |= self.record_task(step)
        if len(self.jobs) > 1:
            tokens = dict(
                zip(self.jobs, count_adapter_tokens(batches, len(self.jobs)), strict=True)
            )
            record["adapters"] = {
                n: {
                    "epoch": self.jobs[n].epochs(step),
                    "loss": stats.loss[n],
                    "learning_rate": rates[n],
                    "grad_norm": norms.norms.get(n),
                    "tokens": tokens[n],
                }
                for n in names
            }
        return record

    # --- between steps

    def _after(self, metrics: MetricsWriter, stop: StopRequest) -> None:
        # of the jobs in the step just made: one that has ended with it is no longer active, but due
        train = {name: self.jobs[name].train for name in self.epochs}
        # evaluation before saving: a checkpoint of this step knows whether it was the best so far
        # what a run is finished with is measured, whatever eval_steps divides
        at_end = any(evaluation.at_end for evaluation in self.evaluations)
        to_evaluate = [
            n
            for n, t in train.items()
            if self._due(n, t.eval_strategy, t.eval_steps)
            or (at_end and self.progress.step == self.jobs[n].total)
        ]
        evaluations = self._evaluate(metrics, to_evaluate)
        improved = [
            n for n, values in evaluations.items() if self._standing(n).judge(values, train[n])
        ]
        requested, save_requested = self._agreed_signals(stop)
        finished, strategy = not self.active(), self.train.save_strategy
        # the last step is always saved, whatever save_steps divides
        due = strategy != "no" and (
            finished
            or any(self._due(name, strategy, self.train.save_steps) for name in self.epochs)
        )
        # without its checkpoint there would be nothing to go back to at the end
        keep_best = any(
            self.jobs[name].train.load_best_model_at_end or strategy != "no" for name in improved
        )
        if due or keep_best or requested or save_requested:
            self.save()
            # what arrived meanwhile need not wait for another step: this one is saved
            requested, _ = self._agreed_signals(stop, take_save=False)
        # a signal during the last step changes nothing: the run is complete and ends as such
        if requested and not finished:
            raise RunInterruptedError(
                f"{requested} arrived; step {self.progress.step} of "
                f"{self.total} is saved in {self.run_dir}. The same command with "
                "resume_from_checkpoint=auto continues from there"
            )

    def _agreed_signals(self, stop: StopRequest, take_save: bool = True) -> tuple[str, bool]:
        """(the signal that asked to stop, or nothing; whether a checkpoint was asked for), as heard
        by any rank: one may have been told alone, or a step sooner than the others."""
        heard = [stop.requested, take_save and stop.take_save()]
        signals = self.communicator.exchange("signals", heard)
        return next((name for name, _ in signals if name), ""), any(save for _, save in signals)

    def _due(self, name: str, strategy: str | None, every: int | None) -> bool:
        return self.jobs[name].due(strategy, every, self.progress.step, self.epochs[name])

    def _evaluate(self, metrics: MetricsWriter, due: Sequence[str]) -> dict[str, dict[str, float]]:
        """Evaluate these jobs and log what is found, which is returned."""
        if not due:
            return {}
        evaluations = {
            name: join_measures(
                evaluate_task(self.backend, held_out_task(self.task, name)),
                *(evaluation.measure(name, self.progress.step) for evaluation in self.evaluations),
            )
            for name in due
        }
        # rank 0's: another machine may round otherwise, and what is best is decided once
        evaluations = self.communicator.exchange("evaluation", evaluations)[0]
        record: dict[str, Any] = {
            "step": self.progress.step,
            **mean_evaluations(list(evaluations.values())),
        }
        if len(self.jobs) > 1:
            record["adapters"] = evaluations
        metrics.write(record)
        self._tell("evaluation", record)
        return evaluations

    def _standing(self, name: str) -> JobProgress:
        return self.progress.jobs[name]

    def _outcome(self, name: str, best: int | None) -> RunOutcome:
        """How a job ended. ``best``: the step whose adapter it ended with, if not the last."""
        s = self._standing(name)
        return RunOutcome(
            s.steps, s.loss, s.best_step, s.stopped_early, self._evaluation_of(name, best)
        )

    def _evaluation_of(self, name: str, step: int | None) -> dict[str, float]:
        """What was logged when a step was evaluated (None: the last evaluation, if any), by this
        process or an earlier one.
        """
        # from the file, not from memory: it may be of an earlier life of this run
        several = len(self.jobs) > 1
        lines = (
            (r["step"], r.get("adapters", {}).get(name, {}) if several else r)
            for _, r in iter_metrics(self.run_dir / METRICS)
        )
        evaluations = [
            values
            for at, values in lines
            if step in (None, at) and any(metric.startswith("eval_") for metric in values)
        ]
        return (
            {metric: value for metric, value in evaluations[-1].items() if metric != "step"}
            if evaluations
            else {}
        )

    # --- state

    def save(self) -> Path:
        """Write a checkpoint of this step; the best one is never pruned. Raises NonFiniteError,
        with nothing written or pruned, where the state is not finite; ContractError where ranks
        hold other values."""
        self._check_home()
        self.checks.finite(self.backend, self.progress.step)
        self.checks.equal_on_all_ranks(self.backend, 6, f"after step {self.progress.step}")
        meta = {
            **self.identity,
            "progress": self.progress.state(),
            "task": self.task.state(),
            "checks": self.checks.state(),
        }
        # metrics first: no checkpoint may be durable whose steps have no lines on the disk
        durable.sync_file(self.run_dir / METRICS)

        # on every rank: each may hold a part of it
        state = self.backend.state()

        def write() -> str:
            written = checkpoint.save_checkpoint(
                self.run_dir, self.progress.step, state, meta, **self._kept()
            )
            return str(written.absolute())

        self.newest = Path(self.communicator.on_main("checkpoint", write))
        return self.newest

    def _check_home(self) -> None:
        """Before anything is written: does the directory's name still mean this directory? Raises
        RunDirectoryGoneError.
        """
        if self.home is not None:
            self.home.check()

    def _kept(self) -> dict[str, Any]:
        """Which checkpoints stay: the newest few, and the best one of every job."""
        # also where save_total_limit=1: the best may be far older than the newest
        best = {standing.best_step for standing in self.progress.jobs.values()}
        return {
            "keep": self.train.save_total_limit,
            "protect": sorted(step for step in best if step is not None),
        }

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ConfigError if it belongs to other data or another
        config, ModelError if damaged.
        """
        tensors, meta = checkpoint.load_checkpoint(path)
        for note in checkpoint.refuse_other_run(meta, self.identity):
            self._tell("note", note)
        try:
            progress = RunProgress.of(meta.get("progress"), self.jobs, meta["step"])
            # before the weights: its fingerprints are of the adapters as the run began with them
            self.checks.resume(self.backend, meta.get("checks"))
            self.backend.load_state(tensors)
            self.task.load_state(meta.get("task", {}))
        except ModelError as error:
            raise ModelError(f"{path}: {error}; this run did not write this checkpoint") from None
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(
                f"{path / checkpoint.META_FILE}: the state of the task cannot be read ({error!r})"
            ) from None
        # Only when all of it was taken is anything removed from disk.
        self.progress = progress
        checkpoint.tidy_checkpoints(self.run_dir, self.progress.step, **self._kept())
        # a start from another run's checkpoint has none of this step here until it saves
        here = RunDir(self.run_dir).checkpoint(self.progress.step)
        self.newest, self.origin = here if here.is_dir() else path, path
        self._tell(
            "note", f"resumed from {path.name}: {self.progress.step} of {self.total} steps are done"
        )

    def _load_best(self, steps: Mapping[str, int]) -> None:
        """Put each job's adapter, with its moments, back to the step that was its best."""
        mine, chosen = self.backend.state(), dict[str, Tensor]()
        # the checkpoints of the run are rank 0's
        run_dir = Path(self.communicator.exchange("run", str(self.run_dir.absolute()))[0])
        # jobs that share a best step share the reading of its checkpoint
        for step in sorted(set(steps.values())):
            path = RunDir(run_dir).checkpoint(step)
            # the best step lies before a start from another run's checkpoint
            if self.origin is not None and not path.is_dir():
                path = self.origin.with_name(path.name)
            names = [name for name, best in steps.items() if best == step]
            trained = {part for name in names for part in self.jobs[name].trained_names}
            chosen |= {
                key: t
                for key, t in checkpoint.load_checkpoint(path)[0].items()
                # KIND/NAME/TENSOR and adam_count/NAME: the second part is the parameter set's
                if key.split("/")[1] in trained
            }
            whose = f", of {', '.join(names)}" if len(self.jobs) > 1 else ""
            self._tell("note", f"loaded the best adapter{whose}, of step {step}")
        if steps:
            others = {name: mine[name] for name in mine if name not in chosen}
            self.backend.load_state(others | chosen)

    def _tell(self, what: str, *words: Any) -> None:
        for listener in self.listeners:
            getattr(listener, what)(*words)
