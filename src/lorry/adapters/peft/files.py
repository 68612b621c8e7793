"""Adapter files in PEFT's format, strict both ways: what is written is whole, what is read is used
completely or refused.

    save_adapter(model, "runs/people")            adapter_config.json, adapter_model.safetensors, lorry_adapter.json
    load_adapter(model, "runs/people")            ours, or any plain LoRA of PEFT's

`lorry_adapter.json` holds what only Lorry knows (its version, the base's digest); PEFT never sees
it, since PEFT stops at keys it does not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from lorry.adapters.attach import attach, find_linears, get_bank
from lorry.adapters.bank import NAME_PATTERN, Adapter, check_adapter_name
from lorry.adapters.layers import BankEmbedding, BankLinear
from lorry.adapters.peft.config import (
    check_pattern_time,
    parse_peft_config,
    read_adapter_json,
    to_peft_config,
)
from lorry.adapters.peft.tensors import (
    PEFT_PREFIX,
    check_modules,
    legacy_name_mapper,
    list_adaptable_layers,
    open_adapter_weights,
    read_lora_values,
    sort_lora_tensors,
)
from lorry.disk import durable
from lorry.errors import ConfigError, ModelError
from lorry.runs.layout import ADAPTER_CONFIG, ADAPTER_FACTS, ADAPTER_WEIGHTS

DIGEST_SAMPLES = 4096  # values of each base tensor that the digest looks at


def adapter_files(
    model: nn.Module,
    name: str = "default",
    *,
    base_name: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The files of one adapter, {file name: content}, for a writer of your own; values are the fp32
    masters, exactly.

    ``base_name``: what PEFT should load as the base (a directory or hub id); ``extra``: more facts
    for lorry_adapter.json. Raises ConfigError for an unknown or unusable name, ModelError if a
    value is not finite.
    """
    adapter = get_bank(model)[check_adapter_name(name)]
    modules = get_bank(model).modules
    tensors = {}
    for path, slot in adapter.slots.items():
        inner = (
            "lora_embedding_{}" if isinstance(modules[path], BankEmbedding) else "lora_{}.weight"
        )
        for side, param in (("A", slot.A), ("B", slot.B)):
            if not bool(torch.isfinite(param).all()):
                raise ModelError(
                    f"adapter {name!r} holds NaN or infinity in {path}.lora_{side}; nothing was written"
                )
            tensors[f"{PEFT_PREFIX}{path}.{inner.format(side)}"] = param.detach().cpu().contiguous()
        said = (adapter.spec.rank(path), adapter.spec.scale(path))
        assert said == (slot.A.shape[0], slot.scale), f"{path}: the spec says rank and scale {said}"
    transposed = any(
        isinstance(modules[p], BankLinear) and modules[p].transposed for p in adapter.slots
    )
    config = to_peft_config(
        adapter.spec, target_names(model, adapter), transposed=transposed, base_name=base_name
    )
    first = modules[next(iter(adapter.slots))]
    kind = first.dtype if isinstance(first, BankLinear) else first.weight.dtype
    dtype = str(kind).removeprefix("torch.")
    facts = {
        **(extra or {}),
        "dtype": dtype,
        "lorry_version": _package_version(),
        "adapter": name,
        "base_digest": base_digest(model),
    }
    return {
        ADAPTER_WEIGHTS: save(tensors, {"format": "pt"}),
        ADAPTER_CONFIG: _encode_json(config),
        ADAPTER_FACTS: _encode_json(facts),
    }


def save_adapter(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    base_name: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter into the directory ``path`` (made if absent), where PEFT and `load_adapter`
    find it.

    ``name``: which one; None is the only one (ConfigError if there are several). Every file is
    durable before the first one replaces an older one. Raises what `adapter_files` raises, and
    DiskError.
    """
    names = get_bank(model).names()
    if name is None and len(names) != 1:
        raise ConfigError(
            f"this model has the adapters {', '.join(names) or '(none)'}; say which one to save"
        )
    base_name = base_name or _base_origin(model)
    files = adapter_files(
        model, names[0] if name is None else name, base_name=base_name, extra=extra
    )
    durable.make_directory(Path(path))
    durable.write_files(Path(path), files)


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    trainable: bool = True,
    other_base: bool = False,
) -> Adapter:
    """Attach the adapter in directory ``path``, or in its sub-folder ``name``; a plain `model(x)`
    then uses it.

    ``name``: what to call it here, by default as it was saved. ``trainable=False`` freezes it.
    ``other_base=True`` accepts an adapter that was trained on other base weights. Raises
    ModelError, before the model is touched, for a file that does not fit: a tensor missing,
    unknown, twice, of another shape or not finite; another base; a variant that is not plain LoRA.
    """
    folder, name = find_adapter(path, name)
    where = str(folder / ADAPTER_CONFIG)
    layers = list_adaptable_layers(model)
    rename = legacy_name_mapper(model, layers)
    spec = parse_peft_config(read_adapter_json(folder / ADAPTER_CONFIG), where)
    if not isinstance(spec.target_modules, str):
        spec = replace(spec, target_modules=tuple(rename(t) for t in spec.target_modules))
    check_pattern_time(spec, layers, where)
    if not other_base:
        _check_base(model, folder)
    with open_adapter_weights(folder) as file:
        parts = sort_lora_tensors(model, file, str(folder / ADAPTER_WEIGHTS), layers, rename)
        check_modules(model, spec, set(parts), where)
        values = read_lora_values(file, str(folder / ADAPTER_WEIGHTS), spec, layers, parts)
    adapter = attach(model, spec, name, modules=[p for p in layers if p in parts])
    with torch.no_grad():
        for key, view in adapter.tensors().items():
            view.copy_(values[key])
    adapter.touch()
    for slot in adapter.slots.values():
        slot.A.requires_grad_(trainable)
        slot.B.requires_grad_(trainable)
    return adapter


def find_adapter(path: str | Path, name: str | None = None) -> tuple[Path, str]:
    """(directory, adapter name): ``path`` itself, or a sub-folder as PEFT and runs of several
    adapters lay them out.

    Raises ModelError if there is none, or several and no ``name``; ConfigError for a name that
    cannot be a folder.
    """
    root = Path(path)
    if name is not None and (root / check_adapter_name(name) / ADAPTER_CONFIG).is_file():
        return root / name, name
    if (root / ADAPTER_CONFIG).is_file():
        saved = (
            read_adapter_json(root / ADAPTER_FACTS).get("adapter", "default")
            if (root / ADAPTER_FACTS).is_file()
            else "default"
        )
        if name is None and not (isinstance(saved, str) and NAME_PATTERN.fullmatch(saved)):
            raise ModelError(
                f"{root / ADAPTER_FACTS}: adapter={saved!r:.80} cannot be an adapter's name"
            )
        return root, name or saved
    inside = sorted(p.parent.name for p in root.glob(f"*/{ADAPTER_CONFIG}"))
    if len(inside) == 1 and name is None:
        return root / inside[0], check_adapter_name(inside[0])
    choice = (
        f"; it has adapters named {', '.join(inside)}: pass name="
        if inside
        else "; pass the directory that does"
    )
    raise ModelError(f"{root} holds no {ADAPTER_CONFIG}{choice}")


def target_names(model: nn.Module, adapter: Adapter) -> list[str]:
    """What to write as target_modules: last parts of names where they select exactly the adapter's
    modules, else full paths.
    """
    leaves = list(dict.fromkeys(p.rpartition(".")[2] for p in adapter.slots))
    selected = {p for p, _ in model.named_modules() if p.rpartition(".")[2] in leaves}
    return leaves if selected == set(adapter.slots) else list(adapter.slots)


def base_digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and a sample of every linear's and embedding's weight,
    adapters and merges left out.

    Values count as rounded to bf16, so a base opened in bf16 and in fp32 is the same base, on any
    device and in any of the classes that can hold it; another quantisation or fine-tuning of it is
    not.
    """
    digest = hashlib.sha256()
    for path, module in sorted(find_linears(model).items()):
        weight = (
            module.get_parameter("weight")
            if (kept := getattr(module, "kept", None)) is None
            else kept
        )
        flat = weight.detach().reshape(-1)
        count = min(DIGEST_SAMPLES, flat.numel())
        places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        digest.update(f"{path}{tuple(weight.shape)}".encode())
        digest.update(flat[places].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def _base_origin(model: nn.Module) -> str | None:
    """Where transformers or Lorry read a model from: a directory in full, or a hub id; None if it
    does not say.
    """
    config = getattr(model, "config", None)
    name = (
        config.get("_name_or_path")
        if isinstance(config, Mapping)
        else getattr(config, "_name_or_path", None)
    )
    return (str(Path(name).resolve()) if Path(name).is_dir() else name) if name else None


def _check_base(model: nn.Module, folder: Path) -> None:
    """Compare the base's digest with the one an adapter of ours was saved with; PEFT's files say
    nothing about it.
    """
    if not (folder / ADAPTER_FACTS).is_file():
        return
    said = read_adapter_json(folder / ADAPTER_FACTS).get("base_digest")
    if said is not None and said != base_digest(model):
        raise ModelError(
            f"{folder / ADAPTER_FACTS}: this adapter was trained on other base weights than this model's; open it on its own base, "
            f"{read_adapter_json(folder / ADAPTER_CONFIG).get('base_model_name_or_path')} (in Python, other_base=True accepts the difference)"
        )


def _encode_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _package_version() -> str:
    try:
        return version("lorry")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
