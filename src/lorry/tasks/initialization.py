"""How adapters of a run begin (`init_lora_weights`), once its rows are there: from the base, or from the
first of the very rows that it trains on; and how a resumed run makes room for what its checkpoint has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import get_bank
from lorry.adapters.initialization.initialize import initialize_adapter, spec_of_ranks
from lorry.adapters.initialization.recording import RunModel, counting_tokens
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.tensor_parallel.slices import SIDES
from lorry.config.adapter.initialization import Initialization, find_initialization
from lorry.data.batch import Batch, collate
from lorry.errors import ConfigError
from lorry.models.causal_lm import CausalLM, PackedInput
from lorry.models.loading.open import OpenedModel
from lorry.models.loading.weights import stored_matrices
from lorry.models.scoring.score import TokenScore, evaluate_wants, log_prob
from lorry.notes import NoteCallback
from lorry.tasks.build import PreparedJobs
from lorry.tasks.ranks import first_examples, stored_ranks


def initialize_jobs(opened: OpenedModel, jobs: PreparedJobs, add_note: NoteCallback) -> None:
    """Give every new adapter its first values, and say which and how long it took. Raises what
    `initialize_adapter` raises, ConfigError where a job has no row to begin from."""
    _initialize(opened, jobs, _ways(opened, jobs), add_note)


def _initialize(
    opened: OpenedModel,
    jobs: PreparedJobs,
    ways: Mapping[str, Initialization],
    add_note: NoteCallback,
) -> None:
    bank = get_bank(opened.model)
    for name, way in ways.items():
        job, began = jobs[name], time.process_time()
        assert job.run.lora is not None
        count = job.run.lora.init_rows if way.reads_rows else 0
        # each by itself
        rows = [collate([example]) for example in first_examples(job, count)]
        if way.reads_rows and not rows:
            raise ConfigError(
                f"lora.init_lora_weights={way.name} begins from training rows, of which {name} has none"
            )
        adapter = initialize_adapter(
            bank,
            name,
            seed=job.run.train.seed,
            run_model=_runner(opened.model, rows, way) if way.reads_rows else None,
            original=stored_matrices(opened.model, Path(opened.source["path"])),
        )
        seconds = time.process_time() - began
        add_note(f"{_description(adapter, way, len(rows))}; {seconds:.1f} s of processor time")


def make_room_for_state(
    opened: OpenedModel,
    jobs: PreparedJobs,
    read: Callable[[], Mapping[str, Tensor]],
    add_note: NoteCallback,
) -> None:
    """Give every adapter the ranks, and the place for what it takes off, that a checkpoint has values
    for. ``read``: its tensors, asked for where ranks hang on them. A half that never trains is in no
    checkpoint, and is made again."""
    bank, ways = get_bank(opened.model), _ways(opened, jobs)
    frozen = {name for name in ways if bank[name].spec.train != SIDES}
    _initialize(opened, jobs, {name: ways[name] for name in ways if name in frozen}, add_note)
    for name, way in ways.items():
        if name in frozen:
            continue
        adapter, seed = bank[name], jobs[name].run.train.seed
        if way.name == "eva":
            ranks = stored_ranks(adapter, read())
            if ranks:  # else it is another run's, which is refused by what differs
                bank.replace(name, spec_of_ranks(adapter.spec, ranks), list(ranks), seed=seed)
        elif way.takes_off:
            adapter.use_initial(torch.zeros_like(adapter.values))


def _ways(opened: OpenedModel, jobs: PreparedJobs) -> dict[str, Initialization]:
    """The adapters that a run begins, and how, where that is more than random numbers."""
    bank, ways = get_bank(opened.model), dict[str, Initialization]()
    for name, job in jobs.items():
        # one that the model came with has its values; a task's own adapter was begun by it
        if name not in bank.adapters or name in opened.adapters or job.run.lora is None:
            continue
        way = find_initialization(bank[name].spec.init_lora_weights)
        if way is not None and bank[name].initial is None:
            ways[name] = way
    return ways


def _runner(model: CausalLM, rows: list[Batch], way: Initialization) -> RunModel:
    """What runs the frozen base on rows, one after the other: forward, or the mean loss of all
    supervised tokens and backward too."""
    return partial(_backward if way.reads == "gradients" else _forward, model, rows)


def _forward(model: CausalLM, rows: list[Batch]) -> None:
    for row in rows:
        batch = row.to(model.device)
        packed = PackedInput(batch.tokens, batch.positions, batch.segments)
        with counting_tokens(batch.weights > 0):
            model.hidden(packed, AdapterContext(Mix.none()))


def _backward(model: CausalLM, rows: list[Batch]) -> None:
    supervised = sum(float(row.weights.sum()) for row in rows)
    for row in rows:
        batch = row.to(model.device)
        wants = {"logprob": TokenScore(log_prob)}
        scores = evaluate_wants(model, batch, wants, AdapterContext(Mix.none()))["logprob"]
        # the mean over passes is taken: their sum is that of all tokens
        loss = -(scores * batch.weights).sum() * (len(rows) / supervised)
        with model.layer_weights.backward_pass():
            loss.backward()


def _description(adapter: Adapter, way: Initialization, rows: int) -> str:
    """What a person should know of how an adapter began."""
    spec = adapter.spec
    words = f"{adapter.label}: init_lora_weights={spec.init_lora_weights}"
    if way.reads_rows:
        words += f" from {rows} training rows"
    if way.name == "eva":
        ranks = [slot.A.shape[0] for slot in adapter.slots.values()]
        return f"{words}; {len(ranks)} modules with ranks {min(ranks)} to {max(ranks)}"
    if not way.takes_off:
        return words
    if spec.keep_residual:
        return (
            f"{words}; saved at rank {spec.r} without what was taken off the base (keep_residual)"
        )
    return f"{words}; saved as plain LoRA of rank {adapter.plain_spec.r} over the base as it is"
