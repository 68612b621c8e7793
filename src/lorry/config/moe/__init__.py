"""The settings of a mixture of experts and of its router's run. No torch here."""

from lorry.config.moe.runs import (
    ExpertConfig,
    ExpertJobConfig,
    MoeDataConfig,
    MoeRunConfig,
    RoutedExpert,
    RouterConfig,
    RouterRunConfig,
    check_router,
    router_train,
)

__all__ = [
    "ExpertConfig",
    "ExpertJobConfig",
    "MoeDataConfig",
    "MoeRunConfig",
    "RoutedExpert",
    "RouterConfig",
    "RouterRunConfig",
    "check_router",
    "router_train",
]
