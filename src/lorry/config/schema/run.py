"""The description of a training run: every setting, its default, its limits and its one line of
help, and which of them go together. No torch here.

Try: lorry sft --help
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorry.config.adapter.initialization import check_run_initialization
from lorry.config.base import DirPath, MemorySize, SettingsGroup, config_field, derived_field
from lorry.config.data import DataConfig
from lorry.config.schema.backend import TrainBackendConfig
from lorry.config.schema.job import JobConfig
from lorry.config.schema.lora import OWN_WEIGHT_FIELDS, PLAIN_NAMES, LoraConfig
from lorry.config.schema.model import ModelConfig
from lorry.config.schema.step_reads import ROW_ALONE, StepReads
from lorry.config.schema.train import TrainConfig
from lorry.config.suite import TrainingSuiteConfig

TOFU_SPLIT = re.compile(r"tofu:(forget|retain)(\d\d)")  # of its rows, in percent
NO_ADAPTERS_FOR_JOBS = (
    "lora=null (training the base weights themselves) leaves no adapters for jobs"
)
JOBS = "a list of maps, such as [{name: a, r: 8}, {name: b, learning_rate: 1e-3}]"


class RunConfig(SettingsGroup):
    """A training run: which model, which adapter, which data, how, where. ``always_evaluates``:
    whether the task has something to look at without rows that were held out; ``job_groups``: those
    whose settings one of several jobs may have of its own; ``experiment_kind``: the folder of the
    verb's experiments; ``freezes_start``: whether an adapter that the model brings becomes a part of
    the base, under a new one, instead of being trained further.
    """

    experiment_kind: ClassVar[str] = "finetune"
    always_evaluates: ClassVar[bool] = False
    freezes_start: ClassVar[bool] = False
    job_groups: ClassVar[tuple[str, ...]] = ("lora", "data", "train")
    # with lora=null each of several jobs would need the base's weights for itself: one pass has one
    jobs_need_adapters: ClassVar[bool] = True
    task: Literal["sft"] = config_field("sft", "fixed by the verb")
    model: ModelConfig = ModelConfig()
    lora: LoraConfig | None = LoraConfig()
    trainable: str | list[str] | None = config_field(
        None,
        "with lora=null, which base weights train: all, all-but-router (of a mixture), mlp, attention, a list of names, or a regex; null: all",
    )
    data: DataConfig
    suite: TrainingSuiteConfig = TrainingSuiteConfig()
    # validated though a default: its eval_strategy follows from data, which stands above it
    train: TrainConfig = Field(default=TrainConfig(), validate_default=True)
    backend: TrainBackendConfig = TrainBackendConfig()
    memory_budget: MemorySize | None = config_field(
        None,
        (
            "such as 3GiB: micro-batch size and recomputation are chosen to fit it "
            "unless they are set (see lorry plan)"
        ),
    )
    output_dir: DirPath = derived_field("runs/DATA-MODEL", "the run directory")
    background: bool = config_field(
        False,
        (
            "run detached in the background, also after the terminal closes; `lorry "
            "runs` shows its progress"
        ),
    )
    jobs: list[JobConfig] = config_field(
        [],
        "train several adapters in one pass: maps of a name and the settings that differ",
        json_schema_extra={"allowed": JOBS},
    )
    joint_tokens: PositiveInt | None = derived_field(
        "1024 on a CPU, 8192 on a GPU",
        "with jobs: micro-batches of several jobs share a forward pass of at most n tokens",
    )

    @property
    def step_reads(self) -> StepReads:
        """What a step reads for each row: the row itself."""
        return ROW_ALONE

    @property
    def has_evaluation(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(
            self.always_evaluates or self.data.evaluates or self.train.eval_tasks or self.suite.name
        )

    @property
    def job_names(self) -> list[str]:
        """Of several jobs; none of a run of one adapter."""
        return [job.name for job in self.jobs]

    @field_validator("suite", mode="before")
    @classmethod
    def _no_suite(cls, value: Any) -> Any:
        # suite=null takes back what an experiment asks
        return {} if value is None else value

    @field_validator("suite")
    @classmethod
    def _split_of_the_rows(
        cls, suite: TrainingSuiteConfig, info: ValidationInfo
    ) -> TrainingSuiteConfig:
        """TOFU's rows that the run forgets, or leaves out, are those that the suite asks about."""
        has_split = "forget_split" in suite.model_fields_set
        if suite.name != "tofu" or has_split or "data" not in info.data:
            return suite
        path = info.data["data"].path
        paths = [path] if isinstance(path, str) else path or []
        matches = [TOFU_SPLIT.fullmatch(str(entry)) for entry in paths]
        splits = {
            f"forget{int(match[2]) if match[1] == 'forget' else 100 - int(match[2]):02d}"
            for match in matches
            if match is not None
        }
        if not splits:
            return suite
        # beside other rows, or of two sizes: which of them the suite should ask about is a guess
        if len(splits) > 1 or None in matches:
            raise ValueError(
                f"suite=tofu: {', '.join(map(str, paths))} does not tell which "
                "split of TOFU is the forget set; give forget_split"
            )
        (split,) = splits
        return suite.model_copy(update={"forget_split": split})

    @field_validator("train")
    @classmethod
    def _when_to_evaluate(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        if train.eval_strategy is not None or not {"data", "suite"} <= info.data.keys():
            return train
        anything = (
            cls.always_evaluates
            or info.data["data"].evaluates
            or train.eval_tasks
            or info.data["suite"].name
        )
        chosen = "no" if not anything else "steps" if train.eval_steps else "epoch"
        # without validation, which the values here have passed
        return train.model_copy(update={"eval_strategy": chosen})

    @field_validator("output_dir", mode="before")
    @classmethod
    def _name_the_run(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        if not {"data", "model", "train"} <= info.data.keys():
            return "runs/run"  # one of them is wrong, which is the error to show
        data, model, run_name = (
            info.data["data"],
            info.data["model"].name,
            info.data["train"].run_name,
        )
        first = (
            data.path
            if isinstance(data.path, str)
            else data.path[0]
            if data.path
            else "+".join(data.mix)
        )
        name = run_name or f"{Path(first).stem}-{Path(model).name.removesuffix('.gguf')}"
        # 128: a folder's name, with room for the suffixes of merge, export and previous
        return Path("runs") / (re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:128].strip(".-") or "run")

    @model_validator(mode="after")
    def _adapter_goes_with_the_run(self) -> RunConfig:
        # here and not in LoraConfig: what it is held against are settings of the run
        if self.lora is not None:
            self.lora.refuse_budget(self.memory_budget, streaming=self.data.streaming)
            self.lora.refuse_backend(self.backend)
            self.lora.refuse_steps(self.train.max_steps)
        return self

    @field_validator("trainable", mode="before")
    @classmethod
    def _several_names(cls, value: Any) -> Any:
        return (
            re.split(r"\s*,\s*", value)
            if isinstance(value, str) and "," in value and PLAIN_NAMES.fullmatch(value)
            else value
        )

    @model_validator(mode="after")
    def _own_weights_need_a_whole_base(self) -> Self:
        if self.backend.name != "megatron":
            return self
        # what is a job's own is in plain values there
        each = [
            {} if self.lora is None else self.lora.model_dump(),
            *(job.lora for job in self.jobs),
        ]
        for settings in each:
            own = [f for f in OWN_WEIGHT_FIELDS if settings.get(f) not in (None, "none")]
            if own:
                raise ValueError(
                    f"lora.{own[0]} trains weights in the base's place, which has to be whole in every "
                    "process; backend=megatron: it is cut there; use backend=single, ddp or fsdp"
                )
        return self

    @model_validator(mode="after")
    def _packed_weights_stay(self) -> RunConfig:
        if self.model.quantize == "auto" and self.memory_budget is None:
            raise ValueError(
                "model.quantize=auto needs a memory budget to choose by; give memory_budget, such as 3GiB"
            )
        if self.model.quantize is not None and self.lora is None:
            raise ValueError(
                f"model.quantize={self.model.quantize} with lora=null: packed weights cannot train; "
                "leave quantize out, or train an adapter"
            )
        return self

    @model_validator(mode="after")
    def _initialization_is_possible(self) -> RunConfig:
        if self.lora is None:
            return self
        backend, cut_by = self.backend, None
        if backend.tensor_parallel > 1:
            cut_by = f"backend.tensor_parallel={backend.tensor_parallel}"
        elif backend.name == "megatron":
            cut_by = f"backend={backend.name}"
        check_run_initialization(
            self.lora.init_lora_weights,
            quantize=self.model.quantize,
            cut_by=cut_by,
            streaming=self.data.streaming,
        )
        if backend.name == "fsdp" and self.lora.keep_residual:
            # one process reads back what it wrote, and nobody else gathers for it
            raise ValueError(
                "lora.keep_residual=true with backend=fsdp: a reader takes off the product of whole matrices, of "
                "which each process has a part; leave it out (the file is plain LoRA then), or use backend=ddp"
            )
        return self

    @model_validator(mode="after")
    def _trainable_without_an_adapter(self) -> RunConfig:
        if self.trainable is not None and self.lora is not None:
            raise ValueError(
                "trainable chooses which base weights train; give lora=null with "
                "it, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _backend_is_of_this_run(self) -> RunConfig:
        if type(self.backend) is not TrainBackendConfig:
            return self  # a plan, which may be of what no run does
        if self.backend.name != "megatron":
            return self
        if self.task != "sft":
            raise ValueError(
                f"backend=megatron is for lorry sft and eval, not for {self.task}; give backend=ddp or "
                "fsdp"
            )
        if self.lora is None:
            raise ValueError(
                "lora=null trains the base, which backend=megatron keeps frozen; give backend=ddp or "
                "fsdp"
            )
        return self

    @model_validator(mode="after")
    def _jobs_have_adapters(self) -> RunConfig:
        if self.lora is None and self.jobs and self.jobs_need_adapters:
            raise ValueError(NO_ADAPTERS_FOR_JOBS)
        return self

    @model_validator(mode="after")
    def _evaluation_is_possible(self) -> RunConfig:
        train = self.train
        evaluates = train.eval_steps or train.eval_strategy != "no" or train.eval_on_start
        if evaluates and not self.has_evaluation:
            raise ValueError(
                "evaluation is on, but there is no evaluation set; give data.eval or data.test_size"
            )
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(train, name) and train.eval_strategy == "no":
                raise ValueError(
                    f"train.{name} needs evaluation; give data.eval or data.test_size, and no eval_strategy=no"
                )
        return self
