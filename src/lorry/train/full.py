"""Training the base weights themselves (`lora: null`): switching them on, and writing the run as a
plain Hugging Face model.

    name = enable_base_training(opened, "all", run_dir, add_note)      # instead of an adapter
    digests = write_and_check_model(run_dir, opened, checks, prepared)

The model is written beside its place, read back and compared (contract 5), and only then moved file
by file into the run's directory, config.json last: a directory that looks like a model holds a
verified one. Where the weights are cut over ranks, rank 0 writes tensors that all of them make whole one
by one, and each rank reads back its own share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lorry.adapters.attach import get_bank
from lorry.adapters.base_weights import make_weights_trainable
from lorry.adapters.layers.shares import local_share
from lorry.adapters.mix import AdapterContext, Mix
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.config.jobs import BASE_JOB
from lorry.config.schema.train import TrainConfig
from lorry.data.prepare import PreparedData
from lorry.disk import durable
from lorry.disk.integrity import file_digest
from lorry.errors import ConfigError, ModelError
from lorry.models.causal_lm import CausalLM, parameter_count
from lorry.models.decoder.model import Decoder
from lorry.models.layer_weights import Sharder, WeightShards
from lorry.models.loading.load import load_model
from lorry.models.loading.open import OpenedModel
from lorry.models.loading.store import save_model
from lorry.models.scoring.score import TokenScore, evaluate_wants, log_prob
from lorry.notes import NoteCallback, ignore_note
from lorry.runs import ownership
from lorry.runs.layout import STAGED
from lorry.train.checks import ContractChecks
from lorry.train.start import is_full_finetune_dir

CACHE_LINE_BYTES = 64  # bytes


def enable_base_training(
    opened: OpenedModel, trainable: str | list[str], run_dir: Path, add_note: NoteCallback
) -> str:
    """Switch on the base weights that ``trainable`` names. Returns the name they go by in batches,
    metrics and checkpoints.

    Raises ConfigError for a model with an adapter, for another's model in the run's directory, or
    a name that matches nothing.
    """
    if opened.adapters:
        raise ConfigError(
            f"{opened.source['name']} has an adapter, and lora=null trains the base "
            "model; merge it first, or leave lora out"
        )
    # the start is a term beside W: written as plain weights the model would lack it
    if get_bank(opened.model, create=True).start is not None:
        raise ConfigError(
            f"{opened.source['name']} includes a frozen adapter, which the trained "
            "base weights would not contain; merge it first (lorry merge), and "
            "give the merged model"
        )
    if opened.model.layer_weights.sharded and _has_own_code(opened.model):
        raise ConfigError(
            f"{opened.source['name']} runs code of its own, which lora=null with backend=fsdp does not "
            "write beside the trained weights; give backend=ddp"
        )
    # a run of this kind moves its own earlier model aside; another's would be displaced unasked
    if (run_dir / "config.json").exists() and not is_full_finetune_dir(run_dir):
        raise ConfigError(
            f"{run_dir} holds a model that no run with lora=null wrote and that "
            "this run would replace; give another output_dir"
        )
    weights = make_weights_trainable(opened.model, trainable, BASE_JOB)
    total = parameter_count(opened.model)
    add_note(
        f"training {weights.num_parameters():,} of the base's {total:,} weights ({weights.num_parameters() / total:.1%}), no adapter"
    )
    return BASE_JOB


def refuse_adapter_settings(train: TrainConfig, memory_budget: str | None) -> None:
    """Raise ConfigError for settings that only an adapter has."""
    if memory_budget is not None:
        raise ConfigError(
            "memory_budget is for training adapters only; with lora=null leave it out"
        )
    if train.loraplus_lr_ratio != 1:
        raise ConfigError(
            "train.loraplus_lr_ratio is for an adapter's two matrices; with lora=null leave it out"
        )


def write_and_check_model(
    run_dir: Path,
    opened: OpenedModel,
    checks: ContractChecks,
    prepared: Mapping[str, PreparedData],
    communicator: Communicator = ONE_PROCESS,
    shard: Sharder | None = None,
) -> dict[str, str]:
    """Write the model, read it back (contract 5), put it in its place. Returns {weights file: its
    SHA-256}. Of a model that ``shard`` cuts over the ranks of ``communicator`` all of them call this;
    the place is rank 0's.
    """
    model, data = opened.model, next(iter(prepared.values()))
    place = Path(communicator.exchange("run directory", str(run_dir.absolute()))[0])
    staged = place / STAGED
    tensors = _whole_weights(model)

    def write() -> None:
        if staged.is_dir():  # left by a run that was killed here
            durable.remove_directory(staged)
        save_model(model, staged, tensors=tensors, tokenizer=opened.tokenizer)

    def publish() -> dict[str, str]:
        # of the bytes on disk after they were read back, which the receipt then vouches for
        digests = {file.name: file_digest(file) for file in sorted(staged.glob("*.safetensors"))}
        publish_model_files(staged, place)
        return digests

    try:
        communicator.on_main("the trained weights", write)
        scored = check_model_reload(checks, model, staged, data, communicator, shard)
        digests: dict[str, str] = communicator.on_main("the model's place", publish)
    # also on Ctrl-C: what was not verified must not lie there as if it were a model
    except BaseException:
        if communicator.rank == 0 and staged.is_dir():
            durable.remove_directory(staged)
        raise
    batch = " and the scores of a batch" if scored else ""
    checks.held(
        5,
        f"{parameter_count(model)} values of the whole model{batch} equal bit for bit after reading back",
    )
    return digests


def _whole_weights(model: CausalLM) -> Iterable[tuple[str, Tensor]] | None:
    """(name, tensor) of every weight of a model that is cut over ranks, each made whole when it is
    read; None: the model has them."""
    if not model.layer_weights.sharded:
        return None
    weights = cast(WeightShards, model.layer_weights)
    shares = {name: (param, local_share(param)) for name, param in model.named_parameters()}
    whole = weights.whole_tensors(shares)
    return ((name, whole[name]) for name in whole)


def publish_model_files(staged: Path, run_dir: Path) -> None:
    """Move a model's files into a run directory, config.json last. A kill in between leaves files
    that resuming writes again.
    """
    # without config.json no reader takes the directory for a model, however many shards it has
    names = sorted(
        (p.name for p in staged.iterdir()), key=lambda name: (name == "config.json", name)
    )
    # what is there to the bit already is of a life that was killed while it moved files
    ownership.displace_entries(
        run_dir, [name for name in names if ownership.differs_from(run_dir / name, staged / name)]
    )
    for name in names:
        durable.disk.rename(staged / name, run_dir / name)
    durable.disk.fsync_dir(run_dir)
    durable.disk.rmdir(staged)


def _has_own_code(model: CausalLM) -> bool:
    # imported here: transformers comes with it, which runs of the native decoder do without
    from lorry.models.hf.model import HfModel

    return isinstance(model, HfModel) and type(model.inner).__module__.startswith(
        "transformers_modules"
    )


def check_model_reload(
    checks: ContractChecks,
    model: CausalLM,
    folder: Path,
    prepared: PreparedData,
    communicator: Communicator = ONE_PROCESS,
    shard: Sharder | None = None,
) -> bool:
    """Contract 5 for a whole model: every tensor, and the scores of a batch, must be the same bits;
    of one that ``shard`` cuts over ranks on each of them what it holds. Returns whether there was a
    batch to score."""
    try:
        reloaded = load_model(
            folder,
            dtype=model.dtype,
            device=model.device,
            native=isinstance(model, Decoder),
            # the person has trusted it when the run began; reading back asks no more
            trust_remote_code=_has_own_code(model),
            shard=shard,
            add_note=ignore_note,
        ).model
    except ModelError as error:
        raise checks.fail(5, str(error)) from error
    with communicator.together():  # behind it every rank holds its shares alone
        pass
    # names and values of all tensors; ^ names what only one side has
    trained_tensors, read_tensors = (
        dict(model.named_parameters()),
        dict(reloaded.named_parameters()),
    )
    differing = sorted(trained_tensors.keys() ^ read_tensors.keys()) + [
        n
        for n in trained_tensors
        if n in read_tensors
        and not torch.equal(local_share(trained_tensors[n]), local_share(read_tensors[n]))
    ]
    if differing:
        raise checks.fail(
            5,
            f"{folder.parent}: {differing[0]} read back is not the tensor that was trained ({len(differing)} tensors)",
        )
    batch = next(iter(prepared.evaluation), None) or (
        prepared.stream.batches(0)[0] if prepared.tokens else None
    )
    if batch is None:
        return False
    with torch.no_grad(), communicator.together():
        for name, param in read_tensors.items() if shard is None else ():
            # bit for bit only where both products take the same kernel, see there; what a pass
            # gathers begins at a multiple of 64 bytes
            param.data = align_like(param.data, trained_tensors[name])
        want = {"s": TokenScore(log_prob)}
        scores = [
            evaluate_wants(m, batch.to(model.device), want, AdapterContext(Mix.none()))["s"]
            for m in (model, reloaded)
        ]
    if not torch.equal(*scores):
        raise checks.fail(5, f"{folder.parent}: the model read back gives other logits")
    return True


def align_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy that begins as far behind a multiple of 64 bytes as ``like`` does: matrix products
    choose their kernel by that, and with it their rounding."""
    skip = like.data_ptr() % CACHE_LINE_BYTES // like.element_size()
    room = torch.empty(
        tensor.numel() + skip + CACHE_LINE_BYTES, dtype=tensor.dtype, device=tensor.device
    )
    # elements up to the next multiple of 64 bytes, and from there as many as ``like`` is off by
    first = -(room.data_ptr() % CACHE_LINE_BYTES) % CACHE_LINE_BYTES // tensor.element_size() + skip
    return room[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)
