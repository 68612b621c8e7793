"""A tiny Llama as a GGUF file with a byte-level tokenizer of its own, whole or with something wrong
with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
from numpy.typing import NDArray

from tests.support import tiny

Tensors = list[tuple[str, NDArray[numpy.float32]]]


def llama_tensors(**overrides: object) -> Tensors:
    """(name in GGUF, values) of `tiny.fresh("llama", vocab_size=300)`, rounded to bf16, as
    llama.cpp lays them out.
    """
    model = tiny.fresh("llama", vocab_size=300, **overrides)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    found = []
    for name, tensor in model.state_dict().items():
        values = tensor.bfloat16().float()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:  # GGUF stores llama's rotary pairs side by side
                values = values.view(heads, 2, -1, 32).transpose(1, 2).reshape(values.shape)
        found.append((names.get_name(name, try_suffixes=(".weight",)), values.contiguous().numpy()))
    return found


def write_gguf(
    path: Path,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    *,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    keys: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    theta: float = 10000.0,
) -> Path:
    """``change``: of the tensors; ``kinds``: {name: element type} of those not in fp32; ``keys``:
    adds metadata.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(300)
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    # GPT-2's printable stand-ins for the 256 bytes
    letters += [chr(256 + n) for n in range(256 - len(letters))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*letters, "ab", *(f"<s{i}>" for i in range(43))])
    writer.add_token_types([1] * 257 + [3] * 43)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    keys(writer)
    for name, values in change(llama_tensors()):
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
