"""Adapters at fused experts: one tensor per layer holds the matrices of all E experts, and a token is
multiplied with a few of them only.

    y_e = W_e x + sum_k g_k s_k B_ke (A_ke x)      for the rows x that the router sends to expert e

A module that holds such tensors stays where it is, with its names; its forward is replaced by
`run_experts`, which multiplies each expert's matrices with its own rows alone, so no [E, out, in] of
an update is made. Layout, as PEFT's: A [E r, in], rows ordered (expert, rank); B [out, r E], columns
ordered (rank, expert).

T tokens, k experts per token, S = T k rows, E experts, r rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.slot import AdapterSlot
from lorry.errors import ConfigError, ContractError

# transformers' names of the tensors: gate and up in one (or up alone), then down
UP_NAMES = ("gate_up_proj", "up_proj")
DOWN_NAME = "down_proj"
# what such a module's forward is given; the second names are gpt-oss's
FORWARD_NAMES = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
)
PROOF_SCALES = (0.1, 1.0, 10.0, 100.0)  # of the inputs of the proof: clamps act on some of them
_LAYERS = "lorry_experts"  # where a module of experts keeps its bank layers


class ExpertMatrices(AdaptableLayer):
    """One tensor of a module of fused experts, [E, out, in], or [E, in, out] when ``transposed``. It
    lies in the module that holds it (``holders``), and is no module of the model's tree.
    """

    def __init__(self, holder: nn.Module, leaf: str, path: str) -> None:
        super().__init__(path)
        self.holders = (holder,)
        self.leaf = leaf
        self.transposed = bool(getattr(holder, "is_transposed", False))

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return self.holders[0].get_parameter(self.leaf)

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1 if self.transposed else 2]

    @property
    def out_features(self) -> int:
        return self.weight.shape[2 if self.transposed else 1]

    def use_merged_weight(self, merged: nn.Parameter) -> None:
        self.__dict__["unmerged_weight"] = self.weight
        setattr(self.holders[0], self.leaf, merged)

    def restore_weight(self) -> None:
        setattr(self.holders[0], self.leaf, self.unmerged_weight)
        self.__dict__["unmerged_weight"] = None

    def count_tokens(self, x: Tensor, *others: object) -> int:
        (routing,) = others
        assert isinstance(routing, Routing)
        return routing.num_tokens

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """rows [S, in], expert by expert -> [S, out], by the base and the call's terms."""
        call = self.resolve(None)
        terms = self.terms(call)
        if any(t.route is not None and t.adapter in self.slots for t in call.mix.terms):
            raise ContractError(
                f"{self.path}: a router of single linears cannot gate an adapter on fused experts; "
                "leave it out with exclude_modules=[experts]"
            )
        weights = self.weight.unbind()
        y = _multiply(
            rows, [w.t() for w in weights] if self.transposed else weights, routing.counts
        )
        bias = getattr(self.holders[0], f"{self.leaf}_bias", None)
        if bias is not None and getattr(self.holders[0], "has_bias", True):
            y = y + bias[routing.experts]
        for slot, tokens, gate in terms:
            y = self._add_term(y, rows, routing, slot, tokens, gate)
        return y

    def _add_term(
        self,
        y: Tensor,
        rows: Tensor,
        routing: Routing,
        slot: AdapterSlot,
        tokens: slice | None,
        gate: float | Tensor,
    ) -> Tensor:
        """y [S, out] and one adapter's share of its tokens."""
        index, counts = routing.rows_of(tokens)
        if not any(counts):
            return y  # none of its tokens: the masters' gradients stay as they are
        x = rows if index is None else rows[index]
        a, b = self._split_factors(slot, self.weight.dtype)
        low = _multiply(x, a, counts)
        if isinstance(gate, Tensor):
            start = 0 if tokens is None else tokens.start
            of_row = routing.tokens if index is None else routing.tokens[index]
            low = low * gate.to(low.dtype)[of_row - start][:, None]
        else:
            low = low * gate
        up = _multiply(low * slot.scale, b, counts)
        return y + up if index is None else y.index_add(0, index, up)

    def _split_factors(
        self, slot: AdapterSlot, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Of each expert A_e [r, in] and B_e [out, r], which autograd follows back to the masters."""
        # unbind and no indexing: its backward writes the whole gradient once, not once per expert
        experts = self.num_experts
        a = slot.A.to(dtype).view(experts, -1, slot.A.shape[1]).unbind()
        columns = slot.B.to(dtype).view(slot.B.shape[0], -1, experts)
        return a, columns.permute(2, 0, 1).contiguous().unbind()

    def delta(self, slot: AdapterSlot) -> Tensor:
        """s B_e A_e of every expert in fp32, in the layout of the stored tensor: for merging alone."""
        experts = self.num_experts
        a = slot.A.detach().view(experts, -1, slot.A.shape[1])
        b = slot.B.detach().view(slot.B.shape[0], -1, experts).permute(2, 0, 1)
        product = torch.bmm(b, a).mul_(slot.scale)
        return product.transpose(1, 2) if self.transposed else product

    def release(self) -> None:
        """Give the module its own forward back, unless another of its tensors has adapters."""
        holder = self.holders[0]
        layers = expert_layers(holder)
        if layers and not any(layer.slots for layer in layers.values()):
            del holder.__dict__[_LAYERS], holder.__dict__["forward"]


@dataclass(frozen=True)
class Routing:
    """Which expert has which rows: ``experts`` [S] ascending, ``tokens`` [S] the token of each row
    (ascending within an expert), ``num_experts`` E, ``num_tokens`` T."""

    experts: Tensor
    tokens: Tensor
    num_experts: int
    num_tokens: int

    @cached_property
    def counts(self) -> list[int]:
        """[E]: how many rows each expert has."""
        return _count(self.experts, self.num_experts)

    def rows_of(self, tokens: slice | None) -> tuple[Tensor | None, list[int]]:
        """(the rows of some of the tokens, None for all of them; how many of these each expert has)."""
        if tokens is None:
            return None, self.counts
        index = ((self.tokens >= tokens.start) & (self.tokens < tokens.stop)).nonzero()[:, 0]
        return index, _count(self.experts[index], self.num_experts)


def _count(experts: Tensor, num_experts: int) -> list[int]:
    counts: list[int] = torch.bincount(experts, minlength=num_experts).tolist()
    return counts


def _multiply(rows: Tensor, matrices: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """rows [S, in], the first counts[0] of which are the first matrix's [out, in], and so on -> [S,
    out]."""
    parts = [
        F.linear(x, w) for x, w, n in zip(rows.split(counts), matrices, counts, strict=True) if n
    ]
    return torch.cat(parts) if parts else rows.new_empty(0, matrices[0].shape[0])


def run_experts(
    holder: nn.Module,
    layers: Mapping[str, ExpertMatrices],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The forward of a module of fused experts: hidden_states [T,D], the router's choice of experts
    [T,k] and their weights [T,k] -> [T,D], with the adapters of its tensors, ``layers`` by name.

    Base and adapters alike run expert by expert, whatever `experts_implementation` says: it is the
    same sum (`check_experts`), and a reference without adapters is the model that trains, bit for bit.
    """
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    up = _first_layer(layers)
    num_tokens, active = top_k_index.shape
    routing = Routing(chosen[order], order // active, up.num_experts, num_tokens)
    inner = up(hidden_states[routing.tokens], routing)
    y = layers[DOWN_NAME](_activate(holder, inner), routing)
    if getattr(holder, "has_post_expert_norm", False):
        y = holder.post_expert_norm(y)  # type: ignore[operator]
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    # each token's rows in the router's order again: the sum is the same whoever shares the batch
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    whole = y[back].view(num_tokens, active, -1).sum(1)
    return whole.to(hidden_states.dtype)


def _activate(holder: Any, inner: Tensor) -> Tensor:
    """What goes into the experts' second matrices, [S, F] of [S, 2F] or [S, F]."""
    if not _has_gate(holder):
        return holder.act_fn(inner)
    if hasattr(holder, "_apply_gate"):
        return holder._apply_gate(inner)
    gate, up = inner.chunk(2, dim=-1)
    return holder.act_fn(gate) * up


def _has_gate(holder: nn.Module) -> bool:
    return UP_NAMES[0] in holder._parameters


def _first_layer(layers: Mapping[str, ExpertMatrices]) -> ExpertMatrices:
    return next(layers[name] for name in UP_NAMES if name in layers)


def expert_layers(holder: nn.Module) -> dict[str, ExpertMatrices]:
    """{name of the tensor: its bank layer} of a module of fused experts that has them; else none."""
    layers: dict[str, ExpertMatrices] = holder.__dict__.get(_LAYERS, {})
    return layers


def find_expert_layers(holder: nn.Module, path: str) -> dict[str, ExpertMatrices]:
    """{path of the tensor: its bank layer, made if there is none} of a module of fused experts, in
    the order of its parameters; none of any other module."""
    if not _holds_experts(holder):
        return {}
    return {layer.path: layer for layer in _layers_by_leaf(holder, path).values()}


def _layers_by_leaf(holder: nn.Module, path: str) -> dict[str, ExpertMatrices]:
    return expert_layers(holder) or {
        leaf: ExpertMatrices(holder, leaf, f"{path}.{leaf}")
        for leaf in holder._parameters
        if leaf in (*UP_NAMES, DOWN_NAME)
    }


def _holds_experts(module: nn.Module) -> bool:
    """Whether it has transformers' form: two tensors of E matrices, called with tokens and routes."""
    tensors = module._parameters
    up = next((tensors[name] for name in UP_NAMES if name in tensors), None)
    down = tensors.get(DOWN_NAME)
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return False
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    return up.is_floating_point() and down.is_floating_point() and names in FORWARD_NAMES


def check_experts(layers: Iterable[ExpertMatrices]) -> None:
    """Raise ConfigError where modules of experts compute something else than `run_experts`: of each
    class of them one is tried."""
    seen = set[type[nn.Module]]()
    for layer in layers:
        holder = layer.holders[0]
        if getattr(holder, "_is_expert_parallel", False):
            raise ConfigError(
                f"{layer.path}: its experts are divided over processes (expert parallel), and an "
                "adapter needs all of them; load the model without"
            )
        if type(holder) in seen or expert_layers(holder):
            continue
        seen.add(type(holder))
        if not _is_proven(holder, _layers_by_leaf(holder, layer.path.rpartition(".")[0])):
            raise ConfigError(
                f"{layer.path}: {type(holder).__name__} computes its experts in a way of its own, and "
                "adapters on them are not supported; leave them out with exclude_modules=[experts]"
            )


def install_experts(layer: ExpertMatrices) -> ExpertMatrices:
    """Let the module that holds a tensor run through bank layers, and return the one of the tensor."""
    holder = layer.holders[0]
    layers = _layers_by_leaf(holder, layer.path.rpartition(".")[0])
    holder.__dict__[_LAYERS] = layers
    # a partial and no closure: `copy.deepcopy` of the model copies what a partial holds
    holder.__dict__["forward"] = partial(run_experts, holder, layers)
    return layers[layer.leaf]


@torch.no_grad()
def _is_proven(holder: nn.Module, layers: Mapping[str, ExpertMatrices]) -> bool:
    """Whether `run_experts` gives what the module's own forward does, on random tokens. True without
    a look where its weights are yet to come."""
    up = _first_layer(layers)
    weight = up.weight
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    tokens, active = len(PROOF_SCALES), min(2, up.num_experts)
    x = torch.randn(tokens, up.in_features, generator=generator)
    x = (x * torch.tensor(PROOF_SCALES)[:, None]).to(weight.device, weight.dtype)
    chosen = torch.stack(
        [torch.randperm(up.num_experts, generator=generator)[:active] for _ in range(tokens)]
    ).to(weight.device)
    share = torch.rand(tokens, active, generator=generator).to(weight.device, weight.dtype)
    own = type(holder).forward(holder, x, chosen, share).float()
    ours = run_experts(holder, layers, x, chosen, share).float()
    # rounding in another order, not another function: half the digits agree
    allowed = torch.finfo(weight.dtype).eps ** 0.5 * own.abs().amax(-1)
    return bool(((own - ours).abs().amax(-1) <= allowed).all())
