"""One layer of the decoder, for every family: attention and MLP over bank layers, in the order and with the names of the family.

T tokens, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.bank.mix import Call
from lorry.families import Family, Geometry, Rotary
from lorry.models.attention import Bucket, attend
from lorry.models.cache import Cache

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass
class Pass:
    """One forward pass: the call for the bank, rotary tables [T, dim/2], the attention plan, and a cache when generating."""

    call: Call
    cos: Tensor | None
    sin: Tensor | None
    plan: Sequence[Bucket]
    positions: Tensor
    cache: Cache | None = None
    rows: Tensor | None = None
    decoding: bool = False


class Norm(nn.Module):
    """RMS norm or layer norm, in fp32, with the family's epsilon."""

    def __init__(self, kind: str, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer" else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, (self.weight.numel(),), self.weight, self.bias, self.eps)
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Block:
    """The computation of layer ``index``. It holds the layer's modules but registers nothing: names stay the family's."""

    def __init__(self, index: int, layer: nn.Module, family: Family, geometry: Geometry) -> None:
        self.index, self.family, self.geometry = index, family, geometry
        modules = [layer.get_submodule(path) for path in family.targets.values()]
        cut = 4 if family.qkv == "separate" else 2
        self.qkv, self.out, self.into, self.down = modules[: cut - 1], modules[cut - 1], modules[cut:-1], modules[-1]
        self.attention_norm, self.mlp_norm = (layer.get_submodule(p) for p in (family.attention_norm, family.mlp_norm))
        self.qk_norms = [layer.get_submodule(p) for p in family.qk_norm or ()]
        self.activation = ACTIVATIONS[geometry.activation]

    def __call__(self, x: Tensor, state: Pass) -> Tensor:
        """x [T, width] -> [T, width]."""
        attended = self._attention(self.attention_norm(x), state)
        if self.geometry.parallel_residual:
            return x + attended + self._mlp(self.mlp_norm(x), state.call)
        x = x + attended
        return x + self._mlp(self.mlp_norm(x), state.call)

    def _attention(self, x: Tensor, state: Pass) -> Tensor:
        q, k, v = self._heads(x, state.call)
        if self.qk_norms:
            q, k = self.qk_norms[0](q), self.qk_norms[1](k)
        if state.cos is not None and state.sin is not None:
            q, k = rotate(q, state.cos, state.sin), rotate(k, state.cos, state.sin)
        if state.cache is not None and state.rows is not None:
            state.cache.write(self.index, state.rows, state.positions, k, v)
        decoding = state.decoding and state.cache is not None
        o = state.cache.attend(self.index, q) if decoding and state.cache is not None else attend(q, k, v, state.plan)
        return self.out(o.flatten(1), state.call, f"{self.index}.attention.out")

    def _heads(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q [T,H,D], k and v [T,G,D], however the family stores them."""
        g, t = self.geometry, x.shape[0]
        made = [linear(x, call, f"{self.index}.attention.in") for linear in self.qkv]
        if self.family.qkv == "separate":
            q, k, v = made
            return q.view(t, g.heads, -1), k.view(t, g.kv_heads, -1), v.view(t, g.kv_heads, -1)
        if self.family.qkv == "thirds":
            q, k, v = made[0].view(t, 3, g.heads, g.head_dim).unbind(1)
        else:
            q, k, v = made[0].view(t, g.heads, 3, g.head_dim).unbind(2)
        return q, k, v

    def _mlp(self, x: Tensor, call: Call) -> Tensor:
        first, *rest = [linear(x, call, f"{self.index}.mlp.in") for linear in self.into]
        h = self.activation(first)
        return self.down(h * rest[0] if rest else h, call, f"{self.index}.mlp.out")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first 2*[..., dim/2] dimensions of x [T,h,D], half-split layout, in fp32 (Su et al. 2021)."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    a, b = turned[..., :half], turned[..., half:]
    c, s = cos[:, None], sin[:, None]
    out = torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)
    return torch.cat([out, rest], -1) if rest.shape[-1] else out


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
