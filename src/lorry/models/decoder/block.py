"""One layer of the decoder, for every family: attention and MLP over bank layers, forward and backward.

The two are written out by hand, so that a layer keeps for backward no more than it must: its input, q, k, v, the attention's
output, the middle of the residual stream, the MLP's two inner products, and what the A's made of their inputs. Norms, rotary
positions and gates are done again; a base product never is. `models/decoder/layer.py` puts the pair behind autograd.

T tokens, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorry.adapters.layers import BankLinear, Group
from lorry.adapters.mix import Call
from lorry.adapters.product import Products, Stack, gates_of
from lorry.families import Family, Geometry, Rotary
from lorry.models.decoder import attention
from lorry.models.decoder.attention import Memo, Segments
from lorry.models.decoder.cache import Cache
from lorry.models.decoder.pointwise import ACTIVATIONS, Norm, gate, rotate

SITES = ("attention.in", "attention.out", "mlp.in", "mlp.out")  # names of the four inputs, for dropout


@dataclass
class Pass:
    """One forward pass: the call for the bank, rotary tables [T, dim/2], the segments, and a cache when generating.

    ``recompute``: layers keep their input only and run again in backward.
    """

    call: Call
    cos: Tensor | None
    sin: Tensor | None
    segments: Segments
    positions: Tensor
    cache: Cache | None = None
    rows: Tensor | None = None
    decoding: bool = False
    recompute: bool = False


class Work(NamedTuple):
    """The low-rank terms of a layer's four products in one pass, with their masters and gates in one list."""

    stacks: Sequence[Sequence[Stack]]
    masters: Sequence[Tensor | None]

    def products(self, groups: Sequence[Group], masters: Sequence[Tensor | None]) -> list[Products]:
        """The four pieces of work, gates taken from ``masters``."""
        out, at = [], 0
        for group, stacks in zip(groups, self.stacks, strict=True):
            count = sum(2 * len(s.parts) + 1 for s in stacks)
            out.append(Products(group.frozen(), stacks, gates_of(stacks, masters[at : at + count])))
            at += count
        return out


@dataclass
class Kept:
    """What forward leaves for backward. q and k are as they left their products where heads are normed, else already rotated."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    memo: Memo = field(default_factory=Memo)


class Block:
    """The computation of layer ``index``. It holds the layer's modules but registers nothing: names stay the family's."""

    def __init__(self, index: int, layer: nn.Module, family: Family, geometry: Geometry) -> None:
        self.index, self.family, self.geometry = index, family, geometry
        modules: list[BankLinear] = [layer.get_submodule(path) for path in family.targets.values()]  # type: ignore[misc]
        cut = 4 if family.qkv == "separate" else 2
        self.groups = [Group(g) for g in (modules[: cut - 1], [modules[cut - 1]], modules[cut:-1], [modules[-1]])]
        norms = [layer.get_submodule(p) for p in (family.attention_norm, family.mlp_norm, *(family.qk_norm or ()))]
        self.norms: list[Norm] = norms  # type: ignore[assignment]
        self.activation = ACTIVATIONS[geometry.activation]

    def work(self, call: Call) -> Work:
        """What the call's adapters add in this layer."""
        stacks, masters = [], list[Tensor | None]()
        for group, site in zip(self.groups, SITES, strict=True):
            found, tensors = group.stacks(call, f"{self.index}.{site}")
            stacks.append(found)
            masters += tensors
        return Work(stacks, masters)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The base's own weights, in the order `backward` gives their gradients: linears, then norms."""
        modules: list[BankLinear | Norm] = [*(linear for group in self.groups for linear in group.linears), *self.norms]
        for module in modules:
            yield module.weight
            if module.bias is not None:
                yield module.bias

    def forward(self, x: Tensor, state: Pass, products: Sequence[Products], kept: Kept | None) -> Tensor:
        """x [T, width] -> [T, width], without a graph; fills ``kept`` if there is to be a backward."""
        heads, out, into, down = products
        q, k, v = self.split(heads.forward(self.norms[0].compute(x)))
        raw_q, raw_k = q, k
        q, k = self.placed(q, k, state)
        if state.cache is not None and state.rows is not None:
            state.cache.write(self.index, state.rows, state.positions, k, v)
        memo = Memo()
        if state.decoding and state.cache is not None:
            o = state.cache.attend(self.index, q)
        else:
            o, memo = attention.forward(q, k, v, state.segments, keep=kept is not None)
        (attended,) = out.forward(o.flatten(1))
        if self.geometry.parallel_residual:
            mid, normed = attended.add_(x), self.norms[1].compute(x)
        else:
            mid, normed = self.norms[1].after_adding(attended, x)
        inner = into.forward(normed)
        (y,) = down.forward(gate(self.activation, inner[0], inner[1] if len(inner) > 1 else None))
        if kept is not None:
            if len(self.norms) > 2:
                q, k = raw_q, raw_k
            kept.tensors = {"x": x, "q": q, "k": k, "v": v, "o": o, "mid": mid, **{f"inner{i}": t for i, t in enumerate(inner)}}
            if self.geometry.parallel_residual:
                del kept.tensors["mid"]
            kept.memo = memo
        return y.add_(mid)

    def placed(self, q: Tensor, k: Tensor, state: Pass) -> tuple[Tensor, Tensor]:
        """q and k with their head norms and positions."""
        if len(self.norms) > 2:
            q, k = self.norms[2].compute(q), self.norms[3].compute(k)
        if state.cos is not None and state.sin is not None:
            q, k = rotate(q, state.cos, state.sin), rotate(k, state.cos, state.sin)
        return q, k

    def split(self, made: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q [T,H,D], k and v [T,G,D] from the products, however the family stores them; contiguous."""
        g, t = self.geometry, made[0].shape[0]
        if self.family.qkv == "separate":
            q, k, v = made
            return q.view(t, g.heads, -1), k.view(t, g.kv_heads, -1), v.view(t, g.kv_heads, -1)
        if self.family.qkv == "thirds":
            q, k, v = made[0].view(t, 3, g.heads, g.head_dim).unbind(1)
        else:
            q, k, v = made[0].view(t, g.heads, 3, g.head_dim).unbind(2)
        return q.contiguous(), k.contiguous(), v.contiguous()

    def join(self, dq: Tensor, dk: Tensor, dv: Tensor) -> list[Tensor]:
        """`split` backwards."""
        if self.family.qkv == "separate":
            return [dq.flatten(1), dk.flatten(1), dv.flatten(1)]
        return [torch.stack([dq, dk, dv], 1 if self.family.qkv == "thirds" else 2).flatten(1)]


def frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    """[dim/2] fp32 angular frequencies; `linear` divides them all, `llama3` only the slow ones with a smooth passage
    (the published Llama 3.1 rule, by wavelength against the original context)."""
    base = torch.arange(0, rotary.dim, 2, dtype=torch.int64, device=device).float() / rotary.dim
    inverse = 1.0 / (rotary.theta**base)
    if rotary.kind == "default":
        return inverse
    factor = rotary.scaling["factor"]
    if rotary.kind == "linear":
        return inverse / factor
    low, high = rotary.scaling["low_freq_factor"], rotary.scaling["high_freq_factor"]
    context = rotary.scaling["original_max_position_embeddings"]
    turns = context * inverse / (2 * torch.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse
