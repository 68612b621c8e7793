"""What commands, and the first step of a run, do not import: named one by one, in a process of their
own, so that a start does not grow again unseen.

Each of these takes from twenty milliseconds to seconds, and most commands do without it.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from typing import Any

import pytest

from lorry.imports import kept_imports
from lorry.kernels import kernel_status
from lorry.models.loading.load import load_model
from tests.support import tinyrun

# of no command before it does its work: what is only for other models, files, backends and ends
NEVER = {
    "PIL", "accelerate", "datasets", "gguf", "httpx2", "huggingface_hub", "matplotlib", "nltk", "pandas", "peft",
    "pyarrow", "requests", "rouge_score", "scipy", "sklearn", "sympy", "torchvision", "transformers",
    "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor",
}  # fmt: skip
UNNEEDED = {
    "sft": NEVER,
    "plan": NEVER | {"jinja2", "numpy", "safetensors.torch", "tokenizers", "torch"},
    "help": NEVER | {"jinja2", "numpy", "pydantic", "safetensors", "tokenizers", "torch", "yaml"},
}
NEEDED = {"sft": {"torch", "tokenizers", "jinja2"}, "plan": {"pydantic"}, "help": {"typer"}}
COMMANDS = """
import gc, json, os, sys
from pathlib import Path

said, model, data, out = sys.argv[1:]
from lorry import cli

imported = {}
assert cli.main(["--help"]) == 0
imported["help"] = sorted(sys.modules)
assert cli.main(["plan", model, "gpu=h100"]) == 0
imported["plan"] = sorted(sys.modules)

import lorry.verbs.sft

with lorry.verbs.sft.kept_imports():
    from lorry.train.engine import TrainingEngine

step = TrainingEngine._one_step

def first(self, *given):
    imported["sft"] = sorted(sys.modules)
    # tracked by collections, and left out of them
    imported["collector"] = [gc.isenabled(), len(gc.get_objects()), gc.get_freeze_count()]
    step(self, *given)
    imported["first step"] = sorted(sys.modules)
    Path(said).write_text(json.dumps(imported))
    os._exit(0)

TrainingEngine._one_step = first
sys.exit(cli.main(["sft", f"model={model}", f"data={data}", f"output_dir={out}", "dtype=float32", "max_steps=2"]))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The modules that are there when `lorry --help` and `lorry plan` have answered, and before and after
    the first step of a run whose model was opened before: {command: names}; and what the garbage
    collector looks at by then."""
    folder = tmp_path_factory.mktemp("startup")
    model = tinyrun.model_directory(folder / "model")
    load_model(model, dtype="float32", add_note=print)  # in this LORRY_HOME, as that process will
    data = tinyrun.write_rows(folder / "rows.jsonl", tinyrun.rows(20))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *map(str, (folder / "said", model, data, folder / "run"))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = json.loads((folder / "said").read_text())
    return found


@pytest.mark.parametrize("command", UNNEEDED)
def test_a_command_imports_only_what_it_needs(imported: dict[str, list[Any]], command: str) -> None:
    names = set(imported[command])
    assert names & UNNEEDED[command] == set()
    # it sees what is there
    assert names >= NEEDED[command]


def test_the_first_step_imports_no_compiler(imported: dict[str, list[Any]]) -> None:
    """Torch does, asked for a gradient in one way rather than in another (`StatisticsRequest`)."""
    if not kernel_status().active:
        pytest.skip("torch's own attention is asked for its gradient in the way that imports sympy")
    assert set(imported["first step"]) & NEVER == set()


def test_what_was_imported_is_looked_through_no_more(imported: dict[str, list[Any]]) -> None:
    enabled, tracked, left_out = imported["collector"]
    assert enabled
    assert left_out > tracked


def test_kept_imports_leave_the_collector_as_it_was() -> None:
    frozen = gc.get_freeze_count()
    try:
        for on in (False, True):
            gc.enable() if on else gc.disable()
            with kept_imports():
                assert not gc.isenabled()
            assert gc.isenabled() is on
            with pytest.raises(KeyError), kept_imports():
                raise KeyError
            assert gc.isenabled() is on
    finally:
        gc.enable()
    # where nothing was imported what is garbage by then is none of its business
    assert gc.get_freeze_count() == frozen
