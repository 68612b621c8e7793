"""What transformers' loader made of a checkpoint, held to the rule of `models.loading.weights`.

    inner, info = AutoModelForCausalLM.from_pretrained(..., ignore_mismatched_sizes=True, output_loading_info=True)
    refuse_unfit(directory, inner, info, entries(directory), add_note)

transformers itself only warns: it fills what is missing with random numbers, keeps the last of two
tensors that mean one, and drops what it does not expect.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorry.errors import ModelError
from lorry.models.loading.tensor_files import FLOAT_DTYPES, TensorEntry, refuse_not_finite
from lorry.models.loading.weights import RECOMPUTED_BUFFERS, refuse_damaged_buffers
from lorry.notes import NoteCallback

# 6 digits: int() of a hostile name stays cheap
EXPERT_TENSOR = re.compile(r"(?P<before>.*\b)experts\.(?P<number>\d{1,6})\.(?P<after>.+)")


def refuse_unfit_tensors(
    where: Path,
    inner: Any,
    info: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    add_note: NoteCallback,
) -> None:
    """Raise ModelError unless the tensors of ``entries`` (by their names in the files) are those of
    ``inner``, each once, and every value is finite. ``info``: transformers' loading info. Tensors
    that transformers' class leaves out by design are named in a note."""
    # cheap checks of names first; values are read last
    refuse_loading_errors(where, inner, info)
    refuse_packed_weights(where, inner, entries)
    refuse_duplicate_tensors(where, inner, entries)
    refuse_damaged_buffers(entries)
    refuse_missing_experts(where, entries)
    refuse_untied_weights(where, inner, entries)
    if dropped := list_ignored_keys(inner, entries):
        some = ", ".join(dropped[:3])
        add_note(
            f"{where}: {len(dropped)} tensors are not part of "
            f"{type(inner).__name__} and were ignored ({some})"
        )
    # after loading: these are the values that will be computed with
    refuse_not_finite(where, inner.state_dict().items(), inner.dtype)


def refuse_loading_errors(
    where: Path,
    inner: Any,
    info: Mapping[str, Any],
    *,
    file_names: Mapping[str, str] | None = None,
    described_by: str = "config.json",
) -> None:
    """Raise ModelError for whatever transformers' loading info says is missing, unknown or
    misshapen. ``file_names``: {name in the model: name in the file}."""
    unknown = [n for n in info["unexpected_keys"] if not RECOMPUTED_BUFFERS.fullmatch(n)]
    misshapen = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
    for kind, names in (
        ("missing", info["missing_keys"]),
        ("unknown", unknown),
        ("misshapen", misshapen),
    ):
        if names:
            some = ", ".join(sorted((file_names or {}).get(n, n) for n in names)[:3])
            raise ModelError(
                f"{where}: {len(names)} tensors {kind} for {type(inner).__name__} ({some}); it does not fit {described_by}"
            )
    if info["error_msgs"]:
        raise ModelError(f"{where}: transformers could not load it ({info['error_msgs'][0]})")


def refuse_packed_weights(where: Path, inner: Any, entries: Mapping[str, TensorEntry]) -> None:
    """Raise ModelError where integers or 8-bit floats without their scale are stored in the place
    of weights: transformers casts them and computes with the codes."""
    state, prefix = inner.state_dict(), f"{inner.base_model_prefix}."
    for name, entry in entries.items():
        weight = next((state[n] for n in (name, f"{prefix}{name}") if n in state), None)
        # an integer buffer where the model has an integer is fine
        if entry.dtype not in FLOAT_DTYPES and weight is not None and weight.is_floating_point():
            raise ModelError(
                f"{where}: {name} is stored as {entry.dtype}; packed weights cannot be loaded yet"
            )


def refuse_duplicate_tensors(where: Path, inner: Any, names: Collection[str]) -> None:
    """Raise ModelError where two names of the files are one tensor of the model (with and without
    the prefix `model.`, or in an old and a new spelling): transformers keeps whichever it reads
    last.
    """
    # half a second (torch.distributed.tensor, sympy) that no native model needs
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [r for r in get_model_conversion_mapping(inner) if isinstance(r, WeightRenaming)]
    prefix, state = inner.base_model_prefix, inner.state_dict()
    by_target: dict[str, str] = {}
    for name in sorted(names):
        target, _ = rename_source_key(name, renamings, [], prefix, state)
        # files of bare base models lack the prefix
        target = target.removeprefix(f"{prefix}.")
        if (other := by_target.setdefault(target, name)) != name:
            raise ModelError(f"{where}: both {other!r} and {name!r} are {target!r}")


def refuse_missing_experts(where: Path, names: Collection[str]) -> None:
    """Raise ModelError where a list of experts lacks a number: transformers stacks those that are
    there, in order, so that with another one too many every expert behind the gap would be its
    neighbour.
    """
    lists: dict[str, set[int]] = {}
    for name in names:
        if (match := EXPERT_TENSOR.fullmatch(name)) is not None:
            lists.setdefault(f"{match['before']}experts.*.{match['after']}", set()).add(
                int(match["number"])
            )
    for name, numbers in lists.items():
        # n experts must be 0 to n-1
        if gaps := sorted(set(range(len(numbers))) - numbers):
            raise ModelError(
                f"{where}: {name.replace('*', str(gaps[0]))} is missing, and {name} goes up to {max(numbers)}"
            )


def refuse_untied_weights(where: Path, inner: Any, entries: Mapping[str, TensorEntry]) -> None:
    """Raise ModelError where the files hold two different tensors that the config ties into one.
    transformers unties them then, and says so in a warning that nobody reads; other libraries keep
    the embedding.
    """
    for target, source in inner.get_expanded_tied_weights_keys(all_submodels=True).items():
        target_entry, source_entry = entries.get(target), entries.get(source)
        # the usual case: a tied head is stored once
        if target_entry is None or source_entry is None:
            continue
        values = []
        for entry in (target_entry, source_entry):
            with safe_open(entry.file, framework="pt") as file:
                values.append(file.get_tensor(entry.name))
        if not torch.equal(*values):
            raise ModelError(
                f"{where}: config.json says tie_word_embeddings=true, but {target} "
                f"and {source} differ; set tie_word_embeddings to false if the "
                "output head was trained separately"
            )


def list_ignored_keys(inner: Any, names: Collection[str]) -> list[str]:
    """The names that transformers' class says to ignore (a multi-token prediction head ...), other
    than old buffers.
    """
    patterns = [
        re.compile(p) for p in getattr(inner, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    state = inner.state_dict().keys()
    return sorted(
        n
        for n in names
        if n not in state
        and not RECOMPUTED_BUFFERS.fullmatch(n)
        and any(p.search(n) for p in patterns)
    )
