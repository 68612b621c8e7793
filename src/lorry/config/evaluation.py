"""Settings of `lorry eval`: a file of rows, named sets, or a suite of unlearning. No torch here.

Try: lorry eval RUN tasks=[bool_q,common_gen] local.bool_q=boolq.jsonl limit=200 n_shot=2
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from lorry.config.base import DirPath, PathText, SettingsGroup, config_field, derived_field
from lorry.config.data import FormatName
from lorry.config.schema import BackendConfig, ModelConfig
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
        None, "file, directory or hub id, or a list"
    )
    name: str | None = config_field(None, "configuration of a hub data set")
    split: str = config_field("train", "split of a folder or hub data set")
    format: FormatName = config_field("auto", "how a row is read; auto goes by its columns")
    text_field: str | None = config_field(None, "column of plain text")
    max_length: int = config_field(
        1024, "longest row in tokens for the loss; a longer one loses the start of its prompt", ge=2
    )
    completion_only_loss: bool | None = config_field(
        None, "loss of the answers only; null: yes, unless the rows are plain text"
    )
    on_bad_row: Literal["error", "skip"] = config_field("error", "stop, or leave the row out")
    system: str | None = config_field(None, "system message for conversations that bring none")


class EvalSettings(SettingsGroup):
    """Loss, perplexity, exact match, ROUGE-L and token accuracy of a model, adapter or run on a
    file; or named sets.
    """

    positional: ClassVar[str] = "model"
    experiment_kind: ClassVar[str] = "eval"
    model: ModelConfig = ModelConfig()
    weight: float = config_field(
        1.0,
        "g of the adapters: 0.5 half of them, below 0 negation; what they were trained over stays",
    )
    data: EvalData = EvalData()
    tasks: list[str] = config_field(
        [], "named sets and suites instead of a file, such as [bool_q, common_gen] or flan"
    )
    local: dict[str, PathText] = config_field(
        {}, "files of named sets: local.NAME=path, or of a split: local.NAME.test=path"
    )
    catalog: PathText | None = config_field(
        None, "named sets of one's own: a YAML file, or a folder of them (docs/sets.md)"
    )
    suite: SuiteConfig = SuiteConfig()
    peer_masks: bool = config_field(
        False,
        "suite: extraction strength with open-unlearning's floor, 1/n for a total miss instead of 0",
    )
    task_split: Literal["auto", "train", "validation", "test"] = config_field(
        "auto", "which rows of the tasks; auto: the labelled split that is not trained on"
    )
    n_shot: NonNegativeInt = config_field(
        0, "few-shot examples before each question, drawn from the training split by the seed"
    )
    # 0 and not drawn, as in training: two evaluations should ask the same
    template: NonNegativeInt = config_field(0, "prompt template of the tasks")
    chat: bool = config_field(
        True, "ask through the chat template where there is one; false: as plain text"
    )
    backend: BackendConfig = BackendConfig()
    limit: PositiveInt | None = config_field(None, "evaluate the first so many rows")
    batch_size: PositiveInt = config_field(8, "rows at a time")
    max_new_tokens: PositiveInt | None = derived_field(
        "64; each task's and suite's own", "longest generated answer in tokens"
    )
    temperature: float = config_field(0.0, "0: greedy; above: sampled", ge=0)
    top_p: float | None = config_field(
        None, "sample from the likeliest tokens of this share", gt=0, le=1
    )
    top_k: PositiveInt | None = config_field(None, "sample from so many likeliest tokens")
    seed: NonNegativeInt = config_field(0, "of the shots, the sampling and the intervals")
    output_dir: DirPath | None = config_field(
        None,
        "folder for results.json with every answer, of tasks also results.csv and results.png; or the .json or .csv file alone; "
        "for a suite's two files (unless given, evals/ in the run). "
        "The values alone are kept in evaluation.json of the run that was asked, whatever is set here",
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
            raise ValueError(f"{odd} is for tasks=[...]; how suite={suite} asks is fixed")
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
                f"{unused} is for tasks=[...]; the rows of data={self.data.path} are asked greedily, as they stand"
            )
        if not self.data.path and (unused := first_changed(self.data, FILE_FIELDS)):
            hint = (
                "; task_split says which rows are asked" if self.tasks and unused == "split" else ""
            )
            raise ValueError(
                f"data.{unused} is for data=FILE; named sets know how they are read{hint}"
            )
        if self.temperature == 0 and (unused := first_changed(self, ("top_p", "top_k"))):
            raise ValueError(
                f"{unused} is for sampled answers; give temperature=1 or another above 0 with it"
            )
        if self.output_dir is not None and self.output_dir.suffix == ".csv" and not self.tasks:
            raise ValueError(
                f"output_dir={self.output_dir}: tables in CSV are of tasks=[...]; name a folder or a .json file"
            )
        return self
