"""Evaluate a model on the rows of a file: their loss through the same scores as training, and
greedy answers to their questions.

rows = EvalRows.read(open_source("test.jsonl"), ExampleEncoder(tokenizer, max_length=1024))
base, tuned = (evaluate_rows(model, rows, mix) for mix in (Mix.none(), Mix.one("people")))
tuned.metrics       # {"loss": 0.1, "perplexity": 1.1, "token_accuracy": 0.97, "exact_match": 0.8, ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.backends.protocol import ScoringBackend
from lorry.backends.registry import open_scorer
from lorry.data.encoding.chat_template.template import TemplateRefusedError
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.encoding.token_set import TokenSet, encode_rows, report_progress
from lorry.data.reading.content import Conversation
from lorry.data.reading.formats import DataExample, RowFormat, read_examples
from lorry.data.reading.sources import DataSource
from lorry.errors import DataError
from lorry.evaluate.answers import (
    generate_answers,
    metric_intervals,
    metric_means,
    reference_answer,
    score_answer_rows,
)
from lorry.evaluate.metrics.registry import corpus_perplexity
from lorry.formatting import format_count
from lorry.models.causal_lm import CausalLM
from lorry.models.scoring.score import TokenScore, correct, log_prob


@dataclass(frozen=True)
class EvalRow:
    """A row: where it stands, what it holds, what it asks last, and every answer that is right; ""
    and none for plain text.
    """

    where: str
    content: Any
    question: str = ""
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class TeacherForcedScore:
    """Teacher forcing on some tokens: summed negative log-likelihood in nats, weight, supervised
    tokens, those guessed right.
    """

    nll: float = 0.0
    weight: float = 0.0
    tokens: int = 0
    right: int = 0

    def __add__(self, other: TeacherForcedScore) -> TeacherForcedScore:
        return TeacherForcedScore(
            self.nll + other.nll,
            self.weight + other.weight,
            self.tokens + other.tokens,
            self.right + other.right,
        )

    def metrics(self) -> dict[str, float]:
        """Mean loss per unit of weight, its exponential, and the share of supervised tokens that
        were the likeliest.
        """
        loss = {
            "loss": self.nll / self.weight,
            "perplexity": corpus_perplexity(self.nll, self.weight),
        }
        return {**loss, "token_accuracy": self.right / self.tokens}


@dataclass(frozen=True)
class EvaluationResult:
    """One model's result. ``metrics``: over all rows; ``intervals``: 95%, of those that are
    means of rows; ``teacher_forced``: by row; ``answers`` and ``scores``: by row number, for the rows that
    were asked.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    teacher_forced: list[TeacherForcedScore]
    answers: dict[int, str] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalRows:
    """The usable rows of a file, their sequences (a long text makes several), and whose row each
    sequence is.
    """

    rows: list[EvalRow]
    tokens: TokenSet
    owners: list[int]
    encoder: ExampleEncoder

    @classmethod
    def read(
        cls, source: DataSource, encoder: ExampleEncoder, form: RowFormat | None = None
    ) -> EvalRows:
        """Read and encode a whole source. Raises DataError for a bad row (by the source's policy)
        or when no row is left.
        """
        notes: set[str] = set()
        encoded = encode_rows(read_examples(source, form, add_note=notes.add), source, encoder)
        encoded_rows = list(report_progress(encoded, source.label, encoder.tell))
        tokens = TokenSet.of(encoded_rows, source, encoder, notes)
        if not encoded_rows:
            raise DataError(
                f"{source.label}: no usable row; {source.bad.summary() or 'the data is empty'}"
            )
        # [sequences]: a long text is cut into several pieces, which are one row of the results
        owners = [number for number, (_, pieces) in enumerate(encoded_rows) for _ in pieces]
        return cls(
            [_eval_row(example, encoder) for example, _ in encoded_rows], tokens, owners, encoder
        )

    def askable(self, context: int | None, max_new_tokens: int) -> tuple[list[int], list[str]]:
        """(numbers of the rows with a question whose answer fits the model's context, a note for
        each kind left out).
        """
        askable_rows, too_long, refused = [], 0, 0
        for number, row in enumerate(self.rows):
            if not isinstance(row.content, Conversation):
                continue
            try:
                fits = (
                    context is None
                    # left out rather than cut: an answer to half a question would count as wrong
                    or len(self.encoder.prompt(row.content)) + max_new_tokens <= context
                )
            except TemplateRefusedError:
                refused += 1
                continue
            askable_rows += [number] if fits else []
            too_long += not fits
        notes = [
            (
                f"{format_count(too_long, 'row')} not generated: prompt and "
                f"{max_new_tokens} new tokens exceed the context of {context}"
            )
        ] * (too_long > 0)
        return askable_rows, notes + [
            (
                f"{format_count(refused, 'row')} not generated: the chat template does "
                "not render their prompt"
            )
        ] * (refused > 0)


def _eval_row(example: DataExample, encoder: ExampleEncoder) -> EvalRow:
    if not isinstance(example.content, Conversation):
        return EvalRow(example.where, example.content)
    # the last turn that is learnt, which need not be the last turn
    messages, learnt = example.content.messages, reference_answer(example.content)
    last = max(
        number
        for number, message in enumerate(messages)
        if message.role == "assistant" and message.learnt
    )
    # only the last turn is asked; what stands before it is its context
    question = messages[last - 1].content if last else ""
    return EvalRow(
        example.where,
        example.content,
        question,
        tuple(
            _strip_end_of_turn(text, encoder)
            for text in _acceptable_answers(example.values, learnt)
        ),
    )


def _acceptable_answers(values: Mapping[str, Any], learnt: str) -> list[str]:
    """Every acceptable answer of a row whose column ``generate_answers`` lists several, as SQuAD
    does, the learnt one among them.
    """
    listed = values.get("answers")
    listed = listed.get("text") if isinstance(listed, Mapping) else listed
    texts = (
        [text for text in listed if isinstance(text, str)] if isinstance(listed, Sequence) else []
    )
    # a column of that name that lacks the learnt answer means something else
    return texts if not isinstance(listed, str) and learnt in texts else [learnt]


def _strip_end_of_turn(text: str, encoder: ExampleEncoder) -> str:
    """Without an end of turn that the data wrote out; an answer is decoded without it, too."""
    # in this order: EOS may stand behind the end of turn, and both may be the same text
    for end in (encoder.template.end_of_turn, encoder.tokenizer.eos_token):
        text = text.rstrip().removesuffix(end) if end else text
    return text


def score_teacher_forced(
    scorer: ScoringBackend, rows: EvalRows, mix: Mix, batch_rows: int
) -> list[TeacherForcedScore]:
    """Teacher forcing, a `TeacherForcedScore` per row."""
    scores = [TeacherForcedScore() for _ in rows.rows]
    owners = iter(rows.owners)
    for batch in rows.tokens.eval_batches(batch_rows):
        token_scores = scorer.score(
            [batch], {"logprob": TokenScore(log_prob), "correct": TokenScore(correct)}, mix
        )[0]
        supervised = (batch.weights != 0).double()
        sums = (
            # float64: sums over long texts of values with seven digits
            batch.sum_by_sequence(-token_scores["logprob"].double() * batch.weights.double()),
            batch.sum_by_sequence(batch.weights.double()),
            batch.sum_by_sequence(supervised),
            batch.sum_by_sequence(token_scores["correct"].double() * supervised),
        )
        for nll, weight, tokens, right in zip(*(values.tolist() for values in sums), strict=True):
            # batches keep the order of the sequences, so owners are taken one after the other
            owner = next(owners)
            scores[owner] += TeacherForcedScore(nll, weight, int(tokens), int(right))
    return scores


def evaluate_rows(
    model: CausalLM,
    rows: EvalRows,
    mix: Mix,
    *,
    answer_rows: Sequence[int] = (),
    max_new_tokens: int = 64,
    batch_rows: int = 8,
    communicator: Communicator = ONE_PROCESS,
) -> EvaluationResult:
    """Loss, perplexity and token accuracy of all rows under a mix; exact match, ROUGE-L and F1 of
    answers to ``answer_rows``. ``communicator``: the processes that do so together.

    Raises NonFiniteError or ModelError from the model.
    """
    # a base without adapters answers under Mix.none() too, which needs a bank
    get_bank(model, create=True)
    scorer = open_scorer(model, communicator)
    teacher_forced = score_teacher_forced(scorer, rows, mix, batch_rows)
    # sums first, one quotient at the end: a mean of rows' means would favour short rows
    metrics = sum(teacher_forced, TeacherForcedScore()).metrics()
    if not answer_rows:
        return EvaluationResult(metrics, {}, teacher_forced)
    conversations = [rows.rows[number].content for number in answer_rows]
    answers = generate_answers(
        model,
        rows.encoder.tokenizer,
        conversations,
        adapters=mix,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        system=rows.encoder.system,
        generate=scorer.generate,
    )
    scores = score_answer_rows(answers, [rows.rows[number].references for number in answer_rows])
    by_row = {
        number: {name: values[at] for name, values in scores.items()}
        for at, number in enumerate(answer_rows)
    }
    return EvaluationResult(
        metrics | metric_means(scores),
        metric_intervals(scores),
        teacher_forced,
        dict(zip(answer_rows, answers, strict=True)),
        by_row,
    )
