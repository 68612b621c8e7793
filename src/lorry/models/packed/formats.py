"""Which format a checkpoint's matrices are packed in, as its config.json says; what cannot be read is
refused by name, before a weight is read, with what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorry.adapters.quantization.packed import Quantization
from lorry.errors import ModelError
from lorry.families.packing import stated_bits, stated_group
from lorry.models.packed.bitsandbytes import BitsAndBytes4Bit, BitsAndBytes8Bit
from lorry.models.packed.float8 import Float8
from lorry.models.packed.groups import Awq, Gptq
from lorry.models.packed.parts import PackedFormat

UNPACK_ELSEWHERE = (
    "open it once where its library is installed, save it whole (transformers: "
    "model.dequantize(); model.save_pretrained(DIR)), and give that directory"
)
# formats that are known and cannot be read: what each is called, and what to do
REFUSED = {
    "mxfp4": "give the bf16 checkpoint (transformers: Mxfp4Config(dequantize=True), then save_pretrained), and pack "
    "that with model.quantize=nf4",
    "mxfp8": UNPACK_ELSEWHERE,
    "nvfp4": "give the unquantised checkpoint, and pack that with model.quantize=nf4",
    "modelopt": "give the unquantised checkpoint, and pack that with model.quantize=nf4",
    "hqq": "give the unquantised checkpoint: HQQ packs while it loads, as model.quantize=nf4 does",
    "quanto": "give the unquantised checkpoint: quanto packs while it loads, as model.quantize=int8 does",
    "eetq": "give the unquantised checkpoint, and pack that with model.quantize=int8",
    "torchao": "give the unquantised checkpoint, and pack that with model.quantize=int8",
    "compressed-tensors": UNPACK_ELSEWHERE,
    "fbgemm_fp8": UNPACK_ELSEWHERE,
    "quark": UNPACK_ELSEWHERE,
    "aqlm": UNPACK_ELSEWHERE,
    "auto-round": "give a copy that auto-round has exported as GPTQ or AWQ, or the unquantised checkpoint",
    **dict.fromkeys(
        ("vptq", "higgs", "spqr", "bitnet", "fp_quant", "sinq", "fouroversix", "metal", "gemma"),
        "give the unquantised checkpoint of the same model",
    ),
}
READ = "bitsandbytes, gptq, awq and fp8"


def packed_format(stated: Mapping[str, Any], where: str) -> PackedFormat:
    """The format of a checkpoint with this `quantization_config`. Raises ModelError, opening with
    ``where``, for one that cannot be read."""
    method = stated.get("quant_method")
    if method is None:  # older files of bitsandbytes and compressed-tensors name none
        method = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & stated.keys() else "unnamed"
    name = str(method).lower().replace("_", "-") if method == "compressed_tensors" else str(method)
    reader = READERS.get(name)
    if reader is None:
        raise ModelError(
            f"{where}: a checkpoint packed by {name!r} cannot be read ({READ} can); "
            f"{REFUSED.get(name, 'give the unquantised checkpoint of the same model')}"
        )
    return reader(stated, where)


def _bitsandbytes(stated: Mapping[str, Any], where: str) -> PackedFormat:
    # as transformers names them, and as bitsandbytes' first files did
    if stated.get("load_in_8bit") or stated.get("_load_in_8bit"):
        return BitsAndBytes8Bit()
    name = stated.get("bnb_4bit_quant_type", "fp4")
    if name not in ("nf4", "fp4"):
        raise ModelError(f"{where}: bnb_4bit_quant_type={name!r}; nf4 and fp4 can be read")
    return BitsAndBytes4Bit(
        Quantization(name, double=bool(stated.get("bnb_4bit_use_double_quant", False)))
    )


def _gptq(stated: Mapping[str, Any], where: str) -> PackedFormat:
    layout = str(stated.get("checkpoint_format", stated.get("format", "gptq"))).lower()
    bits = stated_bits(stated, 4)
    if layout not in ("gptq", "gptq_v2") or stated.get("is_marlin_format"):
        raise ModelError(
            f"{where}: GPTQ in the layout {layout!r}, which is made for one kernel, cannot be read; 'gptq' and "
            "'gptq_v2' can: give that copy, or the unquantised checkpoint"
        )
    if bits not in (4, 8):
        raise ModelError(
            f"{where}: GPTQ of {bits} bits cannot be read (4 and 8 can); give the unquantised checkpoint"
        )
    return Gptq(
        _group_size(stated, where),
        zeros_off=1 if layout == "gptq" else 0,
        ordered=bool(stated.get("desc_act")),
    )


def _awq(stated: Mapping[str, Any], where: str) -> PackedFormat:
    layout = str(stated.get("version", stated.get("format", "gemm"))).lower()
    bits = stated_bits(stated, 4)
    if layout != "gemm" or bits != 4:
        raise ModelError(
            f"{where}: AWQ of {bits} bits in the layout {layout!r} cannot be read; 4 bits as 'gemm' can: give that "
            "copy, or the unquantised checkpoint"
        )
    return Awq(_group_size(stated, where))


def _float8(stated: Mapping[str, Any], where: str) -> PackedFormat:
    block = stated.get("weight_block_size") or (128, 128)
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(isinstance(n, int) and n > 0 and n % 2 == 0 for n in block)
    ):
        raise ModelError(
            f"{where}: weight_block_size={block!r}; two even numbers, (outputs, inputs), are expected"
        )
    return Float8((block[0], block[1]))


def _group_size(stated: Mapping[str, Any], where: str) -> int | None:
    """Inputs that share a scale; None (-1 in files) for all."""
    size = stated_group(stated)
    if not isinstance(size, int) or isinstance(size, bool) or size == 0 or size < -1:
        raise ModelError(f"{where}: group_size={size!r}; -1 or a number of inputs is expected")
    return None if size == -1 else size


READERS: Mapping[str, Callable[[Mapping[str, Any], str], PackedFormat]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _float8,
}
