"""`--save-hf` and the disk updater: the whole model as a Hugging Face directory, a bucket at a time."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

WEIGHTS = (".safetensors", ".bin", ".index.json")


def save_hf_model_to_path(
    args: Namespace,
    output_dir: str | Path,
    model: Sequence[Any],
    *,
    model_name: str | None = None,
    quantization_config: Any = None,
) -> None:
    """Every rank calls it; rank 0 writes."""
    # when it is called, as in slime: what is rebound before is what runs
    from .update_weight.common import named_params_and_buffers
    from .update_weight.hf_weight_iterator_direct import HfWeightIteratorDirect

    path, origin = Path(output_dir), Path(args.hf_checkpoint)
    is_writer = dist.get_rank() == 0
    if path.resolve() == origin.resolve():
        raise ValueError("the saved model must not lie in --hf-checkpoint")
    if is_writer:
        path.mkdir(parents=True, exist_ok=True)
        for item in origin.iterdir():
            if item.is_file() and not item.name.endswith(WEIGHTS):
                shutil.copy2(item, path)
    name = model_name or type(AutoConfig.from_pretrained(origin)).__name__.lower()
    iterator = HfWeightIteratorDirect(
        args=args, model=model, model_name=name, quantization_config=quantization_config
    )
    own = dict(named_params_and_buffers(args, model, convert_to_global_name=True))
    written: dict[str, str] = {}
    for number, chunk in enumerate(iterator.get_hf_weight_chunks(own)):
        tensors: dict[str, Tensor] = {}
        for key, tensor in chunk:
            if key in written or key in tensors:
                raise ValueError(f"Duplicate HF tensor while saving: {key}")
            tensors[key] = tensor.detach().contiguous().clone()
        file = f"model-{number + 1:05d}.safetensors"
        if is_writer:
            save_file(tensors, path / file, metadata={"format": "pt"})
        written |= dict.fromkeys(tensors, file)
    if is_writer:
        index = {"metadata": {}, "weight_map": written}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
