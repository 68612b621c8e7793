"""A step of generation through all layers in one call: against the layers in float64, which share none of its
code, and against the same step layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.quantization.linear import quantize_linears, round_base_linears
from lorry.adapters.quantization.packed import QUANTIZATIONS
from lorry.adapters.spec import LoraSpec
from lorry.generation.engine import GenerationEngine, generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.kernels import decode, kernel_status, load_library
from lorry.models.causal_lm import PackedInput
from lorry.models.decoder.decode import DecodeRunner
from lorry.models.decoder.model import Decoder
from lorry.models.decoder.step import StepDescription
from tests.support.tiny import LLAMA, VOCAB, fresh, random_model
from tests.support.twins import native

pytestmark = pytest.mark.skipif(load_library() is None, reason=f"kernels: {kernel_status().reason}")
FAMILIES = [
    "llama tied",
    "llama biased",
    "qwen2",
    "qwen3",
    "gpt_neox parallel",
    "gpt_neox sequential",
]
PROMPTS = [[5, 9, 2], [7, 7, 21, 4, 4, 3], [11], [1, 2, 3, 4], [9, 8], [6, 6, 6]]
# of the six rows: two of one adapter, one of both, and none among them
MIXES = [
    Mix.one("a"),
    Mix.one("a"),
    Mix.none(),
    Mix.one("b"),
    Mix.constants({"a": 0.5, "b": -2.0}),
    Mix.one("b"),
]


def adapted(family: str) -> Decoder:
    """With adapters a and b of different ranks and targets, none of them zero."""
    return with_adapters(native(fresh(family)), family)


def with_adapters(model: Decoder, family: str) -> Decoder:
    targets = ["query_key_value", "dense"] if "neox" in family else ["q_proj", "v_proj", "up_proj"]
    attach(model, LoraSpec(r=3, lora_alpha=6, target_modules="all-linear"), "a")
    attach(model, LoraSpec(r=8, lora_alpha=16, use_rslora=True, target_modules=targets), "b")
    with torch.no_grad():
        for name in ("a", "b"):
            values = get_bank(model)[name].values
            values.copy_(
                0.2 * torch.randn(values.shape, generator=torch.Generator().manual_seed(3))
            )
    return model


def decoded(model: Decoder, *, at_once: bool = True, times: int = 1) -> Tensor:
    """fp32 logits [rows, V] of one step behind the prompts, each of them so many ``times``, whose tokens are
    their rows' numbers."""
    runner = DecodeRunner(model)
    prompts = [prompt for prompt in PROMPTS for _ in range(times)]
    mixes = [mix for mix in MIXES for _ in range(times)]
    packed, count = PackedInput.of(prompts, model.device), len(prompts)
    lengths = torch.tensor([len(p) for p in prompts])
    cache = runner.new_cache(count, 40)
    starts = [0, *(stop for _, stop in packed.segments)]
    rows = torch.repeat_interleave(torch.arange(count), lengths)
    call = AdapterContext(Mix.packed(mixes, starts))
    runner.forward_cached(packed, rows, cache, call, decoding=False)
    call = AdapterContext(Mix.packed(mixes, range(count + 1)))
    tokens = torch.arange(count) % VOCAB
    newest = PackedInput(tokens, cache.lengths, [(i, i + 1) for i in range(count)])
    runner._work(call, anew=False)
    assert runner.step is not None
    if not at_once:
        runner.step = None
    hidden = runner.forward_cached(newest, torch.arange(count), cache, call, decoding=True)
    return runner.logits(hidden, call).float()


@torch.no_grad()
def exact(model: Decoder, *, times: int = 1) -> Tensor:
    """The same of the whole forward in float64: no cache, no kernels."""
    wide, out = copy.deepcopy(model).double(), list[Tensor]()
    rows = [row for row in zip(PROMPTS, MIXES, strict=True) for _ in range(times)]
    for number, (prompt, mix) in enumerate(rows):
        packed = PackedInput.of([[*prompt, number % VOCAB]], model.device)
        call = AdapterContext(Mix.packed([mix], [0, len(prompt) + 1]))
        states = wide.hidden(packed, call)
        assert states.last is not None
        out.append(wide.logits(states.last[-1:], call))
    return torch.cat(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_forward_pass_in_float64(family: str, threads: int) -> None:
    model = adapted(family)
    truth = exact(model)
    torch.testing.assert_close(decoded(model).double(), truth, rtol=1e-5, atol=1e-5)
    narrow = decoded(copy.deepcopy(model).bfloat16())
    plain = decoded(copy.deepcopy(model).bfloat16(), at_once=False)
    # no further from the truth than the layers one by one, each of which rounds
    size = float(truth.abs().max())
    assert float((narrow - truth).abs().max()) <= 0.05 * size
    assert float((narrow - plain).abs().max()) <= 0.02 * size


def test_prompts_of_many_adapters_are_the_forward_pass_in_float64() -> None:
    """More tokens than are a few rows, of terms that each are (and fewer, of a prompt of one)."""
    model = adapted("llama tied")
    total = 8 * sum(len(prompt) for prompt in PROMPTS)
    assert total > decode.MAX_FEW_ROWS
    got = decoded(model, times=8).double()
    torch.testing.assert_close(got, exact(model, times=8), rtol=1e-5, atol=1e-5)


def test_threads_take_a_term_each_of_many_rows(threads: int) -> None:
    """fp32, 48 rows wide enough for threads, against the layers one by one."""
    model = native(random_model({**LLAMA, "hidden_size": 128}).float())
    model = with_adapters(model, "llama")
    plain = decoded(model, at_once=False, times=8)
    torch.testing.assert_close(decoded(model, times=8), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_packed_matrices_are_read_as_they_are_packed(name: str) -> None:
    """fp32; the truth multiplies in float64 what they are opened to."""
    model = adapted("llama tied")
    opened = copy.deepcopy(model)
    round_base_linears(opened, QUANTIZATIONS[name])
    quantize_linears(model, QUANTIZATIONS[name], torch.float32)
    torch.testing.assert_close(decoded(model).double(), exact(opened), rtol=1e-5, atol=1e-5)


def greedy(model: Decoder) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=12)
    return [c.tokens for c in generate_completions(model, PROMPTS, params, adapters=MIXES)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_layers_one_by_one(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32."""
    model = adapted(family)
    at_once = greedy(model)
    monkeypatch.setattr(StepDescription, "of", lambda blocks, products: None)
    assert greedy(model) == at_once


def test_a_row_of_a_step_alone_is_the_same_bit_for_bit() -> None:
    model = adapted("llama tied").bfloat16()
    together = greedy(model)
    for row, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_new_tokens=12)
        (alone,) = generate_completions(model, [prompt], params, adapters=[MIXES[row]])
        assert alone.tokens == together[row]


def described(model: Any, mix: Mix) -> StepDescription | None:
    engine = GenerationEngine(model)
    engine.add_request([3, 4], SamplingParams(max_new_tokens=3), adapter=mix)
    engine.step()
    runner = engine.runner
    assert isinstance(runner, DecodeRunner)
    return runner.step


def test_what_a_description_cannot_hold() -> None:
    """DoRA, biases beside B, Conv1D's layout: layer by layer, and described again when they are gone."""
    assert described(native(fresh("gpt2")), Mix.none()) is None
    model = adapted("llama tied")
    attach(model, LoraSpec(r=2, use_dora=True), "dora")
    attach(model, LoraSpec(r=2, lora_bias=True), "biased")
    for name in ("dora", "biased"):
        assert described(model, Mix.one(name)) is None
    assert described(model, Mix.one("a")) is not None


def test_more_rows_than_are_worth_it_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama tied")
    at_once = greedy(model)
    runs = list[int]()
    run = StepDescription.run
    monkeypatch.setattr(StepDescription, "takes", lambda step, rows: rows < 3)
    monkeypatch.setattr(
        StepDescription, "run", lambda step, x, state: runs.append(len(x)) or run(step, x, state)
    )
    assert greedy(model) == at_once
    assert not runs
