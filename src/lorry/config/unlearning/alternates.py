"""Settings of `lorry unlearn-alternates`: other answers to the rows to forget, sampled from the model
that is to forget them. No torch here.

Try: lorry unlearn-alternates runs/people forget=forget.jsonl alternates=alt5.json n=5
"""

from __future__ import annotations

from string import Formatter
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator
from pydantic import model_validator as validate_model

from lorry.config.base import PathText, SettingsGroup, config_field
from lorry.config.data import FormatName
from lorry.config.schema.backend import BackendConfig
from lorry.config.schema.model import ModelConfig

# AltPO's request (Mekala et al. 2025, arXiv 2409.13474) in words of our own: a plausible answer in
# another form, of which every fact is another, and nothing of the question
ALTERNATES_PROMPT = (
    "Question: {question}\nAnswer: {answer}\n"
    "Make something up: write a different answer to this question. It has to be plausible and fit "
    "the question, say nothing against what the question states, be worded in another way than the "
    "answer above, and every fact that the answer above gives has to be replaced by another one."
)
# a model that goes on from here writes an answer, not a word about the request
ALTERNATES_PREFILL = "Alternate answer:"
PLACEHOLDERS = ("question", "answer")
FILE_KINDS = (".json", ".jsonl")


class AlternatesData(SettingsGroup):
    """how the rows are read, as `lorry unlearn` reads them"""

    local: dict[str, PathText] = config_field(
        {}, "local.tofu=FOLDER that holds TOFU's splits; without it they come from the hub"
    )
    name: str | None = config_field(None, "configuration of a hub data set")
    split: str = config_field("train", "split of a folder or hub data set")
    format: FormatName = config_field("auto", "row format; auto: recognised from the columns")
    on_bad_row: Literal["error", "skip"] = config_field(
        "error", "on a row that cannot be used: stop, or skip it"
    )
    system: str | None = config_field(None, "system message for conversations without one")


class AlternatesSettings(SettingsGroup):
    """Other answers to the rows to forget, sampled from the model that is to forget them, for
    `lorry unlearn method=AltPO alternates=FILE`.
    """

    positional: ClassVar[str] = "model"
    model: ModelConfig = ModelConfig()
    forget: PathText | list[PathText] = config_field(
        ...,
        (
            "forget set: file, directory or hub id, or a list of them; or a "
            "benchmark's split: tofu:forget10"
        ),
    )
    alternates: PathText = config_field(
        ..., "file to write, which must not exist yet: .json (one array of rows) or .jsonl"
    )
    n: PositiveInt = config_field(1, "alternates per question; AltPO's authors use 5")
    temperature: float = config_field(1.0, "1: the model's own distribution; 0: greedy", ge=0)
    max_new_tokens: PositiveInt = config_field(200, "maximum length of an alternate, in tokens")
    seed: NonNegativeInt = config_field(
        0, "seed of the sampling; an alternate depends only on seed, row and its number"
    )
    prompt: str = config_field(
        ALTERNATES_PROMPT,
        "prompt template, with {question} and {answer} of the row",
        json_schema_extra={"shown": "asks for another plausible answer with all facts changed"},
    )
    prefill: str = config_field(
        ALTERNATES_PREFILL, "start of the model's answer; not part of the alternate"
    )
    data: AlternatesData = AlternatesData()
    limit: PositiveInt | None = config_field(None, "sample for the first n rows only")
    batch_size: PositiveInt = config_field(32, "alternates per batch")
    backend: BackendConfig = BackendConfig()

    @field_validator("forget")
    @classmethod
    def _some_path(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("is empty; give a file")
        return value

    @field_validator("alternates")
    @classmethod
    def _kind_of_file(cls, value: str) -> str:
        if not value.lower().endswith(FILE_KINDS):
            raise ValueError(f"{value}: the file name has to end in {' or '.join(FILE_KINDS)}")
        return value

    @field_validator("prompt")
    @classmethod
    def _asks_the_question(cls, value: str) -> str:
        # format() would say the same in words of its own, once a model is loaded
        try:
            parts = list(Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"is not a valid template ({error}); write {{{{ for a brace") from None
        named = {name for _, name, _, _ in parts if name is not None}
        if "question" not in named or not named <= set(PLACEHOLDERS):
            raise ValueError(
                "has to hold {question} and may hold {answer}, and nothing else in braces; write {{ for a brace"
            )
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise ValueError(
                "holds a format or conversion; write {question} and {answer} without one"
            )
        return value

    @validate_model(mode="after")
    def _draws_differ(self) -> AlternatesSettings:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"n={self.n} with temperature=0: greedy answers to one question are "
                "all the same; give n=1, or a temperature above 0"
            )
        return self
