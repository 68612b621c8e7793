"""The settings of a router over experts, and what it cannot be. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)
from pydantic import model_validator as validate_model

from lorry.config.base import (
    SettingsGroup,
    config_field,
    derived_field,
)
from lorry.config.jobs import RESERVED_NAMES
from lorry.config.moe.kinds import KIND_FIELDS, ROUTER_KINDS, RouterKindName, kinds_reading
from lorry.config.moe.stages import OUTPUT_NAMES
from lorry.config.schema.lora import LoraConfig
from lorry.config.suite import first_changed

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
