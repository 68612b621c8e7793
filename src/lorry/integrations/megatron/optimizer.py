"""LoRA+ (arXiv 2402.12354) with Megatron's optimizer: every B has a learning rate of its own."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey

from lorry.errors import ConfigError


def loraplus_overrides(config: Any, ratio: float) -> dict[ParamKey, Any]:
    """`config_overrides` of `get_megatron_optimizer`: Megatron's standard ones, and for every lora_B a
    learning rate of ``ratio`` times that of ``config`` (an OptimizerConfig). Raises ConfigError."""
    if not ratio > 0:
        raise ConfigError(f"loraplus_lr_ratio is {ratio!r}; it must be above 0")
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(config))
    if ratio != 1:
        override = {"max_lr": config.lr * ratio}
        if config.min_lr is not None:
            override["min_lr"] = config.min_lr * ratio
        overrides[ParamKey(name="*.lora_B*")] = override
    return overrides
