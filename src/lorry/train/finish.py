"""The end of a run: its adapters written and read back, its last contracts, and every file that
says what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorry.adapters.attach import detach, get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.peft.files import load_adapter
from lorry.adapters.router import ROUTER_NAME
from lorry.adapters.targets.skipped import list_skipped_modules
from lorry.adapters.trainable import base_parameter_set, parameter_set
from lorry.adapters.variants.adalora import fold_triplets
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.backends.protocol import Backend
from lorry.data.batch import Batch
from lorry.data.prepare import PreparedData
from lorry.data.stream.roles import RoleStream
from lorry.disk import receipt
from lorry.errors import DataError, ModelError
from lorry.generation.scorer import ModelScorer
from lorry.models.causal_lm import CausalLM, parameter_count
from lorry.models.layer_weights import Sharder
from lorry.models.loading.open import OpenedModel
from lorry.models.scoring.score import TokenScore, log_prob
from lorry.notes import NoteCallback
from lorry.runs import ownership
from lorry.runs.layout import ADAPTER_WEIGHTS, EVALUATION, RECEIPT, STEP, SUITES, RunDir
from lorry.tasks.build import PreparedJob, PreparedJobs, trained_names
from lorry.train import artifacts, checkpoint, full, mixture
from lorry.train.checks import ContractChecks
from lorry.train.samples import build_samples


def contract_targets(model: CausalLM, names: Sequence[str]) -> dict[str, list[str]]:
    """What contracts 1 and 3 watch: the modules each adapter sits on, or the tensors of the base
    that train.
    """
    return {name: parameter_set(model, name).targets() for name in names}


def describe_unadapted(model: CausalLM, names: Sequence[str]) -> list[str]:
    """What contract 1 says besides: what the adapters do not sit on, each thing once; nothing where
    the base itself trains.
    """
    adapters = [name for name in names if name in get_bank(model).adapters]
    return list(
        dict.fromkeys(
            module.what
            for name in adapters
            for module in list_skipped_modules(model, get_bank(model)[name])
        )
    )


def write_and_check_adapters(
    run_dir: Path,
    opened: OpenedModel,
    checks: ContractChecks,
    prepared: Mapping[str, PreparedData],
    beside: Sequence[str] = (),
    communicator: Communicator = ONE_PROCESS,
    shard: Sharder | None = None,
) -> dict[str, str]:
    """Write every adapter, and read it back (contract 5). ``beside``: the experts that trained with
    their router; ``communicator``, ``shard``: as in `full.write_and_check_model`. Returns {adapter:
    SHA-256 of its weights file}; where the base's own weights were trained, the whole model's, by
    file."""
    if base_parameter_set(opened.model) is not None:
        return full.write_and_check_model(run_dir, opened, checks, prepared, communicator, shard)
    if get_bank(opened.model).routers:
        digests = mixture.write_and_check_mixture(
            run_dir, opened, checks, prepared, base_model_name(opened)
        )
        for name in beside:
            check_adapter_reload(checks, opened.model, name, run_dir / name, prepared[ROUTER_NAME])
        if beside:
            router = checks.results[5].detail
            checks.held(5, f"{router}; so are the values of {len(beside)} experts")
        return digests
    # what `TrainResult.model` is returned with: the first adapter answers
    get_bank(opened.model).activate(Mix.one(next(iter(prepared))))
    digests = artifacts.write_adapters(
        run_dir, opened.model, opened.tokenizer, list(prepared), base_model_name(opened)
    )
    has_scores = [
        check_adapter_reload(checks, opened.model, name, folder, prepared[name])
        for name, folder in _adapter_folder_list(run_dir, prepared)
    ]
    # of values, not tensors: it is the number that trainable_parameters has in the receipt
    values = sum(parameter_set(opened.model, name).num_parameters() for name in prepared)
    whose = f" of {len(prepared)} adapters" if len(prepared) > 1 else ""
    batches = " and the scores of a batch" if all(has_scores) else ""
    checks.held(5, f"{values} values{whose}{batches} equal bit for bit after reading back")
    return digests


def settle_adapters(model: CausalLM, names: Sequence[str], add_note: NoteCallback) -> None:
    """Make what was trained what is saved: of an AdaLoRA adapter the plain one that its ranks left.
    Raises ConfigError if none is."""
    bank = get_bank(model)
    for name in names:
        adapter = bank.adapters.get(name)
        if adapter is None or adapter.spec.adalora is None:
            continue
        plain = fold_triplets(adapter)
        bank.put_in_place(plain)
        ranks = [slot.A.shape[0] for slot in plain.slots.values()]
        gone = len(adapter.slots) - len(ranks)
        add_note(
            f"{adapter.label}: AdaLoRA left ranks {min(ranks)} to {max(ranks)}, {sum(ranks)} of "
            f"{sum(slot.A.shape[0] for slot in adapter.slots.values())} in all"
            + (
                f"; {gone} of {len(adapter.slots)} modules have none and are no targets"
                if gone
                else ""
            )
            + "; it is saved as plain LoRA"
        )


def displace_measurements(run_dir: Path, digests: Mapping[str, str]) -> None:
    """Where this run has ended before, with another adapter (other code or another machine made other
    bits of it), what was measured of that one (evaluation.json, evals/) moves to previous/N. Raises
    DiskError.
    """
    try:
        before = receipt.read(run_dir / RECEIPT)
    except DataError:
        # somebody's file of that name: it vouches for no adapter, so nothing here was measured of
        # this one
        before = {}
    if before is None or (before.get("adapters") or before.get("weights")) == dict(digests):
        return
    names = [EVALUATION] if ownership.is_evaluation_file(run_dir / EVALUATION) else []
    # also in the folder of each job, which can be evaluated by itself
    places = [f"{adapter}/{SUITES}" for adapter in digests]
    names += [place for place in places if ownership.is_suites_folder(run_dir / place)]
    if ownership.is_suites_folder(run_dir / SUITES):
        entries = sorted(entry.name for entry in (run_dir / SUITES).iterdir())
        others = [f"{SUITES}/{name}" for name in entries if STEP.fullmatch(name) is None]
        # what was asked while this run trained is its own, and stays
        names += [SUITES] if len(others) == len(entries) else others
    ownership.displace_entries(run_dir, names)


def _adapter_folder_list(run_dir: Path, names: Mapping[str, Any]) -> list[tuple[str, Path]]:
    return [(name, RunDir(run_dir).adapter(name, len(names))) for name in names]


def check_adapter_reload(
    checks: ContractChecks, model: CausalLM, name: str, folder: Path, prepared: PreparedData
) -> bool:
    """Contract 5: read the adapter back under another name; its values and the scores of a batch
    must be the same bits.

    Returns whether there was a batch to score.
    """
    bank = get_bank(model)
    # A name that no adapter has, shortened so that the suffix fits the longest one allowed.
    reloaded_name = next(
        n
        for n in (f"{name[:50]}.reloaded{i or ''}" for i in range(len(bank.names()) + 1))
        if n not in bank.names()
    )
    try:
        # From the file and by the reader that `lorry.load` uses, beside the one still in memory.
        # It is compared and asked, and needs no memory for gradients.
        load_adapter(model, folder, reloaded_name, trainable=False)
        read_back = bank[reloaded_name].whole_factors()
        if not all(
            torch.equal(factor, read_back[tensor])
            for tensor, factor in bank[name].whole_factors().items()
        ):
            raise checks.fail(5, f"{folder}: the adapter read back is not the one that was trained")
        # a stream does not go back to its first rows: without held-out ones the values have to do
        batch = next(iter(prepared.evaluation), None) or (
            prepared.stream.batches(0)[0] if prepared.tokens else None
        )
        if batch is not None:
            scorer = ModelScorer(model)
            scores = [
                scorer.score([batch], {"s": TokenScore(log_prob)}, Mix.one(n))[0]["s"]
                for n in (name, reloaded_name)
            ]
            # equal, not close: a tolerance would hide a bit that was lost
            if not torch.equal(*scores):
                raise checks.fail(5, f"{folder}: the adapter read back gives other logits")
    except ModelError as error:
        raise checks.fail(5, str(error)) from error
    finally:
        if reloaded_name in bank.names():
            detach(model, reloaded_name)
    return batch is not None


def check_newest_checkpoint(checks: ContractChecks, newest: Path | None) -> None:
    """Contract 6: the newest checkpoint, if the run has any, verifies (SHA-256 of every file)."""
    if newest is None:
        checks.skipped(6, "the run wrote no checkpoint (save_strategy=no)")
        return
    try:
        # reads every byte and compares digests; the tensors are dropped at once
        checkpoint.load_checkpoint(newest)
    except ModelError as error:
        raise checks.fail(6, str(error)) from error
    checks.held(
        6, f"{newest.name} verified by SHA-256; resume_from_checkpoint=auto continues from it"
    )


def collect_samples(
    backend: Backend,
    jobs: PreparedJobs,
    context: int | None,
    sample_batches: Callable[[PreparedJob], Mapping[str, Batch]],
) -> list[dict[str, Any]]:
    """The rows of samples.json: each adapter's answers to the rows that are ``sample_batches`` of its job,
    and the training rows of each data set once.
    """
    samples = list[dict[str, Any]]()
    shown_digests = set[str]()
    for name, job in jobs.items():
        data = job.data
        # jobs on the same data would show the same rows; a streamed source has none to show again
        new = data.tokens is not None and data.digest not in shown_digests
        shown_digests.add(data.digest)
        rows = build_samples(
            backend,
            backend.mix_of(name),
            data.encoder,
            job.stream.batches(0)[0] if new else None,
            sample_batches(job),
            data.ends,
            context=context,
        )
        several = len(jobs) > 1
        samples += (
            [{**row, "group": f"{name}: {row['group']}"} for row in rows] if several else rows
        )
    return samples


def run_receipt(
    run_dir: Path,
    opened: OpenedModel,
    jobs: PreparedJobs,
    digests: Mapping[str, str],
    teacher: str | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """receipt.json: of one job plain values, of several a map for data and for seed. ``teacher``:
    its digest, if any; ``processes``: that made the run.
    """
    data = {name: _data_receipt(job) for name, job in jobs.items()}
    seeds = {name: job.run.train.seed for name, job in jobs.items()}
    names, is_single = trained_names(jobs), len(jobs) == 1
    trained = [parameter_set(opened.model, name) for name in names]
    # with lora=null the base in memory is the trained one: its digest was taken as the run began
    start_digest = next((each.start_digest for each in trained if each.start_digest), None)
    base = {**opened.source, "sha256": start_digest or base_digest(opened.model)}
    if (start := get_bank(opened.model, create=True).start) is not None:
        base["start"] = {"path": start.path, "sha256": start.sha256}
    saved = {"adapters" if start_digest is None else "weights": digests}
    if get_bank(opened.model).routers:
        saved["router"] = mixture.router_digests(run_dir)
        # of the experts beside it those that trained
        experts = [run_dir / name / ADAPTER_WEIGHTS for name in names if name in digests]
        files = [*(run_dir / name for name in saved["router"]), *experts]
    elif start_digest is None:
        files = [folder / ADAPTER_WEIGHTS for _, folder in _adapter_folder_list(run_dir, jobs)]
    else:
        files = [run_dir / file for file in digests]
    record = artifacts.build_receipt(
        data=next(iter(data.values())) if is_single else data,
        base=base,
        code=checkpoint.code_digest(),
        saved=saved,
        seed=next(iter(seeds.values())) if is_single else seeds,
        sizes={
            "trainable_parameters": sum(each.num_parameters() for each in trained),
            "total_parameters": parameter_count(opened.model),
            "saved_bytes": sum(file.stat().st_size for file in files),
        },
        processes=processes,
    )
    return record if teacher is None else {**record, "teacher": {"sha256": teacher}}


def _data_receipt(job: PreparedJob) -> dict[str, Any]:
    """What became of a job's rows; those of its other sets by role, and the other answers to the
    questions of a set by ``ROLE alternates``.
    """
    others = {role: _rows_receipt(data) for role, data in job.row_sets.items()}
    if isinstance(job.stream, RoleStream):
        others |= {
            f"{role} alternates": {"sha256": tokens.digest, **vars(tokens.report)}
            for role, tokens in job.stream.alternate_sets().items()
        }
    return {**_rows_receipt(job.data), **others}


def _rows_receipt(prepared: PreparedData) -> dict[str, Any]:
    report = prepared.report
    if prepared.tokens is None:
        return {"source": report.source, "streamed": True, "left_out": report.left_out}
    return {"sha256": prepared.digest, **vars(report)}


def base_model_name(opened: OpenedModel) -> str:
    """What adapter_config.json names as the base: a hub id as such, anything else as the directory
    it was read from.
    """
    source = opened.source
    # with an adapter the name is the adapter's repository, and PEFT would look for weights there
    on_hub = source["kind"] == "hub" and not source.get("adapter")
    return str(source["name"]) if on_hub else str(Path(source["path"]).resolve())
