"""Megatron-core's GPTModel in the place of our decoder's layers: its attention, its parallel linears and
their sums over ranks, with the decoder's weights.

A model is read as ever, by `load_decoder`: each rank's slices of every matrix, every tensor of the files
accounted for. Then its layers' matrices move into Megatron's, q, k and v as rows of one, gate and up of
another; embedding, norms and head stay the modules they are. So scores read our head, names and digests
are the decoder's, and nothing of a checkpoint is read twice.

Attention of Megatron's own (without Transformer Engine) knows no packed rows: tokens are laid out as
padded frames [S, L], causal, padding on the right.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.mix import AdapterContext
from lorry.adapters.tensor_parallel.slices import DimensionSlice, gather_outputs
from lorry.errors import ConfigError, ContractError
from lorry.families import ModelFamily
from lorry.models.causal_lm import CausalLM, HiddenStates, PackedInput, add_at
from lorry.models.decoder.block import compute_inv_freq
from lorry.models.decoder.model import Decoder
from lorry.models.hf.cache import RecomputeCache
from lorry.models.hf.frames import build_padded_frames, unpad_frames
from lorry.models.hf.model import recompute_with_context, use_adapter_context
from lorry.models.megatron.layout import (
    FAMILIES,
    LINEARS,
    MegatronLinear,
    row_order,
    shard_dim,
)
from lorry.models.megatron.terms import FusedProjection, TermsHook


class MegatronModel(CausalLM):
    """``decoder``: a frozen model with its weights, which `MegatronConverter` takes, on ranks that
    Megatron's groups are made of (`groups.join_groups`); its layers are empty afterwards."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.family, self.geometry, self.ranks = decoder.family, decoder.geometry, decoder.ranks
        self.config = decoder.config
        self._checkpointing = False
        # Hugging Face's names before Megatron's: a module that has both goes by the first
        for path in (self.family.embed, self.family.head):
            add_at(self, path, decoder.get_submodule(path))
        gpt: Any = _empty_gpt(decoder)
        for layer, block in enumerate(gpt.decoder.layers):
            for place in LINEARS:
                self._take_linear(
                    decoder, gpt.config, layer, place, block.get_submodule(place.path)
                )
        _take_rest(decoder, gpt)
        self.gpt = gpt
        if missing := [name for name, p in gpt.named_parameters() if p.is_meta]:
            raise ContractError(
                f"Megatron's {missing[0]} ({len(missing)} such) has no counterpart in the decoder"
            )
        self.requires_grad_(False).eval()

    def _take_linear(
        self, decoder: Decoder, config: Any, layer: int, place: MegatronLinear, linear: nn.Module
    ) -> None:
        """Move the projections that a linear fuses into it, and leave their places to adapters."""
        order = row_order(config, place, 1 if self.ranks is None else self.ranks.size)
        projections = list[FusedProjection]()
        paths = [self.family.path(target, layer) for target in place.targets]
        taken = [decoder.get_submodule(path) for path in paths]
        for leaf in ("weight", "bias"):
            parts = [part.get_parameter(leaf).detach() for part in taken if _has(part, leaf)]
            if parts:
                setattr(linear, leaf, nn.Parameter(order.fuse(parts), requires_grad=False))
        for number, (path, part) in enumerate(zip(paths, taken, strict=True)):
            assert isinstance(part, BankLinear)
            # the decoder lets go of it, so that a layer at a time is there twice
            del part.weight
            cut = None if part.slices is None else replace(part.slices, sums_ranks=True)
            projections.append(FusedProjection(path, linear, order, number, cut))
            add_at(self, path, projections[-1])
        linear.register_forward_hook(TermsHook(projections, order, f"{layer}.{place.site}"))

    # --- what the bank and the engine ask of a model

    def cut_tensors(self) -> dict[str, tuple[int, DimensionSlice]]:
        """See `CausalLM.cut_tensors`."""
        if self.ranks is None:
            return {}
        size, rank = self.ranks.size, self.ranks.rank
        ends = [f"{self.family.embed}.weight", f"{self.family.head}.weight"]
        cut = dict.fromkeys(ends, (0, DimensionSlice(self.geometry.vocab, size, rank)))
        for layer in range(self.geometry.layers):
            for place in LINEARS:
                path = f"gpt.decoder.layers.{layer}.{place.path}"
                for leaf, parameter in self.get_submodule(path).named_parameters(recurse=False):
                    # a bias is of the rows
                    dim = shard_dim(place.parallel, "weight") if leaf == "weight" else 0
                    assert dim is not None
                    whole = parameter.shape[dim] * size
                    cut[f"{path}.{leaf}"] = (dim, DimensionSlice(whole, size, rank))
        return cut

    @property
    def dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.get_input_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.geometry.vocab

    @property
    def context(self) -> int:
        """The longest sequence, prompt and answer together."""
        return self.geometry.context

    @property
    def head(self) -> BankLinear:
        return self.get_submodule(self.family.head)  # type: ignore[return-value]

    def get_input_embeddings(self) -> BankEmbedding:
        return self.get_submodule(self.family.embed)  # type: ignore[return-value]

    def train(self, mode: bool = True) -> MegatronModel:
        """Only the flag of this module changes: dropout is the adapters' alone."""
        self.training = mode
        return self

    @property
    def gradient_checkpointing(self) -> bool:
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        """Run each layer again in backward, under the call its forward had."""
        for layer in self.gpt.decoder.layers:
            layer.__dict__.pop("forward", None)
            if on:
                layer.__dict__["forward"] = recompute_with_context(layer.forward)
        self._checkpointing = bool(on)

    # --- the computation

    def hidden(
        self,
        packed: PackedInput,
        call: AdapterContext,
        *,
        output_layers: Collection[int] = (),
        stop: int | None = None,
    ) -> HiddenStates:
        """last [T,D]. Raises ConfigError for outputs of single layers, which GPTModel does not give."""
        if output_layers or stop is not None:
            raise ConfigError(
                "backend=megatron gives the hidden states behind the last layer alone; use "
                "backend=ddp or fsdp for what reads the layers before"
            )
        states = []
        for frame in build_padded_frames(packed.segments, packed.tokens.device):
            ids = frame.pad(packed.tokens)
            positions = torch.arange(frame.length, device=ids.device).expand(ids.shape)
            # True is what a token does not see
            later = torch.ones(frame.length, frame.length, dtype=torch.bool, device=ids.device)
            with use_adapter_context(frame.adapter_context(call)):
                states.append(
                    (frame, frame.unpad(self.gpt(ids, positions, later.triu(1)[None, None])))
                )
        return HiddenStates(unpad_frames(states))

    def logits(self, hidden: Tensor | None, call: AdapterContext) -> Tensor:
        """[t,D] -> [t,V] in the base's dtype."""
        assert hidden is not None
        return gather_outputs(self.head(hidden, call), self.head.slices)

    def new_cache(self, rows: int, room: int) -> RecomputeCache:
        """The tokens of so many sequences; no keys and values are kept."""
        return RecomputeCache(rows, self.device)

    def forward_cached(
        self,
        packed: PackedInput,
        rows: Tensor,
        cache: RecomputeCache,
        call: AdapterContext,
        *,
        decoding: bool,
    ) -> Tensor:
        """As `Decoder.forward_cached`, every sequence read from its start again."""
        return cache.hidden_of_newest(self, packed, rows, call, decoding=decoding)


class PassThrough(nn.Module):
    """Stands where GPTModel has its output layer: hidden states come out, and scores read our head."""

    def forward(self, hidden: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """As Megatron's linears return: (output, bias)."""
        return hidden, None


class MegatronConverter:
    """The `ModelConverter` of Megatron's layers, on groups that have been made."""

    def __call__(self, decoder: Decoder) -> MegatronModel:
        """The decoder's weights in Megatron's layers."""
        return MegatronModel(decoder)

    def refuse_unfit(self, family: ModelFamily | None, config: Mapping[str, Any], why: str) -> None:
        """Raises ConfigError for a model that GPTModel, as it is built here, would compute otherwise."""
        way_out = "give backend=ddp or fsdp"
        if family is None or family.name not in FAMILIES:
            what = why if family is None else f"of the family {family.name}"
            raise ConfigError(
                f"backend=megatron runs models of the families {', '.join(FAMILIES)}, and not this one "
                f"({what}); {way_out}"
            )
        geometry = family.geometry(config)
        if geometry.activation not in ("silu", "swish"):
            raise ConfigError(
                f"backend=megatron: hidden_act={geometry.activation!r} is not built for Megatron's MLP "
                f"here; {way_out}"
            )
        if geometry.biased - set(family.roles.qkv):
            # Megatron has them on all linears or none
            raise ConfigError(
                "backend=megatron: biases of other linears than q, k and v (attention_bias, mlp_bias) "
                f"are not built for Megatron's layers here; {way_out}"
            )


def _empty_gpt(decoder: Decoder) -> GPTModel:
    """Megatron's model of this decoder's sizes, without memory for weights."""
    g = decoder.geometry
    with warnings.catch_warnings():
        # it warns of its own defaults
        warnings.simplefilter("ignore")
        config = _config_of(decoder)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    # the decoder's come in their place
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
    with torch.device("meta"):
        return GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[spec] * g.layers, layer_norm=IdentityOp),
            vocab_size=g.vocab,
            max_sequence_length=g.context,
            # no matrix of its own for the head, which nothing here multiplies
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
        )


def _config_of(decoder: Decoder) -> TransformerConfig:
    g, dtype = decoder.geometry, decoder.dtype
    return TransformerConfig(
        num_layers=g.layers,
        hidden_size=g.width,
        num_attention_heads=g.heads,
        num_query_groups=g.kv_heads,
        kv_channels=g.head_dim,
        ffn_hidden_size=g.mlp_width,
        layernorm_epsilon=g.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=bool(g.biased),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=1 if decoder.ranks is None else decoder.ranks.size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=True,
        perform_initialization=False,
        # kernels of apex and Transformer Engine
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _take_rest(decoder: Decoder, gpt: Any) -> None:
    """Everything but the linears: modules of the decoder in the places of Megatron's."""
    family, g = decoder.family, decoder.geometry
    assert g.rotary is not None
    gpt.embedding.word_embeddings = decoder.embed
    gpt.rotary_pos_emb.inv_freq = compute_inv_freq(g.rotary, decoder.device)
    gpt.output_layer = PassThrough()
    gpt.decoder.final_layernorm = decoder.get_submodule(family.final_norm)
    for i, layer in enumerate(gpt.decoder.layers):
        prefix = family.layer.format(i=i)
        norms = family.norms.map(partial(_norm_of, decoder, prefix))
        layer.input_layernorm, layer.pre_mlp_layernorm = norms.attn, norms.mlp
        if norms.q is not None:
            layer.self_attention.q_layernorm = norms.q
            layer.self_attention.k_layernorm = norms.k


def _norm_of(decoder: Decoder, prefix: str, path: str) -> nn.Module:
    return decoder.get_submodule(f"{prefix}.{path}")


def _has(module: nn.Module, leaf: str) -> bool:
    return getattr(module, leaf) is not None
