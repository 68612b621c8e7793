"""One of Megatron's whole parameters as Hugging Face's tensors: one it has no name for is an error."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from torch import Tensor

from .llama import convert_llama_to_hf
from .qwen2 import convert_qwen2_to_hf


def convert_to_hf(
    args: Namespace, model_name: str, name: str, param: Tensor, quantization_config: Any = None
) -> list[tuple[str, Tensor]]:
    assert quantization_config is None, "the double quantises nothing"
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        param = param[: args.vocab_size]
    if "qwen2" in model_name or "qwen3" in model_name:
        return convert_qwen2_to_hf(args, name, param)
    if "llama" in model_name:
        return convert_llama_to_hf(args, name, param)
    raise ValueError(f"Unsupported model: {model_name}")
