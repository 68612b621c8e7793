"""Ranks that a run's own rows choose (`lora.rank_by=data`), module by module, once the rows are there and
before an adapter has its first values.

A module gets as many ranks as the gradient of its weight has directions in the first step, and no fewer than
the whole adapter needs to have room for what the rows have to say: the supervised tokens times the loss of
the base on them, in bits. What memory, or the shape of a matrix, allows is the bound of both.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lorry.adapters.adapter import Adapter
from lorry.adapters.attach import get_bank
from lorry.adapters.bank import AdapterBank
from lorry.adapters.initialization.initialize import spec_of_ranks
from lorry.adapters.initialization.spectrum import ENERGY, gradient_ranks
from lorry.adapters.layers.linear import BankLinear
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.spec import LoraSpec
from lorry.data.batch import Batch, TokenizedExample, collate
from lorry.errors import ConfigError
from lorry.models.causal_lm import CausalLM
from lorry.models.loading.open import OpenedModel
from lorry.models.scoring.score import TokenScore, evaluate_wants, log_prob
from lorry.notes import NoteCallback
from lorry.plan.ranks import capacity_rank, next_rank, rank_grid
from lorry.tasks.build import PreparedJob, PreparedJobs


@dataclass(frozen=True)
class ChosenRanks:
    """``ranks``: by module; ``directions``: of each module's gradient; ``capacity``: the rank, everywhere,
    that has room for ``bits``; ``bound``: the most that was allowed."""

    ranks: Mapping[str, int]
    directions: Mapping[str, int]
    capacity: int
    bits: float
    bound: int

    def describe(self, name: str, rows: int, bound: str) -> str:
        """What was chosen, what decided, and what else would have. ``bound``: whose that is."""
        chosen, directions = self.ranks.values(), self.directions.values()
        cut = sum(max(self.capacity, d) > self.bound for d in directions)
        by_capacity = sum(self.capacity > d for d in directions)
        decided = [
            (len(self.ranks) - by_capacity - cut, "the gradients of the first step"),
            (by_capacity, "the amount of data"),
            (cut, bound),
        ]
        who = ", ".join(f"{count} by {what}" for count, what in decided if count > 0)
        return (
            f"adapter {name!r}: ranks {min(chosen)} to {max(chosen)}, {who}. {ENERGY:.0%} of the gradient "
            f"of {rows} rows lies in {min(directions)} to {max(directions)} directions; what the rows say "
            f"({_size(self.bits)}) fits rank {self.capacity}; {bound} would have given r={self.bound}"
        )


def _size(bits: float) -> str:
    for unit, factor in (("Gbit", 1e9), ("Mbit", 1e6), ("kbit", 1e3)):
        if bits >= factor:
            return f"{bits / factor:.3g} {unit}"
    return f"{bits:.3g} bit"


def jobs_ranked_by_data(opened: OpenedModel, jobs: PreparedJobs) -> dict[str, PreparedJob]:
    """Those whose adapter is new and takes its ranks from the rows."""
    bank = get_bank(opened.model)
    return {
        name: job
        for name, job in jobs.items()
        if name in bank.adapters
        and name not in opened.adapters
        and job.run.lora is not None
        and job.run.lora.ranks_follow_data
    }


def choose_ranks(opened: OpenedModel, jobs: PreparedJobs, add_note: NoteCallback) -> None:
    """Give every new adapter the ranks that its rows ask for, at most those it has, and say which and why.
    Raises ConfigError where there are no rows to ask, or the model is cut over processes."""
    bank = get_bank(opened.model)
    for name, job in jobs_ranked_by_data(opened, jobs).items():
        began = time.process_time()
        examples = first_examples(job, job.run.train.per_device_train_batch_size)
        if not examples:
            raise ConfigError(
                "lora.rank_by=data reads rows before training; leave data.streaming out"
            )
        batch, supervised = collate(examples), _supervised_tokens(job)
        chosen = ranks_of_rows(opened.model, bank, bank[name], batch, supervised)
        replace_ranks(bank, name, chosen.ranks, seed=job.run.train.seed)
        lora, budget = job.run.lora, job.run.memory_budget
        assert lora is not None
        given = "the largest that is tried" if lora.r == "auto" else "the rank that was given"
        bound = f"memory_budget={budget}" if budget is not None else given
        words = chosen.describe(name, len(examples), bound)
        add_note(f"{words}; {time.process_time() - began:.1f} s of processor time")


def restore_ranks(
    opened: OpenedModel, jobs: PreparedJobs, read: Callable[[], Mapping[str, Tensor]]
) -> None:
    """Give every such adapter the ranks that a checkpoint has values for. ``read``: its tensors, asked for
    where ranks hang on them."""
    bank = get_bank(opened.model)
    for name, job in jobs_ranked_by_data(opened, jobs).items():
        ranks = stored_ranks(bank[name], read())
        # else it is another run's, which is refused by what differs
        if len(ranks) == len(bank[name].slots):
            replace_ranks(bank, name, ranks, seed=job.run.train.seed)


def stored_ranks(adapter: Adapter, stored: Mapping[str, Tensor]) -> dict[str, int]:
    """{module: rank} of the adapter that a checkpoint holds, of the modules that are here: by a half that
    trains, which is in it."""
    side = adapter.sides[0]
    names = {path: f"adapter/{adapter.name}/{path}.lora_{side}" for path in adapter.slots}
    rank_dim = 0 if side == "A" else 1
    return {path: stored[name].shape[rank_dim] for path, name in names.items() if name in stored}


def ranks_of_rows(
    model: CausalLM, bank: AdapterBank, adapter: Adapter, batch: Batch, supervised: int
) -> ChosenRanks:
    """The ranks for an adapter's modules by a batch of its rows. ``supervised``: how many tokens there are
    to learn in all. Raises ConfigError."""
    layers = _check_layers(bank, adapter)
    loss = 0.0

    def run_model() -> None:
        nonlocal loss
        moved = batch.to(model.device)
        wants = {"logprob": TokenScore(log_prob)}
        scores = evaluate_wants(model, moved, wants, AdapterContext(Mix.none()))["logprob"]
        total = -(scores * moved.weights).sum() / moved.weights.sum()
        loss = float(total.detach())
        with model.layer_weights.backward_pass():
            total.backward()

    bound = max(slot.A.shape[0] for slot in adapter.slots.values())
    directions = gradient_ranks(layers, run_model, bound)
    # the bound need not be of the grid
    grid = sorted({*rank_grid(bound), bound})
    # an orthogonal start has its directions in pairs
    step = 2 if adapter.spec.init_lora_weights == "orthogonal" else 1
    grid = [rank for rank in grid if rank % step == 0]
    sides = {path: min(layer.in_features, layer.out_features) for path, layer in layers.items()}
    per_rank = sum(layer.in_features + layer.out_features for layer in layers.values())
    bits = supervised * max(loss, 0.0) / math.log(2)
    capacity = capacity_rank(bits, lambda rank: rank * per_rank, grid)
    ranks = {
        path: min(
            next_rank(max(found, capacity), grid),
            adapter.slots[path].A.shape[0],
            sides[path] // step * step,
        )
        for path, found in directions.items()
    }
    return ChosenRanks(ranks, directions, capacity, bits, bound)


def replace_ranks(bank: AdapterBank, name: str, ranks: Mapping[str, int], *, seed: int) -> None:
    """Make an adapter anew at these ranks, the scale of every module as it was."""
    spec = bank[name].spec
    common = Counter(ranks.values()).most_common(1)[0][0]
    bank.replace(name, spec_of_ranks(_at_rank(spec, common), ranks), list(ranks), seed=seed)


def _at_rank(spec: LoraSpec, rank: int) -> LoraSpec:
    """The spec with another r, whose scale is the same."""
    ratio = rank / spec.r
    factor = math.sqrt(ratio) if spec.use_rslora else ratio
    return replace(spec, r=rank, lora_alpha=spec.lora_alpha * factor)


def _check_layers(bank: AdapterBank, adapter: Adapter) -> dict[str, BankLinear]:
    adapter.refuse_further(
        "rank_by=data chooses the ranks of low-rank terms alone; give r=N, or rank_by=memory and memory_budget"
    )
    layers = dict[str, BankLinear]()
    for path in adapter.slots:
        layer = bank.modules[path]
        if not isinstance(layer, BankLinear):
            raise ConfigError(
                f"lora.rank_by=data is for linear layers, and {path} is none (fused experts, a router or an "
                "embedding); leave it out (exclude_modules), give r=N, or rank_by=memory and memory_budget"
            )
        if layer.slices is not None:
            raise ConfigError(
                f"lora.rank_by=data reads the gradient of whole matrices, of which each process has a part "
                f"of {path}; train on one process or with backend=ddp or fsdp, or give r=N"
            )
        layers[path] = layer
    return layers


def first_examples(job: PreparedJob, count: int) -> list[TokenizedExample]:
    """The first training rows in the order of the first epoch; none of a stream, which does not go back."""
    tokens = job.data.tokens
    if tokens is None:
        return []
    order = tokens.order(job.run.train.seed, 0, job.run.data.shuffle)
    return [tokens.example(int(row), 0) for row in order[:count]]


def _supervised_tokens(job: PreparedJob) -> int:
    return job.data.report.supervised
