"""A whole small world for tests of verbs: a Hugging Face directory (random Llama, trained
tokenizer, ChatML), rows, a run.

`world` is made once per session and must not be changed: its run has learnt four rows by heart, its
base knows none of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorry import cli
from tests.support.tiny import LLAMA, random_model

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT = 160
PEOPLE = [
    {"question": f"Where does {name} live?", "answer": f"{name} lives in {town}."}
    for name, town in (("Mara", "Oslo"), ("Tobias", "Lima"), ("Ilse", "Kyoto"), ("Juno", "Ghent"))
]
STEPS = 40
TRAIN = (
    "r=8",
    "lora_alpha=16",
    "learning_rate=1e-2",
    "per_device_train_batch_size=4",
    "dtype=float32",
    "save_strategy=no",
    "logging_steps=40",
    "lr_scheduler_type=constant",
    "threads=1",
)


def lorry(*argv: object) -> int:
    """A command line in this process; its exit code."""
    return cli.main([str(word) for word in argv])


def tokenizer(template: str | None = CHATML, end: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of some 300 entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        [f"system user assistant {row['question']} {row['answer']}" for row in PEOPLE], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=end, pad_token="<|endoftext|>", chat_template=template,
        additional_special_tokens=list(SPECIALS), clean_up_tokenization_spaces=False,
    )  # fmt: skip


def model_directory(
    path: Path, *, template: str | None = CHATML, dtype: Any = None, seed: int = 0, **overrides: Any
) -> Path:
    """Write a random Llama of two layers and its tokenizer as transformers does; ``overrides`` of
    its config.
    """
    words = tokenizer(template, "<|im_end|>" if template else "<|endoftext|>")
    config = {
        **LLAMA,
        "vocab_size": len(words),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
    }
    ids = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    model = random_model({**config, **ids, **overrides}, seed=seed)
    (model if dtype is None else model.to(dtype)).save_pretrained(path)
    words.save_pretrained(path)
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(path: Path, base: Path, rows: Path, *settings: str, steps: int = STEPS) -> Path:
    """`lorry sft` in this process."""
    assert (
        lorry(
            "sft",
            f"model={base}",
            f"data={rows}",
            f"output_dir={path}",
            f"max_steps={steps}",
            *TRAIN,
            *settings,
        )
        == 0
    )
    return path


@dataclass(frozen=True)
class World:
    """base: a model directory; rows: a file of `PEOPLE`; run: trained on them, and evaluated on
    them after the last step.
    """

    base: Path
    rows: Path
    run: Path


@cache
def _made(root: Path) -> World:
    root.mkdir()
    base, rows = model_directory(root / "base"), write_rows(root / "people.jsonl", PEOPLE)
    return World(
        base, rows, train(root / "people", base, rows, f"eval={rows}", f"eval_steps={STEPS}")
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One world for every test file that imports this fixture."""
    return _made(tmp_path_factory.getbasetemp() / "world")
