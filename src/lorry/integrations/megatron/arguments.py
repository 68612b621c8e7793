"""The flags of LoRA on Megatron: those that every integration shares, and what is Megatron's own."""

from __future__ import annotations

import argparse

from lorry.integrations import arguments
from lorry.integrations.megatron.attach import MODES


def add_lora_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Register the flags on ``parser`` and return it; as Megatron's `extra_args_provider`."""
    arguments.add_lora_arguments(parser)
    group = parser.add_argument_group("LoRA on Megatron")
    group.add_argument(
        "--lora-mode",
        choices=MODES,
        default=MODES[0],
        help="canonical: an A for q, k, v, gate and up each, as PEFT; fused: one A for linear_qkv, one "
        "for linear_fc1",
    )
    return parser
