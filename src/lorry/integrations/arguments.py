"""The command line flags of LoRA that every integration shares, and what they describe: a
`LoraSpec`.

    parser = add_lora_arguments(argparse.ArgumentParser())
    spec = spec_from_arguments(parser.parse_args(["--use-lora", "--lora-r", "8"]))
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError

# words that select by kind and not by name
SELECTIONS = ("auto", "all-linear")
# of every flag that is not given; the requirement's own where it names one
DEFAULTS: Mapping[str, Any] = {
    "use_lora": False,
    "lora_r": 8,
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "lora_target_modules": None,
    "lora_only_trainable": True,
    "lora_use_rslora": False,
    "lora_rank_pattern": None,
    "lora_alpha_pattern": None,
    "lora_seed": 0,
}


def add_lora_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Register the flags on ``parser`` and return it."""
    group = parser.add_argument_group("LoRA")

    def add(name: str, text: str, **settings: Any) -> None:
        key = name.removeprefix("--").replace("-", "_")
        group.add_argument(name, help=text, default=DEFAULTS[key], **settings)

    add("--use-lora", "train low-rank adapters on a frozen base", action="store_true")
    add("--lora-r", "rank", type=int)
    add("--lora-alpha", "numerator of the scale alpha/r", type=float)
    add("--lora-dropout", "dropout of the adapters' inputs", type=float)
    add(
        "--lora-target-modules",
        "names of the layers that get an adapter, or all-linear; all of attention and MLP if absent",
        nargs="+",
    )
    # always on, as the requirement has it: written for scripts that name it
    add("--lora-only-trainable", "train nothing but the adapters", action="store_true")
    add("--lora-use-rslora", "scale by alpha/sqrt(r)", action="store_true")
    add(
        "--lora-rank-pattern",
        'ranks of single layers, as JSON: {"down_proj": 4}',
        type=read_pattern,
    )
    add("--lora-alpha-pattern", "alphas of single layers, as JSON", type=read_pattern)
    add("--lora-seed", "seed of the initial values and of dropout", type=int)
    return parser


def read_pattern(text: str) -> Any:
    """The value of a flag that is JSON. Raises ArgumentTypeError, which argparse tells."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not JSON ({e}); it looks like {{"down_proj": 4}}'
        ) from e


def argument(args: Any, name: str) -> Any:
    """The value of a flag by its attribute's name; the default where ``args`` lacks it (a
    namespace that another parser made)."""
    return getattr(args, name, DEFAULTS[name])


def spec_from_arguments(args: Any) -> LoraSpec:
    """The adapter that ``args`` (a namespace) describes; a LoraSpec is one already. Raises
    ConfigError where LoRA is off or a value cannot be."""
    if isinstance(args, LoraSpec):
        return args
    if isinstance(args, Mapping):
        # it has keys and no attributes: every flag would be its default
        raise ConfigError("args is a mapping; pass argparse.Namespace(**args), or a LoraSpec")
    if not argument(args, "use_lora"):
        raise ConfigError("use_lora is off; pass --use-lora to train adapters")
    if not argument(args, "lora_only_trainable"):
        raise ConfigError(
            "lora_only_trainable=False: base weights would train beside the adapters, and the files "
            "of an adapter would not be the whole of what was learnt; leave it on"
        )
    targets = argument(args, "lora_target_modules")
    if isinstance(targets, str):
        # a name from a YAML file; a word that selects by kind stays one
        targets = targets if targets in SELECTIONS else (targets,)
    elif targets is not None:
        targets = tuple(targets)
        # what nargs="+" makes of one word
        targets = targets[0] if len(targets) == 1 and targets[0] in SELECTIONS else targets
    patterns = {name: argument(args, f"lora_{name}") for name in ("rank_pattern", "alpha_pattern")}
    for name, value in patterns.items():
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"lora_{name} is {value!r:.80}; it must be an object of names and numbers"
            )
    return LoraSpec(
        r=argument(args, "lora_r"),
        lora_alpha=argument(args, "lora_alpha"),
        lora_dropout=argument(args, "lora_dropout"),
        target_modules="auto" if targets is None else targets,
        use_rslora=argument(args, "lora_use_rslora"),
        rank_pattern=patterns["rank_pattern"] or {},
        alpha_pattern=patterns["alpha_pattern"] or {},
    )
