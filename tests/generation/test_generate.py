"""Generation against transformers token for token, and against itself however the rows are batched."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import Mix
from lorry.adapters.spec import LoraSpec
from lorry.errors import ConfigError, DataError, ModelError, NonFiniteError
from lorry.generation import engine as generation
from lorry.generation import sampling
from lorry.generation.engine import GenerationEngine, generate_completions, stream_tokens
from lorry.generation.request import Completion
from lorry.generation.sampling import SamplingParams
from lorry.kernels import decode as kernel
from lorry.kernels import kernel_status, load_library
from lorry.models.decoder import cache as cache_module
from lorry.models.decoder.decode import DecodeRunner
from lorry.models.decoder.model import Decoder
from lorry.models.hf.model import HfModel
from tests.support.twins import native

VOCAB = 40
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
ROTARY = {**SHAPE, "vocab_size": VOCAB, "max_position_embeddings": 96, "initializer_range": 0.4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**ROTARY, num_key_value_heads=2),
    "qwen2": Qwen2Config(**ROTARY, num_key_value_heads=1),
    "qwen3": Qwen3Config(**ROTARY, num_key_value_heads=2, head_dim=16),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.4
    ),
    "gpt_neox": GPTNeoXConfig(**ROTARY),
}


def random_pair(name: str) -> tuple[Any, Decoder]:
    """A random model whose every tensor matters (norms and biases too), in transformers and here."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    for p in theirs.parameters():
        if p.dim() == 1:
            p.data += 0.2 * torch.randn_like(p)
    return theirs, native(theirs)


def random_prompts(lengths: Sequence[int], vocab: int = VOCAB) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(3, vocab) for _ in range(n)] for n in lengths]


def completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    adapters: Any = None,
    batch_rows: int | None = None,
    **params: Any,
) -> list[Completion]:
    """`generate_completions` with the same sampling parameters for every prompt."""
    return generate_completions(
        model, prompts, SamplingParams(**params), adapters=adapters, batch_rows=batch_rows
    )


def tokens_of(*args: Any, **options: Any) -> list[list[int]]:
    return [g.tokens for g in completions(*args, **options)]


def transformers_greedy(
    model: Any, prompts: Sequence[Sequence[int]], new: int, **options: Any
) -> list[list[int]]:
    """transformers' own generate on a left-padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)[
        :, longest:
    ].tolist()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


both_ways = pytest.mark.usefixtures("way")


@pytest.fixture(scope="module")
def llama() -> Decoder:
    return random_pair("llama")[1]


@pytest.fixture
def adapted() -> Decoder:
    """A model with three random adapters: one on the linears, one also on the head, one also on the
    embedding.
    """
    model = random_pair("llama")[1]
    for seed, (name, targets) in enumerate(
        {
            "plain": "auto",
            "head": ("q_proj", "lm_head"),
            "embedding": ("down_proj", "embed"),
        }.items()
    ):
        attach(
            model,
            LoraSpec(r=3, lora_alpha=12, target_modules=targets, init_lora_weights=False),
            name,
            seed=seed,
        )
        with torch.no_grad():
            get_bank(model)[name].values.mul_(4)
        get_bank(model)[name].touch()
    return model


# --- the same tokens as transformers


@both_ways
def test_stories_greedy_equals_transformers(stories: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    prompts = [[1, *p] for p in random_prompts([0, 3, 50, 12, 1, 120, 7, 30, 31, 2], vocab=512)]
    assert tokens_of(native(theirs), prompts, max_new_tokens=60) == transformers_greedy(
        theirs, prompts, 60
    )


def test_stories_tells_the_expected_story(stories: Path) -> None:
    model = native(AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32))
    expected = json.loads((stories.parent / "expected.json").read_text())
    pieces = [
        bytes.fromhex(piece).decode()
        for piece, _ in json.loads((stories.parent / "tok512.json").read_text())
    ]
    said = expected["greedy_from_Once_upon_a_time"]
    prompt = next(
        expected["ids"][:n]
        for n in range(2, 20)
        if "".join(pieces[i] for i in expected["ids"][1:n]) == said[:17]
    )
    text = "".join(
        pieces[i] for i in [*prompt[1:], *tokens_of(model, [prompt], max_new_tokens=120)[0]]
    )
    assert len(said) > 200
    assert text.startswith(said)


@both_ways
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_equals_transformers(name: str) -> None:
    theirs, ours = random_pair(name)
    prompts = random_prompts([5, 1, 17, 9, 30, 9])
    assert tokens_of(ours, prompts, max_new_tokens=40) == transformers_greedy(theirs, prompts, 40)


@both_ways
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    theirs, ours = random_pair("llama")
    prompts = random_prompts([8, 8, 8])
    mine = tokens_of(ours, prompts, max_new_tokens=30, repetition_penalty=penalty)
    assert mine == transformers_greedy(theirs, prompts, 30, repetition_penalty=penalty)
    assert mine != tokens_of(ours, prompts, max_new_tokens=30)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_of_transformers_behind_the_same_face(name: str) -> None:
    theirs, ours = random_pair(name)
    prompts = random_prompts([5, 1, 17, 9, 30, 9, 2])
    expected = transformers_greedy(theirs, prompts, 25)
    wrapped = HfModel(theirs)
    assert tokens_of(wrapped, prompts, max_new_tokens=25) == expected
    for model in (ours, wrapped):
        attach(model, LoraSpec(r=4, init_lora_weights=False), "other", seed=1)
    options: dict[str, Any] = {
        "adapters": [None, "other", "other", None, "other", None, "other"],
        "batch_rows": 3,
    }
    made = [
        completions(m, prompts, max_new_tokens=25, logprobs=True, **options)
        for m in (ours, wrapped)
    ]
    assert [g.tokens for g in made[0]] == [g.tokens for g in made[1]]
    assert [g.tokens == row for g, row in zip(made[0], expected, strict=True)][:4] == [
        True,
        False,
        False,
        True,
    ]


@both_ways
def test_eos_ends_a_row_where_transformers_ends_it() -> None:
    theirs, ours = random_pair("llama")
    prompts = random_prompts([4, 11, 6, 2, 9])
    free = tokens_of(ours, prompts, max_new_tokens=30)
    eos = free[2][12]
    mine = completions(ours, prompts, max_new_tokens=30, stop_token_ids={eos})
    rows = transformers_greedy(
        theirs, prompts, 30, eos_token_id=eos, pad_token_id=VOCAB - 1 if eos != VOCAB - 1 else 0
    )
    for made, row in zip(mine, rows, strict=True):
        assert made.tokens == (row[: row.index(eos) + 1] if eos in row else row)
        assert made.finish_reason == ("stop" if eos in row else "length")
    assert len({len(g.tokens) for g in mine}) > 1


# --- what a row says does not depend on its company


@both_ways
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}],
)
def test_two_rows_at_once_or_all_nine(llama: Decoder, options: dict[str, Any]) -> None:
    prompts = random_prompts([3, 20, 1, 8, 8, 33, 2, 14, 5])
    free = tokens_of(llama, prompts, max_new_tokens=40, **options)
    options = {**options, "stop_token_ids": {free[0][5], free[3][9]}, "max_new_tokens": 40}
    together = completions(llama, prompts, **options, batch_rows=9)
    assert len({len(g.tokens) for g in together}) > 3  # rows leave at different times
    for rows in (1, 2, 4):
        assert completions(llama, prompts, **options, batch_rows=rows) == together


@both_ways
def test_a_sampled_row_alone_or_among_seven(llama: Decoder) -> None:
    prompts = random_prompts([6, 2, 9, 4, 15, 1, 3])
    options: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.0, "seed": 5}
    assert tokens_of(llama, prompts[:1], **options)[0] == tokens_of(llama, prompts, **options)[0]


def test_seed_and_place_decide_a_sample(llama: Decoder) -> None:
    prompts = random_prompts([6]) * 4
    options: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.5}
    first = tokens_of(llama, prompts, **options, seed=1)
    assert first == tokens_of(llama, prompts, **options, seed=1)
    assert len({tuple(t) for t in first}) == 4
    assert all(
        a != b for a, b in zip(first, tokens_of(llama, prompts, **options, seed=2), strict=True)
    )
    assert first[0][:10] == tokens_of(llama, prompts, max_new_tokens=10, temperature=1.5, seed=1)[0]


@both_ways
def test_small_prefills_and_a_growing_cache_change_nothing(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts([3, 20, 1, 8, 8, 33, 2])
    before = tokens_of(llama, prompts, max_new_tokens=50)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 10)
    monkeypatch.setattr(cache_module, "SPARE_TOKENS", 1)
    assert tokens_of(llama, prompts, max_new_tokens=50) == before


def test_stream_tells_what_generate_tells(llama: Decoder) -> None:
    (prompt,) = random_prompts([7])
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.9, "top_k": 10, "seed": 3}
    made = completions(llama, [prompt], **options)[0].tokens
    assert list(stream_tokens(llama, prompt, SamplingParams(**options))) == made
    assert (
        list(stream_tokens(llama, prompt, SamplingParams(**options, stop_token_ids=[made[4]])))
        == made[: made.index(made[4]) + 1]
    )


# --- adapters


@both_ways
def test_each_row_has_its_own_adapter(adapted: Decoder) -> None:
    prompts = random_prompts([6, 2, 9, 4, 15, 1, 6, 6])
    owners = ["plain", None, "head", "plain", "embedding", "head", None, "embedding"]
    together = completions(adapted, prompts, max_new_tokens=20, adapters=owners, logprobs=True)
    assert [g.tokens for g in together] == tokens_of(
        adapted, prompts, max_new_tokens=20, adapters=owners, batch_rows=3
    )
    for prompt, owner, made in zip(prompts, owners, together, strict=True):
        get_bank(adapted).activate(Mix() if owner is None else Mix.one(owner))
        (alone,) = completions(adapted, [prompt], max_new_tokens=20, logprobs=True)
        assert alone.tokens == made.tokens
        torch.testing.assert_close(
            torch.tensor(alone.logprobs), torch.tensor(made.logprobs), atol=1e-4, rtol=1e-4
        )
    base = tokens_of(adapted, prompts, max_new_tokens=20, adapters=Mix.none())
    assert [a.tokens == b for a, b in zip(together, base, strict=True)] == [
        owner is None for owner in owners
    ]


def test_rows_of_one_adapter_run_side_by_side(adapted: Decoder) -> None:
    """So that a step has as many terms as adapters, not as rows."""
    owners = ["plain", None, "head", "plain", None, "head"]
    engine = GenerationEngine(adapted)
    for prompt, owner in zip(random_prompts([2] * 6), owners, strict=True):
        engine.add_request(prompt, SamplingParams(max_new_tokens=5), adapter=owner)
    engine.step()
    assert [request.request_id for request in engine.running] == [0, 3, 1, 4, 2, 5]


@pytest.mark.skipif(load_library() is None, reason="rows of torch's cache stay where they are")
def test_a_late_row_comes_beside_those_of_its_adapter(adapted: Decoder) -> None:
    owners = ["plain", "plain", "head", "head", "plain"]
    prompts, new = random_prompts([3, 5, 2, 4, 6]), [2, 12, 7, 12, 9]
    engine, made = GenerationEngine(adapted, batch_rows=4), dict[int, list[int]]()
    for prompt, owner, count in zip(prompts, owners, new, strict=True):
        engine.add_request(prompt, SamplingParams(max_new_tokens=count), adapter=owner)
    orders = list[list[int]]()
    while engine.has_unfinished_requests():
        made |= {output.request_id: output.completion.tokens for output in engine.step()}
        orders.append([request.request_id for request in engine.running])
    # 3 gets the row of 0, before those of the other adapter, and 2 comes to it
    assert [3, 2, 1, 4] in orders
    for order in orders:
        runs = [owner for owner, _ in groupby(owners[number] for number in order)]
        assert len(runs) == len(set(runs))
    for number, (prompt, owner, count) in enumerate(zip(prompts, owners, new, strict=True)):
        assert [made[number]] == tokens_of(
            adapted, [prompt], max_new_tokens=count, adapters=[owner]
        )


@both_ways
def test_one_adapter_or_constants_for_all(adapted: Decoder) -> None:
    prompts = random_prompts([6, 2, 9])
    named = tokens_of(adapted, prompts, max_new_tokens=15, adapters="head")
    assert named == tokens_of(adapted, prompts, max_new_tokens=15, adapters=["head"] * 3)
    assert named == tokens_of(
        adapted, prompts, max_new_tokens=15, adapters=Mix.constants({"head": 1.0})
    )
    mixed = Mix.constants({"head": 0.5, "plain": -0.5})
    get_bank(adapted).activate(mixed)
    assert tokens_of(adapted, prompts, max_new_tokens=15) == tokens_of(
        adapted, prompts, max_new_tokens=15, adapters=mixed
    )
    for prompt in prompts:  # against a plain forward pass without a cache
        made = tokens_of(adapted, [prompt], max_new_tokens=15)[0]
        logits = adapted(torch.tensor([prompt + made])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == made


# --- when a row ends, and what it reports


def test_max_new_tokens_and_stop_sequences(llama: Decoder) -> None:
    prompts = random_prompts([6, 2])
    free = completions(llama, prompts, max_new_tokens=21)
    assert [len(g.tokens) for g in free] == [21, 21]
    assert [g.finish_reason for g in free] == ["length"] * 2
    pair = free[0].tokens[6:8]
    cut = completions(llama, prompts, max_new_tokens=21, stop=[pair])[0]
    place = next(i for i in range(21) if free[0].tokens[i : i + 2] == pair)
    assert cut.tokens == free[0].tokens[: place + 2]
    assert cut.finish_reason == "stop"
    assert completions(llama, [], max_new_tokens=3) == []


@both_ways
def test_logprobs_are_the_models_own(llama: Decoder) -> None:
    prompts = random_prompts([6, 11, 2])
    for options in ({}, {"temperature": 2.0, "top_k": 5, "repetition_penalty": 1.5}):
        for prompt, made in zip(
            prompts,
            completions(llama, prompts, max_new_tokens=20, logprobs=True, **options),
            strict=True,
        ):
            logits = llama(torch.tensor([prompt + made.tokens])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(made.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(made.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_only_last_prompt_tokens_meet_the_head(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    for kind in (Decoder, DecodeRunner):
        plain = kind.logits
        monkeypatch.setattr(
            kind,
            "logits",
            lambda self, h, call, plain=plain: (seen.append(h.shape[0]), plain(self, h, call))[1],
        )
    completions(llama, random_prompts([30, 20, 10]), max_new_tokens=3)
    assert seen == [3, 3, 3]


def test_memory_is_taken_as_rows_grow(llama: Decoder, way: str) -> None:
    engine = GenerationEngine(llama)
    for prompt in random_prompts([5, 2]):
        engine.add_request(prompt, SamplingParams(max_new_tokens=90))
    for _ in range(3):
        assert engine.step() == []
    cache = engine.cache
    held = [cache.keys.shape[3]] * 2 if way == "torch" else [row.shape[3] for row in cache.memory]
    assert held == (
        [5 + cache_module.SPARE_TOKENS] * 2
        if way == "torch"
        else [5 + cache_module.SPARE_TOKENS, 2 + cache_module.SPARE_TOKENS]
    )
    assert max(held) < cache.room == 95


def test_a_row_that_leaves_takes_its_memory_along(llama: Decoder) -> None:
    cache = cache_module.RowKVCache(2, 3, 2, 50, 8, torch.float32)
    rows = torch.tensor([0, 0, 1, 2, 2])
    cache.fill(rows, torch.tensor([0, 1, 0, 0, 1]))
    before = cache.memory[2].data_ptr()
    cache.keep(torch.tensor([0, 2]))
    assert cache.lengths.tolist() == [2, 2]
    assert [row.data_ptr() for row in cache.memory] == cache.table[:, 0].tolist()
    assert len(cache.memory) == 2
    assert cache.memory[1].data_ptr() == before
    with pytest.raises(ValueError, match="51 tokens does not fit a cache for 50"):
        cache.fill(torch.tensor([0]), torch.tensor([50]))


# --- bfloat16, where the products have kernels too


@pytest.fixture(scope="module")
def wide() -> Decoder:
    """A bf16 model of the widths the kernels are made for, with an adapter of full size and one of
    an odd rank.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**ROTARY, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 96},
        num_key_value_heads=1,
    )
    model = native(AutoModelForCausalLM.from_config(config)).bfloat16()
    assert DecodeRunner.takes(model) or load_library() is None
    for name, rank in (("even", 16), ("odd", 3)):
        attach(model, LoraSpec(r=rank, lora_alpha=8, init_lora_weights=False), name)
    return model


OWNERS = ["even", None, "odd", "even", None, "odd", "even"]


def test_a_bf16_row_alone_is_the_same_bit_for_bit(wide: Decoder) -> None:
    if not kernel_status().amx:
        pytest.skip(
            "this CPU has no matrix tiles; torch's products may round by the number of rows"
        )
    prompts = random_prompts([5, 11, 2, 30, 1, 7, 16])
    together = completions(wide, prompts, max_new_tokens=20, adapters=OWNERS, logprobs=True)
    for prompt, owner, made in zip(prompts, OWNERS, together, strict=True):
        if owner != "odd":  # whose low-rank products are torch's
            assert completions(
                wide, [prompt], max_new_tokens=20, adapters=[owner], logprobs=True
            ) == [made]


def test_bf16_kernels_are_as_exact_as_torch(wide: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of the same tokens, from the kernels and from torch in bf16, against
    float32.
    """
    prompts = random_prompts([5, 11, 2, 30, 1, 7, 16])
    ours = completions(wide, prompts, max_new_tokens=20, adapters=OWNERS, logprobs=True)
    exact = copy.deepcopy(wide).float()
    monkeypatch.setattr(kernel, "supports_decode", lambda dtype, device: False)
    theirs = completions(wide, prompts, max_new_tokens=20, adapters=OWNERS, logprobs=True)
    errors = []
    for answers in (ours, theirs):
        gaps = []
        for prompt, owner, made in zip(prompts, OWNERS, answers, strict=True):
            get_bank(exact).activate(Mix() if owner is None else Mix.one(owner))
            with torch.no_grad():
                logits = exact(torch.tensor([prompt + made.tokens])).logits[0, len(prompt) - 1 : -1]
            truth = logits.log_softmax(-1).gather(1, torch.tensor(made.tokens)[:, None])[:, 0]
            gaps.append((torch.tensor(made.logprobs) - truth).abs())
        errors.append(float(torch.cat(gaps).mean()))
    assert 0 < errors[0] < 1.3 * errors[1] < 0.1


def test_prompts_in_bfloat16_have_few_lengths(
    wide: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch compiles its products for each: 150 tokens are 160, and the last 10 reach neither cache nor
    answer."""
    ran, run = list[int](), Decoder._run
    monkeypatch.setattr(
        Decoder,
        "_run",
        lambda self, tokens, *rest: ran.append(len(tokens)) or run(self, tokens, *rest),
    )
    monkeypatch.setattr(kernel, "most_few_rows", lambda dtype, packed=False: 4)
    prompts, found = random_prompts([70, 80]), list[torch.Tensor]()
    for total in (160, 150):
        made = completions(wide, prompts, max_new_tokens=3, adapters=["even", None], logprobs=True)
        assert ran[0] == total
        found.append(torch.tensor([one.logprobs[0] for one in made if one.logprobs]))
        ran.clear()
        monkeypatch.setattr(Decoder, "_padded_length", lambda self, tokens: tokens)
    torch.testing.assert_close(found[0], found[1], rtol=0.01, atol=0.01)


def test_the_model_is_left_as_it_was(llama: Decoder) -> None:
    llama.train()
    llama.get_submodule("model.norm").eval()
    flags = [m.training for m in llama.modules()]
    pieces = stream_tokens(llama, [3, 4], SamplingParams(max_new_tokens=4))
    seen = list[bool]()
    hook = llama.get_submodule("model.norm").register_forward_pre_hook(
        lambda *_: seen.append(torch.is_grad_enabled() or any(m.training for m in llama.modules()))
    )
    for _ in pieces:  # between two tokens, too
        assert torch.is_grad_enabled()
        assert [m.training for m in llama.modules()] == flags
    hook.remove()
    assert seen == [False] * 4
    llama.eval()


# --- sampling


def reference_distribution(
    logits: Sequence[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    """Temperature, then the k most likely, then the fewest that reach p, renormalised: in plain
    Python floats.
    """
    scaled = [x / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])[: top_k or len(scaled)]
    weights = [math.exp(scaled[i] - scaled[order[0]]) for i in order]
    kept: list[float] = []
    for w in weights:
        if top_p is not None and sum(kept) >= top_p * sum(weights):
            break
        kept.append(w)
    probs = [0.0] * len(logits)
    for i, w in zip(order, kept, strict=False):
        probs[i] = w / sum(kept)
    return probs


@both_ways
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.7, 12, None), (1.3, None, 0.8), (1.5, 15, 0.9)],
)
def test_frequencies_match_the_softmax(
    llama: Decoder, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    (prompt,) = random_prompts([6])
    logits = (llama(torch.tensor([prompt])).logits[0, -1]).tolist()
    count = 6000
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    made = completions(
        llama, [prompt] * count, max_new_tokens=1, batch_rows=count, seed=11, **options
    )
    seen = [0] * VOCAB
    for g in made:
        seen[g.tokens[0]] += 1
    probs = reference_distribution(logits, temperature, top_k, top_p)
    assert all(n == 0 for n, p in zip(seen, probs, strict=True) if p == 0)
    assert fit(seen, probs) > 0.01
    # the test can tell
    assert fit(seen, reference_distribution(logits, temperature * 1.3, top_k, top_p)) < 1e-6


def fit(seen: Sequence[int], probs: Sequence[float]) -> float:
    """The chi-square test's p-value; tokens expected fewer than five times are counted as one."""
    expected = [p * sum(seen) for p in probs]
    big = [i for i, e in enumerate(expected) if e >= 5]
    rest = (sum(seen) - sum(seen[i] for i in big), sum(expected) - sum(expected[i] for i in big))
    pairs = [(seen[i], expected[i]) for i in big] + ([rest] if rest[1] > 1 else [])
    observed, wanted = (list(x) for x in zip(*pairs, strict=True))
    total = sum(wanted)
    return float(chisquare(observed, [w * sum(observed) / total for w in wanted]).pvalue)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-60, 60), min_size=2, max_size=30, unique=True),
    st.floats(0.3, 3),
    st.one_of(st.none(), st.integers(1, 40)),
    st.one_of(st.none(), st.floats(0.05, 1.0)),
    st.floats(0, 1, exclude_max=True),
)
def test_a_draw_inverts_the_distribution(
    whole: list[int], temperature: float, top_k: int | None, top_p: float | None, number: float
) -> None:
    """Whatever the order tokens are laid out in, the token drawn spans the number in the cumulative
    sum.
    """
    logits = [x / 10 for x in whole]
    chooser = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    shortlist = sampling.SHORTLIST_TOKENS
    sampling.SHORTLIST_TOKENS = 4  # so that both ways to a nucleus are met
    try:
        token = int(chooser.choose(torch.tensor([logits]), [set()], [number])[0])
    finally:
        sampling.SHORTLIST_TOKENS = shortlist
    ordered = top_k is not None or top_p not in (None, 1.0)
    slack = 1e-5
    nearby = [reference_distribution(logits, temperature, top_k, p) for p in near(top_p, slack)]
    assert any(
        start - slack <= number <= start + probs[token] + slack
        for probs in nearby
        for start in [
            sum(
                p
                for i, p in enumerate(probs)
                if (logits[i] > logits[token] if ordered else i < token)
            )
        ]
        if probs[token] > 0
    )


def near(top_p: float | None, slack: float) -> list[float | None]:
    """A threshold and its neighbours: rounding may move a token across it."""
    return [None] if top_p is None else [top_p, min(1.0, top_p + slack), top_p - slack]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]]).expand(2, -1)
    assert SamplingParams(temperature=1.0).choose(logits, [(), ()], [0.0, 1 - 2**-53])[
        0
    ].tolist() == [1, 2]


def test_greedy_whatever_the_cut_off(llama: Decoder) -> None:
    prompts = random_prompts([6, 3])
    greedy = tokens_of(llama, prompts, max_new_tokens=12)
    assert tokens_of(llama, prompts, max_new_tokens=12, temperature=1.0, top_k=1) == greedy
    assert tokens_of(llama, prompts, max_new_tokens=12, temperature=1.0, top_p=1e-6) == greedy


# --- mistakes


def test_a_prompt_too_long_is_refused_before_anything_runs(llama: Decoder) -> None:
    completions(llama, random_prompts([90]), max_new_tokens=6)
    with pytest.raises(ModelError, match=r"prompt 1 has 91 tokens .* context is 96; .* at most 5"):
        completions(llama, random_prompts([2, 91]), max_new_tokens=6)
    with pytest.raises(ModelError, match="prompt 0"):
        stream_tokens(llama, [3] * 91, SamplingParams(max_new_tokens=6))
    for length in (96, 97, 200):  # no number of new tokens would do
        with pytest.raises(
            ModelError,
            match=r"context is 96; shorten the prompt to at most 90 tokens or use a model with",
        ) as e:
            completions(llama, random_prompts([length]), max_new_tokens=6)
        assert "max_new_tokens to" not in str(e.value)
    with pytest.raises(
        ModelError, match=r"context is 96; shorten the prompt or set max_new_tokens to at most 95$"
    ):
        completions(llama, [[3]], max_new_tokens=96)


def test_an_empty_prompt_is_refused(llama: Decoder) -> None:
    with pytest.raises(DataError, match="prompt 1 is empty"):
        completions(llama, [[3], []], max_new_tokens=6)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_rows": 0}, "batch_rows"),
        ({"stop": [[]]}, "stop"),
        ({"adapters": "nobody"}, "nobody"),
        ({"adapters": ["nobody"]}, "nobody"),
        ({"adapters": [None, None]}, "2 entries for 1 prompts"),
        ({"adapters": Mix.one("nobody")}, "nobody"),
    ],
)
def test_a_bad_setting_is_named(llama: Decoder, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        completions(llama, [[3, 4]], **{"max_new_tokens": 3, **options})


def test_a_mix_of_one_batch_is_refused(adapted: Decoder) -> None:
    with pytest.raises(ConfigError, match="tokens of one batch"):
        completions(
            adapted, [[3]], max_new_tokens=3, adapters=Mix.routed(["plain"], torch.ones(1, 1))
        )


def test_logits_that_are_not_numbers_stop_it(adapted: Decoder) -> None:
    with torch.no_grad():
        get_bank(adapted)["head"].values.fill_(float("nan"))
    get_bank(adapted)["head"].touch()
    with pytest.raises(NonFiniteError, match=r"prompt 1 \(1 in all\)"):
        completions(adapted, [[3, 4], [5, 6]], max_new_tokens=3, adapters=["plain", "head"])
