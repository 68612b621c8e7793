"""Run descriptions: the settings of every verb, read from the command line, YAML, JSON or Python. No torch here."""

from lorry.config.distill import DistillConfig, DistillRun
from lorry.config.evaluation import EvalSettings
from lorry.config.jobs import jobs_of
from lorry.config.parsing.parse import build, dump, parse
from lorry.config.schema import BackendConfig, DataConfig, LoraConfig, ModelConfig, Run, TrainConfig
from lorry.config.settings import (
    ChatSettings,
    CompareSettings,
    DemoSettings,
    DoctorSettings,
    ExportSettings,
    MergeSettings,
    PlanSettings,
    PushSettings,
    ReportSettings,
    RunsSettings,
    Sweep,
    UnmergeSettings,
)

__all__ = [
    "BackendConfig", "ChatSettings", "CompareSettings", "DataConfig", "DemoSettings", "DistillConfig", "DistillRun",
    "DoctorSettings", "EvalSettings", "ExportSettings", "LoraConfig", "MergeSettings", "ModelConfig", "PlanSettings",
    "PushSettings", "ReportSettings", "Run", "RunsSettings", "Sweep", "TrainConfig", "UnmergeSettings", "build", "dump",
    "jobs_of", "parse",
]  # fmt: skip
