"""The settings of a mixture of experts and of its router's run. No torch here."""

from lorry.config.moe.kinds import ROUTER_KINDS, RouterKind
from lorry.config.moe.runs import (
    ClassifierTrainConfig,
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
    "ROUTER_KINDS",
    "ClassifierTrainConfig",
    "ExpertConfig",
    "ExpertJobConfig",
    "MoeDataConfig",
    "MoeRunConfig",
    "RoutedExpert",
    "RouterConfig",
    "RouterKind",
    "RouterRunConfig",
    "check_router",
    "router_train",
]
