"""How a run is split over processes, and which splits a model's sizes allow.

`check_split` is what `lorry plan` asks; `check_tensor_parallel` is also the run's own check, so that
both refuse the same sizes in the same words, before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

from lorry.errors import ConfigError
from lorry.families import ModelGeometry
from lorry.plan.shapes import ModelShape

BackendName = Literal["single", "ddp", "fsdp", "megatron"]


@dataclass(frozen=True, kw_only=True)
class ParallelSplit:
    """``processes`` = tensor x pipeline x data. Of fsdp the data ranks are ``replicas`` groups
    (HSDP); the base is sharded inside each. ``sequence``: tensor ranks also divide what a layer
    keeps of its tokens; ``reshard_after_forward``: a layer is gathered again for its backward;
    ``offload``: shards lie in the CPU's memory; ``shard_optimizer``: each data rank holds its
    range of AdamW's moments.
    """

    backend: BackendName = "single"
    processes: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    replicas: int = 1
    sequence: bool = False
    reshard_after_forward: bool = True
    offload: bool = False
    shard_optimizer: bool = False

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.processes // (self.tensor * self.pipeline)

    @property
    def shards(self) -> int:
        """Ranks among which one copy of the base is cut; 1 where it is whole."""
        return self.data // self.replicas if self.backend == "fsdp" else 1


def check_split(split: ParallelSplit, shape: ModelShape) -> None:
    """Raises ConfigError, naming the field, for a split that this model or backend cannot have."""
    _check_backend(split)
    if split.processes % (split.tensor * split.pipeline):
        raise ConfigError(
            f"backend.processes={split.processes} is not a multiple of "
            f"tensor_parallel x pipeline_parallel = {split.tensor} x "
            f"{split.pipeline}"
        )
    if split.data % split.replicas:
        raise ConfigError(
            f"backend.replicas={split.replicas} does not divide the {split.data} data-parallel ranks"
        )
    if split.tensor > 1:
        if not shape.native and split.backend != "megatron":
            raise ConfigError(
                f"backend.tensor_parallel={split.tensor} is of Lorry's own decoder, and "
                f"{shape.why}; leave it out"
            )
        check_tensor_parallel(
            shape.geometry, split.tensor, even_vocabulary=split.backend == "megatron"
        )
    if split.pipeline > shape.geometry.layers:
        raise ConfigError(
            f"backend.pipeline_parallel={split.pipeline} is more than the "
            f"{shape.geometry.layers} layers there are"
        )
    if split.expert > 1 and (shape.experts is None or shape.experts.count % split.expert):
        count = 0 if shape.experts is None else shape.experts.count
        raise ConfigError(
            f"backend.expert_parallel={split.expert} does not divide the {count} experts of this "
            "model"
        )
    if split.data % split.expert:
        raise ConfigError(
            f"backend.expert_parallel={split.expert} does not divide the {split.data} "
            "data-parallel replicas"
        )


def _check_backend(split: ParallelSplit) -> None:
    """Raises ConfigError for a setting that another backend has."""
    if split.backend == "single" and split.processes > 1:
        raise ConfigError(
            f"backend.processes={split.processes} needs backend=ddp, fsdp or megatron"
        )
    if split.backend == "single" and split.tensor > 1:
        raise ConfigError(
            f"backend.tensor_parallel={split.tensor} needs backend=ddp, fsdp or megatron"
        )
    if split.backend != "megatron":
        for name in ("pipeline", "expert"):
            if getattr(split, name) > 1:
                raise ConfigError(
                    f"backend.{name}_parallel={getattr(split, name)} needs backend=megatron"
                )
    if split.backend != "fsdp":
        for field, asked in (
            (f"replicas={split.replicas}", split.replicas > 1),
            ("reshard_after_forward=false", not split.reshard_after_forward),
            ("offload=cpu", split.offload),
        ):
            if asked:
                raise ConfigError(f"backend.{field} needs backend=fsdp")
    if split.sequence and split.tensor == 1:
        raise ConfigError("backend.sequence_parallel=true needs backend.tensor_parallel above 1")
    if split.shard_optimizer and split.backend in ("single", "megatron"):
        raise ConfigError("backend.shard_optimizer=true needs backend=ddp or fsdp")


def check_tensor_parallel(
    geometry: ModelGeometry, size: int, *, even_vocabulary: bool = False
) -> None:
    """Raises ConfigError where ``size`` tensor-parallel ranks cannot share every matrix of a layer
    alike; it names what does not divide and the sizes that fit. ``even_vocabulary``: the rows of the
    vocabulary have to divide, too (Megatron-core's embedding).
    """
    cut = {
        "heads": geometry.heads,
        "KV heads": geometry.kv_heads,
        "MLP columns": geometry.mlp_width,
    }
    if even_vocabulary:
        cut["vocabulary rows"] = geometry.vocab
    odd = [f"{count} {what}" for what, count in cut.items() if count % size]
    if not odd:
        return
    common = gcd(*cut.values())
    fitting = [str(divisor) for divisor in range(2, common + 1) if common % divisor == 0]
    told = f"{_listed(fitting)} {'do' if len(fitting) > 1 else 'does'}"
    raise ConfigError(
        f"backend.tensor_parallel={size} does not divide {_listed(odd)}; "
        f"{told if fitting else 'no size above 1 does'}"
    )


def _listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
