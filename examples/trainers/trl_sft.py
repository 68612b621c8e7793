"""Lorry's adapter under TRL's SFTTrainer, on as many processes as accelerate starts.

    accelerate launch --multi_gpu --num_processes 2 examples/trainers/trl_sft.py \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --data people.jsonl --output-dir adapter \
        --use-lora --lora-r 16 --lora-target-modules q_proj v_proj

The rows of the data are any that SFTTrainer takes: text, prompt and completion, messages. An adapter
on lm_head is not for it: its loss reads that weight past the layer.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lorry.integrations import trainers


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help="Rows of each process a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32")
    args = trainers.add_lora_arguments(parser).parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    # before the trainer: accelerate wraps the model in DDP, which averages the gradients
    model = trainers.apply_lora_to_model(model, args)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=f"{args.output_dir}/trainer",
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            train_sampling_strategy="sequential",
            logging_steps=1,
            bf16=args.dtype == "bfloat16",
            # its checkpoints hold the whole model; the adapter is a thousandth of that
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    trainer.train()
    # on every rank: they compare their adapters, and rank 0 writes
    trainers.save_lora(trainer.model, args.output_dir)


if __name__ == "__main__":
    main()
