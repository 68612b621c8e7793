"""Settings of `lorry attack`: whether what was unlearned comes back. No torch here.

Try: lorry attack runs/npo relearn local.tofu=data/tofu forget_split=forget05 oracle=runs/oracle
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic import model_validator as validate_model

from lorry.config.base import DirPath, PathText, SettingsGroup, config_field, derived_field
from lorry.config.schema import BackendConfig, ModelConfig
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
        "forget10", "TOFU's rows that were to be forgotten: forget01, forget05 or forget10"
    )
    forget: PathText | None = config_field(
        None, "a file of such rows instead: question, answer, paraphrased_answer, perturbed_answer"
    )
    local: dict[str, PathText] = config_field({}, "local.tofu=FOLDER with TOFU's splits")
    oracle: PathText | None = config_field(
        None, "a run or model trained without the rows, attacked beside it; robustness R needs it"
    )
    relearn_share: float = config_field(
        0.1, "relearn: share of the rows that is trained on; the others are measured", gt=0, lt=1
    )
    relearn_steps: list[NonNegativeInt] = config_field(
        [0, 5, 10, 25, 50], "relearn: steps after which the other rows are measured, from 0 on"
    )
    learning_rate: PositiveFloat = config_field(2e-4, "relearn: constant rate of the new adapter")
    r: PositiveInt = config_field(16, "relearn: rank of the new adapter", le=2**30)
    batch_size: PositiveInt = config_field(8, "rows of a relearning step; rows generated at a time")
    seed: NonNegativeInt = config_field(0, "relearn: of the choice of rows, their order, A")
    limit: PositiveInt | None = config_field(
        None, "rephrase: answer the first so many rows; probabilities are always of all"
    )
    max_new_tokens: PositiveInt | None = derived_field(
        "200", "rephrase: longest generated answer in tokens"
    )
    backend: BackendConfig = BackendConfig()
    output_dir: DirPath | None = derived_field(
        "evals in the run", "folder for attacks.json, to which each attack adds its part"
    )

    @field_validator("relearn_steps")
    @classmethod
    def _from_the_start(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value or not value or value[0] != 0:
            raise ValueError("has to rise from 0, where the model stands before the attack")
        return value

    @validate_model(mode="after")
    def _nothing_is_ignored(self) -> AttackSettings:
        unread = [n for n, attacks in ATTACKS_OF_FIELDS.items() if self.attack not in attacks]
        if odd := first_changed(self, unread):
            raise ValueError(
                f"{odd} is not read by {self.attack}; it is a setting of "
                f"{', '.join(ATTACKS_OF_FIELDS[odd])}"
            )
        if self.forget is not None and first_changed(self, ("forget_split",)):
            raise ValueError("forget and forget_split both say what was forgotten; keep one")
        return self
