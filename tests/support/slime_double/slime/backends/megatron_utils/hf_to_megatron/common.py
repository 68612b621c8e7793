"""Reading, fusing and cutting of Hugging Face's tensors."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

HfTensor = Callable[[str, Mapping[str, Tensor], Any], Tensor]


def strip_mcore_wrappers(name: str) -> str:
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, config: Any) -> Tensor:
    """Rows by KV group: its queries, its key, its value."""
    groups, rest = config.num_key_value_heads, q.shape[1:]
    parts = [t.reshape(groups, -1, *rest) for t in (q, k, v)]
    return torch.cat(parts, 1).reshape(-1, *rest)


def shard_mcore_tensor(name: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return tensor
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    halves = 2 if "linear_fc1" in name else 1
    return torch.cat([half.chunk(size, dim)[rank] for half in tensor.chunk(halves, dim)], dim)


def load_model_hf_weights(
    args: Namespace,
    model: Sequence[Any],
    path: str | Path,
    config: Any,
    get_hf_tensor: HfTensor,
) -> None:
    from slime.backends.megatron_utils.update_weight.common import named_params_and_buffers

    reader: dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        reader |= load_file(file)
    with torch.no_grad():
        for name, parameter in named_params_and_buffers(args, model):
            tensor = get_hf_tensor(name, reader, config)
            if name.endswith("output_layer.weight") and parameter.shape[0] == 1:
                continue  # a critic's
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                tensor = functional.pad(tensor, (0, 0, 0, args.padded_vocab_size - tensor.shape[0]))
            tensor = shard_mcore_tensor(name, tensor, parameter)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} is not {tuple(parameter.shape)}")
            parameter.copy_(tensor)
