"""Named sets asked while a run trains: `train.eval_tasks`, at every evaluation, with the weights as they are then."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lorry.bank.attach import bank_of
from lorry.bank.mix import Mix
from lorry.config import Run
from lorry.data.catalog import expand, named
from lorry.data.encode import Encoder
from lorry.data.places import Places, refuse_leak
from lorry.evaluate.exam import Exam, read_exam
from lorry.evaluate.sets import take
from lorry.models.open import Opened


def read_exams(run: Run) -> list[Exam]:
    """The questions of `train.eval_tasks`, read before the model is loaded. Raises ConfigError, also where rows to ask are rows
    to learn, and DataError."""
    places, exams = Places(run.data.local), list[Exam]()
    learnt = [named(name).name for name in run.data.mix]
    for name in expand(run.train.eval_tasks):
        one = named(name)
        exam = read_exam(
            name, places, limit=run.train.eval_limit, n_shot=run.train.eval_n_shot, seed=run.train.seed,
            on_bad_row="error" if run.data.on_bad_row == "error" else "skip",
        )  # fmt: skip
        if one.name in learnt:
            refuse_leak(places, one, run.data.split, exam.split, "leave it out of train.eval_tasks")
        exams.append(exam)
    return exams


class Asking:
    """Asks every exam of an adapter (or of the base, where that is what trains): {eval_SET_METRIC: value}."""

    def __init__(self, run: Run, opened: Opened, exams: list[Exam]) -> None:
        self.run, self.opened, self.exams = run, opened, exams
        context = opened.model.context
        self.encoder = Encoder(opened.tokenizer, max_length=context or 1 << 20, system=run.data.system)

    def __call__(self, name: str) -> Mapping[str, float]:
        mix = Mix.one(name) if name in bank_of(self.opened.model, create=True).names() else Mix.none()
        found = dict[str, float]()
        for exam in self.exams:
            taken = take(self.opened.model, self.encoder, exam, mix, batch_rows=self.run.train.per_device_eval_batch_size)
            values = {metric: one.value for metric, one in taken.metrics.items() if math.isfinite(one.value)}
            found |= {f"eval_{exam.one.name}_{metric}": value for metric, value in values.items()}
        return found
