"""What several families share: reading rotary settings, and config keys that never change the
computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorry.families import ConfigMapping, RotaryConfig


class UnsupportedConfigError(ValueError):
    """A config value outside what the native decoder computes; the loader turns to transformers and
    says so.
    """


def always_harmless(value: Any, config: ConfigMapping) -> bool:
    """The key never changes the logits of a frozen, evaluated base."""
    return True


# Bookkeeping, initialisation, generation defaults and the base's own dropout (which is off during
# LoRA training).
METADATA_KEYS: dict[str, Callable[[Any, ConfigMapping], bool]] = dict.fromkeys(
    [
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "cls_token_id",
        "decoder_start_token_id",
        "unk_token_id",
        "attention_dropout",
        "hidden_dropout",
        "classifier_dropout",
        "embd_pdrop",
        "attn_pdrop",
        "resid_pdrop",
        "pretraining_tp",
        "tie_word_embeddings",
        "task_specific_params",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "name_or_path",
        "_name_or_path",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "is_decoder",
        "prefix",
        "finetuning_task",
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
        "_experts_implementation",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "n_ctx",
        "n_special",
        "predict_special_tokens",
        "max_length",
        "do_sample",
        "gradient_checkpointing",
    ],
    always_harmless,
)


def is_full_attention(value: Any, config: ConfigMapping) -> bool:
    """`layer_types` is harmless when every layer attends to everything."""
    return value is None or all(kind == "full_attention" for kind in value)


def is_wide_window(value: Any, config: ConfigMapping) -> bool:
    """A sliding window is harmless when absent, switched off, or no shorter than the context."""
    if value is None or config.get("use_sliding_window") is False:
        return True
    return value >= config["max_position_embeddings"]


def read_rotary(
    config: ConfigMapping,
    head_dim: int,
    *,
    default_theta: float = 10000.0,
    default_share: float = 1.0,
) -> RotaryConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling`/`rotary_pct` (before).

    Raises UnsupportedConfig for scaling rules the decoder does not compute (dynamic, yarn,
    longrope).
    """
    new: dict[str, Any] = config.get("rope_parameters") or {}
    rule: dict[str, Any] = {**(config.get("rope_scaling") or {}), **new}
    kind = rule.get("rope_type", rule.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedConfigError(f"rope_type={kind!r}")
    flat = {"rope_theta": default_theta, "partial_rotary_factor": default_share}
    for target, old in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        found = [
            source[key]
            for source, key in ((new, target), (config, target), (config, old))
            if source.get(key) is not None
        ]
        flat[target] = float(found[0]) if found else flat[target]
    numbers = {
        k: float(v)
        for k, v in rule.items()
        if k
        in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    }
    return RotaryConfig(
        theta=flat["rope_theta"],
        dim=int(head_dim * flat["partial_rotary_factor"]),
        kind=kind,
        scaling=numbers,
    )


ROTARY_KEYS = frozenset(
    {
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "rotary_pct",
        "rotary_emb_base",
    }
)
