"""Lorry's adapters in training loops that are not ours: FSDP2, FSDP1, DDP, accelerate, transformers'
Trainer, TRL, DeepSpeed ZeRO-1 and -2.

    from lorry.integrations import trainers

    model = trainers.apply_lora_to_fsdp_model(model, args)          # before fully_shard or FSDP
    optimizer = torch.optim.AdamW(trainers.get_lora_parameters(model), lr=1e-4)
    ...
    loss.backward()
    trainers.synchronise(model)                                     # once a step
    optimizer.step()
    trainers.save_lora(model, "adapter")                            # on every rank

There are two ways, because there are two kinds of wrappers. **FSDP** cuts up every parameter that it
finds. Adapters are small and stay whole: it does not find them (`apply_lora_to_fsdp_model`), and
`synchronise` averages their gradients. **DDP** and ZeRO average the gradients of whatever parameters
a model has; so there adapters are parameters of the model, as PEFT's are (`apply_lora_to_model`), and
the trainer's optimizer, clipping and checkpoints see them. `synchronise` has nothing to do then, and
finds that out.

Ranks that drift apart are found out and stop (`agreement.py`). Without torch.distributed all of this
works on one process and says nothing. Nothing here imports accelerate, TRL or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry.adapters.attach import FSDP2, attach, find_wrapper, get_bank, lora_parameters
from lorry.adapters.bank import AdapterBank
from lorry.adapters.dropout import GeneratorNoise
from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.merge import MergeReport, merge, unmerge
from lorry.adapters.parameters.holders import refuse_adapter_at_parameters
from lorry.adapters.peft.base_digest import remember_base_digest
from lorry.adapters.peft.files import save_adapter
from lorry.errors import ConfigError, ContractError, LorryError
from lorry.integrations.agreement import AdapterAgreement, Group, find_agreement, watch
from lorry.integrations.arguments import add_lora_arguments, argument, spec_from_arguments

__all__ = [
    "add_lora_arguments",
    "apply_lora_to_fsdp_model",
    "apply_lora_to_model",
    "get_lora_parameters",
    "merge_lora_weights",
    "save_lora",
    "synchronise",
    "unmerge_lora_weights",
]


FSDP = (FSDP2, "FullyShardedDataParallel")


def apply_lora_to_fsdp_model(
    model: nn.Module, args: Any, group: Group = None, *, compare_base: bool = True
) -> nn.Module:
    """Attach an adapter that FSDP does not see, before FSDP wraps the model; returns the model.

    ``args``: what `add_lora_arguments` parsed, a LoraSpec, or None where the model has its adapters
    already (`lorry.attach`, `lorry.load_adapter`). ``group``: the ranks that share the gradients;
    None: all. ``compare_base``: whether their base weights are compared now; False where the wrapper
    gives all ranks those of rank 0 (FSDP1's sync_module_states).

    Collective: every rank of the group calls it. Call `synchronise` once a step, and make the
    optimizer and clip by `get_lora_parameters`. Raises ConfigError for a model that is wrapped already
    or is Lorry's own decoder, what `spec_from_arguments` and `lorry.attach` raise, and ContractError
    where a rank has another base than rank 0.
    """
    bank = _attach(model, args)
    agreement = watch(bank, group, registered=False)
    if compare_base:
        agreement.compare_bases(model)
    _call_before_forward(model, lambda inputs: _follow_device(bank, inputs))
    return model


def apply_lora_to_model(model: nn.Module, args: Any, group: Group = None) -> nn.Module:
    """Attach an adapter whose matrices are parameters of the model, for DDP, accelerate, the
    Trainer, TRL and DeepSpeed ZeRO-1 and -2; returns the model. They are named as PEFT's,
    `PATH.lora_A.NAME`, also in the model's state dict.

    ``args``, ``group``: as in `apply_lora_to_fsdp_model`. Raises the ConfigErrors of that; bases are
    not compared, since these wrappers give every rank the weights of rank 0.
    """
    bank = _attach(model, args)
    watch(bank, group, registered=True)
    _register(bank)
    _call_before_forward(model, lambda inputs: _check_registered(bank))
    return model


def synchronise(model: nn.Module, group: Group = None) -> None:
    """Average the adapters' gradients over the ranks: once a step, after its last backward pass,
    before clipping and the optimizer. Accumulate over as many passes as you like before it.

    On one process, and where DDP has averaged them, nothing changes. ``group``: the ranks, None for
    those given to `apply_lora_to_fsdp_model`. Collective: every rank of the group calls it. Raises
    ContractError where ranks have other adapters.
    """
    agreement = _agreement(model)
    if group is not None:
        agreement.group = group
    agreement.average_gradients()


def get_lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The fp32 matrices that train, for an optimizer and for clipping; the same objects however the
    model is wrapped. Raises ConfigError where it has no adapter.
    """
    return lora_parameters(_banked_module(model))


def merge_lora_weights(model: nn.Module) -> MergeReport:
    """Fold the adapters into the weights, in place, and stop using them; `unmerge_lora_weights`
    takes them out again bit for bit. Under FSDP2 each rank does so with its share.

    Raises on every rank what `lorry.merge` raises on one, and ContractError where the adapters of
    ranks differ.
    """
    agreement, inner = _agreement(model), _banked_module(model)
    agreement.compare_values("before merging", "save none of them; train again with `synchronise`")
    failure: LorryError | None = None
    report: MergeReport | None = None
    try:
        report = merge(inner)
    except LorryError as error:
        failure = error
    _share_failure(agreement, failure, "merge", undo=None if report is None else inner)
    assert report is not None
    return report


def unmerge_lora_weights(model: nn.Module) -> None:
    """Put the weights back as they were before `merge_lora_weights`, the same bits, and use the
    adapters again. Raises ConfigError if the model is not merged.
    """
    unmerge(_banked_module(model))


def save_lora(model: nn.Module, path: str | Path, name: str | None = None) -> None:
    """Write an adapter in PEFT's format into the directory ``path``: rank 0 writes, and all return
    when it has. Collective: every rank of the group calls it.

    ``name``: which adapter; None is the only one. Raises ContractError, with nothing written, where
    the adapters of ranks differ; on every rank what `lorry.save_adapter` raises on rank 0.
    """
    agreement, inner = _agreement(model), _banked_module(model)
    agreement.compare_values(
        "at save_lora",
        "nothing was written. Their gradients were not averaged: call "
        "lorry.integrations.trainers.synchronise(model) once a step",
    )
    failure: LorryError | None = None
    if agreement.rank == 0:
        try:
            save_adapter(inner, path, name)
        except LorryError as error:
            failure = error
    _share_failure(agreement, failure, "save the adapter")


def _share_failure(
    agreement: AdapterAgreement,
    failure: LorryError | None,
    what: str,
    undo: nn.Module | None = None,
) -> None:
    """Raise on every rank where one has failed. ``undo``: the model that this one merged."""
    states = agreement.exchange(bytes([failure is not None]))
    failed = [rank for rank, state in enumerate(states) if any(state)]
    if not failed:
        return
    if undo is not None:
        unmerge(undo)
    raise failure or LorryError(f"rank {failed[0]} could not {what}; its own error says why")


def _attach(model: nn.Module, args: Any) -> AdapterBank:
    """The model's bank, with the adapter that ``args`` describe. Raises ConfigError."""
    has_adapters = "lorry_bank" in model.__dict__
    if not has_adapters and any(isinstance(m, AdaptableLayer) for m in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} is Lorry's own decoder, which other trainers cannot run; load "
            "the model with transformers, or train it by `lorry sft backend=fsdp` or ddp"
        )
    if args is not None:
        attach(model, spec_from_arguments(args), seed=argument(args, "lora_seed"))
    bank = get_bank(model)
    if not bank.adapters:
        raise ConfigError("this model has no adapter; give args, or call lorry.attach before")
    bank.noise = GeneratorNoise(model=model)
    bank.activate(bank.active)
    # now, while the weights are whole; on ranks that load none they are not there yet
    if not any(p.is_meta for p in model.parameters()):
        remember_base_digest(model)
    return bank


def _banked_module(model: nn.Module) -> nn.Module:
    """The module that has the bank: the model, or what its wrappers hold. Raises ConfigError."""
    return next((m for m in model.modules() if "lorry_bank" in m.__dict__), model)


def _agreement(model: nn.Module) -> AdapterAgreement:
    """What watches the model's adapters; from now on where it was `lorry.attach` alone. Raises
    ConfigError where the model has none, or FSDP has it with such.
    """
    bank = get_bank(_banked_module(model))
    if (agreement := find_agreement(bank)) is not None:
        return agreement
    if find_wrapper(model, FSDP):
        # said now, and not when a trained adapter cannot be saved: of which base it is cannot be
        # read from shares
        raise ConfigError(
            "FSDP has this model, whose adapters were attached by themselves; before FSDP call "
            "lorry.integrations.trainers.apply_lora_to_fsdp_model(model, None), too"
        )
    return watch(bank, None, registered=False)


def _register(bank: AdapterBank) -> None:
    """Make the matrices parameters of their layers. From then on their memory is the trainer's,
    which may put it elsewhere: the flat buffers are given up.
    """
    for adapter in bank.adapters.values():
        if "." in adapter.name:
            raise ConfigError(
                f"adapter {adapter.name!r}: a parameter's name cannot have a dot; name it otherwise"
            )
        adapter.refuse_further("under FSDP an adapter has A and B alone")
        # their bank layers are no modules of the tree: nobody would find what is registered there
        refuse_adapter_at_parameters(adapter, bank.modules, "FSDP of another library")
        for path, slot in adapter.slots.items():
            layer = bank.modules[path]
            for side, master in (("lora_A", slot.A), ("lora_B", slot.B)):
                if not hasattr(layer, side):
                    layer.add_module(side, nn.ParameterDict())
                getattr(layer, side)[adapter.name] = master
                master.grad = None
        adapter.buffer, adapter.grads = None, adapter.grads.new_empty(0)


def _check_registered(bank: AdapterBank) -> None:
    for adapter in bank.adapters.values():
        for path, slot in adapter.slots.items():
            found = dict(bank.modules[path].named_parameters())
            # FSDP2 puts another object there, FSDP1 a flat piece of memory into this one
            if found.get(f"lora_A.{adapter.name}") is not slot.A or slot.A.dim() != 2:
                raise ContractError(
                    f"{path}: its adapter has been cut up with the model's parameters, and nobody "
                    "would train it; before FSDP call apply_lora_to_fsdp_model"
                )


def _follow_device(bank: AdapterBank, inputs: list[Tensor]) -> None:
    """Move the adapters to where the model computes: it was moved, and they are none of its
    parameters.
    """
    device = inputs[0].device if inputs else torch.device("meta")
    if device.type != "meta":
        bank.to(device)


def _call_before_forward(model: nn.Module, function: Any) -> None:
    """Call ``function`` with the tensors that the model is given, before its first pass."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        handle.remove()
        function([v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)])

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
