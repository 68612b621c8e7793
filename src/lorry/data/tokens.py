"""Text to tokens with known characters: which token holds which part of the text.

A fast tokenizer gives the characters of each token (offsets). Only their ends are used: byte-level tokenizers trim the
white space at a token's start out of its offsets, never what comes before the next token's end.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from lorry.errors import ModelError

Span = tuple[int, int]


@dataclass
class Marked:
    """Token ids, and for each whether it belongs to a supervised span."""

    ids: list[int]
    learnt: list[bool]


class Tokens:
    """A tokenizer, wrapped. ``opening`` are the ids it puts before every text (a BOS, mostly), ``end`` its EOS id or None."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end: int | None = tokenizer.eos_token_id
        bare, dressed = self._ids("a"), list(tokenizer("a", add_special_tokens=True)["input_ids"])
        cuts = [at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare]
        self.opening: list[int] = dressed[: cuts[0]] if cuts else []
        self._line_break = self._ids("\n")

    def many(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Marked]:
        """Tokenise each text as a whole, no special tokens added, and mark the tokens of its spans.

        A token that would reach across the start of a span is broken up there by tokenising the two sides on their own,
        because that is what inference does: the prompt is tokenised alone and the answer follows.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return [self._piecewise(text, marks) for text, marks in zip(texts, spans, strict=True)]
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
            return_token_type_ids=False, truncation=False, padding=False, verbose=False,
        )  # fmt: skip
        done = []
        for text, ids, offsets, marks in zip(texts, encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
            learnt = _marks([end for _, end in offsets], marks)
            done.append(self._piecewise(text, marks) if learnt is None else Marked(list(ids), learnt))
        self._verify(texts, spans, done)
        return done

    def one(self, text: str, spans: Sequence[Span] = ()) -> Marked:
        """``many`` for a single text."""
        return self.many([text], [spans])[0]

    def ends(self, text: str) -> list[int]:
        """For each token of the text, the character behind its last one."""
        if not getattr(self.tokenizer, "is_fast", False):
            pieces = [len(self.tokenizer.decode([token])) for token in self._ids(text)]
            return list(accumulate(pieces))
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return list(accumulate((end for _, end in offsets), max))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _piecewise(self, text: str, spans: Sequence[Span]) -> Marked:
        """Tokenise the text span by span."""
        cuts = sorted({0, len(text), *(edge for span in spans for edge in span)})
        made = Marked([], [])
        for start, end in pairwise(cuts):
            ids = self._inside(text[start:end]) if start else self._ids(text[:end])
            made.ids += ids
            made.learnt += [any(s <= start < e for s, e in spans)] * len(ids)
        return made

    def _inside(self, piece: str) -> list[int]:
        """A piece from the middle of a text: behind a line break, so that no tokenizer adds its space for a text's start."""
        ids, lead = self._ids("\n" + piece), self._line_break
        return ids[len(lead) :] if ids[: len(lead)] == lead else self._ids(piece)

    def _verify(self, texts: Sequence[str], spans: Sequence[Sequence[Span]], marked: Sequence[Marked]) -> None:
        """Decode what is marked and compare it with the spans: a tokenizer with false offsets would teach the prompt."""
        said = ["".join(text[start:end] for start, end in marks) for text, marks in zip(texts, spans, strict=True)]
        learnt = [[token for token, taken in zip(row.ids, row.learnt, strict=True) if taken] for row in marked]
        for expected, found in zip(said, self.tokenizer.batch_decode(learnt, skip_special_tokens=False), strict=True):
            if _squashed(found) != _squashed(expected) and _squashed(found) != self._round_trip(expected):
                raise ModelError(
                    f"the tokenizer's offsets are wrong: the answer {expected[:80]!r} was found as {found[:80]!r}; "
                    "train with another tokenizer file of this model"
                )

    def _round_trip(self, text: str) -> str:
        """What is left of a text by a tokenizer that loses something (lower case, unknown characters)."""
        return _squashed(self.tokenizer.decode(self._inside(text), skip_special_tokens=False))


def _marks(ends: list[int], spans: Sequence[Span]) -> list[bool] | None:
    """Which tokens overlap the spans, or None when one of them also holds characters from before a span."""
    ends = list(accumulate(ends, max))
    learnt = [False] * len(ends)
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_right(ends, end)
        if (ends[first - 1] if first else 0) < start:
            return None
        if last == 0 or ends[last - 1] < end:
            last = min(last + 1, len(ends))
        learnt[first:last] = [True] * (last - first)
    return learnt


def _squashed(text: str) -> str:
    """Without white space and compatibility forms, which tokenizers may change without harm."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return "".join(plain.split())
