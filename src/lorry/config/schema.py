"""The description of a training run: every setting, its default, its limits and its one line of
help. No torch here.

Try: lorry sft --help
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorry.config.adapter.initialization import check_initialization, check_run_initialization
from lorry.config.base import (
    CheckedName,
    DirPath,
    DtypeName,
    MemorySize,
    PathText,
    QuantizeFormat,
    SettingsGroup,
    config_field,
    derived_field,
)
from lorry.config.data import DataConfig
from lorry.config.parsing.names import show_value
from lorry.config.suite import TrainingSuiteConfig
from lorry.errors import ConfigError

# numbers of an evaluation of which less is better: a loss, and the terms that tasks/distill and
# tasks/moe make theirs of (nll_EXPERT among them)
LOSS_METRIC = re.compile(r"(.*_)?(loss|nll|perplexity)|nll_.*|distill|label|aux|z")
TOFU_SPLIT = re.compile(r"tofu:(forget|retain)(\d\d)")  # of its rows, in percent
EvalStrategy = Literal["no", "steps", "epoch"]
SchedulerType = Literal["linear", "cosine", "constant", "constant_with_warmup"]
ReportTo = Literal["tensorboard", "wandb", "trackio"]
NO_ADAPTERS_FOR_JOBS = (
    "lora=null (training the base weights themselves) leaves no adapters for jobs"
)
JOBS = "a list of maps, such as [{name: a, r: 8}, {name: b, learning_rate: 1e-3}]"
DEVICE, DEVICE_WORDS = r"^(auto|cpu|mps|cuda(:\d+)?)$", "auto, cpu, cuda, cuda:N or mps"
InitializationName = Literal[
    "gaussian", "pissa", "olora", "milora", "eva", "corda", "lora_ga", "loftq", "orthogonal", "mica",
    "pissa_niter_1", "pissa_niter_2", "pissa_niter_4", "pissa_niter_8", "pissa_niter_16",
    "pissa_niter_32", "pissa_niter_64",
]  # fmt: skip
# q_proj or q_proj,v_proj: as a regex it could only match a module of that full name
PLAIN_NAMES = re.compile(r"\w+(\s*,\s*\w+)*")


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
        "hold the matrices of the frozen base in 4 or 8 bits; keep: as a GGUF file has them; null: as an adapter's "
        "base was held, or as its files are; auto: whole, int8 or nf4, the first that fits memory_budget",
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


# the settings of an adapter that give it weights in the base's place, besides A and B
OWN_WEIGHT_FIELDS = ("bias", "modules_to_save", "trainable_token_indices", "new_tokens")
# what of an adapter's settings is AdaLoRA's alone
ADALORA_FIELDS = (
    "variant", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
)  # fmt: skip
# the bound of r=auto without memory_budget: SmolLM2's adapter is then a fifth of its weights
AUTO_RANK = 64


class LoraConfig(SettingsGroup):
    """the adapter; lora=null means none"""

    main: ClassVar[str] = "r"
    variant: Literal["lora", "dora", "adalora"] = config_field(
        "lora",
        "dora: as use_dora=true; adalora: ranks go from init_r to target_r where they matter least",
    )
    # far beyond any matrix; twice that is the limit of lora_alpha, which follows from it
    r: Annotated[PositiveInt, Field(le=2**30)] | Literal["auto"] = config_field(
        16, "rank; auto: what the rows ask for (rank_by), at most what fits memory_budget"
    )
    rank_by: Literal["data", "memory"] | None = config_field(
        None,
        "data: each module's rank by its first gradient and the amount of data, at most r; memory: r alone; "
        "null: data with r=auto, else memory",
    )
    lora_alpha: PositiveInt | PositiveFloat | None = derived_field(
        "2 x r", "the adapter's update is scaled by lora_alpha / r", le=2**31
    )
    lora_dropout: float = config_field(0.0, "dropout on the adapter's input", ge=0, lt=1)
    target_modules: str | list[str] = config_field(
        "auto",
        (
            "auto (the linears of attention and MLP that text passes through, fused experts too), "
            "all-linear, names, or a regex"
        ),
    )
    target_parameters: list[str] | None = config_field(
        None,
        (
            "tensors that are no linear's, by the end of their names (mlp.experts.down_proj, "
            "mlp.gate.weight); a list, even an empty one, takes the place of all experts"
        ),
    )
    exclude_modules: str | list[str] | None = config_field(None, "names or a regex to leave out")
    use_rslora: bool = config_field(False, "scale by lora_alpha / sqrt(r)")
    use_dora: bool = config_field(False, "DoRA: a trained magnitude for every output feature")
    # PEFT's lora_bias, which scripts use for PEFT's bias (`ALIAS_READERS`)
    lora_B_bias: bool = config_field(
        False, "a trained bias beside every lora_B; also lora_bias=true"
    )
    init_lora_weights: bool | InitializationName = config_field(
        True,
        (
            "true: Kaiming A, zero B; gaussian; false: both random; from the base: pissa, olora, milora, "
            "loftq (of a packed one), mica (B frozen); from rows: eva, corda, lora_ga; orthogonal"
        ),
    )
    train: list[Literal["A", "B"]] = config_field(
        ["A", "B"], "the halves that train; B alone as in LoRA-FA: less memory"
    )
    alora_invocation_tokens: list[NonNegativeInt] | None = config_field(
        None, "aLoRA: the adapter counts from the last occurrence of these token ids on"
    )
    init_rows: PositiveInt = config_field(
        64, "training rows that eva, corda and lora_ga begin from", le=1_000_000
    )
    rho: float = config_field(2.0, "eva: how many times its rank a module may get", ge=1)
    keep_residual: bool = config_field(
        False, "save A and B alone, without what pissa or olora took off the base (PEFT's own form)"
    )
    rank_pattern: dict[str, PositiveInt] = config_field({}, "rank by module name or regex")
    alpha_pattern: dict[str, Annotated[PositiveInt | PositiveFloat, Field(le=2**31)]] = (
        config_field({}, "lora_alpha by module name or regex")
    )
    layers_to_transform: NonNegativeInt | list[NonNegativeInt] | None = config_field(
        None, "adapt only the layers of these numbers"
    )
    layers_pattern: str | list[str] | None = config_field(
        None, "name of the list whose numbers layers_to_transform means, where paths have several"
    )
    bias: Literal["none", "all", "lora_only"] = config_field(
        "none",
        "biases that train in the base's place: none, all, or those of the adapter's modules",
    )
    modules_to_save: list[str] | None = config_field(
        None,
        "modules that train whole in the base's place: lm_head, embed, norms, any by its name's end",
    )
    trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None = (
        config_field(
            None,
            "token ids whose rows of the embedding train (of a tied head too); or a map by module",
        )
    )
    new_tokens: list[str] | PathText | None = config_field(
        None, "tokens to add to the tokenizer, or an added_tokens file; their rows alone train"
    )
    new_token_init: Literal["subtokens", "mean"] = config_field(
        "subtokens", "their rows begin as the mean of the tokens they replace, or of all rows"
    )
    ensure_weight_tying: bool = config_field(
        False, "a tied head and embedding that train keep one weight"
    )
    adapter_name: CheckedName = config_field("default", "name of the adapter")
    init_r: PositiveInt | None = config_field(
        None, "AdaLoRA: rank of every module at first; null: r if given, else 12"
    )
    target_r: PositiveInt = config_field(8, "AdaLoRA: rank of a module at the end, on average")
    tinit: NonNegativeInt = config_field(0, "AdaLoRA: steps before the first rank goes")
    tfinal: NonNegativeInt = config_field(0, "AdaLoRA: steps after the last rank has gone")
    deltaT: PositiveInt = config_field(1, "AdaLoRA: ranks go every n steps")
    beta1: float = config_field(0.85, "AdaLoRA: smoothing of the sensitivities", gt=0, lt=1)
    beta2: float = config_field(0.85, "AdaLoRA: smoothing of their uncertainty", gt=0, lt=1)
    orth_reg_weight: float = config_field(
        0.5, "AdaLoRA: factor of the penalty that keeps A and B orthogonal", ge=0
    )

    @field_validator("train")
    @classmethod
    def _halves(cls, value: list[str]) -> list[str]:
        if not value or len({*value}) < len(value):
            raise ValueError("give A, B or both, each once")
        return sorted(value)

    @model_validator(mode="after")
    def _invoked_low_rank_terms(self) -> Self:
        if self.alora_invocation_tokens is None:
            return self
        if not self.alora_invocation_tokens:
            raise ValueError("alora_invocation_tokens is empty; give token ids, or null")
        if self.use_dora or self.variant != "lora":
            raise ValueError(
                "alora_invocation_tokens does not go with DoRA or AdaLoRA; leave one of them out"
            )
        for name in ("lora_B_bias", *OWN_WEIGHT_FIELDS):
            if getattr(self, name) != self._default(name):
                raise ValueError(
                    f"alora_invocation_tokens does not go with {name}, which counts for every token; "
                    "leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _halves_that_move(self) -> Self:
        starts = self.init_lora_weights
        if self.train == ["A"] and starts in (True, "gaussian"):
            raise ValueError(
                "train=A leaves lora_B at zero, so nothing would ever train; give "
                "init_lora_weights=mica, orthogonal or false with it, or train B"
            )
        return self

    @property
    def most_rank(self) -> int:
        """r, or with r=auto and without a memory budget the most that rows may ask for."""
        return AUTO_RANK if self.r == "auto" else self.r

    @property
    def ranks_follow_data(self) -> bool:
        """Whether rows choose the ranks, of which r is the bound."""
        return self.rank_by == "data" or (self.rank_by is None and self.r == "auto")

    @property
    def adalora(self) -> dict[str, Any] | None:
        """AdaLoRA's numbers, where it is the variant."""
        if self.variant != "adalora":
            return None
        return self.model_dump(include={*ADALORA_FIELDS} - {"variant", "init_r"})

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, data: Any) -> Any:
        """DoRA is use_dora, and AdaLoRA's first rank is r: what follows from them asks for one name."""
        if not isinstance(data, dict) or data.get("variant") not in ("adalora", "dora"):
            return data
        if data["variant"] == "dora":
            if data.get("use_dora", True) in (False, "false"):
                raise ValueError("variant=dora and use_dora=false contradict each other; give one")
            return {**data, "use_dora": True}
        init_r, r = data.get("init_r"), data.get("r")
        if init_r is not None and r is not None and str(init_r) != str(r):
            raise ValueError(
                f"r={show_value(r)} and init_r={show_value(init_r)} are both the first rank of AdaLoRA; "
                "give one"
            )
        first = next((rank for rank in (init_r, r) if rank is not None), 12)
        return {**data, "r": first, "init_r": first}

    @model_validator(mode="after")
    def _adalora_goes_with(self) -> Self:
        if self.variant != "adalora":
            given = [f for f in ADALORA_FIELDS[1:] if getattr(self, f) != self._default(f)]
            if given:
                adamw = f" (AdamW's is adam_{given[0]})" if given[0] in ("beta1", "beta2") else ""
                raise ValueError(
                    f"{given[0]} is AdaLoRA's{adamw}; add variant=adalora, or leave it out"
                )
            return self
        if self.r == "auto":
            raise ValueError("r=auto does not go with variant=adalora; give init_r")
        assert isinstance(self.r, int)
        if self.target_r >= self.r:
            raise ValueError(
                f"target_r={self.target_r} is not below init_r={self.r}: AdaLoRA would have no ranks to "
                "take away; give a smaller target_r, or variant=lora"
            )
        for name in (
            "train",
            "use_dora",
            "lora_B_bias",
            *OWN_WEIGHT_FIELDS,
            "rank_by",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "init_lora_weights",
        ):
            if getattr(self, name) != self._default(name):
                raise ValueError(
                    f"{name} does not go with variant=adalora, which has ranks, scale and first "
                    "values of its own; leave it out"
                )
        return self

    @classmethod
    def _default(cls, name: str) -> Any:
        return cls.model_fields[name].get_default(call_default_factory=True)

    @field_validator("lora_alpha", mode="before")
    @classmethod
    def _twice_r(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None or info.data.get("r") == "auto":
            return value  # with r=auto it follows once the rank is known
        # as most recipes have it; the best rate falls as the rank grows (docs/choosing.md)
        return 2 * info.data.get("r", 1)

    @model_validator(mode="after")
    def _can_begin_so(self) -> Self:
        ranks = [r for r in (self.r, *self.rank_pattern.values()) if r != "auto"]
        try:
            check_initialization(
                self.init_lora_weights,
                ranks,
                keep_residual=self.keep_residual,
                use_dora=self.use_dora,
            )
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @field_validator("target_modules", "exclude_modules", mode="before")
    @classmethod
    def _module_names(cls, value: Any) -> Any:
        # all-linear has a hyphen, so it is no plain name and stays the word it is
        if isinstance(value, str) and value != "auto" and PLAIN_NAMES.fullmatch(value):
            return re.split(r"\s*,\s*", value)
        if value in ("", []):
            raise ValueError("is empty; name a module")
        return value

    @field_validator("target_parameters", mode="before")
    @classmethod
    def _parameter_names(cls, value: Any, info: ValidationInfo) -> Any:
        names = re.split(r"\s*,\s*", value) if isinstance(value, str) and value else value
        if names and info.data.get("lora_dropout"):
            raise ValueError(
                "does not go with lora_dropout: the update is added to the parameter, which has no "
                "input to drop; set lora_dropout=0"
            )
        return names

    @field_validator("use_dora", "lora_B_bias")
    @classmethod
    def _low_rank_at_parameters(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("target_parameters"):
            raise ValueError("does not go with target_parameters, which have low-rank terms alone")
        return value

    @field_validator("modules_to_save", "trainable_token_indices", "layers_pattern", "new_tokens")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value in ("", [], {}):
            raise ValueError("is empty; leave it out, or name something")
        return value

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _regex(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, str):
            try:
                re.compile(value)
            # re raises all three: a bad pattern, one nested by the thousand, a repeat count beyond
            # 32 bits
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"{show_value(value)} is not a regular expression ({error})"
                ) from None
        return value


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


class BackendConfig(SettingsGroup):
    """where it runs"""

    main: ClassVar[str] = "name"
    name: Literal["single"] = config_field("single", "single: one process, one device")
    # far beyond any machine's cores, and below what the C++ runtime dies of instead of raising
    threads: int | None = config_field(
        None, "CPU threads, at most 1024; null: torch decides", ge=1, le=1024
    )


def _default(group: SettingsGroup, setting: str) -> Any:
    return type(group).model_fields[setting].default


class SharedBackendConfig(BackendConfig):
    """where it runs, on one process or on several"""

    name: Literal["single", "ddp", "fsdp", "megatron"] = config_field(  # type: ignore[assignment]  # wider
        "single",
        "single: one process, one device; ddp: several, the base whole on each; fsdp: several, the "
        "base cut over them; megatron: as ddp, on Megatron's layers (lorry sft and eval)",
    )
    processes: PositiveInt | None = config_field(
        None,
        "local processes to start, each with a part of the rows; null: those of the launcher "
        "(torchrun), or 1",
    )
    tensor_parallel: PositiveInt = config_field(
        1,
        "processes that share every matrix, inside a machine: each has a part of the heads, the MLP "
        "and the vocabulary",
    )
    replicas: PositiveInt = config_field(
        1, "how many times the base lies on the processes, cut over those of each copy (fsdp)"
    )
    reshard_after_forward: bool = config_field(
        True,
        "let a layer's weights go behind its forward pass and gather them again for the backward "
        "(fsdp)",
    )
    # as long as nothing is heard of a process; half an hour is torch's own default
    timeout: float = config_field(
        600.0, "seconds after which a process that does not answer is given up", gt=0, le=86400
    )

    @model_validator(mode="after")
    def _several_need_ddp(self) -> Self:
        if self.name == "single" and (self.processes or 1) > 1:
            raise ValueError(f"processes={self.processes} needs backend=ddp, fsdp or megatron")
        if self.name == "single" and self.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} needs backend=ddp, fsdp or megatron"
            )
        for setting in ("replicas", "reshard_after_forward"):
            # by value: a description that was written whole has them all
            if self.name != "fsdp" and getattr(self, setting) != _default(self, setting):
                raise ValueError(f"{setting} needs backend=fsdp")
        return self


class TrainBackendConfig(SharedBackendConfig):
    """where a training run happens, on one process or on several"""

    sequence_parallel: bool = config_field(
        False,
        "with tensor_parallel: its processes also divide, by tokens, what a layer keeps for backward",
    )
    shard_optimizer: bool = config_field(
        False, "each process holds AdamW's moments of its range of the values (ddp, fsdp)"
    )
    keep_total: bool = config_field(
        False,
        "divide per_device_train_batch_size among the processes, so that a step has the same rows on "
        "any number of them",
    )

    @model_validator(mode="after")
    def _sequence_of_tensor_ranks(self) -> Self:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel=true needs tensor_parallel above 1")
        return self

    @model_validator(mode="after")
    def _sequence_of_our_layers(self) -> Self:
        if self.sequence_parallel and self.name == "megatron":
            raise ValueError("sequence_parallel=true needs backend=ddp or fsdp")
        return self

    @model_validator(mode="after")
    def _moments_of_several(self) -> Self:
        if self.shard_optimizer and self.name not in ("ddp", "fsdp"):
            raise ValueError("shard_optimizer=true needs backend=ddp or fsdp")
        return self


class JobConfig(SettingsGroup):
    """One of several adapters trained in one pass: its name, and the settings in which it is not
    the run's (`jobs.runs_by_adapter`).
    """

    name: CheckedName
    # plain values and not LoraConfig: only what differs is kept, and a default is no difference
    lora: dict[str, Any] = config_field({}, "the settings that differ from the run's")
    data: dict[str, Any] = config_field({}, "the settings that differ from the run's")
    train: dict[str, Any] = config_field({}, "the settings that differ from the run's")

    def own_settings(self) -> dict[str, Any]:
        """{dotted name: value} of all that is not the run's."""
        groups = self.model_dump(mode="json", exclude={"name"})
        return {f"{group}.{key}": v for group, own in groups.items() for key, v in own.items()}


@dataclass(frozen=True, kw_only=True)
class StepReads:
    """What an optimizer step reads for each row of `per_device_train_batch_size`, for `lorry plan`:
    the task's settings say it. ``together``: sequences beside each other in a micro-batch;
    ``passes``: sequences run forward and backward in all; ``asks_start``: what is asked of the
    frozen start about the same sequences and kept beside the micro-batches: scores (a number a
    token) or hidden (a row of the model's width); ``live``: whether it is asked with every step;
    ``copies``: fp32 buffers besides, as large as what trains; ``highest_layer``: the last layer
    that runs, without the output head; None: all of it.
    """

    together: int = 1
    passes: int = 1
    asks_start: Literal["scores", "hidden"] | None = None
    live: bool = False
    copies: int = 0
    highest_layer: int | None = None

    @property
    def start_answer(self) -> str:
        """What the start is asked for, in words."""
        return "hidden states" if self.asks_start == "hidden" else "scores"


ROW_ALONE = StepReads()


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
    def _rank_is_to_be_had(self) -> RunConfig:
        # here and not in LoraConfig: memory_budget is a setting of the run
        lora = self.lora
        if lora is not None and lora.ranks_follow_data and lora.init_lora_weights == "eva":
            raise ValueError(
                "lora.init_lora_weights=eva moves ranks between modules itself (rho), and r=auto or "
                "rank_by=data chooses them; give r=N, or another initialisation"
            )
        if lora is None or lora.r != "auto" or self.memory_budget is not None:
            return self
        if not lora.ranks_follow_data:
            raise ValueError(
                "lora.r=auto with rank_by=memory needs a memory budget; give memory_budget, such as 3GiB"
            )
        return self

    @model_validator(mode="after")
    def _megatron_has_low_rank_terms_alone(self) -> RunConfig:
        lora = self.lora
        if lora is None or self.backend.name != "megatron":
            return self
        if lora.alora_invocation_tokens:
            raise ValueError(
                "alora_invocation_tokens: Megatron's layers do not see which tokens come; leave "
                "backend=megatron out"
            )
        if lora.use_dora or lora.lora_B_bias or lora.variant == "adalora":
            asked = (
                "variant=adalora"
                if lora.variant == "adalora"
                else "use_dora"
                if lora.use_dora
                else "lora_bias"
            )
            raise ValueError(
                f"lora.{asked} needs linears that Lorry multiplies itself, and under backend=megatron "
                "Megatron-core does; give backend=ddp or fsdp"
            )
        return self

    @model_validator(mode="after")
    def _halves_are_whole(self) -> RunConfig:
        lora, backend = self.lora, self.backend
        if lora is None or lora.train == ["A", "B"]:
            return self
        if backend.name == "megatron" or backend.tensor_parallel > 1:
            raise ValueError(
                f"lora.train={','.join(lora.train)} is for layers that a process has whole, on Lorry's own "
                "or transformers' code; leave backend.tensor_parallel and backend=megatron out"
            )
        return self

    @model_validator(mode="after")
    def _adalora_has_steps(self) -> RunConfig:
        lora, steps = self.lora, self.train.max_steps
        if lora is None or lora.variant != "adalora":
            return self
        if 0 < steps <= lora.tinit + lora.tfinal:
            raise ValueError(
                f"lora.tinit={lora.tinit} and lora.tfinal={lora.tfinal} leave none of the {steps} steps "
                "for taking ranks away; make them smaller, or max_steps larger"
            )
        if self.backend.tensor_parallel > 1:
            raise ValueError(
                "lora.variant=adalora scores whole rows and columns, of which tensor-parallel processes "
                "have parts; leave backend.tensor_parallel out"
            )
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
        b = self.backend
        # under fsdp they train (tests/contracts/test_variant_layouts.py), but a written adapter is read back
        # on one process, and a bias that the file has twice is held against the base's, which is cut
        cut = b.name in ("megatron", "fsdp") or b.tensor_parallel > 1
        refused = OWN_WEIGHT_FIELDS if cut else ()
        where = f"backend={b.name}" if b.tensor_parallel == 1 else "tensor_parallel"
        # what is a job's own is in plain values there
        each = [
            {} if self.lora is None else self.lora.model_dump(),
            *(job.lora for job in self.jobs),
        ]
        for settings in each:
            own = [f for f in refused if settings.get(f) not in (None, "none")]
            if own:
                raise ValueError(
                    f"lora.{own[0]} trains weights in the base's place, which has to be whole in every "
                    f"process, and {where} cuts it; use backend=single or ddp"
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
        elif backend.name in ("fsdp", "megatron"):
            cut_by = f"backend={backend.name}"
        check_run_initialization(
            self.lora.init_lora_weights,
            quantize=self.model.quantize,
            cut_by=cut_by,
            streaming=self.data.streaming,
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
