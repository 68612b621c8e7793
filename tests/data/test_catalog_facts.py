"""Hub names, configurations and splits of the catalogue against an independent list: the tasks of
the lm-evaluation-harness.

Skipped where lm_eval is not installed; nothing is downloaded, only its YAML files are read.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from lorry.data.catalog import shipped_catalog

TASKS = {
    "anli": "anli/anli_r1",
    "anli_r3": "anli/anli_r3",
    "arc_easy": "arc/arc_easy",
    "gsm8k": "gsm8k/gsm8k",
    "hellaswag": "hellaswag/hellaswag",
    "longbench_qmsum": "longbench/qmsum",
    "longbench_repobench_p": "longbench/repobench-p",
    "openbookqa": "openbookqa/openbookqa",
    "truthfulqa": "truthfulqa/truthfulqa_gen",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1",
    "winogrande": "winogrande/default",
    "xquad": "xquad/xquad_en",
}


@pytest.fixture(scope="module")
def tasks() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("lm_eval is not installed")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def value(text: str, key: str) -> str | None:
    found = re.search(rf"^{key}: *(\S+) *$", text, re.MULTILINE)
    return None if found is None or found[1] == "null" else found[1]


@pytest.mark.parametrize("name", TASKS)
def test_hub_names_and_splits(tasks: Path, name: str) -> None:
    text = (tasks / f"{TASKS[name]}.yaml").read_text(encoding="utf-8")
    if parent := value(text, "include"):
        text += (tasks / TASKS[name]).parent.joinpath(parent).read_text(encoding="utf-8")
    found = shipped_catalog().find_set(name)
    assert value(text, "dataset_path") == found.hub
    assert value(text, "dataset_name") in (found.config, None)
    for ours, key in (
        ("train", "training_split"),
        ("validation", "validation_split"),
        ("test", "test_split"),
    ):
        assert value(text, key) in ((found.splits or {}).get(ours), None)
