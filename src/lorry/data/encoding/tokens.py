"""Text to tokens with known characters: which token holds which part of the text.

A fast tokenizer gives the characters of each token (offsets). Only their ends are used: byte-level
tokenizers trim the white space at a token's start out of its offsets, never what comes before the
next token's end.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from lorry.errors import ModelError

TextSpan = tuple[int, int]
OPENERS_KEPT = 4096


@dataclass
class MarkedTokens:
    """Token ids, and for each whether it belongs to a supervised span; ``barred``: numbers of the
    tokens that touch a character which must not be learnt."""

    ids: list[int]
    learnt: list[bool]
    barred: frozenset[int] = frozenset()


class TextTokenizer:
    """A tokenizer, wrapped. ``opening`` are the ids it puts before every text (a BOS, mostly),
    ``end`` its EOS id or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end: int | None = tokenizer.eos_token_id
        # a letter that every vocabulary has, so what surrounds it is what the tokenizer adds itself
        bare, dressed = self._ids("a"), list(tokenizer("a", add_special_tokens=True)["input_ids"])
        cuts = [at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare]
        self.opening: list[int] = dressed[: cuts[0]] if cuts else []
        self._line_break = self._ids("\n")
        # of the headers of a template there are few, but openers of plain rows are lines of text
        self.opener_ids = lru_cache(OPENERS_KEPT)(lambda opener: self._inside(opener)[0])

    def many(
        self, texts: Sequence[str], spans: Sequence[Sequence[TextSpan]], openers: Sequence[str],
        unlearnt: Sequence[Sequence[TextSpan]] | None = None,
    ) -> list[MarkedTokens]:  # fmt: skip
        """Tokenise each text, no special tokens added, and mark the tokens of its spans.

        Each text is tokenised as a whole, as transformers does, unless that would change what stands before an answer:
        at inference the prompt ends there, and ``\\n\\n`` at the end of a text may be one token where before a word it is
        two. So the tokens of ``openers`` (the text known to stand before each span) are compared with what they are at a
        text's end; where they differ, or a token reaches across, the sides are tokenised on their own.

        ``unlearnt`` changes no token: those that touch its characters are named in ``MarkedTokens.barred``.
        """
        unlearnt = [()] * len(texts) if unlearnt is None else unlearnt
        # only fast tokenizers know characters
        if not getattr(self.tokenizer, "is_fast", False):
            return [
                self._piecewise(text, marks, barred)
                for text, marks, barred in zip(texts, spans, unlearnt, strict=True)
            ]
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            padding=False,
            verbose=False,
        )
        done = []
        columns = zip(
            texts,
            encoded["input_ids"],
            encoded["offset_mapping"],
            spans,
            openers,
            unlearnt,
            strict=True,
        )
        for text, ids, offsets, marks, opener, barred in columns:
            ends = _token_ends(offsets)
            cuts = self._unclean(ids, ends, marks, opener)
            marked = (
                self._broken_up(text, marks, cuts, barred)
                if cuts
                else MarkedTokens(
                    list(ids), _mark_spans(ends, marks), _tokens_touching(ends, barred)
                )
            )
            done.append(marked)
        # offsets are believed only after what they mark was decoded
        self._verify(texts, spans, done)
        return done

    def one(
        self,
        text: str,
        spans: Sequence[TextSpan] = (),
        opener: str = "",
        unlearnt: Sequence[TextSpan] = (),
    ) -> MarkedTokens:
        """``many`` for a single text."""
        return self.many([text], [spans], [opener], [unlearnt])[0]

    def ids_and_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text, and for each the character behind its last one."""
        if not getattr(self.tokenizer, "is_fast", False):
            ids = self._ids(text)
            return ids, list(accumulate(len(self.tokenizer.decode([token])) for token in ids))
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(encoding["input_ids"]), _token_ends(encoding["offset_mapping"])

    def _unclean(
        self, ids: list[int], ends: list[int], spans: Sequence[TextSpan], opener: str
    ) -> list[int]:
        """The starts of spans before which the tokens are not what they would be if the text ended
        there.
        """
        expected = self.opener_ids(opener) if opener else []
        # number of the first token that reaches beyond the start of each span
        firsts = [bisect_right(ends, start) for start, _ in spans]
        return [
            start
            for (start, _), first in zip(spans, firsts, strict=True)
            # a token reaches across the start, or the opener is split otherwise than at a text's
            # end
            if (ends[first - 1] if first else 0) < start
            or ids[max(0, first - len(expected)) : first] != expected
        ]

    def _broken_up(
        self,
        text: str,
        spans: Sequence[TextSpan],
        cuts: Sequence[int],
        unlearnt: Sequence[TextSpan],
    ) -> MarkedTokens:
        """Tokenise the stretches between the cuts on their own."""
        marked, all_ends = MarkedTokens([], []), list[int]()
        for start, end in pairwise([0, *cuts, len(text)]):
            ids, ends = self._inside(text[start:end]) if start else self.ids_and_ends(text[:end])
            marked.ids += ids
            marked.learnt += _mark_spans(
                ends,
                [
                    (max(s, start) - start, min(e, end) - start)
                    for s, e in spans
                    if s < end and e > start
                ],
            )
            all_ends += [start + edge for edge in ends]
        return MarkedTokens(marked.ids, marked.learnt, _tokens_touching(all_ends, unlearnt))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _inside(self, piece: str) -> tuple[list[int], list[int]]:
        """A piece from the middle of a text: behind a line break, so that no tokenizer adds its
        space for a text's start.
        """
        # SentencePiece puts a space before a text, never behind a line break
        ids, ends = self.ids_and_ends("\n" + piece)
        lead = len(self._line_break)
        return (
            (ids[lead:], [end - 1 for end in ends[lead:]])
            if ids[:lead] == self._line_break
            else self.ids_and_ends(piece)
        )

    def _piecewise(
        self, text: str, spans: Sequence[TextSpan], unlearnt: Sequence[TextSpan]
    ) -> MarkedTokens:
        """For a tokenizer without offsets: every stretch inside and outside of the spans on its
        own.
        """
        # all edges, so that every stretch lies wholly inside or outside of each span
        cuts = sorted({0, len(text), *(edge for span in (*spans, *unlearnt) for edge in span)})
        marked, barred = MarkedTokens([], []), set[int]()
        for start, end in pairwise(cuts):
            ids = self._ids(text[start:end])
            if any(s <= start < e for s, e in unlearnt):
                barred.update(range(len(marked.ids), len(marked.ids) + len(ids)))
            marked.ids += ids
            marked.learnt += [any(s <= start < e for s, e in spans)] * len(ids)
        return MarkedTokens(marked.ids, marked.learnt, frozenset(barred))

    def _verify(
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[TextSpan]],
        marked: Sequence[MarkedTokens],
    ) -> None:
        """Decode what is marked and compare it with the spans: a tokenizer with false offsets would
        teach the prompt.
        """
        expected_ids = [
            "".join(text[start:end] for start, end in marks)
            for text, marks in zip(texts, spans, strict=True)
        ]
        learnt = [
            [token for token, is_learnt in zip(row.ids, row.learnt, strict=True) if is_learnt]
            for row in marked
        ]
        for expected, actual in zip(
            expected_ids,
            self.tokenizer.batch_decode(learnt, skip_special_tokens=False),
            strict=True,
        ):
            if _strip_space(actual) != _strip_space(expected) and _strip_space(
                actual
            ) != self._round_trip(expected):
                raise ModelError(
                    "the tokenizer's offsets are wrong: the answer "
                    f"{expected[:80]!r} was found as {actual[:80]!r}; use another "
                    "tokenizer file of this model"
                )

    def _round_trip(self, text: str) -> str:
        """What is left of a text by a tokenizer that loses something (lower case, unknown
        characters).
        """
        return _strip_space(self.tokenizer.decode(self._inside(text)[0], skip_special_tokens=False))


def _token_ends(offsets: Sequence[TextSpan]) -> list[int]:
    """For each token the character behind it, never before that of an earlier token."""
    ends = [end for _, end in offsets]
    # sorted() of what is sorted already is one pass in C; nearly all offsets are
    return ends if sorted(ends) == ends else list(accumulate(ends, max))


def _mark_spans(ends: list[int], spans: Sequence[TextSpan]) -> list[bool]:
    """Which tokens overlap the spans."""
    learnt = [False] * len(ends)
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_right(ends, end)
        if last == 0 or ends[last - 1] < end:
            last = min(last + 1, len(ends))
        learnt[first:last] = [True] * (last - first)
    return learnt


def _tokens_touching(ends: list[int], spans: Sequence[TextSpan]) -> frozenset[int]:
    """Numbers of the tokens that hold a character of the spans; those that hold no character go
    with the one before them.
    """
    touched = set[int]()
    for start, end in spans:
        touched.update(
            number for number, mark in enumerate(_mark_spans(ends, [(start, end)])) if mark
        )
    return frozenset(touched)


def _strip_space(text: str) -> str:
    """Without white space and compatibility forms, which tokenizers may change without harm."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return "".join(plain.split())
