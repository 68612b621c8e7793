"""Descriptions written for axolotl, LLaMA-Factory and TRL, as they are: understood, noted, or every
stranger named at once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments

from lorry.config import RunConfig, parse_settings
from lorry.errors import ConfigError

AXOLOTL = """
base_model: org/model
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: false
strict: false
datasets:
  - path: org/rows
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project:
wandb_entity:
wandb_watch:
gradient_accumulation_steps: 2
micro_batch_size: 3
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true
loss_watchdog_threshold: 5.0
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
LLAMA_FACTORY = """
### model
model_name_or_path: org/model
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: rows.jsonl
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: saves/lora
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""


def read(tmp_path: Path, text: str, *argv: str) -> tuple[RunConfig, list[str]]:
    file, notes = tmp_path / "theirs.yml", list[str]()
    file.write_text(text)
    return parse_settings(RunConfig, [str(file), *argv], notes.append), notes


def test_an_axolotl_file_as_it_is(tmp_path: Path) -> None:
    run, notes = read(tmp_path, AXOLOTL)
    assert run.lora is not None
    assert (run.model.name, run.model.adapter, run.data.path, run.data.format) == (
        "org/model",
        None,
        "org/rows",
        "alpaca",
    )
    assert (run.lora.r, run.lora.lora_alpha, run.lora.target_modules) == (16, 32, "all-linear")
    assert (run.data.max_length, run.data.packing, run.data.test_size) == (2048, True, 0.1)
    assert (run.data.completion_only_loss, run.train.gradient_checkpointing) == (True, True)
    assert (
        run.train.per_device_train_batch_size,
        run.train.gradient_accumulation_steps,
        run.train.num_train_epochs,
    ) == (3, 2, 1)
    assert (run.train.lr_scheduler_type, run.train.warmup_steps, run.train.learning_rate) == (
        "cosine",
        10,
        2e-4,
    )
    assert (run.train.eval_strategy, run.train.save_strategy) == ("epoch", "epoch")
    said = "\n".join(notes)
    for word in (
        "adapter=lora",
        "flash_attention",
        "evals_per_epoch=4 is read as",
        "loss_watchdog_threshold",
        "model_type",
    ):
        assert word in said


def test_a_llama_factory_file_as_it_is(tmp_path: Path) -> None:
    run, notes = read(tmp_path, LLAMA_FACTORY)
    assert run.lora is not None
    assert (run.model.name, run.data.path, run.data.n, run.data.template) == (
        "org/model",
        "rows.jsonl",
        1000,
        None,
    )
    assert (run.lora.r, run.lora.target_modules, run.model.dtype) == (8, "all-linear", "bfloat16")
    assert (run.train.eval_strategy, run.train.eval_steps, run.data.test_size) == (
        "steps",
        500,
        0.1,
    )
    assert any(note.startswith("template=llama3 changes nothing") for note in notes)


def without(text: str, *names: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.split(":")[0] not in names)


def test_what_a_llama_factory_file_leaves_out_is_as_there(tmp_path: Path) -> None:
    """Of transformers' defaults those of TrainingArguments itself."""
    theirs = TrainingArguments(output_dir="unused")
    run, notes = read(
        tmp_path,
        without(LLAMA_FACTORY, "lora_rank", "cutoff_len", "learning_rate", "num_train_epochs"),
    )
    assert run.lora is not None
    assert (run.lora.r, run.lora.lora_alpha, run.data.max_length) == (8, 16, 2048)
    assert run.train.learning_rate == theirs.learning_rate
    assert run.train.num_train_epochs == theirs.num_train_epochs
    (note,) = [note for note in notes if "LLaMA-Factory" in note]
    assert "r=8 learning_rate=5e-05 max_length=2048 lora_alpha=16" in note
    for name in ("lr_scheduler_type", "per_device_train_batch_size", "warmup_ratio"):
        short, _ = read(tmp_path, without(LLAMA_FACTORY, name))
        if name == "warmup_ratio":
            assert short.train.warmup_ratio == 0
            assert short.train.warmup_steps == theirs.warmup_steps
        else:
            assert getattr(short.train, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    ("argv", "alpha"),
    [
        ((), 16),
        (("r=32",), 64),
        (("lora_rank=4",), 8),
        (("lora_alpha=5",), 5),
        (("alpha=5",), 5),
        (("r=auto",), None),
    ],
)
def test_alpha_is_twice_the_rank_that_counts(
    tmp_path: Path, argv: tuple[str, ...], alpha: int | None
) -> None:
    run, notes = read(tmp_path, LLAMA_FACTORY, *argv, "memory_budget=8GiB")
    assert run.lora is not None
    assert run.lora.lora_alpha == alpha
    assert any("lora_alpha" in note for note in notes if "Factory" in note) == (
        alpha not in (5, None)
    )


def test_nothing_of_an_adapter_where_none_trains(tmp_path: Path) -> None:
    run, notes = read(tmp_path, without(LLAMA_FACTORY, "lora_rank", "lora_target"), "lora=null")
    assert run.lora is None
    assert not any("LLaMA-Factory" in note for note in notes)


def test_adalora_over_a_file_without_a_rank_has_its_own(tmp_path: Path) -> None:
    own = ("variant=adalora", "init_r=12", "target_r=4")
    run, notes = read(tmp_path, without(LLAMA_FACTORY, "lora_rank"), *own)
    assert run.lora is not None
    assert (run.lora.init_r, run.lora.target_r) == (12, 4)
    assert not any("lora_alpha" in note for note in notes if "LLaMA-Factory" in note)


def test_what_an_axolotl_file_leaves_out_is_as_there(tmp_path: Path) -> None:
    gone = ("micro_batch_size", "num_epochs", "lr_scheduler", "sequence_len")
    run, notes = read(tmp_path, without(AXOLOTL, *gone))
    train = run.train
    assert (train.per_device_train_batch_size, train.num_train_epochs) == (1, 1)
    assert (train.lr_scheduler_type, run.data.max_length) == ("cosine", 512)
    (note,) = [note for note in notes if "axolotl" in note]
    assert "num_train_epochs=1" in note
    # as it is the file leaves nothing out
    assert not any("by default" in note for note in read(tmp_path, AXOLOTL)[1])
    # what its own names say, without a value, is left out as well
    empty, _ = read(tmp_path, AXOLOTL.replace("num_epochs: 1", "num_epochs:"))
    assert empty.train.num_train_epochs == 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("tf32: false", "lora_rnk: 3\nlerning_rate: 1", ":38: unknown setting 'lora_rnk'"),
        ("wandb_project:", "wandb_project: mine", "wandb_project=mine is not supported yet"),
        (
            "    type: alpaca",
            "    type: gpteacher",
            "datasets must have one and the same type (alpaca,",
        ),
        (
            "    type: alpaca",
            "    shards: 5",
            "datasets has shards, which has no counterpart in Lorry",
        ),
        (
            "  pad_token:",
            "  bos_token:",
            "special_tokens special tokens are those of the tokenizer's files",
        ),
    ],
)
def test_what_would_change_the_run_is_refused(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    assert before in AXOLOTL
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, AXOLOTL.replace(before, after))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ("load_in_4bit: true", "nf4"),
        ("quantization_bit: 4", "nf4"),
        ("quantization_bit: 8", "int8"),
    ],
)
def test_bits_of_the_base_by_other_names(tmp_path: Path, asked: str, held: str) -> None:
    run, _ = read(tmp_path, AXOLOTL.replace("load_in_4bit: false", asked))
    assert run.model.quantize == held
    with pytest.raises(ConfigError, match=r"is 4 .* or 8"):
        read(tmp_path, AXOLOTL.replace("load_in_4bit: false", "quantization_bit: 3"))


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    jobs = "jobs: [{name: a, lra: 1}, {name: b, seeed: 2}]\n"
    text = f"data: d.jsonl\nrr: 4\nlora:\n  alfa: 3\n  r: 8\nlerning_rate: 1\nname: x\n{jobs}"
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, "optim=sgd")
    lines = str(caught.value).splitlines()
    assert len(lines) == 7, lines
    for at, word in enumerate(("rr", "lora.alfa", "lerning_rate", "name", "optim", "lra", "seeed")):
        assert word in lines[at]
    assert [line.split(":")[1] for line in lines[:3]] == ["2", "4", "6"]


def test_very_many_errors_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"and 60 more$"):
        read(tmp_path, "data: d\n" + "".join(f"zz{n}: 1\n" for n in range(100)))


def test_an_adapter_in_a_directory_is_still_one() -> None:
    assert parse_settings(RunConfig, ["data=d", "adapter=./lora"], print).model.adapter == "./lora"
    assert parse_settings(RunConfig, ["data=d", "template=3"], print).data.template == 3
