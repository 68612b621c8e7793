"""Hugging Face's weights into a Megatron model, parameter by parameter: one it has no name for is an
error.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .common import load_model_hf_weights
from .qwen import qwen_hf_tensor

_LOADERS = {"llama": qwen_hf_tensor, "qwen2": qwen_hf_tensor, "qwen3": qwen_hf_tensor}


def load_hf_weights(args: Namespace, model: Sequence[Any], path: str | Path) -> None:
    config = AutoConfig.from_pretrained(path)
    if config.model_type not in _LOADERS:
        raise ValueError(f"Unsupported HuggingFace model type: {config.model_type}")
    load_model_hf_weights(args, model, path, config, _LOADERS[config.model_type])
