"""Adapters of a Megatron-core model as PEFT's files, at any tensor and pipeline parallel size.

    save_lora(model, "adapters/step-100")     adapter_config.json, adapter_model.safetensors, lorry_adapter.json
    load_lora(model, "adapters/step-100")     from any other layout, or from PEFT

Every function here is called by every rank. What one rank finds wrong is raised on all of them, so that
nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from lorry.adapters.peft.base_digest import digest_samples, sample_positions
from lorry.adapters.peft.config import (
    check_pattern_time,
    parse_peft_config,
    read_adapter_json,
    to_peft_config,
)
from lorry.adapters.peft.files import encode_adapter, find_adapter, target_names
from lorry.adapters.peft.tensors import (
    PEFT_PREFIX,
    check_modules,
    list_adaptable_layers,
    open_adapter_weights,
    read_further_values,
    read_lora_values,
    sort_lora_tensors,
)
from lorry.adapters.spec import LoraSpec
from lorry.adapters.targets.candidates import find_linears
from lorry.disk import durable
from lorry.errors import ContractError, LorryError, ModelError
from lorry.integrations.megatron.attach import (
    MODES,
    MegatronAdapter,
    Mode,
    attach_lora,
    get_adapter,
    list_chunks,
    list_linears,
)
from lorry.integrations.megatron.hf_weights import EMBEDDING, HEAD, LoadedBase
from lorry.integrations.megatron.linear import (
    SIDES,
    LoraParallelLinear,
    local_values,
    tensor_group,
)
from lorry.models.megatron.layout import (
    FAMILY,
    LINEARS,
    hugging_face_tree,
    projection,
    row_order,
    shard_dim,
    whole_sizes,
)
from lorry.runs.layout import ADAPTER_CONFIG, ADAPTER_FACTS, ADAPTER_WEIGHTS

# of what should be the same on every rank; a rank that missed a collective is off by tens of percent
DRIFT_LIMIT = 1e-3
Model = nn.Module | Sequence[nn.Module]
T = TypeVar("T")


def save_lora(model: Model, path: str | Path, *, base_name: str | None = None) -> None:
    """Write the adapter into the directory ``path`` (made if absent), where PEFT and Lorry read
    it. ``base_name``: the base for PEFT, by default what `load_hf_weights` loaded. Raises ModelError
    where a value is not finite, ContractError where ranks have drifted apart, DiskError."""
    chunks = list_chunks(model)
    tensors = gather_lora(chunks)
    digest = gathered_base_digest(chunks)

    def write() -> None:
        files = lora_files(chunks, tensors, base_name=base_name, base_digest=digest)
        if is_writer():
            durable.make_directory(Path(path))
            durable.write_files(Path(path), files)

    on_every_rank(chunks, write)


def lora_files(
    model: Model,
    tensors: Mapping[str, Tensor],
    *,
    base_name: str | None = None,
    base_digest: str | None = None,
) -> dict[str, bytes]:
    """{file: content} of the adapter whose matrices `gather_lora` gathered. ``base_name``: as
    `save_lora` has it; ``base_digest``: by which a reader knows the base. Raises ModelError where a
    value is not finite."""
    chunk = list_chunks(model)[0]
    adapter = get_adapter(chunk)
    base: LoadedBase | None = chunk.__dict__.get("lorry_base")
    for name, tensor in tensors.items():
        # before a byte is written: a broken adapter must not replace a good one
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name} holds NaN or infinity; nothing was written")
    config = to_peft_config(
        adapter.spec,
        target_names(hugging_face_tree(chunk.config), adapter.paths),
        transposed=False,
        base_name=base_name or (None if base is None else base.path),
    )
    dtype = next(p.dtype for n, p in chunk.named_parameters() if ".lora_" not in n)
    facts: dict[str, Any] = {
        "adapter": "default",
        "dtype": str(dtype).removeprefix("torch."),
        "megatron_mode": adapter.mode,
    }
    if base_digest is not None:
        facts["base_digest"] = base_digest
    return encode_adapter({_peft_name(n): t for n, t in tensors.items()}, config, facts)


def load_lora(
    model: Model, path: str | Path, *, mode: Mode | None = None, other_base: bool = False
) -> None:
    """Load the adapter in the directory ``path``: into the adapter that the model has, which must be
    alike, or into a new one. ``mode``: of a new one, by default the file's. ``other_base=True`` accepts
    one that was trained over other base weights. Raises ModelError, before a value is written, for a
    file that does not fit."""
    chunks = list_chunks(model)
    folder, spec, values, facts = on_every_rank(chunks, lambda: _read(chunks[0], Path(path)))
    # a collective, so outside what one rank may leave early
    digest = gathered_base_digest(chunks)
    saved = facts.get("base_digest")

    def check() -> MegatronAdapter | None:
        if saved is not None and digest is not None and saved != digest and not other_base:
            raise ModelError(
                f"{folder / ADAPTER_FACTS}: this adapter was trained on other base weights than this "
                "model's; load it on its own base (other_base=True accepts the difference)"
            )
        if "lorry_adapter" not in chunks[0].__dict__:
            return None
        adapter = get_adapter(chunks[0])
        _check_alike(adapter, spec, values, folder)
        return adapter

    adapter = on_every_rank(chunks, check)
    recorded = facts.get("megatron_mode", "canonical")
    chosen = adapter.mode if adapter else mode or (recorded if recorded in MODES else "canonical")
    on_every_rank(chunks, lambda: _check_fused_values(chosen, values, folder))
    if adapter is None:
        attach_lora(chunks, spec, mode=chosen)
    for chunk in chunks:
        for linear in get_adapter(chunk).linears.values():
            _fill(linear, values)
        get_adapter(chunk).is_new = False


def read_lora(model: Model, path: str | Path) -> tuple[LoraSpec, Mode, dict[str, Tensor]]:
    """(what it is, the mode it was trained in, {`MODULE.lora_A`: whole matrix}) of the adapter in the
    directory ``path``, for a model as this one is. Raises ModelError."""
    _, spec, values, facts = _read(list_chunks(model)[0], Path(path))
    recorded = facts.get("megatron_mode", MODES[0])
    return spec, recorded if recorded in MODES else MODES[0], values


def gather_lora(
    model: Model, value: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
) -> dict[str, Tensor]:
    """{`MODULE.lora_A`: [r, in], `MODULE.lora_B`: [out, r]} of the whole model, fp32 on the CPU, by
    Hugging Face's paths, on every rank. ``value``: of a parameter, where a copy is to be read instead.
    Raises ContractError, on every rank, where what is whole differs between them."""
    chunks = list_chunks(model)
    device = next(chunks[0].parameters()).device
    own = dict(local for chunk in chunks for local in _local_tensors(chunk, value))
    shards = gather_over(parallel_state.get_tensor_model_parallel_group(), own, device)
    stage = {name: _join(name, [shard[name] for shard in shards]) for name in own}
    stages = gather_over(parallel_state.get_pipeline_model_parallel_group(), stage, device)

    def check() -> None:
        for name in own:
            _refuse_drift(name, [shard[name] for shard in shards])

    # behind the collectives: one stage may be fine while another is not
    on_every_rank(chunks, check)
    whole = {name: tensor for each in stages for name, tensor in each.items()}
    return {
        f"{path}.lora_{side}": whole[f"{path}.lora_{side}"]
        for path in get_adapter(chunks[0]).paths
        for side in SIDES
    }


def gathered_base_digest(model: Model) -> str | None:
    """`adapters.peft.base_digest.base_digest` of the whole model, the same at every layout; None where the
    base was not loaded by `load_hf_weights`, which alone knows the size of the vocabulary."""
    chunks = list_chunks(model)
    base: LoadedBase | None = chunks[0].__dict__.get("lorry_base")
    if base is None:
        return None
    device = next(chunks[0].parameters()).device
    shapes = {name: shape for chunk in chunks for name, shape in _weight_shapes(chunk, base)}
    own = {name: values for chunk in chunks for name, values in _weight_samples(chunk, base)}
    shards = gather_over(parallel_state.get_tensor_model_parallel_group(), own, device)
    # every value lies on one rank, and the others have zeros
    stage = {name: torch.stack([shard[name] for shard in shards]).sum(0) for name in own}
    described = {
        f"{name}|{'x'.join(map(str, shapes[name]))}": values for name, values in stage.items()
    }
    stages = gather_over(parallel_state.get_pipeline_model_parallel_group(), described, device)
    samples = {}
    for each in stages:
        for key, values in each.items():
            name, _, shape = key.partition("|")
            samples[name] = (tuple(map(int, shape.split("x"))), values)
    return digest_samples(samples)


def gather_over(
    group: Any, tensors: Mapping[str, Tensor], device: torch.device
) -> list[dict[str, Tensor]]:
    """Every rank's tensors, on the CPU, in order of rank in the group; names may differ. ``device``:
    where the group's backend takes them."""
    # memory of its own: a fused A goes by several names, which safetensors refuses
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if group.size() == 1:
        return [own]
    payload = torch.frombuffer(bytearray(save_bytes(own)), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    torch.distributed.all_gather(sizes, torch.tensor([payload.numel()], device=device), group=group)
    padded = payload.new_zeros(int(max(sizes)))
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=group)
    return [
        load_bytes(part[: int(size)].cpu().numpy().tobytes())
        for part, size in zip(parts, sizes, strict=True)
    ]


def on_every_rank(model: Model, function: Callable[[], T]) -> T:
    """What ``function`` returns here; what it raises on one rank is raised on every rank, so that
    nobody waits for one that has left."""
    device = next(list_chunks(model)[0].parameters()).device
    failure: LorryError | None = None
    try:
        result = function()
    except LorryError as error:
        failure = error
    text = b"" if failure is None else str(failure).encode()
    told = {"error": torch.frombuffer(bytearray(text + b"\0"), dtype=torch.uint8)}
    frames = gather_over(torch.distributed.group.WORLD, told, device)
    if failure is not None:
        raise failure
    for rank, frame in enumerate(frames):
        if message := bytes(frame["error"].tolist()[:-1]).decode():
            raise ModelError(f"rank {rank}: {message}")
    return result


def is_writer() -> bool:
    """Whether this is the one rank that writes files."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def _peft_name(name: str) -> str:
    return f"{PEFT_PREFIX}{name}.weight"


def _local_tensors(
    chunk: nn.Module, value: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of every projection's A and B."""
    for linear in get_adapter(chunk).linears.values():
        lora = linear.lora
        for term in lora.terms:
            a, b = (
                value(linear.get_parameter(term.parameter(side))).detach().float() for side in SIDES
            )
            parts = lora.order.split(b) if len(term.targets) > 1 else [b]
            for target, part in zip(term.targets, parts, strict=True):
                path = FAMILY.path(target, lora.layer)
                yield f"{path}.lora_A", a
                yield f"{path}.lora_B", part


def _join(name: str, shards: Sequence[Tensor]) -> Tensor:
    """The whole matrix from every rank's part."""
    dim = _cut_dim(name)
    return shards[0] if dim is None else torch.cat(list(shards), dim)


def _cut_dim(name: str) -> int | None:
    """The dimension in which `MODULE.lora_A` or `MODULE.lora_B` is cut over ranks."""
    path, side = name.rpartition(".lora_")[::2]
    target = path.rpartition(".")[2]
    place = next(linear for linear in LINEARS if target in linear.targets)
    return shard_dim(place.parallel, "A" if side == "A" else "B")


def _refuse_drift(name: str, shards: Sequence[Tensor]) -> None:
    """Raise ContractError where ranks have different values of what they all have."""
    if _cut_dim(name) is not None:
        return
    first = shards[0]
    for rank, shard in enumerate(shards):
        if (drift := float((shard - first).abs().max())) > DRIFT_LIMIT * float(first.abs().max()):
            raise ContractError(
                f"{name} is the same on every rank of tensor parallel, but rank {rank}'s differs from "
                f"rank 0's by {drift:.2g}: its gradients were not added up alike. Nothing was written"
            )


def _read(chunk: nn.Module, path: Path) -> tuple[Path, LoraSpec, dict[str, Tensor], dict[str, Any]]:
    """(directory, spec, whole matrices by name, what only Lorry knows) of an adapter's files."""
    folder, _ = find_adapter(path)
    where = str(folder / ADAPTER_CONFIG)
    tree = hugging_face_tree(chunk.config)
    layers = list_adaptable_layers(tree)
    spec = parse_peft_config(read_adapter_json(folder / ADAPTER_CONFIG), where)
    check_pattern_time(spec, layers, where)
    weights = str(folder / ADAPTER_WEIGHTS)
    with open_adapter_weights(folder) as file:
        parts, others = sort_lora_tensors(file, weights, layers, lambda module: module)
        check_modules(tree, spec, set(parts), where)
        values = read_lora_values(file, weights, spec, layers, parts)
        # Megatron's layers have A's and B's alone
        read_further_values(tree, file, weights, layers, lambda module: module, {}, others)
    paths = [path for path in find_linears(tree) if path in parts]
    # layer numbers and patterns select by rules; what the file holds is what they came to
    spec = spec.at_modules(paths)
    facts = folder / ADAPTER_FACTS
    return folder, spec, values, read_adapter_json(facts) if facts.is_file() else {}


def _check_alike(
    adapter: MegatronAdapter, spec: LoraSpec, values: Mapping[str, Tensor], folder: Path
) -> None:
    ours, theirs = set(adapter.paths), {name.rpartition(".")[0] for name in values}
    if ours != theirs:
        odd = sorted(ours ^ theirs)[0]
        raise ModelError(
            f"{folder}: {'has no' if odd in ours else 'has an'} adapter on {odd}, unlike the model; "
            "apply LoRA with the file's targets, or load it into a model without adapters"
        )
    for path in adapter.paths:
        mine, other = ((s.rank(path), s.scale(path)) for s in (adapter.spec, spec))
        if mine != other:
            raise ModelError(
                f"{folder}: rank and scale at {path} are {other}, the model's {mine}; apply LoRA with "
                "the file's, or load it into a model without adapters"
            )


def _check_fused_values(mode: Mode, values: Mapping[str, Tensor], folder: Path) -> None:
    """One A stands for several projections in fused mode: a file's must then be the same."""
    if mode == "canonical":
        return
    for name, value in values.items():
        path, side = name.rpartition(".lora_")[::2]
        layer, target = projection(path)
        place = next(linear for linear in LINEARS if target in linear.targets)
        first = FAMILY.path(place.targets[0], layer)
        if side == "A" and not torch.equal(value, values.get(f"{first}.lora_A", value)):
            raise ModelError(
                f"{folder}: {first} and {path} have different lora_A, which lora_mode=fused cannot "
                "hold; use lora_mode=canonical"
            )


@torch.no_grad()
def _fill(linear: LoraParallelLinear, values: Mapping[str, Tensor]) -> None:
    lora = linear.lora
    for term in lora.terms:
        paths = [FAMILY.path(target, lora.layer) for target in term.targets]
        a = values[f"{paths[0]}.lora_A"]
        b = torch.cat([values[f"{path}.lora_B"] for path in paths])
        local = local_values(lora, term, a, b, lora.group.rank(), lora.group.size())
        for side, value in zip(SIDES, local, strict=True):
            getattr(linear, term.parameter(side)).copy_(value)


def _weight_shapes(chunk: nn.Module, base: LoadedBase) -> Iterator[tuple[str, tuple[int, int]]]:
    """(Hugging Face path, shape of the whole weight) of what a chunk has of the base."""
    config: Any = chunk.config
    sizes = whole_sizes(config)
    for number, place, _ in list_linears(chunk):
        for target in place.targets:
            yield FAMILY.path(target, number), sizes[target]
    there = {name for name, _ in chunk.named_parameters()}
    for name, path in _ends(chunk):
        if name in there:
            yield path, (base.vocab, config.hidden_size)


def _ends(chunk: nn.Module) -> list[tuple[str, str]]:
    """(parameter, Hugging Face path) of embedding and head; a tied head is the embedding's."""
    model: Any = chunk
    ends = [(EMBEDDING, FAMILY.embed)]
    if model.share_embeddings_and_output_weights:
        return [*ends, (EMBEDDING, FAMILY.head)]
    return [*ends, (HEAD, FAMILY.head)]


def _weight_samples(chunk: nn.Module, base: LoadedBase) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face path, the values at `sample_positions` of the whole weight that this rank has, zeros
    elsewhere)."""
    shapes = dict(_weight_shapes(chunk, base))
    group = tensor_group(chunk)
    for number, place, linear in list_linears(chunk):
        order = row_order(chunk.config, place, group.size())
        dim = shard_dim(place.parallel, "weight")
        parts = order.split(linear.get_parameter("weight").detach())
        for target, part in zip(place.targets, parts, strict=True):
            path = FAMILY.path(target, number)
            yield path, _samples(part, shapes[path], dim, group)
    for name, path in _ends(chunk):
        if path in shapes:
            yield path, _samples(chunk.get_parameter(name).detach(), shapes[path], 0, group)


def _samples(part: Tensor, shape: tuple[int, int], dim: int | None, group: Any) -> Tensor:
    """bf16, as the digest has them."""
    positions = sample_positions(shape[0] * shape[1])
    row, column = positions // shape[1], positions % shape[1]
    first = group.rank() * part.shape[dim or 0]
    index = (row if dim == 0 else column) - first
    mine = (index >= 0) & (index < part.shape[dim or 0])
    values = torch.zeros(len(positions), dtype=torch.bfloat16)
    picked = (index, column) if dim == 0 else (row, index)
    found = part[picked[0][mine].to(part.device), picked[1][mine].to(part.device)]
    values[mine] = found.to(torch.bfloat16).cpu()
    return values
