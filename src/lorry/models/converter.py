"""What takes a decoder that has its weights for another implementation of its layers, such as
Megatron-core's (`backends.distributed.megatron`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lorry.families import ModelFamily
from lorry.models.causal_lm import CausalLM
from lorry.models.decoder.model import Decoder


class ModelConverter(Protocol):
    """`convert(decoder)`, on every rank that shares the decoder, gives the model that runs in its place;
    the decoder may be empty afterwards."""

    def __call__(self, decoder: Decoder) -> CausalLM: ...
    def refuse_unfit(self, family: ModelFamily | None, config: Mapping[str, Any], why: str) -> None:
        """Raise ConfigError for a model of this description that has no such layers; ``why``: there is
        no family."""
