"""Scores of given answers token by token, through training's own packed pass, and answers generated:
all that a suite asks of a model.

Nothing here holds `[T, vocab]`: mean and variance of log p under p, which Min-K%++ needs, are
statistics of the softmax that the scorer folds tile by tile.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import get_bank
from lorry.adapters.mix import AdapterContext, Mix, MixtureRouter
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.tensor_parallel.slices import SIDES
from lorry.adapters.trainable import base_parameter_set
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.backends.registry import open_scorer
from lorry.data.batch import BASE, TokenizedExample, collate
from lorry.data.encoding.encode import ExampleEncoder
from lorry.data.reading.bad_rows import BadRow
from lorry.data.reading.content import ChatMessage, Conversation
from lorry.errors import ConfigError, ContractError, DataError, NonFiniteError
from lorry.evaluate.benchmarks.likelihood import loglikelihoods
from lorry.evaluate.benchmarks.until import cut_at_stops
from lorry.evaluate.metrics.memorization import mean_loss
from lorry.evaluate.unlearning.rows import CHOICES, SuiteRow, SuiteSet
from lorry.generation.engine import evaluation_mode
from lorry.generation.sampling import SamplingParams
from lorry.generation.scorer import ModelScorer
from lorry.generation.text import IncrementalDetokenizer
from lorry.models.causal_lm import CausalLM
from lorry.models.scoring.score import TokenScore, Want, correct, evaluate_wants, log_prob
from lorry.models.scoring.vocab import VocabStatistic
from lorry.models.shared_prefixes import split_into_passes

SUITE_BATCH_TOKENS = 2048  # tokens that a pass runs, unless a single sequence is longer
LOSS_WANTS: dict[str, Want] = {"log_prob": TokenScore(log_prob), "correct": TokenScore(correct)}
MOMENT_WANTS: dict[str, Want] = {
    "mean": TokenScore(VocabStatistic(lambda p, rows: p.mean, moments=True)),
    "variance": TokenScore(VocabStatistic(lambda p, rows: p.variance, moments=True)),
}


@dataclass(frozen=True)
class AnswerScores:
    """Of one answer under teacher forcing, a value per supervised token, its end of turn last:
    log-probability, whether it was the likeliest token, mean and variance of log p under p (empty
    unless asked for). ``closing``: how many of the tokens are the end of turn.
    """

    log_probs: list[float]
    correct: list[bool]
    closing: int
    means: list[float]
    variances: list[float]

    @property
    def loss(self) -> float:
        """Mean over all tokens, the end of turn counted, nats."""
        return mean_loss(self.log_probs)

    @property
    def answer(self) -> slice:
        """The tokens that are not the end of turn; what EM, ES, Min-K and Min-K++ look at."""
        return slice(0, len(self.log_probs) - self.closing)


@dataclass(frozen=True)
class GeneratedAnswer:
    """What was said: the text, stripped, and its tokens without the end of turn."""

    text: str
    tokens: list[int]


class SuiteModel:
    """A model under a mix, asked the rows of a suite; what was asked once is kept.

    ``start``: the mix of what unlearning began from, for its perplexity of answers; None where
    there is no other. ``limit``: rows that are answered by generation; scores are always of all.
    ``max_new_tokens`` of an answer; None: as the suite has it; ``communicator``: the processes that
    ask it together.
    """

    def __init__(
        self,
        model: CausalLM,
        encoder: ExampleEncoder,
        sets: dict[str, SuiteSet],
        mix: Mix,
        *,
        start: Mix | None = None,
        max_new_tokens: int | None = None,
        limit: int | None = None,
        batch_rows: int = 8,
        moments: bool = False,
        communicator: Communicator = ONE_PROCESS,
    ) -> None:
        get_bank(model, create=True)
        self.communicator = communicator
        self.scorer = open_scorer(model, communicator, share_prefixes=True)
        self.model, self.encoder, self.sets, self.mix, self.start = model, encoder, sets, mix, start
        self.max_new_tokens, self.limit, self.batch_rows = max_new_tokens, limit, batch_rows
        self.moments = moments
        self._expected: Mapping[str, Sequence[str]] = {}
        self._expected_answers: Collection[str] = ()
        self._answers: dict[tuple[str, str], list[list[AnswerScores]]] = {}
        self._generated: dict[str, list[GeneratedAnswer]] = {}

    def digest(self) -> str:
        """SHA-256 of all that decides what the model says: base, adapters, router, dtype, tokenizer,
        chat template. Raises ContractError for a router that is no `MixtureRouter`: what it is made
        of is not known.
        """
        bank, total = get_bank(self.model), hashlib.sha256(base_digest(self.model).encode())
        parts = [str(self.model.dtype), self.encoder.identity()]
        terms = [(adapter, 1.0) for adapter in bank.base_adapters.values()]
        terms += [(bank[term.adapter], float(term.gate)) for term in self.mix.terms]
        if self.mix.sequence_router is not None:  # a LoRA of its own, which reads the prompts
            own = self.mix.sequence_router.state_mix.terms
            terms += [(bank[term.adapter], float(term.gate)) for term in own]
        for adapter, gate in terms:
            whole = adapter.whole_factors()
            # by module, not by the settings that chose them: read back from PEFT's files, "auto" is a
            # list of names, and an adapter that trains is to be known again when it is finished
            for path, slot in sorted(adapter.slots.items()):
                parts.append(f"{gate} {path} {slot.scale}")
                for side in SIDES:
                    matrix = whole[f"{path}.lora_{side}"]
                    total.update(matrix.detach().cpu().contiguous().numpy().tobytes())
            for key in sorted(adapter.further):
                parts.append(key)
                total.update(whole[key].detach().cpu().contiguous().numpy().tobytes())
        router = self.mix.router or self.mix.sequence_router
        if router is not None:
            # the experts alone say nothing of who is asked; and a rule that is not known here could
            # change without the digest
            if not isinstance(router, MixtureRouter):
                raise ContractError(f"a suite knows no digest of a {type(router).__name__}")
            # how it was made is for a person, and decides nothing
            rule = {name: v for name, v in router.settings().items() if name != "training"}
            routes = [(term.adapter, term.route) for term in self.mix.terms]
            parts.append(
                f"{router.router_kind} {list(router.adapters)} {sorted(rule.items())} {routes}"
            )
            for name, tensor in sorted(router.tensors().items()):
                parts.append(f"{name} {tuple(tensor.shape)}")
                total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        # the base's digest is of a sample, rounded, which a few small steps leave as it is
        if (trained := base_parameter_set(self.model)) is not None:
            for values in trained.whole_tensors(trained.values).values():
                total.update(values.detach().cpu().contiguous().numpy().tobytes())
        total.update("\n".join(parts).encode())
        return total.hexdigest()

    def expect(self, fields: Mapping[str, Sequence[str]], generated: Collection[str] = ()) -> None:
        """Say what will be asked. {role: ``fields``}: those of a role are scored together at the
        first question, so that the answers to a row share one pass over its question; the roles of
        ``generated`` are answered together, so that each token's pass over the weights serves more rows.
        """
        self._expected, self._expected_answers = fields, generated

    def answers(self, role: str, field: str) -> list[list[AnswerScores]]:
        """Per row the scores of each of its answers in a field."""
        if (role, field) not in self._answers:
            rows = self.sets[role].rows
            fields = [
                name
                for name in dict.fromkeys((field, *self._expected.get(role, ())))
                if (role, name) not in self._answers
            ]
            pairs = [(row, text) for name in fields for row in rows for text in row.answers[name]]
            first = self.sets[role].answer_tokens
            scores = iter(self.score(pairs, self.mix, moments=self.moments, answer_tokens=first))
            for name in fields:
                self._answers[role, name] = [
                    [next(scores) for _ in row.answers[name]] for row in rows
                ]
        return self._answers[role, field]

    def score(
        self,
        pairs: Sequence[tuple[SuiteRow, str]],
        mix: Mix,
        *,
        moments: bool = False,
        answer_tokens: int | None = None,
    ) -> list[AnswerScores]:
        """Scores of (row, answer) pairs; ``answer_tokens``: as in `SuiteSet`. Raises DataError for one that cannot be encoded or does not
        fit the context, NonFiniteError.
        """
        with evaluation_mode(self.model):
            return score_answer_tokens(
                self.scorer, self.encoder, pairs, mix, moments=moments, answer_tokens=answer_tokens
            )

    def gradient_norms(self, role: str, field: str) -> list[list[float]]:
        """Per row, of its answer's mean loss without the end of turn, the gradient's L2 norm at each
        matrix of the adapters in the mix; no gradient that training holds is touched. Raises
        ConfigError for a mix without an adapter, otherwise as `score`.
        """
        bank = get_bank(self.model)
        adapters = [bank[term.adapter] for term in self.mix.terms]
        masters = [master for adapter in adapters for master in adapter.masters().values()]
        if not masters:
            raise ConfigError(
                "mia_gradnorm needs an adapter's gradients; evaluate a run with an "
                "adapter, or choose other metrics"
            )
        # those of an open mixture are frozen
        frozen = [master for master in masters if not master.requires_grad]
        for master in frozen:
            master.requires_grad_(True)
        try:
            return self._norms_of(adapters, role, field)
        finally:
            for master in frozen:
                master.requires_grad_(False)

    def _norms_of(self, adapters: Sequence[Adapter], role: str, field: str) -> list[list[float]]:
        """`gradient_norms` at these adapters, whose masters want gradients."""
        by_adapter = [list(adapter.masters().values()) for adapter in adapters]
        masters = [master for own in by_adapter for master in own]
        closings, call = closing_sequences(self.encoder), AdapterContext(self.mix)
        rows, norms = self.sets[role].rows, dict[int, list[float]]()
        for number in self.scorer.deal(len(rows)):
            row = rows[number]
            tokens, weights = lay_out_answer(self.encoder, row, row.answers[field][0])
            # one row at a time: the norm of a sum of rows says nothing of one of them
            length = len(tokens) - _closing_length(tokens, closings)
            example = TokenizedExample(tokens[:length], weights[:length], adapter=BASE)
            batch = collate([example]).to(self.model.device)
            with torch.enable_grad(), evaluation_mode(self.model):
                got = evaluate_wants(self.model, batch, {"log_prob": TokenScore(log_prob)}, call)
                loss = -got["log_prob"].sum() / batch.weights.sum()
                # not backward(): it would add to the flat buffer that an optimizer steps from
                with self.model.layer_weights.backward_pass():
                    gradients = torch.autograd.grad(loss, masters, allow_unused=True)
            rest = iter(gradients)
            norms[number] = [
                norm
                for adapter, own in zip(adapters, by_adapter, strict=True)
                for norm in adapter.master_norms([next(rest) for _ in own])
            ]
        return self.scorer.collect("gradient norms", norms)

    def generated(self, role: str) -> list[GeneratedAnswer]:
        """Greedy answers to a role's questions, of the first ``limit`` rows. Raises ModelError for a
        prompt that leaves no room in the context.
        """
        if role not in self._generated:
            roles = [
                name
                for name in dict.fromkeys((role, *self._expected_answers))
                if name not in self._generated
            ]
            sets = {name: self.sets[name] for name in roles}
            ends = self.encoder.stop_tokens()
            rows = [
                (row_set, row) for row_set in sets.values() for row in row_set.rows[: self.limit]
            ]
            params = [
                SamplingParams(
                    temperature=0.0,
                    max_new_tokens=self.max_new_tokens or row_set.new_tokens,
                    stop_token_ids=frozenset(ends),
                )
                for row_set, _ in rows
            ]
            completions = iter(
                self.scorer.generate(
                    [_prompt(self.encoder, row) for _, row in rows],
                    params,
                    adapters=self.mix,
                    batch_rows=self.batch_rows,
                )
            )
            for name, row_set in sets.items():
                self._generated[name] = [
                    _generated(self.encoder, next(completions).tokens, ends, row_set.stops)
                    for _ in row_set.rows[: self.limit]
                ]
        return self._generated[role]

    def gold(self, role: str, text: str) -> str:
        """What an answer is compared with: the text, or its first tokens."""
        first = self.sets[role].gold_tokens
        if first is None:
            return text
        ids = self.encoder.tokens.one(text).ids[:first]
        return str(self.encoder.tokenizer.decode(ids, skip_special_tokens=True))

    def choice_log_probs(self, role: str) -> list[list[float]]:
        """Per row the log-probability of each of its choices, behind a space, after the question;
        tokens as in lm-eval, letters read off one pass. Raises DataError, NonFiniteError.
        """
        rows = self.sets[role].rows
        own = self.scorer.deal(len(rows))
        pairs = [(rows[n].question, f" {text}") for n in own for text in rows[n].answers[CHOICES]]
        found = loglikelihoods(self.model, self.encoder.tokenizer, pairs, self.mix) if pairs else []
        totals = iter(likelihood.total for likelihood in found)
        return self.scorer.collect(
            "choices", {n: [next(totals) for _ in rows[n].answers[CHOICES]] for n in own}
        )

    def start_perplexities(self, role: str) -> list[float | None]:
        """The start's perplexity of each generated answer; None where there is no other start, or
        nothing was said.
        """
        generations = self.generated(role)
        if self.start is None:
            return [None] * len(generations)
        rows = self.sets[role].rows[: self.limit]
        pairs = [
            (row, generation.text)
            for row, generation in zip(rows, generations, strict=True)
            if generation.text
        ]
        scores = iter(self.score(pairs, self.start))
        # JSON has no infinity, and exp of 710 is one
        return [
            math.exp(min(next(scores).loss, 700.0)) if generation.text else None
            for generation in generations
        ]


def score_answer_tokens(
    scorer: ModelScorer,
    encoder: ExampleEncoder,
    pairs: Sequence[tuple[SuiteRow, str]],
    mix: Mix,
    *,
    moments: bool = False,
    answer_tokens: int | None = None,
) -> list[AnswerScores]:
    """Scores of (row, answer) pairs in their order. Raises as `SuiteModel.score`."""
    laid = [lay_out_answer(encoder, row, text, answer_tokens) for row, text in pairs]
    wants = {**LOSS_WANTS, **(MOMENT_WANTS if moments else {})}
    closings = closing_sequences(encoder)
    out: dict[int, AnswerScores] = {}
    # answers to one question side by side: the scorer runs what they have in common once
    sequences = [tokens for tokens, _ in laid]
    for numbers in split_into_passes(scorer.model, mix, sequences, SUITE_BATCH_TOKENS):
        batch = collate([TokenizedExample(*laid[n], key=n, adapter=BASE) for n in numbers])
        got = scorer.score([batch], wants, mix)[0]
        for at, number in enumerate(numbers):
            start, stop = batch.segments[at]
            # [k] places of the answer's tokens among the batch's
            places = torch.nonzero(batch.weights[start:stop])[:, 0] + start
            columns = {name: _column(got[name], places) for name in wants}
            if not all(map(math.isfinite, columns["log_prob"])):
                raise NonFiniteError(
                    f"{pairs[number][0].where}: a log-probability is not a number; the weights of the "
                    "model or the adapter hold NaN or infinity, or overflow in this dtype"
                )
            out[number] = AnswerScores(
                columns["log_prob"],
                [bool(hit) for hit in columns["correct"]],
                # a text that is scored as it stands ends as it does
                0 if pairs[number][0].plain else _closing_length(laid[number][0], closings),
                columns.get("mean", []),
                columns.get("variance", []),
            )
    return [out[number] for number in range(len(laid))]


def _column(values: Tensor, places: Tensor) -> list[float]:
    column: list[float] = values[places].double().tolist()
    return column


def _conversation(question: str, answer: str) -> Conversation:
    """The bare question in the chat template: how TOFU is asked."""
    return Conversation((ChatMessage("user", question), ChatMessage("assistant", answer)))


def _prompt(encoder: ExampleEncoder, row: SuiteRow) -> list[int]:
    """What an answer to a row is generated from."""
    if row.plain:
        return _plain_tokens(encoder, row.question)
    return encoder.prompt(_conversation(row.question, "."))


def _plain_tokens(encoder: ExampleEncoder, text: str) -> list[int]:
    """A text as it stands, behind what the tokenizer puts before every text."""
    ids = [*encoder.tokens.opening, *(encoder.tokens.one(text).ids if text else [])]
    encoder.expect_known(ids)
    return ids


def _lay_out_plain(
    encoder: ExampleEncoder, row: SuiteRow, text: str, answer_tokens: int | None
) -> tuple[list[int], list[float]]:
    """(tokens, weights) of a text behind another, a space between as open-unlearning's
    CompletionDataset has it; no end of text.
    """
    before = _plain_tokens(encoder, row.question)
    whole = _plain_tokens(encoder, f"{row.question} {text}" if row.question else text)
    # tokens across the border are rare (a space is between): then each side has its own
    if whole[: len(before)] != before:
        whole = [*before, *encoder.tokens.one(f" {text}").ids]
    start = max(len(before), 1)  # nothing comes before a text's first token
    tokens = whole[: None if answer_tokens is None else len(before) + answer_tokens]
    if len(tokens) <= start:
        raise DataError(f"{row.where}: the text is too short to be scored")
    return tokens, [0.0] * start + [1.0] * (len(tokens) - start)


def lay_out_answer(
    encoder: ExampleEncoder, row: SuiteRow, text: str, answer_tokens: int | None = None
) -> tuple[list[int], list[float]]:
    """(tokens, weights): the row as it would be trained, the answer and its end of turn weighted."""
    if row.plain:
        tokens, weights = _lay_out_plain(encoder, row, text, answer_tokens)
        if len(tokens) > encoder.max_length:
            raise DataError(_too_long(encoder, row))
        return tokens, weights
    sequences = encoder.encode(_conversation(row.question, text))
    if isinstance(sequences, BadRow):
        raise DataError(f"{row.where}: cannot be scored: {sequences.reason}")
    if sequences[-1].cut or sequences[-1].skipped:
        raise DataError(_too_long(encoder, row))
    return sequences[-1].tokens, [float(weight != 0) for weight in sequences[-1].weights]


def _too_long(encoder: ExampleEncoder, row: SuiteRow) -> str:
    return (
        f"{row.where}: question and answer are longer than the model's context of "
        f"{encoder.max_length} tokens; scores of a truncated question would not be "
        "comparable"
    )


def closing_sequences(encoder: ExampleEncoder) -> list[list[int]]:
    """What an answer may end with: a token that stops generation, or the template's own end of
    turn where that is several.
    """
    turn = encoder.template.end_of_turn
    several = [list(encoder.tokens.one(turn).ids)] if turn else []
    return [*([token] for token in encoder.stop_tokens()), *several]


def _closing_length(tokens: Sequence[int], closings: Sequence[Sequence[int]]) -> int:
    """How many tokens at the end close the turn."""
    content = list(tokens)
    # again and again: behind an end of turn of several tokens the encoder puts an end of text
    while end := next((e for e in closings if e and content[-len(e) :] == list(e)), None):
        del content[-len(end) :]
    return len(tokens) - len(content)


def _generated(
    encoder: ExampleEncoder, tokens: Sequence[int], ends: Sequence[int], stops: Sequence[str]
) -> GeneratedAnswer:
    text = "".join(IncrementalDetokenizer(encoder).decode_all(tokens))
    end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    # stripped as `lorry chat` and open-unlearning do: a leading space is no part of an answer
    return GeneratedAnswer(cut_at_stops(text, stops).strip(), list(tokens[:end]))
