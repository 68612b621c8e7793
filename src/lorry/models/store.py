"""Save a model as a normal Hugging Face directory: safetensors (in shards when large), config, tokenizer. All or nothing.

Tensors may come as a stream, so that a merged model is written one shard at a time and never exists whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorry.disk.durable import building
from lorry.errors import ModelError
from lorry.models.decoder import Decoder

if TYPE_CHECKING:
    from lorry.models.hf import HfModel

SHARD_BYTES = 2_000_000_000
INDEX = "model.safetensors.index.json"


def save_model(
    model: Decoder | HfModel,
    path: str | Path,
    *,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    tokenizer: Any | None = None,
    generation_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model`` to the directory ``path``, which must not exist yet or be empty; transformers loads what is written.

    ``tensors``: (name as in the model's state dict, tensor), instead of the model's own; a tied head may be left out.
    ``config_overrides``: such as {"tie_word_embeddings": False} with a separate head. ``dtype``: None keeps each tensor's.
    Raises ConfigError if the path is taken, ModelError if the names do not fit the model, DiskError; then nothing is written.
    """
    config = {k: v for k, v in {**model.config, **(config_overrides or {})}.items() if not k.startswith("_")}
    tied = bool(config.get("tie_word_embeddings"))
    stream = _checked(model, tensors, tied=tied)
    with building(Path(path)) as work:
        if isinstance(model, Decoder):
            dtypes = _write(_on_disk(stream, model, tied=tied), work, dtype, max_shard_bytes)
            kinds = set(dtypes.values())
            config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
            config["dtype"] = str(next(iter(kinds))).removeprefix("torch.") if len(kinds) == 1 else "float32"
            _write_json(work / "config.json", config)
        else:
            model.save_inner(work, {n: t if dtype is None else t.to(dtype) for n, t in stream}, config, max_shard_bytes)
        _write_json(work / "generation_config.json", generation_config or _token_ids(config))
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        share(work)


def _checked(
    model: Decoder | HfModel, tensors: Iterable[tuple[str, Tensor]] | None, *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """The stream, if it holds every tensor of the model once; a second name of a tied tensor may be missing."""
    state = model.state_dict()
    first = {t.data_ptr(): n for n, t in reversed(state.items())}
    left = dict.fromkeys(state)
    for name, tensor in state.items() if tensors is None else tensors:
        if name not in left:
            problem = "was given twice" if name in state else "is no tensor of this model"
            raise ModelError(f"{name!r} {problem}; nothing was saved")
        del left[name]
        yield name, tensor
    if missing := [n for n in left if not (tied and first[state[n].data_ptr()] != n)]:
        raise ModelError(f"{len(missing)} tensors were not given ({', '.join(missing[:3])}); nothing was saved")


def _on_disk(stream: Iterator[tuple[str, Tensor]], model: Decoder, *, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """Names as checkpoints spell them; a tied head is left out, as transformers does."""
    for name, tensor in stream:
        module, _, leaf = name.rpartition(".")
        if tied and module == model.family.head:
            continue
        yield f"{model.family.on_disk.get(module, module)}.{leaf}", tensor


def _write(stream: Iterator[tuple[str, Tensor]], work: Path, dtype: torch.dtype | None, limit: int) -> dict[str, torch.dtype]:
    """Write shards of at most ``limit`` bytes (a single larger tensor is a shard of its own). Returns {name: dtype}."""
    shards: list[list[str]] = []
    dtypes: dict[str, torch.dtype] = {}
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, work / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in stream:
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if held and size + tensor.nbytes > limit:
            flush()
            size = 0
        held[name], dtypes[name] = tensor, tensor.dtype
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        where = {tensor: file for file, held_names in zip(names, shards, strict=True) for tensor in held_names}
        _write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    for i, name in enumerate(names):
        (work / f"shard-{i}").rename(work / name)
    return dtypes


def _token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")


def share(folder: Path) -> None:
    """Give the weights the permissions of the config beside them: safetensors makes files that only their owner may read."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
