"""Command lines of slime with LoRA: what is missing or in the way stops the run at its start and is
named. No slime and no Megatron here.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lorry.errors import ConfigError
from lorry.integrations.slime.arguments import (
    COMPARE_ROLLOUT,
    HOOKS,
    ROLLOUT_DATA,
    check_arguments,
    check_words,
    complete_arguments,
)


def arguments(**changes: Any) -> SimpleNamespace:
    """slime's namespace of a run that is right, with some values changed."""
    slime = {
        "kl_coef": 0.0,
        "use_kl_loss": True,
        "use_opd": False,
        "opd_type": None,
        "only_train_params_name_list": None,
        "freeze_params_name_list": None,
        "num_experts": None,
        "mtp_num_layers": None,
        "multi_latent_attention": False,
        "ref_update_interval": None,
    }
    return SimpleNamespace(**{**slime, **HOOKS, "use_lora": True, "lora_r": 8, **changes})


def without(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


PROVIDER, INSTALL, LOG_PROB, TRAIN_STEP = HOOKS


def test_what_is_right_passes_and_gets_its_name_list() -> None:
    args = arguments()
    check_arguments(args)
    complete_arguments(args)
    assert args.only_train_params_name_list == ["lora_"]
    check_arguments(args)  # in every training process again


def test_hooks_of_a_reference_are_not_asked_for_where_there_is_none() -> None:
    check_arguments(arguments(use_kl_loss=False, **without(LOG_PROB, TRAIN_STEP)))
    own = {LOG_PROB: "mine.hooks.watch", TRAIN_STEP: "mine.hooks.watch"}
    check_arguments(arguments(use_kl_loss=False, **own))


def test_what_compares_a_rollout_needs_the_hook_of_the_step() -> None:
    compared = {"use_kl_loss": False, ROLLOUT_DATA: COMPARE_ROLLOUT}
    check_arguments(arguments(**compared))
    with pytest.raises(
        ConfigError, match=r"before-train-step-hook-path is missing.*compare_rollout"
    ):
        check_arguments(arguments(**compared, **without(TRAIN_STEP)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # flags without the plugin, the plugin without flags
        (
            without(PROVIDER),
            "--custom-model-provider-path is missing: set it to lorry.*whole of it",
        ),
        (without(INSTALL), "--custom-megatron-init-path is missing: set it to lorry.*engines"),
        ({"use_lora": False, "lora_r": 16}, "--lora-r is set, but not --use-lora"),
        ({"use_lora": False}, "--use-lora did not reach it.*--custom-config-path"),
        # a reference that would be the trained policy, and an adapter that would stay off
        (without(LOG_PROB), "--custom-megatron-before-log-prob-hook-path is missing.*KL"),
        (without(TRAIN_STEP), "--custom-megatron-before-train-step-hook-path is missing.*stay off"),
        (
            {"use_kl_loss": False, "kl_coef": 0.1, **without(LOG_PROB)},
            "before-log-prob-hook-path is missing.*KL",
        ),
        (
            {"use_kl_loss": False, "use_opd": True, "opd_type": "megatron", **without(LOG_PROB)},
            "before-log-prob-hook-path is missing.*teacher",
        ),
        (
            {"use_kl_loss": False, "lora_dropout": 0.1, **without(TRAIN_STEP)},
            "before-train-step-hook-path is missing.*lora_dropout",
        ),
        ({LOG_PROB: "mine.hooks.watch"}, "is mine.hooks.watch; with LoRA it has to be lorry"),
        # the document's form of a hook's path
        (
            {INSTALL: "slime_plugins/lora/megatron_lora_hook.py:custom_megatron_init"},
            "package.module.function, not a file; write lorry.integrations.slime.install",
        ),
        # slime's lists of names
        ({"freeze_params_name_list": ["embedding"]}, "--freeze-params-name-list is set.*leave it"),
        (
            {"only_train_params_name_list": ["lora_"], "freeze_params_name_list": ["embedding"]},
            "--freeze-params-name-list",
        ),
        (
            {"only_train_params_name_list": ["lora_", "experts"]},
            "--only-train-params-name-list lora_ experts",
        ),
        ({"only_train_params_name_list": ["."]}, "--only-train-params-name-list ."),
        ({"lora_only_trainable": False}, "lora_only_trainable=False.*leave it on"),
        # models that have no adapters here
        ({"num_experts": 8}, "--num-experts 8 is not supported"),
        ({"multi_latent_attention": True}, "--multi-latent-attention is not supported"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1 is not supported"),
        ({"ref_update_interval": 5}, "--ref-update-interval 5.*base alone"),
        # values, as a YAML file may have them
        ({"lora_r": 0}, "at least 1"),
        ({"lora_sync": "both"}, "--lora-sync is 'both'; it is one of merged, adapter"),
        ({"lora_check_every": -1}, "--lora-check-every is -1"),
        ({"lora_check_every": True}, "--lora-check-every is True"),
        ({"lora_rank": 8}, "--lora-rank is no flag of Lorry's; there are: --lora-adapter-path"),
    ],
)
def test_what_cannot_be_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_arguments(arguments(**changes))


def test_a_misspelt_flag_that_slime_would_drop_is_told() -> None:
    check_words(["--use-lora", "--lora-r=4", "--lora-target-modules", "q_proj", "--load", "x"])
    for words in (["--lora-rank", "4"], ["--lora-rank=4"], ["--lora-ran", "4"]):
        with pytest.raises(ConfigError, match=r"--lora-ran.? is no flag of Lorry's"):
            check_words(words)


def test_it_is_imported_without_slime_and_megatron_and_says_what_is_missing() -> None:
    code = (
        "import sys\n"
        "for name in ('megatron', 'megatron.core', 'slime'): sys.modules[name] = None\n"
        "import lorry.integrations.slime as plugin\n"
        "from lorry.integrations.slime import train\n"
        "print(sorted(plugin.__all__))\n"
        "for call in (train.main, plugin.model_provider):\n"
        "    try:\n        call()\n"
        "    except Exception as e:\n        print(type(e).__name__, e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, slime, megatron = done.stdout.splitlines()
    assert names == str(
        ["before_log_prob", "before_train_step", "compare_rollout", "install", "model_provider"]
    )
    assert slime.startswith("ConfigError slime.utils.arguments cannot be imported")
    assert "docs/slime.md" in slime
    assert megatron.startswith("ConfigError megatron-core is not installed")


def test_the_entry_ends_with_a_message_and_a_code() -> None:
    command = [sys.executable, "-m", "lorry.integrations.slime.train", "--use-lora"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith("lorry: slime.utils.arguments cannot be imported")
