"""An unlearning run from its description to a task: its row sets, the start's own numbers, what an
evaluation measures.

`UNLEARN` is the definition that `tasks.registry` names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.backends.protocol import GradientRule
from lorry.config import RunConfig
from lorry.config.data import DataConfig
from lorry.config.unlearning.unlearn import NEED_ALTERNATES, UnlearnConfig, UnlearnRunConfig
from lorry.data.batch import Batch
from lorry.data.encoding.token_set import TokenSet
from lorry.data.prepare import PreparedData
from lorry.data.reading.content import TextDocument
from lorry.data.reading.formats import format_named, read_examples
from lorry.data.reading.sources import open_source
from lorry.data.stream.dataset import BatchStream, TrainStream
from lorry.data.stream.roles import Alternates, RoleStream
from lorry.errors import ConfigError, DataError
from lorry.formatting import format_count
from lorry.models.scoring.score import FinalHidden, TokenScore, log_prob
from lorry.tasks.build import USABLE, BuiltTask, PreparedJob, TaskDefinition, TaskInputs
from lorry.tasks.unlearn.alternates import (
    AlternatesFinder,
    alternates_of,
    read_alternates,
    read_refusals,
)
from lorry.tasks.unlearn.gradients import make_gradient_rule
from lorry.tasks.unlearn.methods.method import StartModel, UnlearnMethod
from lorry.tasks.unlearn.methods.registry import METHOD_CLASSES, make_method
from lorry.tasks.unlearn.pairing import FORGET, RETAIN
from lorry.tasks.unlearn.reference import CachedReference, LiveReference, ReferenceReader
from lorry.tasks.unlearn.task import UnlearnTask

# rows of each set that an evaluation in training looks at, evenly spaced
MEASURED_ROWS = 200
ANSWERED_ROWS = 4  # rows of each set that are answered at the end, before and after
MOST_VARIANTS = 20  # refusals of a row, one an epoch; from then on they come again
STOPPED = (
    "; training stops here (early_stop=collapse) and saves the adapter of the last "
    "evaluation above stop_below, if any"
)
PDU_MARGIN = 0.1  # nats above the start's retain loss that retain_loss_eps=auto allows


def _settings_of(run: RunConfig) -> UnlearnConfig:
    assert isinstance(run, UnlearnRunConfig)
    return run.unlearn


def unlearn_row_sets(run: RunConfig) -> dict[str, DataConfig]:
    """The rows that are kept, read as those to forget are. Where the loss has no part for them they
    are read all the same, to see what becomes of them.
    """
    retain = _settings_of(run).retain
    return {} if retain is None else {RETAIN: run.data.model_copy(update={"path": retain})}


def role_stream(
    run: RunConfig, data: PreparedData, sets: Mapping[str, PreparedData]
) -> BatchStream:
    """Rows to forget, a retained one beside each (or the other way round: ``anchor=retain``), and
    alternates where the method compares.
    """
    settings = _settings_of(run)
    read = {FORGET: data, **({RETAIN: sets[RETAIN]} if settings.retains and RETAIN in sets else {})}
    anchor = read.pop(settings.anchor).stream
    assert isinstance(anchor, TrainStream)
    beside = {role: _tokens(prepared) for role, prepared in read.items()}
    alternates = dict[str, Alternates]()
    if settings.method in NEED_ALTERNATES:
        # passes over the rows to forget, each of which draws again
        passes = run.train.num_train_epochs * len(anchor.tokens) / len(_tokens(data))
        variants = min(math.ceil(passes), MOST_VARIANTS)
        path = settings.alternates
        finder = None if path is None else AlternatesFinder(read_alternates(path))
        refusals = [] if finder is not None else read_refusals(settings.idk)
        wanted = {FORGET: (run.data, data)}
        if settings.retains and METHOD_CLASSES[settings.method].needs_retain_alternates:
            wanted[RETAIN] = (unlearn_row_sets(run)[RETAIN], sets[RETAIN])
        for role, (config, prepared) in wanted.items():
            alternates[role] = alternates_of(
                config,
                _tokens(prepared),
                prepared.encoder,
                finder=finder,
                refusals=refusals,
                seed=run.train.seed,
                variants=variants,
            )
    return RoleStream(
        anchor, settings.anchor, beside=beside, alternates=alternates, seed=run.train.seed
    )


def _tokens(prepared: PreparedData) -> TokenSet:
    assert prepared.tokens is not None  # the description refuses streaming
    return prepared.tokens


# (mean probability of an answer, mean token loss in nats) of the start, by the digest of a set and
# the rows of a batch: jobs that read the same ask once
StartMeasures = dict[tuple[str, int], tuple[float, float]]


class RetentionMonitor:
    """What an evaluation measures of a job: the probability of answers to forget and to retain, and
    how they stand to the start's. Says loudly when the model has collapsed.
    """

    def __init__(self, job: PreparedJob, inputs: TaskInputs, start: StartMeasures) -> None:
        self.backend, self.tell, self.of_start = inputs.backend, inputs.tell, start
        self.several = len(inputs.jobs) > 1
        settings = _settings_of(job.run)
        self.stop_below, self.stops = settings.stop_below, settings.early_stop == "collapse"
        sets = {FORGET: job.data, **job.row_sets}
        rows = job.run.train.per_device_eval_batch_size
        self.digests = {role: (data.digest, rows) for role, data in sets.items()}
        self.batches = {role: _spread_batches(_tokens(data), rows) for role, data in sets.items()}

    @cached_property
    def start(self) -> dict[str, tuple[float, float]]:
        """{role: (mean probability of an answer, mean token loss in nats)} of the start: asked
        before the first step, since base weights that train are the start no longer after it.
        """
        for role, batches in self.batches.items():
            if self.digests[role] not in self.of_start:
                self.of_start[self.digests[role]] = self._measure(batches, Mix.none())
        return {role: self.of_start[digest] for role, digest in self.digests.items()}

    def _measure(self, batches: Sequence[Batch], mix: Mix) -> tuple[float, float]:
        probabilities, nll, tokens = list[float](), 0.0, 0.0
        for batch in batches:
            scores = self.backend.score([batch], {"s": TokenScore(log_prob)}, mix)[0]["s"].double()
            sums = batch.sum_by_sequence(scores * batch.weights.double())
            counts = batch.sum_by_sequence(batch.weights.double())
            probabilities += torch.exp(sums / counts).tolist()
            nll, tokens = nll - float(sums.sum()), tokens + float(counts.sum())
        return sum(probabilities) / len(probabilities), nll / tokens

    def __call__(self, adapter: str) -> dict[str, float]:
        """{eval_forget_probability, eval_retain_probability, eval_retain_kept, eval_balance, ...}."""
        mix = self.backend.mix_of(adapter)
        now = {role: self._measure(batches, mix) for role, batches in self.batches.items()}
        values = {f"eval_{role}_probability": p for role, (p, _) in now.items()}
        values |= {f"eval_{role}_nll": nll for role, (_, nll) in now.items()}
        # more probable than at the start is not less than nothing forgotten
        forgotten = 1 - min(now[FORGET][0] / max(self.start[FORGET][0], 1e-12), 1.0)
        retained = 1.0
        if RETAIN in now:
            retained = now[RETAIN][0] / max(self.start[RETAIN][0], 1e-12)
            values["eval_retain_kept"] = retained
            collapsed = (
                not retained >= self.stop_below
            )  # a probability that is NaN has collapsed, too
            if self.stops:
                values[USABLE] = float(not collapsed)
            if collapsed:
                whose = f"{adapter}: " if self.several else ""
                self.tell(
                    (
                        f"COLLAPSE: {whose}answers of the retain set have {retained:.0%} of "
                        "their probability under the reference model "
                        f"(stop_below={self.stop_below:g}): the model is losing more "
                        "than the forget set. Lower learning_rate or gamma, or raise "
                        "alpha"
                    )
                    + (STOPPED if self.stops else "")
                )
        retained = min(retained, 1.0)
        values["eval_balance"] = (
            2 * forgotten * retained / (forgotten + retained) if forgotten + retained else 0.0
        )
        return values


def _spread_batches(tokens: TokenSet, rows: int) -> list[Batch]:
    """Batches of at most `MEASURED_ROWS` rows, evenly spaced over the set."""
    count = min(len(tokens), MEASURED_ROWS)
    chosen = np.linspace(0, len(tokens) - 1, count).astype(np.int64)
    return tokens.select(chosen).eval_batches(rows)


def build_unlearn(inputs: TaskInputs) -> BuiltTask:
    """The task. Raises ConfigError, DataError."""
    model, jobs = inputs.opened.model, inputs.jobs
    measured = StartMeasures()
    monitors = {name: RetentionMonitor(job, inputs, measured) for name, job in jobs.items()}
    notes = list[str]()
    for name, job in jobs.items():
        notes += check_overlap(job)
        if isinstance(job.stream, RoleStream):
            notes += [
                (
                    f"{other.tokens.report.shortened} alternates of the {role} set make "
                    "their rows longer than max_length: the prompt is cut at its "
                    "start, so that they answer a question that is not complete; raise "
                    "max_length"
                )
                for role, other in job.stream.alternates.items()
                if other.tokens.report.shortened
            ]
        whose = f"{name}: " if len(jobs) > 1 else ""
        notes += [whose + _start_note(role, *seen) for role, seen in monitors[name].start.items()]
    bank = get_bank(model, create=True)
    if bank.start is not None:
        notes.append(
            f"the adapter of {bank.start.path} is frozen and counts as part of the base model"
        )
    config = _settings_of(inputs.run)
    own = [_method_settings(job, monitors[name]) for name, job in jobs.items()]
    start = StartModel(
        _width(inputs),
        [job.run.train.seed for job in jobs.values()],
        lambda hidden: model.logits(hidden, AdapterContext(Mix.none())),
    )
    direction_only = config.gradient == "gru"
    method = make_method(config.method, own, start, direction_only=direction_only)
    layers = model.config.get("num_hidden_layers", model.config.get("n_layer"))
    for job in jobs.values():
        layer = _settings_of(job.run).layer
        if _settings_of(job.run).reads_layer and layers and layer is not None and layer >= layers:
            raise ConfigError(
                f"unlearn.layer={layer}: the model has {layers} layers, 0 to {layers - 1}"
            )
    reference: ReferenceReader = LiveReference(Mix.none())
    if config.reference == "cached":
        reference = _read_reference(inputs, method)
    task = UnlearnTask(
        inputs.stream,
        [],
        inputs.total,
        list(jobs),
        method=method,
        reference=reference,
        models={"self": inputs.backend},
        epoch_of={name: job.stream.epoch_of for name, job in jobs.items()},
        split=config.gradient != "plain",
    )
    digests = {
        role if len(jobs) == 1 else f"{name}/{role}": data.digest
        for name, job in jobs.items()
        for role, data in job.row_sets.items()
    }
    if bank.start is not None:
        digests["start"] = bank.start.sha256
    return BuiltTask(task, {}, digests, notes, lambda name: monitors[name](name))


def _start_note(role: str, probability: float, nll: float) -> str:
    return (
        f"reference model on the {role} set: probability of an answer "
        f"{probability:.3f}, {nll:.3f} nats per token"
    )


def _width(inputs: TaskInputs) -> int:
    config, embedding = inputs.opened.model.config, inputs.opened.model.get_input_embeddings()
    known = config.get("hidden_size") or config.get("n_embd")
    if known is None and embedding is not None:
        known = embedding.get_parameter("weight").shape[1]
    if known is None:
        raise ConfigError("the model's config has no hidden_size, which this method needs")
    return int(known)


def _method_settings(job: PreparedJob, monitor: RetentionMonitor) -> dict[str, object]:
    """The method's own settings, ``auto`` made a number."""
    config = _settings_of(job.run)
    own = config.settings()
    if own.get("retain_loss_eps") == "auto":
        if own["retain_loss"] == "EMBED":
            raise ConfigError(
                "unlearn.retain_loss_eps: auto needs a retain loss of the "
                "reference model, and the distance of hidden states starts at 0; "
                "give a number"
            )
        # KL to the start is 0 at the start
        at_start = monitor.start[RETAIN][1] if own["retain_loss"] == "NLL" else 0.0
        own["retain_loss_eps"] = at_start + PDU_MARGIN
    return own


def check_overlap(job: PreparedJob) -> list[str]:
    """Raise DataError where a row to forget is also a row to retain: no model can do both. Returns a
    note where only the question is the same, with another answer.
    """
    if RETAIN not in job.row_sets:
        return []
    forget, retain = _tokens(job.data), _tokens(job.row_sets[RETAIN])
    check_shared_texts(job.run)
    pairs = {whole: _same_rows(forget, retain, whole) for whole in (True, False)}
    if both := pairs[True]:
        raise DataError(
            f"{both[0][0]} in the forget set and {both[0][1]} in the retain set are the same row "
            f"({format_count(len(both), 'row')} in all); remove them from one of the two"
        )
    if same := pairs[False]:
        return [
            (
                f"{format_count(len(same), 'row')} of the forget set "
                f"{'has' if len(same) == 1 else 'have'} the question of a retain row, with "
                f"another answer (the first: {same[0][0]} and {same[0][1]}); if both "
                "answers mean the same, the run forgets and retains the same fact"
            )
        ]
    return []


def check_shared_texts(run: RunConfig) -> None:
    """The same of texts that are read as one, whose sequences begin anywhere in them: raise DataError
    where a text to forget is also one to retain.
    """
    sets = {FORGET: run.data, **unlearn_row_sets(run)}
    # what is wrong with its rows was said when the tokens were read
    sources = {
        role: open_source(
            data.path or [],
            name=data.name,
            split=data.split,
            on_bad_row="skip",
            limit=data.n,
            local=data.local,
        )
        for role, data in sets.items()
    }
    if not any(source.joined for source in sources.values()):
        return
    form = format_named(run.data.format, run.data.text_field)
    # {text: its place} of each set
    texts = {
        role: {
            row.content.text.strip(): row.where
            for row in read_examples(source, form)
            if isinstance(row.content, TextDocument)
        }
        for role, source in sources.items()
    }
    both = [text for text in texts[FORGET] if text in texts[RETAIN]]
    if both:
        raise DataError(
            f"{texts[FORGET][both[0]]} in the forget set and "
            f"{texts[RETAIN][both[0]]} in the retain set are the same text "
            f"({format_count(len(both), 'text')} in all); remove them from one of the two"
        )


def _same_rows(forget: TokenSet, retain: TokenSet, whole: bool) -> list[tuple[str, str]]:
    """(place of a row to forget, place of the retained row) that are alike, in all or in what is
    asked.
    """
    retain_rows = {_sequence(retain, row, whole): retain.where[row] for row in range(len(retain))}
    retain_rows.pop(b"", None)  # plain text asks nothing
    return [
        (forget.where[row], retain_rows[key])
        for row in range(len(forget))
        if (key := _sequence(forget, row, whole)) in retain_rows
    ]


def _sequence(tokens: TokenSet, row: int, whole: bool) -> bytes:
    """A row's tokens and weights as a key; not ``whole``: its tokens before the first that is
    learnt, and nothing of plain text, where that is the first but one."""
    span = slice(tokens.edges[row], tokens.edges[row + 1])
    if whole:
        return tokens.tokens[span].tobytes() + tokens.weights[span].tobytes()
    prompt_end = int(np.argmax(tokens.weights[span] != 0))
    return tokens.tokens[span][:prompt_end].tobytes() if prompt_end > 1 else b""


def _read_reference(inputs: TaskInputs, method: UnlearnMethod) -> CachedReference:
    """What the start says of every row that the run will read, before anything trains."""
    reference = CachedReference(Mix.none())
    # every step, not every row once: alternates are drawn anew in each epoch
    for step in range(inputs.total):
        for batch in inputs.stream.batches(step):
            ready = method.prepare(batch)
            wants = method.reference_wants(ready)
            if not wants:
                return reference
            if inputs.run.lora is None and any(isinstance(w, FinalHidden) for w in wants.values()):
                raise ConfigError(
                    f"unlearn.method={_settings_of(inputs.run).method} needs the "
                    "reference model's logits, and with lora=null the output head "
                    "may be trained; use an adapter, or retain_loss=NLL"
                )
            if reference.lacks(ready):
                reference.read(ready, wants, inputs.backend)
    return reference


def answered_rows(job: PreparedJob) -> dict[str, Batch]:
    """The first rows of each set."""
    sets = {FORGET: job.data, **job.row_sets}
    first = {role: _tokens(data) for role, data in sets.items()}
    return {
        f"{role} set": tokens.select(np.arange(min(len(tokens), ANSWERED_ROWS))).eval_batches(
            ANSWERED_ROWS
        )[0]
        for role, tokens in first.items()
    }


def gradient_rule(runs: Mapping[str, RunConfig]) -> GradientRule | None:
    """That of `unlearn.gradient`, which is the same for all jobs."""
    settings = {name: _settings_of(run) for name, run in runs.items()}
    radius = {name: own.sam_rho for name, own in settings.items() if own.sam_rho is not None}
    return make_gradient_rule(next(iter(settings.values())).gradient, radius)


UNLEARN = TaskDefinition(
    build_unlearn,
    row_sets=unlearn_row_sets,
    stream=role_stream,
    samples=answered_rows,
    gradient=gradient_rule,
    over_start=True,
)
