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
    "onto": "merge one into its base",
}
FOLD_FIELDS = tuple(INSTEAD)


class MergeSettings(SettingsGroup):
    """Fold an adapter into its base's weights; or, given several or a method, make one adapter of
    several.
    """

    positional: ClassVar[str] = "run others"
    run: PathText = Field(description="run or adapter directory")
    others: list[PathText] = config_field(
        [],
        (
            "more of them, on the same base model: all are merged into one adapter, "
            "and the base model is left alone"
        ),
    )
    # before output_dir, whose default it is part of
    method: MethodName | None = config_field(
        None, "method for merging several adapters into one; null: cat, their exact sum"
    )
    output_dir: DirPath = derived_field(
        "RUN-merged; of several RUN-METHOD",
        "directory for the merged model, or for the merged adapter",
    )
    dtype: DtypeName = config_field(
        "auto",
        "dtype to store; auto: that of the base model; float32 keeps the adapter exactly",
    )
    adapter: str | None = config_field(None, "which adapter, where the run holds several")
    onto: Literal["trained", "original"] = config_field(
        "trained",
        (
            "which weights, where the run's base was held in 4 or 8 bits: trained, the values that the adapter "
            "was trained over; original, those of the base's files, with the loss of both on data"
        ),
    )
    weight: float = config_field(
        1.0,
        (
            "weight of the adapter: 0.5 half, 0 none, below 0 negated; an adapter it "
            "was trained on top of stays at 1"
        ),
    )
    weights: list[float] | None = config_field(
        None,
        ("with several adapters: one weight each, in their order, negative allowed; null: 1 each"),
    )
    density: float = config_field(
        0.5, "share of values that ties, dare and magnitude_prune keep", gt=0, le=1
    )
    majority_sign_method: MajoritySign = config_field(
        "total",
        ("how ties elects the sign of a value: by the sum over adapters, or by how many have it"),
    )
    rank: PositiveInt | None = config_field(
        None,
        (
            "rank of the result, by SVD; null: for svd the largest rank given, for "
            "core the full rank"
        ),
    )
    seed: NonNegativeInt = config_field(0, "seed of the values that dare drops")
    scale: float | Literal["auto"] = config_field(
        1.0,
        (
            "scaling coefficient of the result; auto: the best of 0.1, 0.2 ... 1.5 on "
            "every other row of data"
        ),
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
        if not self.several and self.onto == "original":
            if self.data.path is None:
                raise ValueError(
                    "onto=original needs rows on which to compare both bases: the adapter never saw the "
                    "original weights; give data=FILE"
                )
            if odd := first_changed(self, ADAPTER_FIELDS):
                raise ValueError(f"{odd} is for merging several adapters: name more")
            return self
        if not self.several:
            if odd := self._given_data() or first_changed(self, ADAPTER_FIELDS):
                raise ValueError(
                    f"{odd} is for merging several adapters: name more, or give method="
                )
            return self
        if odd := first_changed(self, FOLD_FIELDS):
            raise ValueError(
                f"{odd} is for merging one adapter into its base model; for several "
                f"adapters, {INSTEAD[odd]}"
            )
        name = self.method or EXACT_METHOD
        if odd := first_changed(
            self, [each for each in METHOD_FIELDS if each not in MERGE_METHODS[name].settings]
        ):
            takers = [each for each, method in MERGE_METHODS.items() if odd in method.settings]
            raise ValueError(
                f"method={name} does not use {odd}; the methods that do: {', '.join(takers)}"
            )
        if self.scale == "auto" and self.data.path is None:
            raise ValueError("scale=auto needs rows to choose the coefficient by; give data=FILE")
        if self.scale != "auto" and (odd := self._given_data()):
            raise ValueError(f"{odd} is read with scale=auto only")
        return self

    def _given_data(self) -> str:
        """The first setting of data that is not its default, or an empty string."""
        changed = first_changed(self.data, tuple(EvalData.model_fields))
        return changed and f"data.{changed}"
