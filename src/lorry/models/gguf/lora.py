"""An adapter as a GGUF file that llama.cpp adds to a model at run time (`--lora`).

    write_gguf_lora(file, architecture, adapter, name, "f32")
    check_gguf_lora(file, architecture, adapter)               # ContractError if it reads otherwise

llama.cpp's scale is `adapter.lora.alpha` / rank of each tensor: one alpha for all. An adapter whose
scale is another at some module (alpha_pattern, rsLoRA, a weight g) has the difference in its B; a
rank_pattern needs nothing. B's rows of q and k lie as the base's do. llama.cpp looks an adapter's
matrices up by the base's tensor names, so a tied head, which has none, cannot carry one; and what
it does with one on the embeddings it would do to a tied head as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy
from gguf import GGUFWriter
from torch import Tensor

from lorry.adapters.adapter import Adapter
from lorry.errors import ContractError, ModelError
from lorry.models.gguf.architecture import GgufArchitecture
from lorry.models.gguf.header import check_gguf
from lorry.models.gguf.writer import OUTTYPES, ROUNDING, encode_tensor, read_gguf_tensor


def write_gguf_lora(
    file: Path, architecture: GgufArchitecture, adapter: Adapter, name: str, outtype: str
) -> None:
    """Write ``file``. ``outtype``: f32, f16 or bf16. Raises ModelError for an adapter on a module
    where llama.cpp takes none, or one that is not finite.
    """
    kind, file_type = OUTTYPES[outtype]
    writer = GGUFWriter(str(file), architecture.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", _file_alpha(adapter))
    writer.add_name(name)
    writer.add_file_type(file_type)
    for place, tensor in _list_matrices(architecture, adapter):
        writer.add_tensor(place, encode_tensor(place, tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_gguf_lora(file: Path, architecture: GgufArchitecture, adapter: Adapter) -> float:
    """The largest error of a value in ``file`` as a share of it. Raises ContractError where one is
    more than rounding to its type can be.
    """
    header, worst = check_gguf(file), 0.0
    if header.values.get("adapter.lora.alpha") != numpy.float32(_file_alpha(adapter)):
        raise ContractError(
            "adapter.lora.alpha read back differs from the value written; the file was removed"
        )
    for place, exact in _list_matrices(architecture, adapter):
        if place not in header.tensors:
            raise ContractError(f"{place} is missing in the file written; it was removed")
        share, below_normal = ROUNDING[header.tensors[place].kind]
        errors = (read_gguf_tensor(file, header, place) - exact).abs()
        # this way round: NaN fails
        if not bool((errors <= exact.abs() * share + below_normal).all()):
            raise ContractError(
                f"{place}: the values written differ from those trained; the file was removed"
            )
        worst = max(worst, float(((errors - below_normal) / exact.abs().clamp_min(1e-30)).max()))
    return worst


def _file_alpha(adapter: Adapter) -> float:
    """The alpha of modules without a pattern of their own: the file's one alpha."""
    return float(adapter.plain_spec.lora_alpha)


def _list_matrices(
    architecture: GgufArchitecture, adapter: Adapter
) -> Iterator[tuple[str, Tensor]]:
    """(GGUF name, fp32 values) of each A [r, in] and B [out, r], the scale beyond alpha / r in B."""
    adapter.refuse_further("a GGUF adapter has A and B alone", "lorry export to=gguf merges it")
    alpha = _file_alpha(adapter)
    if alpha == 0 or not math.isfinite(alpha):
        # llama.cpp takes 0 for "no alpha given", which is a scale of 1
        raise ModelError(
            f"adapter {adapter.name!r} has lora_alpha={alpha:g}; there is nothing to write"
        )
    for path, slot in adapter.slots.items():
        place = architecture.place(f"{path}.weight")
        if place == "token_embd.weight" or (
            place == "output.weight" and architecture.geometry.tied
        ):
            what = (
                "the embeddings" if place == "token_embd.weight" else "an output head tied to them"
            )
            raise ModelError(
                f"adapter {adapter.name!r} is on {path}: llama.cpp does not support "
                f"an adapter on {what}; to=gguf merges it"
            )
        a, b = (factor.float().cpu() for factor in slot.factors())
        b = b * (slot.scale * a.shape[0] / alpha)
        yield f"{place}.lora_a", a
        yield f"{place}.lora_b", architecture.to_gguf(f"{path}.weight", b)
