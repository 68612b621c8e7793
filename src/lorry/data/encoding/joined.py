"""Texts that are read as one: joined with blank lines, then cut every so many tokens, as
open-unlearning reads MUSE's and WMDP's corpora (`PretrainingDataset`). Published numbers hang on it:
cut one by one the texts are more and shorter sequences, and an epoch has more steps.

Every sequence begins with the tokenizer's BOS, where it has one, and none with the last token of the
one before; no end of text is learnt, since a cut is none. Two things differ from the peer: the BOS
counts in max_length, and the tokens are those of the whole text, where the peer decodes each piece
and reads it again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

from lorry.data.encoding.encode import EncodedSequence, ExampleEncoder
from lorry.data.reading.content import TextDocument
from lorry.data.reading.formats import DataExample
from lorry.errors import DataError

TEXT_SEPARATOR = "\n\n"


def encode_joined(
    examples: Iterable[DataExample], encoder: ExampleEncoder
) -> Iterator[tuple[DataExample, list[EncodedSequence]]]:
    """Each text with the sequences that begin in it, often none. Raises DataError for a row that is
    no text, and a token that the model has no embedding of.
    """
    rows, texts = list(examples), list[str]()
    for row in rows:
        if not isinstance(row.content, TextDocument):
            raise DataError(
                f"{row.where}: a row with turns, where all rows have to be plain text to be joined"
            )
        texts.append(row.content.text)
    ids, ends = encoder.tokens.ids_and_ends(TEXT_SEPARATOR.join(texts))
    encoder.expect_known(ids)
    # [rows] the character that each text begins at
    begins = [0, *accumulate(len(text) + len(TEXT_SEPARATOR) for text in texts)][: len(rows)]
    opening = encoder.tokens.opening
    size = max(encoder.max_length - len(opening), 1)
    pieces: list[list[EncodedSequence]] = [[] for _ in rows]
    for at in range(0, len(ids), size):
        tokens = [*opening, *ids[at : at + size]]
        # the first token follows nothing, and a BOS is not learnt
        unlearnt = max(len(opening), 1)
        if len(tokens) == unlearnt:
            continue
        place = bisect_right(begins, ends[at - 1] if at else 0) - 1
        weights = [0.0] * unlearnt + [1.0] * (len(tokens) - unlearnt)
        pieces[place].append(EncodedSequence(tokens, weights))
    yield from zip(rows, pieces, strict=True)
