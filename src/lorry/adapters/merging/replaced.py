"""What merging does with an adapter's own weights (`variants.own_weights`): they take the base's place, for
every pass and in what is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorry.adapters.adapter import Adapter
from lorry.adapters.bank import AdapterBank
from lorry.adapters.variants.own_weights import SITE, site_at
from lorry.adapters.variants.parameters import FurtherParameter, Replacement
from lorry.errors import ConfigError, ModelError


def replacements(bank: AdapterBank, mix: Mapping[str, float]) -> dict[str, FurtherParameter]:
    """{name of a tensor of the base: what stands in its place, or in that of its rows} of the adapters of a
    mix. Raises ConfigError for an adapter that is weighed, or two that both have one."""
    found, owners = dict[str, FurtherParameter](), dict[str, str]()
    for name, gate in mix.items():
        adapter = {**bank.base_adapters, **bank.adapters}[name]
        for one in adapter.further.values():
            for path, leaf in () if one.replaces is None else one.replaces.sites:
                _refuse_weight(adapter, gate, f"{path}.{leaf}")
                if (other := owners.setdefault(f"{path}.{leaf}", name)) != name:
                    raise ConfigError(
                        f"the adapters {other!r} and {name!r} both have {path}.{leaf} of their own; merge one "
                        "of them"
                    )
                found[f"{path}.{leaf}"] = one
    return found | _raised_biases(bank, mix, found)


@torch.no_grad()
def _raised_biases(
    bank: AdapterBank, mix: Mapping[str, float], found: Mapping[str, FurtherParameter]
) -> dict[str, FurtherParameter]:
    """{`MODULE.bias`: it and the sum of g s b of what a mix has there (`lora_bias`)}. Raises ConfigError for
    a layer without one: its class would not load it."""
    raised = dict[str, FurtherParameter]()
    for path, layer in bank.modules.items():
        added = [
            gate * slot.scale * slot.bias.detach()
            for name, gate in mix.items()
            if (slot := layer.slots.get(name)) is not None and slot.bias is not None
        ]
        if not added:
            continue
        own, before = found.get(f"{path}.bias"), getattr(layer, "bias", None)
        if before is None:
            raise ConfigError(
                f"{path} has no bias, which lora_bias would be merged into; use the adapter unmerged"
            )
        whole = (before if own is None else own.param).detach().float() + sum(added)
        place = Replacement(((path, "bias"),))
        raised[f"{path}.bias"] = FurtherParameter(
            nn.Parameter(whole, requires_grad=False), path, replaces=place
        )
    return raised


def _refuse_weight(adapter: Adapter, gate: float, tensor: str) -> None:
    if gate != 1:
        raise ConfigError(
            f"{adapter.label} has {tensor} of its own, which has no weight but 1 (asked: {gate:g}); merge it "
            "whole, or train a plain LoRA to weigh or negate it"
        )


@torch.no_grad()
def replaced_tensor(
    name: str, base: Tensor, one: FurtherParameter, dtype: torch.dtype
) -> tuple[Tensor, float, float]:
    """(what stands in the place of a tensor of the base, |it - the base|, |it - it in fp32|)."""
    exact = one.param.detach().to(base.device)
    if one.replaces is not None and one.replaces.ids is not None:
        exact = base.detach().float().index_copy(0, one.replaces.ids.to(base.device), exact)
    stored = exact.to(dtype, copy=True)
    if not bool(torch.isfinite(stored).all()):
        raise ModelError(f"merging makes {name} infinite or NaN in {dtype}; check the adapter")
    norm = lambda t: float(torch.linalg.vector_norm(t, dtype=torch.float64))  # noqa: E731
    return stored, norm(exact - base.detach()), norm(exact - stored)


# (module, name in it, the base's parameter)
Displaced = list[tuple[nn.Module, str, nn.Parameter]]


def displace(model: nn.Module, tensors: Mapping[str, Tensor]) -> Displaced:
    """Let modules compute with these in place of their parameters by name; what `put_back` undoes."""
    displaced, made = Displaced(), dict[int, nn.Parameter]()
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        displaced.append((module, leaf, module.get_parameter(leaf)))
        # one parameter for both sides of what stays tied
        if id(tensor) not in made:
            made[id(tensor)] = nn.Parameter(tensor, requires_grad=False)
        setattr(module, leaf, made[id(tensor)])
        site_at(module, path).merged = True
    return displaced


def put_back(displaced: Displaced) -> None:
    """The very parameters, so that what was tied is tied again."""
    for module, leaf, param in displaced:
        setattr(module, leaf, param)
        module.__dict__[SITE].merged = False
