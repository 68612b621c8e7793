"""Settings of `lorry eval`: a file of rows, named sets, or a suite of unlearning. No torch here.

Try: lorry eval RUN tasks=[bool_q,common_gen] local.bool_q=boolq.jsonl limit=200 n_shot=2
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from lorry.config.base import DirPath, PathText, SettingsGroup, config_field, derived_field
from lorry.config.data import FormatName
from lorry.config.schema.backend import SharedBackendConfig
from lorry.config.schema.model import ModelConfig
from lorry.config.suite import SuiteConfig, first_changed, refuse_unread

# settings that mean something with tasks only
TASK_FIELDS = (
    "local",
    "catalog",
    "task_split",
    "n_shot",
    "template",
    "chat",
    "temperature",
    "top_p",
    "top_k",
    "seed",
)
# what tasks have and a suite of unlearning has not: how it is asked is part of the benchmark
NOT_OF_SUITES = tuple(name for name in TASK_FIELDS if name != "local")
# settings of data that mean something with a file only
FILE_FIELDS = (
    "name",
    "split",
    "format",
    "text_field",
    "max_length",
    "completion_only_loss",
)


class EvalData(SettingsGroup):
    """the rows to evaluate on"""

    main: ClassVar[str] = "path"
    path: PathText | Annotated[list[PathText], Field(min_length=1)] | None = config_field(
        None, "evaluation set: file, directory or hub id, or a list of them"
    )
    name: str | None = config_field(None, "configuration of a hub data set")
    split: str = config_field("train", "split of a folder or hub data set")
    format: FormatName = config_field("auto", "row format; auto: recognised from the columns")
    text_field: str | None = config_field(None, "column of plain text")
    max_length: int = config_field(
        1024,
        (
            "maximum length of a row for the loss, in tokens; a longer one is cut at "
            "the start of its prompt"
        ),
        ge=2,
    )
    completion_only_loss: bool | None = config_field(
        None, "loss on the answers only; null: yes, unless the rows are plain text"
    )
    on_bad_row: Literal["error", "skip"] = config_field(
        "error", "on a row that cannot be used: stop, or skip it"
    )
    system: str | None = config_field(None, "system message for conversations without one")


class EvalSettings(SettingsGroup):
    """Loss, perplexity, exact match, ROUGE-L and token accuracy of a model, adapter or run on a
    file; or named sets.
    """

    positional: ClassVar[str] = "model"
    experiment_kind: ClassVar[str] = "eval"
    model: ModelConfig = ModelConfig()
    weight: float = config_field(
        1.0,
        (
            "weight of the adapters: 0.5 half, below 0 negated; an adapter they were "
            "trained on top of stays at 1"
        ),
    )
    data: EvalData = EvalData()
    tasks: list[str] = config_field(
        [],
        (
            "named sets and suites to evaluate on instead of a file, such as [bool_q, "
            "common_gen] or flan"
        ),
    )
    local: dict[str, PathText] = config_field(
        {}, "files of named sets: local.NAME=path, or of a split: local.NAME.test=path"
    )
    catalog: PathText | None = config_field(
        None, "your own named sets: a YAML file, or a folder of them (docs/sets.md)"
    )
    suite: SuiteConfig = SuiteConfig()
    peer_masks: bool = config_field(
        False,
        "suite: extraction strength with open-unlearning's floor, 1/n for a total miss instead of 0",
    )
    task_split: Literal["auto", "train", "validation", "test"] = config_field(
        "auto", "split of the tasks; auto: the labelled split that is not for training"
    )
    n_shot: NonNegativeInt = config_field(
        0, "few-shot examples before each question, drawn from the training split by the seed"
    )
    # 0 and not drawn, as in training: two evaluations should ask the same
    template: NonNegativeInt = config_field(0, "prompt template of the tasks")
    chat: bool = config_field(
        True, "render prompts with the chat template if the model has one; false: plain text"
    )
    backend: SharedBackendConfig = SharedBackendConfig()
    limit: PositiveInt | None = config_field(None, "evaluate the first n rows only")
    batch_size: PositiveInt = config_field(8, "rows per batch")
    max_new_tokens: PositiveInt | None = derived_field(
        "64; of tasks and suites their own", "maximum length of a generated answer, in tokens"
    )
    temperature: float = config_field(0.0, "0: greedy; above: sampled", ge=0)
    top_p: float | None = config_field(
        None, "sample from the likeliest tokens whose probabilities sum to top_p", gt=0, le=1
    )
    top_k: PositiveInt | None = config_field(None, "sample from the k likeliest tokens")
    seed: NonNegativeInt = config_field(
        0, "seed of the few-shot examples, the sampling and the confidence intervals"
    )
    output_dir: DirPath | None = config_field(
        None,
        (
            "folder for results.json with every answer, and for tasks also results.csv "
            "and results.png; or one .json or .csv file. With suite: folder for its "
            "two files (default: evals/ in the run directory). The metrics alone are "
            "always written to evaluation.json of the evaluated run"
        ),
    )

    @model_validator(mode="after")
    def _something_to_ask(self) -> EvalSettings:
        if [self.data.path is None, not self.tasks, self.suite.name is None].count(False) != 1:
            raise ValueError(
                "say what to evaluate on: data=FILE, or tasks=[...] with named sets, or suite=tofu, muse or wmdp; one of these"
            )
        return self

    @model_validator(mode="after")
    def _suites_are_fixed(self) -> EvalSettings:
        suite = self.suite.name
        if suite is None:
            if self.peer_masks:
                raise ValueError("peer_masks is for suite=tofu")
            return self
        refuse_unread(self, suite)
        if odd := first_changed(self, NOT_OF_SUITES):
            raise ValueError(f"{odd} is for tasks=[...]; suite={suite} fixes its own")
        if self.output_dir is not None and self.output_dir.suffix:
            raise ValueError(
                f"output_dir={self.output_dir}: suite={suite} writes two files; name a folder"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> EvalSettings:
        # by value, not by whether it was written: run descriptions that were dumped list every
        # field
        if self.data.path and (unused := first_changed(self, TASK_FIELDS)):
            raise ValueError(
                f"{unused} is for tasks=[...]; the rows of data={self.data.path} "
                "are evaluated as they stand, with greedy decoding"
            )
        if not self.data.path and (unused := first_changed(self.data, FILE_FIELDS)):
            hint = "; task_split chooses the rows" if self.tasks and unused == "split" else ""
            raise ValueError(
                f"data.{unused} is for data=FILE; a named set defines its own format{hint}"
            )
        if self.temperature == 0 and (unused := first_changed(self, ("top_p", "top_k"))):
            raise ValueError(
                f"{unused} is for sampling; give a temperature above 0 with it, "
                "such as temperature=1"
            )
        if self.output_dir is not None and self.output_dir.suffix == ".csv" and not self.tasks:
            raise ValueError(
                f"output_dir={self.output_dir}: CSV tables are for tasks=[...]; "
                "name a folder or a .json file"
            )
        return self
