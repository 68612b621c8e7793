"""Open a model for a verb: what a person should know about it goes to standard error, and a missing
tokenizer is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorry.config.schema.model import ModelConfig
from lorry.errors import ConfigError, ModelError
from lorry.imports import kept_imports
from lorry.visible import make_visible

if TYPE_CHECKING:
    from lorry.backends.distributed.communicator import Communicator
    from lorry.models.converter import ModelConverter
    from lorry.models.layer_weights import Sharder
    from lorry.models.loading.open import OpenedModel
    from lorry.train.processes import PlacedSettings

MIXTURE_SIDE = "mixture"  # all experts, as the router has them


def print_note(text: str) -> None:
    """A line beside the results."""
    print(make_visible(text), file=sys.stderr, flush=True)


def open_with_adapters(
    config: ModelConfig,
    *,
    adapters: Sequence[str] = (),
    as_start: bool = False,
    communicator: Communicator | None = None,
    shard: Sharder | None = None,
    convert: ModelConverter | None = None,
) -> OpenedModel:
    """The model with its adapters (``as_start``: its one as a part of the frozen base) and its
    tokenizer. ``communicator``: the processes that open it together, and may share it; ``shard``,
    ``convert``: as in `load_model`. Raises ModelError when there is none.
    """
    with kept_imports():
        from lorry.backends.distributed.tensor_ranks import tensor_ranks
        from lorry.models.loading.open import open_model

    notes: list[str] = []
    ranks = None if communicator is None else tensor_ranks(communicator)
    opened = open_model(
        config,
        notes.append,
        adapters=adapters,
        as_start=as_start,
        ranks=ranks,
        shard=shard,
        convert=convert,
    )
    for note in notes:
        print_note(f"note: {note}")
    # `lorry.load` gives such a model to Python; every verb reads or writes text
    if opened.tokenizer is None:
        raise ModelError(
            f"{config.name} has no tokenizer; put its tokenizer.json beside the weights"
        )
    return opened


def open_to_write(config: ModelConfig, *, adapters: Sequence[str] = ()) -> OpenedModel:
    """The same for a verb that writes weights: matrices that the adapter's base held in few bits are
    whole again, with the values the adapter was trained over. Raises what `open_with_adapters` raises.
    """
    from lorry.adapters.quantization.linear import open_linears, quantization_of

    opened = open_with_adapters(config, adapters=adapters)
    if (quantization := quantization_of(opened.model)) is not None:
        if not quantization.keeps_values:
            print_note(
                f"note: the base counts as {quantization.name} held it when the adapter was trained, and is "
                "written whole"
            )
        open_linears(opened.model)
    return opened


def open_on_ranks(
    settings: PlacedSettings,
    communicator: Communicator,
    config: ModelConfig | None = None,
    *,
    as_start: bool = False,
) -> OpenedModel:
    """The model of a command (or another of its models, ``config``) with its adapters, on every rank of
    it as its backend has it. ``as_start`` and what is raised: as `open_with_adapters`."""
    from lorry.backends.distributed.fsdp import sharder_of
    from lorry.backends.distributed.megatron import converter_of

    shard = sharder_of(settings.backend, communicator, settings.model.device)
    convert = converter_of(settings.backend, settings.model, communicator, print_note)
    return open_with_adapters(
        config or settings.model,
        as_start=as_start,
        communicator=communicator,
        shard=shard,
        convert=convert,
    )


def base_side(opened: OpenedModel) -> str:
    """What a model without its adapters is called: base, or start where a frozen adapter that they
    were trained over is a part of it.
    """
    from lorry.adapters.attach import get_bank

    return "base" if get_bank(opened.model, create=True).start is None else "start"


def resolve_adapter_name(opened: OpenedModel, requested: str | None, name: str) -> str:
    """The adapter that is meant: the one asked for, or the only one. Raises ConfigError otherwise."""
    known = ", ".join(opened.adapters)
    if not opened.adapters:
        raise ConfigError(
            f"{name} is a plain model and has no adapter; name a run or an adapter directory"
        )
    if requested is not None and requested not in opened.adapters:
        raise ConfigError(f"adapter={requested}: {name} has no such adapter; it has {known}")
    if requested is None and len(opened.adapters) > 1:
        raise ConfigError(f"{name} has several adapters; choose with adapter=NAME: {known}")
    return requested or opened.adapters[0]
