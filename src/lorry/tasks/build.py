"""What a task is made from, and what its builder returns. A builder changes nothing that it was
given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorry.backends.protocol import Backend, ScoringBackend, Task
from lorry.config import RunConfig
from lorry.data.batch import Batch
from lorry.data.prepare import PreparedData
from lorry.data.stream.joint import JointStream
from lorry.models.loading.open import OpenedModel

# by adapter: the run it would be alone, and what it reads
PreparedJobs = Mapping[str, tuple[RunConfig, PreparedData]]


@dataclass(frozen=True)
class TaskInputs:
    """The run, the opened model, its jobs, their rows as one stream, the held-out batches, the
    steps of the longest job, and the backend (for scores before training)."""

    run: RunConfig
    opened: OpenedModel
    jobs: PreparedJobs
    stream: JointStream
    held: Sequence[Batch]
    total: int
    backend: Backend


@dataclass(frozen=True)
class BuiltTask:
    """The task; ``models``: the frozen models it scores with besides its own; ``digests``: what
    else the result hangs on, for the run's identity; ``notes``: what a person should know."""

    task: Task
    models: Mapping[str, ScoringBackend] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
