"""From a run's description to its task: one builder for each, chosen by `run.task`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorry.backends.local import Local
from lorry.backends.protocol import Scorer, Task
from lorry.data.batch import Batch
from lorry.data.prepare import Prepared
from lorry.data.stream.joint import JointStream
from lorry.models.loading.open import Opened
from lorry.tasks.distill.builder import build_distill
from lorry.tasks.sft import Sft

Jobs = Mapping[str, tuple[Any, Prepared]]  # by adapter: the run it would be alone, and what it reads


@dataclass(frozen=True)
class Material:
    """What a task is made from: the run, the opened model, its jobs, their rows as one stream, the held-out batches, the steps of
    the longest job, and the backend (for scores before training). The builder adds to ``notes``, and to ``digests`` what else the
    result hangs on."""

    run: Any
    opened: Opened
    jobs: Jobs
    stream: JointStream
    held: Sequence[Batch]
    total: int
    backend: Local
    notes: list[str]
    digests: dict[str, str] = field(default_factory=dict)


Built = tuple[Task, Mapping[str, Scorer]]  # the task, and the frozen models it scores with besides its own


def sft(given: Material) -> Built:
    """Supervised fine-tuning: nothing but the rows."""
    return Sft(given.stream, given.held, given.total, list(given.jobs)), {}


TASKS: dict[str, Callable[[Material], Built]] = {"sft": sft, "distill": build_distill}
