"""Adapter files in PEFT's format, strict both ways: what is written is whole, what is read is used
completely or refused.

    save_adapter(model, "runs/people")            adapter_config.json, adapter_model.safetensors, lorry_adapter.json
    load_adapter(model, "runs/people")            ours, or any plain LoRA of PEFT's

`lorry_adapter.json` holds what only Lorry knows (its version, the base's digest); PEFT never sees
it, since PEFT stops at keys it does not know.

The adapter that one was trained over is in its files too: start_files.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lorry.adapters.adapter import NAME_PATTERN, Adapter, AdapterOrigin, check_adapter_name
from lorry.adapters.attach import attach, get_bank, require_model
from lorry.adapters.layers.embedding import BankEmbedding
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.merge import concatenate
from lorry.adapters.parameters.experts import ExpertMatrices
from lorry.adapters.parameters.holders import at_parameters
from lorry.adapters.peft.adalora_files import (
    ADALORA,
    PlainLoraFile,
    as_plain_config,
    fit_ranks,
)
from lorry.adapters.peft.base_digest import (
    base_digest,
    check_base,
    forget_base_digest,
    known_base_digest,
    parameters_digest,
    remember_base_digest,
)
from lorry.adapters.peft.config import (
    check_pattern_time,
    over_adapter_config,
    parse_peft_config,
    read_adapter_json,
    to_peft_config,
)
from lorry.adapters.peft.parameters import (
    MISTAKEN_LEAVES,
    holds_experts,
    join_single_experts,
    match_peft_parameters,
    name_patterns,
    split_targets,
    tensor_modules,
)
from lorry.adapters.peft.start_files import (
    adapter_digest,
    check_start,
    start_chain,
    start_files,
    write_start_files,
)
from lorry.adapters.peft.tensors import (
    PEFT_PREFIX,
    TensorFile,
    check_modules,
    legacy_name_mapper,
    list_adaptable_layers,
    name_tied_targets,
    open_adapter_weights,
    read_further_values,
    read_lora_values,
    sort_lora_tensors,
    tied_as_stored,
)
from lorry.adapters.quantization.linear import quantization_facts
from lorry.adapters.targets.candidates import find_linears
from lorry.adapters.tensor_parallel.slices import SIDES
from lorry.adapters.variants.adalora import fold_triplets
from lorry.adapters.variants.new_tokens import (
    NewTokens,
    grow_vocabulary,
    grown_with,
    shrink_vocabulary,
)
from lorry.adapters.variants.registry import further_starts
from lorry.disk import durable
from lorry.errors import ConfigError, ModelError, require_path
from lorry.runs.layout import (
    ADAPTER_CONFIG,
    ADAPTER_FACTS,
    ADAPTER_WEIGHTS,
    is_adapter_folder,
    list_adapter_subfolders,
)


def adapter_files(
    model: nn.Module,
    name: str = "default",
    *,
    base_name: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The files of one adapter, {file name: content}, for another writer; values are the fp32
    masters, exactly. Of a model that ranks share all of them call it, and each gets whole files.

    ``base_name``: what PEFT should load as the base (a directory or hub id); ``extra``: more facts
    for lorry_adapter.json. Raises ConfigError for an unknown or unusable name, ModelError if a
    value is not finite.
    """
    adapter = get_bank(model)[check_adapter_name(name)]
    keeps = adapter.spec.keep_residual and adapter.initial is not None
    return _files_of(model, adapter, get_bank(model).start, base_name, extra, keeps_residual=keeps)


def plain_adapter_files(
    model: nn.Module, name: str = "default", *, weight: float = 1.0, base_name: str | None = None
) -> dict[str, bytes]:
    """As `adapter_files`, of one adapter for the bare base: with all that it was trained over, and
    itself times ``weight`` (g). Any reader of PEFT's files then has our model."""
    bank = get_bank(model)
    if weight == 1.0 and not bank.base_adapters:
        return _files_of(model, bank[check_adapter_name(name)], None, base_name, None)
    adapter = concatenate(model, bank[check_adapter_name(name)].name, {name: weight})
    return _files_of(model, adapter, None, base_name, {"weight": weight})


def _files_of(
    model: nn.Module,
    adapter: Adapter,
    start: AdapterOrigin | None,
    base_name: str | None,
    extra: Mapping[str, Any] | None,
    *,
    keeps_residual: bool = False,
) -> dict[str, bytes]:
    """``keeps_residual``: without what the adapter's initialisation took off the base, which a reader has to
    find again."""
    name, modules = adapter.name, get_bank(model).modules
    if adapter.spec.adalora is not None:
        adapter = fold_triplets(adapter)
    spec = adapter.spec if keeps_residual else adapter.plain_spec
    tensors, whole = {}, adapter.tensors() if keeps_residual else adapter.whole_factors()
    names = tensor_modules(adapter.slots, modules)
    for path, slot in adapter.slots.items():
        tensor_name = (
            "lora_embedding_{}" if isinstance(modules[path], BankEmbedding) else "lora_{}.weight"
        )
        for side in SIDES:
            param = whole[f"{path}.lora_{side}"]
            _refuse_nonfinite(name, f"{path}.lora_{side}", param)
            tensors[f"{PEFT_PREFIX}{names[path]}.{tensor_name.format(side)}"] = (
                param.detach().cpu().contiguous()
            )
        # readers compute rank and scale from the config alone; it must say what was trained
        expected = (spec.rank(path) * modules[path].num_experts, adapter.plain_spec.scale(path))
        assert expected == (whole[f"{path}.lora_A"].shape[0], slot.scale), (
            f"{path}: its LoraSpec has rank and scale {expected}"
        )
    for key in adapter.further:
        _refuse_nonfinite(name, key, whole[key])
        # canonical names of what is further are PEFT's
        for file_name in (key, *adapter.further[key].also):
            # a tensor for each name: two names of one memory are not saved
            tensors[f"{PEFT_PREFIX}{file_name}"] = whole[key].detach().cpu().clone().contiguous()
    transposed = any(
        isinstance(modules[p], BankLinear) and modules[p].transposed for p in adapter.slots
    )
    linears, parameters = split_targets(model, adapter.spec, adapter.slots)
    weights = [path for path in adapter.slots if path not in linears]
    config = to_peft_config(
        name_patterns(
            spec,
            {f"{p}.weight": p for p in weights if not isinstance(modules[p], ExpertMatrices)},
        ),
        target_names(model, linears),
        parameters,
        transposed=transposed,
        base_name=base_name,
        task_type=_task_type(model),
    )
    first = modules[next(iter(adapter.slots))]
    dtype = first.dtype if isinstance(first, BankLinear) else first.weight.dtype
    facts = {
        **(extra or {}),
        "dtype": str(dtype).removeprefix("torch."),
        "adapter": name,
        "base_digest": base_digest(model),
    }
    if keeps_residual:
        facts["keep_residual"] = True
    if at_parameters(adapter, modules):
        facts["parameters_digest"] = parameters_digest(model)
    if (quantization := quantization_facts(model)) is not None:
        facts["quantization"] = quantization
    if (new := grown_with(model)) is not None:
        facts["new_tokens"] = new.facts()
    if start is not None:
        facts["start"] = {"path": start.path, "sha256": start.sha256}
        config = over_adapter_config(config)
    return encode_adapter(tensors, config, facts)


def _refuse_nonfinite(adapter: str, name: str, values: Tensor) -> None:
    # before any byte is written: a broken adapter must not replace a good one
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"adapter {adapter!r} holds NaN or infinity in {name}; nothing was written"
        )


def encode_adapter(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, bytes]:
    """The three files of an adapter from its tensors (by PEFT's names), PEFT's settings and what only
    Lorry knows."""
    return {
        ADAPTER_WEIGHTS: save(dict(tensors), {"format": "pt"}),
        ADAPTER_CONFIG: _encode_json(config),
        ADAPTER_FACTS: _encode_json({**facts, "lorry_version": _package_version()}),
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
    require_path(path, "path")
    if name is None and len(names) != 1:
        raise ConfigError(
            f"this model has the adapters {', '.join(names) or '(none)'}; name the one to save"
        )
    base_name = base_name or _base_origin(model)
    files = adapter_files(
        model, names[0] if name is None else name, base_name=base_name, extra=extra
    )
    over = start_files(model)
    durable.make_directory(Path(path))
    write_start_files(Path(path), over)
    # all three at once: tensors beside another version's config would be another adapter
    durable.write_files(Path(path), files)


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    trainable: bool = True,
    other_base: bool = False,
    convert_init: bool = False,
) -> Adapter:
    """Attach the adapter in directory ``path``, or in its sub-folder ``name``; a plain `model(x)`
    then uses it.

    ``name``: what to call it here, by default as it was saved. ``trainable=False`` freezes it.
    ``other_base=True`` accepts an adapter that was trained on other base weights. ``convert_init=True``
    reads one whose pissa or olora initialisation changed its base, which the file does not have, as if
    this model were that base before, in the same dtype. An adapter that
    was trained over another one (its start) brings that along, as a part of the base. Raises
    ModelError, before the model is touched, for a file that does not fit: a tensor missing,
    unknown, twice, of another shape or not finite; another base or start; a variant that is not
    plain LoRA.
    """
    require_model(model)
    require_path(path, "path", " of an adapter's directory")
    folder, name = find_adapter(path, name)
    start = next(iter(start_chain(folder)), None)
    check_start(model, folder, start)
    with _grown_as_saved(model, folder, other_base=other_base):
        return _load_checked(
            model,
            folder,
            name,
            None if start is None else start[0],
            trainable=trainable,
            other_base=other_base,
            convert_init=convert_init,
        )


def _load_checked(
    model: nn.Module,
    folder: Path,
    name: str,
    start: Path | None,
    *,
    trainable: bool,
    other_base: bool,
    convert_init: bool,
) -> Adapter:
    """`load_adapter` of a folder; ``start``: of the adapter that its own was trained over."""
    where = str(folder / ADAPTER_CONFIG)
    layers = list_adaptable_layers(model)
    rename = legacy_name_mapper(model, layers)
    convert_init = convert_init or _keeps_residual(model, folder)
    config = read_adapter_json(folder / ADAPTER_CONFIG)
    is_adalora = config.get("peft_type") == ADALORA
    spec = parse_peft_config(
        as_plain_config(config) if is_adalora else config, where, convert_init=convert_init
    )
    if not isinstance(spec.target_modules, str):
        spec = replace(spec, target_modules=tuple(rename(t) for t in spec.target_modules))
    check_pattern_time(spec, layers, where)
    # before reading tensors, so that a wrong base is named as such and not as a wrong shape
    if not other_base:
        check_base(model, folder)
    with open_adapter_weights(folder) as opened:
        weights = str(folder / ADAPTER_WEIGHTS)
        file: TensorFile = PlainLoraFile(opened, weights) if is_adalora else opened
        file, spec = join_single_experts(file, PEFT_PREFIX, spec, layers, where)
        parameters = match_peft_parameters(spec, layers)
        spec = name_patterns(
            spec,
            {p: f"{p}.weight" for p in parameters if not isinstance(layers[p], ExpertMatrices)},
        )
        of_tensor = {name: path for path, name in tensor_modules(parameters, layers).items()}
        parts, others = sort_lora_tensors(
            file, weights, layers, lambda module: of_tensor.get(module) or rename(module)
        )
        spec = name_tied_targets(model, spec, file, weights, parts)
        check_modules(model, spec, set(parts), where)
        if is_adalora:
            spec, parts = fit_ranks(spec, file, weights, parts)
        # everything is read and checked before `attach` touches the model
        values = read_lora_values(file, weights, spec, layers, parts)
        targets = {path: layer for path, layer in layers.items() if path in parts}
        spec = tied_as_stored(model, spec, others)
        try:
            further = further_starts(model, name, spec, targets)
        except ConfigError as e:
            raise ModelError(f"{where}: {e}") from e
        values |= read_further_values(model, file, weights, layers, rename, further, others)
    if start is not None and get_bank(model, create=True).start is None:
        load_start(model, start, other_base=other_base)
    adapter = attach(model, spec, name, modules=list(targets), trainable=trainable, from_file=True)
    with torch.no_grad():
        for key, view in adapter.tensors().items():
            # popped: what was read is as large as the adapter
            view.copy_(adapter.own_part(key, values.pop(key)))
    # copies were written under the masters, which no compute copy can know
    adapter.touch()
    return adapter


@contextmanager
def _grown_as_saved(model: nn.Module, folder: Path, *, other_base: bool) -> Iterator[None]:
    """With the new tokens in the model's embedding that an adapter of ours was trained with; they stay,
    unless the block raises."""
    new = saved_new_tokens(folder)
    if new is None:
        yield
        return
    if not other_base:
        check_base(model, folder)
    grown, digest = grown_with(model), known_base_digest(model)
    try:
        grow_base(model, new)
    except ConfigError as e:
        raise ModelError(f"{folder / ADAPTER_FACTS}: {e}") from e
    try:
        yield
    except BaseException:
        if grown is None:
            shrink_vocabulary(model)
        if digest is None:
            forget_base_digest(model)
        raise


def saved_new_tokens(folder: Path) -> NewTokens | None:
    """The new tokens that an adapter of ours was trained with. Raises ModelError."""
    file = folder / ADAPTER_FACTS
    facts = read_adapter_json(file).get("new_tokens") if file.is_file() else None
    return None if facts is None else NewTokens.of(facts, str(file))


def grow_base(model: nn.Module, new: NewTokens) -> None:
    """`grow_vocabulary`; the digest stays that of the base as it lies on disk."""
    if grown_with(model) is None and known_base_digest(model) is None:
        remember_base_digest(model)
    grow_vocabulary(model, new)


def _keeps_residual(model: nn.Module, folder: Path) -> bool:
    """Whether an adapter was saved by Lorry with `keep_residual`, over a base that this model is, to the
    bit as far as its digest tells. Raises ModelError where it computes in another dtype, from which
    another product would be taken off."""
    facts = folder / ADAPTER_FACTS
    saved = read_adapter_json(facts) if facts.is_file() else {}
    if saved.get("keep_residual") is not True:
        return False
    first = next((m for m in find_linears(model).values() if not isinstance(m, nn.Embedding)), None)
    here = str(getattr(first, "dtype", getattr(getattr(first, "weight", None), "dtype", None)))
    if here != f"torch.{saved.get('dtype')}":
        raise ModelError(
            f"{facts}: this adapter was saved with keep_residual over a base in {saved.get('dtype')}, and this "
            f"one is in {here.removeprefix('torch.')}; open it with dtype={saved.get('dtype')}"
        )
    return True


def load_start(model: nn.Module, path: str | Path, *, other_base: bool = False) -> Adapter:
    """Load an adapter, with those that it was trained over, and make it a part of the frozen base
    (`AdapterBank.move_to_base`): what is attached next is trained over it. Raises what
    `load_adapter` raises.
    """
    folder, _ = find_adapter(path)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ModelError(
            f"{folder} has no {ADAPTER_WEIGHTS}; only a saved adapter can be trained on top of"
        )
    origin = AdapterOrigin(str(folder.resolve()), adapter_digest(folder))
    name = f"start-{origin.sha256[:12]}"  # unlike those it was itself trained over
    load_adapter(model, folder, name, trainable=False, other_base=other_base)
    return get_bank(model).move_to_base(name, origin)


def find_adapter(path: str | Path, name: str | None = None) -> tuple[Path, str]:
    """(directory, adapter name): ``path`` itself, or a sub-folder as PEFT and runs of several
    adapters lay them out.

    Raises ModelError if there is none, or several and no ``name``; ConfigError for a name that
    cannot be a folder.
    """
    root = Path(path)
    if name is not None and is_adapter_folder(root / check_adapter_name(name)):
        return root / name, name
    if is_adapter_folder(root):
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
    subfolders = [path.name for path in list_adapter_subfolders(root)]
    if len(subfolders) == 1 and name is None:
        return root / subfolders[0], check_adapter_name(subfolders[0])
    choice = (
        f"; it has adapters named {', '.join(subfolders)}: pass name="
        if subfolders
        else "; pass the directory that does"
    )
    raise ModelError(f"{root} holds no {ADAPTER_CONFIG}{choice}")


def target_names(model: nn.Module, paths: Collection[str]) -> list[str]:
    """What to write as target_modules: last parts of names where they select exactly an adapter's
    modules (``paths``), else full paths.
    """
    leaves = list(dict.fromkeys(p.rpartition(".")[2] for p in paths))
    if MISTAKEN_LEAVES.intersection(leaves) and holds_experts(model):
        return list(paths)
    selected = {p for p, _ in model.named_modules() if p.rpartition(".")[2] in leaves}
    # short names only where they select exactly these: PEFT would otherwise create more layers
    return leaves if selected == set(paths) else list(paths)


def _task_type(model: nn.Module) -> str | None:
    """What PEFT wraps a model as: a causal language model, of which it asks that it generates, or any model."""
    generates = getattr(model, "can_generate", None)
    is_causal = hasattr(model, "config") if generates is None else generates()
    return "CAUSAL_LM" if is_causal else None


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


def _encode_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _package_version() -> str:
    try:
        return version("lorry")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
