"""Where a run or a command happens: one process or several, and how they share the model. No torch here."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from lorry.config.base import SettingsGroup, config_field


class BackendConfig(SettingsGroup):
    """where it runs"""

    main: ClassVar[str] = "name"
    name: Literal["single"] = config_field("single", "single: one process, one device")
    # far beyond any machine's cores, and below what the C++ runtime dies of instead of raising
    threads: int | None = config_field(
        None, "CPU threads, at most 1024; null: torch decides", ge=1, le=1024
    )


def _default(group: SettingsGroup, setting: str) -> Any:
    return type(group).model_fields[setting].default


class SharedBackendConfig(BackendConfig):
    """where it runs, on one process or on several"""

    name: Literal["single", "ddp", "fsdp", "megatron"] = config_field(  # type: ignore[assignment]  # wider
        "single",
        "single: one process, one device; ddp: several, the base whole on each; fsdp: several, the "
        "base cut over them; megatron: as ddp, on Megatron's layers (lorry sft and eval)",
    )
    processes: PositiveInt | None = config_field(
        None,
        "local processes to start, each with a part of the rows; null: those of the launcher "
        "(torchrun), or 1",
    )
    tensor_parallel: PositiveInt = config_field(
        1,
        "processes that share every matrix, inside a machine: each has a part of the heads, the MLP "
        "and the vocabulary",
    )
    replicas: PositiveInt = config_field(
        1, "how many times the base lies on the processes, cut over those of each copy (fsdp)"
    )
    reshard_after_forward: bool = config_field(
        True,
        "let a layer's weights go behind its forward pass and gather them again for the backward "
        "(fsdp)",
    )
    # as long as nothing is heard of a process; half an hour is torch's own default
    timeout: float = config_field(
        600.0, "seconds after which a process that does not answer is given up", gt=0, le=86400
    )

    @model_validator(mode="after")
    def _several_need_ddp(self) -> Self:
        if self.name == "single" and (self.processes or 1) > 1:
            raise ValueError(f"processes={self.processes} needs backend=ddp, fsdp or megatron")
        if self.name == "single" and self.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} needs backend=ddp, fsdp or megatron"
            )
        for setting in ("replicas", "reshard_after_forward"):
            # by value: a description that was written whole has them all
            if self.name != "fsdp" and getattr(self, setting) != _default(self, setting):
                raise ValueError(f"{setting} needs backend=fsdp")
        return self


class TrainBackendConfig(SharedBackendConfig):
    """where a training run happens, on one process or on several"""

    sequence_parallel: bool = config_field(
        False,
        "with tensor_parallel: its processes also divide, by tokens, what a layer keeps for backward",
    )
    shard_optimizer: bool = config_field(
        False, "each process holds AdamW's moments of its range of the values (ddp, fsdp)"
    )
    keep_total: bool = config_field(
        False,
        "divide per_device_train_batch_size among the processes, so that a step has the same rows on "
        "any number of them",
    )

    @model_validator(mode="after")
    def _sequence_of_tensor_ranks(self) -> Self:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel=true needs tensor_parallel above 1")
        return self

    @model_validator(mode="after")
    def _sequence_of_our_layers(self) -> Self:
        if self.sequence_parallel and self.name == "megatron":
            raise ValueError("sequence_parallel=true needs backend=ddp or fsdp")
        return self

    @model_validator(mode="after")
    def _moments_of_several(self) -> Self:
        if self.shard_optimizer and self.name not in ("ddp", "fsdp"):
            raise ValueError("shard_optimizer=true needs backend=ddp or fsdp")
        return self
