"""A training run from its description to a finished directory: open, attach, prepare, train, check, write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorry.backends.local import Local
from lorry.backends.optim import OptimSettings
from lorry.bank.attach import attach, bank_of, detach
from lorry.bank.mix import Mix
from lorry.bank.peft_io import base_digest, load_adapter
from lorry.bank.spec import LoraSpec
from lorry.config import Run, dump
from lorry.config.schema import LoraConfig, TrainConfig
from lorry.data.prepare import Prepared, prepare
from lorry.disk import durable
from lorry.errors import ConfigError, ModelError
from lorry.models.decoder import Decoder
from lorry.models.hf import HfModel, unreached
from lorry.models.open import Opened, open_model
from lorry.models.score import Score, log_prob
from lorry.tasks.sft import Sft
from lorry.train import artifacts, checkpoint
from lorry.train.checks import Checks
from lorry.train.engine import METRICS, Engine, Outcome
from lorry.train.events import Listener
from lorry.train.memory import tune_allocator
from lorry.train.samples import samples
from lorry.train.trackers import trackers

RUN_FILE, RECEIPT = "run.yaml", "receipt.json"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


@dataclass
class Result:
    """A finished run: its directory, how it ended, what held, and the model with its adapter still in memory."""

    path: Path
    outcome: Outcome
    contracts: list[dict[str, Any]] = field(repr=False)
    model: Decoder | HfModel = field(repr=False)
    tokenizer: Any = field(repr=False)
    adapter: str


def train_sft(run: Run, notes: list[str], listeners: Sequence[Listener] = ()) -> Result:
    """Fine-tune as described and write the run directory. Raises LorryError of the kind that fits; contracts.json is written
    even then, once the run has begun."""
    listeners = [*listeners, *trackers(run.train.report_to, run.output_dir, run.model_dump(mode="json"))]
    start = where_to_start(run)
    tune_allocator()
    if run.backend.threads:
        torch.set_num_threads(run.backend.threads)
    torch.manual_seed(run.train.seed)
    opened = open_model(run.model, notes)
    if opened.tokenizer is None:
        raise ConfigError(f"{run.model.name} has no tokenizer files; put tokenizer.json beside the weights")
    name = attach_adapter(run, opened, notes)
    prepared = prepare(run.data, run.train, opened.tokenizer, quarantine=run.output_dir / "quarantine.jsonl")
    for text in [*notes, *prepared.report.lines()]:
        for listener in listeners:
            listener.note(text)
    opened.model.gradient_checkpointing = run.train.gradient_checkpointing
    engine = build_engine(run, opened, name, prepared, listeners)
    if start is not None:
        engine.resume(start)
    if not _inside(start, run.output_dir) and (aside := make_room(run.output_dir)) is not None:
        for listener in listeners:  # only now: whatever was wrong with this run has been said, and cost nothing of the last one
            listener.note(f"{run.output_dir} held an earlier run; it is in {aside} now")
    return _train(run, opened, name, prepared, engine)


def _train(run: Run, opened: Opened, name: str, prepared: Prepared, engine: Engine) -> Result:
    """Run the engine between the first and the last contracts; write every file of the run."""
    checks, backend = engine.checks, engine.backend
    artifacts.write_text(run.output_dir, RUN_FILE, dump(run))
    try:
        checks.begin(backend, {name: list(bank_of(opened.model)[name].slots)})
        checks.held(8, "; ".join(prepared.report.lines()[:3]))
        outcome = engine.run()
        checks.held(8, "; ".join(prepared.report.lines()[:3]))  # a streamed source knows more now
        checks.end(backend, engine.task)
        bank_of(opened.model).activate(Mix.one(name))
        digests = artifacts.write_adapters(run.output_dir, opened.model, opened.tokenizer, [name], base_name(opened))
        check_reload(checks, opened.model, name, run.output_dir, prepared)
        check_checkpoint(checks, engine.newest)
        train = prepared.stream.batches(0)[0] if prepared.tokens is not None else None
        held_out = next(iter(prepared.evaluation), None)
        rows = samples(backend, name, prepared.encoder, train, held_out, prepared.ends, context=opened.model.context)
        artifacts.write_json(run.output_dir, "samples.json", rows)
    finally:
        artifacts.write_json(run.output_dir, "contracts.json", checks.report())
    contracts = checks.report()
    report = prepared.report
    data: dict[str, Any] = {"source": report.source, "streamed": True, "left_out": report.left_out}
    if prepared.tokens is not None:
        data = {"sha256": prepared.digest, **vars(report)}
    base = {**opened.source, "sha256": base_digest(opened.model)}
    paper = artifacts.receipt(data=data, base=base, code=checkpoint.code_digest(), adapters=digests, seed=run.train.seed)
    artifacts.write_json(run.output_dir, RECEIPT, paper)
    artifacts.write_text(run.output_dir, "README.md", _card(run, opened, outcome, contracts))
    return Result(run.output_dir, outcome, contracts, opened.model, opened.tokenizer, name)


def base_name(opened: Opened) -> str:
    """What adapter_config.json names as the base: a hub id as such, anything else as the directory it was read from."""
    source = opened.source
    on_hub = source["kind"] == "hub" and not source.get("adapter")
    return str(source["name"]) if on_hub else str(Path(source["path"]).resolve())


def where_to_start(run: Run) -> Path | None:
    """The checkpoint to resume from, or None to start afresh. Raises ConfigError rather than mix with, or lose, another run."""
    folder, start = run.output_dir, _wanted_checkpoint(run)
    unfinished = (folder / "checkpoints").is_dir() and not (folder / RECEIPT).is_file()
    if unfinished and not _inside(start, folder) and checkpoint.find_latest(folder):
        raise ConfigError(
            f"{folder} holds an unfinished run; add resume_from_checkpoint=auto to go on with it, or use another output_dir"
        )
    return start


def _wanted_checkpoint(run: Run) -> Path | None:
    wanted = run.train.resume_from_checkpoint
    if wanted is None or wanted == "auto":
        return None if wanted is None else checkpoint.find_latest(run.output_dir)
    path = Path(wanted)
    inside = checkpoint.find_latest(path) if (path / "checkpoints").is_dir() else path
    if inside is None or not inside.is_dir():
        raise ConfigError(f"train.resume_from_checkpoint={wanted} is no checkpoint and no run with one")
    return inside


def _inside(start: Path | None, folder: Path) -> bool:
    return start is not None and start.resolve().parent == (folder / "checkpoints").resolve()


def make_room(folder: Path) -> Path | None:
    """Clear the way for a new run: the files of a finished one move to FOLDER/previous/N, which is returned; what is left of
    one that never got to a checkpoint is removed, since nothing can come of it. receipt.json, which says that a run is finished,
    moves last: a kill in between loses nothing.
    """
    names = [n for n in (*artifacts.RESULTS, METRICS, RUN_FILE, "checkpoints") if n != RECEIPT and (folder / n).exists()]
    if not (folder / RECEIPT).is_file():
        checkpoint.forget_after(folder, -1)
        for name in names:
            if (folder / name).is_file():
                durable.disk.unlink(folder / name)
        return None
    taken = [int(p.name) for p in (folder / "previous").glob("*") if p.name.isdigit()]
    aside = folder / "previous" / str(max(taken, default=0) + 1)
    durable.make_directory(aside)
    for name in (*names, RECEIPT):
        durable.disk.rename(folder / name, aside / name)
    return aside


def spec_of(lora: LoraConfig) -> LoraSpec:
    """The bank's spec from the run's settings."""
    plain: dict[str, Any] = lora.model_dump(exclude={"adapter_name", "bias"})
    return LoraSpec(**plain)


def attach_adapter(run: Run, opened: Opened, notes: list[str]) -> str:
    """Attach a new adapter, or go on with the one the model came with. Returns its name. Raises ConfigError."""
    if run.lora is None:
        raise ConfigError("lora=null (training the base weights themselves) is not built yet; leave lora out for an adapter")
    if experts := unreached(opened.model):
        notes.append(f"experts are not adapted: {len(experts)} weights such as {experts[0]} are no linear layers")
    if not opened.adapters:
        attach(opened.model, spec_of(run.lora), run.lora.adapter_name, seed=run.train.seed)
        return run.lora.adapter_name
    if len(opened.adapters) > 1:
        raise ConfigError(f"{run.model.name} holds several adapters ({', '.join(opened.adapters)}); name one of their folders")
    if run.lora != LoraConfig(adapter_name=run.lora.adapter_name):
        raise ConfigError(f"{run.model.name} already has an adapter and training goes on with it; leave out the lora settings")
    notes.append(f"training goes on with the adapter of {run.model.name}")
    return opened.adapters[0]


def build_engine(run: Run, opened: Opened, name: str, prepared: Prepared, listeners: Sequence[Listener]) -> Engine:
    """The backend, the task and the loop of this run."""
    train: TrainConfig = run.train
    optim = OptimSettings(
        (train.adam_beta1, train.adam_beta2), train.adam_epsilon, train.weight_decay, train.max_grad_norm, train.loraplus_lr_ratio
    )
    backend = Local(opened.model, [name], optim, seed=train.seed)
    total = prepared.stream.total_steps(train.num_train_epochs, train.max_steps)
    task = Sft(prepared.stream, prepared.evaluation, total, [name])
    identity = {
        "config": json.loads(run.model_dump_json()),
        "digests": {"data": prepared.digest, "base": base_digest(opened.model), "code": checkpoint.code_digest()},
        "environment": checkpoint.environment(device=str(backend.device), compiled=False),
    }
    return Engine(
        backend, task, train, run.output_dir,
        identity=identity, epoch_of=prepared.stream.epoch_of, steps_per_epoch=prepared.steps_per_epoch, checks=Checks(),
        listeners=listeners, ends=list(prepared.ends), tolerance=TOLERANCE.get(opened.model.dtype, 1e-2),
    )  # fmt: skip


def check_reload(checks: Checks, model: Decoder | HfModel, name: str, folder: Path, prepared: Prepared) -> None:
    """Contract 5: read the adapter back under another name; its values and the scores of a batch must be the same bits."""
    again = f"{name[:50]}.reloaded"
    bank = bank_of(model)
    try:
        load_adapter(model, folder, again)
        if not torch.equal(bank[name].values.cpu(), bank[again].values.cpu()):
            raise checks.fail(5, f"{folder}: the adapter read back is not the one that was trained")
        batch = next(iter(prepared.evaluation), None) or (prepared.stream.batches(0)[0] if prepared.tokens else None)
        if batch is not None:
            local = Local(model, [name], OptimSettings())
            scores = [local.score([batch], {"s": Score(log_prob)}, Mix.one(n))[0]["s"] for n in (name, again)]
            if not torch.equal(*scores):
                raise checks.fail(5, f"{folder}: the adapter read back gives other logits")
        scored = " and the scores of a batch" if batch is not None else ""
        checks.held(5, f"{bank[name].values.numel()} values{scored} equal bit for bit after reading back")
    except ModelError as error:
        raise checks.fail(5, str(error)) from error
    finally:
        if again in bank.names():
            detach(model, again)


def check_checkpoint(checks: Checks, newest: Path | None) -> None:
    """Contract 6: the newest checkpoint, if the run has any, verifies (SHA-256 of every file)."""
    if newest is None:
        checks.skipped(6, "the run wrote no checkpoint (save_strategy=no)")
        return
    try:
        checkpoint.load(newest)
    except ModelError as error:
        raise checks.fail(6, str(error)) from error
    checks.held(6, f"{newest.name} verified by SHA-256; resume_from_checkpoint=auto goes on from it")


def _card(run: Run, opened: Opened, outcome: Outcome, contracts: Sequence[dict[str, Any]]) -> str:
    spec = {f"lora.{k}": v for k, v in run.lora.model_dump().items() if v not in (None, {}, False)} if run.lora else {}
    figures = {"steps": outcome.steps, "final loss": outcome.final_loss, **outcome.last_evaluation}
    data = run.data.path if isinstance(run.data.path, str) else ", ".join(run.data.path)
    return artifacts.card(
        name=run.output_dir.name, base=run.model.name, data=data, spec=spec, figures=figures, contracts=contracts
    )
