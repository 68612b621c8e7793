"""Settings of `lorry attack`: whether what was unlearned comes back. No torch here.

Try: lorry attack runs/npo relearn local.tofu=data/tofu forget_split=forget05 oracle=runs/oracle
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic import model_validator as validate_model

from lorry.config.base import DirPath, PathText, SettingsGroup, config_field, derived_field
from lorry.config.schema.backend import SharedBackendConfig
from lorry.config.schema.model import ModelConfig
from lorry.config.suite import first_changed

# what only some attacks read; giving it to another is an error
ATTACKS_OF_FIELDS = {
    "relearn_share": ("relearn",),
    "relearn_steps": ("relearn",),
    "learning_rate": ("relearn",),
    "r": ("relearn",),
    "seed": ("relearn",),
    "batch_size": ("relearn", "rephrase"),
    "limit": ("rephrase",),
    "max_new_tokens": ("rephrase",),
}


class AttackSettings(SettingsGroup):
    """Try to get back what a run has unlearned: by fine-tuning on a part of it, by rounding the
    weights, by asking in other words.
    """

    positional: ClassVar[str] = "model attack"
    model: ModelConfig = ModelConfig()
    attack: Literal["relearn", "quantize", "rephrase"] = Field(
        description="relearn: fine-tune on a part of the forget rows; quantize: int8 and NF4 of the merged weights; "
        "rephrase: other words, another format, a jailbreak prefix"
    )
    forget_split: str = config_field(
        "forget10",
        "TOFU's forget set: forget01, forget05 or forget10",
        json_schema_extra={"shown": "the run's own; forget10 for a model that is no run"},
    )
    forget: PathText | None = config_field(
        None,
        (
            "forget set as a file instead; columns question, answer, "
            "paraphrased_answer, perturbed_answer"
        ),
    )
    local: dict[str, PathText] = config_field({}, "local.tofu=FOLDER that holds TOFU's splits")
    oracle: PathText | None = config_field(
        None, "run or model trained without the forget set, attacked too; needed for robustness R"
    )
    relearn_share: float = config_field(
        0.1, "relearn: share of the forget set to train on; the other rows are measured", gt=0, lt=1
    )
    relearn_steps: list[NonNegativeInt] = config_field(
        [0, 5, 10, 25, 50], "relearn: steps after which the other rows are measured; starts with 0"
    )
    learning_rate: PositiveFloat = config_field(
        2e-4, "relearn: constant learning rate of the new adapter"
    )
    r: PositiveInt = config_field(16, "relearn: rank of the new adapter", le=2**30)
    batch_size: PositiveInt = config_field(
        8, "rows per relearning step; rows per batch of generation"
    )
    seed: NonNegativeInt = config_field(
        0, "relearn: seed of the choice of rows, their order and the initial A"
    )
    limit: PositiveInt | None = config_field(
        None,
        ("rephrase: generate answers to the first n rows only; probabilities always use all rows"),
    )
    max_new_tokens: PositiveInt | None = derived_field(
        "200", "rephrase: maximum length of a generated answer, in tokens"
    )
    backend: SharedBackendConfig = SharedBackendConfig()
    output_dir: DirPath | None = derived_field(
        "evals/ in the run directory",
        "folder for attacks.json; each attack adds its results to that file",
    )

    @field_validator("backend")
    @classmethod
    def _layers_are_ours(cls, value: SharedBackendConfig) -> SharedBackendConfig:
        if value.name == "megatron":
            raise ValueError(
                "attacks ask and train Lorry's own layers, and backend=megatron has Megatron's; give "
                "backend=ddp or fsdp"
            )
        return value

    @validate_model(mode="after")
    def _rounded_weights_are_whole(self) -> AttackSettings:
        backend = self.backend
        cut = "backend=fsdp" if backend.name == "fsdp" else ""
        if backend.tensor_parallel > 1:
            cut = f"backend.tensor_parallel={backend.tensor_parallel}"
        if self.attack == "quantize" and cut:
            raise ValueError(
                f"attack=quantize merges and rounds whole base weights, of which with {cut} every "
                "process has a part; give backend=ddp alone (relearn and rephrase run with either)"
            )
        return self

    @field_validator("relearn_steps")
    @classmethod
    def _from_the_start(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value or not value or value[0] != 0:
            raise ValueError("has to start at 0 (the model before the attack) and increase")
        return value

    @validate_model(mode="after")
    def _nothing_is_ignored(self) -> AttackSettings:
        unread = [n for n, attacks in ATTACKS_OF_FIELDS.items() if self.attack not in attacks]
        if odd := first_changed(self, unread):
            raise ValueError(
                f"{odd} is not used by {self.attack}; it is a setting of "
                f"{', '.join(ATTACKS_OF_FIELDS[odd])}"
            )
        if self.forget is not None and first_changed(self, ("forget_split",)):
            raise ValueError("forget and forget_split both name the forget set; keep one")
        return self
