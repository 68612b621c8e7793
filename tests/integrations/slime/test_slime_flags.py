"""The flags of LoRA through slime's own parser, which drops what it does not know: by our entry, by the
YAML file that slime's own train.py reads, and as the requirement's document writes them.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip(
    "megatron.core", reason="megatron-core is an extra: pip install 'lorry[megatron]'"
)

from lorry.errors import ConfigError
from lorry.integrations.arguments import spec_from_arguments
from lorry.integrations.slime.arguments import add_lora_arguments, check_arguments
from tests.support.slime_runs import (
    HOOKS,
    INSTALL,
    IS_REAL,
    PROVIDER,
    add_paths,
    flags,
    parse,
    slime_paths,
)

add_paths()

# as the requirement's example of a training script has them
DOCUMENTED = """
    --use-lora
    --lora-r 8
    --lora-alpha 16.0
    --lora-dropout 0.1
    --lora-target-modules linear_qkv linear_proj
    --lora-only-trainable
"""
PLUGIN = [*PROVIDER, *INSTALL, *HOOKS]


def run_entry(*words: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lorry.integrations.slime.train", *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*slime_paths(), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )


def documented(args: Namespace) -> bool:
    spec = spec_from_arguments(args)
    return (spec.r, spec.lora_alpha, spec.lora_dropout, spec.target_modules) == (
        *(8, 16.0, 0.1),
        ("linear_qkv", "linear_proj"),
    )


def test_slimes_own_parser_drops_them_without_a_word(models: Path) -> None:
    args = parse(*flags(models / "llama"), *shlex.split(DOCUMENTED))
    assert [name for name in vars(args) if "lora" in name] == []


def test_registered_they_arrive(models: Path) -> None:
    words = [*flags(models / "llama"), *shlex.split(DOCUMENTED), *PLUGIN]
    args = parse(*words, add_custom_arguments=add_lora_arguments)
    check_arguments(args)
    assert documented(args)


def test_the_yaml_of_an_untouched_train_py_has_the_same_names(models: Path, tmp_path: Path) -> None:
    given = {
        "use_lora": True,
        "lora_r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.1,
        "lora_target_modules": ["linear_qkv", "linear_proj"],
        "lora_only_trainable": True,
        "lora_sync": "adapter",
    }
    file = tmp_path / "lora.yaml"
    file.write_text(yaml.safe_dump(given))
    args = parse(*flags(models / "llama"), "--custom-config-path", file, *PLUGIN)
    check_arguments(args)
    assert documented(args)
    assert args.lora_sync == "adapter"
    # a name that is none is no more dropped than a flag
    file.write_text(yaml.safe_dump({**given, "lora_rank": 8}))
    args = parse(*flags(models / "llama"), "--custom-config-path", file, *PLUGIN)
    with pytest.raises(ConfigError, match="--lora-rank is no flag of Lorry's"):
        check_arguments(args)


def test_the_entry_lists_them() -> None:
    done = run_entry("--help")
    assert done.returncode == 0, done.stderr
    for name in ("--use-lora", "--lora-target-modules", "--lora-sync", "--lora-check-every"):
        assert name in done.stdout
    assert "--custom-model-provider-path" in done.stdout  # slime's own


@pytest.mark.skipif(IS_REAL, reason="slime's own driver needs Ray and GPUs")
def test_the_entry_trains_with_them(models: Path) -> None:
    done = run_entry(*flags(models / "llama"), *shlex.split(DOCUMENTED), *PLUGIN)
    assert done.returncode == 0, done.stderr
    assert "trained with" in done.stdout
    assert "'lora_target_modules': ['linear_qkv', 'linear_proj']" in done.stdout
    assert "'only_train_params_name_list': ['lora_']" in done.stdout


@pytest.mark.skipif(IS_REAL, reason="the double's flags are no command line of slime's")
def test_the_entry_stops_at_start_and_names_what_is_missing(models: Path) -> None:
    done = run_entry(*flags(models / "llama"), *shlex.split(DOCUMENTED), *PROVIDER, *HOOKS)
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith("lorry: --custom-megatron-init-path is missing: set it to")
    assert "trained with" not in done.stdout
