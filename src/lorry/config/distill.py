"""The description of a distillation: a training run whose task is to speak as a teacher does. No
torch here.

Try: lorry distill data=people.jsonl teacher=runs/large loss=jsd temperature=2
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, model_validator

from lorry.config.base import (
    DtypeName,
    PathText,
    QuantizeFormat,
    SettingsGroup,
    config_field,
    derived_field,
)
from lorry.config.schema.run import RunConfig

DivergenceName = Literal["kl", "reverse_kl", "jsd", "uld"]


class DistillConfig(SettingsGroup):
    """the teacher and how the student follows it"""

    main: ClassVar[str] = "teacher"
    teacher: PathText | None = config_field(
        None, "teacher: a model or a run; null with teacher_adapter: the student's base model"
    )
    teacher_adapter: PathText | None = config_field(
        None, "adapter of the teacher; on the student's base model no second model is loaded"
    )
    teacher_dtype: DtypeName = config_field("auto", "dtype of the teacher's weights")
    teacher_quantize: QuantizeFormat | None = config_field(
        None, "hold the teacher's matrices in 4 or 8 bits"
    )
    loss: DivergenceName = config_field(
        "kl",
        "kl (teacher to student), reverse_kl, jsd (with beta), or uld for another tokenizer (sorted probabilities)",
    )
    temperature: float = config_field(1.0, "temperature of both distributions", ge=1e-3, le=1e3)
    beta: float = config_field(
        0.5, "jsd: share of the teacher in the mixture; 0 is kl, 1 reverse_kl", ge=0, le=1
    )
    # gt=0: with 0 nothing would be learnt from the teacher, and it would be read for nothing
    alpha: float = config_field(
        0.5,
        (
            "weight of the distillation loss; 1 - alpha is that of the cross-entropy "
            "on the data's answers"
        ),
        gt=0,
        le=1,
    )
    top_k: PositiveInt | None = derived_field(
        "null; 64 with cache",
        "use the teacher's k likeliest tokens only; null: the whole vocabulary",
    )
    cache: PathText | None = config_field(
        None,
        ("directory to cache the teacher's scores in, so that the teacher runs over each row once"),
    )

    @model_validator(mode="before")
    @classmethod
    def _top_k_of_a_cache(cls, values: Any) -> Any:
        # before the fields are validated, so that run.yaml has the 64 as if it had been given
        if isinstance(values, dict) and values.get("cache") and values.get("top_k") is None:
            # a whole distribution is the vocabulary per token: 100 KB and more on the disk for each
            return {**values, "top_k": 64}
        return values

    @model_validator(mode="after")
    def _some_teacher(self) -> DistillConfig:
        if self.teacher is None and self.teacher_adapter is None:
            raise ValueError(
                "distill.teacher is missing: give teacher=MODEL, or teacher_adapter=RUN for an adapter of the same base"
            )
        return self


class DistillRunConfig(RunConfig):
    """A student learns from a teacher: another model, another adapter of its base, or a teacher in
    4 bits.
    """

    task: Literal["distill"] = config_field("distill", "fixed by the verb")  # type: ignore[assignment]  # the task is the verb's
    distill: DistillConfig

    @model_validator(mode="after")
    def _one_student(self) -> DistillRunConfig:
        if self.jobs:
            raise ValueError("jobs: a distillation trains one student; start one run for each")
        if self.data.streaming:
            raise ValueError(
                "data.streaming: distillation reads its rows more than once; leave streaming out"
            )
        return self
