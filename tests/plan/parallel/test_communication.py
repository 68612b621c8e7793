"""Bytes that a rank sends, against sums written out; what fully_shard asks for is in
test_against_torch.py. Nothing is computed, so no dtype of this machine matters.
"""

from __future__ import annotations

from typing import Any

from lorry.config.schema.lora import LoraConfig
from lorry.config.schema.step_reads import StepReads
from lorry.plan.adapters import plan_adapter
from lorry.plan.known import KNOWN_CONFIGS
from lorry.plan.memory import MemorySetup
from lorry.plan.parallel.communication import Collective, adapter_sizes, step_collectives
from lorry.plan.parallel.split import ParallelSplit
from lorry.plan.shapes import read_model_shape

SHAPE = read_model_shape(KNOWN_CONFIGS["llama-3-8b"])
ADAPTER = plan_adapter(SHAPE, LoraConfig(r=16), 16)
TOKENS, WIDTH, LAYERS = 4096, 4096, 32


def sent(
    accumulation: int = 1, setup: dict[str, Any] | None = None, **split: Any
) -> dict[str, int]:
    how = MemorySetup(tokens=TOKENS, length=TOKENS, device="cuda", **(setup or {}))
    found = step_collectives(SHAPE, ADAPTER, how, ParallelSplit(**split), accumulation)
    return {c.what: c.sent for c in found}


def test_what_a_ring_sends() -> None:
    assert Collective("", "all-gather", 4, 4, 400, 3).sent == 3 * 300
    assert Collective("", "reduce-scatter", 4, 4, 400, 3).sent == 3 * 300
    assert Collective("", "all-reduce", 4, 4, 400, 3).sent == 3 * 600


def test_ddp_sends_the_adapters_gradients_once_a_step() -> None:
    values = 32 * 16 * sum((2 * 4096, 2 * 5120, 2 * 4096, 3 * (4096 + 14336)))
    for accumulation in (1, 4):
        assert sent(accumulation, backend="ddp", processes=8) == {
            "adapters' gradients": 2 * 4 * values * 7 // 8
        }
    ranges = sent(backend="ddp", processes=8, shard_optimizer=True)
    # the gradients as without, and the new values of the others' ranges
    assert sum(ranges.values()) == (2 + 1) * 4 * values * 7 // 8


def test_replicas_send_each_other_nothing_of_the_base() -> None:
    one, hybrid = sent(backend="fsdp", processes=8), sent(backend="fsdp", processes=64, replicas=8)
    weights = "a layer's weights, forward"
    assert hybrid[weights] == one[weights]
    gradients = "adapters' gradients"
    assert hybrid[gradients] * 7 * 64 == one[gradients] * 63 * 8


def test_fsdp_gathers_layers_with_every_micro_batch_and_the_rest_once() -> None:
    one, four = sent(backend="fsdp", processes=8), sent(4, backend="fsdp", processes=8)
    for what, size in one.items():
        assert four[what] == (4 * size if "layer" in what else size)
    start = {"reads": StepReads(asks_start="scores", live=True)}
    asked = sent(4, start, backend="fsdp", processes=8)
    assert asked["a layer's weights, forward"] == 2 * four["a layer's weights, forward"]
    assert asked["a layer's weights, backward"] == four["a layer's weights, backward"]
    rest = "embedding, final norm and head"
    assert asked[rest] == 2 * four[rest]


def test_a_backward_pass_gathers_the_layers_from_the_lowest_adapter_up() -> None:
    upper = plan_adapter(SHAPE, LoraConfig(r=16, layers_to_transform=list(range(24, 32))), 16)
    split = ParallelSplit(backend="fsdp", processes=8)
    how = MemorySetup(tokens=TOKENS, length=TOKENS, device="cuda")
    calls = {c.what: c.calls for c in step_collectives(SHAPE, upper, how, split, 2)}
    assert calls["a layer's weights, forward"] == 2 * 32
    assert calls["a layer's weights, backward"] == 2 * 8


def test_layers_that_stay_gathered_are_asked_for_once_a_micro_batch() -> None:
    kept, let_go = (
        sent(4, backend="fsdp", processes=8, reshard_after_forward=r) for r in (False, True)
    )
    assert "a layer's weights, backward" not in kept
    assert kept["a layer's weights, forward"] == let_go["a layer's weights, forward"]


def test_tensor_parallel_sends_four_sums_for_each_layer_of_a_micro_batch() -> None:
    """[T, d] in bfloat16 each, but for the lowest layer's input; the whole sides once a step."""
    found = sent(2, backend="ddp", processes=8, tensor=8)
    hidden = 2 * TOKENS * WIDTH * 2 * 7 // 8
    assert found["outputs of attention and MLP"] == 2 * 2 * LAYERS * hidden
    assert found["gradients of their inputs"] == 2 * (2 * LAYERS - 1) * hidden
    d = WIDTH
    whole = 32 * 16 * (3 * d + d + 2 * d + d)  # A of q k v, B of o, A of gate and up, B of down
    assert found["gradients of whole sides"] == 2 * 4 * whole * 7 // 8
    again = sent(2, {"recompute": "full"}, backend="ddp", processes=8, tensor=8)
    assert again["outputs of attention and MLP"] == 2 * found["outputs of attention and MLP"]


def test_groups_span_neighbouring_processes() -> None:
    """Tensor ranks are neighbours, then shards; replicas and the adapters' sum span the job."""
    split = ParallelSplit(backend="fsdp", processes=64, tensor=2, replicas=4)
    how = MemorySetup(tokens=TOKENS, length=TOKENS, device="cuda")
    spans = {c.what: (c.ranks, c.span) for c in step_collectives(SHAPE, ADAPTER, how, split, 1)}
    assert spans["outputs of attention and MLP"] == (2, 2)
    assert spans["a layer's weights, forward"] == (8, 16)
    assert spans["adapters' gradients"] == (32, 64)


def test_files_of_an_adapter_do_not_hang_on_the_layout() -> None:
    sizes = adapter_sizes(ADAPTER, MemorySetup(tokens=8, length=8, device="cuda"))
    values = ADAPTER.parameters
    assert (sizes.file, sizes.checkpoint, sizes.sync) == (4 * values, 12 * values, 2 * values)


def test_what_layers_kept_in_parts_is_gathered_before_their_backward() -> None:
    """Two streams a layer, one where layers run again; nothing without `sequence_parallel`."""
    how: dict[str, Any] = {"backend": "ddp", "processes": 2, "tensor": 2}
    what, hidden = "the stream that layers kept", TOKENS * WIDTH * 2
    assert sent(3, **how, sequence=True)[what] == 3 * 2 * LAYERS * hidden // 2
    again = sent(3, {"recompute": "full"}, **how, sequence=True)
    assert again[what] == 3 * LAYERS * hidden // 2
    assert what not in sent(3, **how)
