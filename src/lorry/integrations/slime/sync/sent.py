"""What a version of the weights has to be, tensor by tensor, while it is sent: each whole Hugging Face
tensor against W + s B A of the base's file and of the adapter as PEFT would have it. Neither comes by
the way the sent one came: from shards, merged on each rank, gathered and converted.

    sent = SentWeights(BaseFile.open(args.hf_checkpoint), spec, gather_lora(model), adapted)
    sent.add(bucket)             # as often as a bucket goes out
    sent.check("version 3")      # raises ContractError, which names a tensor
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorry.adapters.spec import LoraSpec
from lorry.errors import ContractError
from lorry.integrations.rollout.digests import digest_tensor
from lorry.integrations.slime.sync.base_file import BaseFile

# of a tensor that is rounded to 16 bits: the share of values that may be rounded the other way, as sums
# are formed in another order; merging twice moves some of the values of any delta that moves any
ROUNDED_OTHERWISE = 1e-3
# of one that is not: |difference| to the largest value
EXACT_LIMIT = 1e-6


@dataclass
class SentWeights:
    """One version of the weights on its way. ``base``: None where the model's base is not a file's, and
    only what is sent twice, or not at all, is found; ``adapter``: {`MODULE.lora_A`: whole matrix},
    empty where the base alone is to be sent; ``adapted``: the weights that have adapters. ``digests``: {tensor: SHA-256}; ``rows``: the first row of
    what an adapter is on; ``bytes``: of all."""

    base: BaseFile | None
    spec: LoraSpec
    adapter: Mapping[str, Tensor]
    adapted: frozenset[str]
    digests: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    bytes: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, bucket: Iterable[tuple[str, Tensor]]) -> None:
        """Take what goes out next. Raises nothing: ranks are in the midst of a collective."""
        for name, tensor in bucket:
            if name in self.digests:
                self.faults.append(f"{name} was sent twice")
            self.bytes += tensor.numel() * tensor.element_size()
            own = tensor.detach().cpu()
            self.digests[name] = digest_tensor(own)
            if name in self.adapted:
                self.rows[name] = own[:1].clone()
            if fault := self._fault(name, own):
                self.faults.append(f"{name} is not {self._what(name)} of this version: {fault}")

    def note_missing(self, names: Iterable[str]) -> None:
        """Note which weights with adapters are not among ``names``, what all ranks sent."""
        self.faults += [f"{name} was never sent" for name in sorted(self.adapted - set(names))]

    def check(self, version: str) -> None:
        """Raises ContractError, which names the first tensor that is not what it has to be."""
        if self.faults:
            more = f" ({len(self.faults)} such)" if len(self.faults) > 1 else ""
            raise ContractError(
                f"{version}: {self.faults[0]}{more}; the engines hold another policy than was trained. "
                "Nothing was sampled from it"
            )

    def _what(self, name: str) -> str:
        return "W + s B A" if self.adapter and name in self.adapted else "the base's"

    def _fault(self, name: str, sent: Tensor) -> str | None:
        if self.base is None or name not in self.base.entries:
            return None
        weight = self.base.read(name, sent.dtype)
        path = name.removesuffix(".weight")
        if f"{path}.lora_A" not in self.adapter:
            return difference(sent, weight)
        a, b = (self.adapter[f"{path}.lora_{side}"] for side in "AB")
        exact = torch.promote_types(sent.dtype, torch.float32)
        # scaled where merging is not: another order of the same sum
        delta = (b.to(exact) * self.spec.scale(path)) @ a.to(exact)
        return difference(sent, (weight.to(exact) + delta).to(sent.dtype))


def difference(tensor: Tensor, expected: Tensor) -> str | None:
    """How two tensors differ by more than the rounding of one sum; None where they do not."""
    if tensor.shape != expected.shape:
        return f"shape {list(tensor.shape)}, not {list(expected.shape)}"
    if torch.equal(tensor, expected):
        return None
    gap = (tensor.double() - expected.double()).abs()
    largest = float(expected.double().abs().max())
    if tensor.element_size() >= 4:
        far = not bool((gap <= EXACT_LIMIT * largest).all())
    else:
        one_step = torch.finfo(tensor.dtype).eps * expected.double().abs()
        moved = int((gap > 0).sum())
        far = moved > max(1, ROUNDED_OTHERWISE * gap.numel()) or not bool((gap <= one_step).all())
    if not far:
        return None
    share = float((gap > 0).double().mean())
    return f"{share:.1%} of its values differ, by {float(gap.max()):.2g} at most"
