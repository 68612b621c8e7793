"""Prompts answered by the ranks of a run, each its own: what an answer says hangs on its prompt and
its number alone, never on who shared the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lorry.adapters.mix import Mix
from lorry.backends.distributed.communicator import Communicator
from lorry.errors import ConfigError
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams

Adapters = Mix | Sequence[Mix | str | None] | str | None


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
