"""Memory grows with what it should, and the search takes the first choice that fits: properties
over random shapes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.config import RunConfig, build_settings
from lorry.config.parsing.sizes import parse_size, size_in_words
from lorry.config.schema.lora import LoraConfig
from lorry.errors import ConfigError
from lorry.plan.adapters import plan_adapter
from lorry.plan.choices import (
    MemoryOfChoice,
    find_fitting_choice,
    no_choice_fits_error,
    open_choices,
    single_device_memory,
)
from lorry.plan.constants import PLAN_MARGIN
from lorry.plan.known import KNOWN_CONFIGS
from lorry.plan.memory import PRECISIONS, MemoryEstimate, MemorySetup, estimate_memory
from lorry.plan.ranks import capacity_rank, next_rank, rank_grid
from lorry.plan.search import PlanChoice, batch_splits
from lorry.plan.shapes import ModelShape, read_model_shape

SHAPES = {
    name: read_model_shape(KNOWN_CONFIGS[name])
    for name in ("smollm2-135m", "gpt2", "pythia-160m", "qwen3-0.6b", "mixtral-8x7b")
}
shapes = st.sampled_from(list(SHAPES.values()))
tokens = st.sampled_from([64, 256, 1024, 4096])
GIB = 2**30
MEMORIES = dict[tuple[str, int], MemoryOfChoice]()
ROOT = Path(__file__).resolve().parents[2]


def need(shape: ModelShape, rank: int = 8, **setup: Any) -> MemoryEstimate:
    full = MemorySetup(**{"tokens": 1024, "length": 1024, **setup})
    return estimate_memory(shape, plan_adapter(shape, LoraConfig(r=rank), rank), full)


def run(**settings: Any) -> RunConfig:
    return build_settings(
        RunConfig, {"data": "x.jsonl", "model": "smollm2-135m", **settings}, print
    )


def choices_of(described: RunConfig) -> list[PlanChoice]:
    """What a description of SmolLM2-135M leaves open."""
    assert described.lora is not None
    return open_choices(
        described.lora,
        described.train,
        SHAPES["smollm2-135m"],
        ["bfloat16"],
        has_budget=described.memory_budget is not None,
    )


def memory_of(described: RunConfig) -> MemoryOfChoice:
    """Of SmolLM2-135M on a CPU with tiles; the same at every budget, so each is counted once."""
    assert described.lora is not None
    key = described.lora.model_dump_json(), described.data.max_length
    if key not in MEMORIES:
        memory = single_device_memory(
            described.lora, described.data.max_length, SHAPES["smollm2-135m"], "cpu", True
        )
        MEMORIES[key] = cache(memory)
    return MEMORIES[key]


@given(shapes, tokens, st.sampled_from(PRECISIONS), st.sampled_from(["cpu", "cuda"]))
def test_every_component_is_whole_and_counted(
    shape: ModelShape, t: int, precision: Any, device: Any
) -> None:
    memory = need(shape, tokens=t, length=t, precision=precision, device=device)
    assert all(isinstance(c.bytes, int) and c.bytes >= 0 for c in memory.components)
    assert memory.total == sum(c.bytes for c in memory.components)
    assert len({c.name for c in memory.components}) == len(memory.components)


@given(shapes, tokens, st.sampled_from(["bfloat16", "float32"]))
def test_more_of_anything_needs_more(shape: ModelShape, t: int, precision: Any) -> None:
    here = need(shape, tokens=t, length=t, precision=precision).total
    assert need(shape, tokens=2 * t, length=t, precision=precision).total > here
    assert need(shape, 16, tokens=t, length=t, precision=precision).total > here
    assert need(shape, tokens=t, length=t, precision=precision, recompute="full").total < here


@given(shapes)
def test_formats_are_ordered(shape: ModelShape) -> None:
    base = [
        sum(c.bytes for c in need(shape, precision=p).components if c.name == "base weights")
        for p in PRECISIONS
    ]
    by_name = dict(zip(PRECISIONS, base, strict=True))
    assert (
        by_name["float32"]
        > by_name["bfloat16"]
        == by_name["float16"]
        > by_name["int8"]
        > by_name["nf4"]
        == by_name["fp4"]
    )


def test_nothing_is_kept_below_the_lowest_adapter() -> None:
    shape = SHAPES["smollm2-135m"]
    kept = {}
    for first in (0, 15, 29):
        lora = LoraConfig(layers_to_transform=list(range(first, 30)))
        memory = estimate_memory(
            shape, plan_adapter(shape, lora, 8), MemorySetup(tokens=1024, length=1024)
        )
        kept[first] = next(c.bytes for c in memory.components if c.name == "activations")
    assert kept[0] == 2 * kept[15] == 30 * kept[29]


@given(st.integers(1, 64), st.integers(1, 16))
def test_splits_make_the_same_step(rows: int, accumulation: int) -> None:
    found = batch_splits(rows, accumulation)
    assert all(r * a == rows * accumulation for r, a in found)
    assert found[0] == (rows, accumulation)
    assert found[-1][0] % 2 == 1


@pytest.mark.parametrize(
    ("largest", "ranks"),
    [
        (1, [1]),
        (7, [1, 2, 4]),
        (12, [1, 2, 4, 8, 12]),
        (256, [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]),
    ],
)
def test_ranks_are_of_a_grid(largest: int, ranks: list[int]) -> None:
    assert rank_grid(largest) == ranks


def test_a_rank_has_room_for_what_is_to_be_learnt() -> None:
    grid = rank_grid(64)
    # 1,000 values a rank at 2 bits each
    asked = {bits: capacity_rank(bits, lambda rank: 1000 * rank, grid) for bits in (0, 2000, 2001)}
    assert asked == {0: 1, 2000: 1, 2001: 2}
    assert capacity_rank(1e9, lambda rank: 1000 * rank, grid) == 64
    assert [next_rank(rank, grid) for rank in (0.5, 8, 8.1, 12.5, 1000)] == [1, 8, 12, 16, 64]


# --- what is open, and what is taken


def test_without_a_budget_nothing_is_open() -> None:
    options = choices_of(run())
    assert [(o.rank, o.rows, o.accumulation, o.recompute) for o in options] == [(16, 8, 1, "none")]


@pytest.mark.parametrize(
    ("given", "rows", "recomputes", "ranks"),
    [
        ({}, {8, 4, 2, 1}, {"none", "full"}, {16}),
        ({"r": "auto"}, {8, 4, 2, 1}, {"none", "full"}, set(rank_grid(192))),
        ({"per_device_train_batch_size": 4}, {4}, {"none", "full"}, {16}),
        ({"gradient_accumulation_steps": 4}, {8}, {"none", "full"}, {16}),
        ({"gradient_checkpointing": False}, {8, 4, 2, 1}, {"none"}, {16}),
        ({"gradient_checkpointing": True, "r": 3}, {8, 4, 2, 1}, {"full"}, {3}),
    ],
)
def test_what_was_typed_is_not_open(
    given: Any, rows: set[int], recomputes: set[str], ranks: set[int]
) -> None:
    options = choices_of(run(memory_budget="3GiB", **given))
    assert {o.rows for o in options} == rows
    assert {o.recompute for o in options} == recomputes
    assert {o.rank for o in options} == ranks


@given(st.floats(0.3, 8), st.sampled_from([{}, {"r": "auto"}, {"r": "auto", "max_length": 4096}]))
def test_the_first_that_fits_is_taken_and_all_before_it_do_not(
    budget: float, settings: Any
) -> None:
    described = run(memory_budget=f"{budget:.4f}GiB", **settings)
    limit = parse_size(f"{budget:.4f}GiB")
    options = choices_of(described)
    bill = memory_of(described)
    found = find_fitting_choice(f"{budget:.4f}GiB", options, bill)
    fitting = [o for o in options if bill(o).total <= limit]
    assert (found.best.choice if found.best else None) == (fitting[0] if fitting else None)
    if found.best:
        assert found.best.choice.rank == max(o.rank for o in fitting)
        assert all(t.memory.total > limit and t.overrun for t in found.tried[:-1])
    else:
        assert found.least.memory.total == min(bill(o).total for o in options)


@given(
    st.sampled_from(["10MiB", "300MiB", "600MiB"]),
    st.sampled_from([{}, {"r": "auto"}, {"gradient_checkpointing": False}]),
)
def test_the_smallest_budget_that_is_named_works(budget: str, settings: Any) -> None:
    described = run(memory_budget=budget, **settings)
    found = find_fitting_choice(
        budget,
        choices_of(described),
        memory_of(described),
    )
    if found.best is not None:
        return
    message = str(no_choice_fits_error(budget, found))
    enough = message.split("memory_budget=")[2].split()[0]
    again = run(memory_budget=enough, **settings)
    assert (
        find_fitting_choice(
            enough,
            choices_of(again),
            memory_of(again),
        ).best
        is not None
    )
    smaller = f"{int(enough.removesuffix('MiB')) - 1}MiB"
    less = run(memory_budget=smaller, **settings)
    assert (
        find_fitting_choice(
            smaller,
            choices_of(less),
            memory_of(less),
        ).best
        is None
    )


def test_the_component_that_breaks_a_budget() -> None:
    memory = need(SHAPES["smollm2-135m"])
    running = 0
    for component in (c for c in memory.components if c.bytes):
        assert memory.breaks(running + component.bytes - 1) == component
        running += component.bytes
    with pytest.raises(ValueError, match="fit a budget"):
        memory.breaks(memory.total)


# --- amounts of memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3GiB", 3 * GIB),
        ("3 gib", 3 * GIB),
        ("1.5GB", 1_500_000_000),
        ("800MB", 800_000_000),
        ("2g", 2 * GIB),
        ("1024B", 1024),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["3", "", "GiB", "-3GiB", "3 parsecs", "1e9", "nanGiB", "0GiB", "0.0000001KB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget"):
        run(memory_budget=text)


@given(st.integers(1, 1 << 50))
def test_plain_numbers_are_bytes_and_words_are_close(size: int) -> None:
    budget = run(memory_budget=size).memory_budget
    assert budget is not None
    assert parse_size(budget) == size
    if size >= 1 << 24:
        assert parse_size(size_in_words(size)) == pytest.approx(size, rel=0.04)


def test_without_a_budget_an_automatic_rank_is_bounded_all_the_same() -> None:
    """The rows choose, once they are there: the plan is of the most that they may."""
    assert [o.rank for o in choices_of(run(r="auto"))] == [64]


def test_a_plan_is_above_what_was_measured() -> None:
    """The worst of what benchmarks/plan.py has measured was 4.9% above the sum of what is counted, of whole
    runs (benchmarks/rank_choice.py) 5.8%."""
    paths = (ROOT / "benchmarks/results").glob("plan-cpu-*.json")
    rows = [row for path in paths for row in json.loads(path.read_text())["rows"]]
    worst = max(measured / predicted for _, predicted, measured, _ in rows)
    assert 1.04 < worst <= 1.05
    assert PLAN_MARGIN["cpu"] == 0.06
    estimate = need(SHAPES["smollm2-135m"])
    parts = {one.name: one.bytes for one in estimate.components}
    counted = sum(size for name, size in parts.items() if name != "margin")
    assert counted * 0.06 <= parts["margin"] <= counted * 0.06 + 1
    assert estimate.above_imports == counted - parts["libraries"]
    # last: a smaller micro-batch is what a budget is met by first
    assert list(parts)[-1] == "activations"
    assert "margin" not in [c.name for c in need(SHAPES["gpt2"], device="cuda").components]
