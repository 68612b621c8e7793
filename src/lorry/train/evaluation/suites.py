"""A suite of unlearning asked while a run trains: `suite=tofu`, at every evaluation and at the end,
with the weights as they are then.

`RUN/evals/step-N` has the suite's two files of every evaluation, `RUN/evals` those of the adapter
that the run ended with, where `lorry eval` finds them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorry.adapters.mix import Mix
from lorry.adapters.trainable import parameter_set
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.config import RunConfig
from lorry.errors import ConfigError
from lorry.evaluate.unlearning.evaluation import SuiteEvaluation
from lorry.evaluate.unlearning.results import eval_file, refuse_foreign_suite, summary_file
from lorry.evaluate.unlearning.scores import SuiteModel
from lorry.models.loading.open import OpenedModel
from lorry.notes import NoteCallback
from lorry.runs.layout import RunDir
from lorry.runs.process import RunDirectoryHandle


def load_run_suite(run: RunConfig, add_note: NoteCallback) -> SuiteEvaluation | None:
    """The suite of a run, read before a model is loaded; None where it has none. Raises what
    `SuiteEvaluation.load` raises, and ConfigError for files of its names that are not ours.
    """
    if run.suite.name is None:
        return None
    suite = SuiteEvaluation.load(
        run.suite, run.data.local, limit=run.suite.limit, max_new_tokens=run.suite.max_new_tokens
    )
    title, results = suite.suite.title, RunDir(run.output_dir).suites
    names = (eval_file(title), summary_file(title))
    # wherever one lies under evals/: which steps and adapters will write there is not known yet
    there = {file.parent for name in names for file in results.rglob(name)}
    for folder in sorted(there):
        refuse_foreign_suite(folder, title)
    for note in suite.notes:
        add_note(f"suite={run.suite.name}: {note.removeprefix('note: ')}")
    return suite


def metric_key(metric: str) -> str:
    """A suite's metric in metrics.jsonl: forget_Q_A_Prob is eval_forget_q_a_prob."""
    return f"eval_{metric.lower()}"


def main_suite_metric(suite: SuiteEvaluation, run: RunConfig) -> str:
    """What speaks for a suite among the numbers of an evaluation: its main metric, more of which is
    better. Raises ConfigError where that is not asked and the run would choose an adapter by
    another, of which nobody knows whether more is better (privleak is best at 0)."""
    main = suite.suite.main
    chooses = run.train.load_best_model_at_end or run.train.early_stopping_patience
    # a metric of the user's own or the task's has its direction beside it
    unsaid = run.train.metric_for_best_model == "eval_loss" and not run.data.evaluates
    if main not in suite.names and chooses and unsaid:
        raise ConfigError(
            f"metrics: of {', '.join(suite.names)} none alone decides which adapter "
            f"is better; add {main}, or give metric_for_best_model and "
            "greater_is_better"
        )
    # of what was asked for instead, the last is no part of another
    return metric_key(main if main in suite.names else suite.names[-1])


class RunSuite:
    """Asks a suite of an adapter; ``home``: the run directory, looked at before anything is written,
    so that one that was moved is not made anew under its old name; ``communicator``: the processes
    of the run.
    """

    # the number that is reported has to be of the adapter that stays
    at_end = True

    def __init__(
        self,
        run: RunConfig,
        opened: OpenedModel,
        suite: SuiteEvaluation,
        home: RunDirectoryHandle,
        communicator: Communicator = ONE_PROCESS,
    ) -> None:
        self.communicator = communicator
        self.opened, self.suite, self.home = opened, suite, home
        self.several = len(run.jobs) > 1
        self.batch_rows = run.train.per_device_eval_batch_size
        self.system, self.paths = run.data.system, RunDir(run.output_dir)
        self.digests: Mapping[str, str] = {"suite": suite.digest}

    def measure(self, adapter: str, step: int) -> Mapping[str, float]:
        """The value of every metric, and the two files in the step's folder."""
        model, folder = self._ask(adapter), self._folder(self.paths.suite(step), adapter)
        # of an earlier life of this run: the same weights have the same digest
        results = self.suite.open_results(model, folder, self.home.check)
        records = self.suite.measure(model, results)
        return {metric_key(name): float(record["agg_value"]) for name, record in records.items()}

    def conclude(self, adapter: str, step: int) -> None:
        """Files of the adapter that stays, from those of its step; what they lack is measured."""
        model, folder = self._ask(adapter), self._folder(self.paths.suites, adapter)
        results = self.suite.open_results(model, folder, self.home.check)
        results.adopt(self._folder(self.paths.suite(step), adapter))
        self.suite.measure(model, results)

    def _ask(self, adapter: str) -> SuiteModel:
        # what trains says what it runs under: base weights go by a job's name, too
        mix = parameter_set(self.opened.model, adapter).mix()
        return self.suite.ask(
            self.opened,
            mix,
            start=Mix.none() if mix.terms else None,
            batch_rows=self.batch_rows,
            system=self.system,
            communicator=self.communicator,
        )

    def _folder(self, folder: Path, adapter: str) -> Path:
        """As `lorry eval` lays out a run of one adapter, or of several."""
        return folder / adapter if self.several else folder
