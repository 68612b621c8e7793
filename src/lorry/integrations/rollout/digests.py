"""SHA-256 of every tensor of a safetensors file, to compare what was sent with what was received.

    read_tensor_facts(content, "lora_v000001/adapter_model.safetensors")["....lora_A.weight"].sha256

A digest is over dtype, shape and bytes, so that two sides that differ in any of them differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from lorry.errors import ModelError

# as safetensors writes them
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


@dataclass(frozen=True)
class TensorFacts:
    """What a receipt says of one tensor. ``dtype``: as safetensors writes it ("F32", "BF16");
    ``zero``: every value is 0."""

    sha256: str
    dtype: str
    shape: tuple[int, ...]
    zero: bool


def read_tensor_facts(content: bytes, where: str) -> dict[str, TensorFacts]:
    """{tensor: facts} of a safetensors file's content. Raises ModelError, which names ``where``."""
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ModelError(f"{where} is no whole safetensors file ({error})") from None
    return {
        name: _facts(str(entry["dtype"]), tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in entries
    }


def digest_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """{tensor: SHA-256} of tensors in memory, the same as of a file that holds them."""
    content = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    return {name: facts.sha256 for name, facts in read_tensor_facts(content, "memory").items()}


def digest_tensor(tensor: Tensor) -> str:
    """SHA-256 of one tensor on the CPU, the same as of a file that holds it, without a copy of it."""
    own = tensor.detach().contiguous()
    # a buffer, which numpy's stubs do not say
    data: Any = own.reshape(-1).view(torch.uint8).numpy()
    return _digest(_DTYPES[own.dtype], tuple(own.shape), data)


def _facts(dtype: str, shape: tuple[int, ...], data: bytes) -> TensorFacts:
    return TensorFacts(_digest(dtype, shape, data), dtype, shape, data.count(0) == len(data))


def _digest(dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    digest = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    digest.update(data)
    return digest.hexdigest()
