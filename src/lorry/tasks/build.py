"""What a task is made from, and what it says of itself before it is made. A builder changes nothing
that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorry.backends.protocol import Backend, GradientRule, ScoringBackend, Task
from lorry.config import RunConfig
from lorry.config.data import DataConfig
from lorry.config.schema.model import ModelConfig
from lorry.config.schema.train import TrainConfig
from lorry.data.batch import Batch
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.prepare import PreparedData
from lorry.data.stream.dataset import BatchStream
from lorry.data.stream.joint import JointStream
from lorry.models.loading.open import OpenedModel, open_model
from lorry.notes import NoteCallback


@dataclass(frozen=True)
class PreparedJob:
    """One adapter's part of a run before it trains. ``run``: the run it would be alone; ``data``:
    the rows its epochs are counted in; ``row_sets``: others that its task reads, by role;
    ``stream``: its micro-batches; ``beside``: other parameter sets that its sequences train, by
    name, with the settings of each.
    """

    run: RunConfig
    data: PreparedData
    row_sets: Mapping[str, PreparedData]
    stream: BatchStream
    beside: Mapping[str, TrainConfig] = field(default_factory=dict)


# What an evaluation of a task may hold: 1 or 0, whether the model is still any good. Then the latest
# step that is becomes the best one, and the first that is not ends the job.
USABLE = "eval_usable"
PreparedJobs = Mapping[str, PreparedJob]  # by adapter


def trained_names(jobs: PreparedJobs) -> list[str]:
    """The parameter sets that a run trains: those of its jobs, whose places in a batch they have,
    then what trains beside them."""
    return [*jobs, *(name for job in jobs.values() for name in job.beside)]


# (run, opened model, add_note) -> what makes the encoder of its rows
EncoderFactory = Callable[[RunConfig, OpenedModel, NoteCallback], Callable[..., ExampleEncoder]]


def own_encoder(
    run: RunConfig, opened: OpenedModel, add_note: NoteCallback
) -> Callable[..., ExampleEncoder]:
    """Rows are read by the model's own tokenizer; a token without an embedding makes a bad row."""

    def make(*args: Any, **settings: Any) -> ExampleEncoder:
        # the model's rows and not the tokenizer's length, which may be either way off
        return ExampleEncoder(*args, **settings, embeddings=opened.model.vocab_size)

    return make


def own_stream(
    run: RunConfig, data: PreparedData, row_sets: Mapping[str, PreparedData]
) -> BatchStream:
    """The rows of the data group, as they are."""
    return data.stream


def held_out_rows(job: PreparedJob) -> dict[str, Batch]:
    """The first rows that were held out."""
    return {"held-out rows": job.data.evaluation[0]} if job.data.evaluation else {}


@dataclass(frozen=True)
class TaskInputs:
    """The run, the opened model, its jobs, their rows as one stream, the held-out batches, the
    steps of the longest job, the backend (for scores before training), ``tell``, who hears what
    a person should know while it trains, and ``open_model``, by which other models are opened."""

    run: RunConfig
    opened: OpenedModel
    jobs: PreparedJobs
    stream: JointStream
    held: Sequence[Batch]
    total: int
    backend: Backend
    tell: Callable[[str], None] = lambda text: None
    open_model: Callable[[ModelConfig, NoteCallback], OpenedModel] = open_model


@dataclass(frozen=True)
class BuiltTask:
    """The task; ``models``: the frozen models it scores with besides its own; ``digests``: what
    else the result hangs on, for the run's identity and its receipt; ``notes``: what a person
    should know; ``measure(adapter)``: what an evaluation of an adapter finds besides the loss;
    ``record(step)``: what else metrics.jsonl says of the step just made, counted from 1;
    ``conclude``: what is done once with the values that the run ends with, before its files are
    written; ``unreached()``: of what trains, the targets that a gradient of the step just made
    could not have reached, since no supervised token went through them (an expert that got none).
    """

    task: Task
    models: Mapping[str, ScoringBackend] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    measure: Callable[[str], Mapping[str, float]] = lambda adapter: {}
    record: Callable[[int], Mapping[str, Any]] = lambda step: {}
    conclude: Callable[[], None] = lambda: None
    unreached: Callable[[], Mapping[str, Collection[str]]] = dict


@dataclass(frozen=True)
class TaskDefinition:
    """A task before there is one. ``build``: makes it; ``encoder``: what reads its rows;
    ``row_sets(run)``: what it reads besides the data group, by role; ``stream``: a job's
    micro-batches from its rows; ``samples``: rows of a job that are answered at its end, by the
    name of their group; ``gradient(runs)``: how a step's gradient is made, from the run that each job
    would be alone (None: it is that of the loss); ``over_start``: an adapter that the model has becomes a part of the
    frozen base, where other tasks go on training it; ``attach``: makes what trains, {name: the
    run it would be alone} (None: an adapter for each job); ``ends``: ids of which one has to be
    supervised in every sequence of a job (none where no answer is learnt to its end); ``beside``:
    other parameter sets that a job's sequences train (`PreparedJob.beside`).
    """

    build: Callable[[TaskInputs], BuiltTask]
    encoder: EncoderFactory = own_encoder
    row_sets: Callable[[RunConfig], Mapping[str, DataConfig]] = lambda run: {}
    stream: Callable[[RunConfig, PreparedData, Mapping[str, PreparedData]], BatchStream] = (
        own_stream
    )
    samples: Callable[[PreparedJob], Mapping[str, Batch]] = held_out_rows
    gradient: Callable[[Mapping[str, RunConfig]], GradientRule | None] = lambda runs: None
    over_start: bool = False
    attach: Callable[[RunConfig, OpenedModel, NoteCallback], dict[str, RunConfig]] | None = None
    ends: Callable[[PreparedJob], Collection[int]] = lambda job: job.data.ends
    beside: Callable[[RunConfig], Mapping[str, TrainConfig]] = lambda run: {}
