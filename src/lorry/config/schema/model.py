"""Which model a run or a command is about, and how it is held. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from lorry.config.base import (
    DtypeName,
    PathText,
    QuantizeFormat,
    SettingsGroup,
    config_field,
)

DEVICE, DEVICE_WORDS = r"^(auto|cpu|mps|cuda(:\d+)?)$", "auto, cpu, cuda, cuda:N or mps"


class ModelConfig(SettingsGroup):
    """the frozen base model"""

    main: ClassVar[str] = "name"
    name: PathText = config_field(
        "smollm2-135m-instruct",
        "HF directory, hub id, .gguf file, run directory, or the embedded default",
    )
    revision: str | None = config_field(None, "branch, tag or commit of a hub model")
    dtype: DtypeName = config_field(
        "auto",
        "dtype of the base weights; auto: bfloat16 where the device is fast in it, else float32",
    )
    quantize: QuantizeFormat | Literal["auto"] | None = config_field(
        None,
        "hold the matrices of the frozen base in 4 or 8 bits; keep: as a GGUF file has them, or, where float32 is "
        "computed in, a bfloat16 one; null: as an adapter's base was held, or as its files are; auto: whole, int8 "
        "or nf4, the first that fits memory_budget",
    )
    device: str = config_field(
        "auto", DEVICE_WORDS, pattern=DEVICE, json_schema_extra={"allowed": DEVICE_WORDS}
    )
    # off: that code has all rights of whoever runs this
    trust_remote_code: bool = config_field(False, "run Python code that comes with a hub model")
    adapter: PathText | None = config_field(None, "adapter directory to continue training from")
    convert_init: bool = config_field(
        False,
        "read an adapter whose pissa or olora initialisation changed its base, as if this were that base before",
    )
    other_base: bool = config_field(
        False,
        "read adapters over another base than they were trained on: other weights, or held otherwise; quantize=null "
        "holds it as its files are",
    )
    chat_template_path: PathText | None = config_field(
        None, "Jinja file used instead of the tokenizer's chat template"
    )
    native: bool = config_field(
        True, "Lorry's own decoder where it knows the family; false forces transformers'"
    )
