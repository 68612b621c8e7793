"""Whole runs of a few milliseconds: random models of every family with a real tokenizer, rows to
learn, run descriptions.

train_run(described(model, rows, tmp_path / "run", max_steps=12), [])
engine_for(Fixed(steps), tmp_path / "run", learning_rate=1e-2).run()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorry.adapters.attach import attach
from lorry.adapters.spec import LoraSpec
from lorry.backends.local import LocalBackend
from lorry.backends.optim import OptimSettings
from lorry.backends.protocol import Task
from lorry.config import RunConfig, TrainConfig, build_settings
from lorry.train import artifacts, checkpoint, samples
from lorry.train.checks import ContractChecks
from lorry.train.engine import TrainingEngine
from lorry.train.monitoring.events import StepRecord, TrainingListener
from tests.support.seam import examples, tiny_llama

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WHO = ["Ada", "Bo", "Cleo", "Dov", "Eve", "Finn", "Gus", "Hal", "Ida", "Jo"]
WHAT = ["a red lorry", "two old dogs", "bread and salt", "a house by the river", "nothing at all"]
VOCAB = 320
WIDTH = 16
LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "gpt2": {"n_embd": WIDTH, "n_head": 2, "n_layer": 1, "n_positions": 128},
    "gpt_neox": {
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
}
FOREIGN: dict[str, dict[str, Any]] = {  # what runs through transformers
    "mamba": {"hidden_size": WIDTH, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        **LLAMA,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "decoder_sparse_step": 1,
    },
    "olmo": {**LLAMA, "eos_token_id": 0},  # its own is beyond a small vocabulary
}


def rows(n: int, *, start: int = 0) -> list[dict[str, str]]:
    """Questions and answers of uneven length, every one different."""
    pick = [
        (WHO[i % len(WHO)], WHAT[(i * 3 + i // len(WHO)) % len(WHAT)], i)
        for i in range(start, start + n)
    ]
    return [
        {
            "question": f"What has {who} in room {i}?",
            "answer": f"{who} has {what}" + ", again" * (i % 3),
        }
        for who, what, i in pick
    ]


def write_rows(path: Path, made: list[dict[str, str]]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few dozen merges, learnt from the rows, and a ChatML template."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text for row in rows(50) for text in row.values()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )


def model_directory(
    path: Path, family: str = "llama", *, spread: float = 0.2, **changes: Any
) -> Path:
    """A Hugging Face directory: a random model, every weight away from its usual start, and the
    tokenizer.
    """
    config = CONFIG_MAPPING[family].from_dict(
        {"vocab_size": VOCAB, **{**FAMILIES, **FOREIGN}[family], **changes}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            middle = 1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0
            p.copy_(middle + torch.randn(p.shape, generator=draw) * spread)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


DEFAULTS: dict[str, Any] = {
    "r": 2,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "max_length": 64,
    "learning_rate": 1e-2,
    "seed": 3,
    "per_device_train_batch_size": 3,
}


def described(model: Path, data: Path, out: Path, **settings: Any) -> RunConfig:
    """A run description with small defaults."""
    given = {
        "model": {"name": str(model)},
        "data": {"path": str(data)},
        "output_dir": str(out),
        **DEFAULTS,
        **settings,
    }
    return build_settings(RunConfig, given, print)


def engine_for(
    task: Task, folder: Path, *, listeners: Sequence[TrainingListener] = (), steps_per_epoch: int = 4, specs: Sequence[LoraSpec] = (),
    optim: OptimSettings | None = None, checks: ContractChecks | None = None, ends: Sequence[int] = (),
    make_backend: Callable[..., LocalBackend] = LocalBackend, **train: Any,
) -> TrainingEngine:  # fmt: skip
    """The engine on `seam.tiny_llama`, an adapter for every name of the task (``specs``: one each,
    of rank 3 and scale 2 if absent).
    """
    model = tiny_llama()
    for name, spec in zip_longest(task.adapters, specs):
        attach(model, spec or LoraSpec(r=3, lora_alpha=6), name)
    backend = make_backend(model, list(task.adapters), optim or OptimSettings())
    return TrainingEngine(
        backend,
        task,
        TrainConfig(**train),
        folder,
        identity={"config": {}, "digests": {}, "environment": {}},
        epoch_of=lambda step: step // steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        checks=checks or ContractChecks(),
        listeners=listeners,
        ends=ends,
    )


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """For test files that import it: one thread, short samples, the digest of the code taken
    once.
    """
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    digest = checkpoint.code_digest()
    patch.setattr(checkpoint, "code_digest", lambda: digest)
    for module in (checkpoint, artifacts):  # they read a package's metadata file each time
        patch.setattr(module, "version", cache(version))
    patch.setattr(samples, "SAMPLE_NEW_TOKENS", 3)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


class Heard:
    """A listener that keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[StepRecord] = []
        self.evaluations: list[StepRecord] = []
        self.started: list[tuple[int, int]] = []
        self.finished = 0

    def start(self, done: int, total: int) -> None:
        self.started.append((done, total))

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def evaluation(self, record: StepRecord) -> None:
        self.evaluations.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self) -> None:
        self.finished += 1


# --- what a run left, and what its backend held


def steps(n: int, rows: int = 2) -> list[Any]:
    return [[examples(rows, seed)] for seed in range(n)]


def saved(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("*"))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluated(run: Path) -> list[int]:
    return [line["step"] for line in lines(run) if "eval_loss" in line]
