"""The settings of a mixture of experts and of its router's run. No torch here."""

from lorry.config.moe.kinds import ROUTER_KINDS, RouterKind
from lorry.config.moe.router import ClassifierTrainConfig, RouterConfig, check_router
from lorry.config.moe.router_run import RoutedExpert, RouterRunConfig, router_train
from lorry.config.moe.runs import (
    ExpertConfig,
    ExpertJobConfig,
    MoeDataConfig,
    MoeRunConfig,
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
