"""The layers a bank lives in: a linear and an embedding that keep their base weight under its own name.

`BankLinear` is the only linear of Lorry's own decoder and takes the place of `nn.Linear` or `Conv1D` in any other model.
Adapters are not parameters of the module (FSDP, state dicts and optimizers of the base never see them): they are `Slot`s.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.bank.mix import Call
from lorry.bank.ops import LowRank, Plan
from lorry.errors import ContractError

# Other people's models cannot pass a Call down; `models/hf.py` sets it around their forward. It is read in forward only.
AMBIENT: ContextVar[Call | None] = ContextVar("lorry_call", default=None)


@dataclass
class Slot:
    """One adapter at one module: fp32 masters A [R,I], B [O,R] (views of the adapter's flat buffer), scale and dropout.

    Compute copies in the base's dtype are remade after every backward pass and whenever a master's version has moved: an
    optimizer of the user's own that updates the masters, even one that no version counter sees (fused AdamW, `p.data.add_`),
    can never train a stale copy. Whoever else writes the memory under the masters calls `Adapter.touch`.
    """

    module: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    dropout: float
    _copies: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    stamp: tuple[object, ...] = field(default=(), repr=False)

    def copies(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(a, b) in the base's dtype, detached; the masters themselves when the base is fp32."""
        stamp = (self.A._version, self.B._version, self.A.data_ptr(), dtype)
        if self._copies is None or stamp != self.stamp:
            self._copies = (self.A.detach().to(dtype), self.B.detach().to(dtype))
            self.stamp = stamp
        return self._copies

    def touch(self) -> None:
        """Say that a master has changed, or is about to."""
        self.stamp = ()


class Adaptable(nn.Module):
    """What linears and embeddings share: their path, their slots, and the base weight kept aside while merged."""

    weight: nn.Parameter

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self.path = path
        self.slots: dict[str, Slot] = {}
        self.default = Call()
        self.kept: nn.Parameter | None = None
        self.replaced: tuple[nn.Module, ...] = ()  # the foreign layer this one stands in for (a tuple, so it is no submodule)

    @property
    def in_features(self) -> int:
        raise AssertionError("a bank layer says its own width")

    @property
    def out_features(self) -> int:
        raise AssertionError("a bank layer says its own width")

    def set_aside(self, merged: nn.Parameter) -> None:
        """Compute with a merged weight and keep the own one, where no state dict, optimizer or FSDP sees it."""
        self.__dict__["kept"], self.weight = self.weight, merged

    def restore(self) -> None:
        """Put the weight that was set aside back: the same object, so what was tied is tied again."""
        assert self.kept is not None
        self.weight, self.kept = self.kept, None

    def terms(self, call: Call | None) -> tuple[Call, list[tuple[Slot, slice | None, float | Tensor]]]:
        """The call that holds here and its terms that have a slot at this module. Raises ContractError on a merged layer."""
        call = call or AMBIENT.get() or self.default
        found = [(self.slots[t.adapter], t.rows, t.gate) for t in call.mix.terms if t.adapter in self.slots]
        if found and self.kept is not None:
            raise ContractError(f"{self.path} is merged; call unmerge(model) before using its adapters again")
        return call, found


class BankLinear(Adaptable):
    """y = W x + b + the bank's terms. weight [out, in], or [in, out] when ``transposed`` (GPT-2's Conv1D)."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, *, transposed: bool = False, path: str = "") -> None:
        super().__init__(path)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.transposed = transposed

    @property
    def in_features(self) -> int:
        return self.weight.shape[0] if self.transposed else self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1] if self.transposed else self.weight.shape[0]

    def forward(self, x: Tensor, call: Call | None = None, site: str | None = None) -> Tensor:
        """x [..., in] -> [..., out]. ``site`` names the input for dropout; layers that share an input pass the same one."""
        call, found = self.terms(call)
        if not found:
            return F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)
        flat = x.reshape(-1, x.shape[-1])
        plans, tensors = [], []
        for slot, rows, gate in found:
            mask = call.noise.mask(site or self.path, flat, slot.dropout) if call.noise is not None and slot.dropout else None
            scale = slot.scale if isinstance(gate, Tensor) else slot.scale * gate
            rate = slot.dropout if mask is not None else 0.0
            plans.append(Plan(rows, scale, mask, rate, *slot.copies(self.weight.dtype), slot.touch))
            tensors += [slot.A, slot.B, gate if isinstance(gate, Tensor) else None]
        y = LowRank.apply(flat, self.weight, self.bias, self.transposed, plans, *tensors)
        return y.view(*x.shape[:-1], -1) if x.dim() != 2 else y

    def delta(self, slot: Slot) -> Tensor:
        """s B A in fp32, in the layout of the stored weight."""
        product = (slot.B.detach() @ slot.A.detach()).mul_(slot.scale)
        return product.t() if self.transposed else product


class BankEmbedding(Adaptable):
    """An embedding [V, D] with low-rank terms. As PEFT has it, A [R, V] starts at zero and B [D, R] at random."""

    def __init__(self, weight: nn.Parameter, *, path: str = "") -> None:
        super().__init__(path)
        self.weight = weight

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, ids: Tensor, call: Call | None = None) -> Tensor:
        """ids [...] int64 -> [..., D]. Dropout does not apply to an embedding's input."""
        _, found = self.terms(call)
        y = F.embedding(ids, self.weight)
        if not found:
            return y
        flat, flat_ids = y.reshape(-1, y.shape[-1]).float(), ids.reshape(-1)
        for slot, rows, gate in found:
            part = slice(None) if rows is None else rows
            low = F.embedding(flat_ids[part], slot.A.t()) @ slot.B.t() * slot.scale
            low = low * (gate[:, None] if isinstance(gate, Tensor) else gate)
            before, after = (0, 0) if rows is None else (rows.start, flat.shape[0] - rows.stop)
            flat = flat + F.pad(low, (0, 0, before, after))
        return flat.to(y.dtype).view_as(y)

    def delta(self, slot: Slot) -> Tensor:
        """(s B A)^T in fp32, [V, D] like the weight."""
        return (slot.B.detach() @ slot.A.detach()).mul_(slot.scale).t()
