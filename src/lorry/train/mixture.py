"""A mixture of experts as a directory: a PEFT folder for each expert, and `router/` beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorry.adapters.attach import detach, get_bank
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.peft.files import adapter_files
from lorry.adapters.router import ROUTER_NAME, RouterParameters
from lorry.adapters.routing.files import load_router, router_files
from lorry.config import RouterRunConfig, dump_settings
from lorry.data.prepare import PreparedData
from lorry.disk import durable
from lorry.disk.integrity import file_digest
from lorry.errors import ModelError
from lorry.generation.scorer import ModelScorer
from lorry.models.causal_lm import parameter_count
from lorry.models.loading.open import OpenedModel
from lorry.models.scoring.score import TokenScore, log_prob
from lorry.runs import ownership
from lorry.runs.layout import RECEIPT, ROUTER, ROUTER_ADAPTER, RUN_FILE
from lorry.train import artifacts, checkpoint
from lorry.train.checks import ContractChecks


def write_mixture(
    run_dir: Path,
    opened: OpenedModel,
    experts: Sequence[str],
    base_name: str,
    gates: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Every expert, the tokenizer, and the router (of constant ``gates``, or the model's own).
    Returns {adapter: SHA-256 of its weights file}. Raises DiskError."""
    # first: an unfinished mixture is told from a run of adapters by it
    durable.make_directory(run_dir / ROUTER)
    digests = artifacts.write_adapters(run_dir, opened.model, opened.tokenizer, experts, base_name)
    # of the files as they are now: what a mixture is checked against when it is opened
    folders, own = {name: run_dir / name for name in experts}, None
    if gates is None and ROUTER_NAME in get_bank(opened.model).adapters:
        own = run_dir / ROUTER / ROUTER_ADAPTER
        contents = adapter_files(opened.model, ROUTER_NAME, base_name=base_name)
        ownership.write_owned_files(
            run_dir / ROUTER, {f"{own.name}/{n}": c for n, c in contents.items()}
        )
    files = router_files(opened.model, folders, gates, own)
    ownership.write_owned_files(run_dir, {f"{ROUTER}/{name}": c for name, c in files.items()})
    return digests


def describe_untrained_mixture(
    run: RouterRunConfig,
    opened: OpenedModel,
    adapters: Mapping[str, str],
    rows: Mapping[str, Any],
) -> None:
    """run.yaml and, last, receipt.json of a mixture that no training made, so that it is read like
    any run. adapters: {expert: SHA-256 of its weights file}; rows: of what its router was made, by
    expert. Raises DiskError."""
    folder = run.output_dir
    artifacts.write_text(folder, RUN_FILE, dump_settings(run))
    saved = router_digests(folder)
    receipt = artifacts.build_receipt(
        data=rows,
        base={**opened.source, "sha256": base_digest(opened.model)},
        code=checkpoint.code_digest(),
        saved={"adapters": adapters, "router": saved},
        seed=run.train.seed,
        sizes={
            "total_parameters": parameter_count(opened.model),
            "saved_bytes": sum((folder / file).stat().st_size for file in saved),
        },
    )
    artifacts.write_json(folder, RECEIPT, receipt)


def router_digests(run_dir: Path) -> dict[str, str]:
    """{file: SHA-256} of the router's files, for the receipt."""
    return {
        str(path.relative_to(run_dir)): file_digest(path)
        for path in sorted((run_dir / ROUTER).rglob("*"))
        if path.is_file()
    }


def write_and_check_mixture(
    run_dir: Path,
    opened: OpenedModel,
    checks: ContractChecks,
    prepared: Mapping[str, PreparedData],
    base_name: str,
) -> dict[str, str]:
    """Write the mixture; read the router back (contract 5): its values and the scores of a batch
    must be the same bits. Returns {expert: SHA-256 of its weights file}."""
    bank = get_bank(opened.model)
    trained = bank.routers[ROUTER_NAME]
    assert isinstance(trained, RouterParameters)
    digests = write_mixture(run_dir, opened, trained.adapters, base_name)
    # the one that was trained stays in the bank under its name
    read_back = f"{ROUTER_NAME}.reloaded"
    try:
        mix = load_router(
            opened.model,
            run_dir,
            {n: run_dir / n for n in trained.adapters},
            adapter_name=read_back,
        )
    except ModelError as error:
        raise checks.fail(5, str(error)) from error
    reloaded = bank.routers[ROUTER_NAME].tensors()
    bank.routers[ROUTER_NAME] = trained
    if not all(torch.equal(v.cpu(), reloaded[n].cpu()) for n, v in trained.tensors().items()):
        raise checks.fail(
            5, f"{run_dir / ROUTER}: the router read back is not the one that was trained"
        )
    if read_back in bank.adapters and not torch.equal(
        bank[read_back].values.cpu(), bank[ROUTER_NAME].values.cpu()
    ):
        raise checks.fail(
            5, f"{run_dir / ROUTER}: the router's adapter read back is not the one that was trained"
        )
    data = prepared[ROUTER_NAME]
    batch = next(iter(data.evaluation), None) or data.stream.batches(0)[0]
    scores = [
        ModelScorer(opened.model).score([batch], {"s": TokenScore(log_prob)}, weighting)[0]["s"]
        for weighting in (trained.mix(), mix)
    ]
    if not torch.equal(*scores):
        raise checks.fail(5, f"{run_dir / ROUTER}: the router read back gives other logits")
    checks.held(
        5,
        f"{trained.values.numel()} values of the router and the scores of a batch equal bit for bit after reading back",
    )
    if read_back in bank.adapters:
        detach(opened.model, read_back)
    bank.activate(trained.mix())
    return digests
