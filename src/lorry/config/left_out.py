"""Methods that people know from PEFT and that are left out here on purpose: what each trains, and the
nearest that there is. One text for an adapter's file, a setting and a word of the command line; docs/migrating.md
has the table, which a test holds to this one.

With their rates tuned the variants of LoRA lie within one or two per cent of it, so what is built is what
people's files and settings contain; the rest is named rather than read as something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# of settings whose value names a method
METHOD_SETTINGS = frozenset({"variant", "lora_variant", "peft_type", "finetuning_type"})
# the ways in which files say that something is off
OFF_VALUES: tuple[Any, ...] = (False, None, "none", "no", [], {})
MERGE_FIRST = "an adapter of it: merge it in PEFT (merge_and_unload) and give the merged model"


@dataclass(frozen=True)
class LeftOut:
    """A method. ``name``: as its paper writes it; ``trains``: what is another than LoRA; ``nearest``: what to
    do here instead; ``file``: what to do with an adapter of it that exists."""

    name: str
    trains: str
    nearest: str
    file: str = MERGE_FIRST

    def __str__(self) -> str:
        return f"{self.name} is left out ({self.trains}); nearest: {self.nearest}"


PLAIN = "plain LoRA"
_PROMPTS = LeftOut(
    "prompt tuning",
    "vectors in front of the prompt train, and no weight",
    "LoRA of a small rank (r=4), or a fixed text (data.system)",
    "an adapter of it cannot be merged: train LoRA on the same rows",
)
_ROTATIONS = LeftOut(
    "orthogonal fine-tuning",
    "it turns W by an orthogonal matrix and adds nothing to it",
    f"{PLAIN} on the same target_modules",
)
# by PEFT's word: of its peft_type, or of its settings without use_ and _config
LEFT_OUT: dict[str, LeftOut] = {
    "vera": LeftOut(
        "VeRA",
        "A and B are random and shared by all layers, two vectors a layer train",
        "LoRA of r=1, which has about as few parameters",
    ),
    "randlora": LeftOut(
        "RandLoRA",
        "random matrices are scaled by trained ones, so that the update has full rank",
        "LoRA of a high rank: r=64 use_rslora=true",
    ),
    "hira": LeftOut(
        "HiRA",
        "the low-rank product is multiplied with W entry by entry",
        "LoRA of a high rank: r=64 use_rslora=true",
    ),
    "loha": LeftOut(
        "LoHa",
        "two low-rank products are multiplied entry by entry",
        "LoRA of a higher rank (at most LoHa's r squared)",
    ),
    "lokr": LeftOut("LoKr", "a Kronecker product of small matrices", "LoRA of a small rank (r=4)"),
    "miss": LeftOut(
        "MiSS", "one matrix, repeated along the input, in the place of A and B", f"{PLAIN} of its r"
    ),
    "oft": _ROTATIONS,
    "boft": _ROTATIONS,
    "ia3": LeftOut(
        "IA3",
        "a factor for every output of k and v and every input of the MLP's last product trains, and no matrix",
        "LoRA of r=1 on k_proj, v_proj and down_proj",
    ),
    "prompt_tuning": _PROMPTS,
    "multitask_prompt_tuning": _PROMPTS,
    "p_tuning": _PROMPTS,
    "prefix_tuning": _PROMPTS,
    "adaption_prompt": _PROMPTS,
    "cpt": _PROMPTS,
    "kasa": LeftOut(
        "KaSA",
        "the base loses its smallest singular values, and a diagonal stands between A and B",
        PLAIN,
    ),
    "velora": LeftOut(
        "VeLoRA",
        "inputs are kept compressed for backward, so gradients are others than the loss's",
        "gradient_checkpointing=true, which saves memory and changes no gradient",
    ),
    "monteclora": LeftOut(
        "MonteCLoRA",
        "random perturbations of the adapter are learnt with it",
        "several seeds of plain LoRA as jobs, merged (lorry merge)",
    ),
    "bdlora": LeftOut(
        "BD-LoRA",
        "A or B has blocks along its diagonal alone",
        "plain LoRA, which tensor_parallel shares as it is",
    ),
    "qalora": LeftOut(
        "QALoRA",
        "A reads means of groups of inputs, so that it merges into a base of few bits",
        "LoRA over model.quantize=nf4; it merges onto the opened weights",
    ),
    "layer_replication": LeftOut(
        "layer replication",
        "the adapter is on a stack of repeated layers, which is another model",
        "make that model first (mergekit's passthrough) and train LoRA on it",
        "an adapter of it has no base to be read over",
    ),
    "arrow": LeftOut(
        "Arrow as an adapter of its own",
        "it routes between other adapters by their first singular vectors",
        "lorry moe with router.kind=arrow, over the same adapters",
        "give its experts to lorry moe with router.kind=arrow",
    ),
}


def find_left_out(word: Any) -> LeftOut | None:
    """The method that a word names: PEFT's type of adapter, or one of its settings (`use_bdlora`,
    `kasa_config`)."""
    if not isinstance(word, str):
        return None
    name = word.lower().replace("-", "_")
    return LEFT_OUT.get(name.removeprefix("use_").removesuffix("_config"))


def find_in_adapter(config: Mapping[str, Any]) -> tuple[str, LeftOut] | None:
    """(key, method) of an adapter_config.json that asks for one that is left out; None of any other."""
    if method := find_left_out(config.get("peft_type")):
        return "peft_type", method
    found = ((key, explain_setting(key, value)) for key, value in config.items())
    return next(((key, method) for key, method in found if method is not None), None)


def explain_setting(word: str, value: Any) -> LeftOut | None:
    """The method that a setting asks for: ``word`` names it and ``value`` does not say that it is off, or
    the value of a setting of methods names it."""
    if word in METHOD_SETTINGS:
        return find_left_out(value)
    # a bare `oft` or `arrow` may be anything
    names_it = word.startswith("use_") or word.endswith("_config") or word == "layer_replication"
    return find_left_out(word) if names_it and value not in OFF_VALUES else None
