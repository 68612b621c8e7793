"""Prefix caching: keys and values of answered requests, from which a later prompt that begins alike goes on.

A token's keys and values follow from the tokens up to it and from the mix of adapters that each of them
was read under. So a prefix is shared as far as both are the same: the turns of a conversation under one
adapter share all but the newest; an adapter that tokens invoke (`adapters.variants.alora`) shares with its base,
and with others of its kind, whatever comes before them. What is gone on from was computed by products of
other shapes, so values are those of a whole prompt up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq

from torch import Tensor

from lorry.adapters.attach import get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.variants.alora import mixes_by_token
from lorry.models.causal_lm import CausalLM


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """``tokens`` [n] that were read under ``mixes`` [(stop, mix of constants)], and their ``keys_values``
    [layers, 2, G, n, D]; ``versions``: of what they were made with."""

    tokens: Sequence[int]
    mixes: Sequence[tuple[int, Mix]]
    keys_values: Tensor
    versions: object


class PrefixCache:
    """Prefixes of requests to one model, the ones used last: of ``max_tokens`` tokens in all, by default
    its context, so that they take no more than the longest request does while it runs.

    Nothing is kept of a mix with a router of the layers, whose weights are not watched. What was made with
    other weights, of the base or of an adapter, is forgotten by itself: known by where a tensor lies and by
    torch's count of writes to it. A write that torch does not count (through ``.data``, or into numpy's view of the
    memory) leaves them; whoever makes one calls `clear`.
    """

    def __init__(self, model: CausalLM, max_tokens: int | None = None) -> None:
        self.model = model
        self.max_tokens = (model.context or 0) if max_tokens is None else max_tokens
        # the one used last at the end
        self.prefixes: list[CachedPrefix] = []

    @property
    def tokens(self) -> int:
        """How many are kept."""
        return sum(len(prefix.tokens) for prefix in self.prefixes)

    def clear(self) -> None:
        """Forget all of them."""
        self.prefixes.clear()

    def find(self, prompt: Sequence[int], mix: Mix) -> Tensor | None:
        """[layers, 2, G, n, D]: of the longest beginning that a prompt under a mix of constants has in
        common with a prefix, its last token left out, which has to be read for what comes behind it."""
        mixes = mixes_by_token(get_bank(self.model, create=True), mix, prompt)
        self.prefixes = [p for p in self.prefixes if p.versions == self._versions(p.mixes)]
        lengths = [
            min(_common_length(p.tokens, prompt), _common_mixes(p.mixes, mixes), len(prompt) - 1)
            for p in self.prefixes
        ]
        if not max(lengths, default=0):
            return None
        best = self.prefixes.pop(lengths.index(max(lengths)))
        self.prefixes.append(best)
        return best.keys_values[:, :, :, : max(lengths)]

    def add(self, tokens: Sequence[int], mix: Mix, prompt: int, keys_values: Tensor) -> None:
        """Keep a request of the mix ``mix``: ``tokens`` [n], of which the first ``prompt`` are its prompt;
        ``keys_values`` [layers, 2, G, n, D] is copied. Those that it begins with go, and the ones that were
        used longest ago."""
        if mix.router is not None:
            return
        kept = min(len(tokens), self.max_tokens)
        mixes = mixes_by_token(get_bank(self.model, create=True), mix, tokens[:prompt])
        # what is generated is read as the prompt ended
        mixes[-1] = (len(tokens), mixes[-1][1])
        new = CachedPrefix(
            list(tokens[:kept]),
            mixes,
            keys_values[:, :, :, :kept].clone(),
            self._versions(mixes),
        )
        self.prefixes = [
            prefix
            for prefix in self.prefixes
            if min(_common_length(prefix.tokens, new.tokens), _common_mixes(prefix.mixes, mixes))
            < len(prefix.tokens)
        ]
        self.prefixes.append(new)
        while self.tokens > self.max_tokens:
            del self.prefixes[0]

    def _versions(self, mixes: Sequence[tuple[int, Mix]]) -> object:
        """Changes with the weights of the base and of the adapters of these mixes."""
        bank = get_bank(self.model, create=True)
        names = sorted({term.adapter for _, mix in mixes for term in mix.terms})
        adapters = [*bank.base_adapters.values(), *(bank.adapters.get(name) for name in names)]
        return (
            [(p.data_ptr(), p._version) for p in self.model.parameters()],
            [None if adapter is None else adapter.versions() for adapter in adapters],
        )


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(bool, map(eq, one, other)))


def _common_mixes(one: Sequence[tuple[int, Mix]], other: Sequence[tuple[int, Mix]]) -> int:
    """How many tokens two sequences begin with that are read under the same mixes."""
    common = 0
    for stop in sorted({stop for stop, _ in (*one, *other)}):
        ours = next((mix for end, mix in one if end >= stop), None)
        theirs = next((mix for end, mix in other if end >= stop), None)
        if ours is None or theirs is None or ours != theirs:
            break
        common = stop
    return common
