"""Generation: many prompts at once over a key/value cache, greedy or sampled, an adapter per row,
nothing padded.

Prompts are run packed, and only the last token of each meets the head. Then every live row decodes
one token a step; a row that ends makes room for the next prompt. What a row says depends on its
prompt, its adapter and (seed, its place in the list), never on who shared the batch (up to the
rounding of differently shaped matrix products). B live rows, V vocabulary.

Try: generate(model, [[1, 403, 407]], max_new_tokens=20)
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.seeds import derive_seed
from lorry.errors import ConfigError, DataError, ModelError, NonFiniteError
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import CausalLM, PackedInput
from lorry.models.decoder.decode import DecodeRunner

BATCH_ROWS = 64  # live rows at once unless the caller says otherwise
PREFILL_TOKENS = 2048  # prompt tokens in one forward pass, unless a single prompt is longer


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt. ``tokens``: the new ones, with the end-of-turn token or stop
    sequence that ended it, if any; ``finished``: it ended by itself and not at ``max_new_tokens``;
    ``logprobs``: log p of each token under the plain model (temperature 1, nothing penalised or cut
    off), when asked for.
    """

    tokens: list[int]
    finished: bool
    logprobs: list[float] | None = None


@dataclass
class SequenceState:
    """One prompt and what it has said so far."""

    index: int
    prompt: list[int]
    adapter: str | None
    limit: int
    rng: random.Random
    seen: set[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    def take(self, token: int, eos: Collection[int], stop: Collection[Sequence[int]]) -> None:
        """Append a token and see whether it ends the answer."""
        self.tokens.append(token)
        self.seen.add(token)
        self.finished = token in eos or any(self.tokens[-len(s) :] == list(s) for s in stop)

    @property
    def done(self) -> bool:
        return self.finished or len(self.tokens) >= self.limit


class GenerationBatch:
    """Some prompts being answered: ``steps()`` yields, after each forward pass, the rows that got a
    token by it.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos: Collection[int] = (),
        stop: Collection[Sequence[int]] = (),
        sampling: SamplingParams,
        adapters: Mix | Sequence[str | None] | str | None = None,
        batch_rows: int | None = None,
        logprobs: bool = False,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_rows", batch_rows)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if any(len(s) == 0 for s in stop):
            raise ConfigError(
                "stop holds an empty sequence, which would end every answer at once; remove it"
            )
        self.model = cast(CausalLM, DecodeRunner(model) if DecodeRunner.takes(model) else model)  # type: ignore[arg-type]
        self.eos, self.stop, self.sampling, self.logprobs = (
            frozenset(eos),
            list(stop),
            sampling,
            logprobs,
        )
        self.mix, owners = resolve_row_adapters(model, adapters, len(prompts))
        self.rows = [
            SequenceState(
                i,
                tokens,
                owner,
                max_new_tokens,
                random.Random(derive_seed("generate", sampling.seed, i)),
                set(tokens),
            )
            for i, (tokens, owner) in enumerate(
                zip(([int(t) for t in p] for p in prompts), owners, strict=True)
            )
        ]
        self._check_lengths(max_new_tokens)
        # Rows of one adapter run side by side, so that each step has few terms; the order does not
        # change any row's answer.
        rank = {name: k for k, name in enumerate(dict.fromkeys(owners))}
        self.waiting = deque(sorted(self.rows, key=lambda row: rank[row.adapter]))
        self.live = [
            self.waiting.popleft() for _ in range(min(batch_rows or BATCH_ROWS, len(self.rows)))
        ]
        if self.rows:
            self.cache = self.model.new_cache(
                len(self.live), max(len(row.prompt) for row in self.rows) + max_new_tokens
            )

    def _check_lengths(self, new: int) -> None:
        limit = self.model.context
        for row in self.rows:
            if not row.prompt:
                raise DataError(
                    f"prompt {row.index} is empty; give it at least one token (such as the beginning-of-text token)"
                )
            if limit is not None and len(row.prompt) + new > limit:
                left = limit - len(row.prompt)
                fewer = (
                    f"set max_new_tokens to at most {left}"
                    if left > 0
                    else "use a model with a longer context"
                )
                shorter = f" to at most {limit - new} tokens" if limit > new else ""
                raise ModelError(
                    f"prompt {row.index} has {len(row.prompt)} tokens and max_new_tokens is {new}, but this model's context is "
                    f"{limit}; shorten the prompt{shorter} or {fewer}"
                )

    def steps(self) -> Iterator[list[SequenceState]]:
        """Run until every row is done. Raises NonFiniteError when the model's logits are not
        numbers.
        """
        fresh = list(range(len(self.live)))
        while self.live:
            if fresh:
                self._prefill(fresh)
                yield [self.live[slot] for slot in fresh]
            else:
                self._decode()
                yield list(self.live)
            fresh = self._refill_rows()

    @torch.no_grad()
    def _prefill(self, slots: Sequence[int]) -> None:
        """Run the prompts that were just given these cache rows, a bounded number of tokens at a
        time.
        """
        groups: list[list[int]] = []
        held = 0
        for slot in slots:
            held += len(self.live[slot].prompt)
            if not groups or held > PREFILL_TOKENS:
                groups.append([])
                held = len(self.live[slot].prompt)
            groups[-1].append(slot)
        for group in groups:
            rows = [self.live[slot] for slot in group]
            packed = PackedInput.of([row.prompt for row in rows], self.model.device)
            places = torch.repeat_interleave(
                torch.tensor(group), torch.tensor([len(row.prompt) for row in rows])
            )
            ends = [stop for _, stop in packed.segments]
            call = self._call(rows, [0, *ends])
            hidden = self.model.cached(
                packed, places.to(self.model.device), self.cache, call, decoding=False
            )
            last = torch.tensor(ends, device=self.model.device) - 1
            self._choose(self.model.logits(hidden.index_select(0, last), call.narrow(last)), rows)

    @torch.no_grad()
    def _decode(self) -> None:
        """One token for every live row."""
        count = len(self.live)
        tokens = torch.tensor([row.tokens[-1] for row in self.live], device=self.model.device)
        packed = PackedInput(tokens, self.cache.lengths, [(i, i + 1) for i in range(count)])
        call = self._call(self.live, range(count + 1))
        hidden = self.model.cached(
            packed, torch.arange(count, device=tokens.device), self.cache, call, decoding=True
        )
        self._choose(self.model.logits(hidden, call), self.live)

    def _call(self, rows: Sequence[SequenceState], starts: Sequence[int]) -> AdapterContext:
        return AdapterContext(
            self.mix
            if self.mix is not None
            else Mix.per_sequence([row.adapter for row in rows], starts)
        )

    def _choose(self, logits: Tensor, rows: Sequence[SequenceState]) -> None:
        """Give each row its next token from logits [B,V]."""
        tokens, finite = self.sampling.choose(
            logits, [row.seen for row in rows], (row.rng.random() for row in rows)
        )
        if not bool(finite.all()):
            bad = [row.index for row, good in zip(rows, finite.tolist(), strict=True) if not good]
            raise NonFiniteError(
                f"the logits for prompt {bad[0]} ({len(bad)} in all) are not finite after {len(rows[0].tokens)} new tokens; "
                "the model's weights or an adapter's hold NaN or infinity, or overflow in this dtype"
            )
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.take(token, self.eos, self.stop)
        if self.logprobs:
            wide = logits.float()
            picked = wide.gather(1, tokens[:, None])[:, 0] - wide.logsumexp(-1)
            for row, value in zip(rows, picked.tolist(), strict=True):
                row.logprobs.append(value)

    def _refill_rows(self) -> list[int]:
        """Replace rows that are done by waiting ones, and shrink the batch when none wait. Returns
        the slots to prefill.
        """
        done = [slot for slot, row in enumerate(self.live) if row.done]
        fresh = done[: len(self.waiting)]
        for slot in fresh:
            self.live[slot] = self.waiting.popleft()
        # all behind the fresh ones, whose slots therefore keep their numbers
        if gone := done[len(fresh) :]:
            kept = [slot for slot in range(len(self.live)) if slot not in gone]
            self.live = [self.live[slot] for slot in kept]
            if kept:
                self.cache.keep(torch.tensor(kept, device=self.model.device))
        return fresh


def resolve_row_adapters(
    model: nn.Module, adapters: Mix | Sequence[str | None] | str | None, count: int
) -> tuple[Mix | None, list[str | None]]:
    """(the mix of every row, or None where each row has its own adapter; the adapter of each of
    ``count`` rows).
    """
    bank = get_bank(model, create=True)
    if adapters is None or isinstance(adapters, (str, Mix)):
        mix = (
            bank.active
            if adapters is None
            else Mix.one(adapters)
            if isinstance(adapters, str)
            else adapters
        )
        for term in mix.terms:
            bank[term.adapter]
            if term.rows is not None or isinstance(term.gate, Tensor):
                raise ConfigError(
                    "this mix belongs to the tokens of one batch; generation needs one that is the same for all"
                )
        return mix, [None] * count
    if len(adapters) != count:
        raise ConfigError(
            f"adapters has {len(adapters)} entries for {count} prompts; give one name (or None) per prompt"
        )
    for name in set(adapters):
        if name is not None:
            bank[name]
    return None, list(adapters)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation, and those that were training back afterwards."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def generate_completions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Collection[int] = (),
    stop: Collection[Sequence[int]] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    adapters: Mix | Sequence[str | None] | str | None = None,
    batch_rows: int | None = None,
    logprobs: bool = False,
) -> list[Completion]:
    """Answer every prompt (token lists of any lengths, not padded), in their order.

    An answer ends with a token of ``eos``, with a sequence of ``stop`` (token lists; both are kept
    in the answer) or after ``max_new_tokens``. ``temperature`` 0 is greedy; see `SamplingParams`
    for the rest. ``adapters``: a name, one name or None (the base) per prompt, a `Mix` of
    constants, or None for the model's active mix. ``batch_rows``: rows alive at once (64); the
    others wait. Raises DataError for an empty prompt, ModelError for one too long for the context,
    ConfigError for a bad setting or an unknown adapter, all before anything runs, and
    NonFiniteError.
    """
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    run = GenerationBatch(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        eos=eos,
        stop=stop,
        sampling=sampling,
        adapters=adapters,
        batch_rows=batch_rows,
        logprobs=logprobs,
    )
    with evaluation_mode(model):
        for _ in run.steps():
            pass
    return [
        Completion(row.tokens, row.finished, row.logprobs if logprobs else None) for row in run.rows
    ]


def stream_tokens(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos: Collection[int] = (),
    stop: Collection[Sequence[int]] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    adapters: Mix | str | None = None,
) -> Iterator[int]:
    """The tokens `generate_completions` would give this prompt, one by one as they are chosen.
    Settings are checked at once.
    """
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    run = GenerationBatch(
        model,
        [prompt],
        max_new_tokens=max_new_tokens,
        eos=eos,
        stop=stop,
        sampling=sampling,
        adapters=adapters,
    )

    def tokens() -> Iterator[int]:
        with evaluation_mode(model):
            for rows in run.steps():
                yield rows[0].tokens[-1]

    return tokens()
