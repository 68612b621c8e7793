"""Families against transformers: where weights lie, what a config means, and that no field which
changes a model is ignored.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorry.families import ModelFamily, find_family, unsupported_fields
from lorry.families.common import UnsupportedConfigError

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
TINY: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 12},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 40},
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
}
IDS = torch.arange(24).reshape(2, 12)


def family_of(kind: str) -> ModelFamily:
    family = find_family(kind)
    assert family is not None
    return family


def config_of(kind: str, **changes: Any) -> Any:
    return CONFIG_MAPPING[kind](**{**TINY[kind], "bos_token_id": 1, "eos_token_id": 2, **changes})


def defaults_of(kind: str) -> dict[str, Any]:
    return CONFIG_MAPPING[kind]().to_dict()


@cache
def base(kind: str) -> Any:
    """A tiny transformers model whose weights are large enough for every detail to show, biases and
    norms included.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_of(kind), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def shapes(kind: str, **changes: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(kind, **changes))
    return {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}


VARIANTS = [(kind, {}) for kind in TINY] + [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "head_dim": 16}),
    ("llama", {"num_key_value_heads": None}),
    ("qwen3", {"attention_bias": True}),
    ("gpt2", {"n_inner": 80}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("gpt_neox", {"attention_bias": False}),
    ("gpt_neox", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(
    ("kind", "changes"), VARIANTS, ids=[f"{k} {' '.join(c)}".strip() for k, c in VARIANTS]
)
def test_a_family_names_every_parameter_and_its_shape(kind: str, changes: dict[str, Any]) -> None:
    """The state dict written down from the family and the geometry alone equals that of
    transformers' model.
    """
    family = family_of(kind)
    g = family.geometry(config_of(kind, **changes).to_dict())
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    attention = (
        [(q, g.width), (kv, g.width), (kv, g.width), (g.width, q)]
        if family.qkv == "separate"
        else [(3 * q, g.width), (g.width, q)]
    )
    mlp = [(g.mlp_width, g.width)] * (2 if family.gated else 1) + [(g.width, g.mlp_width)]
    norm = ("weight", "bias") if family.norm == "layer" else ("weight",)
    written = {
        f"{family.embed}.weight": (g.vocab, g.width),
        f"{family.head}.weight": (g.vocab, g.width),
    }
    if family.positions:
        written[f"{family.positions}.weight"] = (g.context, g.width)
    for part in norm:
        written[f"{family.final_norm}.{part}"] = (g.width,)
    for i in range(g.layers):
        prefix = family.layer.format(i=i)
        for target, (out, into) in zip(family.targets, attention + mlp, strict=True):
            written[f"{family.path(target, i)}.weight"] = (
                (into, out) if family.transposed else (out, into)
            )
            if target in g.biased:
                written[f"{family.path(target, i)}.bias"] = (out,)
        for path, width in [
            (family.norms.attn, g.width),
            (family.norms.mlp, g.width),
            *((p, g.head_dim) for p in (family.norms.q, family.norms.k) if p is not None),
        ]:
            for part in norm:
                written[f"{prefix}.{path}.{part}"] = (width,)
    assert written == shapes(kind, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(kind, **changes))
    model.tie_weights()
    assert g.tied is (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def test_a_family_gives_every_target_one_role() -> None:
    family = family_of("llama")
    forgotten = family.roles._replace(mlp_in=("gate_proj",))
    with pytest.raises(ValueError, match=r"roles .* do not match the targets"):
        replace(family, roles=forgotten)
    with pytest.raises(ValueError, match="do not fit qkv=heads, gated=True"):
        replace(family, qkv="heads")


@pytest.mark.parametrize("kind", TINY)
def test_transformers_default_config_of_every_family(kind: str) -> None:
    defaults = defaults_of(kind)
    odd = unsupported_fields(family_of(kind), defaults, defaults)
    assert odd == (["sliding_window=4096"] if kind == "mistral" else []), (
        "Mistral's default is a window of 4096 of 131072"
    )
    assert family_of(kind).geometry(defaults).layers == CONFIG_MAPPING[kind]().num_hidden_layers


def test_strangers() -> None:
    for kind in ("gemma2", "phi3", "mixtral", "bert", "smollm3", "", "LLAMA"):
        assert find_family(kind) is None
    assert family_of("mistral") is family_of("llama")


STRANGE: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 16}, "sliding_window=16"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "sliding_window=16",
    ),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
]


@pytest.mark.parametrize(
    ("kind", "changes", "word"), STRANGE, ids=[f"{k} {next(iter(c))}" for k, c, _ in STRANGE]
)
def test_what_the_decoder_cannot_do_is_named(kind: str, changes: dict[str, Any], word: str) -> None:
    found = unsupported_fields(
        family_of(kind), config_of(kind, **changes).to_dict(), defaults_of(kind)
    )
    assert any(word in f for f in found)


def test_a_softcap_on_a_family_that_has_none() -> None:
    """A key that transformers' own config class knows and the family does not: reported. One it
    ignores too: not.
    """
    config, defaults = config_of("llama").to_dict(), defaults_of("llama")
    capped = {**config, "final_logit_softcapping": 30.0}
    assert unsupported_fields(
        family_of("llama"), capped, {**defaults, "final_logit_softcapping": None}
    ) == ["final_logit_softcapping=30.0"]
    assert unsupported_fields(family_of("llama"), capped, defaults) == []


@pytest.mark.parametrize("rule", ["yarn", "dynamic", "longrope", "su", "mrope"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("word", ["rope_type", "type"])
def test_unusual_rotary_scaling_is_refused(rule: str, key: str, word: str) -> None:
    config = {
        **config_of("llama").to_dict(),
        "rope_parameters": None,
        key: {word: rule, "factor": 4.0},
    }
    with pytest.raises(UnsupportedConfigError, match=rule):
        family_of("llama").geometry(config)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_partial_rotary_factor_is_left_to_transformers(kind: str) -> None:
    """It is inconsistent there: under the default rule these classes do not read it, under `linear`
    they do.
    """
    reference = logits(kind)
    rule = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    for changes in ({"rope_parameters": rule}, {"partial_rotary_factor": 0.5}):
        assert torch.equal(logits(kind, **changes), reference)
        with pytest.raises(UnsupportedConfigError, match=r"partial_rotary_factor=0\.5"):
            family_of(kind).geometry(config_of(kind, **changes).to_dict())


def test_windows_no_shorter_than_the_context_are_harmless() -> None:
    for window, harmless in ((None, True), (64, True), (100, True), (63, False), (1, False)):
        config = config_of("mistral", sliding_window=window).to_dict()
        assert (
            unsupported_fields(family_of("mistral"), config, defaults_of("mistral")) == []
        ) is harmless
    config = config_of("qwen2", sliding_window=8, use_sliding_window=False).to_dict()
    assert unsupported_fields(family_of("qwen2"), config, defaults_of("qwen2")) == []


def logits(kind: str, **changes: Any) -> Tensor | None:
    """What transformers computes with one field changed and the weights as they are; None if it
    will not run so.
    """
    try:
        config = config_of(kind, **changes)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        model.load_state_dict(base(kind).state_dict())
        with torch.no_grad():
            return model(input_ids=IDS, use_cache=False, return_dict=True).logits
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        ZeroDivisionError,
        StrictDataclassError,
    ):
        return None


def other_values(value: Any) -> list[Any]:
    """A few values a field might have instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, 3]
    if isinstance(value, float):
        return [value * 2 + 0.5]
    if isinstance(value, str):
        return ["relu", "sliding_attention"]
    if isinstance(value, list):
        return [["sliding_attention"] * len(value)]
    if isinstance(value, dict) and "rope_theta" in value:
        slower = {"factor": 4.0, "original_max_position_embeddings": 4}
        rules: list[dict[str, Any]] = [
            {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "yarn", **slower},
        ]
        rules += [
            {"rope_type": "dynamic", **slower},
            {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **slower},
        ]
        return [
            {**value, **rule}
            for rule in [{"rope_theta": 77.0}, {"partial_rotary_factor": 0.5}, *rules]
        ]
    return [True, 4, 0.5]


# Fields of Qwen that do nothing alone.
COMPANY: dict[str, dict[str, Any]] = {
    "sliding_window": {"use_sliding_window": True, "max_window_layers": 0},
    "use_sliding_window": {"sliding_window": 3, "max_window_layers": 0},
    "layer_types": {"use_sliding_window": True, "sliding_window": 3},
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 3},
}


@pytest.mark.parametrize("kind", TINY)
def test_no_field_that_changes_transformers_logits_is_ignored(kind: str) -> None:
    """Every field of the config class, changed one by one with the same weights: where the logits
    move, the family must have read the field (another geometry) or report it."""
    family, defaults, plain = family_of(kind), defaults_of(kind), config_of(kind).to_dict()
    geometry, reference = family.geometry(plain), logits(kind)
    assert reference is not None
    moved = 0
    for key in sorted(defaults):
        if key in ("vocab_size", "model_type", "architectures", "num_hidden_layers", "n_layer"):
            continue
        for value in other_values(plain[key]):
            together = COMPANY.get(key, {}) if kind.startswith("qwen") else {}
            got = logits(kind, **{key: value, **together})
            if got is None or torch.equal(got, reference):
                continue
            moved += 1
            config = config_of(kind, **{key: value, **together}).to_dict()
            try:
                seen = (
                    unsupported_fields(family, config, defaults) != []
                    or family.geometry(config) != geometry
                )
            except UnsupportedConfigError:
                seen = True
            assert seen, f"{key}={value!r} changes the logits and nobody noticed"
    assert moved >= 2, "the test itself must see something"


@given(st.sampled_from(["linear", "llama3", "default"]), st.floats(1, 1e7), st.floats(1, 64))
@settings(max_examples=30, deadline=None)
def test_rotary_settings_old_and_new_spelling_agree(kind: str, theta: float, factor: float) -> None:
    rule = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    rule = (
        {}
        if kind == "default"
        else {k: v for k, v in rule.items() if kind == "llama3" or k == "factor"}
    )
    plain = {k: v for k, v in config_of("llama").to_dict().items() if not k.startswith("rope")}
    old = {**plain, "rope_theta": theta, "rope_scaling": {"type": kind, **rule} if rule else None}
    new = {**plain, "rope_parameters": {"rope_theta": theta, "rope_type": kind, **rule}}
    for config in (old, new):
        rotary = family_of("llama").geometry(config).rotary
        assert rotary is not None
        assert rotary.kind == kind
        assert math.isclose(rotary.theta, theta)
        assert rotary.scaling == {k: float(v) for k, v in rule.items()}
