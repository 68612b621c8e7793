"""Named sets asked while a run trains: `train.eval_tasks`, at every evaluation, with the weights as
they are then.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorry.adapters.trainable import parameter_set
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.config import RunConfig, runs_by_adapter
from lorry.data.catalog import open_catalog
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.reading.places import DataLocations, refuse_leak
from lorry.data.stream.mixtures import training_locations
from lorry.evaluate.benchmarks.questions import Benchmark, load_benchmark
from lorry.evaluate.benchmarks.run import evaluate_benchmark
from lorry.models.loading.open import OpenedModel


def load_eval_benchmarks(run: RunConfig) -> list[Benchmark]:
    """The questions of `train.eval_tasks`, read before the model is loaded. Raises ConfigError,
    also where rows to ask are rows that a job learns, whatever the set is called, and DataError."""
    if not run.train.eval_tasks:
        return []
    catalog, exams = open_catalog(run.data.catalog), list[Benchmark]()
    places = DataLocations(run.data.local, catalog=catalog)
    # of every job: the exams are asked of each adapter, whichever job learns the rows
    spots = [
        spot
        for job_run in runs_by_adapter(run).values()
        for spot in training_locations(job_run.data)
    ]
    for name in catalog.expand_suites(run.train.eval_tasks):
        exam = load_benchmark(
            name,
            places,
            limit=run.train.eval_limit,
            n_shot=run.train.eval_n_shot,
            seed=run.train.seed,
            on_bad_row="error" if run.data.on_bad_row == "error" else "skip",
        )
        # by place and not by name: the same file under another name is as much a leak
        refuse_leak(spots, places, exam.named_set, exam.split, "leave it out of train.eval_tasks")
        exams.append(exam)
    return exams


def main_metric(exam: Benchmark) -> str:
    """What speaks for a set among the numbers of an evaluation; more of it is better."""
    return f"eval_{exam.named_set.name}_{exam.named_set.metrics[0]}"


class BenchmarkEvaluator:
    """Asks every exam of an adapter (or of the base, where that is what trains): {eval_SET_METRIC:
    value}. ``communicator``: the processes of the run.
    """

    def __init__(
        self,
        run: RunConfig,
        opened: OpenedModel,
        exams: list[Benchmark],
        communicator: Communicator = ONE_PROCESS,
    ) -> None:
        self.communicator = communicator
        self.run, self.opened, self.exams = run, opened, exams
        # a model that says no context takes any length: 2^20 tokens stand for no limit
        context = opened.model.context
        rows = opened.model.vocab_size
        self.encoder = ExampleEncoder(
            opened.tokenizer, max_length=context or 1 << 20, system=run.data.system, embeddings=rows
        )

    def __call__(self, name: str) -> Mapping[str, float]:
        # what trains says what it runs under: base weights go by a job's name, too
        mix = parameter_set(self.opened.model, name).mix()
        values = dict[str, float]()
        for exam in self.exams:
            result = evaluate_benchmark(
                self.opened.model,
                self.encoder,
                exam,
                mix,
                batch_rows=self.run.train.per_device_eval_batch_size,
                communicator=self.communicator,
            )
            values |= {
                f"eval_{exam.named_set.name}_{metric}": estimate.value
                for metric, estimate in result.metrics.items()
            }
        return values
