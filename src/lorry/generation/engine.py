"""Generation: many requests at once over a key/value cache, each with its own sampling parameters
and its own adapters, nothing padded.

A `GenerationEngine` holds requests that wait and requests that run. Prompts are run packed, and
only the last token of each meets the head. Then every running request decodes one token a step; one
that ends makes room for the next that waits, and requests may be added at any time. What a request
says depends on its prompt, its parameters, its adapters and (seed, row), never on who shared the
batch or when it came (up to the rounding of differently shaped matrix products). B running
requests, V vocabulary.

    engine = GenerationEngine(model)
    engine.add_request([1, 403, 407], SamplingParams(max_new_tokens=20), adapter="people")  # -> 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            print(output.request_id, output.completion.tokens)

`generate_completions(model, [[1, 403, 407]], SamplingParams(max_new_tokens=20))` is that loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import AdapterContext, Mix, SequenceRouter
from lorry.adapters.variants.alora import answering_mix, has_invocations
from lorry.errors import ConfigError, DataError, ModelError, NonFiniteError
from lorry.generation.prefix_cache import PrefixCache
from lorry.generation.request import (
    Completion,
    Request,
    RequestOutput,
    StoppingCriterion,
    resolve_constant_mix,
)
from lorry.generation.sampling import SamplingParams, choose_tokens, row_generator
from lorry.models.causal_lm import CausalLM, PackedInput, invoke, prompt_gates
from lorry.models.decoder.cache import KVCache, RowKVCache
from lorry.models.decoder.decode import DecodeRunner
from lorry.models.owners import owners_in, owning_adapters

# Running requests at once unless the caller says otherwise. A decode step reads every weight once
# however many rows share it, so that rows cost little; but each holds the keys and values of all its
# tokens, and that is what bounds their number.
BATCH_ROWS = 64
# Prompt tokens in one forward pass, unless a single prompt is longer: enough for products at full
# speed, little enough that activations stay far below what the weights take.
PREFILL_TOKENS = 2048


class GenerationEngine:
    """Requests being answered by one model. ``batch_rows``: how many run at once; the others wait.
    ``prefix_cache``: of this model; what a prompt has in common with an earlier request of its is not
    computed again, in Lorry's own decoder.

    ``requests``: the unfinished ones by id, with their answers so far. The model's weights and
    adapters must stay as they are while there are any: keys and values of their tokens are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_rows: int | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        if batch_rows is not None and batch_rows < 1:
            raise ConfigError(f"batch_rows is {batch_rows}; it must be at least 1")
        self.model = model
        self.runner = cast(
            CausalLM,
            DecodeRunner(model) if DecodeRunner.takes(model) else model,  # type: ignore[arg-type]
        )
        self.batch_rows = batch_rows or BATCH_ROWS
        self.prefix_cache = prefix_cache
        self.requests: dict[int, Request] = {}
        self.waiting: deque[Request] = deque()
        # Request i has row i of the cache. One that has finished keeps its row until the next step
        # gives it to another or drops it.
        self.running: list[Request] = []
        self.cache: Any = None
        self._arrived: list[Request] = []
        self._modules: list[nn.Module] = []
        self._count = 0
        self._failed = False

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        adapter: Mix | str | None = None,
        row: int | None = None,
        stopping_criterion: StoppingCriterion | None = None,
    ) -> int:
        """Queue a prompt and return the request's id: 0, 1, ... in the order they were added.

        ``adapter``: a name, a `Mix` of constants, or None (the base). ``row``: with
        ``params.seed`` it names the draws of a sampled answer; the id unless given, so that equal
        prompts get different answers. ``stopping_criterion``: ends the answer where it says so, as
        ``params.stop`` does. Raises DataError for an empty prompt, ModelError for one too long for
        the context, ConfigError for an unknown adapter; nothing is queued then.
        """
        request = Request(
            self._count,
            [int(token) for token in prompt],
            params,
            Mix.none() if adapter is None else resolve_constant_mix(self.model, adapter),
            row_generator(params.seed, self._count if row is None else row),
            stopping_criterion,
        )
        self._check_length(request)
        reason = getattr(self.model, "recompute_reason", "")
        if reason and has_invocations(get_bank(self.model, create=True), request.mix):
            raise ConfigError(
                f"an adapter that tokens invoke needs a key/value cache to generate with, and {reason}"
            )
        self._count += 1
        self._arrived.append(request)
        self.requests[request.request_id] = request
        return request.request_id

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.requests)

    @torch.no_grad()
    def step(self) -> list[RequestOutput]:
        """Run one forward pass: the prompts of requests that were given a row, or else one more
        token of every running request. Returns those that have finished by it.

        Raises NonFiniteError when the model's logits are not numbers, and after any error
        ModelError: rows of the cache are ahead of their requests then, and every later token would
        be wrong.
        """
        if not self.requests:
            return []
        if self._failed:
            raise ModelError(
                "an earlier step of this engine failed, and its requests cannot be "
                "continued; create a new GenerationEngine and add the requests "
                "again"
            )
        self._failed = True  # until this step is through
        if self._arrived:
            # walking through a model takes as long as a small layer: the next tokens need not
            self._modules = list(self.model.modules())
        with _in_evaluation(self._modules):
            self._fix_gates()
            if fresh := self._schedule():
                self._prefill(fresh)
            else:
                self._decode()
        self._failed = False
        return self._finished()

    def _check_length(self, request: Request) -> None:
        number, length, new = (
            request.request_id,
            len(request.prompt),
            request.params.max_new_tokens,
        )
        if not length:
            raise DataError(
                f"prompt {number} is empty; give it at least one token "
                "(such as the beginning-of-text token)"
            )
        limit = self.runner.context
        if limit is not None and length + new > limit:
            left = limit - length
            fewer = (
                f"set max_new_tokens to at most {left}"
                if left > 0
                else "use a model with a longer context"
            )
            shorter = f" to at most {limit - new} tokens" if limit > new else ""
            raise ModelError(
                f"prompt {number} has {length} tokens and max_new_tokens is {new}, but this "
                f"model's context is {limit}; shorten the prompt{shorter} or {fewer}"
            )

    # --- who runs

    def _fix_gates(self) -> None:
        """Give requests that came under a router of the sequence the gates of their prompts, and look
        there for what invokes an adapter: from then on their mix is one of constants, whoever shares
        the batch and however long they answer.
        """
        by_router: dict[SequenceRouter, list[Request]] = {}
        for request in self._arrived:
            if (router := request.mix.sequence_router) is not None:
                by_router.setdefault(router, []).append(request)
        for router, requests in by_router.items():
            prompts = [request.prompt for request in requests]
            gates = prompt_gates(cast(CausalLM, self.model), prompts, router)
            for request, row in zip(requests, gates.tolist(), strict=True):
                request.mix = request.mix.with_gates(row)
        bank = get_bank(self.model, create=True)
        for request in self._arrived:
            request.answering = answering_mix(bank, request.mix, request.prompt)

    def _schedule(self) -> list[int]:
        """Give the rows of finished requests to waiting ones, and drop those that nobody takes or
        add those that are short. Returns the rows to prefill.
        """
        # Requests of one mix run side by side, so that a step has few terms; it changes no answer.
        # Only among those that came together: a mix that keeps coming must not overtake for ever.
        first_seen = {mix: n for n, mix in enumerate(dict.fromkeys(r.mix for r in self._arrived))}
        self.waiting.extend(sorted(self._arrived, key=lambda request: first_seen[request.mix]))
        self._arrived = []
        free = [row for row, request in enumerate(self.running) if request.finish_reason]
        ready = self._count_ready()
        fresh = free[:ready]
        for row in fresh:
            self.running[row] = self.waiting.popleft()
        # Rows nobody takes are all behind the fresh ones, which therefore keep their numbers.
        if unused := set(free[len(fresh) :]):
            rows = [row for row in range(len(self.running)) if row not in unused]
            self.running = [self.running[row] for row in rows]
            self.cache.keep(torch.tensor(rows, device=self.runner.device))
        more = min(ready - len(fresh), self.batch_rows - len(self.running))
        for _ in range(more):
            fresh.append(len(self.running))
            self.running.append(self.waiting.popleft())
        if fresh:
            self._reserve_rows(more)
            fresh = self._sort_rows(fresh)
        return fresh

    def _sort_rows(self, fresh: Sequence[int]) -> list[int]:
        """Lay rows of one mix side by side, where a row moves without its memory, so that a step has as
        few terms as there are mixes; a late request gets whichever row was free. Returns where the fresh
        ones are then."""
        if not isinstance(self.cache, RowKVCache):
            return list(fresh)
        place = {mix: n for n, mix in enumerate(dict.fromkeys(r.answering for r in self.running))}
        order = sorted(range(len(self.running)), key=lambda row: place[self.running[row].answering])
        if order == list(range(len(order))):
            return list(fresh)
        self.running = [self.running[row] for row in order]
        self.cache.keep(torch.tensor(order))
        return sorted(order.index(row) for row in fresh)

    def _count_ready(self) -> int:
        """How many of the waiting requests, from the first on, may run beside those that run: an adapter with
        weights of its own in the base's place has a pass for itself."""
        owning = owning_adapters(self.model)
        if not owning or not self.waiting:
            return len(self.waiting)
        busy = [request for request in self.running if not request.finish_reason]
        owners = owners_in((busy or self.waiting)[0].mix, owning)
        alike = (owners_in(request.mix, owning) == owners for request in self.waiting)
        return sum(1 for _ in takewhile(bool, alike))

    def _reserve_rows(self, more: int) -> None:
        """Rows of the cache for the running requests, ``more`` of which have none yet. The cache
        takes memory as rows grow; the longest that any may become only bounds it."""
        longest = max(request.longest for request in (*self.running, *self.waiting))
        if self.cache is None:
            self.cache = self.runner.new_cache(more, longest)
        else:
            self.cache.add_rows(more, longest)

    def _finished(self) -> list[RequestOutput]:
        """The requests that the last step has finished; when no others are left, the cache goes."""
        finished = [request for request in self.running if request.finish_reason]
        for request in finished:
            self.keep_prefix(request)
            del self.requests[request.request_id]
        if not self.requests:
            self.running, self.cache = [], None
        return [RequestOutput(request.request_id, request.completion()) for request in finished]

    # --- what requests have in common with earlier ones

    def keep_prefix(self, request: Request) -> None:
        """Put what has been computed for a running request into the prefix cache, if there is one; nothing
        before its first token."""
        if self.prefix_cache is None or not isinstance(self.cache, KVCache) or not request.tokens:
            return
        # the newest token has been chosen, not read
        tokens = [*request.prompt, *request.tokens[:-1]]
        keys_values = self.cache.row(self.running.index(request), len(tokens))
        self.prefix_cache.add(tokens, request.mix, len(request.prompt), keys_values)

    def _restore_prefix(self, row: int) -> int:
        """How many tokens of a new request's prompt its row holds already: those that it has in common
        with an earlier one."""
        if self.prefix_cache is None or not isinstance(self.cache, KVCache):
            return 0
        request = self.running[row]
        prefix = self.prefix_cache.find(request.prompt, request.mix)
        if prefix is None:
            return 0
        self.cache.restore(row, prefix, len(request.prompt))
        return prefix.shape[3]

    # --- what they say

    def _prefill(self, rows: Sequence[int]) -> None:
        """Run the prompts of the requests in these rows, a bounded number of tokens at a time."""
        shared = {row: self._restore_prefix(row) for row in rows}
        groups: list[list[int]] = []
        held = 0
        for row in rows:
            new = len(self.running[row].prompt) - shared[row]
            held += new
            if not groups or held > PREFILL_TOKENS:
                groups.append([])
                held = new
            groups[-1].append(row)
        device = self.runner.device
        for group in groups:
            requests = [self.running[row] for row in group]
            packed = PackedInput.of([request.prompt for request in requests], device)
            call = _adapter_context(
                [request.mix for request in requests], [0, *(stop for _, stop in packed.segments)]
            )
            # what invokes an adapter is looked for in whole prompts
            call = invoke(cast(CausalLM, self.model), packed, call)
            if any(shared[row] for row in group):
                packed, kept = packed.without_beginnings([shared[row] for row in group])
                call = call.narrow(kept)
            ends = [stop for _, stop in packed.segments]
            lengths = torch.tensor([stop - start for start, stop in packed.segments])
            token_rows = torch.repeat_interleave(torch.tensor(group), lengths).to(device)
            hidden = self.runner.forward_cached(
                packed, token_rows, self.cache, call, decoding=False
            )
            last = torch.tensor(ends, device=device) - 1
            logits = self.runner.logits(hidden.index_select(0, last), call.narrow(last))
            self._append_tokens(logits, requests)

    def _decode(self) -> None:
        """One more token of every running request."""
        count, device = len(self.running), self.runner.device
        newest = torch.tensor([request.tokens[-1] for request in self.running], device=device)
        packed = PackedInput(newest, self.cache.lengths, [(i, i + 1) for i in range(count)])
        call = _adapter_context([request.answering for request in self.running], range(count + 1))
        rows = torch.arange(count, device=device)
        hidden = self.runner.forward_cached(packed, rows, self.cache, call, decoding=True)
        self._append_tokens(self.runner.logits(hidden, call), self.running)

    def _append_tokens(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """Choose the next token of each request from logits [B,V]."""
        tokens, finite = choose_tokens(
            logits,
            [request.params for request in requests],
            [request.seen for request in requests],
            [request.generator for request in requests],
        )
        if not bool(finite.all()):
            bad = [request for request, ok in zip(requests, finite.tolist(), strict=True) if not ok]
            raise NonFiniteError(
                f"the logits for prompt {bad[0].request_id} ({len(bad)} in all) are not finite "
                f"after {len(bad[0].tokens)} new tokens; the model's weights or an adapter's hold "
                "NaN or infinity, or overflow in this dtype"
            )
        for request, token in zip(requests, tokens.tolist(), strict=True):
            request.append_token(token)
        if logprob_rows := [row for row, request in enumerate(requests) if request.params.logprobs]:
            index = torch.tensor(logprob_rows, device=logits.device)
            wide = logits[index].float()
            chosen = wide.gather(1, tokens[index, None])[:, 0] - wide.logsumexp(-1)
            for row, value in zip(logprob_rows, chosen.tolist(), strict=True):
                requests[row].logprobs.append(value)


def _adapter_context(mixes: Sequence[Mix], starts: Sequence[int]) -> AdapterContext:
    """The call of packed sequences, each under its request's mix; ``starts`` [S+1]."""
    return AdapterContext(Mix.packed(mixes, starts))


def evaluation_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Switch every module to evaluation, and those that were training back afterwards."""
    return _in_evaluation(model.modules())


@contextmanager
def _in_evaluation(modules: Iterable[nn.Module]) -> Iterator[None]:
    training = [m for m in modules if m.training]
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
    params: SamplingParams | Sequence[SamplingParams],
    *,
    adapters: Mix | Sequence[Mix | str | None] | str | None = None,
    batch_rows: int | None = None,
    rows: Sequence[int] | None = None,
) -> list[Completion]:
    """Answer every prompt (token lists of any lengths, not padded), in their order.

    ``params``: for all prompts, or one for each; ``rows``: each one's number, which with the seed
    names its draws; left out, it is its place in the list. ``adapters``: for all prompts a name, a
    `Mix` of constants, or None for the model's active mix; or for each prompt a name, a mix or None
    (the base). ``batch_rows``: requests that run at once (64); the others wait. Raises what
    `GenerationEngine.add_request` raises and ConfigError for a bad setting, all before anything
    runs, and NonFiniteError.
    """
    engine = GenerationEngine(model, batch_rows=batch_rows)
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ConfigError(
            f"params has {len(each)} entries for {len(prompts)} prompts; give one for all, or one "
            "per prompt"
        )
    mixes: list[Mix | str | None]
    if adapters is None or isinstance(adapters, (str, Mix)):
        mixes = [resolve_constant_mix(model, adapters)] * len(prompts)
    else:
        mixes = list(adapters)
    if len(mixes) != len(prompts):
        raise ConfigError(
            f"adapters has {len(mixes)} entries for {len(prompts)} prompts; give one name (or "
            "None) per prompt"
        )
    numbers = range(len(prompts)) if rows is None else rows
    for prompt, request_params, mix, row in zip(prompts, each, mixes, numbers, strict=True):
        engine.add_request(prompt, request_params, adapter=mix, row=row)
    answers: dict[int, Completion] = {}
    while engine.has_unfinished_requests():
        answers |= {output.request_id: output.completion for output in engine.step()}
    return [answers[number] for number in range(len(prompts))]


def stream_tokens(
    model: nn.Module,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    adapter: Mix | str | None = None,
    prefix_cache: PrefixCache | None = None,
) -> Iterator[int]:
    """The tokens `generate_completions` would give this prompt, one by one as they are chosen;
    ``adapter`` None is the model's active mix. Settings are checked at once. ``prefix_cache``: as of
    `GenerationEngine`; an answer that is not read to its end is kept there as far as it came.
    """
    engine = GenerationEngine(model, prefix_cache=prefix_cache)
    number = engine.add_request(prompt, params, adapter=resolve_constant_mix(model, adapter))

    def tokens() -> Iterator[int]:
        request = engine.requests[number]
        try:
            while not request.finish_reason:
                engine.step()
                yield request.tokens[-1]
        finally:
            if not request.finish_reason:
                engine.keep_prefix(request)

    return tokens()
