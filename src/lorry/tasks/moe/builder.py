"""A router's run from its description to a task: experts attached, frozen or trained with it, a row of
every domain in each micro-batch, the router's first values.

`MOE` is the definition that `tasks.registry` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lorry.adapters.attach import get_bank
from lorry.adapters.peft.files import find_adapter, load_adapter
from lorry.adapters.router import (
    ROUTER_NAME,
    RoutingRule,
    TokenRouter,
    attach_router,
    site_modules,
)
from lorry.adapters.routing.gate_vectors import attach_gate_vectors
from lorry.adapters.routing.stacking import stack_masters
from lorry.config import RunConfig
from lorry.config.data import DataConfig
from lorry.config.moe import RouterConfig, RouterRunConfig
from lorry.config.schema.train import TrainConfig
from lorry.data.batch import Batch
from lorry.data.encoding.token_set import TokenSet
from lorry.data.prepare import PreparedData
from lorry.data.stream.dataset import BatchStream, TrainStream
from lorry.data.stream.roles import RoleStream
from lorry.errors import ConfigError
from lorry.models.loading.open import OpenedModel
from lorry.notes import NoteCallback
from lorry.tasks.build import BuiltTask, PreparedJob, TaskDefinition, TaskInputs
from lorry.tasks.moe.classifier import (
    attach_classifier_run,
    build_prompt_classifier,
    prompt_stream,
)
from lorry.tasks.moe.first_values import split_rows_for_scale, start_at_discriminants
from lorry.tasks.moe.task import DomainTask, MoeTask

FIRST_ROWS = 16  # rows of each expert that make the router's first values


def _settings_of(run: RunConfig) -> RouterRunConfig:
    assert isinstance(run, RouterRunConfig)
    return run


def rule_of(router: RouterConfig) -> RoutingRule:
    """The rule that the settings describe."""
    return RoutingRule(
        router.input,
        router.top_k,
        router.normalize,
        router.temperature,
        router.straight_through,
        router.level,
    )


def attach_experts(
    run: RunConfig, opened: OpenedModel, add_note: NoteCallback
) -> dict[str, RunConfig]:
    """Every expert, frozen unless it trains with the router, and a router over them. Raises
    ConfigError, ModelError."""
    if opened.adapters:
        raise ConfigError(
            f"{run.model.name} already has an adapter; a mixture is built on a base "
            "model: name that"
        )
    settings = _settings_of(run)
    for expert in settings.experts:
        folder, _ = find_adapter(Path(expert.adapter))
        # no dropout while the router trains alone (a frozen expert draws no masks): it has to learn of
        # the experts that will answer
        load_adapter(opened.model, folder, expert.name, trainable=settings.router.train_experts)
    attach_run_router(settings, opened)
    return {ROUTER_NAME: run}


def attach_run_router(settings: RouterRunConfig, opened: OpenedModel) -> None:
    """The router that a run trains, over the experts that are on the model. Raises ConfigError for
    experts that it does not take."""
    names, router = [expert.name for expert in settings.experts], settings.router
    if router.lora is not None:
        attach_classifier_run(settings, opened)
    elif router.kind == "phatgoose":
        attach_gate_vectors(opened.model, names, top_k=router.top_k, temperature=router.temperature)
    else:
        attached = attach_router(opened.model, names, rule_of(router), router.hidden)
        attached.init_hidden(settings.train.seed)
        stack_masters(opened.model, attached.mix())


def trained_experts(run: RunConfig) -> dict[str, TrainConfig]:
    """The experts that train with the router, with its settings and a learning rate of their own."""
    settings = _settings_of(run)
    router = settings.router
    if not router.train_experts:
        return {}
    rate = router.experts_learning_rate or run.train.learning_rate
    train = run.train.model_copy(update={"learning_rate": rate})
    return {expert.name: train for expert in settings.experts}


def domain_row_sets(run: RunConfig) -> dict[str, DataConfig]:
    """The rows of the experts behind the first, by name."""
    return {expert.name: expert.data for expert in _settings_of(run).experts[1:]}


def domain_stream(
    run: RunConfig, data: PreparedData, sets: Mapping[str, PreparedData]
) -> BatchStream:
    """A row of every other domain beside each of the first."""
    assert isinstance(data.stream, TrainStream)
    settings = _settings_of(run)
    first, beside = settings.experts[0].name, {n: _tokens(p) for n, p in sets.items()}
    if settings.router.lora is not None:
        return prompt_stream(settings, data.stream, {first: _tokens(data), **beside})
    return RoleStream(data.stream, first, beside=beside, alternates={}, seed=run.train.seed)


def _tokens(prepared: PreparedData) -> TokenSet:
    assert prepared.tokens is not None  # the description refuses streaming
    return prepared.tokens


def _domains(job: PreparedJob) -> dict[str, PreparedData]:
    return {_settings_of(job.run).experts[0].name: job.data, **job.row_sets}


def with_role(batch: Batch, role: str) -> Batch:
    """The batch as one of a domain's rows."""
    return replace(batch, role=(role,) * len(batch))


def first_rows(
    tokens: TokenSet, rows: int, device: torch.device
) -> tuple[list[Batch], list[Batch]]:
    """Batches of ``rows`` of an expert's first `FIRST_ROWS` rows: those that its router's first values
    are fitted to, and those that choose their scale."""
    fitted, held = (
        [batch.to(device) for batch in tokens.select(np.array(numbers)).eval_batches(rows)]
        for numbers in split_rows_for_scale(min(FIRST_ROWS, len(tokens)))
    )
    return fitted, held


def build_moe(inputs: TaskInputs) -> BuiltTask:
    """The task, with the router at its first values."""
    run, (job,) = _settings_of(inputs.run), inputs.jobs.values()
    model = inputs.opened.model
    router = get_bank(model).routers[ROUTER_NAME]
    domains = _domains(job)
    evaluation = [
        with_role(batch, name) for name, data in domains.items() for batch in data.evaluation
    ]
    digests = {f"rows of {name}": data.digest for name, data in job.row_sets.items()}
    if run.router.lora is not None:
        sets = {name: _tokens(data) for name, data in domains.items()}
        return build_prompt_classifier(run, inputs, sets, digests)
    common = (inputs.stream, evaluation, inputs.total, list(inputs.jobs))
    if not isinstance(router, TokenRouter):
        return BuiltTask(DomainTask(*common, experts=router.adapters), digests=digests)
    rows = run.train.per_device_eval_batch_size
    if run.router.init == "hidden":
        first = {
            name: first_rows(_tokens(data), rows, model.device) for name, data in domains.items()
        }
        start_at_discriminants(
            model,
            router,
            {name: fitted for name, (fitted, _) in first.items()},
            {name: held for name, (_, held) in first.items()},
        )
    task = MoeTask(*common, router=router, settings=run.router, tell=inputs.tell)

    def unreached() -> dict[str, list[str]]:
        return {
            name: [module for site in sites for module in site_modules(model, site)]
            for name, sites in task.unreached_sites().items()
        }

    return BuiltTask(task, digests=digests, record=task.record, unreached=unreached)


MOE = TaskDefinition(
    build_moe,
    row_sets=domain_row_sets,
    stream=domain_stream,
    samples=lambda job: {
        f"held-out rows of {name}": data.evaluation[0]
        for name, data in _domains(job).items()
        if data.evaluation
    },
    attach=attach_experts,
    # a prompt is all that a classifier reads
    ends=lambda job: () if _settings_of(job.run).router.lora is not None else job.data.ends,
    beside=trained_experts,
)
