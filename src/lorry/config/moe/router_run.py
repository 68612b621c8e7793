"""The run that trains a router over frozen experts: the second stage of `lorry moe`. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic import model_validator as validate_model

from lorry.config.base import CheckedName, PathText, SettingsGroup, config_field
from lorry.config.moe.router import RouterConfig, check_router
from lorry.config.moe.runs import MoeDataConfig, MoeRunConfig
from lorry.config.schema.run import RunConfig
from lorry.config.schema.train import TrainConfig
from lorry.config.suite import TrainingSuiteConfig


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
