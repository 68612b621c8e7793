"""The description of a mixture of LoRA experts: adapters trained in one run or brought along, and a
router over them. No torch here.

Try: lorry moe examples/experts.yaml output_dir=runs/mixture
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)
from pydantic import model_validator as validate_model

from lorry.config.base import (
    CheckedName,
    DtypeName,
    PathText,
    SettingsGroup,
    config_field,
    derived_field,
)
from lorry.config.data import DataConfig
from lorry.config.jobs import RESERVED_NAMES
from lorry.config.moe.kinds import KIND_FIELDS, ROUTER_KINDS, RouterKindName, kinds_reading
from lorry.config.moe.project import MARKS, translate_project
from lorry.config.moe.stages import EXPORTS, OUTPUT_NAMES, ExportStage, Layout, StageFolders
from lorry.config.parsing.files import DescriptionFile
from lorry.config.schema.job import JobConfig
from lorry.config.schema.lora import LoraConfig
from lorry.config.schema.run import RunConfig
from lorry.config.schema.train import TrainConfig
from lorry.config.suite import TrainingSuiteConfig, first_changed
from lorry.notes import NoteCallback

EXPERTS = (
    "a list of maps, such as [{name: a, data: a.jsonl}, {name: b, adapter: runs/b, data: b.jsonl}]"
)
# what `trainable` trains of which a stock class routes nothing, or not all
OUTSIDE_MLPS = ("all", "all-but-router", "attention")
# of `router.train`, where it says nothing else; rows are of each expert's data
ROUTER_TRAIN = {"max_steps": 200, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
# the same of a classifier with a LoRA of its own: of its evaluations the one with the best F1 stays
PROMPT_LORA_TRAIN = {
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_f1",
}


class ClassifierTrainConfig(SettingsGroup):
    """how a classifier of prompts is trained: router.train of router.kind=sequence"""

    num_train_epochs: PositiveInt = config_field(50, "training epochs")
    learning_rate: PositiveFloat = config_field(1e-3, "AdamW's, constant")
    per_device_train_batch_size: PositiveInt = config_field(32, "prompts in a step")
    weight_decay: float = config_field(0.01, "AdamW's, of matrices", ge=0)
    seed: int = config_field(42, "of splits, first values, order and dropout", ge=0)


# what `router.lora` may say
PLAIN_LORA = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora",
    "init_lora_weights", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
)  # fmt: skip


class RouterConfig(SettingsGroup):
    """how a token gets its experts"""

    main: ClassVar[str] = "kind"
    kind: RouterKindName = config_field(
        "token",
        (
            "token: a linear per layer, trained; sequence: a classifier of the prompt; "
            "prototype: the nearest mean of prompts; phatgoose: a vector per expert and linear, "
            "trained on the expert's own rows; arrow, spectr: computed from the adapters, no "
            "training; uniform: every expert 1/K; fixed: the weights in gates"
        ),
    )
    level: Literal["delta", "expert"] = config_field(
        "delta",
        (
            "what is mixed: delta: the adapters' updates, in one pass of the base; expert: whole "
            "MLPs, as Mixtral has them"
        ),
    )
    input: Literal["mlp", "attn", "both"] = config_field(
        "mlp",
        (
            "block that is routed: its normed input is read, its adapters are gated; "
            "both: each by its own router"
        ),
    )
    top_k: PositiveInt = config_field(
        2, "experts per token; per sequence where the router is one of sequences (default 1)"
    )
    normalize: bool = config_field(True, "scale a token's gates to sum to 1")
    temperature: PositiveFloat = config_field(1.0, "temperature of the router's softmax")
    straight_through: bool = config_field(
        False, "with top_k=1: gate 1, with the gradient of the expert's probability"
    )
    hidden: list[PositiveInt] = config_field(
        [], "widths of the router's hidden layers, [512, 256] say; none: a linear"
    )
    init: Literal["hidden", "zero"] = config_field(
        "hidden",
        "initial router: hidden: a linear discriminant of the layers' inputs over rows of each expert; or zero",
    )
    label_loss: float = config_field(
        0.1, "weight of the cross-entropy between the gates and the row's expert", ge=0
    )
    aux_loss: float = config_field(0.0, "weight of the load-balance loss", ge=0)
    z_loss: float = config_field(0.0, "weight of the mean squared logsumexp of the logits", ge=0)
    gates: dict[str, float] = config_field({}, "of kind=fixed: {EXPERT: g}; 0 where not named")
    train: dict[str, Any] = config_field(
        {},
        (
            "settings of the router's training (the experts have their own); default "
            "max_steps 200, learning_rate 1e-3, 2 rows of each expert; of kind=sequence "
            "num_train_epochs 50, learning_rate 1e-3, per_device_train_batch_size 32, "
            "weight_decay 0.01; with router.lora num_train_epochs 3, 4 rows of each expert"
        ),
    )
    lora: dict[str, Any] | None = config_field(
        None,
        (
            "of kind=sequence: {r: 8, ...}, settings as of lora: a LoRA of the base that trains "
            "with the classifier and reads prompts alone; null: the base as it is"
        ),
    )
    layer: NonNegativeInt | Literal["final"] | None = derived_field(
        "the middle layer",
        "layer whose output of the prompt is read, from 0; final: the state after the final norm",
    )
    pooling: Literal["last", "mean"] = config_field(
        "last", "the state of the prompt's last token, or the mean over its tokens"
    )
    prompts: PositiveInt = config_field(16, "prompts of each expert that make its prototype")
    dropout: float = config_field(0.1, "of the classifier's hidden layers", ge=0, lt=1)
    train_split: float = config_field(
        0.7, "share of each expert's prompts that train the classifier", gt=0, lt=1
    )
    val_split: float = config_field(0.15, "share that chooses the epoch, by F1", gt=0, lt=1)
    test_split: float = config_field(0.15, "share that is asked at the end", ge=0, lt=1)

    @field_validator("lora")
    @classmethod
    def _whole_lora(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """All of its settings, so that a run's description says what a default was."""
        if value is None:
            return None
        known = [name for name in LoraConfig.model_fields if name != "adapter_name"]
        if odd := [name for name in value if name not in known]:
            raise ValueError(f"has no setting {odd[0]!r}; there are {', '.join(known)}")
        if value.get("r") == "auto":
            raise ValueError("r=auto is of experts, by their memory budget; give a number")
        try:
            whole = LoraConfig.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{first['loc'][0]}: {first['msg']}") from None
        given = whole.model_dump(mode="json", include=set(known))
        default = LoraConfig(r=whole.r).model_dump(mode="json")
        if odd := [key for key in known if key not in PLAIN_LORA and given[key] != default[key]]:
            raise ValueError(
                f"{odd[0]}: a classifier's own adapter is plain LoRA ({', '.join(PLAIN_LORA)}); leave it out"
            )
        if given["init_lora_weights"] not in (True, False, "gaussian"):
            raise ValueError(
                "init_lora_weights: a classifier's own adapter begins at random; leave it out"
            )
        return given

    train_experts: bool = config_field(
        False,
        "train the experts together with their router; false: they stay as they are bit for bit",
    )
    experts_learning_rate: PositiveFloat | None = derived_field(
        "that of router.train", "with train_experts: peak learning rate of the experts"
    )

    @validate_model(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kind = ROUTER_KINDS.get(values.get("kind", "token"))
        return values if kind is None else {"top_k": kind.top_k, **values}

    @validate_model(mode="after")
    def _settings_of_the_kind(self) -> RouterConfig:
        if (self.kind == "fixed") != bool(self.gates):
            raise ValueError("router.gates={EXPERT: g} is for router.kind=fixed, which needs it")
        if self.gates and not any(self.gates.values()):
            raise ValueError("router.gates are all 0, which leaves the base as it is; give another")
        if "train" not in ROUTER_KINDS[self.kind].reads and self.train:
            raise ValueError(f"router.train: kind={self.kind} trains nothing; leave it out")
        unread = [name for name in KIND_FIELDS if name not in ROUTER_KINDS[self.kind].reads]
        if odd := first_changed(self, unread):
            raise ValueError(
                f"router.{odd} is for router.kind={', '.join(kinds_reading(odd))}; "
                f"kind={self.kind} does not use it"
            )
        if self.experts_learning_rate is not None and not self.train_experts:
            raise ValueError(
                "router.experts_learning_rate is for train_experts=true: else no expert trains"
            )
        if self.kind == "sequence":
            self._check_classifier()
        if self.lora is not None and first_changed(self, ["dropout"]):
            raise ValueError(
                "router.dropout is of a classifier over the base as it is; with router.lora give lora_dropout there"
            )
        if self.level == "expert" and self.input == "attn":
            raise ValueError(
                "router.level=expert mixes MLPs, and router.input=attn gates none; give input=mlp or both"
            )
        if self.level == "expert" and not (self.normalize or self.straight_through):
            raise ValueError(
                "router.level=expert with normalize=false would shrink every MLP by the sum of its "
                "gates; give normalize=true, or level=delta"
            )
        if self.top_k != 1 and self.straight_through:
            raise ValueError("router.straight_through is for top_k=1 alone; leave it out")
        if (
            self.kind == "token"
            and self.top_k == 1
            and self.normalize
            and not self.straight_through
        ):
            raise ValueError(
                "router.top_k=1 with normalize=true makes every gate 1 whatever "
                "the logits are, so no gradient reaches it; give "
                "straight_through=true, or normalize=false"
            )
        return self

    def _check_classifier(self) -> None:
        splits = (self.train_split, self.val_split, self.test_split)
        if abs(sum(splits) - 1) > 1e-6:
            raise ValueError(
                "router.train_split, val_split and test_split are {:g}, {:g} and {:g}, together {:g}; "
                "they must add to 1".format(*splits, sum(splits))
            )
        if self.lora is not None:
            return  # a run of its own: its settings are those of `router_train`
        try:
            self.classifier_train(0)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, ["router.train", *first["loc"]]))
            known = ", ".join(ClassifierTrainConfig.model_fields)
            raise ValueError(f"{where}: {first['msg']}; a classifier's are {known}") from None

    @property
    def is_trained_by_run(self) -> bool:
        """Whether a run of its own makes it (`RouterRunConfig`)."""
        return ROUTER_KINDS[self.kind].trains or self.lora is not None

    @property
    def train_defaults(self) -> dict[str, Any]:
        """`train` of that run, where nothing else is said."""
        return dict(ROUTER_TRAIN if self.lora is None else PROMPT_LORA_TRAIN)

    def classifier_train(self, seed: int) -> ClassifierTrainConfig:
        """`train` of kind=sequence; ``seed``: the run's, where it says nothing else. Raises
        ValidationError."""
        return ClassifierTrainConfig.model_validate({"seed": seed, **self.train})


class ExpertConfig(SettingsGroup):
    """where an expert comes from that is not trained here"""

    main: ClassVar[str] = "adapter"
    adapter: PathText | list[PathText] | None = config_field(
        None,
        "an existing PEFT adapter, or several, added up; its data then trains the router alone",
    )
    adapter_weights: list[float] | None = config_field(
        None, "of several adapters: one for each, in their order; null: 1 each"
    )

    @validate_model(mode="after")
    def _a_weight_for_each(self) -> ExpertConfig:
        adapters = self.adapter if isinstance(self.adapter, list) else [self.adapter]
        if adapters == []:
            raise ValueError("expert.adapter names no directory")
        if self.adapter_weights is not None and (
            len(self.adapter_weights) != len(adapters) or len(adapters) < 2
        ):
            raise ValueError(
                f"expert.adapter_weights has {len(self.adapter_weights)} numbers for {len(adapters)} adapters; they are for several "
                "(adapter: [A, B])"
            )
        return self


class ExpertJobConfig(JobConfig):
    """One expert: a job of the run, or an adapter that is there."""

    expert: dict[str, Any] = config_field({}, "the settings that differ from the run's")


class MoeDataConfig(DataConfig):
    """the experts' rows; an adapter of a uniform or fixed mixture needs none"""

    needs_rows: ClassVar[bool] = False


class MoeRunConfig(RunConfig):
    """Experts, trained in one run or brought along, and a router over them."""

    job_groups: ClassVar[tuple[str, ...]] = (*RunConfig.job_groups, "expert")
    jobs_need_adapters: ClassVar[bool] = False  # without, each expert is a run of its own
    # of a description, what says that it is one of these and of no other verb
    task_marks: ClassVar[tuple[str, ...]] = ("experts", *MARKS)
    task: Literal["moe"] = config_field("moe", "fixed by the verb")  # type: ignore[assignment]  # the task is the verb's
    data: MoeDataConfig = MoeDataConfig()
    expert: ExpertConfig = ExpertConfig()
    router: RouterConfig = RouterConfig()
    jobs: list[ExpertJobConfig] = config_field(  # type: ignore[assignment]  # its jobs have a group more
        [],
        (
            "the experts: maps of a name, data or adapter, and the settings that "
            "differ; also experts=[...]"
        ),
        json_schema_extra={"allowed": EXPERTS, "own_word": "experts"},
    )
    together: bool = config_field(
        True, "train the experts in one run over one base; false: in turn, a run each"
    )
    merge_experts: bool = config_field(
        False, "write each expert merged into the base as well, to EXPERT/merged"
    )
    merge_dtype: DtypeName = config_field(
        "auto", "of merge_experts: number format to store; auto: that of the base"
    )
    export: list[ExportStage] = config_field(
        [], "formats to write the finished mixture in", json_schema_extra={"allowed": EXPORTS}
    )
    finetune: dict[str, Any] = config_field(
        {},
        "train all weights of the hf-moe export on the experts' rows: settings as of lorry sft, and train_router",
    )
    layout: Layout = config_field(
        "run",
        "run: the mixture is OUTPUT; workspace: OUTPUT/gating_network, with rmoe_model beside it",
    )
    skip_experts: bool = config_field(False, "take the experts that are in OUTPUT/experts")
    skip_gating: bool = config_field(False, "take the mixture that is there, or export without one")
    skip_merge: bool = config_field(False, "write no hf-moe, dense or peft; take what is there")
    skip_finetune: bool = config_field(False, "do not train the hf-moe's weights")
    skip_convert: bool = config_field(False, "write no GGUF file")
    conversion_mode: Literal["preserve_moe", "average"] = config_field(
        "preserve_moe",
        "what the GGUF file is made of: the hf-moe, or one dense model with the mean of the experts",
    )

    @validate_model(mode="after")
    def _router_fits_the_experts(self) -> MoeRunConfig:
        # without jobs this is one expert's own run
        if self.jobs and self.expert.adapter is not None:
            raise ValueError("expert.adapter is a setting of one expert; give it in experts")
        check_router(self.router, [job.name for job in self.jobs])
        return self

    @property
    def whole_experts(self) -> bool:
        """Whether experts are whole models (lora=null), of which there is no mixture of adapters, but
        one in a stock class."""
        return bool(self.jobs) and self.lora is None

    @validate_model(mode="after")
    def _whole_experts_have_no_adapters(self) -> MoeRunConfig:
        if not self.whole_experts:
            return self
        if brought := [job.name for job in self.jobs if job.expert.get("adapter")]:
            raise ValueError(
                f"lora=null trains experts as whole models, and {brought[0]!r} is an adapter; leave out lora=null, or "
                "put both into one class afterwards: lorry export to=hf-moe base_model=BASE experts=[...]"
            )
        nearest = "give export=[{to: hf-moe, gate_mode: hidden}]: its gates are made of prompts"
        if odd := first_changed(self.router, list(RouterConfig.model_fields)):
            raise ValueError(
                f"router.{odd} is of a router over adapters (level delta, or expert over one base), and with lora=null "
                f"experts are whole models; {nearest}"
            )
        for stage in self.export:
            if stage.to in ("dense", "peft"):
                raise ValueError(
                    f"export: to={stage.to} adds up adapters, and with lora=null experts are whole models; {nearest}"
                )
            if stage.to == "hf-moe" and stage.gate_mode == "router":
                raise ValueError(
                    f"export: gate_mode=router is a router trained over adapters; with lora=null {nearest}"
                )
            # of names and regexes the export says what they came to
            if (
                stage.to == "hf-moe"
                and stage.attention == "refuse"
                and self.trainable in OUTSIDE_MLPS
            ):
                raise ValueError(
                    f"trainable={self.trainable} trains more than the MLPs, which is all that a stock class routes; give "
                    "trainable=mlp, or export=[{to: hf-moe, attention: average, ...}] (or drop)"
                )
        if self.export_of("gguf") is not None and self.conversion_mode == "average":
            raise ValueError(
                "conversion_mode=average adds up adapters, and with lora=null experts are whole models; leave it out"
            )
        if self.merge_experts:
            raise ValueError("merge_experts: with lora=null each expert is a whole model already")
        if self.memory_budget is not None:
            raise ValueError(
                "memory_budget is for training adapters only; with lora=null leave it out"
            )
        return self

    @validate_model(mode="after")
    def _exports_follow_from_each_other(self) -> MoeRunConfig:
        formats = [stage.to for stage in self.export]
        if twice := [name for name in formats if formats.count(name) > 1]:
            raise ValueError(f"export: {twice[0]} is named twice")
        needs_moe = "gguf" in formats and self.conversion_mode == "preserve_moe"
        if "hf-moe" not in formats and (needs_moe or self.finetune):
            what = "gguf" if "gguf" in formats else "finetune"
            raise ValueError(f"{what} is made of the hf-moe export: export=[hf-moe, ...]")
        if "bleurt" in self.train.metric_for_best_model.lower():
            raise ValueError(
                "train.metric_for_best_model: BLEURT is not to be had; there are eval_loss, and with eval_tasks "
                "eval_truthfulqa_rouge_l (ROUGE-L) and eval_truthfulqa_mc_accuracy (MC2)"
            )
        return self

    def export_of(self, form: str) -> ExportStage | None:
        """The stage that writes a format, if any."""
        return next((stage for stage in self.export if stage.to == form), None)

    def export_router(self) -> RouterConfig | None:
        """The token router of the export, where the mixture's is of another kind: a stock class holds
        a matrix for each layer and nothing else. It trains at `level: expert`, which is what the
        class computes: the loss of the export is that of this router's run."""
        moe = self.export_of("hf-moe")
        if moe is None or moe.gate_mode != "router" or self.router.kind == "token":
            return None
        top_k = moe.experts_per_token or self.router.top_k
        return RouterConfig(kind="token", level="expert", top_k=top_k, straight_through=top_k == 1)

    @property
    def folders(self) -> StageFolders:
        """Where each stage writes."""
        return StageFolders(self.output_dir, self.layout)

    @classmethod
    def translate_description(
        cls, described: DescriptionFile, path: Path, add_note: NoteCallback
    ) -> DescriptionFile:
        """A file of the project RMoE under our names; any other as it is. Raises ConfigError."""
        return translate_project(described, path, add_note)


def check_router(router: RouterConfig, experts: list[str]) -> None:
    """Raise ValueError for a router that these experts cannot have; none are no complaint yet."""
    if not experts:
        return
    if len(experts) < 2:
        raise ValueError(f"experts: a mixture needs at least two, got {experts[0]} alone")
    if ROUTER_KINDS[router.kind].has_top_k and router.top_k > len(experts):
        raise ValueError(
            f"router.top_k={router.top_k}: there are {len(experts)} experts; give 1 to {len(experts)}"
        )
    if odd := [name for name in router.gates if name not in experts]:
        raise ValueError(f"router.gates names {odd[0]!r}; the experts are {', '.join(experts)}")
    if odd := [name for name in experts if name.lower() in RESERVED_NAMES | OUTPUT_NAMES]:
        raise ValueError(
            f"{odd[0]!r} cannot be an expert's name: a run directory has a folder of that name"
        )


class RoutedExpert(SettingsGroup):
    """An expert that is there, and rows of its domain."""

    name: CheckedName
    adapter: PathText
    data: MoeDataConfig


class RouterRunConfig(RunConfig):
    """The training of a router over frozen experts; what `lorry moe` makes of its second stage. Where
    nothing trains it is the mixture's description all the same: its directory's run.yaml says which
    experts it has, what their rows are and how it routes."""

    data: MoeDataConfig = MoeDataConfig()
    task: Literal["moe"] = config_field("moe", "fixed by the verb")  # type: ignore[assignment]  # the task is the verb's
    experts: list[RoutedExpert] = Field(min_length=2)
    router: RouterConfig = RouterConfig()
    # a suite asks adapters, and what trains here is none; not written either
    suite: TrainingSuiteConfig = Field(default=TrainingSuiteConfig(), exclude=True)

    @field_validator("suite")
    @classmethod
    def _asks_no_suite(cls, value: TrainingSuiteConfig) -> TrainingSuiteConfig:
        if value.name is not None:
            raise ValueError(
                f"suite={value.name} asks the experts while they train; a router's run has none (lorry eval asks a mixture)"
            )
        return value

    @validate_model(mode="before")
    @classmethod
    def _defaults_of_the_router(cls, values: Any) -> Any:
        """`train` as the kind of router has it; the rows of the first expert are what a pass is
        counted in."""
        if not isinstance(values, dict):
            return values
        router = values.get("router", {})
        if not isinstance(router, RouterConfig):
            try:
                router = RouterConfig.model_validate(router)
            except ValidationError:
                return values  # its own field says what is wrong
        if isinstance(train := values.get("train"), Mapping):
            # the val split of its prompts is always there to be asked
            when = {"eval_strategy": "steps" if train.get("eval_steps") else "epoch"}
            own = {} if router.lora is None else when
            values = {**values, "train": {**router.train_defaults, **own, **train}}
        if values.get("experts"):
            first = values["experts"][0]
            data = first["data"] if isinstance(first, Mapping) else first.data
            values = {**values, "data": data}
        return values

    @property
    def has_evaluation(self) -> bool:
        """Rows that were held out, or the val split of a classifier's prompts."""
        return self.router.lora is not None or super().has_evaluation

    @validate_model(mode="after")
    def _router_fits(self) -> RouterRunConfig:
        check_router(self.router, [expert.name for expert in self.experts])
        if not self.router.is_trained_by_run:
            return self
        if bare := [e.name for e in self.experts if not (e.data.path or e.data.mix)]:
            raise ValueError(
                f"expert {bare[0]!r} has no data, and a router of kind={self.router.kind} trains on "
                "rows of every expert's domain"
            )
        if any(expert.data.streaming for expert in self.experts):
            raise ValueError(
                "data.streaming: training a router needs the number of its rows "
                "beforehand; leave streaming out"
            )
        evaluates = {expert.name: expert.data.evaluates for expert in self.experts}
        if len(set(evaluates.values())) > 1 and self.router.lora is None:
            odd = next(name for name, held in evaluates.items() if not held)
            raise ValueError(
                f"expert {odd!r} has no held-out rows and others have; the mixture's evaluation weighs domains equally: "
                "give data.eval or data.test_size to each expert, or to none"
            )
        return self


def router_train(run: MoeRunConfig, router: RouterConfig) -> dict[str, Any]:
    """`train` of a router's run, plain values: the run's seed and logging_steps, defaults of its own,
    then what `router.train` gives. Where no run trains it the seed alone counts, which draws what is
    held out. Raises ValidationError."""
    shared = {"seed": run.train.seed, "logging_steps": run.train.logging_steps}
    if not router.is_trained_by_run:
        return TrainConfig.model_validate(shared).model_dump(mode="json")
    return TrainConfig.model_validate(
        {**shared, **router.train_defaults, **router.train}
    ).model_dump(mode="json", exclude_unset=True)
