"""Tensors of a Hugging Face directory, straight into the decoder: safetensors only, every name
accounted for.

The rule for whatever loads weights, here and in `load`, `embedded`, `quantized` and
`adapters.peft.tensors`: every tensor that the model expects comes from the files exactly once, in
its shape; every tensor of the files is used, or named in an error (or, for those that transformers'
own class leaves out, in a note); every value is finite. Nothing is ever filled in at random.
Buffers of older checkpoints that are recomputed (`RECOMPUTED_BUFFERS`) are not used; one with a NaN
is refused all the same: its file is damaged.

Nothing is initialised and then overwritten: the decoder is built on the meta device and takes the
file's tensors as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorry.adapters.layers import BankLinear
from lorry.adapters.peft.files import remember_base_digest
from lorry.adapters.quantization.linear import OpenBuffers, hold_packed
from lorry.adapters.quantization.packed import PackedMatrix, Quantization, pack
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.tensor_parallel.slices import DimensionSlice
from lorry.disk.safetensors_names import check_names
from lorry.errors import ModelError
from lorry.families import ModelFamily
from lorry.models.decoder.model import Decoder
from lorry.models.layer_weights import Sharder
from lorry.models.loading.describe import read_model_json

# Constants that older checkpoints stored beside the weights: the causal mask and the rotary table.
# They are recomputed.
RECOMPUTED_BUFFERS = re.compile(
    r"(.*\.)?(h|layers)\.\d+\.(attn|attention)\.(bias|masked_bias)|(.*\.)?rotary_emb\.inv_freq"
)
FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# named in the error alone; none of them is opened
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, its name there, shape and element type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_tensor_entries(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint by its name in the file, from `model.safetensors` or the shards
    its index lists.

    Raises ModelError if there are none, if only pickles are there, if the index and the shards
    disagree, or if there are both a single file and an index of others: transformers would read the
    first, other libraries the second.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.is_file():
        listed = _weight_map(index)
        if single.is_file() and (others := set(listed.values()) - {single.name}):
            raise ModelError(
                f"{directory} holds two checkpoints: {single.name}, and "
                f"{index.name} with {min(others)}; libraries differ in which one "
                f"they load (transformers: {single.name}). Move one of them away"
            )
        files = [directory / f for f in sorted(set(listed.values()))]
        if missing := next((file.name for file in files if not file.is_file()), None):
            raise ModelError(f"{index}: shard {missing} is missing; the checkpoint is incomplete")
    elif single.is_file():
        listed, files = None, [single]
    else:
        raise ModelError(_explain_no_weights(directory))
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read_shard_header(file).items():
            if listed is not None and listed.get(name) != file.name:
                raise ModelError(
                    f"{file}: holds {name!r}, which {index.name} places in {listed.get(name, 'no file')!r}"
                )
            entries[name] = entry
    if absent := sorted(set(listed or ()) - set(entries)):
        raise ModelError(
            f"{index}: lists {absent[0]!r}, which its shard does not hold ({len(absent)} such names)"
        )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    """tensor name -> shard. A shard is a plain file name beside the index: anything else could
    point outside the directory.
    """
    listed = read_model_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{index}: no weight_map")
    for shard in set(map(str, listed.values())):
        # no file system takes names beyond 255 bytes
        if len(shard) > 255 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", shard):
            raise ModelError(
                f"{index}: shard {shard!r:.80} is not the plain name of a .safetensors file beside the index"
            )
    return {str(k): str(v) for k, v in listed.items()}


def _read_shard_header(file: Path) -> dict[str, TensorEntry]:
    try:
        check_names(file)
        with safe_open(file, framework="pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 - safe_open is not iterable
            return {
                n: TensorEntry(file, n, tuple(s.get_shape()), s.get_dtype())
                for n, s in slices.items()
            }
    except (SafetensorError, OSError) as e:
        raise ModelError(
            f"{file}: not a complete safetensors file ({e}); download or copy it again"
        ) from e


def stored_float_dtype(entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """The one dtype of all floating tensors; float32 where there are several, since it holds them all."""
    dtypes = {FLOAT_DTYPES[e.dtype] for e in entries.values() if e.dtype in FLOAT_DTYPES}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _explain_no_weights(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    if pickles := [n for n in names if n.endswith(PICKLE_SUFFIXES)]:
        return (
            f"{directory} has {pickles[0]} but no .safetensors: loading a pickle "
            "can run any code, so Lorry does not. If you trust it, convert it: "
            "AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)"
        )
    if ggufs := [n for n in names if n.endswith(".gguf")]:
        return f"{directory} has no model.safetensors; to load the GGUF file give its path: {directory / ggufs[0]}"
    return f"{directory} has no model.safetensors and no model.safetensors.index.json"


def load_decoder(
    directory: Path,
    family: ModelFamily,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    ranks: TensorRanks | None = None,
    shard: Sharder | None = None,
    quantization: Quantization | None = None,
) -> Decoder:
    """The native decoder with a directory's weights; of ``ranks`` that share it each reads its own
    slices, on its own; with ``shard`` this rank's share of the rows, and no more is ever kept; with
    ``quantization`` matrices are packed as they are read, but for the head's and the embeddings'. Raises
    ModelError for any missing, unknown, misshapen, packed or not finite tensor."""
    entries = read_tensor_entries(directory)
    # no memory yet: the file's tensors become the parameters
    with torch.device("meta"):
        model = Decoder(family, config, ranks)
    cut = model.cut_tensors()
    expected = {
        name: _whole_shape(tensor, cut.get(name)) for name, tensor in model.state_dict().items()
    }
    refuse_damaged_buffers(entries)
    file_names = match_tensor_names(
        entries, family, expected, tied=model.geometry.tied, where=directory
    )
    shards, rows, keep = None, dict[str, slice](), dict[str, Callable[[Tensor], Tensor]]()
    if shard is not None:
        model.layer_weights = shards = shard(
            model.to(dtype),
            [model.get_submodule(family.layer.format(i=i)) for i in range(model.geometry.layers)],
        )
        empty = model.state_dict()
        rows = {name: shards.local_rows(p) for name, p in empty.items()}
        keep = {name: partial(shards.keep, p) for name, p in empty.items()}
    wanted = {name: entries[file_name] for name, file_name in file_names.items()}
    packed = dict[str, PackedMatrix]()
    if quantization is not None:
        packed = _read_packed(model, wanted, quantization, dtype, device)
    state = read_tensors(
        {n: entry for n, entry in wanted.items() if n not in packed},
        dtype,
        device,
        cut,
        rows,
        keep,
    )
    head, embed = f"{family.head}.weight", f"{family.embed}.weight"
    if model.geometry.tied:
        # a stored head beside a tie must be the embedding, or the two readers disagree
        if head in state and not torch.equal(state[head], state[embed]):
            raise ModelError(
                f"{directory}: config.json says tie_word_embeddings=true, but "
                f"{file_names[head]} and {file_names[embed]} differ; set "
                "tie_word_embeddings to false if the output head was trained "
                "separately"
            )
        state.pop(head, None)
    if packed:
        # what is held in place of their weights, under names of their own
        layers = {name.removesuffix(".weight") for name in packed}
        names = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] in layers}
        state |= {n: t for n, t in names.items() if n not in state}
    if shards is not None:
        shards.agree(f"reading {directory.name}")
        empty = model.state_dict()
        state = {name: shards.parameter(empty[name], share) for name, share in state.items()}
    if model.geometry.tied:
        # load_state_dict(strict) wants both names
        state[head] = state[embed]
    model.load_state_dict(state, strict=True, assign=True)
    if model.geometry.tied:
        model.tie()
    model.requires_grad_(False).eval()
    if shards is not None:
        remember_base_digest(model, shards.values_at)
    elif packed:
        # once: every packed matrix is opened for it
        remember_base_digest(model)
    return model


def _read_packed(
    model: Decoder,
    wanted: Mapping[str, TensorEntry],
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, PackedMatrix]:
    """Read and pack the matrices of all linears but the head, one at a time, into their layers; {name
    of the weight: what it is now}. Raises ModelError where a value is not finite."""
    packed, buffers = dict[str, PackedMatrix](), OpenBuffers()
    for path, layer in model.named_modules():
        name = f"{path}.weight"
        if not isinstance(layer, BankLinear) or path == model.family.head:
            continue
        # as the file has it: in whatever dtype it computes, it is the same base
        stored = FLOAT_DTYPES[wanted[name].dtype]
        (weight,) = read_tensors({name: wanted[name]}, stored, device).values()
        matrix = pack(weight.t() if layer.transposed else weight, quantization)
        hold_packed(layer, matrix, dtype, buffers)
        packed[name] = matrix
    return packed


def match_tensor_names(
    entries: Mapping[str, TensorEntry],
    family: ModelFamily,
    expected: Mapping[str, tuple[int, ...]],
    *,
    tied: bool,
    where: Path,
) -> dict[str, str]:
    """{our name: the file's name} for every expected tensor; the head may be absent when it is
    tied.
    """
    prefix = family.embed.partition(".")[0]
    file_names: dict[str, str] = {}
    unknown = []
    for file_name, entry in entries.items():
        name = next((n for n in _possible_names(file_name, prefix, family) if n in expected), None)
        if name is None:
            if not RECOMPUTED_BUFFERS.fullmatch(file_name):
                unknown.append(file_name)
            continue
        if name in file_names:
            raise ModelError(f"{where}: both {file_names[name]!r} and {file_name!r} are {name!r}")
        if entry.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{where}: {file_name} is stored as {entry.dtype}; packed weights cannot be loaded yet"
            )
        if entry.shape != expected[name]:
            raise ModelError(
                f"{where}: {file_name} has shape {list(entry.shape)}, but "
                f"config.json needs {list(expected[name])}; they belong to "
                "different models"
            )
        file_names[name] = file_name
    missing = [
        n for n in expected if n not in file_names and not (tied and n == f"{family.head}.weight")
    ]
    if missing or unknown:
        kinds = [("missing", missing), ("unknown", unknown)]
        parts = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds if names]
        raise ModelError(f"{where}: the tensors do not fit config.json: {'; '.join(parts)}")
    return file_names


def _possible_names(file_name: str, prefix: str, family: ModelFamily) -> list[str]:
    """Our names a file's name can stand for: itself, a renamed module, or a bare base model's (hub
    GPT-2: `h.0...`).
    """
    return [file_name, family.current_name(file_name), f"{prefix}.{file_name}"]


def _whole_shape(tensor: Tensor, cut: tuple[int, DimensionSlice] | None) -> tuple[int, ...]:
    """The shape on one device of a tensor of which this rank may have a part."""
    shape = list(tensor.shape)
    if cut is not None:
        shape[cut[0]] = cut[1].whole
    return tuple(shape)


def read_tensors(
    wanted: Mapping[str, TensorEntry],
    dtype: torch.dtype,
    device: torch.device,
    cut: Mapping[str, tuple[int, DimensionSlice]] = MappingProxyType({}),
    rows: Mapping[str, slice] = MappingProxyType({}),
    keep: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """The tensors, in ``dtype`` on ``device``, file by file; of those in ``cut`` nothing but a part
    along a dimension is read, of those in ``rows`` these alone (of dimension 0), and each goes where
    ``keep`` has it. Raises ModelError where a value is not finite.
    """
    by_file: dict[Path, list[str]] = {}
    for name, entry in wanted.items():
        by_file.setdefault(entry.file, []).append(name)
    state: dict[str, Tensor] = {}
    for file, names in by_file.items():
        # one open a shard: its header is parsed once
        with safe_open(file, framework="pt", device=str(device)) as f:
            for name in names:
                there = wanted[name].name
                if name in cut:
                    stored = _read_part(f.get_slice(there), *cut[name])
                    stored = stored[rows[name]] if name in rows else stored
                elif name in rows:
                    stored = f.get_slice(there)[rows[name]]
                else:
                    stored = f.get_tensor(there)
                # one tensor at a time: file and model never exist twice; a copy where others have
                # the rest, since a view of the file's memory would keep all of it that was read
                own = name in rows or (bool(cut) and name not in cut)
                state[name] = stored.to(dtype, copy=own)
                if not is_finite(state[name]):
                    raise ModelError(
                        f"{file}: {wanted[name].name} {_explain_not_finite(stored, dtype)}"
                    )
                if name in keep:
                    # before the next is read: nothing is ever there twice but one tensor
                    state[name] = keep[name](state[name])
    return state


def _read_part(stored: Any, dim: int, part: DimensionSlice) -> Tensor:
    """A part of a tensor of a safetensors file, which reads as much as it is asked for."""
    whole = slice(None)
    pieces = [stored[(whole,) * dim + (range_,)] for range_ in part.ranges()]
    # a copy, also of one piece, which is a view of the whole tensor in memory
    return torch.cat(pieces, dim)


def refuse_damaged_buffers(entries: Mapping[str, TensorEntry]) -> None:
    """Raise ModelError naming a buffer that is recomputed and holds a NaN. An infinity is none of
    damage: masks hold it.
    """
    for name, entry in entries.items():
        if RECOMPUTED_BUFFERS.fullmatch(name) and entry.dtype in FLOAT_DTYPES:
            with safe_open(entry.file, framework="pt") as f:
                if bool(f.get_tensor(entry.name).isnan().any()):
                    raise ModelError(
                        f"{entry.file}: {name} holds NaN; the checkpoint is damaged: get another copy"
                    )


def is_finite(tensor: Tensor) -> bool:
    """Whether every value of a floating tensor is finite.

    One pass for the extremes, which NaN takes over: 17 ms for 135M values in bf16 on two cores,
    where `isfinite().all()` takes 400. So no model is too large to be looked at whole."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    # NaN and infinities both show in the extremes
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def refuse_not_finite(
    where: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Raise ModelError naming the first of ``tensors`` (name, values) with a NaN or an infinity
    among its values.
    """
    for name, tensor in tensors:
        if not is_finite(tensor):
            unclear = (
                " in float16; load it with dtype=float32 to see whether the file does too"
                if dtype == torch.float16
                else ""
            )
            raise ModelError(
                f"{where}: {name} holds NaN or infinity{unclear}"
                if unclear
                else f"{where}: {name} {_DAMAGED}"
            )


def _explain_not_finite(stored: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with a tensor's values: their own fault, or that of the number format they were
    asked for in.
    """
    if is_finite(stored):
        remedy = "; open it with dtype=float32" if dtype != torch.float32 else ""
        return f"holds values too large for {str(dtype).removeprefix('torch.')}{remedy}"
    return _DAMAGED


_DAMAGED = (
    "holds NaN or infinity; the checkpoint is damaged, or its training failed; get another copy"
)
