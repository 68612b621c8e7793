"""Model and optimizer in slime's order, scoring passes and training steps with their hooks."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.training.global_vars import get_args
from megatron.training.training import get_model
from torch import Tensor

from slime.utils.misc import load_function

from .checkpoint import load_checkpoint, save_checkpoint
from .model_provider import get_model_provider_func


def setup_model_and_optimizer(args: Namespace, role: str = "actor") -> tuple[list[Any], Any, Any]:
    """Provider, freeze, DistributedDataParallel, optimizer; (chunks, optimizer, scheduler)."""
    assert args.load is not None
    model = get_model(get_model_provider_func(args, role))
    known = {
        f.name: getattr(args, f.name)
        for f in dataclasses.fields(OptimizerConfig)
        if hasattr(args, f.name)
    }
    optimizer = get_megatron_optimizer(OptimizerConfig(**known), model)
    return model, optimizer, None


def initialize_model_and_optimizer(
    args: Namespace, role: str = "actor"
) -> tuple[list[Any], Any, Any, int]:
    model, optimizer, scheduler = setup_model_and_optimizer(args, role)
    model[0].role = role
    iteration, _ = load_checkpoint(model, optimizer, scheduler, checkpointing_context={})
    return model, optimizer, scheduler, iteration


@torch.no_grad()
def forward_only(
    args: Namespace, model: Sequence[Any], rows: Tensor, store_prefix: str = ""
) -> dict[str, Tensor]:
    """{prefix + "log_probs": [rows, length - 1]} of a frame of tokens, on the last stage."""
    for chunk in model:
        chunk.eval()
    if args.custom_megatron_before_log_prob_hook_path:
        load_function(args.custom_megatron_before_log_prob_hook_path)(args, model, store_prefix)

    def step(data: Iterator[Tensor], chunk: Any) -> tuple[Tensor, Any]:
        tokens, logits = _forward(args, data, chunk)
        return logits, lambda output: (
            torch.zeros(()),
            {"log_probs": log_probs(args, output, tokens)},
        )

    stored = _schedule(args, model, rows, step, forward_only=True)
    for chunk in model:
        chunk.train()
    if not parallel_state.is_pipeline_last_stage():
        return {}
    return {f"{store_prefix}log_probs": torch.cat([each["log_probs"] for each in stored])}


def train_one_step(
    args: Namespace,
    rollout_id: int,
    step_id: int,
    data: dict[str, Tensor],
    model: Sequence[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
) -> float:
    """A step of policy gradient; `--use-kl-loss` adds the KL to ``ref_log_probs``. The loss."""
    args = get_args()
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    if args.custom_megatron_before_train_step_hook_path:
        load_function(args.custom_megatron_before_train_step_hook_path)(
            args, rollout_id, step_id, model, optimizer, opt_param_scheduler
        )
    done = iter(range(len(data["tokens"])))

    def step(rows: Iterator[Tensor], chunk: Any) -> tuple[Tensor, Any]:
        tokens, logits = _forward(args, rows, chunk)
        number = next(done)

        def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            own = log_probs(args, output, tokens)
            total = -(own * data["advantages"][number]).mean()
            if args.use_kl_loss:
                gap = data["ref_log_probs"][number] - own
                total = total + args.kl_loss_coef * (gap.exp() - gap - 1).mean()
            return total, {"loss": total.detach()}

        return logits, loss

    stored = _schedule(args, model, data["tokens"], step, forward_only=False)
    updated, _, _ = optimizer.step()
    assert updated
    return float(sum(float(each["loss"]) for each in stored)) / max(len(stored), 1)


def train(
    rollout_id: int,
    model: Sequence[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
    data: dict[str, Tensor],
    num_steps: int = 1,
) -> list[float]:
    args = get_args()
    return [
        train_one_step(args, rollout_id, step_id, data, model, optimizer, opt_param_scheduler)
        for step_id in range(num_steps)
    ]


def save(iteration: int, model: Sequence[Any], optimizer: Any, opt_param_scheduler: Any) -> None:
    save_checkpoint(iteration, model, optimizer, opt_param_scheduler)


def log_probs(args: Namespace, logits: Tensor, tokens: Tensor) -> Tensor:
    """[rows, length - 1] of the tokens that came next, from a rank's part of the vocabulary."""
    whole = gather_from_tensor_model_parallel_region(logits)[..., : args.vocab_size]
    return whole[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)


def _forward(args: Namespace, data: Iterator[Tensor], chunk: Any) -> tuple[Tensor, Tensor]:
    tokens = next(data)[None]
    length = tokens.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length), 1).bool()
    return tokens, chunk(tokens, torch.arange(length)[None], mask)


def _schedule(
    args: Namespace, model: Sequence[Any], rows: Tensor, step: Any, *, forward_only: bool
) -> list[Any]:
    """A micro-batch a row."""
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(rows),
        model=model[0],
        num_microbatches=len(rows),
        seq_length=rows.shape[1],
        micro_batch_size=1,
        forward_only=forward_only,
    )
