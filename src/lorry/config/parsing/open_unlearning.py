"""Command lines of open-unlearning as they are typed: `python src/train.py --config-name=unlearn
@experiment=unlearn/tofu/lora trainer.args.learning_rate=1e-4 model=Llama-2-7b-hf-lora`.

What Hydra needs before the settings is taken off with a note, settings are known by their last part,
and models by the names of its configurations. Single words that mean the same for every verb
(`device_map`, `retain_loss_type`) are aliases like those of other tools (aliases.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lorry.config.parsing.experiments import VERB_OF_KIND
from lorry.config.parsing.names import SchemaNames
from lorry.config.parsing.place import GivenSetting
from lorry.errors import ConfigError
from lorry.notes import NoteCallback

# before a script: an interpreter or launcher, or a variable of the environment
LAUNCHER = re.compile(r"(.*/)?(python[\d.]*|accelerate|torchrun|deepspeed)|[A-Z_]+=.*")
SCRIPT = re.compile(r"(.*/)?src/(train|eval)\.py")
CONFIG_NAME = re.compile(r"(?:--config-name|-cn)(?:=(.*))?", re.DOTALL)
KIND_OF_CONFIG = {"train": "finetune", "unlearn": "unlearn", "eval": "eval"}
# + adds a setting in Hydra, ++ adds or changes one; @ is how the requirement's page writes it
HYDRA_MARK = re.compile(r"(@|\+{1,2})([A-Za-z_][\w.]*=.*)", re.DOTALL)
TRAIN_ROWS = re.compile(r"data\.train\.(\w+)\.args\.hf_args\.(\w+)=(.*)", re.DOTALL)
# (one of their sets, its setting that says which rows): the parameter of finetune/ that does
TRAIN_PARAMETERS = {
    ("TOFU_QA_full", "name"): "data_split",
    ("TOFU_QA_retain", "name"): "data_split",
    ("MUSE_train", "split"): "data_sub_set",
}
# the group of ours that a group of theirs is; settings without such a place are taken by themselves
GROUPS = {
    "trainer.args": "train",
    "trainer.method_args": "unlearn",
    "model.model_args": "model",
    "model.tokenizer_args": "model",
    "model.lora_config": "lora",
    "eval.tofu": "suite",
    "eval.muse": "suite",
    "eval.wmdp": "suite",
    "paths": "",
}
# settings of theirs that belong into another group here
MOVED = {"data.anchor": "unlearn.anchor"}
SUITES = ("tofu", "muse", "wmdp")
# of their evaluators, what is no setting of the suite in training
EVALUATOR_BATCH, BATCH = "batch_size", "train.per_device_eval_batch_size"
WEIGHTS = "model.model_args.pretrained_model_name_or_path"
TASK_NAME, TRAINER, FINETUNE = "task_name", "trainer", "finetune"
HUB_IDS = {
    "Llama-2-7b-hf": "meta-llama/Llama-2-7b-hf",
    "Llama-2-7b-chat-hf": "meta-llama/Llama-2-7b-chat-hf",
    "Llama-2-13b-hf": "meta-llama/Llama-2-13b-hf",
    "Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "Llama-3.2-3B-Instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "Phi-3.5-mini-instruct": "microsoft/Phi-3.5-mini-instruct",
    "Qwen2.5-1.5B-Instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen2.5-3B-Instruct": "Qwen/Qwen2.5-3B-Instruct",
    "Qwen2.5-7B-Instruct": "Qwen/Qwen2.5-7B-Instruct",
    "gemma-7b-it": "google/gemma-7b-it",
    "zephyr-7b-beta": "HuggingFaceH4/zephyr-7b-beta",
}
ADAPTED = "-lora"  # behind the name of a configuration that brings an adapter's settings
ADAPTER_SETTINGS = {
    "lora.r": 128,
    "lora.lora_alpha": 128,
    "lora.lora_dropout": 0.05,
    "lora.target_modules": [
        *["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    ],
}


def verb_of_launcher(args: Sequence[str]) -> list[str]:
    """Arguments of `lorry` with the verb in front, where they begin as the peer's command does:
    that of --config-name, else of the script; other arguments as they are.
    """
    script = next((SCRIPT.fullmatch(word) for word in args if SCRIPT.fullmatch(word)), None)
    if script is None or not LAUNCHER.fullmatch(args[0]):
        return list(args)
    config = next((name for name, _ in _config_names(args)), script[2])
    kind = KIND_OF_CONFIG.get(config, KIND_OF_CONFIG[script[2]])
    return [VERB_OF_KIND[kind].partition(" ")[2], *args]


def strip_launcher(kind: str, argv: Sequence[str], add_note: NoteCallback) -> list[str]:
    """The words that are settings. ``kind``: of the verb's experiments, "" for a verb without.
    Raises ConfigError for a --config-name of another verb.
    """
    if not kind:
        return list(argv)
    words = list(argv)
    scripts = [at for at, word in enumerate(words) if SCRIPT.fullmatch(word)]
    if scripts and LAUNCHER.fullmatch(words[0]):
        add_note(f"{' '.join(words[: scripts[0] + 1])} changes nothing: the verb implies it")
        del words[: scripts[0] + 1]
    for config, span in reversed(_config_names(words)):
        if config not in KIND_OF_CONFIG:  # one of theirs holds settings that would be lost
            raise ConfigError(
                f"--config-name={config}: of open-unlearning's {', '.join(KIND_OF_CONFIG)} are known; settings of "
                "another are given as CONFIG.yaml"
            )
        if KIND_OF_CONFIG[config] != kind:
            verb = VERB_OF_KIND[KIND_OF_CONFIG[config]]
            raise ConfigError(f"--config-name={config} is what `{verb}` does")
        add_note(f"--config-name={config} changes nothing: the verb implies it")
        del words[span]
    settings = []
    for word in _read_train_set(words, add_note):
        if match := HYDRA_MARK.fullmatch(word):
            add_note(f"{match[1]} before {match[2].partition('=')[0]} is not needed")
            word = match[2]
        settings.append(word)
    return settings


def _read_train_set(words: Sequence[str], add_note: NoteCallback) -> list[str]:
    """``data/datasets@data.train=TOFU_QA_retain data.train.TOFU_QA_retain.args.hf_args.name=retain90``,
    which makes the oracle, as the parameter of our experiment. A set that is named without its
    rows stays, as the error that it is: its file decides which they are.
    """
    settings = list(words)
    for word in words:
        match = TRAIN_ROWS.fullmatch(word)
        if match is None or (match[1], match[2]) not in TRAIN_PARAMETERS:
            continue
        chosen = f"data/datasets@data.train={match[1]}"
        ours = f"{TRAIN_PARAMETERS[match[1], match[2]]}={match[3]}"
        add_note(f"{word} is read as {ours}")
        settings = [ours if each == word else each for each in settings if each != chosen]
    return settings


def _config_names(words: Sequence[str]) -> list[tuple[str, slice]]:
    """[(name without .yaml, where it stands)] of every --config-name."""
    spans = []
    for at, word in enumerate(words):
        if not (match := CONFIG_NAME.fullmatch(word)):
            continue
        apart = match[1] is None
        name = (words[at + 1] if at + 1 < len(words) else "") if apart else match[1]
        spans.append((name.removesuffix(".yaml"), slice(at, at + 1 + apart)))
    return spans


def translate_settings(
    names: SchemaNames, source: Sequence[GivenSetting], add_note: NoteCallback
) -> list[list[GivenSetting]]:
    """A source of settings under our names; before it one of an adapter, where a model is named
    that brings one along.
    """
    weights = any(setting.key == WEIGHTS for setting in source)
    adapter, own = list[GivenSetting](), list[GivenSetting]()
    for setting in source:
        name = setting.value if isinstance(setting.value, str) else ""
        if setting.key in ("model", "model.name") and _is_configuration(name):
            if name.endswith(ADAPTED) and "lora.r" in names.fields:
                adapter = [GivenSetting(k, v, setting.where) for k, v in ADAPTER_SETTINGS.items()]
            if weights:
                add_note(f"{setting.where} names no weights: {WEIGHTS} is used")
                continue
            setting = replace(setting, value=HUB_IDS[name.removesuffix(ADAPTED)])
            add_note(f"model={name} is read as model={setting.value}{_adapter_note(adapter)}")
        elif setting.key == TRAINER and name == FINETUNE and "unlearn.method" not in names.fields:
            add_note(f"{TRAINER}={FINETUNE} changes nothing: the verb implies it")
            continue
        elif setting.key == TRAINER and "unlearn.method" in names.fields:
            setting = replace(setting, key="unlearn.method")
            add_note(f"{TRAINER} is read as {setting.key}")
        elif setting.key == "eval" and name in SUITES and _has_suites(names):
            # their group of evaluators; a file to evaluate on, where there is one of that name
            if not Path(name).exists():
                setting = replace(setting, key="suite.name")
                add_note(f"eval={name} is read as suite={name}")
        elif setting.key == TASK_NAME:
            setting = _task_name(names, setting)
            add_note(f"{TASK_NAME} is read as {setting.key}={setting.value}")
        else:
            setting = _without_group(names, setting, add_note)
        own.append(setting)
    return [adapter, own] if adapter else [own]


def _is_configuration(name: str) -> bool:
    # a folder of that name is the model that is meant
    return name.removesuffix(ADAPTED) in HUB_IDS and not Path(name).exists()


def _adapter_note(adapter: Sequence[GivenSetting]) -> str:
    return " with r=128 lora_alpha=128 lora_dropout=0.05, lm_head too" if adapter else ""


def _has_suites(names: SchemaNames) -> bool:
    return "suite.name" in names.fields


def _task_name(names: SchemaNames, setting: GivenSetting) -> GivenSetting:
    if "train.run_name" in names.fields:
        return replace(setting, key="train.run_name")
    return replace(setting, key="output_dir", value=f"evals/{setting.value}")


def _without_group(
    names: SchemaNames, setting: GivenSetting, add_note: NoteCallback
) -> GivenSetting:
    """``trainer.args.seed`` as ``train.seed``; what our group has not is an alias or unknown."""
    if MOVED.get(setting.key) in names.fields:
        add_note(f"{setting.key} is read as {MOVED[setting.key]}")
        return replace(setting, key=MOVED[setting.key])
    group, _, leaf = setting.key.rpartition(".")
    if group not in GROUPS:
        return setting
    ours = f"{GROUPS[group]}.{leaf}"
    key = ours if ours in names.fields else leaf
    if GROUPS[group] == "suite" and leaf == EVALUATOR_BATCH and BATCH in names.fields:
        key = BATCH  # the word alone means the rows of a step there
    add_note(f"{setting.key} is read as {key}")
    return replace(setting, key=key)
