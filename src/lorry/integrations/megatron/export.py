"""A Megatron model as a Hugging Face directory, from any tensor and pipeline parallel size: the base as
it was loaded, or with its adapter in it.

    save_hf_weights(model, "exports/merged")                  # W + s B A, rounded once
    save_hf_weights(model, "exports/base", merged=False)      # what load_hf_weights read, bit for bit
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorry.disk.durable import build_directory
from lorry.errors import ConfigError
from lorry.integrations.megatron.attach import list_chunks
from lorry.integrations.megatron.files import Model, gather_over, is_writer, on_every_rank
from lorry.integrations.megatron.hf_weights import HEAD, LoadedBase, WeightSource, list_sources
from lorry.integrations.megatron.linear import tensor_group
from lorry.integrations.megatron.merge import merged_parameter
from lorry.models.loading.describe import ModelDescription, describe_model
from lorry.models.loading.store import write_checkpoint
from lorry.notes import ignore_note


def save_hf_weights(
    model: Model, path: str | Path, *, merged: bool = True, tokenizer: Any | None = None
) -> None:
    """Write the model into the directory ``path``, which must not exist yet or be empty; transformers
    loads it. Every rank calls it; one writes, a tensor at a time. ``merged=False``: without the
    adapter. ``tokenizer``: what is to lie beside the weights. Raises ConfigError for a model that
    `load_hf_weights` did not fill, or a path that is taken, DiskError."""
    chunks = list_chunks(model)
    base: LoadedBase | None = chunks[0].__dict__.get("lorry_base")
    if base is None:
        raise ConfigError(
            "save_hf_weights writes the config.json that load_hf_weights read; load the base with it"
        )
    description = describe_model(Path(base.path), add_note=ignore_note)
    kind = description.config["model_type"]
    names = {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]}
    stream = _whole_tensors(chunks, description, base.vocab, merged=merged)

    def write() -> None:
        try:
            if is_writer():
                with build_directory(Path(path)) as work:
                    config = {**description.config, **names}
                    write_checkpoint(work, stream, config, tokenizer=tokenizer)
        finally:
            # whatever became of the files, the other ranks are in the next collective
            for _ in stream:
                pass

    on_every_rank(chunks, write)


def _whole_tensors(
    chunks: Sequence[nn.Module], description: ModelDescription, vocab: int, *, merged: bool
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face's name, whole tensor on the CPU) of the whole model, on every rank, in step."""
    family = description.family
    assert family is not None  # `load_hf_weights` has seen to it
    device = next(chunks[0].parameters()).device
    own = {
        f"{chunk_number}/{name}": (chunk, name, source)
        for chunk_number, chunk in enumerate(chunks)
        for name, source in list_sources(chunk, family, family.geometry(description.config))
        # a tied head is the embedding, of which a last stage has a copy
        if not (name == HEAD and family.geometry(description.config).tied)
    }
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    marks = gather_over(pipeline, dict.fromkeys(own, torch.zeros(1)), device)
    for owner, names in enumerate(marks):
        for name in names:
            there = owner == pipeline.rank()
            whole = _whole(*own[name], vocab, device, merged=merged) if there else {}
            yield from _sent_by(owner, pipeline, whole, device).items()


def _whole(
    chunk: nn.Module,
    name: str,
    source: WeightSource,
    vocab: int,
    device: torch.device,
    *,
    merged: bool,
) -> dict[str, Tensor]:
    """{Hugging Face's name: whole tensor} of one of Megatron's parameters."""
    config: Any = chunk.config
    value = merged_parameter(chunk, name) if merged else chunk.get_parameter(name).detach()
    if source.kind == "norm" and config.layernorm_zero_centered_gamma:
        value = value + 1
    pieces = [value] if source.order is None else source.order.split(value)
    own = dict(zip(source.names, pieces, strict=True))
    dim = 0 if source.kind == "vocabulary" else source.dim
    if dim is None:
        return own
    shards = gather_over(tensor_group(chunk), own, device)
    whole = {n: torch.cat([shard[n] for shard in shards], dim) for n in own}
    # Megatron pads a vocabulary
    return {n: t[:vocab] for n, t in whole.items()} if source.kind == "vocabulary" else whole


def _sent_by(
    owner: int, group: Any, tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The tensors of rank ``owner`` of the group, on the CPU, on each of its ranks."""
    own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if group.size() == 1:
        return own
    payload = torch.frombuffer(bytearray(save_bytes(own)), dtype=torch.uint8).to(device)
    size = torch.tensor([payload.numel()], device=device)
    source = torch.distributed.get_global_rank(group, owner)
    torch.distributed.broadcast(size, source, group=group)
    if owner != group.rank():
        payload = torch.empty(int(size), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(payload, source, group=group)
    return own if owner == group.rank() else load_bytes(payload.cpu().numpy().tobytes())
