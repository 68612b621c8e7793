"""Adapters where slime saves and loads.

--save DIR                DIR/adapters/iter_0000010 beside DIR/iter_0000010, as PEFT's files, whole or
                          not at all, with their SHA-256 (manifest.json)
--load DIR                at any tensor and pipeline parallel size; a checkpoint of the base alone, or
                          a Hugging Face directory, leaves new adapters as they are
--lora-adapter-path DIR   start from any PEFT adapter, unless --load holds adapters already
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from lorry.disk import durable
from lorry.disk.documents import read_json_document
from lorry.errors import ContractError, ModelError
from lorry.integrations.megatron.attach import list_chunks
from lorry.integrations.megatron.distributed import load_distributed
from lorry.integrations.megatron.files import (
    gather_lora,
    gathered_base_digest,
    is_writer,
    load_lora,
    lora_files,
    on_every_rank,
    read_lora,
)
from lorry.integrations.megatron.hf_weights import LoadedBase
from lorry.integrations.slime.arguments import lora_argument
from lorry.integrations.slime.provider import import_part
from lorry.integrations.slime.rebinding import Rebinding
from lorry.integrations.slime.sync.base_file import BaseFile
from lorry.integrations.slime.sync.ranks import from_first, is_first, say
from lorry.integrations.slime.sync.weights import has_adapters

FOLDER = "adapters"
# what a chunk is told of its base and its steps, beside its adapter
BASE_DIGEST, BASE_IS_FILE, STEPS = "lorry_base_digest", "lorry_base_is_file", "lorry_steps"


def install_checkpoints(args: Any, rebinding: Rebinding) -> None:
    """Put adapters' loading and saving around slime's. Raises ConfigError."""
    model = import_part("slime.backends.megatron_utils.model")
    actor = import_part("slime.backends.megatron_utils.actor")
    rebinding.put(model, "setup_model_and_optimizer", _counting)
    rebinding.put(model, "save_checkpoint", lambda original: _saving(args, original))
    rebinding.put(model, "load_checkpoint", lambda original: _loading(args, original))
    # of references and teachers, over a model whose adapters may be trained
    rebinding.put(actor, "load_checkpoint", _loading_other)


def adapter_folder(root: str | Path, iteration: int) -> Path:
    """Where the adapter of an iteration lies, beside slime's `iter_0000010`."""
    return Path(root) / FOLDER / f"iter_{iteration:07d}"


def _counting(original: Callable[..., Any]) -> Callable[..., Any]:
    """`setup_model_and_optimizer`, whose optimizer counts the steps that may have moved an adapter."""

    def setup_model_and_optimizer(*given: Any, **more: Any) -> Any:
        model, optimizer, scheduler = original(*given, **more)
        if has_adapters(model):
            _count(list_chunks(model)[0].__dict__, optimizer)
        return model, optimizer, scheduler

    return setup_model_and_optimizer


def _count(facts: dict[str, Any], optimizer: Any) -> None:
    take_step = optimizer.step

    def step(*given: Any, **more: Any) -> Any:
        # what it uses; a schedule may set another one behind it
        rates = [group["lr"] for group in optimizer.param_groups]
        result = take_step(*given, **more)
        updated, norm = result[:2]
        # Megatron does not take the norm of gradients that it does not clip
        clips = getattr(getattr(optimizer, "config", None), "clip_grad", 0)
        if updated and any(rate > 0 for rate in rates) and (norm or not clips):
            facts[STEPS] = facts.get(STEPS, 0) + 1
        return result

    optimizer.step = step


def _saving(args: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def save_checkpoint(iteration: int, model: Any, *given: Any, **more: Any) -> Any:
        result = original(iteration, model, *given, **more)
        if has_adapters(model):
            _save(args, iteration, model)
        return result

    return save_checkpoint


def _save(args: Any, iteration: int, model: Any) -> None:
    tensors = gather_lora(model)
    digest = list_chunks(model)[0].__dict__.get(BASE_DIGEST)

    def write() -> None:
        files = lora_files(model, tensors, base_name=str(args.hf_checkpoint), base_digest=digest)
        if is_writer():
            folder = adapter_folder(args.save, iteration)
            durable.make_directory(folder.parent)
            durable.write_directory(folder, files, manifest=True, replace=True)

    on_every_rank(model, write)


def _loading(args: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(model: Any, optimizer: Any, *given: Any, **more: Any) -> Any:
        if not has_adapters(model):
            return original(model, optimizer, *given, **more)
        seen: list[bool] = []
        with _knowing_adapters(model, seen):
            result = original(model, optimizer, *given, **more)
        _name_base(args, model)
        start = lora_argument(args, "lora_adapter_path")
        if any(seen):
            if start is not None:
                say(f"--load holds adapters; --lora-adapter-path {start} is not read")
            _compare_saved(model, adapter_folder(args.load, result[0]))
        elif start is not None:
            load_lora(model, start)
            # 16-bit and sharded optimizers keep copies of what they train
            if hasattr(optimizer, "reload_model_params"):
                optimizer.reload_model_params()
        return result

    return load_checkpoint


def _loading_other(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(model: Any, *given: Any, **more: Any) -> Any:
        if not has_adapters(model):
            return original(model, *given, **more)
        with _knowing_adapters(model, [], over_trained=True):
            return original(model, *given, **more)

    return load_checkpoint


@contextmanager
def _knowing_adapters(
    model: Sequence[Any], seen: list[bool], *, over_trained: bool = False
) -> Iterator[None]:
    """Let Megatron's `load_checkpoint` take checkpoints of the base: `dist_checkpointing.load` is ours
    while the block runs. ``seen``: gets whether each that was loaded held adapters."""
    original = dist_checkpointing.load

    def load(sharded_state_dict: dict[str, Any], folder: Any, *given: Any, **options: Any) -> Any:
        notes: list[str] = []
        loaded = load_distributed(
            model,
            sharded_state_dict,
            folder,
            *given,
            add_note=notes.append,
            over_trained=over_trained,
            load=original,
            **options,
        )
        seen.append(not notes)
        for note in notes:
            say(note)
        return loaded

    dist_checkpointing.load = load
    try:
        yield
    finally:
        dist_checkpointing.load = original


def _name_base(args: Any, model: Any) -> None:
    """Note which base the model has, and whether it is that of --hf-checkpoint, which engines start
    from."""
    chunks = list_chunks(model)
    origin = Path(args.hf_checkpoint)
    config = read_json_document(origin / "config.json", error=ModelError)
    for chunk in chunks:
        chunk.__dict__["lorry_base"] = LoadedBase(str(origin.resolve()), int(config["vocab_size"]))
    digest = gathered_base_digest(chunks)
    own = from_first(
        on_every_rank(
            chunks,
            lambda: BaseFile.open(origin).digest(chunks[0].config) if is_first() else None,
        )
    )
    for chunk in chunks:
        chunk.__dict__[BASE_DIGEST] = digest
        chunk.__dict__[BASE_IS_FILE] = digest == own
    if digest != own:
        say(
            f"the base that was loaded is not --hf-checkpoint's ({origin}): what is sent cannot be "
            "compared with its files"
        )


def _compare_saved(model: Any, folder: Path) -> None:
    """The adapter that Megatron's checkpoint gave, against PEFT's files beside it. Raises ContractError,
    which names a tensor."""
    if not from_first(folder.is_dir()):
        return
    whole = gather_lora(model)

    def compare() -> None:
        for name, value in read_lora(model, folder)[2].items():
            if not torch.equal(whole[name], value.float()):
                raise ContractError(
                    f"{name} of the checkpoint is not that of {folder}, which was saved with it; one of "
                    "the two was replaced"
                )

    on_every_rank(model, compare)
