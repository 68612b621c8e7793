"""Run descriptions: the settings of every verb, read from the command line, YAML, JSON or Python.
No torch here.
"""

from lorry.config.data import DataConfig
from lorry.config.distill import DistillConfig, DistillRunConfig
from lorry.config.evaluation import EvalSettings
from lorry.config.jobs import runs_by_adapter
from lorry.config.merge import MergeSettings
from lorry.config.moe import MoeRunConfig, RouterRunConfig
from lorry.config.parsing.parse import build_settings, dump_settings, parse_settings
from lorry.config.schema.backend import BackendConfig
from lorry.config.schema.lora import LoraConfig
from lorry.config.schema.model import ModelConfig
from lorry.config.schema.run import RunConfig
from lorry.config.schema.train import TrainConfig
from lorry.config.settings import (
    ChatSettings,
    CompareSettings,
    DemoSettings,
    DoctorSettings,
    ExportSettings,
    PlanSettings,
    PushSettings,
    ReportSettings,
    RunsSettings,
    UnlearnPlanSettings,
    UnmergeSettings,
)
from lorry.config.sweep import SweepSettings
from lorry.config.unlearning.alternates import AlternatesSettings
from lorry.config.unlearning.attack import AttackSettings
from lorry.config.unlearning.unlearn import UnlearnConfig, UnlearnRunConfig

__all__ = [
    "AlternatesSettings",
    "AttackSettings",
    "BackendConfig",
    "ChatSettings",
    "CompareSettings",
    "DataConfig",
    "DemoSettings",
    "DistillConfig",
    "DistillRunConfig",
    "DoctorSettings",
    "EvalSettings",
    "ExportSettings",
    "LoraConfig",
    "MergeSettings",
    "ModelConfig",
    "MoeRunConfig",
    "PlanSettings",
    "PushSettings",
    "ReportSettings",
    "RouterRunConfig",
    "RunConfig",
    "RunsSettings",
    "SweepSettings",
    "TrainConfig",
    "UnlearnConfig",
    "UnlearnPlanSettings",
    "UnlearnRunConfig",
    "UnmergeSettings",
    "build_settings",
    "dump_settings",
    "parse_settings",
    "runs_by_adapter",
]
