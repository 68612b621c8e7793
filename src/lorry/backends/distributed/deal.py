"""Which rank runs which sequences of a step, and which prompts it answers.

Every rank reads the whole step, which is that of one device, and takes its part: so a step is the same
on any number of ranks, and every rank knows the weight of each loss term over all of them without
asking. Dealt are whole groups of sequences, the longest first, each to the rank with the fewest tokens
so far: ranks that wait for each other should have as much to do. What an answer says hangs on its prompt and its
number alone, never on who shared the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lorry.adapters.mix import Mix
from lorry.backends.distributed.communicator import Communicator
from lorry.data.batch import Batch
from lorry.data.stream.joint import join_batches, select_sequences
from lorry.errors import ConfigError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams

Adapters = Mix | Sequence[Mix | str | None] | str | None


def deal_batches(batches: Sequence[Batch], ranks: int, step: int) -> list[list[Batch | None]]:
    """[ranks][passes]: a step's micro-batches, dealt; a function of (batches, ranks, step). Every rank
    has as many passes, None where there is nothing for it. Neighbours with too few groups for all
    ranks share a pass, so that one row in a micro-batch leaves nobody idle.

    The parts have no terms: their weights are those of the whole step (`term_totals`).
    """
    dealt: list[list[Batch | None]] = [[] for _ in range(ranks)]
    window = list[tuple[Batch, list[list[int]]]]()
    for number, batch in enumerate(batches):
        window.append((batch, _groups(batch)))
        is_last = number == len(batches) - 1
        if is_last or sum(len(groups) for _, groups in window) >= ranks:
            for passes, parts in zip(dealt, _deal_window(window, ranks, step), strict=True):
                passes += parts
            window = []
    return dealt


def _groups(batch: Batch) -> list[list[int]]:
    """The sequences of a batch that must stay together, in the order of the first of each."""
    groups = dict[tuple[str, int], list[int]]()
    for s, group in enumerate(batch.group.tolist()):
        # -1: in no group, so it is one of its own
        key = ("alone", s) if group < 0 else ("group", group)
        groups.setdefault(key, []).append(s)
    return list(groups.values())


def _deal_window(
    window: Sequence[tuple[Batch, list[list[int]]]], ranks: int, step: int
) -> list[list[Batch | None]]:
    """[ranks][passes]: one pass for each rank, or one for each batch where they cannot be joined."""
    tokens = [0] * ranks
    # chosen[rank][batch]: sequences
    chosen: list[list[list[int]]] = [[[] for _ in window] for _ in range(ranks)]
    items = [
        (sum(int(batch.lengths[s]) for s in group), number, group)
        for number, (batch, groups) in enumerate(window)
        for group in groups
    ]
    # stable: among equals the order of the batch
    for size, number, group in sorted(items, key=lambda item: -item[0]):
        # among ranks with as many tokens another one is first in every step
        rank = min(range(ranks), key=lambda r: (tokens[r], (r - step) % ranks))
        tokens[rank] += size
        chosen[rank][number] += group
    # in the batch's order, as one device has them
    parts = [
        [
            select_sequences(batch, sorted(sequences)) if sequences else None
            for (batch, _), sequences in zip(window, own, strict=True)
        ]
        for own in chosen
    ]
    # a tensor that one of the batches lacks keeps them apart, on every rank alike
    if len({tuple(batch.extra) for batch, _ in window}) > 1:
        return [list(own) for own in parts]
    joined = [[part for part in own if part is not None] for own in parts]
    return [[join_batches(own) if own else None] for own in joined]


def generate_together(
    communicator: Communicator,
    generate: Callable[..., list[Completion]],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    adapters: Adapters = None,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> list[Completion]:
    """Answers to all prompts on every rank, each having answered its own, however long one takes
    for them. A prompt keeps its number, so that it draws as on one device. Raises ConfigError for
    lists of unequal length, and what ``generate`` raises.
    """
    count = len(prompts)
    numbers = list(range(count)) if rows is None else list(rows)
    each = [params] * count if isinstance(params, SamplingParams) else list(params)
    mixes: list[Mix | str | None] | None = None
    if adapters is not None and not isinstance(adapters, (str, Mix)):
        mixes = list(adapters)
    if {len(each), len(numbers), count if mixes is None else len(mixes)} != {count}:
        raise ConfigError(f"there are {count} prompts; give params, adapters and rows for each")
    # what a prompt may take: its own tokens and those of the longest answer
    sizes = [len(p) + one.max_new_tokens for p, one in zip(prompts, each, strict=True)]
    mesh = communicator.mesh
    own = deal_requests(sizes, mesh.data_size)[mesh.data_rank]
    answers = generate(
        [prompts[n] for n in own],
        [each[n] for n in own],
        adapters=adapters if mixes is None else [mixes[n] for n in own],
        rows=[numbers[n] for n in own],
        **options,
    )
    parts = communicator.await_all(
        "answers", [[n, asdict(answer)] for n, answer in zip(own, answers, strict=True)]
    )
    whole = {n: Completion(**answer) for part in parts for n, answer in part}
    return [whole[n] for n in range(count)]


def deal_requests(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """[ranks][...]: the number of each request, the largest first to the rank with the least so
    far; in their order on each.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    held = [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        rank = min(range(ranks), key=lambda r: held[r])
        dealt[rank].append(number)
        held[rank] += sizes[number]
    return [sorted(numbers) for numbers in dealt]
