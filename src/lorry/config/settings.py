"""Settings of the verbs that do not train: demo, chat, eval, merge, unmerge, export, report, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from lorry.config.base import DirPath, Dtype, Group, PathText, automatic, setting
from lorry.config.schema import BackendConfig, Format, ModelConfig


def _beside(value: Any, info: ValidationInfo, suffix: str) -> Any:
    """The default output directory: the run's own name with a suffix."""
    return Path(f"{info.data.get('run', 'run').rstrip('/')}-{suffix}") if value is None else value


class DemoSettings(Group):
    """The embedded model learns facts about fictional people; before and after, side by side."""

    output_dir: DirPath = setting(Path("runs/demo"), "the run directory")
    max_steps: PositiveInt | None = setting(None, "optimizer steps; null: as many as the demo needs")
    seed: NonNegativeInt = setting(0, "the people and everything random follow from it")
    fast: bool = setting(False, "a smaller demo, to see that everything works")


class EvalData(Group):
    """the rows to evaluate on"""

    main: ClassVar[str] = "path"
    path: PathText | Annotated[list[PathText], Field(min_length=1)] = Field(description="file, directory or hub id, or a list")
    name: str | None = setting(None, "configuration of a hub data set")
    split: str = setting("train", "split of a folder or hub data set")
    format: Format = setting("auto", "how a row is read; auto goes by its columns")
    text_field: str | None = setting(None, "column of plain text")
    max_length: int = setting(1024, "longest row in tokens for the loss; a longer one loses the start of its prompt", ge=2)
    completion_only_loss: bool | None = setting(None, "loss of the answers only; null: yes, unless the rows are plain text")
    on_bad_row: Literal["error", "skip"] = setting("error", "stop, or leave the row out")
    system: str | None = setting(None, "system message for conversations that bring none")


class EvalSettings(Group):
    """Loss, perplexity, exact match, ROUGE-L and token accuracy of a model, adapter or run on a file."""

    positional: ClassVar[str] = "model"
    model: ModelConfig = ModelConfig()
    data: EvalData
    backend: BackendConfig = BackendConfig()
    limit: PositiveInt | None = setting(None, "evaluate the first so many rows")
    batch_size: PositiveInt = setting(8, "rows at a time")
    max_new_tokens: PositiveInt = setting(64, "longest generated answer in tokens")
    output: DirPath | None = setting(None, "write the results, and every answer, to this JSON file")


class ChatSettings(Group):
    """Talk to a model with any of its adapters."""

    positional: ClassVar[str] = "model"
    model: ModelConfig = ModelConfig()
    adapters: list[PathText] = setting([], "more adapters to switch between with /adapter NAME")
    max_new_tokens: PositiveInt = setting(256, "longest answer in tokens")
    temperature: float = setting(0.0, "0: always the likeliest token", ge=0)
    system: str | None = setting(None, "system message")
    seed: NonNegativeInt = setting(0, "seed of the sampling")


class MergeSettings(Group):
    """Fold an adapter into its base's weights."""

    positional: ClassVar[str] = "run"
    run: PathText = Field(description="run or adapter directory")
    output_dir: DirPath = automatic("RUN-merged", "where the merged model goes")
    dtype: Dtype = setting("auto", "number format to store; auto: that of the base")
    adapter: str | None = setting(None, "which adapter, where the run holds several")

    @field_validator("output_dir", mode="before")
    @classmethod
    def _default_output(cls, value: Any, info: ValidationInfo) -> Any:
        return _beside(value, info, "merged")


class UnmergeSettings(Group):
    """Give back the base of a merged model, bit for bit."""

    positional: ClassVar[str] = "run"
    run: PathText = Field(description="run or merged directory")
    output_dir: DirPath = automatic("RUN-unmerged", "where the base goes")

    @field_validator("output_dir", mode="before")
    @classmethod
    def _default_output(cls, value: Any, info: ValidationInfo) -> Any:
        return _beside(value, info, "unmerged")


class ExportSettings(Group):
    """Write a run in another library's format."""

    positional: ClassVar[str] = "run"
    run: PathText = Field(description="run or adapter directory")
    to: Literal["hf", "peft"] = Field(description="hf: a merged transformers model; peft: an adapter directory")
    output_dir: DirPath = automatic("RUN-hf or RUN-peft", "where the export goes")
    dtype: Dtype = setting("auto", "number format to store; auto: that of the base")
    adapter: str | None = setting(None, "which adapter, where the run holds several")

    @field_validator("output_dir", mode="before")
    @classmethod
    def _default_output(cls, value: Any, info: ValidationInfo) -> Any:
        return _beside(value, info, info.data.get("to", "export"))


class ReportSettings(Group):
    """One offline HTML page with plots for a run, or several side by side."""

    positional: ClassVar[str] = "runs"
    runs: list[PathText] = Field(min_length=1, description="run directories")
    output: DirPath | None = setting(None, "the HTML file; null: report.html in the run, comparison.html beside several")


class DoctorSettings(Group):
    """What this machine has and which path each layer takes; given a run, which contracts held."""

    positional: ClassVar[str] = "run"
    run: PathText | None = setting(None, "run directory")
