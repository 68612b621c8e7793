"""A small double of slime (https://github.com/THUDM/slime), of its commit 624b824 (2026-08-21, version
0.3.1): the surface that `lorry.integrations.slime` stands on, under the names it has there, written anew.

It has the argument parser that ignores what it does not know, the model provider with its wrapper,
freezing and the order of DistributedDataParallel and optimizer, HF weights in, both converters (Llama and
Qwen2 / Qwen3), the backuper, the three full updaters (colocated, distributed, disk), `--save-hf`, the hooks and
the order of calls of a training actor. `megatron/training` beside it doubles what slime asks of the
Megatron-LM repository (1dcf0da), which megatron-core's wheel lacks.

Left out: Ray's processes and placement, SGLang (`tests/support/slime_engine.py` stands in), the rollout,
rewards and advantages, packed rows (frames here), NCCL and CUDA IPC (tensors are handed to the engine), offloading,
experts, multi-token prediction, quantised sync, delta sync, bridge mode, and the optimizer's state in checkpoints.
"""
