"""The one loop: gather a step's batches, forward_backward, step; log, evaluate, save, stop. Every task and backend uses it.

    batches = task.step_batches(step, models)
    stats = backend.forward_backward(batches, task, step)
    norms = backend.step(rates)

Everything a step does is a function of (config, data, step, state), so a run killed anywhere goes on from its last checkpoint
as if it had never stopped, bit for bit on one CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorry.backends.base import Backend, Norms, Stats, Task
from lorry.config.schema import TrainConfig
from lorry.disk import durable
from lorry.disk.metrics import MetricsWriter, cut_after, iterate
from lorry.errors import ConfigError, Interrupted, NonFiniteError
from lorry.evaluate.loss import evaluate_task
from lorry.train import checkpoint
from lorry.train.checks import Checks
from lorry.train.events import Listener
from lorry.train.memory import peak_memory
from lorry.train.schedule import rate, warmup_steps
from lorry.train.signals import Stop, watching

METRICS = "metrics.jsonl"


@dataclass
class Progress:
    """Where a run stands; with the backend's and the task's state, all of it."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    stopped_early: bool = False


@dataclass
class Outcome:
    """What a finished run has to say."""

    steps: int
    final_loss: float | None
    best_step: int | None
    stopped_early: bool
    last_evaluation: Mapping[str, float] = field(default_factory=dict)


class Engine:
    """Runs a task on a backend. ``identity``: {"config", "digests"} of this run, stored in checkpoints and compared on resume;
    ``epoch_of(step)``: the epoch a step belongs to, counted from 0; ``ends``, ``tolerance``: contract 4."""

    def __init__(
        self,
        backend: Backend,
        task: Task,
        train: TrainConfig,
        run_dir: Path,
        *,
        identity: Mapping[str, Any],
        epoch_of: Callable[[int], int],
        steps_per_epoch: int | None,
        checks: Checks,
        listeners: Sequence[Listener] = (),
        ends: Sequence[int] = (),
        tolerance: float = 1e-5,
    ) -> None:
        self.backend, self.task, self.train, self.run_dir = backend, task, train, run_dir
        self.identity, self.epoch_of, self.checks = identity, epoch_of, checks
        self.steps_per_epoch = steps_per_epoch
        self.listeners, self.ends, self.tolerance = listeners, ends, tolerance
        self.progress = Progress()
        self.total = task.total_steps
        # the share is rounded up, as transformers does, but may not take a run's only step
        self.warmup = train.warmup_steps or min(warmup_steps(self.total, train.warmup_ratio), max(self.total - 1, 0))
        self.final_loss: float | None = None
        self.epoch = 0
        self.newest: Path | None = None  # the checkpoint this run last wrote, or went on from
        self.origin: Path | None = None

    # --- the loop

    def run(self) -> Outcome:
        """Train to the end. Raises Interrupted after a signal (the state is saved), ContractError, NonFiniteError, DiskError."""
        durable.make_directory(self.run_dir)
        durable.recover(self.run_dir)
        cut_after(self.run_dir / METRICS, self.progress.step if self.progress.step else -1)
        with MetricsWriter(self.run_dir / METRICS) as metrics, watching() as stop:
            self._tell("start", self.progress.step, self.total)
            try:
                while self.progress.step < self.total and not self.progress.stopped_early:
                    self._one_step(metrics)
                    self._after(metrics, stop)
            finally:
                self._tell("finish")
        self.checks.prove(self.backend)
        p = self.progress
        best = p.best_step if self.train.load_best_model_at_end else None
        if best is not None:
            self._load_best(best)
        return Outcome(p.step, self.final_loss, p.best_step, p.stopped_early, self._evaluation_of(best))

    def _one_step(self, metrics: MetricsWriter) -> None:
        began, step = time.perf_counter(), self.progress.step
        self.epoch = self.epoch_of(step)
        batches = self.task.step_batches(step, {"self": self.backend})
        if 4 not in self.checks.found:
            self.checks.first_batches(self.backend, batches, self.ends, tolerance=self.tolerance)
            began = time.perf_counter()  # the checks of the first batch are not part of a step's time
        rates = dict.fromkeys(self.task.adapters, self._rate(step))
        try:
            stats = self.backend.forward_backward(batches, self.task, step)
            norms = self.backend.step(rates)
        except NonFiniteError as error:
            self.checks.fail(7, str(error))
            raise
        self.task.after_step(stats)
        self.checks.after_step(self.backend, norms, rates)
        self.progress.step += 1
        record = self._record(stats, norms, rates, time.perf_counter() - began)
        metrics.write(record)
        self._tell("step", record)

    def _rate(self, step: int) -> float:
        t = self.train
        return rate(step, self.total, kind=t.lr_scheduler_type, base=t.learning_rate, warmup=self.warmup)

    def _record(self, stats: Stats, norms: Norms, rates: Mapping[str, float], seconds: float) -> dict[str, Any]:
        """One line of metrics.jsonl: plain numbers for one adapter, a mapping under `adapters` as well for several."""
        names = sorted(stats.present)
        loss = sum(stats.loss[n] for n in names) / max(len(names), 1)
        self.final_loss = loss
        record: dict[str, Any] = {
            "step": self.progress.step,
            "epoch": self.progress.step / self.steps_per_epoch if self.steps_per_epoch else self.epoch_of(self.progress.step),
            "loss": loss,
            "learning_rate": max(rates.values()),
            "grad_norm": sum(n * n for n in norms.norms.values()) ** 0.5,
            "tokens": stats.tokens,
            "supervised_tokens": stats.supervised,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(),
        }
        if len(stats.terms) > 1:
            record |= {f"loss_{term}": sum(values[n] for n in names) / max(len(names), 1) for term, values in stats.terms.items()}
        if len(stats.loss) > 1:
            record["adapters"] = {n: {"loss": stats.loss[n], "grad_norm": norms.norms.get(n)} for n in names}
        return record

    # --- between steps

    def _after(self, metrics: MetricsWriter, stop: Stop) -> None:
        last = self.progress.step == self.total
        improved = self._evaluate(metrics) if self._due(self.train.eval_strategy, self.train.eval_steps, last) else False
        strategy = self.train.save_strategy
        due = strategy != "no" and (last or self.progress.stopped_early or self._due(strategy, self.train.save_steps, last))
        keep_best = improved and (self.train.load_best_model_at_end or strategy != "no")
        if due or keep_best or stop.requested or stop.take_save():
            self.save()
        if stop.requested and not last:
            raise Interrupted(
                f"{stop.requested} arrived; step {self.progress.step} of {self.total} is saved in {self.run_dir}. "
                "The same command with resume_from_checkpoint=auto goes on from there"
            )

    def _due(self, strategy: str | None, every: int | None, last: bool) -> bool:
        if strategy == "steps":
            return bool(every) and self.progress.step % int(every or 1) == 0
        if strategy == "epoch":
            return last or self.epoch_of(self.progress.step) > self.epoch
        return False

    def _evaluate(self, metrics: MetricsWriter) -> bool:
        """Evaluate, log, and update what is best. Returns whether it is."""
        found = evaluate_task(self.backend, self.task)
        record = {"step": self.progress.step, **found}
        metrics.write(record)
        self._tell("evaluation", record)
        name = self.train.metric_for_best_model
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in found:
            raise ConfigError(f"train.metric_for_best_model is {name!r}; evaluation gives {', '.join(found)}")
        p, value = self.progress, found[name]
        ahead = p.best is None or (value > p.best if self.train.greater_is_better else value < p.best)
        better = ahead and math.isfinite(value)
        if better:
            p.best, p.best_step, p.waited = value, p.step, 0
        else:
            p.waited += 1
            patience = self.train.early_stopping_patience
            p.stopped_early = patience is not None and p.waited >= patience
        return better

    def _evaluation_of(self, step: int | None) -> dict[str, float]:
        """What was logged when a step was evaluated (None: the last evaluation, if any), by this process or an earlier one."""
        logged = [r for _, r in iterate(self.run_dir / METRICS) if "eval_loss" in r and step in (None, r["step"])]
        return {name: value for name, value in logged[-1].items() if name != "step"} if logged else {}

    # --- state

    def save(self) -> Path:
        """Write a checkpoint of this step; the best one is never pruned."""
        meta = {
            **self.identity, "progress": vars(self.progress), "task": self.task.state(), "checks": self.checks.state(),
            "final_loss": self.final_loss,
        }  # fmt: skip
        durable.settle(self.run_dir / METRICS)
        self.newest = checkpoint.save(self.run_dir, self.progress.step, self.backend.state(), meta, **self._kept())
        return self.newest

    def _kept(self) -> dict[str, Any]:
        """Which checkpoints stay: the newest few, and the best one."""
        best = self.progress.best_step
        return {"keep": self.train.save_total_limit, "protect": [] if best is None else [best]}

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ConfigError if it belongs to other data or another config, ModelError if damaged."""
        tensors, meta = checkpoint.load(path)
        for note in checkpoint.refuse_other(meta, self.identity):
            self._tell("note", note)
        self.checks.resume(self.backend, meta["checks"])
        self.backend.load_state(tensors)
        self.task.load_state(meta["task"])
        self.progress = Progress(**meta["progress"])
        self.final_loss = meta["final_loss"]
        checkpoint.tidy(self.run_dir, self.progress.step, **self._kept())
        here = self.run_dir / "checkpoints" / f"step-{self.progress.step:08d}"
        self.newest, self.origin = here if here.is_dir() else path, path
        self._tell("note", f"resumed from {path.name}: {self.progress.step} of {self.total} steps are done")

    def _load_best(self, step: int) -> None:
        path = self.run_dir / "checkpoints" / f"step-{step:08d}"
        if self.origin is not None and not path.is_dir():  # the best step lies before a start from another run's checkpoint
            path = self.origin.with_name(path.name)
        tensors, _ = checkpoint.load(path)
        self.backend.load_state(tensors)
        self._tell("note", f"loaded the best adapter, of step {step}")

    def _tell(self, what: str, *words: Any) -> None:
        for listener in self.listeners:
            getattr(listener, what)(*words)
