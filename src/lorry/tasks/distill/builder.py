"""A distillation from its description to a task: who the teacher is, what it reads, whether it is
asked live or from a cache.

`DISTILL` is the definition that `tasks.registry` names: `make_encoder_factory` before the rows are
read, since a teacher of another tokenizer reads them too; `build_distill` afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from lorry.backends.protocol import ScoringBackend
from lorry.config import DistillConfig, DistillRunConfig, RunConfig
from lorry.data.batch import Batch
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.prepare import PreparedData
from lorry.errors import ConfigError
from lorry.models.loading.open import OpenedModel
from lorry.notes import NoteCallback
from lorry.tasks.build import BuiltTask, TaskDefinition, TaskInputs, own_encoder
from lorry.tasks.distill import cache
from lorry.tasks.distill.align import PairedEncoder, require_same_tokenizer, sequence_digest
from lorry.tasks.distill.task import (
    DistillObjective,
    DistillTask,
    DistillTeacher,
    LiveTeacher,
    TeacherReader,
)
from lorry.tasks.distill.teacher import TeacherLocation, TeacherScorer, open_teacher

TEACHER_PASS_ROWS = 8  # rows the teacher reads at a time when a cache is written
# what a teacher's tokenizer may make of max_length tokens of the student's
TEACHER_LENGTH_FACTOR = 2


def distill_objective_of(config: DistillConfig) -> DistillObjective:
    """The two terms and their weights from the settings."""
    return DistillObjective(
        config.loss, config.temperature, config.beta, 1 - config.alpha, config.alpha
    )


def make_encoder_factory(
    run: RunConfig, opened: OpenedModel, add_note: NoteCallback
) -> Callable[..., ExampleEncoder]:
    """What makes the encoder of a distillation: `ExampleEncoder`, or one that has a teacher with
    another tokenizer read the rows as well.

    A token that the model, or the teacher that reads it, has no embedding of makes a bad row.
    Raises ConfigError when the tokenizers differ and the loss compares tokens by their ids.
    """
    own_factory = own_encoder(run, opened, add_note)
    assert isinstance(run, DistillRunConfig)
    place = _locate_teacher(run, opened, add_note)
    # the student's own base reads the very tokens that the student does
    if place.shared:
        return own_factory
    teacher_tokenizer = place.tokenizer(add_note)
    try:
        require_same_tokenizer(opened.tokenizer, teacher_tokenizer, str(place.place.directory))
    except ConfigError:
        if run.distill.loss != "uld":
            raise
        # supervised runs are matched one by one, so both sides must supervise the same turns
        completion_only = (
            True if run.data.completion_only_loss is None else run.data.completion_only_loss
        )
        teacher_encoder = ExampleEncoder(
            teacher_tokenizer,
            max_length=TEACHER_LENGTH_FACTOR * run.data.max_length,
            completion_only_loss=completion_only,
            system=run.data.system,
            embeddings=place.vocab_size(),
        )
        return partial(PairedEncoder, theirs=teacher_encoder, embeddings=opened.model.vocab_size)
    ours = opened.model.vocab_size
    # equal tokenizers, tables of different length: a token must have a row in both
    return partial(ExampleEncoder, embeddings=min(ours, place.vocab_size() or ours))


def build_distill(inputs: TaskInputs) -> BuiltTask:
    """The task, and the frozen models it scores with. Raises ConfigError, ModelError."""
    run = inputs.run
    assert isinstance(run, DistillRunConfig)
    notes: list[str] = []
    # a distillation has one job: the config refuses `jobs` for it
    (adapter, job), aim = next(iter(inputs.jobs.items())), distill_objective_of(run.distill)
    prepared = job.data
    place = _locate_teacher(run, inputs.opened, notes.append)
    if run.output_dir.resolve() in {
        p.resolve() for p in (place.place.directory, place.adapter) if p is not None
    }:
        raise ConfigError(
            f"{run.output_dir} holds the teacher, which this run would move away; "
            "give another output_dir"
        )
    # part of the digest, since the dtype changes what the teacher says
    dtype = str(inputs.opened.source["dtype"]) if place.shared else run.distill.teacher_dtype
    digest = place.digest(run.distill, dtype)
    models: dict[str, ScoringBackend] = {}
    if run.distill.cache is None:
        scorer = models["teacher"] = open_teacher(
            place, run.distill, inputs.opened, notes.append, inputs.open_model
        )
        reader, columns = (
            _teacher_reader(prepared, scorer),
            _teacher_columns(run.distill, inputs.opened),
        )
        _require_columns(run.distill, scorer, columns)
        teacher: DistillTeacher = LiveTeacher(
            aim,
            scorer.head(aim.temperature, columns),
            reader,
            _top_k_count(run.distill, scorer, columns),
        )
        notes += _missing(
            inputs, prepared, lambda tokens, weights: reader.view(tokens, weights) is not None
        )
    else:
        teacher = cached = _open_cached_teacher(
            inputs, run.distill, prepared, place, aim, digest, notes.append
        )
        notes += _missing(
            inputs,
            prepared,
            lambda tokens, weights: sequence_digest(tokens, weights) in cached.known,
        )
    scorers = {"self": inputs.backend, **models}
    task = DistillTask(
        inputs.stream,
        inputs.held,
        inputs.total,
        [adapter],
        aim=aim,
        teacher=teacher,
        models=scorers,
    )
    return BuiltTask(task, models, {"teacher": digest}, notes)


def _locate_teacher(
    run: DistillRunConfig, opened: OpenedModel, add_note: NoteCallback
) -> TeacherLocation:
    return TeacherLocation.of(
        run.distill, opened, shareable=run.lora is not None, add_note=add_note
    )


def _teacher_reader(prepared: PreparedData, scorer: TeacherScorer) -> TeacherReader:
    views = prepared.encoder.views if isinstance(prepared.encoder, PairedEncoder) else None
    return TeacherReader(views, scorer.model.context, scorer.mix)


def _teacher_columns(config: DistillConfig, opened: OpenedModel) -> int | None:
    """How many of the teacher's logits count: those of the student's tokens, where tokens are
    compared by id (an embedding may be longer than its tokenizer); None: all of them."""
    if config.loss == "uld":
        return None
    return opened.model.vocab_size


def _require_columns(config: DistillConfig, teacher: TeacherScorer, columns: int | None) -> None:
    """Raises ConfigError when the teacher has fewer logits than are compared with all of it."""
    if columns is not None and teacher.vocab_size < columns and config.top_k is None:
        raise ConfigError(
            f"the teacher has {teacher.vocab_size} logits and the student "
            f"{columns}, though their tokenizers are equal; give distill.top_k=64, "
            "which compares only the teacher's likeliest tokens"
        )


def _top_k_count(config: DistillConfig, teacher: TeacherScorer, columns: int | None) -> int | None:
    """How many of the teacher's likeliest tokens are kept: never all of them, as in a cache, since
    the others count as one.
    """
    return (
        None
        if config.top_k is None
        else min(config.top_k, min(teacher.vocab_size, columns or teacher.vocab_size) - 1)
    )


def _open_cached_teacher(
    inputs: TaskInputs,
    config: DistillConfig,
    prepared: PreparedData,
    place: TeacherLocation,
    aim: DistillObjective,
    digest: str,
    add_note: NoteCallback,
) -> cache.CachedTeacher:
    """The teacher from disk; it is opened, and forgotten again, only where the cache is not there
    yet.
    """
    assert config.cache is not None
    assert config.top_k is not None
    columns = _teacher_columns(config, inputs.opened)
    facts = cache.teacher_cache_facts(_all_batches(inputs, prepared), digest, config.top_k, columns)
    folder = cache.teacher_cache_folder(Path(config.cache), facts)
    # the name has the digests of data and teacher in it: there, it is the same answers
    if not folder.exists():
        scorer = open_teacher(place, config, inputs.opened, add_note, inputs.open_model)
        # at temperature 1: what is stored serves any temperature
        head = scorer.head(1.0, columns)
        cache.write_teacher_cache(
            folder,
            _all_batches(inputs, prepared),
            _teacher_reader(prepared, scorer),
            scorer,
            head,
            facts,
        )
    cached = cache.CachedTeacher(folder, facts, aim)
    size = cached.facts["bytes"] / 2**20
    add_note(f"the teacher is read from {folder}: {cached.facts['tokens']} tokens, {size:.1f} MiB")
    return cached


def _all_batches(inputs: TaskInputs, prepared: PreparedData) -> Iterator[Batch]:
    """Everything the run reads, once: the training rows in file order, then those held out."""
    if prepared.tokens is None:
        raise ConfigError("distill.cache does not work with streaming; leave data.streaming out")
    yield from prepared.tokens.eval_batches(TEACHER_PASS_ROWS)
    yield from inputs.held


def _missing(
    inputs: TaskInputs,
    prepared: PreparedData,
    speaks: Callable[[Sequence[int], Sequence[float]], bool],
) -> list[str]:
    """A note of how many sequences the teacher has nothing to say of: they carry the data's own
    loss only.
    """
    if prepared.tokens is None:
        return []
    # asked of every sequence and not by counting views: the teacher's context leaves some out
    has_teacher = [
        speaks(batch.tokens[start:stop].tolist(), batch.weights[start:stop].tolist())
        for batch in _all_batches(inputs, prepared)
        for start, stop in batch.segments
    ]
    if not (missing := has_teacher.count(False)):
        return []
    return [
        (
            f"{missing} of {len(has_teacher)} sequences are too long for the teacher, "
            "or its chat template renders other turns: they are trained on the data's "
            "answers alone"
        )
    ]


DISTILL = TaskDefinition(build_distill, encoder=make_encoder_factory)
