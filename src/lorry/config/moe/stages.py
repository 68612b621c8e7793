"""What `lorry moe` does besides its experts and their router: exports, finetuning, which stages are
skipped, and where each writes. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, field_validator, model_validator

from lorry.config.base import DtypeName, Outtype, PathText, SettingsGroup, config_field
from lorry.config.suite import first_changed

EXPORTS = "a list of hf-moe, dense, peft, gguf, or maps such as {to: hf-moe, attention: average}, {to: gguf, outtype: q8_0}"
# folders of these stages, beside which experts lie in theirs
OUTPUT_NAMES = frozenset(
    {"hf-moe", "hf-moe_finetuned", "hf-moe_router", "dense", "peft", "gguf", "merged"}
)
Layout = Literal["run", "workspace"]


# what each format reads
EXPORT_READS = {
    "hf-moe": ("gate_mode", "attention", "architecture", "experts_per_token", "dtype"),
    "dense": ("dtype",),
    "peft": (),
    "gguf": ("outtype", "path"),
}
EXPORT_FIELDS = tuple(name for names in EXPORT_READS.values() for name in names)


class ExportStage(SettingsGroup):
    """A format that the finished mixture is written in: settings of `lorry export` beside its run."""

    main: ClassVar[str] = "to"
    to: Literal["hf-moe", "dense", "peft", "gguf"]
    gate_mode: Literal["router", "hidden", "hidden_avg", "cheap_embed", "random"] = config_field(
        "router",
        "of hf-moe: a trained token router, the mixture's or one trained for it; or mergekit's from 16 training rows",
    )
    attention: Literal["refuse", "average", "drop"] = config_field(
        "refuse", "of hf-moe: what becomes of deltas outside the MLPs"
    )
    architecture: Literal["auto", "mixtral", "qwen2_moe", "qwen3_moe"] = config_field(
        "auto", "of hf-moe: the class; the base's family decides, another one is refused"
    )
    experts_per_token: PositiveInt | None = config_field(
        None, "of hf-moe: experts that a token goes to; null: as the router has it"
    )
    dtype: DtypeName = config_field("auto", "of hf-moe and dense: number format to store")
    outtype: Outtype = config_field("auto", "of gguf: how matrices are stored")
    path: PathText | None = config_field(None, "of gguf: the file; null: in OUTPUT/gguf")

    @model_validator(mode="before")
    @classmethod
    def _a_word_is_a_format(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"to": value}
        # mergekit-moe's name, as `lorry export` takes it
        if isinstance(value, Mapping) and "gate" in value and "gate_mode" not in value:
            return {"gate_mode" if key == "gate" else key: own for key, own in value.items()}
        return value

    @model_validator(mode="after")
    def _read_by_the_format(self) -> ExportStage:
        unread = [name for name in EXPORT_FIELDS if name not in EXPORT_READS[self.to]]
        # by value: a description that was written lists every field
        if odd := first_changed(self, unread):
            raise ValueError(f"export: {odd} is not read by to={self.to}")
        return self

    @field_validator("outtype", mode="before")
    @classmethod
    def _lower_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value


@dataclass(frozen=True)
class StageFolders:
    """Where the stages write below ``output``; a workspace is laid out as the project RMoE does."""

    output: Path
    layout: Layout

    @property
    def experts(self) -> Path:
        """The run of the experts, or a folder with one for each."""
        return self.output / "experts"

    @property
    def mixture(self) -> Path:
        """Experts and router."""
        return self.output / "gating_network" if self.layout == "workspace" else self.output

    @property
    def moe_router(self) -> Path:
        """The run of a token router for the stock class, where the mixture has another kind."""
        return self.moe.with_name("rmoe_router" if self.layout == "workspace" else "hf-moe_router")

    @property
    def moe(self) -> Path:
        """The mixture in a stock class."""
        return self.output / ("rmoe_model" if self.layout == "workspace" else "hf-moe")

    @property
    def finetuned(self) -> Path:
        """The same after all of its weights were trained."""
        return self.moe.with_name(f"{self.moe.name}_finetuned")

    def export(self, form: str) -> Path:
        """Of a format that is written straight from the mixture: dense, peft."""
        return self.output / form

    @property
    def gguf(self) -> Path:
        """The folder of the GGUF file."""
        return self.output / "gguf"
