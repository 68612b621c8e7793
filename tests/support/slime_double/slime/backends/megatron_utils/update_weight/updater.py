"""What slime's three updaters have in common, and this double writes once: their arguments, their version,
and the engines that pause while weights come.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from slime.utils.distributed_utils import get_gloo_group


class Updater:
    def __init__(
        self,
        args: Namespace,
        model: Sequence[Any],
        weights_getter: Callable[[], Mapping[str, Tensor]],
        *,
        model_name: str,
        quantization_config: Any,
    ) -> None:
        self.args, self.model, self.weights_getter = args, model, weights_getter
        self.model_name, self.quantization_config = model_name, quantization_config
        self.weight_version = 0
        self.rollout_engines: Sequence[Any] = []

    @contextmanager
    def paused(self) -> Iterator[Sequence[Any]]:
        """The engines that this rank talks to (rank 0: all, others: none), paused while a new version of
        weights comes."""
        self.weight_version += 1
        engines = self.rollout_engines if dist.get_rank() == 0 else ()
        for engine in engines:
            engine.pause_generation.remote()
            engine.flush_cache.remote()
        dist.barrier(group=get_gloo_group())
        yield engines
        dist.barrier(group=get_gloo_group())
        for engine in engines:
            engine.continue_generation.remote()
        dist.barrier(group=get_gloo_group())
