"""Settings of `lorry merge`: one adapter into its base's weights, or several adapters into one; and
what each method of the latter reads. No torch here.

Try: lorry merge runs/a runs/b method=ties_svd weights=[1,0.5] density=0.3
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorry.config.base import (
    DirPath,
    DtypeName,
    PathText,
    SettingsGroup,
    config_field,
    derived_field,
)
from lorry.config.evaluation import EvalData, first_changed

MethodName = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
    "core_linear",
    "core_ties",
    "core_dare",
    "core_tsv",
    "core_iso",
]
MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True)
class MergeMethod:
    """What a method works on, and what it reads.

    space: the A's and the B's apart ("factors"), stacked ("stack"), their product [out, in]
    ("delta"), or that in the space all adapters of a module span ("core"). prune: what sets values
    to zero first. elects_sign: TIES. spectrum: what becomes of singular values.
    """

    space: Literal["factors", "stack", "delta", "core"]
    prune: Literal["magnitude", "random"] | None = None
    elects_sign: bool = False
    spectrum: Literal["tsv", "iso"] | None = None

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that mean something to it, beside weights and scale."""
        return (
            *(("density",) if self.prune else ()),
            *(("majority_sign_method",) if self.elects_sign else ()),
            *(("seed",) if self.prune == "random" else ()),
            *(("rank",) if self.space in ("delta", "core") else ()),
        )


MERGE_METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod("factors"),
    "cat": MergeMethod("stack"),
    "svd": MergeMethod("delta"),
    "ties": MergeMethod("factors", "magnitude", elects_sign=True),
    "ties_svd": MergeMethod("delta", "magnitude", elects_sign=True),
    "dare_linear": MergeMethod("factors", "random"),
    "dare_linear_svd": MergeMethod("delta", "random"),
    "dare_ties": MergeMethod("factors", "random", elects_sign=True),
    "dare_ties_svd": MergeMethod("delta", "random", elects_sign=True),
    "magnitude_prune": MergeMethod("factors", "magnitude"),
    "magnitude_prune_svd": MergeMethod("delta", "magnitude"),
    "core_linear": MergeMethod("core"),
    "core_ties": MergeMethod("core", "magnitude", elects_sign=True),
    "core_dare": MergeMethod("core", "random"),
    "core_tsv": MergeMethod("core", spectrum="tsv"),
    "core_iso": MergeMethod("core", spectrum="iso"),
}
# the method when none is named: it loses nothing, at the price of its rank
EXACT_METHOD = "cat"
METHOD_FIELDS = ("density", "majority_sign_method", "rank", "seed")
ADAPTER_FIELDS = ("weights", *METHOD_FIELDS, "scale")
# of `lorry merge RUN` alone, and what one does instead
INSTEAD = {
    "dtype": "leave it out: they are stored in float32",
    "adapter": "name the folder of one, RUN/NAME",
    "weight": "give weights=[...]",
}
FOLD_FIELDS = tuple(INSTEAD)


class MergeSettings(SettingsGroup):
    """Fold an adapter into its base's weights; or, given several or a method, make one adapter of
    several.
    """

    positional: ClassVar[str] = "run others"
    run: PathText = Field(description="run or adapter directory")
    others: list[PathText] = config_field(
        [], "more of them, on the same base: all become one adapter, nothing is folded"
    )
    # before output_dir, whose default it is part of
    method: MethodName | None = config_field(
        None, "how several adapters become one; null: cat, their exact sum"
    )
    output_dir: DirPath = derived_field(
        "RUN-merged; of several RUN-METHOD", "where the merged model goes, or the merged adapter"
    )
    dtype: DtypeName = config_field(
        "auto",
        "number format to store; auto: that of the base; float32 loses nothing of the adapter",
    )
    adapter: str | None = config_field(None, "which adapter, where the run holds several")
    weight: float = config_field(
        1.0,
        "g of the adapter: 0.5 half of it, 0 none, below 0 negation; what it was trained over stays",
    )
    weights: list[float] | None = config_field(
        None, "of several: one for each, in their order, also below 0; null: 1 each"
    )
    density: float = config_field(
        0.5, "share of values that ties, dare and magnitude_prune keep", gt=0, le=1
    )
    majority_sign_method: MajoritySign = config_field(
        "total", "sign of a value in ties: that of the sum of all, or the one most of them have"
    )
    rank: PositiveInt | None = config_field(
        None, "rank of the result, by SVD; null: of svd the largest, of core all that there is"
    )
    seed: NonNegativeInt = config_field(0, "which values dare drops")
    scale: float | Literal["auto"] = config_field(
        1.0, "factor of the result; auto: the best of 0.1, 0.2 ... 1.5 on every other row of data"
    )
    data: EvalData = EvalData()

    @property
    def several(self) -> bool:
        """Whether adapters become one adapter, and none goes into the base."""
        return bool(self.others) or self.method is not None

    @field_validator("output_dir", mode="before")
    @classmethod
    def _default_output(cls, value: Any, info: ValidationInfo) -> Any:
        method, others = info.data.get("method"), info.data.get("others")
        ending = method or (EXACT_METHOD if others else "merged")
        return (
            Path(f"{info.data.get('run', 'run').rstrip('/')}-{ending}") if value is None else value
        )

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> MergeSettings:
        # by value, not by whether it was written: a description that was dumped has every field
        if not self.several:
            if odd := self._given_data() or first_changed(self, ADAPTER_FIELDS):
                raise ValueError(f"{odd} is for several adapters made one: name more, or method=")
            return self
        if odd := first_changed(self, FOLD_FIELDS):
            raise ValueError(
                f"{odd} is for folding one adapter into its base; for several adapters, {INSTEAD[odd]}"
            )
        name = self.method or EXACT_METHOD
        if odd := first_changed(
            self, [each for each in METHOD_FIELDS if each not in MERGE_METHODS[name].settings]
        ):
            takers = [each for each, method in MERGE_METHODS.items() if odd in method.settings]
            raise ValueError(f"method={name} reads no {odd}; those that do: {', '.join(takers)}")
        if self.scale == "auto" and self.data.path is None:
            raise ValueError("scale=auto needs rows to choose by: data=FILE")
        if self.scale != "auto" and (odd := self._given_data()):
            raise ValueError(f"{odd} is for scale=auto, which chooses by it")
        return self

    def _given_data(self) -> str:
        """The first setting of data that is not its default, or an empty string."""
        changed = first_changed(self.data, tuple(EvalData.model_fields))
        return changed and f"data.{changed}"
