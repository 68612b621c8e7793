"""Which base an adapter belongs to: SHA-256 over a sample of the base's weights, which an adapter's
files name, and the comparison of the two.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorry.adapters.layers.adaptable import AdaptableLayer
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.parameters.experts import ExpertMatrices
from lorry.adapters.parameters.weights import ForeignWeight
from lorry.adapters.peft.config import read_adapter_json
from lorry.adapters.peft.tensors import family_of
from lorry.adapters.quantization.linear import QuantizedLinear, quantization_of
from lorry.adapters.quantization.packed import PackedMatrix, Quantization
from lorry.adapters.targets.candidates import find_adaptable, find_linears
from lorry.errors import ModelError
from lorry.runs.layout import ADAPTER_CONFIG, ADAPTER_FACTS

DIGEST_SAMPLES = 4096  # values of each base tensor that the digest looks at
_KNOWN_DIGEST = "lorry_base_digest"
# {path: (shape of a weight, the values at its `sample_positions`)}
Samples = Mapping[str, tuple[tuple[int, ...], Tensor]]
CarriesOn = TypeVar("CarriesOn", bound=nn.Module)


def base_digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and a sample of every linear's and embedding's weight,
    adapters and merges left out.

    Values count as rounded to bf16, so a base opened in bf16 and in fp32 is the same base, on any
    device and in any of the classes that can hold it; another quantisation or fine-tuning of it is
    not. Of a base that ranks share, or that is cut over them, it is that of the whole one, taken once,
    when all of them have it (`remember_base_digest`).
    """
    known = known_base_digest(model)
    return digest_samples(_sampled_weights(model)) if known is None else known


def parameters_digest(model: nn.Module) -> str:
    """As `base_digest`, over fused experts and routers, which only an adapter on one of them is
    compared by."""
    samples = {}
    for path, layer in find_adaptable(model).items():
        if isinstance(layer, ExpertMatrices | ForeignWeight):
            weight = layer.weight if layer.unmerged_weight is None else layer.unmerged_weight
            places = sample_positions(weight.numel())
            samples[path] = tuple(weight.shape), values_at_positions(weight.detach(), places)
    return digest_samples(samples)


def values_at_positions(weight: Tensor, positions: Tensor) -> Tensor:
    """The values [n] of a weight at flat positions [n]."""
    return weight.reshape(-1)[positions.to(weight.device)]


def remember_base_digest(
    model: nn.Module,
    values_at: Callable[[Tensor, Tensor], Tensor] = values_at_positions,
    samples: Samples = MappingProxyType({}),
) -> None:
    """Take the digest of a frozen base that no rank has whole; all of them call this together.
    ``values_at(weight, positions)``: the values of a weight that is cut over ranks at flat positions
    [n]; ``samples``: of linears, by path, where they were taken before (`sample_matrix`)."""
    model.__dict__[_KNOWN_DIGEST] = digest_samples(_sampled_weights(model, values_at, samples))


def sample_matrix(packed: PackedMatrix, *, transposed: bool) -> tuple[tuple[int, ...], Tensor]:
    """(shape, the values at its `sample_positions`) of a matrix as it computes: in another format it is
    another base. One that keeps the values of the whole base is that one, which its layer would hold
    ``transposed`` or not."""
    opened = packed.open(torch.float32)
    if transposed and packed.quantization.keeps_values:
        opened = opened.t().contiguous()
    return tuple(opened.shape), values_at_positions(opened, sample_positions(opened.numel()))


def keep_base_digest(model: nn.Module, other: CarriesOn) -> CarriesOn:
    """``other``, which holds the base of ``model`` in another layout, with the digest that was taken
    of it (`remember_base_digest`)."""
    other.__dict__[_KNOWN_DIGEST] = model.__dict__[_KNOWN_DIGEST]
    return other


def known_base_digest(model: nn.Module) -> str | None:
    """What `remember_base_digest` took; None where it has not been called."""
    digest: str | None = model.__dict__.get(_KNOWN_DIGEST)
    return digest


def forget_base_digest(model: nn.Module) -> None:
    """Take `remember_base_digest` back."""
    model.__dict__.pop(_KNOWN_DIGEST, None)


def _sampled_weights(
    model: nn.Module,
    values_at: Callable[[Tensor, Tensor], Tensor] = values_at_positions,
    known: Samples = MappingProxyType({}),
) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """{path: (shape, the values at its `sample_positions`)} of what `base_digest` looks at, as one
    device has it; in bfloat16 where ranks share the model. ``values_at``, ``known``: as above."""
    samples, ranks = dict[str, tuple[tuple[int, ...], Tensor]](), None
    family = family_of(model)
    for own_path, module in find_linears(model).items():
        # of an older release of transformers, it is the same base
        path = own_path if family is None else family.current_name(own_path)
        if isinstance(module, BankLinear) and isinstance(module.product, QuantizedLinear):
            taken = known.get(own_path)
            samples[path] = (
                sample_matrix(module.product.packed, transposed=module.transposed)
                if taken is None
                else taken
            )
            continue
        weight = (
            module.get_parameter("weight")
            if (unmerged := getattr(module, "unmerged_weight", None)) is None
            else unmerged
        ).detach()
        if not isinstance(module, AdaptableLayer) or module.slices is None:
            samples[path] = (
                tuple(weight.shape),
                values_at(weight, sample_positions(weight.numel())),
            )
            continue
        ranks, (dim, part), shape = module.slices.ranks, module.stored_slice(), list(weight.shape)
        shape[dim] = part.whole
        positions = sample_positions(math.prod(shape))
        place = [positions // shape[1], positions % shape[1]]
        place[dim], here = part.local(place[dim])
        # bits: the others add zeros to them
        values = values_at(weight, place[0] * weight.shape[1] + place[1])
        bits = values.to(torch.bfloat16).view(torch.int16).int()
        samples[path] = (tuple(shape), bits * here.to(bits.device))
    if ranks is None:
        return samples
    cut = {path: bits for path, (_, bits) in samples.items() if bits.dtype == torch.int32}
    joined = ranks.add_up(torch.cat(list(cut.values()))).to(torch.int16).view(torch.bfloat16)
    parts = zip(cut, joined.split([len(bits) for bits in cut.values()]), strict=True)
    return samples | {path: (samples[path][0], part) for path, part in parts}


def sample_positions(numel: int) -> Tensor:
    """The values of a tensor that `base_digest` looks at: evenly spread, first and last included."""
    count = min(DIGEST_SAMPLES, numel)
    return torch.arange(count) * (numel - 1) // max(count - 1, 1)


def digest_samples(samples: Samples) -> str:
    """The digest of {module: (shape of its weight, the values at its `sample_positions`)}."""
    digest = hashlib.sha256()
    for path, (shape, values) in sorted(samples.items()):
        digest.update(f"{path}{shape}".encode())
        # view as int16: numpy has no bf16
        digest.update(values.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def check_base(model: nn.Module, folder: Path) -> None:
    """Compare the base's digest with the one an adapter of ours was saved with; PEFT's files say
    nothing about it. Raises ModelError.
    """
    if not (folder / ADAPTER_FACTS).is_file():
        return
    facts = read_adapter_json(folder / ADAPTER_FACTS)
    trained, here = facts.get("quantization"), quantization_of(model)
    trained_format = trained.get("format") if isinstance(trained, Mapping) else None
    if trained_format is not None and Quantization(trained_format).keeps_values:
        trained_format = None
    if here is not None and here.keeps_values:
        here = None
    if trained_format != (None if here is None else here.name):
        asked = f"model.quantize={trained_format}" if trained_format else "no model.quantize"
        raise ModelError(
            f"{folder / ADAPTER_FACTS}: this adapter was trained on a base held in "
            f"{trained_format or 'its full dtype'}, and this one is held in "
            f"{here.name if here is not None else 'its full dtype'}, with other values; open it with {asked} "
            "(other_base=true accepts the difference)"
        )
    saved_digest, experts = facts.get("base_digest"), facts.get("parameters_digest")
    if (saved_digest is not None and saved_digest != base_digest(model)) or (
        experts is not None and experts != parameters_digest(model)
    ):
        raise ModelError(
            f"{folder / ADAPTER_FACTS}: this adapter was trained on other base "
            "weights than this model's; load it on its own base model, "
            f"{read_adapter_json(folder / ADAPTER_CONFIG).get('base_model_name_or_path')} "
            "(other_base=true accepts the difference)"
        )
