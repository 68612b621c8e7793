"""The tensors of a Hugging Face directory: where each lies, from the headers of its safetensors files, and
their values, one at a time and every one finite. Pickles are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorry.adapters.tensor_parallel.slices import DimensionSlice
from lorry.disk.safetensors_names import check_names
from lorry.errors import ModelError
from lorry.models.loading.describe import read_model_json

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
    """Where a tensor lies: its file, its name there, shape and element type. ``parts``: of a matrix that
    is stored packed, the tensors that it is stored in (`models/packed`)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[str, TensorEntry] = field(default_factory=dict)


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


def read_stored(entry: TensorEntry) -> Tensor:
    """A tensor as it is stored."""
    with safe_open(entry.file, framework="pt") as file:
        stored: Tensor = file.get_tensor(entry.name)
        return stored


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
