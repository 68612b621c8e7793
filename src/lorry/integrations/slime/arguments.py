"""The flags of LoRA in slime, what follows from them, and what cannot go together.

slime drops a flag that it does not know without a word. They reach it by `lorry.integrations.slime.train`,
which registers them, or, with slime's own train.py, as keys of the YAML file of `--custom-config-path`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lorry.errors import ConfigError
from lorry.integrations import arguments
from lorry.integrations.arguments import argument, spec_from_arguments

PLUGIN = "lorry.integrations.slime"
PROVIDER, INSTALL = "custom_model_provider_path", "custom_megatron_init_path"
LOG_PROB = "custom_megatron_before_log_prob_hook_path"
TRAIN_STEP = "custom_megatron_before_train_step_hook_path"
# the one that may be left out, and what it names
ROLLOUT_DATA, COMPARE_ROLLOUT = "rollout_data_postprocess_path", f"{PLUGIN}.compare_rollout"
# slime's attributes, and the functions here that they have to name
HOOKS: Mapping[str, str] = {
    PROVIDER: f"{PLUGIN}.model_provider",
    INSTALL: f"{PLUGIN}.install",
    LOG_PROB: f"{PLUGIN}.before_log_prob",
    TRAIN_STEP: f"{PLUGIN}.before_train_step",
}
SYNCS = ("merged", "adapter")
DEFAULTS: Mapping[str, Any] = {
    **arguments.DEFAULTS,
    "lora_mode": "canonical",
    "lora_sync": SYNCS[0],
    "lora_check_every": 1,
    "lora_adapter_path": None,
    "lora_sync_dir": None,
}
# what slime matches parameters' names with: every one of an adapter, and no other
TRAINED = "lora_"


def add_lora_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Register every flag on ``parser`` and return it; as slime's `add_custom_arguments`. Raises
    ConfigError where megatron-core is not installed."""
    from lorry.integrations.megatron.arguments import add_lora_arguments as add_megatron_arguments

    add_megatron_arguments(parser)
    group = parser.add_argument_group("LoRA in slime")
    group.add_argument(
        "--lora-sync",
        choices=SYNCS,
        default=DEFAULTS["lora_sync"],
        help="what rollout engines get: merged, the weights with the adapter in them; adapter, the base "
        "once and then the adapter of every version",
    )
    group.add_argument(
        "--lora-check-every",
        type=int,
        default=DEFAULTS["lora_check_every"],
        metavar="N",
        help="prove at every Nth version that engines have what was trained; 0: never",
    )
    group.add_argument(
        "--lora-adapter-path",
        default=DEFAULTS["lora_adapter_path"],
        metavar="DIR",
        help="a PEFT adapter to start from",
    )
    group.add_argument(
        "--lora-sync-dir",
        default=DEFAULTS["lora_sync_dir"],
        metavar="DIR",
        help="where --lora-sync adapter writes its versions, for trainer and engines alike; rollout in "
        "--save if absent",
    )
    return parser


def lora_argument(args: Any, name: str) -> Any:
    """The value of one of our flags by its attribute's name; its default where ``args`` lacks it."""
    return getattr(args, name, DEFAULTS[name])


def complete_arguments(args: Any) -> None:
    """Set on slime's namespace what follows from `--lora-only-trainable`: adapters alone train. slime
    reads it where it freezes, after the provider."""
    args.only_train_params_name_list = [TRAINED]


def check_arguments(args: Any) -> None:
    """Raises ConfigError for a command line with which a run would not do what it says, naming the
    flag that is missing or in the way."""
    if not argument(args, "use_lora"):
        raise ConfigError(_no_lora(args))
    _check_known(vars(args))
    spec = spec_from_arguments(args)
    for name, reason in _needed_hooks(args, spec.lora_dropout):
        _check_hook(args, name, reason)
    _check_names(args)
    _check_model(args)
    _check_reference(args)
    _check_values(args)


def check_words(words: Sequence[str]) -> None:
    """Raises ConfigError for a word of a command line that looks like one of our flags and is none: slime
    would drop it."""
    names = (word.partition("=")[0] for word in words if word.startswith("--lora"))
    _check_known(name.removeprefix("--").replace("-", "_") for name in names)


def _check_known(names: Iterable[str]) -> None:
    for name in sorted(names):
        if name.startswith("lora") and name not in DEFAULTS:
            raise ConfigError(
                f"{flag(name)} is no flag of Lorry's; there are: "
                f"{', '.join(sorted(map(flag, DEFAULTS)))}"
            )


def _no_lora(args: Any) -> str:
    given = sorted(n for n, value in vars(args).items() if n in DEFAULTS and value != DEFAULTS[n])
    if given:
        return f"{flag(given[0])} is set, but not --use-lora; add it to train adapters"
    return (
        "Lorry's plugin is installed, but --use-lora did not reach it: with slime's own train.py, "
        "which drops flags it does not know, set use_lora: true in the file of --custom-config-path, or "
        f"start python -m {PLUGIN}.train; without LoRA, leave {flag(INSTALL)} and {flag(PROVIDER)} out"
    )


def _needed_hooks(args: Any, dropout: float) -> Iterator[tuple[str, str]]:
    """(attribute, why the function has to be there)."""
    yield PROVIDER, "without it the model has no adapters, and the whole of it would train"
    yield INSTALL, "without it adapters would not reach the rollout engines"
    if why := other_scorer(args):
        yield LOG_PROB, f"{why}, and would be scored with the trained adapter"
        yield TRAIN_STEP, f"{why}; without it the adapter would stay off after they are scored"
    elif dropout:
        yield TRAIN_STEP, "lora_dropout needs to know which step begins"
    elif getattr(args, ROLLOUT_DATA, None) == COMPARE_ROLLOUT:
        yield TRAIN_STEP, "what compare_rollout keeps is compared there"


def other_scorer(args: Any) -> str:
    """Why slime loads another model's weights over the policy's and scores with them; empty if it does
    not."""
    if getattr(args, "kl_coef", 0) or getattr(args, "use_kl_loss", False):
        return "a KL term asks for the reference"
    if getattr(args, "use_opd", False) and getattr(args, "opd_type", None) == "megatron":
        return "on-policy distillation asks for a teacher"
    return ""


def _check_hook(args: Any, name: str, reason: str) -> None:
    path, right = getattr(args, name, None), HOOKS[name]
    if path is None:
        raise ConfigError(f"{flag(name)} is missing: set it to {right}; {reason}")
    if ".py" in path or ":" in path or "/" in path:
        raise ConfigError(
            f"{flag(name)} {path}: slime imports package.module.function, not a file; write {right}"
        )
    if path != right:
        raise ConfigError(f"{flag(name)} is {path}; with LoRA it has to be {right}: {reason}")


def _check_names(args: Any) -> None:
    """Which parameters slime freezes."""
    if getattr(args, "freeze_params_name_list", None):
        raise ConfigError(
            "--freeze-params-name-list is set: with LoRA nothing but adapters trains, and slime takes "
            "one list of names; leave it out"
        )
    only = getattr(args, "only_train_params_name_list", None)
    if only and list(only) != [TRAINED]:
        raise ConfigError(
            f"--only-train-params-name-list {' '.join(only)}: with LoRA it is {TRAINED}, which "
            "--lora-only-trainable sets; leave it out"
        )


def _check_model(args: Any) -> None:
    """What the provider would refuse later, by slime's flags."""
    for name, why in (
        ("num_experts", "experts have no adapters"),
        ("multi_latent_attention", "the projections of MLA have no adapters"),
        ("mtp_num_layers", "the layers of multi-token prediction have no adapters"),
    ):
        if value := getattr(args, name, None):
            given = "" if value is True else f" {value}"
            raise ConfigError(f"{flag(name)}{given} is not supported with LoRA: {why}")


def _check_reference(args: Any) -> None:
    if every := getattr(args, "ref_update_interval", None):
        raise ConfigError(
            f"--ref-update-interval {every}: with LoRA the reference is the base alone, which never "
            "changes; leave it out"
        )


def _check_values(args: Any) -> None:
    sync = lora_argument(args, "lora_sync")
    if sync not in SYNCS:
        raise ConfigError(f"--lora-sync is {sync!r}; it is one of {', '.join(SYNCS)}")
    every = lora_argument(args, "lora_check_every")
    # a bool of a YAML file is an int to Python
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
        raise ConfigError(f"--lora-check-every is {every!r}; it is a number of versions, or 0")


def flag(name: str) -> str:
    """How an attribute of slime's namespace is written on the command line."""
    return "--" + name.replace("_", "-")
