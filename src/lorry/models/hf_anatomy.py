"""Where a foreign causal model keeps its layers, where its body ends, and what its own code does after that. Read, never edited.

Nothing is assumed from names alone: a body counts as found when the model's own forward, given that body's output for random
tokens, makes of it exactly the logits the whole model gives.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

PROBE = (2, 6)  # sequences and tokens of the proof


class _Outputs(BaseModelOutputWithPast):
    """Hidden states alone: whatever else a model's forward looks for (router logits, states to pass on) is absent."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands where a model's body stands and returns hidden states that are already there."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Outputs(last_hidden_state=self.hidden)


def find_layers(inner: Any) -> list[nn.Module]:
    """The list of decoder layers: the first module list as long as the config says."""
    count = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    lists = (m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return list(next(lists, ()))


def tail(inner: Any, body: str, hidden: Tensor) -> Tensor:
    """What the model's own forward makes of given hidden states [t,D]: the logits [t,V]. The model itself is not touched: a copy
    of its shell, sharing every layer, has the body replaced."""
    shell = node = copy.copy(inner)
    *parents, leaf = body.split(".")
    for name in parents:
        child = copy.copy(node._modules[name])
        node._modules = {**node._modules, name: child}
        node = child
    node._modules = {**node._modules, leaf: _Given(hidden[None])}
    ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
    return shell(input_ids=ids, use_cache=False).logits[0]


@torch.no_grad()
def find_body(inner: Any) -> tuple[str | None, bool]:
    """(path of the body, whether logits are plainly head(hidden)), proven on random tokens; (None, False) if nothing fits."""
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, PROBE, generator=torch.Generator().manual_seed(0)).to(inner.device)
    mask = torch.ones_like(ids)
    expected = inner(input_ids=ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1)
    paths = {id(m): p for p, m in inner.named_modules()}
    candidates = [paths.get(id(inner.get_decoder())), inner.base_model_prefix]
    head = inner.get_output_embeddings()
    for body in dict.fromkeys(c for c in candidates if c):
        try:
            out = inner.get_submodule(body)(input_ids=ids, attention_mask=mask, use_cache=False)
            hidden = out.last_hidden_state.flatten(0, 1)
            some = torch.arange(0, hidden.shape[0], 2, device=hidden.device)
            exact = all(_same(tail(inner, body, hidden[rows]), expected[rows]) for rows in (slice(None), some))
            plain = isinstance(head, nn.Linear) and _same(head(hidden), expected)
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError):
            continue  # this part cannot be called apart from the whole
        if exact:
            return body, plain
    return None, False


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of one matrix product done in another shape."""
    loose = torch.finfo(a.dtype).eps * 8
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=loose, atol=loose * float(b.float().abs().max()))
