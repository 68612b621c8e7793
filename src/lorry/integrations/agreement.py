"""What the ranks of somebody else's data-parallel training have to agree on: over which base, whose
adapters they train, and that their values stay equal.

Nobody but this module sees both the bank and the process group there. It watches torch's optimizers
by the two hooks that torch has for all of them: the adapters are compared before the first step,
after the first two that change them, and by `trainers.save_lora`. A gradient that nobody averaged
shows in the first of these. The base is compared once, while every rank has it whole.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lorry.adapters.adapter import Adapter
from lorry.adapters.bank import AdapterBank
from lorry.adapters.peft.base_digest import sample_positions, values_at_positions
from lorry.errors import ContractError

Group = distributed.ProcessGroup | None
# steps that change the adapters and after which they are compared
COMPARED_STEPS = 2
# steps within which every target has to see a gradient, as in contract 3 of our own runs
STEPS_TO_REACH = 3
SYNCHRONISE = "lorry.integrations.trainers.synchronise(model)"
# bytes of a tensor's digest: equal by accident once in 2^64
TENSOR_DIGEST = 8
# of a tensor that has no values on this rank
NO_VALUES = bytes(TENSOR_DIGEST)
# accelerate's two that say: rank 0 alone reads the checkpoint, and gives the others its values
RANK_0_LOADS = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")


class AdapterAgreement:
    """The adapters of one bank on all ranks of ``group`` (None: the default one).

    ``registered``: they are parameters of the model, and whoever wraps it averages their gradients
    (DDP, ZeRO); else it does not see them, and `trainers.synchronise` does.
    """

    def __init__(self, bank: AdapterBank, group: Group, *, registered: bool) -> None:
        # weakly: the bank is the key under which this is kept
        self._bank = weakref.ref(bank)
        self.group, self.registered = group, registered
        self.steps = self.changed = 0
        self.values: bytes | None = None
        self.unreached: set[str] | None = None
        self._layouts_compared = False

    @property
    def bank(self) -> AdapterBank:
        """Whose adapters these are."""
        bank = self._bank()
        assert bank is not None, "the model is gone"
        return bank

    def adapters(self) -> list[Adapter]:
        """Those that train."""
        return [a for a in self.bank.adapters.values() if a.wanting_gradients()]

    def masters(self) -> list[nn.Parameter]:
        """Of those, in an order that is the same on all ranks."""
        return [p for p in self.bank.parameters() if p.requires_grad]

    @property
    def size(self) -> int:
        """How many ranks there are."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This one, in the group."""
        return distributed.get_rank(self.group) if self.size > 1 else 0

    def compare_bases(self, model: nn.Module) -> None:
        """Raises ContractError, naming a rank and a tensor, where another rank has another base than
        rank 0: of every parameter and buffer its name, shape, dtype and a sample of its values count.

        To be called while each rank has all of it: of shares nothing can be compared. What has no
        values yet on a rank (the meta device, accelerate's loading on rank 0 alone) will be given those
        of rank 0, and is passed over.
        """
        if self.size == 1:
            return
        tensors = dict(_tensors_of_base(model))
        counts = self.exchange(len(tensors).to_bytes(TENSOR_DIGEST, "big"))
        for rank, count in enumerate(counts):
            if count != counts[0]:
                raise ContractError(
                    f"rank {rank} has another base than rank 0: {int.from_bytes(count, 'big')} tensors "
                    f"in place of {int.from_bytes(counts[0], 'big')}; load the same model on every rank"
                )
        waits = self.rank > 0 and _rank_0_loads()
        digests = [NO_VALUES if waits else hash_sample(*named) for named in tensors.items()]
        everybody = [_parts(each) for each in self.exchange(b"".join(digests))]
        for rank, theirs in enumerate(everybody):
            others = [
                name
                for name, first, other in zip(tensors, everybody[0], theirs, strict=True)
                if first != other and NO_VALUES not in (first, other)
            ]
            if others:
                raise ContractError(
                    f"rank {rank} has another base than rank 0: {len(others)} of {len(tensors)} tensors "
                    f"differ, the first is {others[0]}; load the same model, revision and dtype on "
                    "every rank (compare_base=False where the wrapper gives all ranks the weights of "
                    "rank 0, as FSDP1 with sync_module_states=True)"
                )

    def compare_layouts(self) -> None:
        """Raises ContractError where another rank has other adapters: names, targets, ranks, scale,
        dropout. Once; before anything of theirs is sent.
        """
        if self._layouts_compared or self.size == 1:
            return
        self._refuse_difference(
            hash_layout(self.adapters()),
            "other adapters than rank 0 (names, targets, ranks, scale or dropout)",
            "attach the same ones on every rank",
        )
        self._layouts_compared = True

    def compare_values(self, when: str, remedy: str) -> bytes:
        """This rank's digest of the values; raises ContractError where another rank's differs."""
        self.compare_layouts()
        digest = hash_values(self.masters())
        if self.size > 1:
            self._refuse_difference(
                digest, f"other values in its adapters than rank 0 {when}", remedy
            )
        return digest

    def exchange(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, of which all have the same number."""
        if self.size == 1:
            return [data]
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device())
        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own, group=self.group)
        return [part.cpu().numpy().tobytes() for part in parts]

    def device(self) -> torch.device:
        """One that the group can send from: the CPU where it can (gloo), else the adapters' or, while
        the model is not there yet, the current one of its kind."""
        config = distributed.get_backend_config(self.group)
        kind = "cpu" if "cpu:" in config else config.partition(":")[0]
        here = self.bank.parameters()[0].device
        return here if here.type == kind else torch.device(kind)

    def average_gradients(self) -> None:
        """Replace each master's gradient by its mean over the ranks, the same bits on each; one
        that a rank has no gradient of counts as zeros there, and stays None where no rank has one.
        """
        if self.size == 1:
            return
        self.compare_layouts()
        masters = self.masters()
        present = bytes(p.grad is not None for p in masters)
        if self.registered:
            # DDP has averaged them already; where it has not (accelerate without a wrapper, a model
            # that nobody wrapped), the gradients differ
            own = present + fingerprint(p.grad for p in masters)
            if len(set(self.exchange(own))) == 1:
                return
        everywhere = [any(flags) for flags in zip(*self.exchange(present), strict=True)]
        averaged = [p for p, some in zip(masters, everywhere, strict=True) if some]
        if not averaged:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in averaged]
        flat = torch.cat([g.detach().reshape(-1) for g in grads])
        distributed.all_reduce(flat, group=self.group)
        flat.div_(self.size)
        for p, mean in zip(averaged, flat.split([p.numel() for p in averaged]), strict=True):
            if p.grad is None:
                p.grad = mean.view_as(p).clone()
            else:
                p.grad.copy_(mean.view_as(p))

    def before_step(self) -> None:
        """Called before an optimizer steps these adapters."""
        self._refuse_half_precision()
        self.steps += 1
        self._note_reached()
        if self.steps == 1:
            self.values = self.compare_values(
                "before the first step",
                "attach or load the same adapter on every rank, with the same seed",
            )

    def after_step(self) -> None:
        """Called after one has."""
        if self.changed == COMPARED_STEPS:
            return
        digest = self.compare_values(
            f"after optimizer step {self.steps}",
            f"their gradients were not averaged: call {SYNCHRONISE} after the last backward pass "
            "of a step, before clipping and optimizer.step()",
        )
        # a rate of 0 (the first step of a warm-up) changes nothing and so shows nothing
        self.changed += digest != self.values
        self.values = digest

    def _refuse_half_precision(self) -> None:
        """Parameters of a model are cast with it. DeepSpeed may do so: it steps copies in fp32."""
        if cast := [p.dtype for p in self.masters() if p.dtype.itemsize < 4]:
            raise ContractError(
                f"the adapters were cast to {cast[0]} with the model, where small updates round "
                "away; cast the model before the adapters are attached, they stay fp32"
            )

    def _note_reached(self) -> None:
        """Warn once of targets that no gradient has reached."""
        if self.steps > STEPS_TO_REACH:
            return
        if self.unreached is None:
            self.unreached = {f"{path} of {a.name}" for a in self.adapters() for path in a.slots}
        for adapter in self.adapters():
            for path, slot in adapter.slots.items():
                if any(p.grad is not None and bool(p.grad.any()) for p in (slot.A, slot.B)):
                    self.unreached.discard(f"{path} of {adapter.name}")
        if self.steps == STEPS_TO_REACH and self.unreached:
            some = ", ".join(sorted(self.unreached)[:3])
            warnings.warn(
                f"in {self.steps} steps no gradient has reached {len(self.unreached)} of the adapters' "
                f"targets ({some}): the loss does not depend on them, or the trainer computes what "
                "they do past their layer",
                stacklevel=2,
            )

    def _refuse_difference(self, own: bytes, what: str, remedy: str) -> None:
        everybody = self.exchange(own)
        if others := [rank for rank, each in enumerate(everybody) if each != everybody[0]]:
            raise ContractError(f"rank {others[0]} has {what}; {remedy}")


def hash_layout(adapters: Sequence[Adapter]) -> bytes:
    """SHA-256 of all that says what adapters compute, but their values."""
    digest = hashlib.sha256()
    for adapter in adapters:
        for path, slot in adapter.slots.items():
            shapes = [tuple(slot.A.shape), tuple(slot.B.shape)]
            digest.update(repr((adapter.name, path, shapes, slot.scale, slot.dropout)).encode())
        digest.update(repr(list(adapter.further)).encode())
    return digest.digest()


def hash_sample(name: str, tensor: Tensor) -> bytes:
    """Digest of a tensor's name, shape, dtype and the values at its `sample_positions`, to the bit;
    `NO_VALUES` on the meta device.
    """
    if tensor.is_meta:
        return NO_VALUES
    digest = hashlib.sha256(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    if tensor.numel():
        values = values_at_positions(tensor.detach(), sample_positions(tensor.numel()))
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()[:TENSOR_DIGEST]


def hash_values(tensors: Iterable[Tensor]) -> bytes:
    """SHA-256 of their bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def fingerprint(gradients: Iterable[Tensor | None]) -> bytes:
    """Two sums over the bits of fp32 gradients, made on their device: at every step a digest of
    them all would be dear.
    """
    sums = torch.zeros(2, dtype=torch.int64)
    for gradient in gradients:
        if gradient is None:
            continue
        bits = gradient.detach().float().contiguous().view(torch.int32).reshape(-1).long()
        places = torch.arange(1, bits.numel() + 1, device=bits.device)
        # overflow wraps around, and is the same everywhere
        sums += torch.stack([bits.sum(), (bits * places).sum()]).cpu()
        # of the gradients one by one, so that two exchanged ones do not sum to the same
        sums *= 31
    return sums.numpy().tobytes()


def _tensors_of_base(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Of a model whose adapters are none of its parameters."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _rank_0_loads() -> bool:
    return all(os.environ.get(name, "").lower() in ("true", "1") for name in RANK_0_LOADS)


def _parts(digests: bytes) -> list[bytes]:
    starts = range(0, len(digests), TENSOR_DIGEST)
    return [digests[start : start + TENSOR_DIGEST] for start in starts]


# what is watched, by bank
_AGREEMENTS = weakref.WeakKeyDictionary[AdapterBank, AdapterAgreement]()
_hooks: list[Any] = []


def find_agreement(bank: AdapterBank) -> AdapterAgreement | None:
    """The one that watches a bank's adapters, if there is one."""
    return _AGREEMENTS.get(bank)


def watch(bank: AdapterBank, group: Group, *, registered: bool) -> AdapterAgreement:
    """Compare a bank's adapters over ranks from now on."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))
    agreement = _AGREEMENTS[bank] = AdapterAgreement(bank, group, registered=registered)
    return agreement


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for agreement in _stepped_by(optimizer):
        agreement.before_step()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped = _stepped_by(optimizer)
    for agreement in stepped:
        agreement.after_step()
    if stepped or any(p.requires_grad for p in _parameters(optimizer)):
        return
    # it can step nothing at all: an optimizer over the frozen parameters of a model
    for agreement in list(_AGREEMENTS.values()):
        if not agreement.steps and any(p.grad is not None for p in agreement.masters()):
            raise ContractError(
                "the adapters have gradients, but the optimizer that stepped holds none of their "
                "parameters; make it of lorry.integrations.trainers.get_lora_parameters(model)"
            )


def _stepped_by(optimizer: Optimizer) -> list[AdapterAgreement]:
    held = {id(p) for p in _parameters(optimizer)}
    return [
        agreement
        for agreement in list(_AGREEMENTS.values())
        if any(id(p) in held for p in agreement.masters())
    ]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
