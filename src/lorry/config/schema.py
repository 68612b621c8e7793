"""The description of a training run: every setting, its default, its limits and its one line of help. No torch here.

Try: lorry sft --help
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo,
    field_validator, model_validator,
)  # fmt: skip

from lorry.config.names import accepts, allowed

Evaluate = Literal["no", "steps", "epoch"]
Report = Literal["tensorboard", "wandb", "trackio"]
DTYPE_WORDS = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
PLAIN_NAMES = re.compile(r"\w+(\s*,\s*\w+)*")  # q_proj or q_proj,v_proj: as a regex it could only match a module of that full name


def _clean_path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("must not be empty or hold a NUL character")
    return os.path.expanduser(text)


def _read_dtype(value: Any) -> Any:
    """bf16, fp32, torch.bfloat16 and the like in full; anything else as it is."""
    word = value.removeprefix("torch.") if isinstance(value, str) else value
    return DTYPE_WORDS.get(word, word) if isinstance(word, str) else value


def _clean_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text) or not text.strip("."):
        raise ValueError(f"{text[:80]!r} is not a name: 1 to 64 letters, digits, '.', '_' or '-'")
    return text


PathText = Annotated[str, AfterValidator(_clean_path)]
DirPath = Annotated[Path, AfterValidator(lambda path: Path(_clean_path(str(path))))]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_read_dtype)]
Name = Annotated[str, AfterValidator(_clean_name)]


def automatic(shown: str, description: str, **limits: Any) -> Any:
    """A field that is worked out from others when it is left alone or null; ``shown`` is its default in words."""
    extra = {"shown": shown}
    return Field(default=None, validate_default=True, description=description, json_schema_extra=extra, **limits)


class Group(BaseModel):
    """Settings that belong together. ``main`` is the field that ``group=value`` means; ``positional`` takes bare words."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    main: ClassVar[str] = ""
    positional: ClassVar[str] = ""

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Paths become text; true/false is not a number (pydantic would read it as 1 or 0)."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and not accepts(field, bool):
            raise ValueError(f"got {str(value).lower()}; give {allowed(field)}")
        return os.fspath(value) if isinstance(value, os.PathLike) else value


class ModelConfig(Group):
    """the frozen base model"""

    main: ClassVar[str] = "name"
    name: PathText = Field("smollm2-135m-instruct", description="HF directory, hub id, .gguf file, run directory, or the embedded default")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Dtype = Field("auto", description="number format of the base weights; auto keeps that of the files")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps")
    trust_remote_code: bool = Field(False, description="run Python code that a hub model brings along")
    adapter: PathText | None = Field(None, description="adapter to start from (directory or hub id)")
    chat_template_path: PathText | None = Field(None, description="Jinja file used instead of the tokenizer's chat template")
    native: bool = Field(True, description="Lorry's own decoder where it knows the family; false forces transformers'")


class LoraConfig(Group):
    """the adapter; lora=null trains the weights themselves"""

    main: ClassVar[str] = "r"
    r: PositiveInt = Field(16, description="rank")
    lora_alpha: PositiveInt | PositiveFloat = automatic("2 x r", "strength: the update is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field("auto", description="auto (attention and MLP), all-linear, a list of names, or a regex")
    exclude_modules: str | list[str] | None = Field(None, description="names or a regex to leave out")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r)")
    init_lora_weights: bool | Literal["gaussian"] = Field(True, description="true: Kaiming A, zero B; gaussian; false: both random")
    rank_pattern: dict[str, PositiveInt] = Field({}, description="rank by module name or regex")
    alpha_pattern: dict[str, PositiveInt | PositiveFloat] = Field({}, description="lora_alpha by module name or regex")
    layers_to_transform: NonNegativeInt | list[NonNegativeInt] | None = Field(None, description="only these layer numbers")
    bias: Literal["none"] = Field("none", description="biases stay frozen")
    adapter_name: Name = Field("default", description="the adapter's name in a bank of several")

    @field_validator("lora_alpha", mode="before")
    @classmethod
    def _twice_r(cls, value: Any, info: ValidationInfo) -> Any:
        return 2 * info.data.get("r", 1) if value is None else value

    @field_validator("target_modules", "exclude_modules", mode="before")
    @classmethod
    def _module_names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto" and PLAIN_NAMES.fullmatch(value):
            return re.split(r"\s*,\s*", value)
        if value in ("", []):
            raise ValueError("names no module")
        return value

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _regex(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, str):
            try:
                re.compile(value)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{value!r} is not a regular expression ({error})") from None
        return value


class DataConfig(Group):
    """the examples"""

    main: ClassVar[str] = "path"
    path: PathText | list[PathText] = Field(description="file, directory or hub id, or a list of them")
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    format: Literal["auto", "text", "prompt_completion", "messages", "conversations", "alpaca", "question_answer"] = Field(
        "auto", description="how a row is read; auto goes by its columns"
    )
    eval: PathText | None = Field(None, description="file, directory or hub id to evaluate on")
    eval_split: str | None = Field(None, description="split to evaluate on, of eval or else of path")
    test_size: int | float | None = Field(None, description="rows of path held out for evaluation: a share below 1 or a count")
    n: PositiveInt | None = Field(None, description="use the first n rows")
    streaming: bool = Field(False, description="read rows as they are needed")
    shuffle: bool = Field(True, description="another order each epoch, a function of (seed, epoch)")
    max_length: int = Field(1024, ge=2, description="longest example in tokens; a longer one loses the start of its prompt")
    packing: bool = Field(False, description="lay several examples end to end in max_length tokens; they do not see each other")
    completion_only_loss: bool | None = Field(
        None, description="learn the answers only; null: yes, unless the rows are plain text"
    )
    on_bad_row: Literal["error", "skip", "quarantine"] = Field("error", description="stop, drop the row, or keep it in a file aside")
    system: str | None = Field(None, description="system message for conversations that bring none")
    text_field: str | None = Field(None, description="column of plain text")

    @field_validator("path")
    @classmethod
    def _some_path(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("names no file")
        return value

    @field_validator("test_size")
    @classmethod
    def _share_or_count(cls, value: int | float | None) -> int | float | None:
        if value is None or (isinstance(value, int) and value >= 1) or (isinstance(value, float) and 0 < value < 1):
            return value
        raise ValueError(f"got {value}; give a share between 0 and 1 or a count of at least 1")

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> DataConfig:
        if self.test_size is not None and (self.eval or self.eval_split):
            raise ValueError("data.test_size and data.eval (or data.eval_split) both say what to evaluate on; keep one")
        return self

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.eval or self.eval_split or self.test_size)


class TrainConfig(Group):
    """the optimisation, in TRL's names"""

    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    loraplus_lr_ratio: float = Field(1.0, gt=0, description="LoRA+: learning rate of B over that of A")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the data")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1: as num_train_epochs says")
    per_device_train_batch_size: PositiveInt = Field(8, description="examples (packed rows) per micro-batch")
    per_device_eval_batch_size: PositiveInt = Field(8, description="the same when evaluating")
    gradient_accumulation_steps: PositiveInt = Field(1, description="micro-batches per optimizer step")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field("linear", description="schedule")
    warmup_steps: NonNegativeInt = Field(0, description="steps of rising learning rate")
    warmup_ratio: float = automatic("0.03, or 0 with warmup_steps", "the same as a share of all steps", ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient's norm; 0: do not")
    seed: NonNegativeInt = Field(0, description="everything random follows from it")
    logging_steps: PositiveInt = Field(1, description="show every so many steps")
    eval_strategy: Evaluate | None = automatic("epoch (steps with eval_steps) if there is eval data", "when to evaluate")
    eval_steps: PositiveInt | None = Field(None, description="evaluate every so many steps")
    save_strategy: Literal["steps", "epoch", "no"] = Field("steps", description="when to write a checkpoint")
    save_steps: PositiveInt = Field(100, description="write one every so many steps")
    save_total_limit: PositiveInt | None = Field(2, description="checkpoints kept; null: all")
    load_best_model_at_end: bool = Field(False, description="end with the best evaluated adapter, not the last")
    metric_for_best_model: str = Field("eval_loss", description="what best means")
    greater_is_better: bool = Field(False, description="whether more of that metric is better")
    early_stopping_patience: PositiveInt | None = Field(None, description="stop after so many evaluations without a better one")
    resume_from_checkpoint: PathText | None = Field(None, description="auto (or true): the newest in output_dir, if any; or a path")
    report_to: list[Report] = Field([], description="none, or tensorboard, wandb, trackio")
    run_name: str | None = Field(None, description="name for reports and the default output_dir")

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _true_is_auto(cls, value: Any) -> Any:
        return {True: "auto", False: None}[value] if isinstance(value, bool) else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _report_list(cls, value: Any) -> Any:
        return [] if value in (None, "none", ["none"]) else value.split(",") if isinstance(value, str) else value

    @field_validator("max_steps")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("got 0; give at least 1, or -1 for num_train_epochs")
        return value

    @field_validator("warmup_ratio", mode="before")
    @classmethod
    def _default_warmup(cls, value: Any, info: ValidationInfo) -> Any:
        return (0.0 if info.data.get("warmup_steps") else 0.03) if value is None else value

    @model_validator(mode="after")
    def _settings_agree(self) -> TrainConfig:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("train.warmup_steps and train.warmup_ratio both set the warmup; keep one")
        if self.eval_steps and self.eval_strategy in ("no", "epoch"):
            raise ValueError(f"train.eval_steps needs train.eval_strategy=steps, got {self.eval_strategy}")
        if self.eval_strategy == "steps" and not self.eval_steps:
            raise ValueError("train.eval_strategy=steps needs train.eval_steps")
        return self


class BackendConfig(Group):
    """where it runs"""

    main: ClassVar[str] = "name"
    name: Literal["single"] = Field("single", description="single: one process, one device")
    threads: PositiveInt | None = Field(None, description="CPU threads; null: torch decides")


class Run(Group):
    """A training run: which model, which adapter, which data, how, where."""

    task: Literal["sft"] = Field("sft", description="fixed by the verb")
    model: ModelConfig = ModelConfig()
    lora: LoraConfig | None = LoraConfig()
    data: DataConfig
    train: TrainConfig = Field(TrainConfig(), validate_default=True)
    backend: BackendConfig = BackendConfig()
    output_dir: DirPath = automatic("runs/DATA-MODEL", "the run directory")

    @field_validator("train")
    @classmethod
    def _when_to_evaluate(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        if train.eval_strategy is not None or "data" not in info.data:
            return train
        chosen = "no" if not info.data["data"].evaluates else "steps" if train.eval_steps else "epoch"
        return train.model_copy(update={"eval_strategy": chosen})

    @field_validator("output_dir", mode="before")
    @classmethod
    def _name_the_run(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None or not {"data", "model", "train"} <= info.data.keys():
            return value
        data, model, run_name = info.data["data"].path, info.data["model"].name, info.data["train"].run_name
        first = data if isinstance(data, str) else data[0]
        name = run_name or f"{Path(first).stem}-{Path(model).name.removesuffix('.gguf')}"
        return Path("runs") / (re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:128].strip(".-") or "run")

    @model_validator(mode="after")
    def _evaluation_is_possible(self) -> Run:
        train = self.train
        if (train.eval_steps or train.eval_strategy != "no") and not self.data.evaluates:
            raise ValueError("evaluation is asked for but there is nothing to evaluate on; give data.eval or data.test_size")
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(train, name) and train.eval_strategy == "no":
                raise ValueError(f"train.{name} needs evaluation; give data.eval or data.test_size, and no eval_strategy=no")
        return self
