"""Descriptions of the project RMoE (`python train.py CONFIG.json`, `"method": "rmoe"`) as they are:
each of its keys is read as settings of `lorry moe`, or refused with the nearest that there is. None
is passed over; docs/experts.md has the table. No torch here.

Defaults are those of its code, not of the JSON that it ships. Keys of our own may stand beside
theirs: `"data": {"local": {"truthfulqa": FILE}}`, `"model": {"dtype": "float32"}`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from lorry.config.base import PathText, SettingsGroup
from lorry.config.parsing.files import DescriptionFile
from lorry.config.parsing.names import show_value
from lorry.errors import ConfigError, suggest_nearest
from lorry.notes import NoteCallback

METHOD = "rmoe"
MARKS = ("expert_training", "gating", "full_finetune")
BASES = {
    "qwen2-0.5b": "Qwen/Qwen2-0.5B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2-1.5b": "Qwen/Qwen2-1.5B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
}
OTHER_BASES = {
    "switch-base-8": "is an encoder-decoder with experts of its own",
    "qwen1.5-moe-a2.7b": "has experts already",
}
# its names of data sets -> the catalogue's; both are trained on the split that is there
SETS = {
    "truthfulqa": "truthfulqa",
    "qmsum": "longbench_qmsum",
    "longbench": "longbench_qmsum",
}
SET_SPLIT = "validation"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# llama.cpp's names of those that we write
QUANTIZE = {"q4_0": "q4_0", "q8_0": "q8_0", "f16": "f16", "f32": "f32", "bf16": "bf16"}
# what people call them beside our own names
OUR_NAMES = {"experts": "jobs"}
TIMESTAMP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ProjectLora(SettingsGroup):
    """expert_training.lora"""

    enabled: bool = True
    r: PositiveInt = 8
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: list[str] | None = None


class ProjectTraining(SettingsGroup):
    """What the training of experts and the finetuning of all weights share."""

    max_length: int = Field(default=512, ge=2)
    num_epochs: float = Field(default=3, gt=0)
    batch_size: PositiveInt = 1
    gradient_accumulation_steps: PositiveInt = 4
    learning_rate: float = Field(default=5e-5, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    eval_split: float = Field(default=0.2, gt=0, lt=1)


class ProjectExperts(ProjectTraining):
    """expert_training"""

    l2_regularization: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    disable_eval_split: bool = False
    qmsum_max_new_tokens: Literal[200] = 200
    temperature: float = Field(default=0.0, ge=0, le=0)
    lora: ProjectLora = ProjectLora()


class ProjectGating(SettingsGroup):
    """gating"""

    hidden_dims: list[PositiveInt] = Field(default=[512, 256])
    dropout: float = Field(default=0.1, ge=0, lt=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    batch_size: PositiveInt = 32
    num_epochs: PositiveInt = 10
    weight_decay: float = Field(default=0.01, ge=0)
    train_split: float = Field(default=0.7, gt=0, lt=1)
    val_split: float = Field(default=0.15, gt=0, lt=1)
    test_split: float = Field(default=0.15, ge=0, lt=1)

    @model_validator(mode="after")
    def _splits_add_to_one(self) -> ProjectGating:
        total = self.train_split + self.val_split + self.test_split
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train_split, val_split and test_split add to {total:g}, not to 1")
        return self


class ProjectMerge(SettingsGroup):
    """merge"""

    routing_mode: Literal["sparse_top1", "weighted_sum", "select_one"] = "sparse_top1"
    router_trainable: bool = True
    target_architecture: Literal["auto", "qwen2moe", "qwen3moe"] = "auto"
    use_shared_expert: Literal[False] = False
    shared_expert_path: None = None


class ProjectFinetune(ProjectTraining):
    """full_finetune"""

    enabled: bool = False


class ProjectConfig(SettingsGroup):
    """Its JSON, with its defaults."""

    main: ClassVar[str] = ""
    method: Literal["rmoe"] = "rmoe"
    base_model: str = "qwen2-0.5b"
    datasets: list[str] = Field(default=["truthfulqa", "longbench"], min_length=2)
    seed: NonNegativeInt = 42
    prompt_dir: None = None
    quantize: str = "Q4_0"
    gguf_output: PathText | None = None
    expert_training: ProjectExperts = ProjectExperts()
    gating: ProjectGating = ProjectGating()
    merge: ProjectMerge = ProjectMerge()
    full_finetune: ProjectFinetune = ProjectFinetune()


# keys that are known and refused, at other values than these classes take: what there is instead
INSTEAD = {
    "prompt_dir": "the gating network learns from the rows of datasets; give a file of prompts as an expert's data",
    "expert_training.qmsum_max_new_tokens": (
        "nothing is generated while experts train; afterwards: lorry eval RUN tasks=[longbench_qmsum] max_new_tokens=N"
    ),
    "expert_training.temperature": (
        "nothing is generated while experts train; afterwards: lorry eval RUN tasks=[...] temperature=T"
    ),
    "merge.use_shared_expert": (
        "an expert beside the others is another expert of the mixture: name its data in datasets"
    ),
    "merge.shared_expert_path": (
        "an adapter that is there is an expert: experts: [{name: shared, adapter: DIR, data: FILE}]"
    ),
    "quantize": "llama.cpp's llama-quantize makes K-quants of an f16 file; here Q4_0, Q8_0, F16, BF16, F32",
}


def is_project_form(values: Mapping[str, Any]) -> bool:
    """Whether a description is one of the project's and not ours."""
    return values.get("method") == METHOD or any(name in values for name in MARKS)


def translate_project(
    described: DescriptionFile,
    path: Path,
    add_note: NoteCallback,
    environment: Mapping[str, str] = os.environ,
) -> DescriptionFile:
    """The description under the names of `lorry moe`; of our own form it is given back as it is.
    Raises ConfigError naming file, line and key."""
    if not is_project_form(described.values):
        return described
    theirs = {k: v for k, v in described.values.items() if k in ProjectConfig.model_fields}
    config = _validated(theirs, described.lines, path)
    settings = _settings(config, path, described.lines, add_note)
    settings["output_dir"] = (str(_workspace(environment, add_note)), "")
    if environment.get("LLAMA_CPP_DIR"):
        add_note("LLAMA_CPP_DIR changes nothing: GGUF files are written without llama.cpp")
    values, lines = dict[str, Any](), dict[str, int]()
    for dotted, (value, key) in settings.items():
        group, _, leaf = dotted.rpartition(".")
        (values.setdefault(group, {}) if group else values)[leaf] = value
        if key in described.lines:
            lines[dotted] = described.lines[key]
    _add_ours(described, values, lines, settings, path)
    return DescriptionFile(values, lines)


def _add_ours(
    described: DescriptionFile,
    values: dict[str, Any],
    lines: dict[str, int],
    settings: Mapping[str, tuple[Any, str]],
    path: Path,
) -> None:
    """Put the keys of our own that stand beside theirs among the settings, over what only their
    defaults say. Raises ConfigError for a setting that both give."""
    for name, value in described.values.items():
        if name in ProjectConfig.model_fields:
            continue
        key = OUR_NAMES.get(name, name)
        group = isinstance(value, Mapping) and isinstance(values.get(key), dict)
        for dotted in [f"{key}.{leaf}" for leaf in value] if group else [key]:
            theirs = settings.get(dotted, (None, ""))[1]
            # router and finetune come as a whole, from several of their keys
            if key in settings and group and dotted.rpartition(".")[2] in settings[key][0]:
                theirs = settings[key][1]
            if theirs and _is_given(described.values, theirs):
                where = _where(path, described.lines, dotted)
                raise ConfigError(f"{where}: {theirs} and {dotted} set the same; keep one")
            if dotted in described.lines:
                lines[dotted] = described.lines[dotted]
        values[key] = {**values[key], **value} if group else value


def _is_given(values: Mapping[str, Any], key: str) -> bool:
    """Whether a file says something of ``group.key``, or of its group as a whole."""
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True


def _validated(theirs: Mapping[str, Any], lines: Mapping[str, int], path: Path) -> ProjectConfig:
    try:
        config = ProjectConfig.model_validate(theirs)
    except ValidationError as error:
        messages = list[str]()
        for detail in error.errors(include_url=False):
            key = ".".join(str(part) for part in detail["loc"])
            message = detail["msg"].removeprefix("Value error, ")
            if detail["type"] == "extra_forbidden":
                group, _, leaf = key.rpartition(".")
                known = _fields_of(group)
                message = f"no key of {METHOD}{suggest_nearest(leaf, known)}; {group} has {', '.join(known)}"
            elif key in INSTEAD:
                message = f"{show_value(detail['input'])} is not to be had: {INSTEAD[key]}"
            messages.append(f"{_where(path, lines, key)}: {key}: {message}")
        raise ConfigError("\n".join(dict.fromkeys(messages))) from None
    if config.quantize.lower() not in QUANTIZE:
        raise ConfigError(f"{_where(path, lines, 'quantize')}: quantize: {INSTEAD['quantize']}")
    if config.base_model in OTHER_BASES:
        raise ConfigError(
            f"{_where(path, lines, 'base_model')}: base_model={config.base_model} {OTHER_BASES[config.base_model]}; "
            f"a mixture is made over a dense decoder: {', '.join(BASES)}, a hub id or a directory"
        )
    return config


def _fields_of(group: str) -> list[str]:
    kind: Any = ProjectConfig
    for name in group.split(".") if group else []:
        kind = kind.model_fields[name].annotation
    return list(kind.model_fields)


def _where(path: Path, lines: Mapping[str, int], key: str) -> str:
    line = lines.get(key, lines.get(key.rpartition(".")[0]))
    return f"{path}:{line}" if line else str(path)


def _settings(
    config: ProjectConfig, path: Path, lines: Mapping[str, int], add_note: NoteCallback
) -> dict[str, tuple[Any, str]]:
    """{our setting: (its value, the key it comes from)}."""
    experts, gating, merge = config.expert_training, config.gating, config.merge
    lora, training = experts.lora, "expert_training."
    targets = lora.target_modules or [*ATTENTION, *MLP]
    # without adapters the MLPs train
    routes_mlp_alone = not lora.enabled or not set(targets) - set(MLP)
    top_k: int = len(config.datasets) if merge.routing_mode == "weighted_sum" else 1
    held_out: dict[str, tuple[Any, str]] = {
        "data.test_size": (experts.eval_split, training + "eval_split"),
        # early-stop patience and best checkpoint are fixed in its code
        "train.load_best_model_at_end": (True, ""),
        "train.early_stopping_patience": (2, ""),
    }
    if experts.disable_eval_split:
        held_out = {}
        add_note(
            f"{_where(path, lines, training + 'disable_eval_split')}: disable_eval_split: nothing is held out, so the "
            "last adapter of each expert stays: the project would choose the best one on rows it has trained on"
        )
    else:
        add_note(
            "the best checkpoint of an expert is that of its own held-out loss; BLEURT is not to be had. Answers are "
            "scored afterwards: ROUGE-L by lorry eval tasks=[truthfulqa, longbench_qmsum], MC2 by truthfulqa_mc"
        )
    settings: dict[str, tuple[Any, str]] = {
        "model.name": (BASES.get(config.base_model, config.base_model), "base_model"),
        **_adapter_settings(config, targets),
        "data.max_length": (experts.max_length, training + "max_length"),
        **held_out,
        "train.seed": (config.seed, "seed"),
        "train.num_train_epochs": (experts.num_epochs, training + "num_epochs"),
        "train.per_device_train_batch_size": (experts.batch_size, training + "batch_size"),
        "train.gradient_accumulation_steps": (
            experts.gradient_accumulation_steps,
            training + "gradient_accumulation_steps",
        ),
        "train.learning_rate": (experts.learning_rate, training + "learning_rate"),
        "train.weight_decay": (experts.weight_decay, training + "weight_decay"),
        "train.l2_regularization": (experts.l2_regularization, training + "l2_regularization"),
        "train.max_grad_norm": (experts.max_grad_norm, training + "max_grad_norm"),
        # transformers' Trainer warms nothing up unless told to
        "train.warmup_ratio": (0.0, ""),
        "jobs": (_experts(config.datasets, path, lines), "datasets"),
        "layout": ("workspace", ""),
        "export": (_exports(config, top_k, routes_mlp_alone), "merge"),
    }
    finetune = config.full_finetune
    if finetune.enabled:
        settings["finetune"] = (
            {
                "max_length": finetune.max_length,
                "num_train_epochs": finetune.num_epochs,
                "per_device_train_batch_size": finetune.batch_size,
                "gradient_accumulation_steps": finetune.gradient_accumulation_steps,
                "learning_rate": finetune.learning_rate,
                "weight_decay": finetune.weight_decay,
                "test_size": finetune.eval_split,
                "warmup_ratio": 0.0,
                "train_router": merge.router_trainable,
            },
            "full_finetune",
        )
    if lora.enabled:
        settings |= {
            "router": (_router(gating, top_k), "gating"),
            "merge_experts": (True, ""),
            # as the project stores it: in bfloat16 most of a small adapter would be rounded away
            "merge_dtype": ("float32", ""),
        }
    else:
        add_note(
            f"{_where(path, lines, training + 'lora.enabled')}: expert_training.lora.enabled=false: experts are whole models "
            "(experts/NAME/merged), and the other keys of lora, which are an adapter's, say nothing. No gating network is "
            "trained, whatever gating says, since it chooses among adapters; rmoe_model has gates of prompts"
        )
    if not routes_mlp_alone:
        add_note(
            "stock classes route tokens, and MLPs alone: rmoe_model has the mean of the experts' attention, and gates from "
            'prompts; with "target_modules": ["gate_proj", "up_proj", "down_proj"] its gates are trained'
        )
    return settings


def _adapter_settings(config: ProjectConfig, targets: list[str]) -> dict[str, tuple[Any, str]]:
    """Of an expert's LoRA, or that it has none and its MLPs train."""
    lora, group = config.expert_training.lora, "expert_training.lora."
    if not lora.enabled:
        return {"lora": (None, group + "enabled"), "trainable": ("mlp", group + "enabled")}
    return {
        "lora.r": (lora.r, group + "r"),
        "lora.lora_alpha": (lora.alpha, group + "alpha"),
        "lora.lora_dropout": (lora.dropout, group + "dropout"),
        "lora.target_modules": (targets, group + "target_modules"),
    }


def _experts(datasets: list[str], path: Path, lines: Mapping[str, int]) -> list[dict[str, Any]]:
    """An expert for each data set: one of the project's by name, else a file or a named set."""
    experts = []
    for dataset in datasets:
        file = Path(dataset).expanduser()
        if dataset in SETS:
            name, data = dataset, {"mix": [SETS[dataset]], "split": SET_SPLIT, "template": 0}
        elif file.exists() or file.suffix or "/" in dataset:
            name, data = file.stem, {"path": dataset}
        else:
            name, data = dataset, {"mix": [dataset], "template": 0}
        experts.append({"name": re.sub(r"[^A-Za-z0-9_-]+", "-", name), "data": data})
    names = [expert["name"] for expert in experts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"{_where(path, lines, 'datasets')}: datasets: two experts would be called {twice[0]!r}"
        )
    return experts


def _router(gating: ProjectGating, top_k: int) -> dict[str, Any]:
    """The gating network: a classifier of prompts. sparse_top1 and select_one take the best expert,
    weighted_sum all of them."""
    return {
        "kind": "sequence",
        "top_k": top_k,
        "hidden": gating.hidden_dims,
        "dropout": gating.dropout,
        "train_split": gating.train_split,
        "val_split": gating.val_split,
        "test_split": gating.test_split,
        "train": {
            "num_train_epochs": gating.num_epochs,
            "learning_rate": gating.learning_rate,
            "per_device_train_batch_size": gating.batch_size,
            "weight_decay": gating.weight_decay,
        },
    }


def _exports(config: ProjectConfig, top_k: int, routes_mlp_alone: bool) -> list[dict[str, Any]]:
    merge, classes = config.merge, {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
    moe = {
        "to": "hf-moe",
        # a trained router gates adapters
        "gate_mode": "router"
        if routes_mlp_alone and config.expert_training.lora.enabled
        else "hidden",
        "attention": "refuse" if routes_mlp_alone else "average",
        "architecture": classes.get(merge.target_architecture, "auto"),
        "experts_per_token": top_k,
        "dtype": "float32",
    }
    gguf: dict[str, Any] = {"to": "gguf", "outtype": QUANTIZE[config.quantize.lower()]}
    return [moe, gguf if config.gguf_output is None else {**gguf, "path": config.gguf_output}]


def _workspace(environment: Mapping[str, str], add_note: NoteCallback) -> Path:
    """WORK_DIR/workspace/TIMESTAMP. Raises ConfigError for a WORKSPACE_TIMESTAMP that is no name."""
    timestamp = environment.get("WORKSPACE_TIMESTAMP")
    if timestamp is not None and not TIMESTAMP.fullmatch(timestamp):
        raise ConfigError(
            f"WORKSPACE_TIMESTAMP={timestamp!r} is no name of a folder, such as 20261129_180000"
        )
    name = timestamp or datetime.now().strftime("%Y%m%d_%H%M%S")
    if timestamp is None:
        add_note(f"WORKSPACE_TIMESTAMP={name} goes on in this workspace when it is run again")
    return Path(environment.get("WORK_DIR", ".")) / "workspace" / name
