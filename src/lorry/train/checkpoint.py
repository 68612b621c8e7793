"""Checkpoints: whole or absent, verified when read, and only for the run that wrote them.

    RUN/checkpoints/step-00000120/
        state.safetensors   every tensor: "adapter/default/...lora_A", "adam_m/...", "adam_v/...", "rng/cpu"
        meta.json           step, epoch, task state, length of metrics.jsonl, environment, config and digests
        manifest.json       size and SHA-256 of the other two, written last

Commit order: temporary directory, write, fsync files, manifest, fsync directory, rename, fsync
parent, and only then the older ones are pruned. One process writes to a run; reading changes
nothing. Safetensors and JSON only, never pickle.

"There is none" and "there are some, and none is whole" are different answers: None, and ModelError.
A checkpoint that is damaged or lies under another step's name is never removed: the run that passes
it over renames it to step-00000120.damaged. One that the disk could not read (DiskError) is not
damaged, and nothing is passed over because of it.

    save_checkpoint(run, step, tensors, meta, keep=3, protect={best})
    path = find_latest_checkpoint(run)
    tensors, meta = load_checkpoint(path)
    notes = refuse_other_run(meta, current)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import re
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorry.backends.protocol import TensorsWhenRead, like_stored
from lorry.disk import documents, durable, integrity, manifest
from lorry.errors import ConfigError, ContractError, ModelError
from lorry.runs.layout import CHECKPOINTS, STEP

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "lorry-checkpoint/1"
STATE_FILE = "state.safetensors"
META_FILE = "meta.json"
# other tools' checkpoints; named, so that the error says why instead of "no manifest"
CHECKPOINT_PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})

# the format's names; a dtype that is not here (complex, quantized) is refused before writing
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# Settings that change where and how often a run writes, and nothing it computes: they may differ on
# resuming. What decides which steps are evaluated is not among them: the best adapter and an early
# stop hang on it.
FREE_SETTINGS = frozenset(
    [
        *[
            "output_dir",
            "run_name",
            "resume_from_checkpoint",
            "save_steps",
            "save_strategy",
            "save_total_limit",
        ],
        *["logging_steps", "logging_strategy", "report_to", "disable_tqdm"],
        *["background", "push_to_hub", "hub_model_id", "hub_private_repo"],
    ]
)
# Settings of where and in what portions a run computes: the same run may go on with others, though
# not bit for bit.
DEVICE_SETTINGS = frozenset(
    {"backend", "device", "gradient_checkpointing", "per_device_eval_batch_size"}
)
CHANGEABLE_SETTINGS_MESSAGE = (
    "only settings of where and how often a run writes may change (docs/running.md "
    "lists them), and, with a note, the device"
)
BATCH_SETTING = "per_device_train_batch_size"
ALL_ROWS_MESSAGE = (
    f"{BATCH_SETTING} is shown as the rows of all processes together; give that number with "
    "keep_total=true"
)
LENGTH_SETTINGS = frozenset({"max_steps", "num_train_epochs"})
LONGER_RUN_MESSAGE = (
    "A run's length is part of what it computes: the learning rate of every step "
    "follows from it. To continue training, start a new run: adapter=THIS_RUN "
    "output_dir=ANOTHER"
)


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int | None = None,
    protect: Collection[int] = (),
) -> Path:
    """Write the checkpoint of ``step`` (updates done so far) and return its directory, durable when
    this returns.

    ``meta`` must survive JSON unchanged (no tuples, no NaN) and hold "config", "digests" and
    "environment". Then the newest ``keep`` whole checkpoints up to this step stay (None: all), and
    those of the steps in ``protect`` (the best, the last finite). Later steps are removed: they
    belong to a history that this run rewound; damaged ones are set aside. The directory must be
    there: one that was moved away is not made again. Raises DiskError, ContractError (a tensor or a
    field that cannot be stored) and ConfigError (``keep`` below 1).
    """
    if keep is not None and keep < 1:
        raise ConfigError(
            f"save_total_limit={keep} would delete the checkpoint just written; use 1 or more, or null for all"
        )
    folder = run_dir / CHECKPOINTS
    path = folder / f"step-{step:08d}"
    files: dict[str, durable.FileContent] = {
        STATE_FILE: _safetensors_chunks(tensors),
        META_FILE: _meta_text(step, meta),
    }
    # a run directory that somebody moved must not be made anew under its old name
    durable.make_directory(folder, parents=False)
    durable.recover_writes(folder)
    durable.write_directory(path, files, manifest=True, replace=True)
    # Only now, when this one is durable: a kill at any moment leaves a whole checkpoint.
    remove_checkpoints_after(run_dir, step)
    _prune_checkpoints(run_dir, keep, protect)
    return path


def remove_checkpoints_after(run_dir: Path, step: int) -> None:
    """Remove the checkpoints beyond ``step``, for a run that goes back to it; damaged ones are set
    aside. Raises DiskError.
    """
    for later, path in _list_checkpoints(run_dir):
        if later > step:
            # with digests: what lies beyond is rare, and a damaged one may be wanted for a rescue
            _remove_or_set_aside(path, digests=True)


def tidy_checkpoints(
    run_dir: Path, step: int, *, keep: int | None = None, protect: Collection[int] = ()
) -> None:
    """Bring the checkpoints of a run that goes on from ``step`` into the order that saving it left
    them in, had a kill not come between: what was half written or half removed goes, and so do
    later steps and those beyond ``keep``. Raises DiskError.
    """
    folder = run_dir / CHECKPOINTS
    if folder.is_dir():
        durable.recover_writes(folder)
        remove_checkpoints_after(run_dir, step)
        _prune_checkpoints(run_dir, keep, protect)


def find_latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None where there is none at all. Nothing is changed.

    Damaged ones are skipped with a warning. Raises ModelError naming every one of them where none
    is whole, and DiskError where one could not be read. A run that is at work there removes older
    ones meanwhile: what was listed and is gone is no damage, and the folder is looked at again.
    """
    while True:
        listed, damage, newest = _list_checkpoints(run_dir), list[str](), None
        # newest first; DiskError is not caught: unread is not damaged, and nothing is passed over
        # for it
        for _, path in reversed(listed):
            try:
                _read_meta(path)
            except ModelError as e:
                damage.append(f"{path.name}: {e}")
            else:
                newest = path
                break
        if not damage or listed == _list_checkpoints(run_dir):
            break
    if newest is not None:
        for fault in damage:
            log.warning("skipped the checkpoint %s", run_dir / CHECKPOINTS / fault)
        return newest
    if damage:
        folder, listing = run_dir / CHECKPOINTS, "".join(f"\n  {fault}" for fault in damage)
        raise ModelError(
            f"{folder}: all of its {len(damage)} checkpoints are damaged; nothing "
            f"was changed:{listing}\nrestore one of them from a backup; to "
            f"start over instead, move {folder} elsewhere or use another output_dir"
        )
    return None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a checkpoint directory: tensors by name, on the CPU, and what
    ``save_checkpoint`` was given as meta plus its step.

    Raises ModelError naming the damaged, missing or linked file, when it is no checkpoint of this
    format, or lies under the name of another step; DiskError when it could not be read.
    """
    # before anything is opened
    _refuse_pickle(path)
    # every digest is checked before safetensors parses a byte
    meta = _read_meta(path)
    try:
        with integrity.translate_read_errors(path / STATE_FILE):
            tensors = load_file(path / STATE_FILE)
    except SafetensorError as e:
        raise ModelError(f"{path}: {e}; this checkpoint was not written by Lorry") from e
    return tensors, meta


def _read_meta(path: Path) -> dict[str, Any]:
    """Verify every file of a checkpoint directory against its manifest, and what it says of itself.
    Raises as `load_checkpoint` does.
    """
    names = integrity.verify_directory(path)
    # a manifest that holds, but of another kind of directory of ours
    if set(names) != {STATE_FILE, META_FILE}:
        raise ModelError(
            f"{path} lists {', '.join(sorted(names))}; a checkpoint holds {STATE_FILE} and {META_FILE} and nothing else"
        )
    meta = documents.parse_json(
        integrity.read_content(path / META_FILE), str(path / META_FILE), error=ModelError
    )
    format_name = meta.pop("format", None) if isinstance(meta, dict) else None
    if format_name != CHECKPOINT_FORMAT:
        raise ModelError(
            f"{path / META_FILE}: format {format_name!r}, but this version of Lorry "
            f"reads {CHECKPOINT_FORMAT!r}"
        )
    step, named_step = meta.get("step"), _named_step(path)
    # type, not isinstance: true is an int in Python
    if type(step) is not int or step < 0:
        raise ModelError(
            f"{path / META_FILE}: step {str(step)[:40]!r} is not a whole number of "
            "0 or more; this checkpoint was not written by Lorry"
        )
    # copies by other tools may have any name; only a name of ours that says another step is wrong
    if named_step is not None and step != named_step:
        raise ModelError(
            f"{path} holds step {step}: the directory was renamed or exchanged; "
            "name it after its step"
        )
    if missing_fields := [
        key for key in ("config", "digests", "environment") if not isinstance(meta.get(key), dict)
    ]:
        raise ModelError(
            f"{path / META_FILE}: {missing_fields[0]!r} is not an object; this "
            "checkpoint was not written by Lorry"
        )
    return meta


def refuse_other_run(meta: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compare a checkpoint's meta with the same fields of the run that wants to go on from it.

    "config" is compared field by field, "digests" by name. Raises ConfigError listing every field
    that differs, with both values. Returns notes ("not bitwise: torch 2.11.0 -> 2.13.0") for what
    may differ but breaks equality to the last bit: the environment, the fields in
    ``DEVICE_SETTINGS`` and Lorry's own code (the digest "code"). Fields in ``FREE_SETTINGS`` are
    not compared, and neither is a digest named "config": its fields are.
    """
    refused: list[str] = []
    notes: list[str] = []
    for field, old, new in _setting_differences(meta["config"], current["config"]):
        # by any part of the dotted field: a group may be free as a whole, such as `backend`
        parts = field.split(".")
        if FREE_SETTINGS.isdisjoint(parts):
            (refused if DEVICE_SETTINGS.isdisjoint(parts) else notes).append(
                f"{field} {old} -> {new}"
            )
    for field, old, new in _setting_differences(meta["digests"], current["digests"]):
        if field != "config":
            # other code may give other bits, but a bug fix must not strand a run
            (notes if field == "code" else refused).append(f"{field} {old} -> {new}")
    notes += [
        f"{field} {old} -> {new}"
        for field, old, new in _setting_differences(meta["environment"], current["environment"])
    ]
    if refused:
        listing = "".join(f"\n  {line}" for line in refused)
        names = {line.partition(" ")[0].rpartition(".")[2] for line in refused}
        several = any(
            (run["config"].get("backend") or {}).get("processes") not in (None, 1)
            for run in (meta, current)
        )
        raise ConfigError(
            f"cannot resume, the checkpoint belongs to another run:{listing}\nrestore these or use a new output_dir; {CHANGEABLE_SETTINGS_MESSAGE}"
            + (f". {ALL_ROWS_MESSAGE}" if several and BATCH_SETTING in names else "")
            + (f". {LONGER_RUN_MESSAGE}" if LENGTH_SETTINGS & names else "")
        )
    return [f"not bitwise: {note}" for note in notes]


def numeric_environment(*, device: str, kernels: str) -> dict[str, Any]:
    """What results depend on to the last bit, besides config, data and code."""
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device,
        "kernels": kernels,
    }


def code_digest() -> str:
    """SHA-256 over the names and contents of Lorry's own source files."""
    root = Path(__file__).parent.parent
    files = sorted(root.rglob("*.py"))
    listed = [
        f"{file.relative_to(root).as_posix()} {integrity.file_digest(file)}\n" for file in files
    ]
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def _named_step(path: Path) -> int | None:
    """The step that a directory's name says, also of one set aside for a replacement; None for a
    name that says none.
    """
    # a kill between two renames leaves the old one under its temporary name: still a checkpoint
    match = STEP.fullmatch(durable.replaced_name(path.name) or path.name)
    return int(match[1]) if match else None


def _list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint, also of one set aside for a replacement that never
    came; oldest first.
    """
    folder = run_dir / CHECKPOINTS
    by_step: dict[int, Path] = {}
    try:
        with integrity.translate_read_errors(folder):
            # so that a proper name comes after, and beats, one set aside
            names = sorted(os.listdir(folder), reverse=True)
    except ModelError:
        return []  # there is no such folder
    for path in (folder / name for name in names):
        if (step := _named_step(path)) is not None:
            by_step[step] = path
    return sorted(by_step.items())


def _prune_checkpoints(run_dir: Path, keep: int | None, protect: Collection[int]) -> None:
    """Remove all but the newest ``keep`` and ``protect``. A checkpoint that lost a file does not
    count as one of them, and is set aside."""
    if keep is None:
        return
    checkpoints = _list_checkpoints(run_dir)
    kept_steps = {
        # without digests: at every save all of them would be read whole
        *[step for step, path in checkpoints if not _is_damaged(path, digests=False)][-keep:],
        *protect,
    }
    for step, path in checkpoints:
        if step not in kept_steps:
            _remove_or_set_aside(path, digests=False)


def _remove_or_set_aside(path: Path, *, digests: bool) -> None:
    """Remove a whole checkpoint; a damaged one may be all there is of its step, and is renamed to
    NAME.damaged.
    """
    if not _is_damaged(path, digests=digests):
        durable.remove_directory(path)
        return
    # step-N.damaged, then -1, -2: a step that is damaged twice loses neither
    candidates = (path.with_name(f"{path.name}.damaged{f'-{n}' if n else ''}") for n in count())
    durable.rename_path(path, next(target for target in candidates if not os.path.lexists(target)))


def _is_damaged(path: Path, *, digests: bool) -> bool:
    """Whether a checkpoint is damaged. Without ``digests`` only presence and sizes are looked at,
    which reads next to nothing.
    """
    try:
        if digests:
            _read_meta(path)
        else:
            integrity.verify_directory(path, digests=False)
    except ModelError:
        return True
    return False


def _refuse_pickle(path: Path) -> None:
    pickles = (
        [path]
        if path.suffix in CHECKPOINT_PICKLE_SUFFIXES
        else sorted(p for p in path.glob("*") if p.suffix in CHECKPOINT_PICKLE_SUFFIXES)
    )
    # beside a manifest of ours it is somebody's file, which nothing here reads
    if pickles and not (path / manifest.MANIFEST_NAME).exists():
        raise ModelError(
            f"{pickles[0]} is a pickle, which can run any code when loaded; Lorry "
            "resumes from its own checkpoints only"
        )


def _safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the header, then one tensor at a time, so that the state is
    never in memory twice.

    Format: 8 bytes of header length, JSON header, data; ordered by item size so that every tensor
    is aligned (https://github.com/huggingface/safetensors#format). What cannot be stored is refused
    here, not while writing.
    """
    facts = {name: like_stored(tensors, name) for name in tensors}
    for name, t in facts.items():
        if (
            t.dtype not in _SAFETENSORS_DTYPES
            or t.layout is not torch.strided
            or (t.is_meta and not isinstance(tensors, TensorsWhenRead))
            or name == "__metadata__"
        ):
            raise ContractError(
                f"tensor {name!r} ({t.dtype}, {t.layout}, {t.device}) cannot be stored in a checkpoint"
            )
    names = sorted(facts, key=lambda name: (-facts[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        t, start = facts[name], offset
        offset += t.numel() * t.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [start, offset],
        }
    text = json.dumps(header).encode()
    # the data begin at a multiple of 8 bytes, so every tensor is aligned to its item size
    text += b" " * (-len(text) % 8)
    return chain(
        [len(text).to_bytes(8, "little") + text], (_tensor_bytes(tensors[name]) for name in names)
    )


def _tensor_bytes(t: Tensor) -> memoryview:
    whole = t.detach().cpu().contiguous()
    # not reshape: it keeps any stride of a tensor of one element or none
    flat = whole.as_strided((whole.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def _meta_text(step: int, meta: Mapping[str, Any]) -> bytes:
    if missing_fields := {"config", "digests", "environment"} - meta.keys():
        raise ValueError(f"a checkpoint's meta needs {', '.join(sorted(missing_fields))}")
    # in this order: a caller's own "step" cannot contradict the directory's name
    meta_with_step = {"format": CHECKPOINT_FORMAT, **meta, "step": step}
    if unstorable := list(_unstorable_paths(meta_with_step, "meta")):
        raise ContractError(
            f"a checkpoint cannot store {', '.join(unstorable)}: JSON would not "
            "restore it unchanged"
        )
    return (json.dumps(meta_with_step, indent=1) + "\n").encode()


def _unstorable_paths(value: object, where: str) -> Iterator[str]:
    """The places in a value that JSON would lose or change: tuples, keys that are no strings, NaN,
    infinities, objects.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (
                _unstorable_paths(item, f"{where}.{key}")
                if isinstance(key, str)
                else [f"{where} key {key!r}"]
            )
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _unstorable_paths(item, f"{where}[{i}]")
    elif (
        not isinstance(value, str | int | float | None)
        or (isinstance(value, float) and not math.isfinite(value))
        or (isinstance(value, int) and abs(value) > documents.LARGEST_INTEGER_READ)
    ):
        yield f"{where}={value!r}"


def _setting_differences(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """(dotted field, old value, new value) of every leaf that differs, as text."""
    # ``old`` comes from JSON; ``new`` has to go through it once before they compare
    before, after = dict(_flatten_leaves(old)), dict(_flatten_leaves(json.loads(json.dumps(new))))
    for field in sorted(before.keys() | after.keys()):
        if field not in before or field not in after or before[field] != after[field]:
            yield field, _format_leaf(before, field), _format_leaf(after, field)


def _flatten_leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten_leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _format_leaf(leaves: Mapping[str, Any], field: str) -> str:
    """A value for a message; digests are shortened."""
    if field not in leaves:
        return "absent"
    text = json.dumps(leaves[field])
    # a SHA-256; twelve of its digits tell two apart, and fit in a line
    return text[1:13] if re.fullmatch(r'"[0-9a-f]{64}"', text) else text
