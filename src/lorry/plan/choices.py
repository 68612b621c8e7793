"""One run description and one shape: which choices are open, which of them fits the budget, and
what to say of it.

`lorry plan` shows the answer; `lorry sft` takes it (train/resources/budget.py). What is open: the
rank if it is `auto`; and, once there is a memory_budget, recompute if gradient_checkpointing was
left alone, and how a step's rows are cut into micro-batches if neither per_device_train_batch_size
nor gradient_accumulation_steps was given. None of these changes what is learnt but the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from lorry.config.parsing.sizes import parse_size, size_in_words
from lorry.config.schema import LoraConfig, RunConfig
from lorry.errors import ConfigError
from lorry.plan.adapters import PlannedAdapter, largest_rank, plan_adapter
from lorry.plan.memory import (
    DeviceType,
    MemoryEstimate,
    MemorySetup,
    PrecisionName,
    RecomputeMode,
    estimate_memory,
)
from lorry.plan.search import (
    ChoiceSearchResult,
    PlanChoice,
    batch_splits,
    enumerate_choices,
    powers_of_two,
    search_choices,
)
from lorry.plan.shapes import ModelShape

MemoryOfChoice = Callable[[PlanChoice], MemoryEstimate]
SPLIT_FIELDS = {"per_device_train_batch_size", "gradient_accumulation_steps"}


def require_lora(run: RunConfig) -> LoraConfig:
    """The adapter's settings. Raises ConfigError for lora=null."""
    if run.lora is None:
        raise ConfigError(
            "lora=null trains the base itself, which is not planned yet: count 16 bytes a weight that trains (fp32 master, "
            "gradient, two moments), beside the base and the activations"
        )
    return run.lora


def memory_setup(
    run: RunConfig, choice: PlanChoice, device: DeviceType, tiles: bool
) -> MemorySetup:
    """How a choice runs: micro-batches of at most rows x max_length tokens. ``tiles``: see
    `MemorySetup`.
    """
    return MemorySetup(
        tokens=choice.rows * run.data.max_length,
        length=run.data.max_length,
        recompute=choice.recompute,
        precision=choice.precision,
        device=device,
        tiles=tiles,
        whole=True,
    )


def adapter_at_rank(run: RunConfig, shape: ModelShape) -> Callable[[int], PlannedAdapter]:
    """The run's adapter at a rank, made once per rank."""
    lora = require_lora(run)

    @cache
    def adapter(rank: int) -> PlannedAdapter:
        return plan_adapter(shape, lora, rank)

    return adapter


def single_device_memory(
    run: RunConfig, shape: ModelShape, device: DeviceType, tiles: bool
) -> MemoryOfChoice:
    """Memory of a choice on a single device."""
    adapter = adapter_at_rank(run, shape)
    return lambda choice: estimate_memory(
        shape, adapter(choice.rank), memory_setup(run, choice, device, tiles)
    )


def open_choices(
    run: RunConfig,
    shape: ModelShape,
    precisions: Sequence[PrecisionName],
    *,
    rank: int | None = None,
) -> list[PlanChoice]:
    """Every choice the description leaves open, preferred ones first; exactly one without a
    memory_budget. ``rank``: of an adapter that exists already."""
    lora, train = require_lora(run), run.train
    if rank is None and lora.r == "auto":
        ranks = powers_of_two(largest_rank(shape, lora))
    else:
        ranks = [rank if rank is not None else int(lora.r)]
    rows, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    free = run.memory_budget is not None
    # either field given fixes the split: half of what somebody asked for is not what they asked
    split = free and not (SPLIT_FIELDS & train.model_fields_set)
    recompute: list[RecomputeMode] = ["full" if train.gradient_checkpointing else "none"]
    if free and "gradient_checkpointing" not in train.model_fields_set:
        recompute = ["none", "full"]
    return enumerate_choices(
        ranks,
        batch_splits(rows, accumulation) if split else [(rows, accumulation)],
        recompute,
        precisions,
    )


def find_fitting_choice(
    run: RunConfig, options: Sequence[PlanChoice], need: MemoryOfChoice
) -> ChoiceSearchResult:
    """The search within the description's budget, which must be there."""
    assert run.memory_budget is not None
    return search_choices(parse_size(run.memory_budget), options, need)


def no_choice_fits_error(run: RunConfig, found: ChoiceSearchResult) -> ConfigError:
    """No choice fits: say so with the smallest budget that would do, and the largest part of it."""
    least, memory = found.least.choice, found.least.memory
    most = max(memory.components, key=lambda c: c.bytes)
    enough = -(-memory.total // 2**20)  # whole MiB, rounded up, so that the advice itself fits
    return ConfigError(
        f"memory_budget={run.memory_budget}: nothing fits. The leanest choice ({least.words()}) needs {size_in_words(memory.total)}, "
        f"{size_in_words(most.bytes)} of it {most.name}; give memory_budget={enough}MiB or more, a smaller model or max_length"
    )
