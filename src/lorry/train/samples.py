"""Samples of a run for a person to look at: held-out prompts answered before and after, and rows
exactly as they were trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorry.adapters.mix import Mix
from lorry.backends.protocol import ScoringBackend
from lorry.data.batch import Batch
from lorry.data.encoding.encode import EncodedSequence, ExampleEncoder
from lorry.generation.sampling import SamplingParams

# as many as a person looks through; generation at the end should take seconds
SAMPLE_ANSWERS, SAMPLE_ROWS, SAMPLE_NEW_TOKENS = 4, 3, 48
WeightedSequence = tuple[list[int], list[float]]


def build_samples(
    backend: ScoringBackend, trained: Mix, encoder: ExampleEncoder, train: Batch | None, groups: Mapping[str, Batch], ends: Collection[int],
    *, context: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of samples.json. Before is the base (the same weights under mix none), after what
    was ``trained``; both greedy. Where that is the base itself there is no before.
    ``groups``: rows whose prompts are answered, by the name of their group.

    ``context``: the most tokens the model takes; a prompt that leaves no room there is not asked.
    """
    room = None if context is None else context - SAMPLE_NEW_TOKENS
    rows = [
        {**row, "group": group}
        for group, batch in (groups if ends else {}).items()
        for row in sample_answers(backend, trained, encoder, batch, ends, room)
    ]
    for tokens, weights in split_sequences(train, SAMPLE_ROWS) if train is not None else []:
        marked_tokens = [
            {"text": t, "weight": float(learnt)}
            for t, learnt in encoder.marked_text(EncodedSequence(tokens, weights))
        ]
        rows.append(
            {
                "group": "training",
                "prompt": "",
                "reference": None,
                "before": None,
                "after": None,
                "tokens": marked_tokens,
            }
        )
    return rows


def sample_answers(
    backend: ScoringBackend,
    trained: Mix,
    encoder: ExampleEncoder,
    batch: Batch,
    ends: Collection[int],
    room: int | None,
) -> list[dict[str, Any]]:
    """Up to four rows: what stands before the last answer, asked of base and adapter."""
    questions = []
    for tokens, weights in split_sequences(batch, SAMPLE_ANSWERS):
        # [start, stop) is the last run of learnt tokens: the last answer of a chat of several turns
        stop = len(weights) - next(i for i, w in enumerate(reversed(weights)) if w)
        start = next((i + 1 for i in range(stop - 1, -1, -1) if not weights[i]), 0)
        # 1: everything is learnt, there is nothing to ask
        if start > 1 and (room is None or start <= room):
            questions.append((tokens[:start], tokens[start:stop]))
    prompts = [prompt for prompt, _ in questions]
    if not prompts:
        return []
    sides = {"before": Mix.none(), "after": trained} if trained.terms else {"after": trained}
    params = SamplingParams(max_new_tokens=SAMPLE_NEW_TOKENS, stop_token_ids=ends)
    # greedy for both: a difference is the adapter's and not the dice's
    completions = {
        side: backend.generate(prompts, params, adapters=mix) for side, mix in sides.items()
    }
    return [
        {
            "prompt": encoder.tokenizer.decode(prompt, skip_special_tokens=True),
            "tokens": None,
            "reference": encoder.tokenizer.decode(answer, skip_special_tokens=True).strip(),
            "before": None,
            **{
                side: encoder.tokenizer.decode(
                    completion[i].tokens, skip_special_tokens=True
                ).strip()
                for side, completion in completions.items()
            },
        }
        for i, (prompt, answer) in enumerate(questions)
    ]


def split_sequences(batch: Batch, most: int) -> Sequence[WeightedSequence]:
    """(tokens, weights) of a batch's first sequences."""
    return [
        (batch.tokens[a:b].tolist(), batch.weights[a:b].tolist()) for a, b in batch.segments[:most]
    ]
