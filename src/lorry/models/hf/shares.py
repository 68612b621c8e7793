"""A model of transformers of which every rank holds a share: built without memory, then given this
rank's rows of every tensor of its files.

transformers' own reading makes the whole model on every rank first. So only files that hold the
tensors of the class as they are can be read here, and the others are refused: transformers stacks
what lies in parts (the experts of a mixture), or keeps some weights in another number format.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lorry.adapters.attach import wrap_layers
from lorry.errors import ModelError
from lorry.models.hf.anatomy import find_layers
from lorry.models.layer_weights import Sharder, WeightShards
from lorry.models.loading.accounting import (
    list_ignored_keys,
    refuse_packed_weights,
    refuse_untied_weights,
)
from lorry.models.loading.tensor_files import TensorEntry, read_tensor_entries, read_tensors
from lorry.models.loading.weights import RECOMPUTED_BUFFERS, refuse_damaged_buffers


def read_shares(
    directory: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    shard: Sharder,
    *,
    trust_remote_code: bool,
) -> tuple[Any, WeightShards]:
    """transformers' implementation with this rank's share of the weights, which every pass through it
    gathers layer by layer. Raises ModelError where the files cannot be read share by share."""
    entries = read_tensor_entries(directory)
    # torch's annotation leaves out what its documentation says: a result takes the parameter's place
    hook = register_module_parameter_registration_hook(_without_memory)  # type: ignore[arg-type]
    try:
        inner = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    finally:
        hook.remove()
    inner.requires_grad_(False).eval()
    refuse_damaged_buffers(entries)
    refuse_packed_weights(directory, inner, entries)
    refuse_untied_weights(directory, inner, entries)
    wanted = _entries_of_parameters(directory, inner, entries, dtype)
    # before the groups are made, which know modules: attaching would put others in their place
    wrap_layers(inner)
    layers = find_layers(inner)
    _refuse_shared_layers(directory, inner, layers)
    shards = shard(inner, layers)
    # by the name in the file's tensors: of tied parameters one is stored
    empty = dict(inner.named_parameters(remove_duplicate=False))
    rows = {name: shards.local_rows(empty[name]) for name in wanted}
    keep = {name: partial(shards.keep, empty[name]) for name in wanted}
    state = read_tensors(wanted, dtype, device, rows=rows, keep=keep)
    shards.agree(f"reading {directory.name}")
    filled = {id(empty[name]): shards.parameter(empty[name], state.pop(name)) for name in wanted}
    for module in inner.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, filled[id(parameter)])
    for buffer_owner in inner.modules():
        for name, buffer in buffer_owner.named_buffers(recurse=False):
            buffer_owner._buffers[name] = buffer.to(device)
    walk_with_layers(inner, layers, shards)
    return inner, shards


def _without_memory(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """In place of a parameter that a module registers. One that has no memory stays the object it is:
    it may be tied."""
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


def _entries_of_parameters(
    where: Path, inner: Any, entries: Mapping[str, TensorEntry], dtype: torch.dtype
) -> dict[str, TensorEntry]:
    """{parameter: where it lies} of every parameter once. Raises ModelError where names or shapes of
    the files are not those of the class."""

    def refuse(why: str) -> ModelError:
        return ModelError(
            f"{where}: {why}, so {type(inner).__name__} cannot be read share by share "
            "(backend=fsdp); give backend=ddp"
        )

    kept = getattr(inner, "_keep_in_fp32_modules", None) or getattr(
        inner, "_keep_in_fp32_modules_strict", None
    )
    if kept and dtype != torch.float32:
        raise refuse(f"{', '.join(sorted(kept))} stay in float32")
    state = inner.state_dict()
    parameters = dict(inner.named_parameters(remove_duplicate=False))
    if buffers := sorted(set(state) - set(parameters)):
        raise refuse(f"{buffers[0]} is a buffer of its checkpoint")
    renamings = [r for r in get_model_conversion_mapping(inner) if isinstance(r, WeightRenaming)]
    ignored = list_ignored_keys(inner, entries)
    found, unknown = dict[str, TensorEntry](), list[str]()
    for name, entry in entries.items():
        target, _ = rename_source_key(name, renamings, [], inner.base_model_prefix, state)
        if target in parameters:
            if tuple(parameters[target].shape) != entry.shape:
                raise refuse(
                    f"{name} has shape {list(entry.shape)} in the file and "
                    f"{list(parameters[target].shape)} in the class"
                )
            found[target] = entry
        elif name not in ignored and not RECOMPUTED_BUFFERS.fullmatch(name):
            unknown.append(name)
    # of tied parameters the first that is stored
    stored = {id(parameters[name]) for name in found}
    missing = [name for name, p in parameters.items() if id(p) not in stored]
    for kind, names in (("unknown", unknown), ("missing", missing)):
        if names:
            raise refuse(f"{len(names)} tensors are {kind} ({', '.join(sorted(names)[:3])})")
    once = {id(parameters[name]): name for name in reversed(found)}
    return {name: found[name] for name in once.values()}


def _refuse_shared_layers(where: Path, inner: Any, layers: Sequence[nn.Module]) -> None:
    owners = dict[int, set[int]]()
    for number, layer in enumerate(layers):
        for parameter in layer.parameters():
            owners.setdefault(id(parameter), set()).add(number)
    if not layers or any(len(numbers) > 1 for numbers in owners.values()):
        what = "layers share weights" if layers else "no list of layers is found"
        raise ModelError(
            f"{where}: {type(inner).__name__}: {what}, so backend=fsdp cannot cut it layer by layer; "
            "give backend=ddp"
        )


def walk_with_layers(inner: Any, layers: Sequence[nn.Module], weights: WeightShards) -> None:
    """Let every call of the model's body be a pass through ``weights``, and every layer be reached when
    it is called, and in backward when the gradient of its output is there."""
    bodies = _bodies(inner, layers)
    open_passes = list[ExitStack]()

    def begin(module: nn.Module, args: Any) -> None:
        stack = ExitStack()
        if not open_passes:  # a body inside another one is the same pass
            stack.enter_context(weights.forward_pass())
        open_passes.append(stack)

    def end(module: nn.Module, args: Any, out: Any) -> None:
        open_passes.pop().close()

    for body in bodies:
        body.register_forward_pre_hook(begin)
        body.register_forward_hook(end, always_call=True)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(_reach(weights, number))
        layer.register_forward_hook(_reach_in_backward(weights, number))


def _bodies(inner: Any, layers: Collection[nn.Module]) -> list[nn.Module]:
    """The modules whose call runs the layers: transformers' two accessors, or the model itself."""
    first = next(iter(layers))
    candidates = [inner.get_decoder(), getattr(inner, inner.base_model_prefix, None)]
    bodies = {
        id(module): module
        for module in candidates
        if isinstance(module, nn.Module) and any(part is first for part in module.modules())
    }
    return list(bodies.values()) or [inner]


def _reach(weights: WeightShards, number: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        weights.reach(number)

    return hook


def _reach_in_backward(weights: WeightShards, number: int) -> Callable[..., None]:
    def reach(gradient: Tensor) -> None:
        weights.reach(number)

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        for part in [out] if isinstance(out, Tensor) else out:
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(reach)

    return hook
