"""Save a model as a normal Hugging Face directory: safetensors (in shards when large), config,
tokenizer. All or nothing.

Tensors may come as a stream, so that a merged model is written one shard at a time and never exists
whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorry.disk.durable import build_directory
from lorry.errors import ModelError
from lorry.models.causal_lm import CausalLM
from lorry.models.decoder.model import Decoder
from lorry.models.loading.config_json import write_config

# 2 GB: one shard is all that is in memory while a merged model streams
SHARD_BYTES = 2_000_000_000
# an attribute that rides along on a loaded model, as its bank does
GENERATION_CONFIG = "generation_config"
INDEX_FILE = "model.safetensors.index.json"


def save_model(
    model: CausalLM,
    path: str | Path,
    *,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    tokenizer: Any | None = None,
    generation_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model`` to the directory ``path``, which must not exist yet or be empty; transformers
    loads what is written.

    ``tensors``: (name as in the model's state dict, tensor), instead of the model's own; a tied
    head may be left out. The native decoder takes them one shard at a time, a model of transformers
    all at once, unless its weights are cut over ranks. ``config_overrides``: such as {"tie_word_embeddings": False} with a separate head.
    ``generation_config``: None writes what the model was loaded with. ``dtype``: None keeps each
    tensor's. Raises ConfigError if the path is taken, ModelError if the names do not fit the model,
    DiskError; then nothing is written.
    """
    config = {
        k: v
        for k, v in {**model.config, **(config_overrides or {})}.items()
        # private fields describe this machine (paths, attention kernels)
        if not k.startswith("_")
    }
    tied = bool(config.get("tie_word_embeddings"))
    stream = _convert_dtypes(_check_complete(model, tensors, tied=tied), dtype)
    with build_directory(Path(path)) as work:
        if isinstance(model, Decoder):
            from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

            config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
            write_checkpoint(
                work,
                _checkpoint_names(stream, model, tied=tied),
                config,
                generation_config=generation_config or model.__dict__.get(GENERATION_CONFIG),
                tokenizer=tokenizer,
                max_shard_bytes=max_shard_bytes,
            )
            return
        from lorry.models.hf.model import HfModel

        assert isinstance(model, HfModel)
        if model.layer_weights.sharded:
            # its files hold the tensors of the class as they are, or it could not have been read
            model.save_config(work, config)
            dtypes = _write_shards(stream, work, max_shard_bytes)
        else:
            state = dict(stream)
            dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
            model.save_inner(work, state, config, max_shard_bytes)
        _write_beside(
            work,
            dtypes,
            generation_config or model.__dict__.get(GENERATION_CONFIG) or _token_ids(config),
            tokenizer,
        )


def write_checkpoint(
    work: Path,
    tensors: Iterator[tuple[str, Tensor]],
    config: Mapping[str, Any],
    *,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer: Any | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a whole model directory into the existing folder ``work``: ``tensors`` under the names
    they come with, one shard in memory at a time. ``generation_config``: None writes the config's
    token ids.
    """
    dtypes = _write_shards(tensors, work, max_shard_bytes)
    _write_json(work / "config.json", config)
    _write_beside(work, dtypes, generation_config or _token_ids(config), tokenizer)


def _write_beside(
    work: Path,
    dtypes: set[torch.dtype],
    generation_config: Mapping[str, Any],
    tokenizer: Any | None,
) -> None:
    """Write what stands beside weights and config.json, which gets the dtype of the former."""
    stored = str(next(iter(dtypes))) if len(dtypes) == 1 else "float32"
    write_config(work, {"dtype": stored.removeprefix("torch.")})
    _write_json(work / "generation_config.json", generation_config)
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
    copy_permissions(work)


def _check_complete(
    model: CausalLM, tensors: Iterable[tuple[str, Tensor]] | None, *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """The stream, if it holds every tensor of the model once; a second name of a tied tensor may be
    missing.
    """
    state = model.state_dict()
    # by the parameter: a state dict has other objects, and a share of a tensor no address
    owners = dict(model.named_parameters(remove_duplicate=False))
    memory = {n: id(owners[n]) if n in owners else t.data_ptr() for n, t in state.items()}
    # reversed, so that the first name of a tied tensor wins
    first = {memory[n]: n for n in reversed(state)}
    unseen = dict.fromkeys(state)
    for name, tensor in state.items() if tensors is None else tensors:
        if name not in unseen:
            problem = "was given twice" if name in state else "is not a tensor of this model"
            raise ModelError(f"{name!r} {problem}; nothing was saved")
        del unseen[name]
        yield name, tensor
    if missing := [n for n in unseen if not (tied and first[memory[n]] != n)]:
        raise ModelError(
            f"{len(missing)} tensors were not given ({', '.join(missing[:3])}); nothing was saved"
        )


def _convert_dtypes(
    stream: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        stored_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        yield name, tensor.detach().to("cpu", stored_dtype).contiguous()


def _checkpoint_names(
    stream: Iterator[tuple[str, Tensor]], model: Decoder, *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """Names as checkpoints spell them; a tied head is left out, as transformers does."""
    for name, tensor in stream:
        module, _, leaf = name.rpartition(".")
        # skipped here, after `_check_complete` has seen it
        if tied and module == model.family.head:
            continue
        yield f"{model.family.on_disk.get(module, module)}.{leaf}", tensor


def _write_shards(stream: Iterator[tuple[str, Tensor]], work: Path, limit: int) -> set[torch.dtype]:
    """Write shards of at most ``limit`` bytes (a single larger tensor is a shard of its own).
    Returns the dtypes in them.
    """
    shards: list[list[str]] = []
    dtypes: set[torch.dtype] = set()
    shard: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        # a temporary name: the final one holds the number of shards, unknown until the end
        save_file(shard, work / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in stream:
        if shard and size + tensor.nbytes > limit:
            flush()
            size = 0
        shard[name] = tensor
        dtypes.add(tensor.dtype)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        where = {
            tensor: file
            for file, tensor_names in zip(names, shards, strict=True)
            for tensor in tensor_names
        }
        _write_json(work / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
    for i, name in enumerate(names):
        (work / f"shard-{i}").rename(work / name)
    return dtypes


def _token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")


def copy_permissions(folder: Path) -> None:
    """Give the weights the permissions of the config beside them: safetensors makes files that only
    their owner may read.
    """
    mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
