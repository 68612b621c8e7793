"""Activated LoRA (aLoRA, arXiv 2504.12397): an adapter that counts from its invocation tokens on. g is 0 for
what comes before their last occurrence in a sequence, 1 from the first of them to its end, and 0
everywhere where they are not; so the keys and values of what comes before are the base's.

It is a mix over tokens, and a mix is data: `with_invocations` makes the gates of packed tokens before
the layers run, and what is generated goes on as its prompt ended (`answering_mix`). A layer that meets
such an adapter without them raises ContractError, rather than to apply it everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorry.adapters.bank import AdapterBank
from lorry.adapters.mix import AMBIENT_CONTEXT, AdapterContext, Mix, MixTerm
from lorry.errors import ConfigError

_HOOKED = "lorry_invocations"


def find_invocation(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where the last occurrence of ``invocation`` in a sequence begins; None where there is none."""
    length, wanted = len(invocation), list(invocation)
    for start in range(len(tokens) - length, -1, -1):
        if tokens[start] == wanted[0] and list(tokens[start : start + length]) == wanted:
            return start
    return None


def with_invocations(
    bank: AdapterBank,
    mix: Mix,
    tokens: Tensor,
    segments: Sequence[tuple[int, int]],
    *,
    keep_all: bool = False,
) -> Mix:
    """The mix with the gates of those of its adapters that tokens invoke: ``tokens`` [T] packed,
    ``segments``: of the sequences. Terms that no sequence invokes are gone, or with ``keep_all`` 0
    everywhere; the mix itself where it has none of these adapters."""
    if not any(_invocation(bank, term) for term in mix.terms):
        return mix
    ids, terms = tokens.tolist(), list[MixTerm]()
    for term in mix.terms:
        invocation = _invocation(bank, term)
        if not invocation:
            terms.append(term)
            continue
        first, last = (0, len(ids)) if term.rows is None else (term.rows.start, term.rows.stop)
        gate = torch.zeros(last - first)
        for start, stop in segments:
            if start < first or stop > last:  # another adapter's
                continue
            at = find_invocation(ids[start:stop], invocation)
            if at is not None:
                gate[start + at - first : stop - first] = 1.0
        if keep_all or bool(gate.any()):
            terms.append(replace(term, gate=gate.to(tokens.device) * term.gate, invoked=True))
    return replace(mix, terms=tuple(terms))


def answering_mix(bank: AdapterBank, mix: Mix, prompt: Sequence[int]) -> Mix:
    """The mix of the tokens behind a prompt: adapters that it invoked stay, whatever comes, and others
    that tokens invoke are none of it."""
    if not any(_invocation(bank, term) for term in mix.terms):
        return mix
    terms = list[MixTerm]()
    for term in mix.terms:
        invocation = _invocation(bank, term)
        if not invocation:
            terms.append(term)
        elif find_invocation(prompt, invocation) is not None:
            terms.append(replace(term, invoked=True))
    return replace(mix, terms=tuple(terms))


def mixes_by_token(bank: AdapterBank, mix: Mix, prompt: Sequence[int]) -> list[tuple[int, Mix]]:
    """[(stop, mix)]: the mixes of constants under which a prompt's tokens are read, each up to its
    ``stop``, ``mix`` being one of constants; before an adapter is invoked its term is not there, as in
    the base's."""
    invoked_at = dict[MixTerm, int]()
    for term in mix.terms:
        if invocation := _invocation(bank, term):
            at = find_invocation(prompt, invocation)
            invoked_at[term] = len(prompt) if at is None else at
    runs = list[tuple[int, Mix]]()
    start = 0
    for stop in sorted({*invoked_at.values(), len(prompt)} - {0}):
        terms = (
            term if term not in invoked_at else replace(term, invoked=True)
            for term in mix.terms
            if invoked_at.get(term, 0) <= start
        )
        runs.append((stop, replace(mix, terms=tuple(terms))))
        start = stop
    return runs


def has_invocations(bank: AdapterBank, mix: Mix) -> bool:
    """Whether an adapter of the mix waits for tokens that invoke it."""
    return any(_invocation(bank, term) for term in mix.terms)


def _invocation(bank: AdapterBank, term: MixTerm) -> tuple[int, ...]:
    """The tokens that a term's adapter waits for; none of one that counts everywhere, or whose gates
    are made."""
    adapter = bank.adapters.get(term.adapter)
    if adapter is None or term.invoked:
        return ()
    return adapter.spec.alora_invocation_tokens or ()


def watch_tokens(model: nn.Module, bank: AdapterBank) -> None:
    """Let a foreign model's forward find invocations in its ``input_ids`` [B,T] by itself, once. Lorry's
    own models do so anyway."""
    if hasattr(model, "forward_cached") or _HOOKED in model.__dict__:
        return
    tokens_of_call = list[Any]()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # at once: `after` takes it away, whatever goes wrong here
        tokens_of_call.append(None)
        call = AMBIENT_CONTEXT.get()
        if call is not None or not has_invocations(bank, bank.active):
            return
        ids = _input_ids(args, kwargs)
        rows, length = ids.shape
        segments = [(row * length, (row + 1) * length) for row in range(rows)]
        # a loss that hangs on no adapter would have no backward pass: its gradient is 0, as PEFT's
        mix = with_invocations(
            bank, bank.active, ids.reshape(-1), segments, keep_all=torch.is_grad_enabled()
        )
        tokens_of_call[-1] = AMBIENT_CONTEXT.set(AdapterContext(mix, bank.noise))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if (token := tokens_of_call.pop()) is not None:
            AMBIENT_CONTEXT.reset(token)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, always_call=True)
    model.__dict__[_HOOKED] = True


def _input_ids(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a forward reads. Raises ConfigError where it is not whole sequences of tokens."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    cache = kwargs.get("past_key_values")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise ConfigError(
            "an adapter that tokens invoke is active: the model has to be given input_ids [batch, "
            "tokens], not embeddings"
        )
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length()):
        raise ConfigError(
            "an adapter that tokens invoke is active, and with past_key_values the model does not see "
            "whether they came; use lorry.generate, or use_cache=False"
        )
    return ids
