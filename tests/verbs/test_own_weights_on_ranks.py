"""Whole runs on two processes of adapters that need more of the base than its products: weights in its place, new
tokens, starts that are made of it, magnitudes. The base is cut over the processes, or whole on each; what they
write is what one process writes, and PEFT opens it. float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorry
from lorry.cli import main
from tests.support import tinyrun
from tests.support.layout_equality import relative
from tests.support.ranked import FAULT, Ended, run_ranked
from tests.support.tinyrun import quick  # noqa: F401 - a fixture

# of the pair with all its commands: far above what it takes
pytestmark = pytest.mark.timeout(600)
STEPS, SAVED = 4, 2  # a run is broken off behind the step at which it is saved
JOBS: dict[str, dict[str, Any]] = {
    "norms": {"modules_to_save": ["norm"]},
    "ends": {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [5, 6, 7, 11], "bias": "all"},
    "biases": {"bias": "lora_only"},
    "beside": {"lora_bias": True},
    "dora": {"use_dora": True},
    "ranked": {"variant": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "asked": {"rank_by": "data", "r": 4},
}
PACKED = {
    "loftq": {"init_lora_weights": "loftq"},
    "dora": {"use_dora": True},
    "whole": {"modules_to_save": ["up_proj"]},
}
RUNS: dict[str, dict[str, Any]] = {
    # a tied head
    "jobs": {"model": "tied", "jobs": [{"name": name, **own} for name, own in JOBS.items()]},
    "grown": {
        "model": "untied",
        "new_tokens": ["<think>", "</think>"],
        "modules_to_save": ["norm"],
        "bias": "all",
    },
    "packed": {
        "model": "untied",
        "quantize": "nf4",
        "jobs": [{"name": name, **own} for name, own in PACKED.items()],
    },
    "kept": {"model": "halves", "quantize": "keep", "use_dora": True},
    # what tensor-parallel processes can share of the first
    "shared": {
        "model": "tied",
        "jobs": [
            {"name": name, **JOBS[name]}
            for name in ("norms", "ends", "rows", "biases", "beside", "dora")
        ],
    },
}
LAYOUTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "fsdp": (["backend=fsdp", "keep_total=true"], ("jobs", "grown", "packed", "kept")),
    "ddp": (["backend=ddp", "keep_total=true"], ("jobs", "grown")),
    "tensor": (["backend=ddp", "tensor_parallel=2"], ("shared", "grown")),
}


def several_of(layout: str) -> list[str]:
    """The settings that divide a run, and nothing else."""
    return [word for word in LAYOUTS[layout][0] if "keep_total" not in word]


def words_of(folder: Path, out: Path, settings: Mapping[str, Any]) -> list[str]:
    """The command line of one of `RUNS` that writes to ``out``."""
    given = {
        "data": folder / "data.jsonl",
        **tinyrun.DEFAULTS,
        "target_modules": ["q_proj", "down_proj"],
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "resume_from_checkpoint": "auto",
        "output_dir": out,
        **settings,
        "model": folder / settings["model"],
    }
    return [
        "sft",
        *(f"{n}={json.dumps(v) if isinstance(v, list) else v}" for n, v in given.items()),
    ]


def asking(run: Path, folder: Path, out: Path) -> list[str]:
    """A command line that asks a run, whose base has to grow for it."""
    settings = "max_new_tokens=4 limit=4 dtype=float32 device=cpu threads=1"
    return f"eval {run} data={folder}/data.jsonl output_dir={out} {settings}".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:  # noqa: F811 - the fixture
    """Models with biases, and rows with the new tokens."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("tied", "untied"):
        tied = {"tie_word_embeddings": name == "tied", "num_key_value_heads": 2}
        tinyrun.model_directory(folder / name, "qwen2", **tied)
    shutil.copytree(folder / "untied", folder / "halves")
    base = AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.bfloat16)
    base.save_pretrained(folder / "halves")
    rows = [{**row, "answer": f"<think>{row['answer']}</think>"} for row in tinyrun.rows(16)]
    tinyrun.write_rows(folder / "data.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def pair(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    out = tmp_path_factory.mktemp("pair")
    made: dict[str, list[Any]] = {}
    for layout, (several, names) in LAYOUTS.items():
        for name in names:
            words = words_of(world, out / layout / name, RUNS[name])
            made[f"{layout} {name}"] = [*words, *several]
    for name in ("jobs", "grown"):
        words = [*words_of(world, out / "again" / name, RUNS[name]), *LAYOUTS["fsdp"][0]]
        # behind the checkpoint one of the two fails, and the other hears of it
        made[f"broken {name}"] = [f"{FAULT}fail 1 update {SAVED + 1}", *words]
        made[f"again {name}"] = words
    for layout in ("fsdp", "tensor"):
        run, asked = out / layout / "grown", out / f"asked-{layout}.json"
        made[f"asked {layout}"] = [*asking(run, world, asked), *several_of(layout)]
    return run_ranked(out, made), out


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs in one process."""
    out = tmp_path_factory.mktemp("alone")
    for name, settings in RUNS.items():
        assert main(words_of(world, out / name, settings)) == 0
    return out


def adapters_of(run: Path) -> list[Path]:
    """The folders of a run's adapters."""
    return sorted(
        file.parent
        for file in run.glob("**/adapter_model.safetensors")
        if "checkpoints" not in file.parts
    )


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout, (_, names) in LAYOUTS.items() for name in names]
)
def test_two_processes_write_what_one_does(
    pair: tuple[Ended, Path], alone: Path, layout: str, name: str
) -> None:
    ended, out = pair
    assert ended.codes[f"{layout} {name}"] == [0, 0], ended.printed[f"{layout} {name}"]
    assert ended.printed[f"{layout} {name}"][1] == ("", "")
    run, true = out / layout / name, alone / name
    contracts = json.loads((run / "contracts.json").read_text())
    assert [contract["status"] for contract in contracts] == ["held"] * 8
    for two, one in zip(tinyrun.lines(run), tinyrun.lines(true), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    folders = adapters_of(true)
    assert [path.relative_to(run) for path in adapters_of(run)] == [
        path.relative_to(true) for path in folders
    ]
    assert len(folders) == len(RUNS[name].get("jobs", [1]))
    for folder in folders:
        theirs, mine = (
            load_file(path / "adapter_model.safetensors")
            for path in (folder, run / folder.relative_to(true))
        )
        assert mine.keys() == theirs.keys()
        for tensor, value in theirs.items():
            assert relative(mine[tensor], value) < 1e-3, (folder.name, tensor)


@pytest.mark.parametrize("name", ["jobs", "grown"])
def test_a_run_that_was_broken_off_goes_on_to_the_same_bits(
    pair: tuple[Ended, Path], name: str
) -> None:
    ended, out = pair
    assert all(ended.codes[f"broken {name}"])
    assert "what it alone has is broken" in ended.printed[f"broken {name}"][0][1]
    assert ended.codes[f"again {name}"] == [0, 0], ended.printed[f"again {name}"]
    whole, again = out / "fsdp" / name, out / "again" / name
    files = [*whole.glob("**/*.safetensors")]
    assert len(files) > 2
    for file in files:
        assert file.read_bytes() == (again / file.relative_to(whole)).read_bytes(), file
    assert [line["loss"] for line in tinyrun.lines(again)] == [
        line["loss"] for line in tinyrun.lines(whole)
    ]


@pytest.mark.parametrize(
    ("layout", "name"),
    [("fsdp", "jobs"), ("fsdp", "grown"), ("tensor", "shared"), ("tensor", "grown")],
)
def test_peft_opens_what_two_processes_wrote(
    pair: tuple[Ended, Path], world: Path, layout: str, name: str
) -> None:
    _, out = pair
    for folder in adapters_of(out / layout / name):
        model, tokenizer = lorry.load(folder)
        ids = tokenizer("<think> the red lorry </think>", return_tensors="pt")["input_ids"]
        base = AutoModelForCausalLM.from_pretrained(
            world / RUNS[name]["model"], dtype=torch.float32
        )
        if name == "grown":
            base.resize_token_embeddings(len(tokenizer))
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            wanted, got = theirs(ids).logits, model(ids).logits
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
def test_a_base_that_is_cut_grows_for_an_adapter_that_is_asked(
    pair: tuple[Ended, Path], world: Path, tmp_path: Path, layout: str
) -> None:
    ended, out = pair
    assert ended.codes[f"asked {layout}"] == [0, 0], ended.printed[f"asked {layout}"]
    asked = f"asked-{layout}.json"
    assert main(asking(out / layout / "grown", world, tmp_path / asked)) == 0
    mine, true = (json.loads((folder / asked).read_text())["sides"] for folder in (out, tmp_path))
    assert mine.keys() == true.keys()
    for side, summary in true.items():
        for metric, value in summary["metrics"].items():
            got = mine[side]["metrics"][metric]
            assert got == pytest.approx(value, rel=1e-5, abs=1e-6), (side, metric)
