"""The description of an unlearning run: a training run that makes a model forget some rows and keep
others. No torch here.

Try: lorry unlearn model=runs/people forget=forget.jsonl retain=retain.jsonl method=NPO
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveFloat, field_validator
from pydantic import model_validator as validate_model

from lorry.config.base import PathText, SettingsGroup, config_field, derived_field
from lorry.config.schema.job import JobConfig
from lorry.config.schema.run import JOBS, RunConfig
from lorry.config.schema.step_reads import StepReads
from lorry.config.schema.train import TrainConfig
from lorry.errors import suggest_nearest

RetainLossName = Literal["NLL", "KL", "EMBED"]

_ALONE: dict[str, Any] = {"gamma": 1.0, "peer_masks": False}
_PAIR: dict[str, Any] = {**_ALONE, "alpha": 1.0, "retain_loss": "NLL", "layer": 7}
# What a method reads and its defaults: those of the papers' code as open-unlearning d3d7cf9 has
# them; a setting that is not in a method's line is not read by it, and giving it is an error.
_METHOD_LINES: dict[str, dict[str, Any]] = {
    "GradAscent": _ALONE,
    "GradDiff": _PAIR,
    "KL": {**_ALONE, "alpha": 1.0},
    "NPO": {**_PAIR, "beta": 0.1},
    "SimNPO": {**_PAIR, "gamma": 0.125, "beta": 4.5, "delta": 0.0},
    "DPO": {**_PAIR, "beta": 0.1},
    "IdkDPO": {**_PAIR, "beta": 0.1},
    "AltPO": {**_PAIR, "beta": 0.1},
    "RMU": {**_PAIR, "retain_loss": "EMBED", "steering_coeff": 2.0, "adaptive": False},
    "UNDIAL": {**_PAIR, "alpha": 0.0, "beta": 10.0},
    "CEU": {**_ALONE, "ignore_first_n_answer_tokens": 1},
    "WGA": {**_PAIR, "beta": 1.0},
    "SatImp": {**_PAIR, "gamma": 0.1, "beta1": 5.0, "beta2": 1.0},
    "PDU": {
        **_PAIR,
        "alpha": 50.0,  # the multiplier's first value: lambda_0
        "retain_loss_eps": "auto",
        "dual_step_size": 1.0,
        "dual_update_upon": "step",
        "dual_warmup_epochs": 5,
    },
    "IHL": _PAIR,
    "ME": {**_PAIR, "gamma": 0.1},
    "IdkAP": {**_ALONE, "alpha": 1.0, "beta": 0.1},
    "JensUn": {**_ALONE, "alpha": 1.0},
}
UNLEARN_METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {name: MappingProxyType(settings) for name, settings in _METHOD_LINES.items()}
)
# methods whose loss is of another answer to the forget question as well
NEED_ALTERNATES = frozenset({"DPO", "IdkDPO", "AltPO", "IdkAP", "JensUn"})
# methods that run the other answer beside the row's own, and of which rows (in place of it: no more
# sequences); and what the forget loss asks of the start. Held to tasks/unlearn/methods/ by a test.
_RUN_ALTERNATES = {"DPO": "forget", "IdkDPO": "forget", "AltPO": "forget", "IdkAP": "retain"}
_FORGET_ASKS: dict[str, Literal["scores", "hidden"]] = {
    **dict.fromkeys(("NPO", "DPO", "IdkDPO", "AltPO"), "scores"),
    "UNDIAL": "hidden",
}
# settings that only some combinations of the others read, and which
_READ_WITH = {
    "retain_loss": "with alpha above 0",
    "layer": "with retain_loss=EMBED (and RMU always)",
    "peer_masks": "with retain_loss=KL (and UNDIAL and PDU always)",
}
_METHOD_SETTINGS = sorted({name for line in UNLEARN_METHODS.values() for name in line})


class UnlearnConfig(SettingsGroup):
    """what is forgotten, what is kept, and how"""

    main: ClassVar[str] = "method"
    forget: PathText | list[PathText] = config_field(
        ...,
        (
            "forget set: file, directory or hub id, or a list of them; or a "
            "benchmark's split: tofu:forget10"
        ),
    )
    retain: PathText | list[PathText] | None = config_field(
        None, "retain set: rows whose answers the model is to keep; required with alpha above 0"
    )
    method: str = config_field(
        "NPO",
        "NPO, SimNPO, GradDiff, GradAscent, KL, DPO, IdkDPO, AltPO, RMU, UNDIAL, CEU, WGA, SatImp, PDU, "
        "IHL, ME, IdkAP or JensUn",
    )
    gamma: float | None = derived_field("the method's", "weight of the forget loss", ge=0)
    alpha: float | None = derived_field(
        "the method's", "weight of the retain loss; of PDU lambda's first value", ge=0
    )
    retain_loss: RetainLossName | None = derived_field(
        "the method's",
        ("NLL, KL to the reference model, or EMBED: distance of hidden states to the reference's"),
    )
    beta: PositiveFloat | None = derived_field(
        "the method's", "sharpness of NPO, SimNPO, DPO, IdkAP, WGA; strength of UNDIAL"
    )
    delta: float | None = derived_field("0", "SimNPO: margin of the mean token loss, nats")
    beta1: PositiveFloat | None = derived_field("5", "SatImp: power of p")
    beta2: PositiveFloat | None = derived_field("1", "SatImp: power of 1 - p")
    steering_coeff: PositiveFloat | None = derived_field(
        "2", "RMU: length of the vector that hidden states are steered to"
    )
    adaptive: bool | None = derived_field(
        "false", "RMU: times the norm of the reference model's own hidden states"
    )
    layer: NonNegativeInt | None = derived_field(
        "7", "layer, counted from 0, whose output RMU steers and retain_loss=EMBED compares"
    )
    retain_loss_eps: PositiveFloat | Literal["auto"] | None = derived_field(
        "auto: the reference model's retain loss + 0.1", "PDU: upper bound of the retain loss, nats"
    )
    dual_step_size: PositiveFloat | None = derived_field("1", "PDU: step size of lambda")
    dual_update_upon: Literal["step", "epoch"] | None = derived_field(
        "step", "PDU: when lambda moves"
    )
    dual_warmup_epochs: NonNegativeInt | None = derived_field(
        "5", "PDU: epochs before lambda moves"
    )
    ignore_first_n_answer_tokens: NonNegativeInt | None = derived_field(
        "1", "CEU: number of first answer tokens without a loss"
    )
    peer_masks: bool | None = derived_field(
        "false", "UNDIAL, PDU, KL: average over open-unlearning's tokens, which include the prompt"
    )
    alternates: PathText | None = config_field(
        None,
        ("file of alternate answers: rows of question and alternate; AltPO, DPO, IdkAP, JensUn"),
    )
    idk: PathText | None = config_field(
        None, "file of refusals, one a line; null: Lorry's own list"
    )
    anchor: Literal["forget", "retain"] = config_field(
        "forget",
        (
            "the set that an epoch passes over; each of its rows is paired with a row "
            "of the other set, drawn without repeats"
        ),
    )
    gradient: Literal["plain", "sam", "gru"] = config_field(
        "plain",
        (
            "sam: gradient of the forget loss at its highest point nearby; gru: that "
            "gradient without the part that raises the retain loss; plain: neither"
        ),
    )
    sam_rho: PositiveFloat | None = derived_field(
        "0.01", "gradient=sam: radius; 0.01 to 0.1 where all weights train"
    )
    reference: Literal["live", "cached"] | None = derived_field(
        "live; cached with lora=null",
        (
            "when the reference model (the start) is scored: with every batch, or once "
            "on each row before training"
        ),
    )
    stop_below: float = config_field(
        0.5,
        (
            "share of the reference model's probability of retain answers; below it "
            "the model counts as collapsed"
        ),
        ge=0,
        lt=1,
    )
    early_stop: Literal["collapse"] | None = config_field(
        None,
        (
            "collapse: stop at the first evaluation below stop_below, and save the "
            "adapter of the one before"
        ),
    )

    @field_validator("forget", "retain")
    @classmethod
    def _some_path(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and not value:
            raise ValueError("is empty; give a file")
        return value

    @field_validator("method", mode="before")
    @classmethod
    def _known_method(cls, value: Any) -> Any:
        same = {name.lower(): name for name in UNLEARN_METHODS}
        if str(value).lower() not in same:
            raise ValueError(
                f"{value!r} is not a "
                f"method{suggest_nearest(str(value), UNLEARN_METHODS)}; there are "
                f"{', '.join(UNLEARN_METHODS)}"
            )
        return same[str(value).lower()]

    @validate_model(mode="after")
    def _settings_of_the_method(self) -> UnlearnConfig:
        line = UNLEARN_METHODS[self.method]
        for name in _METHOD_SETTINGS:
            # what a method that keeps nothing has anyway, and what changes nothing anywhere
            neutral = getattr(self, name) == {"alpha": 0, "peer_masks": False}.get(name)
            if getattr(self, name) is not None and name not in line and not neutral:
                readers = [m for m, other in UNLEARN_METHODS.items() if name in other]
                raise ValueError(
                    f"unlearn.{name} is not used by {self.method}; it is a setting "
                    f"of {', '.join(readers)}"
                )
        # in this order: whether the later ones are read hangs on the earlier ones
        for name in sorted(line, key=lambda n: (n != "alpha", n != "retain_loss")):
            if self._reads(name):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, line[name])
            elif getattr(self, name) not in (None, False):
                raise ValueError(
                    f"unlearn.{name} changes nothing here: {self.method} uses it {_READ_WITH[name]}"
                )
        if self.alternates is not None and self.method not in NEED_ALTERNATES:
            raise ValueError(
                f"unlearn.alternates is not used by {self.method}; "
                f"{', '.join(sorted(NEED_ALTERNATES))} do"
            )
        if self.idk is not None and self.method not in NEED_ALTERNATES - {"AltPO"}:
            raise ValueError(f"unlearn.idk is not used by {self.method}")
        if self.alternates is not None and self.idk is not None:
            raise ValueError(
                "unlearn.alternates and unlearn.idk both give alternate answers; keep one"
            )
        if self.sam_rho is not None and self.gradient != "sam":
            raise ValueError("unlearn.sam_rho is used with gradient=sam only")
        if self.gradient == "sam" and self.sam_rho is None:
            object.__setattr__(self, "sam_rho", 0.01)
        if self.gradient == "gru" and not self.retains:
            raise ValueError(
                f"unlearn.gradient=gru needs a retain loss, and {self.method} has "
                "none here; give alpha above 0"
            )
        if self.anchor == "retain" and not self.retains:
            raise ValueError(
                f"unlearn.anchor=retain needs a retain set, and {self.method} reads "
                "none here; give alpha above 0"
            )
        if self.early_stop and self.retain is None:
            raise ValueError(
                "unlearn.early_stop=collapse needs a retain set to detect a "
                "collapse; give retain=FILE"
            )
        if self.method == "AltPO" and self.alternates is None:
            raise ValueError(
                "unlearn.alternates is missing: AltPO trains on alternate answers; "
                "give alternates=FILE (`lorry unlearn-alternates` samples one), or "
                "method=IdkDPO"
            )
        if self.retains and self.retain is None:
            raise ValueError(
                f"unlearn.retain is missing: {self.method} has a retain loss "
                f"(alpha={self.alpha:g}); give retain=FILE, or alpha=0"
            )
        return self

    def _reads(self, name: str) -> bool:
        """Whether a setting of the method's line changes anything beside the others."""
        compares_layer = self.retains and self.retain_loss == "EMBED"
        compares_start = self.method == "KL" or (self.retains and self.retain_loss == "KL")
        return {
            "retain_loss": self.retains,
            "layer": self.method == "RMU" or compares_layer,
            "peer_masks": self.method in ("UNDIAL", "PDU") or compares_start,
        }.get(name, True)

    @property
    def reads_layer(self) -> bool:
        """Whether the output of `layer` is part of the objective."""
        return self._reads("layer") and "layer" in UNLEARN_METHODS[self.method]

    @property
    def retains(self) -> bool:
        """Whether a loss of retain rows is part of the objective."""
        return bool(self.alpha) or self.method == "PDU"

    @property
    def step_reads(self) -> StepReads:
        """What a step reads for each row of the anchor, that row's partner included."""
        alternate = _RUN_ALTERNATES.get(self.method)
        forget = 1 + (alternate == "forget")
        retain = (1 + (alternate == "retain")) if self.retains else 0
        # sam and gru part a micro-batch, and sam runs the rows to forget once more, uphill
        parted = self.gradient != "plain"
        compares = self.retains and (
            self.method in ("KL", "JensUn") or self.retain_loss in ("KL", "EMBED")
        )
        steered = self.method == "RMU"
        return StepReads(
            together=max(forget, retain) if parted else forget + retain,
            passes=forget * (1 + (self.gradient == "sam")) + retain,
            asks_start="hidden"
            if compares or (steered and self.adaptive)
            else _FORGET_ASKS.get(self.method),
            live=self.reference == "live",
            copies=int(parted),
            highest_layer=self.layer if self.stops_at_layer else None,
        )

    @property
    def stops_at_layer(self) -> bool:
        """Whether nothing above `layer` is run: the whole loss is of hidden states."""
        return self.method == "RMU" and (self.retain_loss == "EMBED" or not self.alpha)

    def settings(self) -> dict[str, Any]:
        """The method's own settings, by name."""
        values = {name: getattr(self, name) for name in UNLEARN_METHODS[self.method]}
        return {name: value for name, value in values.items() if value is not None}


class UnlearnJobConfig(JobConfig):
    """One of several adapters that forget in one pass: with numbers of the method, or rows, of its
    own.
    """

    unlearn: dict[str, Any] = config_field({}, "the settings that differ from the run's")


class UnlearnRunConfig(RunConfig):
    """A model forgets some rows and keeps others: a base, a fine-tuned model, or a run whose
    adapter becomes a frozen part of the base.

    Several jobs are several adapters over it: subjects forgotten apart (`subjects=[{name: a, forget:
    F1}, ...]` is `jobs`), or numbers to compare (`beta=0.1,0.5`).
    """

    experiment_kind: ClassVar[str] = "unlearn"
    freezes_start: ClassVar[bool] = True
    always_evaluates: ClassVar[bool] = True  # at the rows to forget, and those to keep
    job_groups: ClassVar[tuple[str, ...]] = (*RunConfig.job_groups, "unlearn")
    task: Literal["unlearn"] = config_field("unlearn", "fixed by the verb")  # type: ignore[assignment]  # the task is the verb's
    unlearn: UnlearnConfig
    jobs: list[UnlearnJobConfig] = config_field(  # type: ignore[assignment]  # its jobs have a group more
        [],
        (
            "train several adapters in one pass: maps of a name and the settings that "
            "differ; also subjects=[...]"
        ),
        json_schema_extra={"allowed": JOBS, "own_word": "subjects"},
    )
    # read into jobs; kept out of what is written, which has those
    sweep: dict[str, Any] | list[dict[str, Any]] = config_field(
        {},
        (
            "map of setting to list of values, where every combination is a job; or a "
            "list of combinations"
        ),
        exclude=True,
        json_schema_extra={
            "allowed": "a map of lists, such as {beta: [0.1, 0.5]}, or a list of maps"
        },
    )

    @property
    def step_reads(self) -> StepReads:
        """The method's, for each row of a micro-batch."""
        return self.unlearn.step_reads

    @validate_model(mode="before")
    @classmethod
    def _forget_rows_are_the_data(cls, values: Any) -> Any:
        """What is forgotten is what a pass over the data is counted in."""
        if not isinstance(values, dict):
            return values
        data, own = values.get("data") or {}, values.get("unlearn") or {}
        if not isinstance(data, dict) or not isinstance(own, dict):
            return values
        forget = own.get("forget")
        if forget is None and data.get("path") is not None:
            raise ValueError("an unlearning run reads forget=FILE (and retain=FILE), not data=FILE")
        if forget is None:
            # without this the rows of `data` would be asked for, which are the same
            raise ValueError("unlearn.forget is missing; give forget=FILE and retain=FILE")
        if data.get("mix"):
            raise ValueError("data.mix: an unlearning run reads forget=FILE and retain=FILE")
        if data.get("path") not in (None, forget):
            raise ValueError(
                "data.path and unlearn.forget both name the forget set; keep unlearn.forget"
            )
        return values if forget is None else {**values, "data": {**data, "path": forget}}

    @field_validator("train")
    @classmethod
    def _best_is_a_balance(cls, train: TrainConfig) -> TrainConfig:
        """No rows are held out for a loss: the best step forgets most for what it keeps."""
        if train.metric_for_best_model != "eval_loss":
            return train
        best = {"metric_for_best_model": "eval_balance", "greater_is_better": True}
        return train.model_copy(update=best)

    @validate_model(mode="after")
    def _what_is_read(self) -> UnlearnRunConfig:
        if self.data.streaming:
            raise ValueError(
                "data.streaming: an unlearning run needs the number of its rows "
                "beforehand; leave streaming out"
            )
        if self.data.evaluates:
            raise ValueError(
                "data.eval, data.test_size: an unlearning run evaluates on its "
                "forget and retain sets; leave them out"
            )
        own = self.unlearn
        if own.reference == "live" and self.lora is None:
            raise ValueError(
                "unlearn.reference=live scores the base model, which lora=null "
                "trains; leave it out (cached)"
            )
        if own.reference is None:
            kind = "cached" if self.lora is None else "live"
            object.__setattr__(self, "unlearn", own.model_copy(update={"reference": kind}))
        if own.early_stop:
            if self.train.early_stopping_patience is not None:
                raise ValueError(
                    "unlearn.early_stop and train.early_stopping_patience both end a run; keep one"
                )
            # the last good adapter is a checkpoint's, which has to be there and be taken back
            object.__setattr__(
                self, "train", self.train.model_copy(update={"load_best_model_at_end": True})
            )
        steered = own.stops_at_layer
        if steered and self.lora is not None and self.lora.layers_to_transform is None:
            # above the layer that is steered no adapter would ever train
            assert own.layer is not None
            layers = {"layers_to_transform": list(range(own.layer + 1))}
            object.__setattr__(self, "lora", self.lora.model_copy(update=layers))
        elif steered and self.lora is not None and own.layer is not None:
            wanted = self.lora.layers_to_transform
            above = [n for n in (wanted if isinstance(wanted, list) else [wanted]) if n > own.layer]  # type: ignore[operator]  # None was the case before
            if above:
                raise ValueError(
                    f"lora.layers_to_transform: nothing of layer {above[0]} would train, since RMU steers layer {own.layer} and "
                    "runs none above it; leave it out"
                )
        return self
