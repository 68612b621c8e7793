"""What a request asks for, and how its next token is chosen from logits: greedy, or drawn after a
penalty, a temperature and two kinds of cut-off.

Every row of a batch brings its own parameters and its own random numbers, so who else is in the
batch cannot change what it draws. The numbers of a row are a function of (seed, row) and nothing
else: `row_generator` is the one place that says which. B rows, V vocabulary.
"""

from __future__ import annotations

import numbers
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from lorry.adapters.seeds import derive_seed
from lorry.errors import ConfigError, describe_value, suggest_nearest
from lorry.kernels import decode as kernel

# A nucleus is looked for among this many tokens before the whole vocabulary is sorted: at the usual
# temperatures it is far smaller than that, and the vocabulary far larger.
SHORTLIST_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks for: how a token is chosen, and when its answer ends.

    A token is chosen in this order: repetition penalty, temperature, top_k, top_p, the draw.
    temperature: 0 takes the most likely token. top_k: draw among the k most likely. top_p: draw
    among the fewest tokens whose probability reaches p (Holtzman et al. 2020). repetition_penalty:
    positive logits of tokens already in the prompt or answer are divided by it, negative ones
    multiplied (Keskar et al. 2019). seed: with the row it names the draws (`row_generator`).

    An answer ends with a token of ``stop_token_ids``, with a sequence of ``stop`` (token lists;
    both are kept in the answer) or after ``max_new_tokens``. logprobs: keep the log-probability of
    each token. Raises ConfigError for values outside their range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: Collection[int] = ()
    stop: Collection[Sequence[int]] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        _require_token_ids("stop_token_ids", self.stop_token_ids)
        if isinstance(self.stop, str) or not isinstance(self.stop, Iterable):
            raise ConfigError(f"stop is {describe_value(self.stop)}; give lists of token ids")
        for sequence in self.stop:
            _require_token_ids("a sequence of stop", sequence)
        # immutable, so that parameters can be compared and be keys
        object.__setattr__(self, "stop_token_ids", frozenset(self.stop_token_ids))
        object.__setattr__(self, "stop", tuple(tuple(sequence) for sequence in self.stop))
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "repetition_penalty",
            "max_new_tokens",
            "seed",
        ):
            _require_number(name, getattr(self, name), none=name in ("top_k", "top_p"))
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "at least 0 (0 is greedy)"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1, or None"),
            "repetition_penalty": (
                0 < self.repetition_penalty < float("inf"),
                "above 0 (1: no penalty)",
            ),
        }
        for name, (good, rule) in checks.items():
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {rule}")
        if () in self.stop:
            raise ConfigError(
                "stop holds an empty sequence, which would end every answer at once; remove it"
            )

    @property
    def distribution(self) -> tuple[float, int | None, float | None, float]:
        """What decides the distribution a token is drawn from: rows that agree in it are chosen for
        together."""
        return self.temperature, self.top_k, self.top_p, self.repetition_penalty

    def choose(
        self, logits: Tensor, seen: Sequence[Collection[int]], draws: Iterable[float]
    ) -> tuple[Tensor, Tensor]:
        """logits [B,V], the tokens each row has ``seen``, a number in [0,1) per row -> (tokens [B],
        finite [B] bool).
        """
        scores = logits if self.repetition_penalty == 1 else self._penalise(logits.float(), seen)
        whole = self.top_k is None and self.top_p in (None, 1.0)
        numbers = torch.tensor(
            list(draws) if self.temperature > 0 else [], dtype=torch.float64, device=logits.device
        )
        if (self.temperature == 0 or whole) and kernel.supports_decode(scores.dtype, scores.device):
            tokens, best = (
                kernel.sample_rows(scores, numbers, self.temperature)
                if self.temperature > 0
                else kernel.argmax_rows(scores)
            )
            return tokens, best.isfinite()
        scores = scores.float()
        best, tokens = scores.max(-1)
        if self.temperature > 0:
            tokens = self._draw(scores / self.temperature, numbers, whole)
        return tokens, best.isfinite()

    def _penalise(self, logits: Tensor, seen: Sequence[Collection[int]]) -> Tensor:
        rows = torch.tensor(
            [b for b, tokens in enumerate(seen) for _ in tokens], device=logits.device
        )
        columns = torch.tensor([t for tokens in seen for t in tokens], device=logits.device)
        old = logits[rows, columns]
        penalised = torch.where(
            old < 0, old * self.repetition_penalty, old / self.repetition_penalty
        )
        return logits.index_put((rows, columns), penalised)

    def _draw(self, scores: Tensor, draws: Tensor, whole: bool) -> Tensor:
        """scores [B,V] after the temperature, a number in [0,1) per row -> tokens [B]."""
        if whole:
            return _invert_distribution(scores.softmax(-1), draws)
        vocab = scores.shape[1]
        if self.top_k is not None:
            best, tokens = scores.topk(min(self.top_k, vocab))
            return self._draw_from(best.softmax(-1), tokens, draws)
        best, tokens = scores.topk(min(SHORTLIST_TOKENS, vocab))
        total = scores.logsumexp(-1, keepdim=True)
        probs = (best - total).exp()
        chosen = self._draw_from(probs, tokens, draws)
        # A flat distribution reaches p beyond the shortlist only. Its row alone is sorted whole: a
        # sort orders equal scores differently from topk, so that sorting all rows would change what
        # a neighbour draws.
        assert self.top_p is not None  # else the whole distribution would have been drawn from
        flat = torch.nonzero(probs.sum(-1) < self.top_p)[:, 0]
        if flat.numel():
            best, tokens = scores[flat].sort(descending=True)
            chosen[flat] = self._draw_from((best - total[flat]).exp(), tokens, draws[flat])
        return chosen

    def _draw_from(self, probs: Tensor, tokens: Tensor, draws: Tensor) -> Tensor:
        """Among ``tokens`` [B,n] of ``probs`` [B,n], most likely first, whose sum need not be 1:
        those before which less than top_p has been gathered."""
        if self.top_p is not None:
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.top_p, 0.0)
        return tokens.gather(1, _invert_distribution(probs, draws)[:, None])[:, 0]


def read_sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """Parameters by name, as keyword arguments give them. Raises ConfigError for a name that is none, and
    what `SamplingParams` raises."""
    known = [each.name for each in fields(SamplingParams)]
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(
            f"unknown option {unknown[0]!r:.80}{suggest_nearest(unknown[0], known)}; there are {', '.join(known)}"
        )
    return SamplingParams(**options)


def _require_token_ids(name: str, ids: object) -> None:
    """Raises ConfigError for what are no token ids, such as a text."""
    listed = isinstance(ids, Iterable) and not isinstance(ids, str | Mapping)
    if not listed or not all(
        isinstance(each, numbers.Integral) for each in cast(Iterable[object], ids)
    ):
        raise ConfigError(f"{name} is {describe_value(ids)}; give token ids")


def _require_number(name: str, value: object, *, none: bool) -> None:
    """Raises ConfigError for what is no number, a whole one where the name counts something."""
    whole = name not in ("temperature", "top_p", "repetition_penalty")
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not (isinstance(value, kind) or (none and value is None)):
        raise ConfigError(
            f"{name} is {describe_value(value)}; give a {'whole ' if whole else ''}number"
            + (", or None" if none else "")
        )


def _invert_distribution(probs: Tensor, draws: Tensor) -> Tensor:
    """Where in its row's cumulative distribution, probs [B,n] whose sum need not be 1, each number
    of draws [B] falls: one number a row, so that neighbours cannot disturb it.
    """
    # in float64: float32 sums of 50,000 probabilities lose the unlikely ones at the end
    sums = probs.double().cumsum(-1)
    # right: a token of probability 0 has an empty interval, which no number may fall into. The clamp
    # is for rows that are no numbers; `choose` tells of them.
    places = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)
    return places.clamp(max=probs.shape[1] - 1)[:, 0]


def row_generator(seed: int, row: int) -> random.Random:
    """The random numbers of a row, one for each of its tokens, whenever and beside whom it is
    answered."""
    return random.Random(derive_seed("generate", seed, row))


def choose_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seen: Sequence[Collection[int]],
    generators: Sequence[random.Random],
) -> tuple[Tensor, Tensor]:
    """`SamplingParams.choose` for rows of different parameters. logits [B,V]; one of everything
    else per row -> (tokens [B], finite [B] bool)."""
    groups: dict[object, list[int]] = {}
    for row, row_params in enumerate(params):
        groups.setdefault(row_params.distribution, []).append(row)
    if len(groups) == 1:  # nearly always: no copy of the logits then
        return params[0].choose(logits, seen, (draw.random() for draw in generators))
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    finite = torch.empty(len(params), dtype=torch.bool, device=logits.device)
    for rows in groups.values():
        index = torch.tensor(rows, device=logits.device)
        tokens[index], finite[index] = params[rows[0]].choose(
            logits[index], [seen[row] for row in rows], (generators[row].random() for row in rows)
        )
    return tokens, finite
