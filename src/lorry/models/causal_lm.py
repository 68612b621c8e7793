"""CausalLM: what the rest of the house may ask of a model. Lorry's own decoder and transformers'
models both declare it.

T packed tokens, D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.attach import default_context, get_bank
from lorry.adapters.mix import AdapterContext, Mix, MixTerm, SequenceRouter
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.tensor_parallel.slices import DimensionSlice
from lorry.adapters.variants.alora import with_invocations
from lorry.errors import ContractError
from lorry.models.layer_weights import WHOLE_WEIGHTS, LayerWeights

# prompt tokens in one pass of the base, unless a single prompt is longer: products at full speed,
# and activations far below what the weights take
PROMPT_TOKENS = 2048
BASE_ALONE = Mix.none()


@dataclass(frozen=True)
class PackedInput:
    """What a model reads: tokens [T], positions [T], and the segments attention stays within.

    ``places`` [F] int64: of sequences that share prefixes, where each token of the segments stands
    among ``tokens``; segments count these places then. None: they are the tokens in order.
    """

    tokens: Tensor
    positions: Tensor
    segments: Sequence[tuple[int, int]]
    places: Tensor | None = None

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

    def without_beginnings(self, counts: Sequence[int]) -> tuple[PackedInput, Tensor]:
        """What is behind the first ``counts`` [S] tokens of each sequence, fewer than it has, at the
        positions that it has; and its rows [t] among these."""
        rows = torch.cat(
            [
                torch.arange(start + count, stop)
                for (start, stop), count in zip(self.segments, counts, strict=True)
            ]
        ).to(self.tokens.device)
        lengths = [
            stop - start - count for (start, stop), count in zip(self.segments, counts, strict=True)
        ]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        segments = list(zip([0, *ends[:-1]], ends, strict=True))
        return PackedInput(self.tokens[rows], self.positions[rows], segments), rows

    def padded(self, total: int) -> PackedInput:
        """With a sequence of zeros (all at position 0: the context may be short) behind the others,
        up to ``total`` tokens.
        """
        # a sequence of its own, so that attention by segment keeps it apart
        tokens = self.tokens.numel()
        more, end = total - tokens, self.segments[-1][1]
        places = self.places
        if places is not None:
            places = torch.cat([places, torch.arange(tokens, total, device=places.device)])
        return PackedInput(
            F.pad(self.tokens, (0, more)),
            F.pad(self.positions, (0, more)),
            [*self.segments, (end, end + more)],
            places,
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
    # the processes that share its matrices (tensor parallel); None: it is whole
    ranks: TensorRanks | None = None
    # whether they also divide, by tokens, what layers keep for backward
    sequence_parallel = False
    # where the weights of the layers are; `loading.load` puts another in its place
    layer_weights: LayerWeights = WHOLE_WEIGHTS
    # whether `hidden` takes sequences that share prefixes (`PackedInput.places`)
    shares_prefixes = False

    def cut_tensors(self) -> dict[str, tuple[int, DimensionSlice]]:
        """{name: (dimension, part)} of the tensors of which this rank has a part; none of a whole model."""
        return {}

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    def shapes_follow_tokens(self) -> bool:
        """Whether shapes of a pass's products hang on what its tokens are: an expert that is a whole
        MLP reads as many rows as chose it, so that neighbours in a batch move the rounding.
        """
        return False

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
        # what is given is the prompt: this call knows of no answer behind it
        lengths = [stop - start for start, stop in packed.segments]
        call = with_prompt_gates(self, packed, default_context(self), lengths)
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
    """How many numbers a model holds, tied ones once; of one that ranks share all of theirs."""
    cut = model.cut_tensors() if isinstance(model, CausalLM) else {}
    total = 0
    for name, p in model.named_parameters():
        part = cut[name][1] if name in cut else None
        total += p.numel() if part is None else p.numel() // part.size * part.whole
    return total


@torch.no_grad()
def prompt_states(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    layer: int | None,
    pooling: str,
    mix: Mix = BASE_ALONE,
) -> Tensor:
    """[S,D] float32: the hidden state of each prompt under a mix of whole-batch terms: of ``layer``'s
    output (0-based; None: after the final norm), `pooled_states` over the prompt's tokens. Layers
    above are not run.
    """
    rows: list[Tensor] = []
    for group in _prompt_groups(prompts):
        packed = PackedInput.of(group, model.device)
        wanted = [] if layer is None else [layer]
        states = model.hidden(packed, AdapterContext(mix), output_layers=wanted, stop=layer)
        hidden = states.last if layer is None else states.layer_outputs[layer]
        assert hidden is not None
        rows.append(pooled_states(hidden, packed.segments, pooling))
    return torch.cat(rows)


def pooled_states(hidden: Tensor, spans: Sequence[tuple[int, int]], pooling: str) -> Tensor:
    """hidden [T,D] -> [S,D] float32: of each span of tokens the ``mean``, or the ``last`` one's."""
    return torch.stack(
        [
            hidden[stop - 1].float() if pooling == "last" else hidden[start:stop].float().mean(0)
            for start, stop in spans
        ]
    )


def prompt_gates(
    model: CausalLM, prompts: Sequence[Sequence[int]], router: SequenceRouter
) -> Tensor:
    """[S, adapters]: the gates that a router of the sequence makes of each prompt. Equal ones are run
    once: the options of a question and several answers to it have one prompt."""
    number_of = {prompt: n for n, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    states = prompt_states(model, list(number_of), router.layer, router.pooling, router.state_mix)
    return router.gates(states)[[number_of[tuple(prompt)] for prompt in prompts]]


def _prompt_groups(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The prompts in their order, as many together as `PROMPT_TOKENS` takes."""
    group: list[Sequence[int]] = []
    held = 0
    for prompt in prompts:
        if group and held + len(prompt) > PROMPT_TOKENS:
            yield group
            group, held = [], 0
        group.append(prompt)
        held += len(prompt)
    if group:
        yield group


def invoke(model: CausalLM, packed: PackedInput, call: AdapterContext) -> AdapterContext:
    """The call with the gates of adapters that tokens invoke, of these; the call itself without one."""
    if not call.mix.terms:
        return call
    bank = get_bank(model, create=True)
    mix = with_invocations(bank, call.mix, packed.tokens, packed.segments)
    return call if mix is call.mix else replace(call, mix=mix)


def with_prompt_gates(
    model: CausalLM, packed: PackedInput, call: AdapterContext, lengths: Sequence[int]
) -> AdapterContext:
    """The call with what of its mix hangs on whole sequences: the gates of adapters that tokens invoke
    (`variants.alora`), and those that its `SequenceRouter` makes of each sequence's prompt, the first
    ``lengths`` [S] tokens of it; the call itself where it has neither.

    One pass of the base over the prompts of the sequences that are routed. Raises ContractError for
    a term that is for a part of a sequence: gates are a sequence's.
    """
    call = invoke(model, packed, call)
    router = call.mix.sequence_router
    if router is None:
        return call
    own = [
        [term for term in call.mix.terms if term.route is not None and _holds(term, start, stop)]
        for start, stop in packed.segments
    ]
    routed = [s for s, terms in enumerate(own) if terms]
    starts = [start for start, _ in packed.segments]
    prompts = [packed.tokens[starts[s] : starts[s] + lengths[s]].tolist() for s in routed]
    gates = prompt_gates(model, prompts, router).tolist() if routed else []
    terms = [term for term in call.mix.terms if term.route is None]
    for s, row in zip(routed, gates, strict=True):
        rows = None if len(packed.segments) == 1 else slice(*packed.segments[s])
        for term in own[s]:
            assert term.route is not None
            assert not isinstance(term.gate, Tensor)
            if gate := row[term.route] * term.gate:
                terms.append(MixTerm(term.adapter, rows, gate))
    return replace(call, mix=Mix(tuple(terms), call.mix.router))


def _holds(term: MixTerm, start: int, stop: int) -> bool:
    """Whether a term is for this sequence."""
    if term.rows is None or (term.rows.start <= start and stop <= term.rows.stop):
        return True
    if stop <= term.rows.start or term.rows.stop <= start:
        return False
    raise ContractError(
        f"the adapter {term.adapter!r} is routed by the prompt and is for a part of a sequence; "
        "gates of a prompt are those of the whole sequence"
    )


def add_at(tree: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, with whatever leads there."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in tree._modules:
            tree.add_module(name, nn.Module())
        tree = tree.get_submodule(name)
    tree.add_module(leaf, module)
