"""A model's results on named sets: options ranked by log-likelihood, other answers generated, every
metric with an interval.

result = evaluate_benchmark(model, encoder, benchmark, Mix.one("people"))
result.metrics["accuracy"].value, result.metrics["accuracy"].interval
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.backends.registry import open_scorer
from lorry.data.encoding.encode import ExampleEncoder
from lorry.evaluate.benchmarks.questions import Benchmark, BenchmarkQuestion
from lorry.evaluate.benchmarks.rank import (
    AnswerLikelihood,
    answer_fits,
    answer_likelihoods,
    truncate_prompt,
)
from lorry.evaluate.metrics.bootstrap import MetricEstimate, corpus_interval
from lorry.evaluate.metrics.calibration import measure_options
from lorry.evaluate.metrics.registry import measure_metrics
from lorry.generation.sampling import SamplingParams
from lorry.generation.scorer import ModelScorer
from lorry.generation.text import generate_continuations
from lorry.models.causal_lm import CausalLM

# between worked examples in plain text: behind it the model asks itself the next question
BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class BenchmarkResult:
    """One model's result on one set. ``rows``: per question where it stands, what was asked, what
    is right, what was said or chosen, and its value in every metric that has one; ``shortened``:
    prompts cut to the model's context; ``too_long``: right answers that it cannot hold, which the
    perplexity is without.
    """

    name: str
    metrics: dict[str, MetricEstimate]
    rows: list[dict[str, Any]] = field(repr=False)
    shortened: int = 0
    too_long: int = 0


def evaluate_benchmark(
    model: CausalLM, encoder: ExampleEncoder, benchmark: Benchmark, mix: Mix, *, max_new_tokens: int | None = None, batch_rows: int = 8,
    seed: int = 0, communicator: Communicator = ONE_PROCESS, **sampling: Any,
) -> BenchmarkResult:  # fmt: skip
    """Ask a model every question of a benchmark under a mix. ``sampling``: temperature, top_p, top_k;
    ``communicator``: the processes that do so together.

    Raises ModelError for a prompt that cannot be cut to the context, ConfigError or DataError for a
    metric not to be had.
    """
    # `Mix.none()` needs a bank, also of a base without adapters
    get_bank(model, create=True)
    # answers of one question, and worked examples before many, are run once
    scorer = open_scorer(model, communicator, share_prefixes=True)
    if benchmark.is_choice:
        return _evaluate_ranked(scorer, encoder, benchmark, mix, seed)
    new_tokens = max_new_tokens or benchmark.named_set.max_new_tokens
    return _evaluate_generated(
        scorer,
        encoder,
        benchmark,
        mix,
        seed,
        SamplingParams(max_new_tokens=new_tokens, seed=seed, **sampling),
        batch_rows,
    )


def _evaluate_ranked(
    scorer: ModelScorer, encoder: ExampleEncoder, benchmark: Benchmark, mix: Mix, seed: int
) -> BenchmarkResult:
    """accuracy: of the option with the highest mean log-likelihood per token; accuracy_sum: of the
    highest sum, whose softmax over the options also gives the calibration; perplexity: of the right
    options.
    """
    questions = benchmark.questions
    likelihoods = answer_likelihoods(
        scorer,
        encoder,
        [[q.conversation(option) for option in q.item.options] for q in questions],
        mix,
    )
    right = [q.item.right for q in questions]
    by_sum = measure_options(
        [[likelihood.total for likelihood in row] for row in likelihoods], right, seed
    )
    # the mean per token is lorry's "accuracy": a sum would favour short options
    by_mean = measure_options(
        [[likelihood.mean for likelihood in row] for row in likelihoods], right, seed
    )
    metrics = {"accuracy": by_mean["accuracy"], "accuracy_sum": by_sum["accuracy"]}
    metrics |= {name: by_sum[name] for name in ("ece", "brier", "confidence")}
    metrics["perplexity"] = measure_perplexity(
        [row[q.item.right[0]] for q, row in zip(questions, likelihoods, strict=True)], seed
    )
    rows = [
        {
            **_question_record(question),
            "options": list(question.item.options),
            "right": list(question.item.right),
            "loglikelihoods": [likelihood.total for likelihood in row],
            "tokens": [likelihood.tokens for likelihood in row],
            "answer": question.item.options[max(range(len(row)), key=lambda n: row[n].mean)],
        }
        for question, row in zip(questions, likelihoods, strict=True)
    ]
    return BenchmarkResult(
        benchmark.named_set.name,
        metrics,
        _with_values(rows, metrics),
        sum(any(likelihood.cut for likelihood in row) for row in likelihoods),
    )


def _evaluate_generated(
    scorer: ModelScorer,
    encoder: ExampleEncoder,
    benchmark: Benchmark,
    mix: Mix,
    seed: int,
    params: SamplingParams,
    batch_rows: int,
) -> BenchmarkResult:
    questions = benchmark.questions
    references, concepts, model = benchmark.references, benchmark.concepts, scorer.model
    # the answer needs its place in the context, too
    room = None if model.context is None else model.context - params.max_new_tokens
    # some answer has to stand there for the template to render a turn; it is cut off again
    prompts = [truncate_prompt(encoder, question.conversation("."), room) for question in questions]
    texts = generate_continuations(
        model,
        encoder,
        [ids for ids, _ in prompts],
        params,
        adapters=mix,
        batch_rows=batch_rows,
        generate=scorer.generate,
    )
    answers = [
        _strip_answer(text, question, encoder)
        for text, question in zip(texts, questions, strict=True)
    ]
    metrics = measure_metrics(
        benchmark.named_set.metrics, answers, references, concepts=concepts, seed=seed
    )
    right = [
        conversation
        for conversation in (question.conversation() for question in questions)
        if answer_fits(encoder, conversation)
    ]
    # closed: the perplexity is that of training, whose loss counts the end of turn
    forced = answer_likelihoods(
        scorer, encoder, [[conversation] for conversation in right], mix, closed=True
    )
    metrics["perplexity"] = measure_perplexity([row[0] for row in forced], seed)
    rows = [
        {**_question_record(q), "references": refs, "answer": text}
        for q, refs, text in zip(questions, references, answers, strict=True)
    ]
    cut, too_long = sum(count > 0 for _, count in prompts), len(questions) - len(right)
    return BenchmarkResult(
        benchmark.named_set.name, metrics, _with_values(rows, metrics), cut, too_long
    )


def _strip_answer(text: str, question: BenchmarkQuestion, encoder: ExampleEncoder) -> str:
    """An answer as it is compared: in plain text after worked examples it ends at the blank line."""
    return (
        text.lstrip().partition(BLANK_LINE)[0]
        if question.shots and not encoder.has_template
        else text
    ).strip()


def measure_perplexity(likelihoods: Sequence[AnswerLikelihood], seed: int = 0) -> MetricEstimate:
    """exp of the mean negative log-likelihood per token of all answers together, resampled by rows;
    NaN of none.
    """
    import numpy

    if not likelihoods:
        return MetricEstimate(math.nan, (math.nan, math.nan))
    table = numpy.array([[-likelihood.total, likelihood.tokens] for likelihood in likelihoods])
    # table [answers, 2]: negative log-likelihood, tokens
    value = float(numpy.exp(table[:, 0].sum() / table[:, 1].sum()))
    # no resampling of an infinity: every sample would be NaN or the same
    if not math.isfinite(value):
        return MetricEstimate(value, (value, value))
    return MetricEstimate(
        value, corpus_interval(table, lambda sums: numpy.exp(sums[:, 0] / sums[:, 1]), seed)
    )


def _question_record(question: BenchmarkQuestion) -> dict[str, Any]:
    return {
        "where": question.where,
        "prompt": question.item.prompt,
        "expected": question.item.answer,
        "shots": len(question.shots),
    }


def _with_values(
    rows: list[dict[str, Any]], metrics: Mapping[str, MetricEstimate]
) -> list[dict[str, Any]]:
    """Each row with its value in every metric that is a mean of rows."""
    columns = {name: metric.rows for name, metric in metrics.items() if metric.rows is not None}
    return [
        {**row, "scores": {name: values[at] for name, values in columns.items()}}
        for at, row in enumerate(rows)
    ]
