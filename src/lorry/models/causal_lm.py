"""CausalLM: what the rest of the house may ask of a model. Lorry's own decoder and transformers'
models both declare it.

T packed tokens, D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import default_context
from lorry.adapters.mix import AdapterContext


@dataclass(frozen=True)
class PackedInput:
    """What a model reads: tokens [T], positions [T], and the segments attention stays within."""

    tokens: Tensor
    positions: Tensor
    segments: Sequence[tuple[int, int]]

    @staticmethod
    def of(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> PackedInput:
        """Lay token lists end to end."""
        # exclusive ends: sequence i is tokens ends[i-1] to ends[i]
        ends = torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()
        segments = list(zip([0, *ends[:-1]], ends, strict=True))
        tokens = torch.tensor([t for s in sequences for t in s], device=device)
        # every sequence counts from 0: packing must not move anybody
        positions = torch.cat([torch.arange(len(s)) for s in sequences]).to(device)
        return PackedInput(tokens, positions, segments)

    def padded(self, total: int) -> PackedInput:
        """With a sequence of zeros (all at position 0: the context may be short) behind the others,
        up to ``total`` tokens.
        """
        # a sequence of its own, so that attention by segment keeps it apart
        more = total - self.tokens.numel()
        return PackedInput(
            F.pad(self.tokens, (0, more)),
            F.pad(self.positions, (0, more)),
            [*self.segments, (total - more, total)],
        )


@dataclass
class DecoderOutput:
    """What `model(input_ids)` returns: logits [B, T, V]."""

    logits: Tensor


@dataclass
class HiddenStates:
    """last [T,D] after the final norm (None when the pass stopped early);
    layer_outputs: {layer: [T,D], its output}; router_logits: what the call's router made, layer by
    layer and half by half, [T, adapters] each.
    """

    last: Tensor | None
    layer_outputs: Mapping[int, Tensor] = field(default_factory=dict)
    router_logits: Sequence[Tensor] = ()


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

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> DecoderOutput:
        """input_ids [B,T], or [T] for one -> logits [B,T,V]. attention_mask [B,T] may mark padding
        (0) on either side; the logits there are zero."""
        input_ids = input_ids[None] if input_ids.dim() == 1 else input_ids
        keep = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask.bool()
        )
        ends = keep.sum(1).cumsum(0).tolist()
        packed = PackedInput(
            # row by row, padding dropped: the packed order of what is left
            input_ids[keep],
            # positions count real tokens, so padding on the left does not shift them
            (keep.cumsum(1) - 1)[keep],
            list(zip([0, *ends[:-1]], ends, strict=True)),
        )
        call = default_context(self)
        logits = self.logits(self.hidden(packed, call).last, call)
        # zeros where padding is: nothing was computed there
        out = logits.new_zeros(*input_ids.shape, logits.shape[-1])
        out[keep] = logits
        return DecoderOutput(out)

    @abstractmethod
    def hidden(
        self,
        packed: PackedInput,
        call: AdapterContext,
        *,
        output_layers: Collection[int] = (),
        stop: int | None = None,
    ) -> HiddenStates:
        """Hidden states of packed tokens under the call's mix. ``output_layers``: layers whose
        output is wanted; ``stop``: the last to run.
        """

    @abstractmethod
    def logits(self, hidden: Tensor | None, call: AdapterContext) -> Tensor:
        """The head on final hidden states [t,D] -> [t,V]."""

    @abstractmethod
    def new_cache(self, rows: int, room: int) -> Any:
        """An empty key/value cache for so many rows of so many tokens. It has ``lengths`` [B],
        ``add_rows(count, room)`` and ``keep(rows)``.
        """

    @abstractmethod
    def forward_cached(
        self, packed: PackedInput, rows: Tensor, cache: Any, call: AdapterContext, *, decoding: bool
    ) -> Tensor:
        """Final hidden states of the newest tokens of cached rows."""


def parameter_count(model: nn.Module) -> int:
    """How many numbers a model holds, tied ones once."""
    return sum(p.numel() for p in model.parameters())
