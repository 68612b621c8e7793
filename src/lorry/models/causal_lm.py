"""CausalLM: what the rest of the house may ask of a model. Lorry's own decoder and transformers'
models both declare it.

T packed tokens, D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorry.adapters.mix import AdapterContext

if TYPE_CHECKING:
    from lorry.models.decoder.model import DecoderOutput, HiddenStates, PackedInput


class CausalLM(nn.Module, ABC):
    """A causal language model over packed tokens, with a bank's adapters in its linears.

    ``config``: the Hugging Face config as a dict. ``gradient_checkpointing``: layers are run again
    in backward.
    """

    config: dict[str, Any]
    gradient_checkpointing: Any

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens that have an embedding, and columns of the logits."""

    @property
    @abstractmethod
    def context(self) -> int | None:
        """The longest sequence, prompt and answer together; None where nothing bounds it."""

    @property
    @abstractmethod
    def head(self) -> nn.Module | None:
        """The output layer, where logits are plainly head(hidden); else None."""

    @abstractmethod
    def get_input_embeddings(self) -> nn.Module | None:
        """The layer that turns tokens into vectors, where the model tells."""

    @abstractmethod
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> DecoderOutput:
        """input_ids [B,T] -> logits [B,T,V]."""

    @abstractmethod
    def hidden(
        self,
        packed: PackedInput,
        call: AdapterContext,
        *,
        taps: Collection[int] = (),
        stop: int | None = None,
    ) -> HiddenStates:
        """Hidden states of packed tokens under the call's mix. ``taps``: layers whose output is
        wanted; ``stop``: the last to run.
        """

    @abstractmethod
    def logits(self, hidden: Tensor | None, call: AdapterContext) -> Tensor:
        """The head on final hidden states [t,D] -> [t,V]."""

    @abstractmethod
    def new_cache(self, rows: int, room: int) -> Any:
        """An empty key/value cache for so many rows of so many tokens. It has ``lengths`` [B] and
        ``keep(rows)``.
        """

    @abstractmethod
    def cached(
        self, packed: PackedInput, rows: Tensor, cache: Any, call: AdapterContext, *, decoding: bool
    ) -> Tensor:
        """Final hidden states of the newest tokens of cached rows."""


def parameter_count(model: nn.Module) -> int:
    """How many numbers a model holds, tied ones once."""
    return sum(p.numel() for p in model.parameters())
