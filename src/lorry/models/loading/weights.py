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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.peft.base_digest import remember_base_digest
from lorry.adapters.quantization.linear import remember_packed_digest
from lorry.adapters.tensor_parallel.ranks import TensorRanks
from lorry.adapters.tensor_parallel.slices import DimensionSlice
from lorry.errors import ConfigError, ModelError
from lorry.families import ModelFamily
from lorry.models.decoder.model import Decoder
from lorry.models.layer_weights import Sharder
from lorry.models.loading.tensor_files import (
    FLOAT_DTYPES,
    TensorEntry,
    read_stored,
    read_tensor_entries,
    read_tensors,
)
from lorry.models.packed.reading import MatrixReader, MatrixSource

# Constants that older checkpoints stored beside the weights: the causal mask and the rotary table.
# They are recomputed.
RECOMPUTED_BUFFERS = re.compile(
    r"(.*\.)?(h|layers)\.\d+\.(attn|attention)\.(bias|masked_bias)|(.*\.)?rotary_emb\.inv_freq"
)


def load_decoder(
    directory: Path,
    family: ModelFamily,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    ranks: TensorRanks | None = None,
    shard: Sharder | None = None,
    matrices: MatrixSource | None = None,
) -> Decoder:
    """The native decoder with a directory's weights; of ``ranks`` that share it each reads its own
    slices, on its own; with ``shard`` this rank's share of the rows, and no more is ever kept; with
    ``matrices`` those of linears but the head come from there, and are held packed. Raises ModelError for
    any missing, unknown, misshapen, packed or not finite tensor, ConfigError for packed matrices that
    cannot be cut."""
    entries: Mapping[str, TensorEntry] = read_tensor_entries(directory)
    if matrices is not None:
        entries = matrices.join(entries)
    # no memory yet: the file's tensors become the parameters
    with torch.device("meta"):
        model = Decoder(family, config, ranks)
    cut = model.cut_tensors()
    expected = {
        name: _whole_shape(tensor, cut.get(name)) for name, tensor in model.state_dict().items()
    }
    refuse_damaged_buffers(entries)
    entries = _without_empty_biases(entries, family, expected)
    file_names = match_tensor_names(
        entries, family, expected, tied=model.geometry.tied, where=directory
    )
    wanted = {name: entries[file_name] for name, file_name in file_names.items()}
    reader = None if matrices is None else MatrixReader(model, wanted, matrices, dtype)
    shards, rows, keep = None, dict[str, slice](), dict[str, Callable[[Tensor], Tensor]]()
    if shard is not None:
        model.to(dtype)
        if reader is not None:  # what is cut is what the layers will hold
            reader.hold_empty()
        model.layer_weights = shards = shard(
            model,
            [model.get_submodule(family.layer.format(i=i)) for i in range(model.geometry.layers)],
        )
        empty = model.state_dict()
        rows = {name: shards.local_rows(p) for name, p in empty.items()}
        keep = {name: partial(shards.keep, p) for name, p in empty.items()}
    read, state = set[str](), dict[str, Tensor]()
    if reader is not None:

        def keep_rows(name: str, tensor: Tensor) -> Tensor:
            # a copy: a view would keep all that was read
            return keep[name](tensor[rows[name]].clone())

        read, state = reader.read(device, None if shards is None else keep_rows)
    state |= read_tensors(
        {name: entry for name, entry in wanted.items() if name not in read},
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
    samples = {} if reader is None else reader.samples
    if shards is not None:
        remember_base_digest(model, shards.values_at, samples)
    elif ranks is not None or reader is not None:
        remember_base_digest(model, samples=samples)
    if reader is not None:
        remember_packed_digest(model, reader.digest)
        # of a cut model nobody has the whole head
        model.packed_head = reader.head() if ranks is None and shard is None else None
    return model


def _without_empty_biases(
    entries: Mapping[str, TensorEntry], family: ModelFamily, expected: Mapping[str, object]
) -> Mapping[str, TensorEntry]:
    """The tensors but for biases of zeros that the model has no place for: some quantisers give every
    packed linear one."""
    prefix, empty = family.embed.partition(".")[0], set[str]()
    for name, entry in entries.items():
        bias = f"{name.removesuffix('weight')}bias"
        if entry.parts and bias in entries:
            known = any(n in expected for n in _possible_names(bias, prefix, family))
            if not known and not bool(read_stored(entries[bias]).any()):
                empty.add(bias)
    return {name: entry for name, entry in entries.items() if name not in empty}


def stored_matrices(model: nn.Module, directory: Path) -> Callable[[str], Tensor]:
    """A function from a linear's path to its matrix [O,I], fp32, as the files of the model have it:
    read when it is asked for, also where the model holds it packed. It raises ConfigError where no file
    has it whole, and what `read_tensors` raises."""

    def read(path: str) -> Tensor:
        entries, family = read_tensor_entries(directory), getattr(model, "family", None)
        name = f"{path}.weight"
        if family is not None:
            prefix = family.embed.partition(".")[0]
            found = (e for e in entries if name in _possible_names(e, prefix, family))
            file_name = next(found, name)
        else:
            file_name = name
        if file_name not in entries or entries[file_name].parts:
            what = "no tensor" if file_name not in entries else "only in packed form"
            raise ConfigError(
                f"{directory} has {what} {name}; what packing rounded off {path} cannot be read from it"
            )
        (weight,) = read_tensors(
            {name: entries[file_name]}, torch.float32, torch.device("cpu")
        ).values()
        layer = model.get_submodule(path)
        return weight.t() if isinstance(layer, BankLinear) and layer.transposed else weight

    return read


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
        if entry.parts:  # its own format checks what it is
            file_names[name] = file_name
            continue
        if entry.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{where}: {file_name} is stored as {entry.dtype}, and config.json says nothing of packed weights"
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
