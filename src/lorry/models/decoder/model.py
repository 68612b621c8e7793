"""Lorry's own decoder: one class for every family, driven by family data, over packed tokens, under
Hugging Face names.

It exists for speed and exactness: packed attention by segment, no padding, the mix passed down as
an argument, and a forward that can stop at any layer. It must give transformers' logits;
`tests/models` holds it to that. T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorry.adapters.bank import AdapterBank
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.layers.shares import local_rows, local_share
from lorry.adapters.mix import AdapterContext, mixes_mlps
from lorry.adapters.product import LinearProducts
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.tensor_parallel.slices import DimensionSlice, LayerSlices, gather_outputs
from lorry.adapters.variants.own_weights import under
from lorry.families import LayerLinears, ModelFamily, ModelGeometry
from lorry.kernels import decode as kernel
from lorry.models.causal_lm import CausalLM, HiddenStates, PackedInput, add_at
from lorry.models.decoder.attention import PackedSegments
from lorry.models.decoder.block import DecoderBlock, ForwardContext, compute_inv_freq
from lorry.models.decoder.cache import KVCache
from lorry.models.decoder.head import PackedHead
from lorry.models.decoder.layer import apply_layer
from lorry.models.decoder.pointwise import DecoderNorm
from lorry.models.layer_weights import with_rows

# x [T,D] of one token a row, and the pass: what the last layer makes of it
LayersAtOnce = Callable[[Tensor, ForwardContext], Tensor]


class Decoder(CausalLM):
    """A causal language model of any described family. ``config`` is the Hugging Face config as a
    dict, kept for saving; ``ranks``: the processes that share its matrices, each with some heads,
    some columns of the MLP and some rows of the vocabulary (tensor parallel); heads and columns they
    divide (`plan.parallel.split.check_tensor_parallel`).

    Built empty (call under `torch.device("meta")`, then `load_state_dict(..., assign=True)`).
    """

    shares_prefixes = True

    def __init__(
        self, family: ModelFamily, config: Mapping[str, Any], ranks: TensorRanks | None = None
    ) -> None:
        super().__init__()
        self.family, self.ranks = family, ranks
        self.geometry: ModelGeometry = family.geometry(config)
        # what this process has of it
        self.local_geometry = self.geometry
        if ranks is not None:
            rows = DimensionSlice(self.geometry.vocab, ranks.size, ranks.rank).size
            self.local_geometry = self.geometry.of_each(ranks.size, rows)
        # a copy: saving edits it
        self.config = dict(config)
        self.gradient_checkpointing = False
        # the head in fewer bits, where a file has it so; for generation
        self.packed_head: PackedHead | None = None
        g = self.local_geometry
        add_at(
            self,
            family.embed,
            BankEmbedding(nn.Parameter(torch.empty(g.vocab, g.width)), path=family.embed),
        )
        if family.positions:
            add_at(self, family.positions, nn.Embedding(g.context, g.width))
        for i in range(g.layers):
            prefix = family.layer.format(i=i)
            for sizes in family.sizes(g):
                for target, size in sizes.items():
                    path = family.path(target, i)
                    add_at(self, path, self._linear(size, path, biased=target in g.biased))
            for path in (family.norms.attn, family.norms.mlp):
                add_at(self, f"{prefix}.{path}", DecoderNorm(family.norm, g.width, g.norm_eps))
            for head_path in (family.norms.q, family.norms.k):
                if head_path is not None:
                    add_at(
                        self,
                        f"{prefix}.{head_path}",
                        DecoderNorm(family.norm, g.head_dim, g.norm_eps),
                    )
        add_at(self, family.final_norm, DecoderNorm(family.norm, g.width, g.norm_eps))
        # made even where it is tied: `tie` replaces it
        head = nn.Parameter(torch.empty(g.vocab, g.width))
        add_at(self, family.head, BankLinear(head, None, path=family.head))
        if g.tied:
            self.tie()
        layers = (self.get_submodule(family.layer.format(i=i)) for i in range(g.layers))
        # a plain list: blocks are views of modules that are registered under HF names already
        self.blocks = [DecoderBlock(i, layer, family, g) for i, layer in enumerate(layers)]
        if ranks is not None:
            self._describe_slices(ranks)

    def _describe_slices(self, ranks: TensorRanks) -> None:
        """Tell every cut layer its part, as the family's roles have it: what reads the residual stream
        is cut by rows, what writes to it by columns, the vocabulary by rows."""
        family, whole = self.family, self.geometry

        def part(size: int, blocks: int = 1) -> DimensionSlice:
            return DimensionSlice(size, ranks.size, ranks.rank, blocks)

        # q, k and v of one matrix: a rank has its heads of each, which lie together head by head
        blocks = 3 if family.qkv == "thirds" else 1
        for i in range(whole.layers):
            for role, sizes in family.sizes(whole)._asdict().items():
                for target, (out, into) in sizes.items():
                    linear = self.get_submodule(family.path(target, i))
                    assert isinstance(linear, BankLinear)
                    linear.slices = (
                        LayerSlices(ranks, columns=part(into))
                        if role in ("attn_out", "mlp_out")
                        else LayerSlices(ranks, rows=part(out, blocks if role == "qkv" else 1))
                    )
        self._describe_vocabulary(ranks)

    def _describe_vocabulary(self, ranks: TensorRanks) -> None:
        """Tell embedding and head which rows of the vocabulary they have."""
        part = DimensionSlice(self.geometry.vocab, ranks.size, ranks.rank)
        self.embed.slices = LayerSlices(ranks, columns=part)
        self.head.slices = LayerSlices(ranks, rows=part)

    def cut_tensors(self) -> dict[str, tuple[int, DimensionSlice]]:
        """See `CausalLM.cut_tensors`."""
        cut = dict[str, tuple[int, DimensionSlice]]()
        for path, module in self.named_modules():
            if not isinstance(module, AdaptableLayer) or module.slices is None:
                continue
            cut[f"{path}.weight"] = module.stored_slice()
            # a bias is of the rows of the product; of a sum over ranks each has all of it
            if module.slices.rows is not None and getattr(module, "bias", None) is not None:
                cut[f"{path}.bias"] = (0, module.slices.rows)
        return cut

    def tie(self) -> None:
        """Let the head share the embedding's parameter (one tensor, two names, as transformers has
        it).
        """
        self.get_submodule(self.family.head).weight = self.get_submodule(self.family.embed).weight

    @property
    def shapes_follow_tokens(self) -> bool:
        """Where a router at level `expert` is attached."""
        bank: AdapterBank | None = self.__dict__.get("lorry_bank")
        return bank is not None and any(
            mixes_mlps(router.mix().router) for router in bank.routers.values()
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def embed(self) -> BankEmbedding:
        return self.get_submodule(self.family.embed)  # type: ignore[return-value]

    @property
    def head(self) -> BankLinear:
        return self.get_submodule(self.family.head)  # type: ignore[return-value]

    def get_input_embeddings(self) -> BankEmbedding:
        return self.embed

    # --- hidden states for scores, one step for generation

    def hidden(
        self,
        packed: PackedInput,
        call: AdapterContext,
        *,
        output_layers: Collection[int] = (),
        stop: int | None = None,
    ) -> HiddenStates:
        """Run the layers. ``output_layers``: layers whose output is wanted; ``stop``: the last
        layer to run (no final norm then).
        """
        tokens = packed.tokens.numel()
        if (total := self._padded_length(tokens)) > tokens:
            # both, or gates and dropout would be of another length than the tokens
            packed, call = packed.padded(total), call.padded(tokens, total)
        segments = PackedSegments(packed.segments, packed.tokens.device, packed.places)
        state = ForwardContext(
            call,
            *self._rotary_tables(packed.positions),
            segments,
            packed.positions,
            weights=self.layer_weights,
        )
        state.recompute = self.gradient_checkpointing
        state.keepers = self.ranks if self.sequence_parallel else None
        states = self._run(packed.tokens, state, output_layers, stop)
        if total == tokens:
            return states
        last = None if states.last is None else states.last[:tokens]
        return HiddenStates(
            last,
            {layer: x[:tokens] for layer, x in states.layer_outputs.items()},
            [logits[:tokens] for logits in states.router_logits],
        )

    def _padded_length(self, tokens: int) -> int:
        """The length a batch is padded to. oneDNN compiles its bfloat16 products anew for every
        shape (about 45 of them a step, milliseconds and a megabyte each), so lengths are rounded up
        to few, by a thirtieth at most beyond some hundred tokens.
        """
        if self.device.type != "cpu" or self.dtype != torch.bfloat16:
            return tokens
        step = next(s for s in (16, 32, 64) if tokens <= 8 * s or s == 64)
        return -(-tokens // step) * step

    def logits(self, hidden: Tensor | None, call: AdapterContext) -> Tensor:
        """[t,D] -> [t,V] in the base's dtype."""
        assert hidden is not None
        return gather_outputs(self.head(hidden, call), self.head.slices)

    def forward_cached(
        self,
        packed: PackedInput,
        rows: Tensor,
        cache: KVCache,
        call: AdapterContext,
        *,
        decoding: bool,
        products: Sequence[LayerLinears[LinearProducts]] | None = None,
        step: LayersAtOnce | None = None,
    ) -> Tensor:
        """Run tokens [T] of cache rows ``rows`` [T], store their keys and values and update
        ``cache.lengths``. Returns hidden [T,D].

        Either prompts, each into a row of its own whose former content is forgotten from their first
        position on (0, or behind what `KVCache.restore` gave the row); or (``decoding``) one token for every row of the cache, in order, at positions
        ``cache.lengths`` as they were before. ``products``: per layer, its linears' work where the
        caller has made it (`models/decoder/decode.py`); there is no graph then. ``step``: all
        layers at once, in place of that.
        """
        tokens, continuing = packed.tokens.numel(), False
        if decoding:
            # before the layers run: they attend up to and with the new token
            cache.extend()
        else:
            cache.fill(rows, packed.positions)
            starts = [start for start, _ in packed.segments]
            continuing = bool(packed.positions[starts].any())
            # products of a few rows are no torch products, and compiled for every length
            few = products is not None and tokens <= kernel.most_few_rows(self.dtype)
            if not few and (total := self._padded_length(tokens)) > tokens:
                packed, call = packed.padded(total), call.padded(tokens, total)
        segments = PackedSegments(packed.segments, packed.tokens.device)
        state = ForwardContext(
            call,
            *self._rotary_tables(packed.positions),
            segments,
            packed.positions,
            cache,
            rows,
            decoding,
            continuing,
            weights=self.layer_weights,
        )
        last = self._run(packed.tokens, state, (), None, products, step).last
        assert last is not None
        return last[:tokens]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.geometry.vocab

    @torch.no_grad()
    def resize_vocabulary(self, rows: int) -> None:
        """So many rows of the embedding and the head, zeros behind those that are there; a tied pair stays
        one tensor."""
        tied = self.head.weight is self.embed.weight
        # the old table goes before the other side is made
        for module in (self.embed, self.head):
            self._resize_table(module, rows)
            if tied:
                self.tie()
                break
        self.geometry = self.local_geometry = replace(self.geometry, vocab=rows)
        if (ranks := self.ranks) is not None:
            here = DimensionSlice(rows, ranks.size, ranks.rank).size
            self.local_geometry = self.geometry.of_each(ranks.size, here)
            self._describe_vocabulary(ranks)
        self.config["vocab_size"] = rows

    def _resize_table(self, module: AdaptableLayer, rows: int) -> None:
        """Of ranks that share a table each has other rows of the one that is larger, so that it is whole
        on each meanwhile."""
        if self.ranks is None:
            self.layer_weights.resize(module, "weight", rows)
            return
        grown = with_rows(module.whole_table(), rows)
        part = DimensionSlice(rows, self.ranks.size, self.ranks.rank)
        self.layer_weights.resize(module, "weight", part.size)
        weight = module.weight
        local_share(weight).copy_(part.cut(grown, 0)[local_rows(self, weight)])

    @property
    def context(self) -> int:
        """The longest sequence, prompt and answer together, that the model can take."""
        return self.geometry.context

    def new_cache(self, rows: int, room: int) -> KVCache:
        """An empty cache for ``rows`` sequences of at most ``room`` tokens."""
        g = self.local_geometry
        return KVCache(g.layers, rows, g.kv_heads, room, g.head_dim, self.dtype, self.device)

    # --- the computation

    def _run(
        self,
        tokens: Tensor,
        state: ForwardContext,
        output_layers: Collection[int],
        stop: int | None,
        products: Sequence[LayerLinears[LinearProducts]] | None = None,
        step: LayersAtOnce | None = None,
    ) -> HiddenStates:
        with state.weights.forward_pass():
            x = self.embed(tokens, state.call)
            if self.family.positions:
                positions = under(self.get_submodule(self.family.positions), state.call)
                x = x + positions(state.positions)
            layer_outputs = {}
            if step is not None:
                x = step(x, state)
            for i, block in enumerate(self.blocks if step is None else ()):
                state.weights.reach(i)
                block = block.under(state.call)
                x = (
                    apply_layer(block, x, state)
                    if products is None
                    else block.forward(x, state, products[i])[0]
                )
                if i in output_layers:
                    layer_outputs[i] = x
                # without the final norm: it belongs to the head
                if i == stop:
                    return HiddenStates(None, layer_outputs, state.router_logits)
            last = under(self.get_submodule(self.family.final_norm), state.call)(x)
        return HiddenStates(last, layer_outputs, state.router_logits)

    def _rotary_tables(self, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rotary = self.geometry.rotary
        if rotary is None:
            return None, None
        # fp32 whatever the model's dtype: bf16 positions would collide beyond 256
        angles = positions[:, None].float() * compute_inv_freq(rotary, positions.device)
        return angles.cos(), angles.sin()

    def _linear(self, size: tuple[int, int], path: str, *, biased: bool) -> BankLinear:
        rows, columns = size
        shape = (columns, rows) if self.family.transposed else (rows, columns)
        bias = nn.Parameter(torch.empty(rows)) if biased else None
        return BankLinear(
            nn.Parameter(torch.empty(shape)), bias, transposed=self.family.transposed, path=path
        )
