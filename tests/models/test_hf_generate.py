"""Generation with transformers' models over the decoder's cache protocol, and the padded frames
underneath.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorry.adapters.attach import attach
from lorry.adapters.mix import AdapterContext, Mix, MixTerm
from lorry.adapters.spec import LoraSpec
from lorry.generation.engine import generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import PackedInput
from lorry.models.hf.frames import PaddedFrame, build_padded_frames
from lorry.models.hf.model import HfModel
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401 - a fixture

SEQUENCES = [
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
    [9, 8, 7],
    [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [20],
]


@pytest.mark.parametrize("name", [*tiny.FOREIGN, "llama", "gpt2", "gpt_neox parallel"])
def test_generation_is_token_for_token_that_of_transformers(name: str) -> None:
    """Rows leave and new prompts take their place (batch_rows=2), so caches are dropped, joined and
    extended.
    """
    inner = tiny.random_model(tiny.FOREIGN[name]) if name in tiny.FOREIGN else tiny.fresh(name)
    model = HfModel(inner)
    limits = {
        "min_new_tokens": 9,
        "max_new_tokens": 9,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    expected = []
    for s in SEQUENCES:
        ids = torch.tensor([s])
        expected.append(
            inner.generate(ids, attention_mask=torch.ones_like(ids), **limits)[0, len(s) :].tolist()
        )
    assert [
        g.tokens
        for g in generate_completions(
            model, SEQUENCES, SamplingParams(max_new_tokens=9), batch_rows=2
        )
    ] == expected
    stops = [tokens[3] for tokens in expected]
    cut = [t[: next(i for i, x in enumerate(t) if x in stops) + 1] for t in expected]
    assert [
        g.tokens
        for g in generate_completions(
            model, SEQUENCES, SamplingParams(max_new_tokens=9, stop_token_ids=stops)
        )
    ] == cut


@torch.no_grad()
@pytest.mark.parametrize("name", [*tiny.FOREIGN, "llama", "gpt2", "gpt_neox parallel"])
def test_cached_hidden_states_are_those_of_whole_sequences(name: str) -> None:
    """Prompts of very different lengths in two groups, a row replaced and a row dropped on the way:
    after every step the newest token's hidden state is the one an uncached pass gives."""
    model = HfModel(
        tiny.random_model(tiny.FOREIGN[name]) if name in tiny.FOREIGN else tiny.fresh(name)
    )
    rows = [list(s) for s in SEQUENCES[:3]]
    cache = model.new_cache(3, 40)

    def prefill(which: list[int]) -> None:
        packed = PackedInput.of([rows[r] for r in which])
        owners = torch.tensor([r for r in which for _ in rows[r]])
        check(
            which,
            model.forward_cached(packed, owners, cache, AdapterContext(), decoding=False)[
                [stop - 1 for _, stop in packed.segments]
            ],
        )

    def decode(tokens: list[int]) -> None:
        packed = PackedInput(
            torch.tensor(tokens), cache.lengths.clone(), [(i, i + 1) for i in range(len(rows))]
        )
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        check(
            list(range(len(rows))),
            model.forward_cached(
                packed, torch.arange(len(rows)), cache, AdapterContext(), decoding=True
            ),
        )

    def check(which: list[int], newest: Tensor) -> None:
        for r, got in zip(which, newest, strict=True):
            expected = model.hidden(PackedInput.of([rows[r]]), AdapterContext()).last
            assert expected is not None
            assert (got - expected[-1]).abs().max() <= 1e-4
            assert cache.lengths[r] == len(rows[r])

    prefill([2, 0])
    prefill([1])
    decode([3, 4, 5])
    decode([6, 7, 8])
    rows[0] = [11, 12]
    prefill([0])
    decode([9, 10, 11])
    cache.keep(torch.tensor([0, 2]))
    rows = [rows[0], rows[2]]
    decode([1, 2])
    decode([3, 4])


def test_generation_with_an_adapter_per_row_is_the_decoders(tmp_path: Path) -> None:
    path = tiny.directory(tiny.trained("llama"), tmp_path)
    pair = (tiny.opened(path), HfModel(AutoModelForCausalLM.from_pretrained(path)))
    for model in pair:
        for seed, name in enumerate(("a", "b")):
            attach(model, LoraSpec(r=4, init_lora_weights=False), name, seed=seed)
    who = ["b", None, "a", "b"]
    native, forced = (
        [
            g.tokens
            for g in generate_completions(
                m, SEQUENCES, SamplingParams(max_new_tokens=12), adapters=who, batch_rows=3
            )
        ]
        for m in pair
    )
    assert native == forced
    assert len({tuple(t) for t in native}) > 1
    assert native != [
        g.tokens
        for g in generate_completions(
            pair[0], SEQUENCES, SamplingParams(max_new_tokens=12), adapters=["a", "b", None, None]
        )
    ]


ENCODERS = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "model_type": "bart",
    "vocab_size": tiny.VOCAB,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
STATES = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
# Positions that start behind 0 and leave out the padding token's (RoBERTa and its kin), that are
# counted in the cache (BART), and models without such a cache
ODD = {
    **{
        kind: {**ENCODERS, "model_type": kind}
        for kind in ("roberta", "xlm-roberta", "camembert", "data2vec-text", "bert")
    },
    "bart": BART,
    "mamba": {**STATES, "model_type": "mamba", "state_size": 8},
    "rwkv": {**STATES, "model_type": "rwkv", "attention_hidden_size": 32},
}


def greedy(inner: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation by transformers' forward alone: no cache, no padding, no positions
    of ours.
    """
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(
                int(inner(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
            )
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ODD)
def test_what_is_generated_follows_from_the_forward_that_trains(kind: str, tmp_path: Path) -> None:
    """Rows of many lengths, on the left of which others' prompts leave padding; what is opened has
    been through the proofs.
    """
    inner = tiny.random_model(ODD[kind])
    model = tiny.opened(tiny.directory(inner, tmp_path / "m"))
    assert isinstance(model, HfModel)
    expected = [greedy(inner, s, 6) for s in SEQUENCES]
    assert [
        g.tokens
        for g in generate_completions(
            model, SEQUENCES, SamplingParams(max_new_tokens=6), batch_rows=2
        )
    ] == expected
    assert [
        g.tokens for g in generate_completions(model, SEQUENCES, SamplingParams(max_new_tokens=6))
    ] == expected


def test_every_row_has_its_adapter_without_a_cache_too() -> None:
    model = HfModel(tiny.random_model(ODD["mamba"]))
    for name, seed in (("a", 1), ("b", 2)):
        attach(
            model,
            LoraSpec(r=2, init_lora_weights=False, target_modules=("in_proj", "out_proj")),
            name,
            seed=seed,
        )
    owners = ["b", None, "a", "b"]
    alone = [
        generate_completions(model, [s], SamplingParams(max_new_tokens=6), adapters=[o])[0].tokens
        for s, o in zip(SEQUENCES, owners, strict=True)
    ]
    assert [
        g.tokens
        for g in generate_completions(
            model, SEQUENCES, SamplingParams(max_new_tokens=6), adapters=owners, batch_rows=3
        )
    ] == alone
    assert alone != [
        g.tokens
        for g in generate_completions(
            model, SEQUENCES, SamplingParams(max_new_tokens=6), adapters=[None] * 4
        )
    ]


# --- frames


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.data())
def test_frames_lose_and_leak_nothing(lengths: list[int], data: st.DataObject) -> None:
    """Every token stands in exactly one frame; a translated mix weighs each token as the packed mix
    does.
    """
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    segments, total = list(pairwise(edges)), edges[-1]
    bound = st.sampled_from(edges) | st.integers(0, total)
    start, stop = sorted((data.draw(bound), data.draw(bound)))
    per_token = torch.arange(1.0, total + 1)
    mix = Mix(
        (
            MixTerm("a", slice(start, stop), 2.0),
            MixTerm("a", None, per_token),
            MixTerm("a", slice(0, total), 0.5),
        )
    )
    expected = (
        0.5 + per_token + 2.0 * ((torch.arange(total) >= start) & (torch.arange(total) < stop))
    )
    seen = torch.zeros(total)
    made = build_padded_frames(segments, torch.device("cpu"))
    assert all(frame.length <= 1.25 * min(b - a for a, b in frame.spans) for frame in made)
    if data.draw(st.booleans()):  # as a cache makes them: any order, padded on the left
        made = [PaddedFrame(data.draw(st.permutations(segments)), torch.device("cpu"), left=True)]
    for frame in made:
        weight = torch.zeros(len(frame.spans) * frame.length)
        for term in frame.adapter_context(AdapterContext(mix)).mix.terms:
            weight[slice(None) if term.rows is None else term.rows] += term.gate
        assert torch.equal(frame.pad(torch.arange(total)).flatten()[frame.positions], frame.rows)
        assert frame.mask().sum() == len(frame.rows)
        assert torch.equal(weight[frame.positions], expected[frame.rows])
        seen[frame.rows] += 1
    assert torch.equal(seen, torch.ones(total))
