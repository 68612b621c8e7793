"""LoRA in slime's reinforcement learning, by slime's own hooks: no file of slime's or Megatron's changes.

    python -m lorry.integrations.slime.train \
      --use-lora --lora-r 16 --lora-target-modules linear_qkv linear_proj --lora-only-trainable \
      --custom-model-provider-path lorry.integrations.slime.model_provider \
      --custom-megatron-init-path lorry.integrations.slime.install \
      --custom-megatron-before-log-prob-hook-path lorry.integrations.slime.before_log_prob \
      --custom-megatron-before-train-step-hook-path lorry.integrations.slime.before_train_step \
      ...                                                # slime's flags as they are

Importing this needs neither slime nor Megatron; what is called does. docs/slime.md is the manual.
"""

from lorry.integrations.slime.hooks import before_log_prob, before_train_step
from lorry.integrations.slime.install import install
from lorry.integrations.slime.provider import model_provider
from lorry.integrations.slime.sync.rollouts import compare_rollout

__all__ = ["before_log_prob", "before_train_step", "compare_rollout", "install", "model_provider"]
