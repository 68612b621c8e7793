"""The examples under transformers' Trainer and TRL's SFTTrainer, as they are started: two processes by
`accelerate launch`, equal to PEFT in a plain loop on one. Float32, on the CPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lorry import LoraSpec, attach
from lorry.adapters.attach import get_bank
from lorry.integrations import trainers
from tests.support import tinyrun

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)
STEPS, RATE, LIMIT = 3, 1e-3, 1.0
WORDS = f"--max-steps {STEPS} --learning-rate {RATE} --use-lora --lora-target-modules q_proj v_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("examples")
    tinyrun.model_directory(made / "model")
    rows = [
        {"prompt": row["question"] + " ", "completion": row["answer"]} for row in tinyrun.rows(12)
    ]
    tinyrun.write_rows(made / "data.jsonl", rows)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Tensor]:
    """PEFT's matrices after steps of four rows: the mean over supervised tokens, clipped, a rate that
    falls to 0 in a line, AdamW without decay. What both trainers do by default.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    adapter = attach(ours, LoraSpec(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    twin = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    )
    start = get_bank(ours)[adapter.name].tensors()
    mine = {
        name.replace(".default", ""): p for name, p in twin.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for name, parameter in mine.items():
            key = name.removeprefix("base_model.model.").removesuffix(".weight")
            parameter.copy_(start[key])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    optimizer = torch.optim.AdamW(list(mine.values()), lr=RATE, weight_decay=0.0)
    lines = (folder / "data.jsonl").read_text().splitlines()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (STEPS - step) / STEPS
        losses, count = torch.zeros(()), 0
        for line in lines[4 * step : 4 * step + 4]:
            row = json.loads(line)
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["completion"] + tokenizer.eos_token)["input_ids"]
            logits = twin(torch.tensor([prompt + answer])).logits[0]
            supervised = logits[len(prompt) - 1 : -1]
            losses = losses + torch.nn.functional.cross_entropy(
                supervised, torch.tensor(answer), reduction="sum"
            )
            count += len(answer)
        (losses / count).backward()
        torch.nn.utils.clip_grad_norm_(list(mine.values()), LIMIT)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in mine.items()}


@pytest.mark.parametrize(
    "example",
    [
        "hf_trainer",
        pytest.param(
            "trl_sft",
            marks=pytest.mark.skipif(
                find_spec("trl") is None, reason="trl is not installed (make bench-setup)"
            ),
        ),
    ],
)
def test_two_processes_give_the_adapter_of_one(
    folder: Path, alone: dict[str, Tensor], example: str
) -> None:
    source = ROOT / "examples" / "trainers" / f"{example}.py"
    shown = re.search(r"accelerate launch (.*) examples/", source.read_text())
    assert shown is not None
    launch = f"{shown[1]} --num_machines 1 --mixed_precision no"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", *launch.split()),
        *("--dynamo_backend", "no", "--main_process_port", "0"),
        *(str(source), "--model", "model"),
        *("--data", "data.jsonl", "--output-dir", example, "--batch-size", "2", *WORDS.split()),
    ]
    ran = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    saved = load_file(folder / example / "adapter_model.safetensors")
    assert set(saved) == set(alone)
    for name, true in alone.items():
        assert float((saved[name] - true).norm() / true.norm()) < 1e-5, name
        assert bool(true.any()), name


def test_a_checkpoint_of_the_trainer_goes_on_as_if_nothing_had_been(folder: Path) -> None:
    """It holds the adapter as a part of the model; with dropout, whose generator it saves."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (8, 6), generator=generator).tolist()

    def run(resume: str | None) -> dict[str, Tensor]:
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        model = trainers.apply_lora_to_model(base, LoraSpec(r=4, lora_dropout=0.2))
        settings = TrainingArguments(
            output_dir=str(folder / "resumed"),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = Trainer(model=model, args=settings, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return {n: t.clone() for n, t in get_bank(model)["default"].tensors().items()}

    whole = run(None)
    resumed = run(str(folder / "resumed" / "checkpoint-2"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    start = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    first = attach(start, LoraSpec(r=4)).tensors()
    assert any(not torch.equal(first[name], value) for name, value in whole.items())
