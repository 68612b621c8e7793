"""The optimisation, its evaluations and its checkpoints, in TRL's names. No torch here."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import (
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorry.config.base import PathText, SettingsGroup, config_field, derived_field

# numbers of an evaluation of which less is better: a loss, and the terms that tasks/distill and
# tasks/moe make theirs of (nll_EXPERT among them)
LOSS_METRIC = re.compile(r"(.*_)?(loss|nll|perplexity)|nll_.*|distill|label|aux|z")
EvalStrategy = Literal["no", "steps", "epoch"]
SchedulerType = Literal["linear", "cosine", "constant", "constant_with_warmup"]
ReportTo = Literal["tensorboard", "wandb", "trackio"]


class TrainConfig(SettingsGroup):
    """the optimisation, in TRL's names"""

    learning_rate: float = config_field(2e-4, "peak learning rate", gt=0)
    loraplus_lr_ratio: float = config_field(1.0, "LoRA+: learning rate of B over that of A", gt=0)
    num_train_epochs: float = config_field(3.0, "passes over the data", gt=0, le=100_000)
    max_steps: int = config_field(-1, "optimizer steps; -1: decided by num_train_epochs", ge=-1)
    per_device_train_batch_size: PositiveInt = config_field(
        8, "examples (packed rows) per micro-batch"
    )
    per_device_eval_batch_size: PositiveInt = config_field(8, "examples per batch of an evaluation")
    gradient_accumulation_steps: PositiveInt = config_field(1, "micro-batches per optimizer step")
    # TRL's name; nothing to do with the checkpoints of save_steps
    gradient_checkpointing: bool = config_field(
        False, "recompute activations: less memory, more time"
    )
    lr_scheduler_type: SchedulerType = config_field("linear", "learning rate schedule")
    warmup_steps: NonNegativeInt = config_field(0, "warmup, in steps")
    warmup_epochs: float = config_field(0.0, "warmup, in epochs", ge=0)
    warmup_ratio: float = derived_field(
        "0.03; 0 with warmup_steps, warmup_epochs or a constant schedule",
        "warmup, as a share of all steps",
        ge=0,
        lt=1,
    )
    # as in transformers' TrainingArguments
    weight_decay: float = config_field(0.0, "decoupled weight decay of AdamW", ge=0)
    l2_regularization: float = config_field(
        0.0,
        "factor of the sum of squares of what trains, a term of the loss that is not shown",
        ge=0,
    )
    adam_beta1: float = config_field(0.9, "AdamW's first moment", ge=0, lt=1)
    adam_beta2: float = config_field(0.999, "AdamW's second moment", ge=0, lt=1)
    adam_epsilon: float = config_field(1e-8, "AdamW's epsilon", gt=0)
    max_grad_norm: float = config_field(
        1.0, "maximum gradient norm, clipped above it; 0: no clipping", ge=0
    )
    seed: NonNegativeInt = config_field(0, "seed of everything random")
    logging_steps: PositiveInt = config_field(1, "print a line every n steps")
    eval_strategy: EvalStrategy | None = derived_field(
        "epoch (steps with eval_steps) if there is eval data", "when to evaluate"
    )
    eval_steps: PositiveInt | None = config_field(None, "evaluate every n steps")
    eval_on_start: bool = config_field(False, "evaluate before the first step as well")
    save_strategy: Literal["steps", "epoch", "no"] = config_field(
        "steps", "when to write a checkpoint"
    )
    save_steps: PositiveInt = config_field(100, "write a checkpoint every n steps")
    # two: if the newest is damaged by what ended the run, one before it is left
    save_total_limit: PositiveInt | None = config_field(
        2, "number of checkpoints to keep; null: all"
    )
    load_best_model_at_end: bool = config_field(
        False, "save the adapter of the best evaluation, not the last one"
    )
    eval_tasks: list[str] = config_field(
        [], "named sets and suites to run at every evaluation, from data.local or the hub"
    )
    eval_limit: PositiveInt = config_field(100, "rows of each task in eval_tasks")
    eval_n_shot: NonNegativeInt = config_field(
        0, "few-shot examples before each question of eval_tasks"
    )
    metric_for_best_model: str = config_field(
        "eval_loss", "metric of the best evaluation; of eval_tasks such as eval_bool_q_accuracy"
    )
    greater_is_better: bool = derived_field(
        "false for a loss, its terms, NLL or perplexity, else true",
        "whether a higher value of that metric is better",
    )
    early_stopping_patience: PositiveInt | None = config_field(
        None, "stop after n evaluations without a better one"
    )
    resume_from_checkpoint: PathText | None = config_field(
        None, "auto or true: the newest checkpoint in output_dir, if any; or a path"
    )
    report_to: list[ReportTo] = config_field([], "none, or tensorboard, wandb, trackio")
    run_name: str | None = config_field(None, "name for reports and the default output_dir")
    push_to_hub: bool | str = config_field(
        False, "upload the finished run to the hub; true, or the repository OWNER/NAME"
    )
    hub_model_id: str | None = config_field(
        None, "repository to upload to; null: the run's name under your account"
    )
    hub_private_repo: bool = config_field(False, "make that repository private")

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _true_is_auto(cls, value: Any) -> Any:
        # TRL takes true for the newest checkpoint
        return {"true": "auto", "false": None}.get(str(value).lower(), value)

    @field_validator("report_to", mode="before")
    @classmethod
    def _report_list(cls, value: Any) -> Any:
        return (
            []
            if value in (None, "none", ["none"])
            else value.split(",")
            if isinstance(value, str)
            else value
        )

    @field_validator("max_steps")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            # a run of no steps would save an adapter that changes nothing and look finished
            raise ValueError("got 0; give at least 1, or -1 for num_train_epochs")
        return value

    @field_validator("greater_is_better", mode="before")
    @classmethod
    def _direction_of_the_metric(cls, value: Any, info: ValidationInfo) -> Any:
        # as transformers' TrainingArguments, which knows losses alone
        metric = info.data.get("metric_for_best_model", "loss").removeprefix("eval_")
        return LOSS_METRIC.fullmatch(metric) is None if value is None else value

    @field_validator("warmup_ratio", mode="before")
    @classmethod
    def _default_warmup(cls, value: Any, info: ValidationInfo) -> Any:
        # info.data holds the fields above it that are valid, so those stand before this one
        has_other_warmup = info.data.get("warmup_steps") or info.data.get("warmup_epochs")
        without = has_other_warmup or info.data.get("lr_scheduler_type") == "constant"
        return (0.0 if without else 0.03) if value is None else value

    @model_validator(mode="after")
    def _settings_agree(self) -> TrainConfig:
        warmups = [n for n in ("steps", "epochs", "ratio") if getattr(self, f"warmup_{n}")]
        if len(warmups) > 1:
            raise ValueError(
                f"train.warmup_{warmups[0]} and train.warmup_{warmups[1]} both set the warmup; keep one"
            )
        if self.lr_scheduler_type == "constant" and warmups:
            raise ValueError(
                "train.lr_scheduler_type=constant has no warmup; use constant_with_warmup or leave the warmup out"
            )
        if self.eval_steps and self.eval_strategy in ("no", "epoch"):
            raise ValueError(
                f"train.eval_steps needs train.eval_strategy=steps, got {self.eval_strategy}"
            )
        if self.eval_strategy == "steps" and not self.eval_steps:
            raise ValueError("train.eval_strategy=steps needs train.eval_steps")
        return self
