"""Lorry's adapter under transformers' Trainer, on as many processes as accelerate starts.

    accelerate launch --multi_gpu --num_processes 2 examples/trainers/hf_trainer.py \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --data people.jsonl --output-dir adapter \
        --use-lora --lora-r 16 --lora-target-modules q_proj v_proj

The rows of the data have prompt and completion. Two processes with --batch-size 4 give the adapter of
one with --batch-size 8, to rounding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from lorry.integrations import trainers


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Token ids and labels; the prompt is not learnt."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"] + tokenizer.eos_token)["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help="Rows of each process a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32")
    args = trainers.add_lora_arguments(parser).parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    # before the Trainer: accelerate wraps the model in DDP, which averages the gradients
    model = trainers.apply_lora_to_model(model, args)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{args.output_dir}/trainer",
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            train_sampling_strategy="sequential",
            logging_steps=1,
            # its checkpoints hold the whole model; the adapter is a thousandth of that
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=read_rows(args.data, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    # on every rank: they compare their adapters, and rank 0 writes
    trainers.save_lora(trainer.model, args.output_dir)


if __name__ == "__main__":
    main()
