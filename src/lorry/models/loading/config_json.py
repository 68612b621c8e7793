"""config.json between versions and libraries: infinities, rotary settings and expert counts as
everybody reads them.

    config = decoded(read_json(path))          # {"__float__": "Infinity"} -> inf
    write_config(folder, {"dtype": "bfloat16"})

The rule: a config that Lorry writes means the same to every reader of its model type. transformers
5 gathers the rotary settings in `rope_parameters` and writes nothing else; transformers 4, mlx-lm
and others read `rope_theta`, `rope_scaling` and `partial_rotary_factor` (GPT-NeoX:
`rotary_emb_base`, `rotary_pct`; Gemma 3: `rope_local_base_freq` as well) and take their defaults,
theta 10000 and no scaling, where these are absent: another model, and nobody says so. So both are
written; the number of experts, too, goes under each of its names. An infinity is written as
Python's `Infinity`, which transformers 4 and 5 and mlx-lm read; the tagged form only transformers 5
does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

FLOAT_TAG = "__float__"
TAGGED_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
FULL, SLIDING = "full_attention", "sliding_attention"
# model_type -> the older names of theta and of the share of a head that turns
LEGACY_ROPE_NAMES = dict.fromkeys(
    ("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct")
)
# model_type -> the older names of theta in layers of full and of sliding attention
LAYERED_ROPE_NAMES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", None),
}
# names that one and the same field has had
EXPERT_COUNT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
# all that transformers 4 lets Phi-3's rope_scaling hold
LONGROPE_KEYS = (
    "type",
    "short_factor",
    "long_factor",
)


def decode_tagged_floats(value: Any) -> Any:
    """JSON values with transformers 5's tagged floats as the floats they stand for, at every depth."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT_TAG} and isinstance(value[FLOAT_TAG], str):
            return TAGGED_FLOATS.get(value[FLOAT_TAG], value)
        return {key: decode_tagged_floats(inner) for key, inner in value.items()}
    return [decode_tagged_floats(inner) for inner in value] if isinstance(value, list) else value


def write_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Write ``folder/config.json`` again with ``changes`` and with what older readers look for."""
    path = folder / "config.json"
    config = {**decode_tagged_floats(json.loads(path.read_text(encoding="utf-8"))), **changes}
    path.write_text(json.dumps(add_legacy_rope_fields(config), indent=2) + "\n", encoding="utf-8")


def add_legacy_rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with its rotary settings under the older names too, in parts (`text_config` ...)
    as well.

    Names that this transformers would then read as something else are left out again.
    """
    fields = {
        key: add_legacy_rope_fields(part) if isinstance(part, dict) else part
        for key, part in config.items()
    }
    # imported here: a config is written at the end of a command, and not of every one
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return fields
    aliases: Mapping[str, str] = CONFIG_MAPPING[kind].attribute_map
    # every name the field has had, since readers know different ones
    fields |= {
        alias: fields[name]
        for alias, name in aliases.items()
        if alias in EXPERT_COUNT_KEYS and name in fields
    }
    rope = config.get("rope_parameters")
    # kept only if this transformers still reads the same rotary settings from it
    older = {**fields, **(_legacy_rope_fields(rope, kind) if isinstance(rope, dict) else {})}
    return (
        older if _read_rope_settings(kind, older) == _read_rope_settings(kind, config) else fields
    )


def _legacy_rope_fields(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The older fields for `rope_parameters`, {} where none are known."""
    # rotary settings by kind of layer (Gemma 3)
    if FULL in rope:
        if kind not in LAYERED_ROPE_NAMES or not isinstance(rope[FULL], dict):
            return {}
        names = zip(LAYERED_ROPE_NAMES[kind], (rope[FULL], rope.get(SLIDING)), strict=True)
        thetas = {
            name: part["rope_theta"]
            for name, part in names
            if name and part and "rope_theta" in part
        }
        # older readers apply scaling to layers of full attention alone
        return {**thetas, "rope_scaling": _legacy_rope_scaling(rope[FULL])}
    theta, share = LEGACY_ROPE_NAMES.get(kind, ("rope_theta", "partial_rotary_factor"))
    parts = {theta: rope.get("rope_theta"), share: rope.get("partial_rotary_factor")}
    return {name: value for name, value in parts.items() if value is not None} | {
        "rope_scaling": _legacy_rope_scaling(rope)
    }


def _legacy_rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` as it was: no theta, None without a scaling, and its kind under both of the
    names it has had.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    scaling = {**scaling, "rope_type": kind, "type": kind}
    return (
        {key: scaling[key] for key in LONGROPE_KEYS}
        if kind == "longrope" and scaling.keys() >= set(LONGROPE_KEYS)
        else scaling
    )


def _read_rope_settings(kind: str, config: Mapping[str, Any]) -> Any:
    """The rotary settings that this transformers reads from a config, without the second name of
    their kind.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _without_type(
        CONFIG_MAPPING[kind].from_dict(deepcopy(dict(config))).to_dict().get("rope_parameters")
    )


def _without_type(rope: Any) -> Any:
    return (
        {k: _without_type(v) for k, v in rope.items() if k != "type"}
        if isinstance(rope, dict)
        else rope
    )
