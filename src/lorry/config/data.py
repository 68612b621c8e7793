"""What a run reads: files, folders, hub data sets, or a mixture of named sets. No torch here.

Try: lorry sft data.mix=[common_gen,bool_q] data.n=1000 data.local.bool_q=boolq.jsonl
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from lorry.config.base import PathText, SettingsGroup, config_field

FormatName = Literal[
    "auto", "text", "prompt_completion", "messages", "conversations", "alpaca", "question_answer"
]


class DataConfig(SettingsGroup):
    """the examples"""

    main: ClassVar[str] = "path"
    # false where a verb takes the same settings and reads no row (plan, compare of finished runs)
    needs_rows: ClassVar[bool] = True
    path: PathText | list[PathText] | None = config_field(
        None,
        (
            "training rows: file, directory or hub id, or a list of them; or a "
            "benchmark's split: tofu:full"
        ),
        json_schema_extra={"shown": "required, unless mix is given"},
    )
    mix: list[str] = config_field(
        [],
        (
            "named sets and suites (docs/sets.md) to train on instead of path, such as "
            "[common_gen, bool_q]"
        ),
    )
    weights: dict[str, PositiveFloat] | list[PositiveFloat] | None = config_field(
        None,
        "share of each named set of mix in an epoch, by name or in order; null: every row once",
    )
    local: dict[str, PathText] = config_field(
        {},
        "files of named sets: local.NAME=path, or of one split: local.NAME.train=path; folders of tofu, muse, wmdp",
    )
    catalog: PathText | None = config_field(
        None, "your own named sets: a YAML file, or a folder of them (docs/sets.md)"
    )
    template: NonNegativeInt | None = config_field(
        None, "prompt template of named sets; null: drawn for each row by the seed"
    )
    name: str | None = config_field(None, "configuration of a hub data set")
    split: str = config_field("train", "split of a hub data set")
    format: FormatName = config_field("auto", "row format; auto: recognised from the columns")
    eval: PathText | None = config_field(None, "file, directory or hub id to evaluate on")
    eval_split: str | None = config_field(None, "split to evaluate on, of eval or else of path")
    test_size: int | float | None = config_field(
        None, "rows of path held out for evaluation: a share below 1 or a count"
    )
    test_seed: int | None = config_field(
        None, "seed that draws the rows of test_size; null: train.seed"
    )
    n: PositiveInt | None = config_field(
        None, "use the first n rows only; with mix, of each named set"
    )
    eval_n: PositiveInt | None = config_field(
        None, "evaluate on the first n rows only; with mix, of each named set"
    )
    streaming: bool = config_field(False, "read rows while training, not all beforehand")
    shuffle: bool = config_field(
        True, "shuffle each epoch; the order depends only on seed and epoch"
    )
    # ge=2: a prompt's token and the token that is learnt
    max_length: int = config_field(
        1024,
        ("maximum length of an example, in tokens; a longer one is cut at the start of its prompt"),
        ge=2,
    )
    packing: bool = config_field(
        False, "pack several examples into max_length tokens; they do not attend to each other"
    )
    completion_only_loss: bool | None = config_field(
        None, "loss on the answers only; null: yes, unless the rows are plain text"
    )
    on_bad_row: Literal["error", "skip", "quarantine"] = config_field(
        "error", "on a row that cannot be used: stop, skip it, or write it to quarantine.jsonl"
    )
    system: str | None = config_field(None, "system message for conversations without one")
    text_field: str | None = config_field(None, "column of plain text")

    @field_validator("path")
    @classmethod
    def _some_path(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and not value:
            raise ValueError("is empty; give a file")
        return value

    @field_validator("mix")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if repeated := [name for name in value if value.count(name) > 1]:
            raise ValueError(
                f"names {repeated[0]!r} twice; to read a set more often, raise its "
                "share in data.weights"
            )
        return value

    @model_validator(mode="after")
    def _one_kind_of_rows(self) -> DataConfig:
        if self.needs_rows and self.path is None and not self.mix:
            raise ValueError(
                "data.path is missing: give data=FILE, or data.mix=[...] with named sets"
            )
        if self.path is not None and self.mix:
            raise ValueError("data.path and data.mix both name the training rows; keep one")
        if self.weights is not None and not self.mix:
            raise ValueError(
                "data.weights are the shares of the named sets in data.mix, which is empty"
            )
        # refused rather than ignored: whoever gives one of them expects it to do something
        if self.mix and (self.streaming or self.format != "auto" or self.text_field is not None):
            raise ValueError(
                "data.streaming, format and text_field apply to data.path; a named "
                "set defines its own format"
            )
        return self

    @field_validator("test_size")
    @classmethod
    def _share_or_count(cls, value: int | float | None) -> int | float | None:
        if (
            value is None
            # as in scikit-learn: the type tells them apart, 1 is one row and 1.0 neither
            or (isinstance(value, int) and value >= 1)
            or (isinstance(value, float) and 0 < value < 1)
        ):
            return value
        raise ValueError(f"got {value}; give a share between 0 and 1 or a count of at least 1")

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> DataConfig:
        if self.test_size is not None and (self.eval or self.eval_split):
            raise ValueError(
                "data.test_size and data.eval (or data.eval_split) both name the "
                "evaluation set; keep one"
            )
        return self

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.eval or self.eval_split or self.test_size)

    def named(self) -> str:
        """What is read, in a few words: for the default name of a run, its card and messages."""
        if self.mix:
            return "+".join(self.mix)
        return self.path if isinstance(self.path, str) else ", ".join(self.path or [])
