"""One run description and one shape: which choices are open, which of them fits the budget, and what to say of it.

`lorry plan` shows the answer; `lorry sft` takes it (train/resources/budget.py). What is open: the rank if it is `auto`; and, once there is a
memory_budget, recompute if gradient_checkpointing was left alone, and how a step's rows are cut into micro-batches if neither
per_device_train_batch_size nor gradient_accumulation_steps was given. None of these changes what is learnt but the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from lorry.config.parsing.sizes import in_words, parse_size
from lorry.config.schema import LoraConfig, Run
from lorry.errors import ConfigError
from lorry.plan.adapters import Adapter, adapter_of, largest_rank
from lorry.plan.memory import Device, Memory, Precision, Recompute, Setup, memory_of
from lorry.plan.search import Choice, Found, choices, ranks_up_to, search, splits_of
from lorry.plan.shapes import Shape

Need = Callable[[Choice], Memory]
SPLIT_FIELDS = {"per_device_train_batch_size", "gradient_accumulation_steps"}


def lora_of(run: Run) -> LoraConfig:
    """The adapter's settings. Raises ConfigError for lora=null."""
    if run.lora is None:
        raise ConfigError(
            "lora=null trains the base itself, which is not planned yet: count 16 bytes a weight that trains (fp32 master, "
            "gradient, two moments), beside the base and the activations"
        )
    return run.lora


def setup_of(run: Run, choice: Choice, device: Device, tiles: bool) -> Setup:
    """How a choice runs: micro-batches of at most rows x max_length tokens. ``tiles``: see `Setup`."""
    return Setup(
        tokens=choice.rows * run.data.max_length, length=run.data.max_length, recompute=choice.recompute,
        precision=choice.precision, device=device, tiles=tiles, whole=True,
    )  # fmt: skip


def adapters_of(run: Run, shape: Shape) -> Callable[[int], Adapter]:
    """The run's adapter at a rank, made once per rank."""
    lora = lora_of(run)

    @cache
    def made(rank: int) -> Adapter:
        return adapter_of(shape, lora, rank)

    return made


def on_one_device(run: Run, shape: Shape, device: Device, tiles: bool) -> Need:
    """Memory of a choice on a single device."""
    adapter = adapters_of(run, shape)
    return lambda choice: memory_of(shape, adapter(choice.rank), setup_of(run, choice, device, tiles))


def open_choices(run: Run, shape: Shape, precisions: Sequence[Precision], *, rank: int | None = None) -> list[Choice]:
    """Every choice the description leaves open, preferred ones first; exactly one without a memory_budget. ``rank``: of an
    adapter that exists already."""
    lora, train = lora_of(run), run.train
    if rank is None and lora.r == "auto":
        ranks = ranks_up_to(largest_rank(shape, lora))
    else:
        ranks = [rank if rank is not None else int(lora.r)]
    rows, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    free = run.memory_budget is not None
    split = free and not (SPLIT_FIELDS & train.model_fields_set)
    recompute: list[Recompute] = ["full" if train.gradient_checkpointing else "none"]
    if free and "gradient_checkpointing" not in train.model_fields_set:
        recompute = ["none", "full"]
    return choices(ranks, splits_of(rows, accumulation) if split else [(rows, accumulation)], recompute, precisions)


def find(run: Run, options: Sequence[Choice], need: Need) -> Found:
    """The search within the description's budget, which must be there."""
    assert run.memory_budget is not None
    return search(parse_size(run.memory_budget), options, need)


def impossible(run: Run, found: Found) -> ConfigError:
    """No choice fits: say so with the smallest budget that would do, and the largest part of it."""
    least, memory = found.least.choice, found.least.memory
    most = max(memory.components, key=lambda c: c.bytes)
    enough = -(-memory.total // 2**20)
    return ConfigError(
        f"memory_budget={run.memory_budget}: nothing fits. The leanest choice ({least.words()}) needs {in_words(memory.total)}, "
        f"{in_words(most.bytes)} of it {most.name}; give memory_budget={enough}MiB or more, a smaller model or max_length"
    )
