"""The plan's formulas against the derived floor of one LoRA step: r=16 on all linears, 2048 tokens
in one sequence.

The expected numbers were worked out by hand from the configs of SmolLM2-135M, Qwen3-0.6B and
Llama-3-8B, apart from this code.
"""

from __future__ import annotations

from typing import Any

import pytest

from lorry.config.schema.lora import LoraConfig
from lorry.plan.adapters import PlannedAdapter, plan_adapter
from lorry.plan.constants import SCORE_CHUNK
from lorry.plan.flops import count_flops
from lorry.plan.known import KNOWN_CONFIGS
from lorry.plan.memory import (
    MASTER_BYTES,
    MOMENT_BYTES,
    MemorySetup,
    estimate_memory,
    layer_saved_bytes,
    layer_weights,
    saved_bytes_per_token,
    vocabulary_weights,
)
from lorry.plan.shapes import ModelShape, read_model_shape

T = 2048
FLOOR: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "body": 106.2,
        "head": 28.3,
        "adapter": 4.88,
        "forward": 350,
        "backward": 465,
        "step": 814,
        "recomputed": 1107,
        "shares": (14, 30, 3.6),
        "bf16": 257,
        "nf4": 106,
        "adapter_mib": 75,
        "s_min": 11.6,
        "kept_mib": 677,
        "full_mib": 90,
        "chunk_mib": 72,
    },
    "qwen3-0.6b": {
        "body": 440.4,
        "head": 155.6,
        "adapter": 10.09,
        "forward": 1447,
        "backward": 1820,
        "step": 3258,
        "recomputed": 4394,
        "shares": (19, 25, 1.9),
        "bf16": 1137,
        "nf4": 513,
        "adapter_mib": 154,
        "s_min": 28.7,
        "kept_mib": 1572,
        "full_mib": 168,
        "chunk_mib": 223,
    },
    "llama-3-8b": {
        "body": 6979,
        "head": 525,
        "adapter": 41.9,
        "forward": 15630,
        "backward": 16519,
        "step": 32099,
        "recomputed": 46678,
        "shares": (7, 6, 0.8),
        "bf16": 15317,
        "nf4": 5438,
        "adapter_mib": 640,
        "s_min": 94.3,
        "kept_mib": 5896,
        "full_mib": 696,
        "chunk_mib": 188,
    },
}


@pytest.fixture(params=FLOOR)
def case(request: pytest.FixtureRequest) -> tuple[ModelShape, PlannedAdapter, dict[str, Any]]:
    shape = read_model_shape(KNOWN_CONFIGS[request.param])
    return shape, plan_adapter(shape, LoraConfig(r=16), 16), FLOOR[request.param]


def setup(**changes: Any) -> MemorySetup:
    return MemorySetup(**{"tokens": T, "length": T, **changes})


def near(expected: float, share: float = 0.005) -> Any:
    """Equal to the digits that the table prints."""
    return pytest.approx(expected, rel=share, abs=0.5)


def weights_mib(shape: ModelShape, precision: Any) -> float:
    s = setup(precision=precision)
    return (shape.geometry.layers * layer_weights(shape, s) + vocabulary_weights(shape, s)) / 2**20


def test_parameters(case: Any) -> None:
    shape, adapter, floor = case
    assert shape.active_body / 1e6 == near(floor["body"])
    assert shape.head_size / 1e6 == near(floor["head"])
    assert adapter.parameters / 1e6 == pytest.approx(floor["adapter"], rel=0.002)


def test_flops(case: Any) -> None:
    shape, adapter, floor = case
    flops = count_flops(shape, adapter, setup())
    n, p, attention = (
        shape.active_body + shape.head_size,
        adapter.parameters,
        shape.geometry.layers * shape.queries * T,
    )
    assert flops.step == pytest.approx(4 * n + 7 * attention + 6 * p, rel=1e-9)
    assert flops.forward / 1e6 == near(floor["forward"])
    assert flops.backward / 1e6 == near(floor["backward"])
    assert flops.step / 1e6 == near(floor["step"])
    assert count_flops(shape, adapter, setup(recompute="full")).step / 1e6 == near(
        floor["recomputed"]
    )
    shares = [100 * x / flops.step for x in (flops.head, flops.attention, flops.adapter)]
    assert shares == [pytest.approx(s, abs=0.6) for s in floor["shares"]]


def test_weights(case: Any) -> None:
    shape, _, floor = case
    assert weights_mib(shape, "bfloat16") == near(floor["bf16"])
    assert weights_mib(shape, "nf4") == near(floor["nf4"])
    assert weights_mib(shape, "float32") == near(2 * floor["bf16"])


def test_adapter(case: Any) -> None:
    _, adapter, floor = case
    assert (MASTER_BYTES + MOMENT_BYTES) * adapter.parameters / 2**20 == near(
        floor["adapter_mib"], 0.01
    )


def test_activations(case: Any) -> None:
    shape, adapter, floor = case
    layers = range(shape.geometry.layers)
    assert layer_saved_bytes(shape, setup(), []) / 1e3 == pytest.approx(floor["s_min"], abs=0.06)
    low_rank = 2 * 16 * 7 * len(layers)  # A x of seven matrices, which the floor leaves out
    assert (saved_bytes_per_token(shape, adapter, setup(), layers) - low_rank) * T / 2**20 == near(
        floor["kept_mib"]
    )
    full = saved_bytes_per_token(shape, adapter, setup(recompute="full"), layers) - 2 * 16 * 7
    assert full * T / 2**20 == near(floor["full_mib"])


def test_chunk_of_the_vocabulary(case: Any) -> None:
    """6 bytes a logit in the floor; the number of rows is what must agree."""
    shape, _, floor = case
    assert 6 * SCORE_CHUNK * shape.geometry.vocab / 2**20 == near(floor["chunk_mib"])


def test_the_plan_lies_above_the_floor(case: Any) -> None:
    """No prediction can be below weights, adapter, optimizer and activations of the floor."""
    shape, adapter, floor = case
    for recompute, kept in (("none", "kept_mib"), ("full", "full_mib")):
        memory = estimate_memory(shape, adapter, setup(recompute=recompute))
        assert memory.above_imports / 2**20 > 0.995 * (
            floor["bf16"] + floor["adapter_mib"] + floor[kept]
        )


@pytest.mark.parametrize(("name", "widths"), [("smollm2-135m", 1), ("pythia-160m", 2)])
def test_magnitudes_keep_what_is_added_to_the_stream(name: str, widths: int) -> None:
    """What the MLP adds; and attention, where the layer does not keep it in place of the stream behind it."""
    shape = read_model_shape(KNOWN_CONFIGS[name])
    plain, dora = (
        plan_adapter(shape, LoraConfig.model_validate({"r": 16, "use_dora": on}), 16)
        for on in (False, True)
    )
    layers = range(shape.geometry.layers)
    outputs = sum(m.outputs for m in dora.matrices)
    assert dora.parameters - plain.parameters == outputs
    saved = [saved_bytes_per_token(shape, each, setup(), layers) for each in (plain, dora)]
    assert saved[1] - saved[0] == len(layers) * widths * shape.geometry.width * setup().element
