"""Routers of a mixture from prompts alone, as mergekit-moe makes them.

    routers = gates_from_prompts(model, tokenizer, prompts, "hidden")    # [E, d] of each layer

An expert's row is the mean over its positive prompts of a hidden state, minus that of its negative
ones, divided by its norm. `hidden` (`hidden_last`): of the prompt's last token, at the layer's
input; `hidden_avg`: the mean over the prompt; `cheap_embed`: the sum of its embeddings, the same for
every layer. The router of the stock classes reads the normed input of the MLP, which is another
vector: such gates are a start for training, and better than chance without. Each prompt is read by
itself: mergekit pads, and its `hidden_avg` counts the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorry.adapters.mix import AdapterContext, Mix
from lorry.errors import ConfigError
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.model import Decoder

SMALLEST_NORM = 1e-8  # mergekit's: below it a row is left as short as it is


class ExpertPrompts(NamedTuple):
    """Texts, or their token ids, that belong to an expert, and some that do not."""

    positive: Sequence[str | Sequence[int]]
    negative: Sequence[str | Sequence[int]] = ()


@torch.no_grad()
def gates_from_prompts(
    model: Decoder,
    tokenizer: Any,
    experts: Sequence[ExpertPrompts],
    mode: str,
    *,
    seed: int = 0,
) -> list[Tensor]:
    """[E, d] for each layer, of the base without adapters. mode: mergekit's gate_mode (hidden,
    hidden_last, hidden_avg, cheap_embed, random, uniform_random). Raises ConfigError for an expert
    without prompts, or two with the same.
    """
    layers, width = model.geometry.layers, model.geometry.width
    if mode in ("random", "uniform_random"):
        generator = torch.Generator().manual_seed(seed)
        shape = (layers, len(experts), width)
        if mode == "random":
            return list(torch.randn(shape, generator=generator))
        bound = math.sqrt(1 / width)
        return list(torch.rand(shape, generator=generator) * 2 * bound - bound)
    for number, expert in enumerate(experts):
        if not expert.positive:
            raise ConfigError(
                f"experts.{number} has no positive_prompts, from which its gate is made"
            )
        if expert in experts[:number]:
            raise ConfigError(
                f"experts.{experts.index(expert)} and experts.{number} have the same prompts; their gates "
                "would be equal"
            )
    rows = []
    for expert in experts:
        row = _prompt_states(model, tokenizer, expert.positive, mode)
        if expert.negative:
            row = row - _prompt_states(model, tokenizer, expert.negative, mode)
        rows.append(row / row.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM))
    # [E, L, d] -> L of [E, d]
    return list(torch.stack(rows).transpose(0, 1).contiguous())


def _prompt_states(
    model: Decoder, tokenizer: Any, prompts: Sequence[str | Sequence[int]], mode: str
) -> Tensor:
    """[L, d]: the mean over ``prompts``."""
    states = []
    for prompt in prompts:
        if isinstance(prompt, str):
            text = f"{tokenizer.bos_token or ''}{prompt}"
            ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = prompt
        if not ids:
            raise ConfigError(f"the prompt {prompt!r} has no tokens")
        with model.layer_weights.forward_pass():
            embedded = model.embed.weight[torch.tensor(ids, device=model.device)].float()
        if mode == "cheap_embed":
            states.append(embedded.sum(dim=0).expand(model.geometry.layers, -1))
            continue
        before_last = range(model.geometry.layers - 1)
        outputs = model.hidden(
            PackedInput.of([ids], model.device),
            AdapterContext(Mix.none()),
            output_layers=before_last,
        ).layer_outputs
        # what goes into each layer, [L, t, d]
        inputs = torch.stack([embedded, *(outputs[layer].float() for layer in before_last)])
        states.append(inputs.mean(dim=1) if mode == "hidden_avg" else inputs[:, -1])
    return torch.stack(states).mean(dim=0).cpu()
