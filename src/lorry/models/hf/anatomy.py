"""Where a foreign causal model keeps its layers, where its body ends, and what its own code does
after that. Read, never edited.

Nothing is assumed from names alone: a body counts as found when the model's own forward, given that
body's output for random tokens, makes of it exactly the logits the whole model gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.mix import Half

PROBE = (2, 6)  # sequences and tokens of the proof
MAX_TEXT_TOKENS = 4096  # different tokens that random sequences are made of


class _HiddenOnlyOutput(BaseModelOutputWithPast):
    """Hidden states alone: whatever else a model's forward looks for (router logits, states to pass
    on) is absent.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _PrecomputedBody(nn.Module):
    """Stands where a model's body stands and returns hidden states that are already there."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _HiddenOnlyOutput(last_hidden_state=self.hidden)


def find_layers(inner: Any) -> list[nn.Module]:
    """The list of decoder layers: the first module list as long as the config says."""
    count = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    # by length: "layers", "h", "blocks" are names, and encoders have lists as well
    lists = (m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return list(next(lists, ()))


@torch.no_grad()
def find_halves(
    inner: Any, layers: Sequence[nn.Module]
) -> tuple[dict[tuple[int, Half], nn.Module], int]:
    """({(layer, attn or mlp): the module that is that half}, the width of what they read). Empty where
    a layer has not exactly two parts with matrices that read the hidden states of all tokens, one of
    which, the MLP, makes of a token the same whoever stands before it.
    """
    # by layer, of each part that was called: it, whether it is token by token, what it reads
    seen: list[list[tuple[nn.Module, bool, int]]] = [[] for _ in layers]
    ids, trying = _random_ids(inner), list[nn.Module]()

    def note(parts: list[tuple[nn.Module, bool, int]]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            is_whole = isinstance(x, Tensor) and x.is_floating_point() and x.shape[:-1] == PROBE
            if trying or not is_whole:
                return
            trying.append(module)  # its own call below is none of the model's
            # here and not afterwards: some layers add to what a part gave in place
            parts.append((module, _is_token_wise(module, args, kwargs, out), x.shape[-1]))
            trying.clear()

        return hook

    with ExitStack() as hooks:
        for layer, parts in zip(layers, seen, strict=True):
            for child in layer.children():
                # norms have vectors alone
                if any(p.dim() > 1 for p in child.parameters()):
                    hook = child.register_forward_hook(note(parts), with_kwargs=True)
                    hooks.callback(hook.remove)
        inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    halves: dict[tuple[int, Half], nn.Module] = {}
    for i, parts in enumerate(seen):
        if sorted(token_wise for _, token_wise, _ in parts) != [False, True]:
            return {}, 0
        for module, token_wise, _ in parts:
            halves[i, "mlp" if token_wise else "attn"] = module
    widths = {width for parts in seen for *_, width in parts}
    # a module that several layers share has no layer of its own
    distinct = len({id(module) for module in halves.values()}) == 2 * len(layers)
    return (halves, widths.pop()) if distinct and len(widths) == 1 else ({}, 0)


def _is_token_wise(module: nn.Module, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether each sequence's last token alone gets of a module what it gets behind the others."""

    def last(value: Any) -> Any:
        is_whole = isinstance(value, Tensor) and value.shape[:2] == PROBE
        return value[:, -1:] if is_whole else value

    whole = out if isinstance(out, Tensor) else out[0]
    try:
        alone = module(*map(last, args), **{name: last(value) for name, value in kwargs.items()})
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError):
        return False  # attention, whose mask and positions are those of all tokens
    return _equal_to_rounding(alone if isinstance(alone, Tensor) else alone[0], whole[:, -1:])


def logits_from_hidden(inner: Any, body: str, hidden: Tensor) -> Tensor:
    """What the model's own forward makes of given hidden states [t,D]: the logits [t,V]. The model
    itself is not touched: a copy of its shell, sharing every layer, has the body replaced."""
    # shallow: the copy shares every parameter, only the path to the body is copied
    shell = node = copy.copy(inner)
    *parents, leaf = body.split(".")
    for name in parents:
        child = copy.copy(node._modules[name])
        node._modules = {**node._modules, name: child}
        node = child
    node._modules = {**node._modules, leaf: _PrecomputedBody(hidden[None])}
    ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
    return shell(input_ids=ids, use_cache=False).logits[0]


@torch.no_grad()
def find_body(inner: Any) -> tuple[str | None, bool]:
    """(path of the body, whether logits are plainly head(hidden)), proven on random tokens; (None,
    False) if nothing fits.
    """
    ids = _random_ids(inner)
    mask = torch.ones_like(ids)
    expected = inner(input_ids=ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1)
    paths = {id(m): p for p, m in inner.named_modules()}
    # transformers' two accessors; some classes have only one that is right
    candidates = [paths.get(id(inner.get_decoder())), inner.base_model_prefix]
    head = inner.get_output_embeddings()
    for body in dict.fromkeys(c for c in candidates if c):
        try:
            out = inner.get_submodule(body)(input_ids=ids, attention_mask=mask, use_cache=False)
            hidden = out.last_hidden_state.flatten(0, 1)
            # every second row as well: logits must not depend on the other rows
            some = torch.arange(0, hidden.shape[0], 2, device=hidden.device)
            exact = all(
                _equal_to_rounding(logits_from_hidden(inner, body, hidden[rows]), expected[rows])
                for rows in (slice(None), some)
            )
            plain = isinstance(head, (nn.Linear, BankLinear)) and _equal_to_rounding(
                head(hidden), expected
            )
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError):
            continue  # this part cannot be called apart from the whole
        if exact:
            return body, plain
    return None, False


def list_text_tokens(inner: Any) -> list[int]:
    """Ids that stand for text alone, a few thousand at most: an image's placeholder, padding or a
    mask are read otherwise.
    """
    vocab_size = min(int(inner.get_input_embeddings().weight.shape[0]), MAX_TEXT_TOKENS)
    config = {**inner.config.to_dict(), **inner.config.get_text_config().to_dict()}
    special = {
        v
        for k, v in config.items()
        if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)
    }
    return [t for t in range(vocab_size) if t not in special] or list(range(vocab_size))


@torch.no_grad()
def counts_from_zero(inner: Any, body: str | None) -> bool:
    """Whether `position_ids` of 0..n-1 give what the model gives without any.

    RoBERTa and its kin count from their padding token's id + 1, and leave that token out, but only
    where no positions are given.
    """
    ids = _random_ids(inner)
    mask = torch.ones_like(ids)
    part = inner if body is None else inner.get_submodule(body)
    # [sequences, tokens], each counting from 0
    positions = torch.arange(PROBE[1], device=ids.device).expand(PROBE)
    try:
        outs = [
            part(input_ids=ids, attention_mask=mask, use_cache=False, **options)
            for options in ({}, {"position_ids": positions})
        ]
    except (TypeError, LookupError, ValueError, RuntimeError):
        return False  # positions are wanted in another shape
    outputs, expected = (out.logits if body is None else out.last_hidden_state for out in outs)
    return _equal_to_rounding(outputs, expected)


def _random_ids(inner: Any) -> Tensor:
    """[PROBE] tokens of plain text."""
    text_tokens = torch.tensor(list_text_tokens(inner))
    picks = torch.randint(0, len(text_tokens), PROBE, generator=torch.Generator().manual_seed(0))
    return text_tokens[picks].to(inner.device)


def _equal_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of one matrix product done in another shape."""
    # another shape sums in another order: a few units in the last place
    tolerance = torch.finfo(a.dtype).eps * 8
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=tolerance, atol=tolerance * float(b.float().abs().max())
    )
