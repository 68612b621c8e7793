"""The backend, the task and the loop of a run, and what its checkpoints remember of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lorry.adapters.attach import get_bank
from lorry.adapters.peft.base_digest import base_digest
from lorry.adapters.variants.starts import rows_read_by_tokens
from lorry.backends.distributed.communicator import ONE_PROCESS, Communicator
from lorry.backends.distributed.ddp import SharedScorer
from lorry.backends.distributed.tensor_ranks import data_ranks, tensor_ranks
from lorry.backends.optim import OptimSettings
from lorry.backends.protocol import Backend
from lorry.backends.registry import BACKENDS
from lorry.config import RunConfig
from lorry.config.schema.train import TrainConfig
from lorry.data.batch import Batch
from lorry.data.stream.joint import JointStream, assign_adapter
from lorry.kernels import kernel_status
from lorry.models.causal_lm import CausalLM
from lorry.models.layer_weights import Sharder
from lorry.models.loading.open import OpenedModel, open_model
from lorry.plan.constants import MIN_BATCH_TOKENS
from lorry.tasks.build import BuiltTask, PreparedJob, PreparedJobs, TaskInputs, trained_names
from lorry.tasks.registry import TASKS
from lorry.train import checkpoint
from lorry.train.checks import ContractChecks, tensor_fingerprint
from lorry.train.engine import TrainingEngine
from lorry.train.evaluation.run_evaluation import Measure, RunEvaluation
from lorry.train.jobs import TrainingJob
from lorry.train.setup.notebook import Notebook

# how far the loss packed and alone may differ (contract 4); of half precision 1e-2
SCORE_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}
# Times that: how far one token's score may move with its neighbours' tokens, where these change
# shapes (`CausalLM.shapes_follow_tokens`): the worst token of 30 layers was seen at 0.93 in
# float32. Elsewhere 0.
LEAK_FACTOR = 10


def build_engine(
    run: RunConfig,
    opened: OpenedModel,
    jobs: PreparedJobs,
    notebook: Notebook,
    evaluations: Sequence[RunEvaluation] = (),
    communicator: Communicator = ONE_PROCESS,
    shard: Sharder | None = None,
) -> TrainingEngine:
    """The backend, the task and the loop of this run. ``evaluations``: what it asks of an adapter
    besides the task's own; ``communicator``: its processes; ``shard``: cuts other models of it over
    them.
    """
    opened.model.gradient_checkpointing = run.train.gradient_checkpointing
    opened.model.sequence_parallel = run.backend.sequence_parallel
    # dropout's seed is part of the sequences' keys, job by job
    ends = TASKS[run.task].ends
    training = [_training_job(name, job, ends(job)) for name, job in jobs.items()]
    settings = {
        name: (train, job.total)
        for job in training
        for name, train in {job.name: job.train, **job.beside}.items()
    }
    backend = BACKENDS[run.backend.name](
        opened.model,
        trained_names(jobs),
        {name: optim_settings_of(*of_job) for name, of_job in settings.items()},
        gradient=TASKS[run.task].gradient({name: job.run for name, job in jobs.items()}),
        communicator=communicator,
        moment_ranks=data_ranks(communicator) if run.backend.shard_optimizer else None,
    )
    inputs = _task_inputs(run, opened, jobs, training, backend)
    # `repeat`: what a task tells while it trains may be true again, as a note of the set-up is not
    ranks = tensor_ranks(communicator)
    open_other = partial(open_model, ranks=ranks, shard=shard, must_share=False)
    inputs = replace(inputs, tell=notebook.repeat, open_model=open_other)
    built = TASKS[run.task].build(inputs)
    notebook.tell(*built.notes, *(job.warmup_note() for job in training))
    run_evaluations: list[RunEvaluation] = [
        Measure(built.measure, digests=built.digests),
        *evaluations,
    ]
    tolerance = SCORE_TOLERANCES.get(opened.model.dtype, 1e-2)
    return TrainingEngine(
        backend,
        built.task,
        run.train,
        run.output_dir,
        identity=_run_identity(
            run,
            opened,
            jobs,
            dict(digest for evaluation in run_evaluations for digest in evaluation.digests.items())
            | _held_digest(opened.model, trained_names(jobs))
            | _open_alphas(jobs),
            backend,
        ),
        checks=ContractChecks(),
        jobs=training,
        listeners=notebook.listeners,
        tolerance=tolerance,
        leak_tolerance=LEAK_FACTOR * tolerance if opened.model.shapes_follow_tokens else 0.0,
        models=built.models
        if communicator.size == 1
        else {name: SharedScorer(model, communicator) for name, model in built.models.items()},
        evaluations=run_evaluations,
        record=built.record,
        conclude=built.conclude,
        unreached=lambda batches: _unreached(opened.model, backend, built, batches),
    )


def _unreached(
    model: CausalLM, backend: Backend, built: BuiltTask, batches: Sequence[Batch]
) -> dict[str, set[str]]:
    """The targets that no gradient of a step reaches: of the task, and embeddings of which rows train
    whose tokens do not occur."""
    found = {name: set(modules) for name, modules in built.unreached().items()}
    for number, name in enumerate(built.task.adapters):
        if name not in get_bank(model).adapters:
            continue
        for path, ids in rows_read_by_tokens(model, get_bank(model)[name]).items():
            read = [batch.tokens_read(number).cpu() for batch in batches]
            if not any(bool(torch.isin(tokens, ids.cpu()).any()) for tokens in read):
                found.setdefault(name, set()).add(path)
    return found


def _training_job(name: str, job: PreparedJob, ends: Collection[int]) -> TrainingJob:
    train = job.run.train
    total = job.stream.total_steps(train.num_train_epochs, train.max_steps)
    return TrainingJob(
        name,
        train,
        total,
        job.stream.epoch_of,
        job.stream.steps_per_epoch,
        list(ends),
        job.beside,
    )


def _task_inputs(
    run: RunConfig,
    opened: OpenedModel,
    jobs: PreparedJobs,
    training: Sequence[TrainingJob],
    backend: Backend,
) -> TaskInputs:
    """The jobs' rows as one stream, and the held-out ones of all of them."""
    seeds = {name: job.run.train.seed for name, job in jobs.items()}
    # a kind of device without a number is taken for the fastest, which needs the most
    room = run.joint_tokens or MIN_BATCH_TOKENS.get(
        backend.device.type, max(MIN_BATCH_TOKENS.values())
    )
    stream = JointStream({name: job.stream for name, job in jobs.items()}, seeds, room)
    held = [
        # held-out rows carry their job's number, by which `held_out_task` tells them apart again
        assign_adapter(batch, number, seeds[name])
        for number, (name, job) in enumerate(jobs.items())
        for batch in job.data.evaluation
    ]
    total = max(job.total for job in training)
    return TaskInputs(run, opened, jobs, stream, held, total, backend)


def _held_digest(model: CausalLM, names: Sequence[str]) -> dict[str, str]:
    """Of the halves of adapters that do not train, which no checkpoint has: another machine may have made
    others of the base."""
    held = [
        f"{name}/{tensor} {tensor_fingerprint(values.cpu())}"
        for name in names
        if (adapter := get_bank(model).adapters.get(name)) is not None
        for tensor, values in adapter.held_tensors().items()
    ]
    return {"frozen halves": hashlib.sha256("\n".join(held).encode()).hexdigest()} if held else {}


def _open_alphas(jobs: PreparedJobs) -> dict[str, str]:
    """lora_alpha where a rule makes it of the largest rank that rows may choose, and rsLoRA scales by the root of
    ranks: the settings of a run under another rule are the same, and so are the shapes of its tensors."""
    return {
        f"lora_alpha of {name}": f"{lora.alpha_at(lora.most_rank):g}"
        for name, job in jobs.items()
        if (lora := job.run.lora) is not None
        and lora.ranks_follow_data
        and lora.use_rslora
        and lora.lora_alpha is None
    }


def _run_identity(
    run: RunConfig,
    opened: OpenedModel,
    jobs: PreparedJobs,
    others: Mapping[str, str],
    backend: Backend,
) -> dict[str, Any]:
    """What a checkpoint remembers of its run, and resuming compares. ``others``: digests of what
    else it hangs on.
    """
    digests = {name: job.data.digest for name, job in jobs.items()}
    return {
        # as JSON gives it back: a checkpoint's meta holds no tuples and no paths
        "config": json.loads(run.model_dump_json()),
        "digests": {
            "data": digests if len(jobs) > 1 else next(iter(digests.values())),
            "base": base_digest(opened.model),
            **others,
            "code": checkpoint.code_digest(),
        },
        "environment": checkpoint.numeric_environment(
            device=str(backend.device), kernels=kernel_status().line()
        ),
    }


def optim_settings_of(train: TrainConfig, total_steps: int = 0) -> OptimSettings:
    """The optimizer's numbers from a run's settings and its steps."""
    betas = (train.adam_beta1, train.adam_beta2)
    return OptimSettings(
        betas,
        train.adam_epsilon,
        train.weight_decay,
        train.max_grad_norm,
        train.loraplus_lr_ratio,
        train.l2_regularization,
        total_steps,
    )
