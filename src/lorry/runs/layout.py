"""The run directory: every name in it, once. Whoever writes, reads, lists or uploads a run takes
the names from here.

    run = RunDir(Path("runs/people"))
    run.metrics, run.checkpoint(120)            # runs/people/metrics.jsonl, runs/people/checkpoints/step-00000120

A run of one adapter is a PEFT adapter directory itself; one of several has a folder for each
(`adapter`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

RUN_FILE = "run.yaml"  # the resolved description
METRICS = "metrics.jsonl"  # one JSON object for each logged step
LOSSES = "losses.json"
# digests of all that the result hangs on; the last file of a run that finished
RECEIPT = "receipt.json"
CONTRACTS = "contracts.json"
SAMPLES = "samples.json"
EVALUATION = "evaluation.json"
PROCESS = "process.json"  # who is at work there, or how it ended
SWEEP, SWEEP_PLOT = "sweep.json", "sweep.png"
CARD = "README.md"
REPORT, PLOT = "report.html", "report.png"
CHECKPOINTS, PREVIOUS = "checkpoints", "previous"
SUITES = "evals"  # a folder for what `lorry eval suite=...` and `lorry attack` write
# how its files end that have a suite's rows, and its values alone; open-unlearning's names
SUITE_ROWS, SUITE_VALUES = "_EVAL.json", "_SUMMARY.json"
ATTACKS = "attacks.json"
# in an adapter's folder: the adapter that it was trained over, so that a run is whole by itself
START = "start_adapter"
# of a mixture of experts: a folder beside those of its adapters, and what lies in it
ROUTER, ROUTER_FILE, ROUTER_WEIGHTS = "router", "router.json", "router.safetensors"
ROUTER_ADAPTER = "prompt_adapter"  # in that folder: the LoRA of a classifier, a PEFT directory
EXPERTS = "experts"  # the run in which a mixture's experts were trained
STAGES = "stages.json"  # of what each stage of a mixture was made
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name, as the next
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FACTS = "lorry_adapter.json"  # the base's digest and what else PEFT's file has no field for
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_FACTS)
# of a run that trained the base's own weights; a large model lies in several files beside its index
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
# as transformers names them
SHARDS = "model-*-of-*.safetensors"
MERGED = "merged"  # in an expert's folder: the whole model
STAGED = "model.unverified"  # a whole model before it was read back
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "*.tiktoken",
)
RESULTS = (
    RECEIPT,
    CONTRACTS,
    SAMPLES,
    EVALUATION,
    REPORT,
    PLOT,
    CARD,
    LOSSES,
    SWEEP,
    SWEEP_PLOT,
    *ADAPTER_FILES,
)
# what goes to the hub beside adapter and card
PUBLISHED = (
    RUN_FILE,
    METRICS,
    LOSSES,
    RECEIPT,
    CONTRACTS,
    EVALUATION,
)
# folders of a run that are no adapter's
NOT_ADAPTERS = frozenset(
    {CHECKPOINTS, PREVIOUS, SUITES, START, ROUTER, EXPERTS, "tensorboard", "data"}
)
# eight digits or more: names sort like their steps, beyond 99,999,999 by number
STEP = re.compile(r"step-(\d{8,})")  # a checkpoint's folder


def is_adapter_folder(folder: Path) -> bool:
    """Whether a directory is an adapter's own: PEFT's layout, and that of a run of one adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def list_adapter_subfolders(folder: Path) -> list[Path]:
    """The folders in a directory that are adapters, as PEFT and runs of several lay them out. What
    one was trained over is none of them: alone it is another model."""
    folders = (path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    return sorted(path for path in folders if path.name != START)


@dataclass(frozen=True)
class RunDir:
    """The paths of a run directory; none of them need exist."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / METRICS

    @property
    def receipt(self) -> Path:
        """There once the run has finished."""
        return self.path / RECEIPT

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / CHECKPOINTS

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after so many optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    @property
    def suites(self) -> Path:
        """What `lorry eval suite=...` and `lorry attack` write."""
        return self.path / SUITES

    def suite(self, step: int) -> Path:
        """A suite's results after so many optimizer steps, asked while the run trained."""
        return self.suites / f"step-{step:08d}"

    def adapter(self, name: str, adapters: int) -> Path:
        """Where an adapter of a run of so many lies: one alone in the run directory itself, several
        in a folder each.
        """
        return self.path if adapters == 1 else self.path / name

    def quarantine(self, name: str, adapters: int) -> Path:
        """Where the rows that were set aside for an adapter lie."""
        return self.path / (f"quarantine-{name}.jsonl" if adapters > 1 else "quarantine.jsonl")
