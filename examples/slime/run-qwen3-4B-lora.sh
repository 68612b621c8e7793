#!/bin/bash
# LoRA on Qwen3-4B by slime's GRPO: one node of 8 GPUs, training and rollouts on the same ones.
#
#   SLIME=/root/slime MEGATRON=/root/Megatron-LM bash run-qwen3-4B-lora.sh
#
# Needs Ray running (ray start --head --num-gpus 8), slime and Lorry in one environment, and under $DATA:
# Qwen3-4B (Hugging Face's directory), dapo-math-17k/dapo-math-17k.jsonl. docs/slime.md says what each
# of LoRA's flags does.
set -euo pipefail

SLIME=${SLIME:-/root/slime}
MEGATRON=${MEGATRON:-/root/Megatron-LM}
DATA=${DATA:-/root}
OUTPUT=${OUTPUT:-$DATA/Qwen3-4B-lora}

LORA_ARGS=(
  --use-lora
  --lora-r 8
  --lora-alpha 16.0
  --lora-dropout 0.0 # above 0 not with --recompute-granularity full: masks would be drawn twice
  --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2
  --lora-only-trainable
  --lora-sync merged
  --lora-check-every 1
  --custom-model-provider-path lorry.integrations.slime.model_provider
  --custom-megatron-init-path lorry.integrations.slime.install
  --custom-megatron-before-log-prob-hook-path lorry.integrations.slime.before_log_prob
  --custom-megatron-before-train-step-hook-path lorry.integrations.slime.before_train_step
  # --colocate gives up the trainer's memory while weights are sent: answers are compared behind a rollout
  --rollout-data-postprocess-path lorry.integrations.slime.compare_rollout
)

# the reference is the base alone: the same directory, and no second model in memory
CHECKPOINT_ARGS=(
  --hf-checkpoint "$DATA/Qwen3-4B"
  --ref-load "$DATA/Qwen3-4B"
  --load "$OUTPUT"
  --save "$OUTPUT"
  --save-interval 20
)

ROLLOUT_ARGS=(
  --prompt-data "$DATA/dapo-math-17k/dapo-math-17k.jsonl"
  --input-key prompt
  --label-key label
  --apply-chat-template
  --rollout-shuffle
  --rm-type deepscaler
  --num-rollout 300
  --rollout-batch-size 16
  --n-samples-per-prompt 8
  --rollout-max-response-len 8192
  --rollout-temperature 1.0
  --global-batch-size 128
  --balance-data
)

ALGORITHM_ARGS=(
  --advantage-estimator grpo
  --use-kl-loss
  --kl-loss-coef 0.001
  --kl-loss-type low_var_kl
  --eps-clip 0.2
  --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
  --optimizer adam
  --lr 2e-4 # two hundred times what all weights would want
  --lr-decay-style constant
  --weight-decay 0.0 # of B it would pull the policy to the base
  --adam-beta1 0.9
  --adam-beta2 0.98
)

LAYOUT_ARGS=(
  --tensor-model-parallel-size 2
  --sequence-parallel
  --pipeline-model-parallel-size 1
  --recompute-granularity full
  --recompute-method uniform
  --recompute-num-layers 1
  --use-dynamic-batch-size
  --max-tokens-per-gpu 9216
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --accumulate-allreduce-grads-in-fp32
  --attention-softmax-in-fp32
  --attention-backend flash
  --rollout-num-gpus-per-engine 2
  --sglang-mem-fraction-static 0.7
)

# slime's own: MODEL_ARGS
# shellcheck source=/dev/null
source "$SLIME/scripts/models/qwen3-4B.sh"

cd "$SLIME"
ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" \
  --runtime-env-json "{\"env_vars\": {\"PYTHONPATH\": \"$SLIME:$MEGATRON\", \"CUDA_DEVICE_MAX_CONNECTIONS\": \"1\"}}" \
  -- python3 -m lorry.integrations.slime.train \
  --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate \
  "${MODEL_ARGS[@]}" "${LORA_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" \
  "${ALGORITHM_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${LAYOUT_ARGS[@]}"
