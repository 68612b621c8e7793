"""TensorBoard, Weights & Biases and trackio as listeners, each only if asked for (`report_to=`).
metrics.jsonl is the truth.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorry.errors import ConfigError
from lorry.train.monitoring.events import StepRecord, TrainingListener


class TrackerListener:
    """Forwards every number of a step or an evaluation to ``log(values, step)``."""

    def __init__(
        self, log: Callable[[dict[str, float], int], None], close: Callable[[], None]
    ) -> None:
        self._log, self._close = log, close

    def start(self, done: int, total: int) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        self._log(
            {f"train/{name}": value for name, value in _numeric_values(record).items()},
            record["step"],
        )

    def evaluation(self, record: StepRecord) -> None:
        named = {
            # "train/" and "eval/" are the groups that these tools draw panels by
            name.replace("eval_", "eval/", 1): value
            for name, value in _numeric_values(record).items()
        }
        self._log(named, record["step"])

    def note(self, text: str) -> None:
        pass

    def finish(self) -> None:
        self._close()


def _numeric_values(record: StepRecord) -> dict[str, float]:
    """Every number of a line but its step; those of one of several adapters under NUMBER/ADAPTER."""
    plain = {
        name: float(v)
        for name, v in record.items()
        if isinstance(v, (int, float)) and name != "step"
    }
    own = record.get("adapters", {})
    return plain | {
        f"{n}/{adapter}": float(v)
        for adapter, figures in own.items()
        for n, v in figures.items()
        if v is not None
    }


def _require_package(module: str, package: str) -> Any:
    try:
        # imported only when asked for: each takes seconds, and none is required
        return importlib.import_module(module)
    except ImportError as e:
        raise ConfigError(
            f"train.report_to names {package}, which is not installed; pip install {package}"
        ) from e


def _open_tensorboard(run_dir: Path, name: str, config: Mapping[str, Any]) -> TrackerListener:
    writer = _require_package("torch.utils.tensorboard", "tensorboard").SummaryWriter(
        str(run_dir / "tensorboard")
    )

    def log(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return TrackerListener(log, writer.close)


def _wandb_opener(module: str) -> Callable[[Path, str, Mapping[str, Any]], TrackerListener]:
    def open_tracker(run_dir: Path, name: str, config: Mapping[str, Any]) -> TrackerListener:
        library = _require_package(module, module)
        library.init(project="lorry", name=name, config=dict(config))
        return TrackerListener(lambda values, step: library.log(values, step=step), library.finish)

    return open_tracker


TRACKER_OPENERS: dict[str, Callable[[Path, str, Mapping[str, Any]], TrackerListener]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _wandb_opener("wandb"),
    "trackio": _wandb_opener("trackio"),
}


def open_trackers(
    names: Sequence[str], run_dir: Path, config: Mapping[str, Any]
) -> list[TrainingListener]:
    """Open every tracker named. Raises ConfigError if its package is missing, before anything is
    loaded.
    """
    return [TRACKER_OPENERS[name](run_dir, run_dir.name, config) for name in names]
