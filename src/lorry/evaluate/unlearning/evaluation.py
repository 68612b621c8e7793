"""A suite that is ready to be asked: what is measured, of which rows, against whose logs.

    evaluation = SuiteEvaluation.load(settings.suite, {"tofu": "data/tofu"})
    model = evaluation.ask(opened, Mix.one("default"))
    records = evaluation.measure(model, evaluation.open_results(model, Path("runs/npo/evals")))

`lorry eval` asks a finished model once, a run each of its adapters whenever it evaluates. Both go
this way, so that the same model has the same numbers, and what one has measured the other keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorry.adapters.mix import Mix
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.config.suite import SuiteConfig
from lorry.data.encoding.encode import ExampleEncoder
from lorry.evaluate.unlearning.measures import check_retain_logs
from lorry.evaluate.unlearning.results import SharedResults, SuiteResults, digest_of
from lorry.evaluate.unlearning.retain_logs import RetainLogs
from lorry.evaluate.unlearning.rows import SuiteSet
from lorry.evaluate.unlearning.scores import SuiteModel
from lorry.evaluate.unlearning.suite import MetricRecord, Suite, SuiteRequest, measure_suite
from lorry.evaluate.unlearning.suites import SUITES
from lorry.formatting import format_count
from lorry.models.loading.open import OpenedModel


@dataclass(frozen=True)
class SuiteEvaluation:
    """``names``: the metrics in the order they are measured, parts first; ``sets``: the rows by role;
    ``logs``: the oracle's, None where there are none; ``notes``: what a person should know of them.

    ``limit``: rows of a set that are answered by generation, None: all; all else is of all rows;
    ``max_new_tokens`` of such an answer, None: as the suite has it; ``peer_floor``: extraction
    strength of a total miss is 1 / n.
    """

    suite: Suite
    names: tuple[str, ...]
    sets: Mapping[str, SuiteSet]
    logs: RetainLogs | None
    notes: tuple[str, ...]
    limit: int | None = None
    max_new_tokens: int | None = None
    peer_floor: bool = False

    @classmethod
    def load(
        cls,
        config: SuiteConfig,
        local: Mapping[str, str],
        *,
        limit: int | None = None,
        max_new_tokens: int | None = None,
        peer_floor: bool = False,
    ) -> SuiteEvaluation:
        """Read rows and logs; no model is needed. Raises ConfigError for an unknown metric, one that
        needs logs or a split that is not there, DataError for rows or logs that cannot be used.
        """
        assert config.name is not None
        suite, path = SUITES[config.name], config.retain_logs_path
        names, notes = suite.choose(config.metrics, logs=path is not None)
        request = SuiteRequest(
            local=local,
            forget_split=config.forget_split,
            holdout_split=config.holdout_split,
            question_key=config.question_key,
            corpus=config.corpus,
        )
        sets = suite.load(suite.roles(names), request)
        # before any model: hours later it would be as wrong
        logs = None if path is None else RetainLogs.read(Path(path))
        if logs is not None:
            check_retain_logs(names, logs, sets)
        of_sets = [
            f"{row_set.name}: {format_count(len(row_set.rows), 'row')}"
            + (f"; note: {row_set.note}" if row_set.note else "")
            for row_set in sets.values()
        ]
        lines = (*(f"note: {note}" for note in notes), *of_sets)
        return cls(suite, tuple(names), sets, logs, lines, limit, max_new_tokens, peer_floor)

    @property
    def digest(self) -> str:
        """SHA-256 of the rows that are asked and of the oracle's logs."""
        rows = {role: suite_set.digest for role, suite_set in self.sets.items()}
        return digest_of({"rows": rows, "logs": self.logs.digest if self.logs else None})

    def ask(
        self,
        opened: OpenedModel,
        mix: Mix,
        *,
        start: Mix | None = None,
        batch_rows: int = 8,
        system: str | None = None,
        communicator: Communicator = ONE_PROCESS,
    ) -> SuiteModel:
        """The model under a mix, as it is now: one that trains on is asked anew. ``start``,
        ``communicator``: as in `SuiteModel`; ``system``: message for questions, which bring none.
        """
        model = opened.model
        encoder = ExampleEncoder(
            opened.tokenizer,
            # a model that says no context takes any length: 2^20 tokens stand for no limit
            max_length=model.context or 1 << 20,
            system=system,
            # the model's rows and not the tokenizer's length, which may be either way off
            embeddings=model.vocab_size,
        )
        return SuiteModel(
            model,
            encoder,
            dict(self.sets),
            mix,
            start=start,
            max_new_tokens=self.max_new_tokens,
            limit=self.limit,
            batch_rows=batch_rows,
            # two statistics more of every token, paid for by all scores or by none
            moments=any(self.suite.metrics[name].moments for name in self.names),
            communicator=communicator,
        )

    def open_results(
        self, suite_model: SuiteModel, folder: Path, before_write: Callable[[], None] = lambda: None
    ) -> SuiteResults | SharedResults:
        """The two files of a folder, for records of this model; of several processes rank 0's.
        Raises DataError for damaged ones.
        """
        model = suite_model.digest()
        rows = {
            name: {role: self.sets[role].digest for role in self.suite.roles_of(name)}
            for name in self.names
        }
        digests = {
            name: digest_of(
                {"metric": name, "model": model, "rows": rows[name], **self._settings_of(name)}
            )
            for name in self.names
        }
        title = self.suite.title
        open_store = partial(SuiteResults, folder, title, digests, model, rows, before_write)
        if suite_model.communicator.size == 1:
            return open_store()
        return SharedResults(suite_model.communicator, open_store)

    def _settings_of(self, name: str) -> dict[str, Any]:
        """What a metric's value hangs on besides model and rows; what it does not look at is left
        out, or another limit would throw away probabilities.
        """
        suite, logs = self.suite, self.logs
        lengths = [
            self.max_new_tokens or self.sets[role].new_tokens for role in suite.roles_of(name)
        ]
        return {
            "generation": [lengths, self.limit] if suite.flag(name, "generates") else None,
            "logs": logs.digest if logs is not None and suite.flag(name, "reads_logs") else None,
            "peer_masks": self.peer_floor and name == "extraction_strength",
        }

    def measure(
        self,
        suite_model: SuiteModel,
        results: SuiteResults | SharedResults,
        tell: Callable[[str], None] = lambda name: None,
    ) -> dict[str, MetricRecord]:
        """{metric: its record}; those that ``results`` has are not measured again, the others are
        written one by one. ``tell`` hears which comes next. Raises as `measure_suite`, DiskError.
        """
        return measure_suite(
            self.suite,
            self.names,
            suite_model,
            logs=self.logs,
            store=results,
            peer_floor=self.peer_floor,
            tell=tell,
        )
