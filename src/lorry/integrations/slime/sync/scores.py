"""Log-probabilities of fixed prompts' greedy answers, by Megatron's model and by the engines that were
just sent its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor
from transformers import AutoTokenizer

from lorry.integrations.megatron.attach import disable_lora, list_chunks

# read by every version alike; what they say does not matter
TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "2 + 2 * 3 =",
    "def add(a, b):\n    return",
    "The opposite of hot is",
    "Once upon a time there was",
    "To be or not to be,",
    "The days of the week are Monday,",
)
Rows = Sequence[Sequence[int]]


def fixed_prompts(checkpoint: str, vocab: int) -> list[list[int]]:
    """Token ids of the fixed prompts; without a tokenizer, fixed ids."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError):
        return [[(7 * row + 3 * place) % vocab for place in range(6)] for row in range(len(TEXTS))]
    return [list(tokenizer(text)["input_ids"]) for text in TEXTS]


@torch.no_grad()
def answer_log_probs(
    model: Sequence[Any],
    prompts: Rows,
    answers: Rows,
    vocab: int,
    *,
    base: bool = False,
    temperature: float = 1.0,
) -> list[list[float]]:
    """log p of every token of each answer at a temperature, by the policy, or by its base alone; on every
    rank. Every rank calls it."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    multiple = parallel_state.get_tensor_model_parallel_world_size()
    length = -(-max(map(len, rows)) // multiple) * multiple
    frame = torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        frame[number, : len(row)] = torch.tensor(row)
    frame = frame.to(next(list_chunks(model)[0].parameters()).device)
    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        with disable_lora(model) if base else nullcontext():
            values = _next_token_scores(model, frame, vocab, temperature)
    finally:
        for chunk, mode in zip(model, training, strict=True):
            chunk.train(mode)
    return [
        values[number, len(prompt) - 1 : len(prompt) - 1 + len(answer)].tolist()
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def _next_token_scores(
    model: Sequence[Any], frame: Tensor, vocab: int, temperature: float
) -> Tensor:
    """[rows, length - 1] log p of each token that came next, from the last stage to all."""
    rows, length = frame.shape
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=frame.device).triu(1)
    positions = torch.arange(length, device=frame.device).expand(rows, length)

    def step(data: Iterator[Tensor], chunk: Any) -> tuple[Tensor, Any]:
        logits = chunk(frame, positions, mask)

        def collect(output: Tensor, non_loss_data: bool = True) -> Tensor:
            whole = gather_from_tensor_model_parallel_region(output)[:, :-1, :vocab]
            scores: Tensor = (whole.float() / temperature).log_softmax(-1)
            return scores.gather(2, frame[:, 1:, None]).squeeze(2)

        return logits, collect

    chunks = list(model)
    collected = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(()) for _ in chunks] if len(chunks) > 1 else iter(()),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    values = collected[0] if collected else torch.zeros(rows, length - 1, device=frame.device)
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(values, last, group=group)
    return values.cpu()
