"""A Hugging Face checkpoint of Llama, Qwen2 or Qwen3 into a Megatron-core GPTModel at any tensor and
pipeline parallel size, every tensor of both sides accounted for.

    load_hf_weights(model, "models/Qwen3-0.6B")

Both of Megatron's layer specs are known: with Transformer Engine a layer's norms are inside
`linear_qkv` and `linear_fc1`, in the local one they are modules of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorry.errors import ModelError
from lorry.families import ModelFamily, ModelGeometry
from lorry.integrations.megatron.attach import list_chunks, list_linears
from lorry.integrations.megatron.linear import tensor_group
from lorry.models.decoder.block import compute_inv_freq
from lorry.models.decoder.model import Decoder
from lorry.models.loading.describe import ModelDescription, describe_model
from lorry.models.loading.tensor_files import TensorEntry, read_tensor_entries, read_tensors
from lorry.models.loading.weights import match_tensor_names, refuse_damaged_buffers
from lorry.models.megatron.layout import (
    FAMILIES,
    MegatronLinear,
    RowOrder,
    cut,
    row_order,
    shard_dim,
)
from lorry.notes import ignore_note

CPU = torch.device("cpu")
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
# Megatron's norm of a layer, as a parameter of either spec -> Hugging Face's module in the layer
NORMS = {
    "input_layernorm.weight": "input_layernorm",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
    "pre_mlp_layernorm.weight": "post_attention_layernorm",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
    "self_attention.q_layernorm.weight": "self_attn.q_norm",
    "self_attention.k_layernorm.weight": "self_attn.k_norm",
}


@dataclass(frozen=True)
class LoadedBase:
    """What a chunk's base weights are: the directory they came from and the size of its vocabulary,
    which Megatron pads."""

    path: str
    vocab: int


@dataclass(frozen=True)
class WeightSource:
    """Where one parameter comes from: tensors of the checkpoint, cut in ``dim`` over ranks and laid out
    in ``order`` (of a linear); ``kind``: a norm's may be stored less 1, a vocabulary is padded."""

    names: tuple[str, ...]
    kind: Literal["linear", "norm", "vocabulary"]
    dim: int | None = None
    order: RowOrder | None = None


def load_hf_weights(model: nn.Module | Sequence[nn.Module], directory: str | Path) -> None:
    """Fill a model's base weights from a checkpoint's directory, adapters left as they are. Every rank
    reads what its part needs. Raises ModelError, before anything is written, where model and
    checkpoint do not fit."""
    folder = Path(directory)
    chunks = list_chunks(model)
    description = describe_model(folder, add_note=ignore_note)
    family = description.family
    if family is None or family.name not in FAMILIES:
        raise ModelError(
            f"{folder}: {description.config.get('model_type')} cannot be loaded into Megatron's "
            f"GPTModel here ({description.why or 'another architecture'}); "
            f"{', '.join(FAMILIES)} can"
        )
    geometry = family.geometry(description.config)
    for chunk in chunks:
        _check_model(chunk, geometry, folder)
    entries = _entries(folder, description, family, geometry)
    plans = [dict(list_sources(chunk, family, geometry)) for chunk in chunks]
    for chunk, plan in zip(chunks, plans, strict=True):
        _check_parameters(chunk, plan, entries, folder)
    for chunk, plan in zip(chunks, plans, strict=True):
        for name, source in plan.items():
            parameter = chunk.get_parameter(name)
            with torch.no_grad():
                parameter.copy_(_read(chunk, name, parameter, source, entries))
        chunk.__dict__["lorry_base"] = LoadedBase(str(folder.resolve()), geometry.vocab)


def _entries(
    folder: Path, description: ModelDescription, family: ModelFamily, geometry: ModelGeometry
) -> dict[str, TensorEntry]:
    """{our decoder's name: where the tensor lies} of the whole checkpoint."""
    stored = read_tensor_entries(folder)
    with torch.device("meta"):
        shapes = Decoder(family, description.config).state_dict()
    refuse_damaged_buffers(stored)
    names = match_tensor_names(
        stored,
        family,
        {name: tuple(t.shape) for name, t in shapes.items()},
        tied=geometry.tied,
        where=folder,
    )
    entries = {name: stored[file_name] for name, file_name in names.items()}
    head, embed = f"{family.head}.weight", f"{family.embed}.weight"
    if geometry.tied and head in entries:
        # two readers would have two models
        both = read_tensors({n: entries[n] for n in (head, embed)}, torch.float32, CPU)
        if not torch.equal(both[head], both[embed]):
            raise ModelError(
                f"{folder}: config.json says tie_word_embeddings=true, but {head} and {embed} differ"
            )
    return entries


def _check_model(chunk: nn.Module, geometry: ModelGeometry, folder: Path) -> None:
    """Raises ModelError naming the first setting in which the built model is another one."""
    config: Any = chunk.config
    model: Any = chunk
    rope: Any = getattr(chunk, "rotary_pos_emb", None)
    silu = config.activation_func in (torch.nn.functional.silu, nn.functional.silu)
    settings: list[tuple[str, Any, Any]] = [
        ("num_layers", config.num_layers, geometry.layers),
        ("hidden_size", config.hidden_size, geometry.width),
        ("num_attention_heads", config.num_attention_heads, geometry.heads),
        ("num_query_groups", config.num_query_groups, geometry.kv_heads),
        ("kv_channels", config.kv_channels, geometry.head_dim),
        ("ffn_hidden_size", config.ffn_hidden_size, geometry.mlp_width),
        ("normalization", config.normalization, "RMSNorm"),
        ("layernorm_epsilon", config.layernorm_epsilon, geometry.norm_eps),
        ("activation_func", "silu" if silu else str(config.activation_func), geometry.activation),
        ("gated_linear_unit", config.gated_linear_unit, True),
        (
            "share_embeddings_and_output_weights",
            model.share_embeddings_and_output_weights,
            geometry.tied,
        ),
        ("position_embedding_type", model.position_embedding_type, "rope"),
        ("rotary_interleaved", config.rotary_interleaved, False),
    ]
    for name, built, wanted in settings:
        if built != wanted:
            raise ModelError(
                f"{folder}: {name} of the Megatron model is {built!r}, the checkpoint's {wanted!r}"
            )
    assert geometry.rotary is not None
    frequencies = compute_inv_freq(geometry.rotary, torch.device("cpu"))
    built = rope.inv_freq.cpu()
    if built.shape != frequencies.shape or not torch.allclose(
        built, frequencies, rtol=1e-5, atol=0
    ):
        raise ModelError(
            f"{folder}: the rotary frequencies of the Megatron model are others than the "
            f"checkpoint's (rotary_base {geometry.rotary.theta:g}, scaling {geometry.rotary.kind}); "
            "set rotary_base and rope_scaling as its config.json has them"
        )


def list_sources(
    chunk: nn.Module, family: ModelFamily, geometry: ModelGeometry
) -> Iterator[tuple[str, WeightSource]]:
    """(parameter, where it comes from) of a chunk."""
    there = {name for name, _ in chunk.named_parameters()}
    ends = {
        EMBEDDING: WeightSource((f"{family.embed}.weight",), "vocabulary"),
        "decoder.final_layernorm.weight": WeightSource((f"{family.final_norm}.weight",), "norm"),
        # of a tied model a last stage without the embedding has a copy of it
        HEAD: WeightSource(
            (f"{family.embed if geometry.tied else family.head}.weight",), "vocabulary"
        ),
    }
    yield from ((name, source) for name, source in ends.items() if name in there)
    config: Any = chunk.config
    paths = {id(module): path for path, module in chunk.named_modules()}
    for number, place, linear in list_linears(chunk):
        path = paths[id(linear)]
        order = row_order(config, place, tensor_group(linear).size())
        names = tuple(f"{family.path(t, number)}" for t in place.targets)
        for leaf in ("weight", "bias"):
            if f"{path}.{leaf}" in there:
                yield f"{path}.{leaf}", _linear_source(place, names, leaf, order)
        layer = path.removesuffix(place.path)
        for norm, module in NORMS.items():
            if f"{layer}{norm}" in there:
                source = f"{family.layer.format(i=number)}.{module}.weight"
                yield f"{layer}{norm}", WeightSource((source,), "norm")


def _linear_source(
    place: MegatronLinear, names: tuple[str, ...], leaf: str, order: RowOrder
) -> WeightSource:
    # the bias of a row-parallel linear is whole on every rank, and Megatron adds it once
    dim = shard_dim(place.parallel, "weight" if leaf == "weight" else "B")
    return WeightSource(tuple(f"{name}.{leaf}" for name in names), "linear", dim, order)


def _check_parameters(
    chunk: nn.Module,
    plan: Mapping[str, WeightSource],
    entries: Mapping[str, TensorEntry],
    folder: Path,
) -> None:
    ours = {name for name, _ in chunk.named_parameters() if ".lora_" not in name}
    if unknown := sorted(ours - set(plan)):
        raise ModelError(
            f"{folder}: the Megatron model's {unknown[0]} ({len(unknown)} such) has no counterpart in "
            "the checkpoint"
        )
    for name, source in plan.items():
        if absent := [n for n in source.names if n not in entries]:
            raise ModelError(
                f"{folder}: the Megatron model has {name}, but the checkpoint no {absent[0]}; build it "
                "with the biases and norms that config.json has (add_qkv_bias, add_bias_linear, "
                "qk_layernorm)"
            )
    # of this chunk's layers: whatever the checkpoint has must have a place
    used = {n for source in plan.values() for n in source.names}
    layers = {n.split(".")[2] for n in used if n.startswith("model.layers.")}
    left = [n for n in entries if n.startswith("model.layers.") and n.split(".")[2] in layers]
    if unused := sorted(set(left) - used):
        raise ModelError(
            f"{folder}: holds {unused[0]} ({len(unused)} such), for which the Megatron model has no "
            "parameter; build it with the biases and norms that config.json has"
        )


def _read(
    chunk: nn.Module,
    name: str,
    parameter: nn.Parameter,
    source: WeightSource,
    entries: Mapping[str, TensorEntry],
) -> Tensor:
    """A parameter's value on this rank."""
    tensors = read_tensors(
        {name: entries[name] for name in source.names}, parameter.dtype, parameter.device
    )
    config: Any = chunk.config
    group = tensor_group(chunk)
    parts = [tensors[name] for name in source.names]
    if source.order is not None:
        parts = [cut(part, source.dim, group.rank(), group.size()) for part in parts]
        return source.order.fuse(parts)
    (value,) = parts
    if source.kind == "norm":
        return value - 1 if config.layernorm_zero_centered_gamma else value
    return vocabulary_rows(value, parameter.shape, group.rank(), group.size(), name)


def vocabulary_rows(whole: Tensor, shape: Sequence[int], rank: int, size: int, name: str) -> Tensor:
    """A rank's rows of a matrix over the vocabulary, zeros where Megatron has more of them."""
    rows, width = shape
    if rows * size < whole.shape[0] or width != whole.shape[1]:
        raise ModelError(
            f"{name} has {rows * size} rows of {width}, the checkpoint {whole.shape[0]} of "
            f"{whole.shape[1]}; build the model with padded_vocab_size >= {whole.shape[0]}"
        )
    value = whole.new_zeros(rows, width)
    have = whole[rank * rows : (rank + 1) * rows]
    value[: have.shape[0]] = have
    return value
