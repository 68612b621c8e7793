"""The adapter that a run trains: its settings in PEFT's names, which of them go together, and under which
backends. No torch here.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorry.config.adapter.initialization import check_initialization, find_initialization
from lorry.config.base import CheckedName, PathText, SettingsGroup, config_field, derived_field
from lorry.config.parsing.names import show_value
from lorry.config.schema.backend import SharedBackendConfig
from lorry.errors import ConfigError

InitializationName = Literal[
    "gaussian", "pissa", "olora", "milora", "eva", "corda", "lora_ga", "loftq", "orthogonal", "mica",
    "pissa_niter_1", "pissa_niter_2", "pissa_niter_4", "pissa_niter_8", "pissa_niter_16",
    "pissa_niter_32", "pissa_niter_64",
]  # fmt: skip
# q_proj or q_proj,v_proj: as a regex it could only match a module of that full name
PLAIN_NAMES = re.compile(r"\w+(\s*,\s*\w+)*")

# the settings of an adapter that give it weights in the base's place, besides A and B
OWN_WEIGHT_FIELDS = ("bias", "modules_to_save", "trainable_token_indices", "new_tokens")
# what of an adapter's settings is AdaLoRA's alone
ADALORA_FIELDS = (
    "variant", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
)  # fmt: skip
# one alpha for every rank, so that a rate serves all of them (docs/choosing.md)
DEFAULT_RANK, DEFAULT_ALPHA = 16, 32
# the bound of r=auto without memory_budget: SmolLM2's adapter is then a fifth of its weights
AUTO_RANK = 64


class LoraConfig(SettingsGroup):
    """the adapter; lora=null means none"""

    main: ClassVar[str] = "r"
    variant: Literal["lora", "dora", "adalora"] = config_field(
        "lora",
        "dora: as use_dora=true; adalora: ranks go from init_r to target_r where they matter least",
    )
    # far beyond any matrix; where rows choose ranks lora_alpha may be twice that, its limit
    r: Annotated[PositiveInt, Field(le=2**30)] | Literal["auto"] = config_field(
        DEFAULT_RANK, "rank; auto: what the rows ask for (rank_by), at most what fits memory_budget"
    )
    rank_by: Literal["data", "memory"] | None = config_field(
        None,
        "data: each module's rank by its first gradient and the amount of data, at most r; memory: r alone; "
        "null: data with r=auto, else memory",
    )
    lora_alpha: PositiveInt | PositiveFloat | None = derived_field(
        f"{DEFAULT_ALPHA}; where rows choose the ranks {DEFAULT_ALPHA // DEFAULT_RANK} x r",
        "the adapter's update is scaled by lora_alpha / r",
        le=2**31,
    )
    lora_dropout: float = config_field(0.0, "dropout on the adapter's input", ge=0, lt=1)
    target_modules: str | list[str] = config_field(
        "auto",
        (
            "auto (the linears of attention and MLP that text passes through, fused experts too), "
            "all-linear, names, or a regex"
        ),
    )
    target_parameters: list[str] | None = config_field(
        None,
        (
            "tensors that are no linear's, by the end of their names (mlp.experts.down_proj, "
            "mlp.gate.weight); a list, even an empty one, takes the place of all experts"
        ),
    )
    exclude_modules: str | list[str] | None = config_field(None, "names or a regex to leave out")
    use_rslora: bool = config_field(False, "scale by lora_alpha / sqrt(r)")
    use_dora: bool = config_field(False, "DoRA: a trained magnitude for every output feature")
    # PEFT's lora_bias, which scripts use for PEFT's bias (`ALIAS_READERS`)
    lora_B_bias: bool = config_field(
        False, "a trained bias beside every lora_B; also lora_bias=true"
    )
    init_lora_weights: bool | InitializationName = config_field(
        True,
        (
            "true: Kaiming A, zero B; gaussian; false: both random; from the base: pissa, olora, milora, "
            "loftq (of a packed one), mica (B frozen); from rows: eva, corda, lora_ga; orthogonal"
        ),
    )
    train: list[Literal["A", "B"]] = config_field(
        ["A", "B"], "the halves that train; B alone as in LoRA-FA: less memory"
    )
    alora_invocation_tokens: list[NonNegativeInt] | None = config_field(
        None, "aLoRA: the adapter counts from the last occurrence of these token ids on"
    )
    init_rows: PositiveInt = config_field(
        64, "training rows that eva, corda and lora_ga begin from", le=1_000_000
    )
    rho: float = config_field(2.0, "eva: how many times its rank a module may get", ge=1)
    keep_residual: bool = config_field(
        False, "save A and B alone, without what pissa or olora took off the base (PEFT's own form)"
    )
    rank_pattern: dict[str, PositiveInt] = config_field({}, "rank by module name or regex")
    alpha_pattern: dict[str, Annotated[PositiveInt | PositiveFloat, Field(le=2**31)]] = (
        config_field({}, "lora_alpha by module name or regex")
    )
    layers_to_transform: NonNegativeInt | list[NonNegativeInt] | None = config_field(
        None, "adapt only the layers of these numbers"
    )
    layers_pattern: str | list[str] | None = config_field(
        None, "name of the list whose numbers layers_to_transform means, where paths have several"
    )
    bias: Literal["none", "all", "lora_only"] = config_field(
        "none",
        "biases that train in the base's place: none, all, or those of the adapter's modules",
    )
    modules_to_save: list[str] | None = config_field(
        None,
        "modules that train whole in the base's place: lm_head, embed, norms, any by its name's end",
    )
    trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None = (
        config_field(
            None,
            "token ids whose rows of the embedding train (of a tied head too); or a map by module",
        )
    )
    new_tokens: list[str] | PathText | None = config_field(
        None, "tokens to add to the tokenizer, or an added_tokens file; their rows alone train"
    )
    new_token_init: Literal["subtokens", "mean"] = config_field(
        "subtokens", "their rows begin as the mean of the tokens they replace, or of all rows"
    )
    ensure_weight_tying: bool = config_field(
        False, "a tied head and embedding that train keep one weight"
    )
    adapter_name: CheckedName = config_field("default", "name of the adapter")
    init_r: PositiveInt | None = config_field(
        None, "AdaLoRA: rank of every module at first; null: r if given, else 12"
    )
    target_r: PositiveInt = config_field(8, "AdaLoRA: rank of a module at the end, on average")
    tinit: NonNegativeInt = config_field(0, "AdaLoRA: steps before the first rank goes")
    tfinal: NonNegativeInt = config_field(0, "AdaLoRA: steps after the last rank has gone")
    deltaT: PositiveInt = config_field(1, "AdaLoRA: ranks go every n steps")
    beta1: float = config_field(0.85, "AdaLoRA: smoothing of the sensitivities", gt=0, lt=1)
    beta2: float = config_field(0.85, "AdaLoRA: smoothing of their uncertainty", gt=0, lt=1)
    orth_reg_weight: float = config_field(
        0.5, "AdaLoRA: factor of the penalty that keeps A and B orthogonal", ge=0
    )

    @field_validator("train")
    @classmethod
    def _halves(cls, value: list[str]) -> list[str]:
        if not value or len({*value}) < len(value):
            raise ValueError("give A, B or both, each once")
        return sorted(value)

    @model_validator(mode="after")
    def _invoked_low_rank_terms(self) -> Self:
        if self.alora_invocation_tokens is None:
            return self
        if not self.alora_invocation_tokens:
            raise ValueError("alora_invocation_tokens is empty; give token ids, or null")
        if self.use_dora or self.variant != "lora":
            raise ValueError(
                "alora_invocation_tokens does not go with DoRA or AdaLoRA; leave one of them out"
            )
        for name in ("lora_B_bias", *OWN_WEIGHT_FIELDS):
            if getattr(self, name) != self._default(name):
                raise ValueError(
                    f"alora_invocation_tokens does not go with {name}, which counts for every token; "
                    "leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _halves_that_move(self) -> Self:
        starts = self.init_lora_weights
        if self.train == ["A"] and starts in (True, "gaussian"):
            raise ValueError(
                "train=A leaves lora_B at zero, so nothing would ever train; give "
                "init_lora_weights=mica, orthogonal or false with it, or train B"
            )
        return self

    @property
    def most_rank(self) -> int:
        """r, or with r=auto and without a memory budget the most that rows may ask for."""
        return AUTO_RANK if self.r == "auto" else self.r

    def alpha_at(self, bound: int) -> float:
        """lora_alpha, or where it is left open what gives ``bound``, within which rows choose ranks of one
        scale, the scale of the default rank: that of a module hangs on no bound."""
        if self.lora_alpha is not None:
            return self.lora_alpha
        ratio = bound / DEFAULT_RANK
        return DEFAULT_ALPHA * (math.sqrt(ratio) if self.use_rslora else ratio)

    @property
    def ranks_follow_data(self) -> bool:
        """Whether rows choose the ranks, of which r is the bound."""
        return self.rank_by == "data" or (self.rank_by is None and self.r == "auto")

    @property
    def adalora(self) -> dict[str, Any] | None:
        """AdaLoRA's numbers, where it is the variant."""
        if self.variant != "adalora":
            return None
        return self.model_dump(include={*ADALORA_FIELDS} - {"variant", "init_r"})

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, data: Any) -> Any:
        """DoRA is use_dora, and AdaLoRA's first rank is r: what follows from them asks for one name."""
        if not isinstance(data, dict) or data.get("variant") not in ("adalora", "dora"):
            return data
        if data["variant"] == "dora":
            if data.get("use_dora", True) in (False, "false"):
                raise ValueError("variant=dora and use_dora=false contradict each other; give one")
            return {**data, "use_dora": True}
        init_r, r = data.get("init_r"), data.get("r")
        if init_r is not None and r is not None and str(init_r) != str(r):
            raise ValueError(
                f"r={show_value(r)} and init_r={show_value(init_r)} are both the first rank of AdaLoRA; "
                "give one"
            )
        if "auto" in (r, init_r):
            raise ValueError("r=auto does not go with variant=adalora; give init_r")
        first = next((rank for rank in (init_r, r) if rank is not None), 12)
        return {**data, "r": first, "init_r": first}

    @model_validator(mode="after")
    def _adalora_goes_with(self) -> Self:
        if self.variant != "adalora":
            given = [f for f in ADALORA_FIELDS[1:] if getattr(self, f) != self._default(f)]
            if given:
                adamw = f" (AdamW's is adam_{given[0]})" if given[0] in ("beta1", "beta2") else ""
                raise ValueError(
                    f"{given[0]} is AdaLoRA's{adamw}; add variant=adalora, or leave it out"
                )
            return self
        assert isinstance(self.r, int)
        if self.target_r >= self.r:
            raise ValueError(
                f"target_r={self.target_r} is not below init_r={self.r}: AdaLoRA would have no ranks to "
                "take away; give a smaller target_r, or variant=lora"
            )
        for name in (
            "train",
            "use_dora",
            "lora_B_bias",
            *OWN_WEIGHT_FIELDS,
            "rank_by",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "init_lora_weights",
        ):
            if getattr(self, name) != self._default(name):
                raise ValueError(
                    f"{name} does not go with variant=adalora, which has ranks, scale and first "
                    "values of its own; leave it out"
                )
        return self

    @classmethod
    def _default(cls, name: str) -> Any:
        return cls.model_fields[name].get_default(call_default_factory=True)

    @field_validator("lora_alpha", mode="before")
    @classmethod
    def _one_for_all_ranks(cls, value: Any, info: ValidationInfo) -> Any:
        # where rows choose the ranks, and with r=auto, it follows from what bounds them (`alpha_at`)
        follows = info.data.get("r") == "auto" or info.data.get("rank_by") == "data"
        return DEFAULT_ALPHA if value is None and not follows else value

    @model_validator(mode="after")
    def _can_begin_so(self) -> Self:
        ranks = [r for r in (self.r, *self.rank_pattern.values()) if r != "auto"]
        try:
            check_initialization(
                self.init_lora_weights,
                ranks,
                keep_residual=self.keep_residual,
                use_dora=self.use_dora,
            )
        except ConfigError as error:
            raise ValueError(str(error)) from None
        way = find_initialization(self.init_lora_weights)
        if self.init_rows != self._default("init_rows") and not (way and way.reads_rows):
            raise ValueError(
                "init_rows says how many rows eva, corda and lora_ga begin from; give init_lora_weights, or "
                "leave it out"
            )
        if self.rho != self._default("rho") and not (way and way.name == "eva"):
            raise ValueError("rho is EVA's; add init_lora_weights=eva, or leave it out")
        return self

    @field_validator("target_modules", "exclude_modules", mode="before")
    @classmethod
    def _module_names(cls, value: Any) -> Any:
        # all-linear has a hyphen, so it is no plain name and stays the word it is
        if isinstance(value, str) and value != "auto" and PLAIN_NAMES.fullmatch(value):
            return re.split(r"\s*,\s*", value)
        if value in ("", []):
            raise ValueError("is empty; name a module")
        return value

    @field_validator("target_parameters", mode="before")
    @classmethod
    def _parameter_names(cls, value: Any, info: ValidationInfo) -> Any:
        names = re.split(r"\s*,\s*", value) if isinstance(value, str) and value else value
        if names and info.data.get("lora_dropout"):
            raise ValueError(
                "does not go with lora_dropout: the update is added to the parameter, which has no "
                "input to drop; set lora_dropout=0"
            )
        return names

    @field_validator("use_dora", "lora_B_bias")
    @classmethod
    def _low_rank_at_parameters(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("target_parameters"):
            raise ValueError("does not go with target_parameters, which have low-rank terms alone")
        return value

    @field_validator("modules_to_save", "trainable_token_indices", "layers_pattern", "new_tokens")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value in ("", [], {}):
            raise ValueError("is empty; leave it out, or name something")
        return value

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _regex(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, str):
            try:
                re.compile(value)
            # re raises all three: a bad pattern, one nested by the thousand, a repeat count beyond
            # 32 bits
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"{show_value(value)} is not a regular expression ({error})"
                ) from None
        return value

    def refuse_backend(self, backend: SharedBackendConfig) -> None:
        """Raises ValueError where the layers of a backend, or the parts of them that a process has, cannot
        train such an adapter."""
        megatron = backend.name == "megatron"
        if megatron and self.alora_invocation_tokens:
            raise ValueError(
                "alora_invocation_tokens: Megatron's layers do not see which tokens come; leave "
                "backend=megatron out"
            )
        if megatron and (self.use_dora or self.lora_B_bias or self.variant == "adalora"):
            asked = (
                "variant=adalora"
                if self.variant == "adalora"
                else "use_dora"
                if self.use_dora
                else "lora_bias"
            )
            cut = self.variant == "adalora" and backend.tensor_parallel > 1
            raise ValueError(
                f"lora.{asked} needs linears that Lorry multiplies itself, and under backend=megatron "
                "Megatron-core does; give backend=ddp or fsdp"
                + (", and leave backend.tensor_parallel out" if cut else "")
            )
        if self.train != ["A", "B"] and (megatron or backend.tensor_parallel > 1):
            raise ValueError(
                f"lora.train={','.join(self.train)} is for layers that a process has whole, on Lorry's own "
                "or transformers' code; leave backend.tensor_parallel and backend=megatron out"
            )
        if self.variant == "adalora" and backend.tensor_parallel > 1:
            raise ValueError(
                "lora.variant=adalora scores whole rows and columns, of which tensor-parallel processes "
                "have parts; leave backend.tensor_parallel out"
            )

    def refuse_steps(self, max_steps: int) -> None:
        """Raises ValueError for AdaLoRA in a run whose steps are all at full rank, or at the last one.
        ``max_steps``: as of a run, -1 where epochs say it."""
        if self.variant == "adalora" and 0 < max_steps <= self.tinit + self.tfinal:
            raise ValueError(
                f"lora.tinit={self.tinit} and lora.tfinal={self.tfinal} leave none of the {max_steps} steps "
                "for taking ranks away; make them smaller, or max_steps larger"
            )

    def refuse_budget(self, memory_budget: str | None, *, streaming: bool) -> None:
        """Raises ValueError where the rank is to be chosen and nothing can choose it, or two things do.
        ``streaming``: whether rows are read once, while the run trains."""
        if self.ranks_follow_data and self.init_lora_weights == "eva":
            raise ValueError(
                "lora.init_lora_weights=eva moves ranks between modules itself (rho), and r=auto or "
                "rank_by=data chooses them; give r=N, or another initialisation"
            )
        beside = ("use_dora", "alora_invocation_tokens", *OWN_WEIGHT_FIELDS)
        asked = [name for name in beside if getattr(self, name) != self._default(name)]
        if self.ranks_follow_data and asked:
            raise ValueError(
                f"lora.{asked[0]} with r=auto or rank_by=data, which chooses the ranks of low-rank terms alone; "
                "give r=N, or rank_by=memory and memory_budget"
            )
        if self.ranks_follow_data and streaming:
            raise ValueError(
                "lora.rank_by=data (r=auto) reads rows before training; leave data.streaming out"
            )
        if self.r == "auto" and memory_budget is None and not self.ranks_follow_data:
            raise ValueError(
                "lora.r=auto with rank_by=memory needs a memory budget; give memory_budget, such as 3GiB"
            )
