"""How Megatron-core's linears hold what Hugging Face calls by other names: which projections each
fuses, in which order of rows, and what of a whole matrix a rank of tensor parallel has.

    linear_qkv   q_proj k_proj v_proj   per KV group its queries, its key, its value; cut by groups
    linear_proj  o_proj                 cut by columns
    linear_fc1   gate_proj up_proj      the gate's rows, then up's; each cut, so a rank has [gate_i; up_i]
    linear_fc2   down_proj              cut by columns

No Megatron is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorry.errors import ConfigError
from lorry.families import SITES, ModelFamily, Site
from lorry.families.llama import LLAMA
from lorry.models.causal_lm import add_at

TESTED_VERSION = "0.16.1"
# whose models a GPTModel can be, as it is built and filled here
FAMILIES = ("llama", "qwen2", "qwen3")
# Llama's names of modules, which Qwen2 and Qwen3 share
FAMILY: ModelFamily = LLAMA
Side = Literal["A", "B"]
Parallel = Literal["column", "row"]


@dataclass(frozen=True)
class MegatronLinear:
    """One of a layer's four linears. ``path``: inside a TransformerLayer; ``targets``: the
    projections it fuses, in their order of rows; ``site``: the name of its input, for dropout."""

    path: str
    targets: tuple[str, ...]
    parallel: Parallel
    site: Site

    @property
    def name(self) -> str:
        """What people write as a target."""
        return self.path.rpartition(".")[2]


LINEARS = (
    MegatronLinear("self_attention.linear_qkv", FAMILY.roles.qkv, "column", SITES.qkv),
    MegatronLinear("self_attention.linear_proj", FAMILY.roles.attn_out, "row", SITES.attn_out),
    MegatronLinear("mlp.linear_fc1", FAMILY.roles.mlp_in, "column", SITES.mlp_in),
    MegatronLinear("mlp.linear_fc2", FAMILY.roles.mlp_out, "row", SITES.mlp_out),
)
BY_NAME = {linear.name: linear for linear in LINEARS}


def short_name(target: str) -> str:
    """`q` of `q_proj`: what a parameter of one of several projections ends in."""
    return target.removesuffix("_proj")


@dataclass(frozen=True)
class RowOrder:
    """The order of a fused matrix's rows: ``groups`` times the parts' rows, ``sizes`` of each in one
    group."""

    groups: int
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the whole."""
        return self.groups * sum(self.sizes)

    def fuse(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """One tensor of the parts', each with its rows in Hugging Face's order along ``dim``."""
        if len(parts) == 1:
            return parts[0]
        cut = [
            part.unflatten(dim, (self.groups, size))
            for part, size in zip(parts, self.sizes, strict=True)
        ]
        after = dim + 1 if dim >= 0 else dim
        return torch.cat(cut, after).flatten(*((dim, dim + 1) if dim >= 0 else (dim - 1, dim)))

    def split(self, fused: Tensor) -> list[Tensor]:
        """The parts of a tensor whose first dimension is the fused rows."""
        if len(self.sizes) == 1:
            return [fused]
        pieces = fused.unflatten(0, (self.groups, sum(self.sizes))).split(self.sizes, 1)
        return [piece.flatten(0, 1) for piece in pieces]


def row_order(config: Any, linear: MegatronLinear, tensor_parallel: int) -> RowOrder:
    """Of the rows that one of ``tensor_parallel`` ranks has; ``config``: a TransformerConfig. Raises
    ConfigError where ranks would share a KV group."""
    shards = tensor_parallel if linear.parallel == "column" else 1
    if linear.name == "linear_qkv":
        groups, heads = config.num_query_groups, config.num_attention_heads
        if groups % shards:
            raise ConfigError(
                f"tensor_model_parallel_size={shards} (backend.tensor_parallel of a run) cuts a KV group in "
                f"two (num_query_groups={groups}); use a size that divides {groups}"
            )
        width = config.kv_channels
        return RowOrder(groups // shards, (heads // groups * width, width, width))
    if linear.name == "linear_fc1":
        return RowOrder(1, (config.ffn_hidden_size // shards,) * 2)
    return RowOrder(1, (config.hidden_size,))


def whole_sizes(config: Any) -> dict[str, tuple[int, int]]:
    """{projection: (out, in) features} of the whole model."""
    width, heads = config.hidden_size, config.num_attention_heads * config.kv_channels
    keys = config.num_query_groups * config.kv_channels
    return {
        "q_proj": (heads, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, heads),
        "gate_proj": (config.ffn_hidden_size, width),
        "up_proj": (config.ffn_hidden_size, width),
        "down_proj": (width, config.ffn_hidden_size),
    }


def shard_dim(parallel: Parallel, side: Side | Literal["weight"]) -> int | None:
    """The dimension in which lora_A [r, in], lora_B [out, r] or the weight [out, in] is cut; None
    where ranks have all of it."""
    if parallel == "column":
        return None if side == "A" else 0
    return None if side == "B" else 1


def cut(whole: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """A rank's part of one projection's matrix."""
    if dim is None or size == 1:
        return whole
    part = whole.shape[dim] // size
    return whole.narrow(dim, rank * part, part)


def hugging_face_tree(config: Any) -> nn.Module:
    """The whole model's linears under their Hugging Face names, without memory: what targets are
    selected from and files are read against, the same on every rank."""
    tree = nn.Module()
    tree.__dict__["family"] = FAMILY
    sizes = whole_sizes(config)
    for layer in range(config.num_layers):
        for target in FAMILY.targets:
            out, features = sizes[target]
            linear = nn.Linear(features, out, bias=False, device="meta")
            add_at(tree, FAMILY.path(target, layer), linear)
    return tree


def projection(path: str) -> tuple[int, str]:
    """(layer, target) of a Hugging Face path."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(\w+)", path)
    assert match is not None, path
    return int(match[1]), match[2]
