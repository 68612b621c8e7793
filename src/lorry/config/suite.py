"""Settings of a suite of unlearning: what `lorry eval` asks of a finished model, and a run at each of
its evaluations. No torch here.

Try: lorry unlearn model=RUN forget=tofu:forget05 retain=tofu:retain95 suite=tofu eval_steps=20
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import PositiveInt, model_validator

from lorry.config.base import PathText, SettingsGroup, config_field, derived_field

# what only some suites read; a setting that is not read is an error
SUITES_OF_FIELDS = {
    "forget_split": ("tofu",),
    "holdout_split": ("tofu",),
    "question_key": ("tofu",),
    "corpus": ("muse",),
    "retain_logs_path": ("tofu", "muse"),
    "peer_masks": ("tofu", "muse"),
    "limit": ("tofu", "muse"),
    "max_new_tokens": ("tofu", "muse"),
}


def first_changed(group: SettingsGroup, names: Sequence[str]) -> str:
    """The first of these settings that is not its default, or an empty string."""
    fields = type(group).model_fields
    # by value, not by whether it was written: run descriptions that were dumped list every field
    return next(
        (
            name
            for name in names
            if getattr(group, name) != fields[name].get_default(call_default_factory=True)
        ),
        "",
    )


def refuse_unread(group: SettingsGroup, suite: str | None) -> None:
    """Raise ValueError for a setting of a group that the suite does not read, or that only a suite
    does where there is none.
    """
    own = [name for name in type(group).model_fields if name != "name"]
    if suite is None and isinstance(group, SuiteConfig) and (odd := first_changed(group, own)):
        readers = SUITES_OF_FIELDS.get(odd, ("tofu",))
        raise ValueError(
            f"{odd} is for suite={readers[0]}; a run's own rows are forget=tofu:forget10 or data=tofu:retain90"
        )
    unread = [n for n in own if n in SUITES_OF_FIELDS and suite not in SUITES_OF_FIELDS[n]]
    if suite is not None and (odd := first_changed(group, unread)):
        raise ValueError(
            f"{odd} is not used by suite={suite}; it is a setting of "
            f"suite={', '.join(SUITES_OF_FIELDS[odd])}"
        )


class SuiteConfig(SettingsGroup):
    """a suite of unlearning: which, of which rows, against whose logs"""

    main: ClassVar[str] = "name"
    name: Literal["tofu", "muse", "wmdp"] | None = config_field(
        None,
        "tofu, muse or wmdp, from local.tofu=FOLDER (or muse, wmdp) or the hub; "
        "writes TOFU_EVAL.json and TOFU_SUMMARY.json (MUSE_, LMEval_)",
    )
    forget_split: str = config_field(
        "forget10",
        "the forget set: forget01, forget05 or forget10",
        json_schema_extra={"shown": "that of the run, else forget10"},
    )
    holdout_split: str | None = derived_field(
        "holdoutNN of forgetNN", "holdout set, which was never trained on, for membership inference"
    )
    retain_logs_path: PathText | None = config_field(
        None,
        (
            "EVAL.json of a model trained without the forget set, ours or "
            "open-unlearning's; forget_quality needs it"
        ),
    )
    metrics: list[str] = config_field(
        [], "compute only these metrics and those they need; empty: the suite's usual ones"
    )
    question_key: str = config_field(
        "question", "question column of the forget and retain sets, such as paraphrased_question"
    )
    corpus: Literal["News", "Books"] = config_field("News", "corpus of MUSE")

    @model_validator(mode="after")
    def _read_by_the_suite(self) -> SuiteConfig:
        refuse_unread(self, self.name)
        return self


class TrainingSuiteConfig(SuiteConfig):
    """a suite of unlearning that is asked whenever the run evaluates, and at its end"""

    forget_split: str = config_field(
        "forget10",
        "the forget set: forget01, forget05 or forget10",
        json_schema_extra={"shown": "that of forget=tofu:forgetNN, else forget10"},
    )
    limit: PositiveInt | None = config_field(
        None, "generate answers to the first n rows only; all other metrics always use all rows"
    )
    max_new_tokens: PositiveInt | None = derived_field(
        "the suite's own", "maximum length of a generated answer, in tokens"
    )
