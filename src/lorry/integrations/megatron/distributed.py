"""Adapters in Megatron's own distributed checkpoints: those that hold them, and those of the base, which
do not.

    state = load_distributed(model, {"model": chunk.sharded_state_dict()}, "checkpoints/iter_0000100")
    chunk.load_state_dict(state["model"])
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from lorry.errors import ModelError
from lorry.integrations.megatron.attach import MegatronAdapter, get_adapter, list_chunks
from lorry.integrations.megatron.files import Model, on_every_rank
from lorry.notes import NoteCallback


def load_distributed(
    model: Model,
    sharded_state_dict: dict[str, Any],
    folder: str | Path,
    *given: Any,
    add_note: NoteCallback = warnings.warn,
    over_trained: bool = False,
    load: Callable[..., Any] = dist_checkpointing.load,
    **options: Any,
) -> dict[str, Any]:
    """`dist_checkpointing.load` (``load``, with what else is given) for a model with adapters. What it
    returns always holds them. A checkpoint without any, of the base, is allowed once, before anything
    was trained, and said, and leaves them as they are; ``over_trained``: at any time, for a reference
    that is scored without them. One that has some and lacks others is refused. Raises ModelError."""
    chunks = list_chunks(model)
    places = dict(_lora_entries(sharded_state_dict))
    wanted = {entry.key for entry in places.values()}
    stored = set(dist_checkpointing.load_tensors_metadata(str(folder)))
    missing = sorted(wanted - stored)
    if missing and (len(missing) < len(wanted) or any(".lora_" in key for key in stored)):
        raise ModelError(
            f"{folder}: has no {missing[0]} ({len(missing)} such); its adapters are others than this "
            "model's (rank, targets or lora_mode)"
        )
    if missing:

        def refuse_trained() -> None:
            if not over_trained and not all(_is_new(get_adapter(chunk)) for chunk in chunks):
                raise ModelError(
                    f"{folder}: holds no adapters, and this model's are not new: they would stay as they "
                    "are over what was loaded beneath them; load a checkpoint with adapters"
                )

        on_every_rank(chunks, refuse_trained)
        add_note(
            f"{folder} holds no adapters: the base was loaded, and the adapters are as they were"
        )
        for path in places:
            del _parent(sharded_state_dict, path)[path[-1]]
    loaded: dict[str, Any] = load(sharded_state_dict, str(folder), *given, **options)
    if missing:
        # whoever loads this into the model does so strictly
        for path, entry in places.items():
            _parent(loaded, path)[path[-1]] = entry.data
    for chunk in chunks:
        get_adapter(chunk).is_new = False
    return loaded


def _is_new(adapter: MegatronAdapter) -> bool:
    """Whether nothing was loaded into it or trained: B starts at zero."""
    matrices = (
        getattr(linear, term.parameter("B"))
        for linear in adapter.linears.values()
        for term in linear.lora.terms
    )
    return adapter.is_new and not any(bool(b.any()) for b in matrices)


def _lora_entries(
    entries: Any, path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(keys that lead to it, entry) of every adapter's entry of a nested state dict."""
    for key, value in entries.items() if isinstance(entries, dict) else ():
        if isinstance(key, str) and ".lora_" in key and hasattr(value, "key"):
            yield (*path, key), value
        else:
            yield from _lora_entries(value, (*path, key))


def _parent(entries: dict[Any, Any], path: tuple[Any, ...]) -> dict[Any, Any]:
    """The dictionary in which a path ends."""
    for key in path[:-1]:
        entries = entries[key]
    return entries
