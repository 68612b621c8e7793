"""Settings of the verbs other than `sft` that have no file of their own: demo, compare, plan,
chat, unmerge, export, report, doctor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorry.config.base import (
    DirPath,
    DtypeName,
    Outtype,
    PathText,
    SettingsGroup,
    config_field,
    derived_field,
)
from lorry.config.data import DataConfig
from lorry.config.moe import MoeRunConfig
from lorry.config.schema.backend import TrainBackendConfig
from lorry.config.schema.model import ModelConfig
from lorry.config.schema.run import RunConfig
from lorry.config.unlearning.unlearn import UnlearnRunConfig

# learning rate of a way that is given none, as a multiple of the run's: all weights of a model want a
# smaller step than an adapter, whose product starts at zero
DEFAULT_RATES = {"lora": 1.0, "full": 0.05, "mlp": 0.1, "attention": 0.1}


def _output_beside_run(value: Any, info: ValidationInfo, suffix: str) -> Any:
    """The default output directory: the run's own name with a suffix."""
    return Path(f"{info.data.get('run', 'run').rstrip('/')}-{suffix}") if value is None else value


class DemoSettings(SettingsGroup):
    """The embedded model learns facts about fictional people; before and after, side by side."""

    output_dir: DirPath = config_field(Path("runs/demo"), "the run directory")
    max_steps: PositiveInt | None = config_field(
        None, "optimizer steps; null: as many as the demo needs"
    )
    seed: NonNegativeInt = config_field(0, "seed of the people and of everything random")
    fast: bool = config_field(False, "a smaller demo, to see that everything works")


class PlanModel(ModelConfig):
    """the frozen base model; only its config is read"""

    name: PathText = config_field(
        "smollm2-135m-instruct",
        "HF directory, hub id, run, or a well-known name: llama-3-8b, qwen3-0.6b, mixtral-8x7b ...",
    )


class PlanData(DataConfig):
    """the examples; only their longest length counts, so path may be left out"""

    needs_rows: ClassVar[bool] = False
    path: PathText | list[PathText] | None = config_field(
        None, "file, directory or hub id, or a list of them; not opened"
    )


class PlanBackend(TrainBackendConfig):
    """where it would run"""

    name: Literal["single", "ddp", "fsdp", "megatron"] = config_field(  # type: ignore[assignment]  # wider
        "single", "one device, or how several share the work"
    )
    processes: PositiveInt = config_field(1, "processes in all, a GPU each")
    tensor_parallel: PositiveInt = config_field(1, "processes that share every matrix")
    offload: Literal["cpu"] | None = config_field(
        None, "where the shards of the base lie while they are not needed (fsdp)"
    )
    pipeline_parallel: PositiveInt = config_field(1, "stages of layers (megatron)")
    expert_parallel: PositiveInt = config_field(1, "groups that share the experts (megatron)")
    gpu: Literal["a100-40gb", "a100-80gb", "h100", "h200", "b200", "l40s", "rtx4090"] | None = (
        config_field(
            None,
            "which GPU, for its memory and speed; null: h100 with several processes unless "
            "device=cpu, else this machine",
        )
    )

    @model_validator(mode="after")
    def _several_need_ddp(self) -> PlanBackend:
        # `plan.parallel` knows more backends, and says so in its own words
        return self

    @model_validator(mode="after")
    def _sequence_of_our_layers(self) -> PlanBackend:
        # Megatron's are planned with it, too, and the plan says that no run has it yet
        return self

    @field_validator("processes", mode="before")
    @classmethod
    def _one_without_a_launcher(cls, value: Any) -> Any:
        # null in the description of a run: those of its launcher, which a plan has none of
        return 1 if value is None else value


class PlanFields(SettingsGroup):
    """What a plan has beside the settings of the run that it is about, or in place of them."""

    positional: ClassVar[str] = "model"
    model: PlanModel = PlanModel()
    data: PlanData = PlanData()
    backend: PlanBackend = PlanBackend()
    # otherwise the run's default would be worked out, and shown by --dump-config as if it mattered
    output_dir: DirPath | None = config_field(None, "not used: a plan writes nothing")
    format: Literal["table", "json"] = config_field("table", "output format")


class UnlearnPlanSettings(PlanFields, UnlearnRunConfig):  # type: ignore[misc]  # wider fields
    """Memory and time of an unlearning run, before anything is loaded; takes what `lorry unlearn`
    takes.
    """


class MoePlanSettings(PlanFields, MoeRunConfig):  # type: ignore[misc]  # wider fields
    """Memory and time of the stages of a mixture, before anything is loaded; takes what `lorry moe`
    takes.
    """


class PlanSettings(PlanFields, RunConfig):  # type: ignore[misc]  # its fields are wider
    """Memory and time of a training run, before anything is loaded; takes what `lorry sft` takes, or
    `lorry unlearn` (forget=FILE and the like) or `lorry moe` (experts=[...]).
    """

    other_tasks: ClassVar[tuple[type[RunConfig], ...]] = (UnlearnPlanSettings, MoePlanSettings)


class CompareData(DataConfig):
    """the examples that every way learns; needless where finished runs are compared"""

    needs_rows: ClassVar[bool] = False
    path: PathText | list[PathText] | None = config_field(
        None, "file, directory or hub id, or a list of them"
    )


class CompareSettings(RunConfig):
    """Finished runs side by side in parameters, memory, time and loss; with data and no run, each
    way is trained first.
    """

    positional: ClassVar[str] = "runs"
    data: CompareData = CompareData()
    runs: list[PathText] = config_field(
        [], "run directories; none: train every one of ways, each in a process of its own"
    )
    ways: list[Literal["lora", "full", "mlp", "attention"]] = config_field(
        ["lora", "full", "mlp"],
        "what to train: an adapter, all base weights, or those of the MLPs or of attention",
    )
    learning_rates: dict[str, PositiveFloat] = config_field(
        {},
        (
            "learning rate of each way; default: learning_rate for lora, a tenth of it "
            "for mlp and attention, a twentieth for full"
        ),
    )
    format: Literal["table", "json"] = config_field("table", "output format")

    @field_validator("learning_rates")
    @classmethod
    def _of_ways(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        ways = info.data.get("ways", [])
        if unknown := [name for name in value if name not in ways]:
            raise ValueError(
                f"learning_rates names {unknown[0]!r}, which is not among ways ({', '.join(ways)})"
            )
        return value

    def run_of_way(self, name: str) -> RunConfig:
        """The run that trains one way, in a folder of its name. Raises ConfigError for settings
        that do not go together.
        """
        own_settings = ("runs", "ways", "learning_rates", "format")
        shared_values = self.model_dump(
            mode="json", exclude={*own_settings, "output_dir", "trainable"}
        )
        rate = self.learning_rates.get(name, self.train.learning_rate * DEFAULT_RATES[name])
        train = {**shared_values["train"], "learning_rate": rate, "run_name": name}
        # each a run of its own: adapters and base weights cannot train in one pass
        trained_part = (
            {"lora": shared_values["lora"]}
            if name == "lora"
            else {"lora": None, "trainable": "all" if name == "full" else name}
        )
        return RunConfig.model_validate(
            {**shared_values, **trained_part, "train": train, "output_dir": self.output_dir / name}
        )


class ChatSettings(SettingsGroup):
    """Talk to a model with any of its adapters."""

    positional: ClassVar[str] = "model"
    model: ModelConfig = ModelConfig()
    adapters: list[PathText] = config_field(
        [], "more adapters to switch between with /adapter NAME"
    )
    weight: float = config_field(
        1.0,
        (
            "weight of the adapter: 0.5 half, 0 none, below 0 negated; an adapter it "
            "was trained on top of stays at 1"
        ),
    )
    max_new_tokens: PositiveInt = config_field(256, "maximum length of an answer, in tokens")
    temperature: float = config_field(0.0, "0: greedy decoding", ge=0)
    system: str | None = config_field(None, "system message")
    seed: NonNegativeInt = config_field(0, "seed of the sampling")


class UnmergeSettings(SettingsGroup):
    """Give back the base of a merged model, bit for bit."""

    positional: ClassVar[str] = "run"
    run: PathText = Field(description="run or merged directory")
    output_dir: DirPath = derived_field("RUN-unmerged", "directory for the base model")

    @field_validator("output_dir", mode="before")
    @classmethod
    def _default_output(cls, value: Any, info: ValidationInfo) -> Any:
        return _output_beside_run(value, info, "unmerged")


class ExpertSource(SettingsGroup):
    """An expert of a mixture, in mergekit-moe's words."""

    source_model: PathText = Field(
        description="adapter or run directory, base+adapter, a whole model of the base's shape, or "
        "the base itself"
    )
    positive_prompts: list[str] = config_field(
        [], "texts that are typical of this expert; none: of 16 training rows, where it is a run"
    )
    negative_prompts: list[str] = config_field([], "texts that are not")


GateMode = Literal[
    "router", "hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"
]
MIXTURE_SETTINGS = frozenset({"gate_mode", "experts_per_token", "attention", "seed", "prompts"})
# which of these a format of its own reads; every other one reads none
FORMAT_SETTINGS = {
    "hf-moe": MIXTURE_SETTINGS,
    "dense": frozenset({"weights"}),
    "gguf": frozenset({"weights", "adapter", "weight"}),
}


class ExportSettings(SettingsGroup):
    """Write a run in another library's format; a mixture of experts as one model (dense), as a
    mixture of a stock class (hf-moe) or as its adapters (peft); to=hf-moe also takes a mergekit-moe
    file."""

    positional: ClassVar[str] = "run"
    run: PathText | None = config_field(
        None, "run or adapter directory; with to=hf-moe it may be left out: give experts"
    )
    to: Literal["hf", "dense", "peft", "gguf", "gguf-lora", "hf-moe"] = Field(
        description="hf: a merged transformers model; dense: the same of several adapters; peft: an adapter directory, "
        "of a mixture one for each expert and routing.json; gguf: a merged model for llama.cpp; gguf-lora: the adapter "
        "alone for llama.cpp (--lora); hf-moe: a Mixtral, Qwen2-MoE or Qwen3-MoE"
    )
    base_model: PathText | None = config_field(
        None, "to=hf-moe without a run: the base of all experts"
    )
    experts: list[ExpertSource] = config_field(
        [], "to=hf-moe without a run: maps of source_model, positive_prompts and negative_prompts"
    )
    gate_mode: GateMode | None = config_field(
        None,
        "to=hf-moe: the run's router, or how prompts become one; null: router of a mixture, else hidden",
    )
    prompts: dict[str, list[str]] = config_field(
        {}, "to=hf-moe of a run: {EXPERT: texts}; none: of 16 of its training rows"
    )
    experts_per_token: PositiveInt | None = config_field(
        None,
        "to=hf-moe: how many experts a token goes to; null: as the run's router has it, else 2",
    )
    attention: Literal["refuse", "average", "drop"] = config_field(
        "refuse", "to=hf-moe: what to do with updates outside the MLPs, which cannot be routed"
    )
    seed: NonNegativeInt = config_field(0, "to=hf-moe: seed of random gates")
    weights: dict[str, float] = config_field(
        {},
        "to=dense and gguf of several: {EXPERT: g}; none: the gates of uniform and fixed, else 1/K",
    )
    dtype: DtypeName = config_field(
        "auto", "to=hf, dense and hf-moe: dtype to store; auto: that of the base model"
    )
    outtype: Outtype = config_field(
        "auto",
        (
            "to=gguf: dtype of the matrices, as in llama.cpp's --outtype; auto: that "
            "of the base model, for an adapter f32"
        ),
    )
    output_dir: DirPath = derived_field(
        "RUN-TO, of gguf RUN-OUTTYPE-gguf", "directory or file to write"
    )
    adapter: str | None = config_field(None, "which adapter, where the run holds several")
    weight: float = config_field(
        1.0,
        (
            "weight of the adapter: 0.5 half, 0 none, below 0 negated; an adapter it "
            "was trained on top of stays at 1"
        ),
    )

    @field_validator("output_dir", mode="before")
    @classmethod
    def _default_output(cls, value: Any, info: ValidationInfo) -> Any:
        to, outtype = info.data.get("to", "export"), info.data.get("outtype", "auto")
        # several types of one run lie side by side
        kind = f"{outtype}-{to}" if to.startswith("gguf") and outtype != "auto" else to
        run = info.data.get("run")
        # a mixture goes into the folder one is in: its base may lie in a cache
        if value is None and run is None:
            return Path(f"{Path(info.data.get('base_model') or 'run').name}-{kind}")
        return _output_beside_run(value, info, kind)

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> Self:
        described = bool(self.experts) or self.base_model is not None
        if self.to == "hf-moe" and described == (self.run is not None):
            raise ValueError(
                "to=hf-moe takes a run of several experts, or base_model and experts as in a mergekit-moe file"
            )
        if self.to == "hf-moe" and described and not (self.experts and self.base_model):
            raise ValueError("to=hf-moe without a run takes base_model and experts")
        if self.to != "hf-moe" and (self.run is None or described):
            raise ValueError(f"to={self.to} takes a run; base_model and experts are for to=hf-moe")
        # never passed over: who gives one of these means something by it
        read = FORMAT_SETTINGS.get(self.to, frozenset({"adapter", "weight"}))
        if described:
            read -= {"prompts"}
        unused = (MIXTURE_SETTINGS | {"adapter", "weight", "weights"}) - read
        if unread_names := sorted(unused & self.model_fields_set):
            raise ValueError(f"{unread_names[0]} is not for to={self.to}")
        if described and self.gate_mode == "router":
            raise ValueError("gate_mode=router is that of a run; a mergekit-moe file has prompts")
        if self.weights and {"adapter", "weight"} & self.model_fields_set:
            raise ValueError("weights is for all experts, adapter and weight are for one; keep one")
        return self

    @field_validator("outtype", mode="before")
    @classmethod
    def _lower_case(cls, value: Any) -> Any:
        # llama.cpp's tools and file names write Q8_0 as often as q8_0
        return value.lower() if isinstance(value, str) else value


class PushSettings(SettingsGroup):
    """Upload a finished run to the Hugging Face hub."""

    positional: ClassVar[str] = "run"
    run: PathText = Field(description="run directory")
    hub_model_id: str | None = config_field(
        None, "repository OWNER/NAME; null: the directory's name under your account"
    )
    hub_private_repo: bool = config_field(
        False, "make the repository private; an existing public repository is an error"
    )


class ReportSettings(SettingsGroup):
    """One offline HTML page with plots for a run, or several side by side."""

    positional: ClassVar[str] = "runs"
    runs: list[PathText] = Field(min_length=1, description="run directories")
    output_dir: DirPath | None = config_field(
        None,
        "folder for the page, or its .html file; null: report.html in the run, comparison.html beside several",
    )


class RunsSettings(SettingsGroup):
    """The runs in a folder and where each one stands."""

    positional: ClassVar[str] = "folder"
    folder: PathText = config_field("runs", "folder of run directories, searched to a few levels")
    format: Literal["table", "json"] = config_field("table", "output format")


class DoctorSettings(SettingsGroup):
    """What this machine has and which path each layer takes; given a run, which contracts held."""

    positional: ClassVar[str] = "run"
    run: PathText | None = config_field(None, "run directory")
