"""What several families share: reading rotary settings, and config keys that never change the
computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorry.families.family import ConfigMapping, RotaryConfig


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
    # no token then has one beyond the window before it
    return value >= config["max_position_embeddings"]


def read_rotary(
    config: ConfigMapping,
    head_dim: int,
    *,
    default_theta: float = 10000.0,
    default_partial_factor: float = 1.0,
) -> RotaryConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling`/`rotary_pct` (before).

    Raises UnsupportedConfigError for scaling rules the decoder does not compute (dynamic, yarn,
    longrope).
    """
    # transformers 5's name wins where both are there, as transformers itself reads it
    new: dict[str, Any] = config.get("rope_parameters") or {}
    rule: dict[str, Any] = {**(config.get("rope_scaling") or {}), **new}
    # "type" is what files before transformers 4.43 call it
    kind = rule.get("rope_type", rule.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedConfigError(f"rope_type={kind!r}")
    # both names for each number: GPT-NeoX's old keys differ from everybody else's
    settings = {"rope_theta": default_theta, "partial_rotary_factor": default_partial_factor}
    for target, old in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        values = [
            source[key]
            for source, key in ((new, target), (config, target), (config, old))
            if source.get(key) is not None
        ]
        settings[target] = float(values[0]) if values else settings[target]
    scaling = {
        k: float(v)
        for k, v in rule.items()
        if k
        in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    }
    return RotaryConfig(
        theta=settings["rope_theta"],
        # truncated, as transformers does: a share of a head need not be whole
        dim=int(head_dim * settings["partial_rotary_factor"]),
        kind=kind,
        scaling=scaling,
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
