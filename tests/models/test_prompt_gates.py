"""Gates of a whole sequence, made of its prompt: in a packed pass, in scores, in generation with a
cache, and through transformers' own code. Float32; the truth is transformers' hidden states and
mixes of plain constants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorry.adapters.attach import attach, get_bank
from lorry.adapters.mix import AdapterContext, Mix
from lorry.adapters.router import RoutingRule, TokenRouter
from lorry.adapters.routing.sequence import PromptRule, PrototypeRouter, attach_sequence_router
from lorry.adapters.spec import LoraSpec
from lorry.data.batch import TokenizedExample, collate
from lorry.errors import ContractError, DataError
from lorry.evaluate.benchmarks.likelihood import TokenPair, score_pairs
from lorry.generation.engine import GenerationEngine, generate_completions
from lorry.generation.sampling import SamplingParams
from lorry.models.causal_lm import (
    CausalLM,
    HiddenStates,
    PackedInput,
    prompt_gates,
    with_prompt_gates,
)
from lorry.models.hf.model import HfModel
from lorry.models.scoring.score import TokenScore, evaluate_wants, log_prob
from tests.support import tiny

PROMPTS = [[5, 9, 3], [8, 1, 4, 6, 13], [2, 2, 7], [12, 10, 9, 17]]
ANSWER = [11, 3, 20]
NAMES = ("a", "b", "c")
RULES = [PromptRule(), PromptRule(0, "last", 2, temperature=0.5), PromptRule(1, "mean", 3)]


def routed(kind: str, rule: PromptRule, tmp_path: Path) -> tuple[CausalLM, Any, PrototypeRouter]:
    """A tiny Llama by Lorry's decoder or through transformers, three strong experts, and prototypes of
    random states."""
    source = tiny.fresh("llama", num_hidden_layers=2).float()
    model = (
        HfModel(tiny.fresh("llama", num_hidden_layers=2))
        if kind == "hf"
        else tiny.decoder(source, tmp_path)
    )
    for rank, name in ((2, "a"), (4, "b"), (3, "c")):
        attach(model, LoraSpec(r=rank, init_lora_weights=False), name, seed=rank)
    means = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    router = PrototypeRouter(NAMES, rule, means)
    attach_sequence_router(model, router)
    return model, source, router


def expected_gates(source: Any, router: PrototypeRouter, prompt: list[int]) -> dict[str, float]:
    """By transformers' hidden states (in their list 0 is the embedding, the last is normed) and the
    formula written out."""
    with torch.no_grad():
        states = source(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    rule = router.rule
    if rule.layer is not None and rule.layer == len(states) - 2:
        # transformers gives the last layer's output after the norm; undo by a hook's value
        taken: list[Tensor] = []
        hook = source.model.layers[rule.layer].register_forward_hook(
            lambda m, x, y: taken.append(y[0] if isinstance(y, tuple) else y)
        )
        with torch.no_grad():
            source(torch.tensor([prompt]))
        hook.remove()
        state = taken[0].view(-1, 32)
    else:
        state = states[-1 if rule.layer is None else rule.layer + 1][0]
    h = (state[-1] if rule.pooling == "last" else state.mean(0)).double()
    means = router.means.double()
    centre = means.mean(0)
    h, own = h - centre, means - centre
    p = (own @ h / (own.norm(dim=1) * h.norm()) / rule.temperature).softmax(0)
    kept, chosen = p.topk(rule.top_k)
    kept = kept / kept.sum()
    return {NAMES[int(k)]: float(g) for k, g in zip(chosen, kept, strict=True)}


def last_hidden(model: CausalLM, tokens: list[int], gates: dict[str, float]) -> Tensor:
    call = AdapterContext(Mix.constants(gates))
    with torch.no_grad():
        hidden = model.hidden(PackedInput.of([tokens]), call).last
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("kind", ["decoder", "hf"])
@pytest.mark.parametrize("rule", RULES, ids=["top1", "last-top2", "all"])
def test_gates_are_those_of_each_prompt(kind: str, rule: PromptRule, tmp_path: Path) -> None:
    """Four sequences in one pass, two of them without a router: each as alone under constants."""
    model, source, router = routed(kind, rule, tmp_path)
    rows = [[*prompt, *ANSWER] for prompt in PROMPTS]
    packed = PackedInput.of(rows)
    mixes = [router.mix(), router.mix(), Mix.none(), Mix.one("b")]
    starts = [0, *(stop for _, stop in packed.segments)]
    call = with_prompt_gates(
        model, packed, AdapterContext(Mix.packed(mixes, starts)), [len(p) for p in PROMPTS]
    )
    with torch.no_grad():
        together = model.hidden(packed, call).last
    assert together is not None
    wanted = [expected_gates(source, router, p) for p in PROMPTS[:2]] + [{}, {"b": 1.0}]
    assert rule.top_k == len(wanted[0])
    for row, gates, (start, stop) in zip(rows, wanted, packed.segments, strict=True):
        alone = last_hidden(model, row, gates)
        torch.testing.assert_close(together[start:stop], alone, rtol=2e-5, atol=2e-5)


def example(prompt: list[int], answer: list[int]) -> TokenizedExample:
    return TokenizedExample([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))


def test_a_score_sees_prompts_alone(tmp_path: Path) -> None:
    """Another answer, and another neighbour, leave a row's gates; plain text has nothing to route by."""
    model, source, router = routed("decoder", RULES[1], tmp_path)
    for neighbour in (PROMPTS[1], PROMPTS[3]):
        batch = collate([example(PROMPTS[0], ANSWER), example(neighbour, ANSWER[::-1])])
        call = AdapterContext(router.mix())
        with torch.no_grad():
            got = evaluate_wants(model, batch, {"s": TokenScore(log_prob)}, call)["s"]
        prompt = PROMPTS[0]
        hidden = last_hidden(model, [*prompt, *ANSWER], expected_gates(source, router, prompt))
        logs = model.logits(hidden, AdapterContext()).log_softmax(-1)
        for at, token in enumerate(ANSWER, start=len(prompt)):
            assert float(got[at]) == pytest.approx(float(logs[at - 1, token]), abs=2e-5)
    text = collate([TokenizedExample([5, 9, 3, 7], [0.0, 1.0, 1.0, 1.0])])
    with pytest.raises(DataError, match="no prompt before its first supervised token"):
        evaluate_wants(model, text, {"s": TokenScore(log_prob)}, AdapterContext(router.mix()))


@pytest.mark.parametrize("kind", ["decoder", "hf"])
def test_generation_keeps_the_gates_of_the_prompt(kind: str, tmp_path: Path) -> None:
    """Greedy answers are the argmax of whole forwards under the prompt's gates: in batches of two
    that rows leave and enter, beside other mixes, and alone."""
    model, source, router = routed(kind, RULES[1], tmp_path)
    params = [SamplingParams(max_new_tokens=n) for n in (3, 6, 4, 5)]
    asked: list[Mix | str | None] = [router.mix(), "b", router.mix(), router.mix()]
    answers = generate_completions(model, PROMPTS, params, adapters=asked, batch_rows=2)
    for prompt, own, answer, one in zip(PROMPTS, asked, answers, params, strict=True):
        gates = {"b": 1.0} if own == "b" else expected_gates(source, router, prompt)
        tokens = list(prompt)
        assert len(answer.tokens) == one.max_new_tokens
        for token in answer.tokens:
            logits = model.logits(last_hidden(model, tokens, gates)[-1:], AdapterContext())
            assert int(logits.argmax()) == token
            tokens.append(token)
        (alone,) = generate_completions(model, [prompt], one, adapters=[own])
        assert alone.tokens == answer.tokens


def test_a_request_that_comes_later_gets_its_own_gates(tmp_path: Path) -> None:
    model, source, router = routed("decoder", RULES[0], tmp_path)
    engine = GenerationEngine(model)
    engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=4), adapter=router.mix())
    engine.step()
    engine.add_request(PROMPTS[1], SamplingParams(max_new_tokens=4), adapter=router.mix())
    engine.step()
    for number, prompt in enumerate(PROMPTS[:2]):
        assert engine.requests[number].mix == Mix.constants(expected_gates(source, router, prompt))


def test_likelihoods_of_equal_tokens_with_other_contexts(tmp_path: Path) -> None:
    """Two pairs whose tokens are the same and whose contexts end elsewhere have other gates."""
    model, source, router = routed("decoder", RULES[1], tmp_path)
    tokens = [*PROMPTS[1], 7]
    pairs = [TokenPair(tokens[:cut], tokens[cut:]) for cut in (2, 4, 5)]
    found = dict(score_pairs(model, pairs, mix=router.mix(), batch_tokens=64, limit=32))
    for number, pair in enumerate(pairs):
        context = list(pair.context)
        hidden = last_hidden(model, tokens, expected_gates(source, router, context))
        logs = model.logits(hidden, AdapterContext()).log_softmax(-1)
        at = range(len(context), len(tokens))
        total = sum(float(logs[i - 1, tokens[i]]) for i in at)
        assert found[number].total == pytest.approx(total, abs=5e-5)


def test_a_text_without_a_context_has_no_likelihood_under_a_router(tmp_path: Path) -> None:
    """The token that stands for an empty context chose the expert in silence, as in a perplexity of
    plain text; an expert by name has one."""
    model, _, router = routed("decoder", RULES[1], tmp_path)
    pairs = [TokenPair([3, 5], [7]), TokenPair([1], [5, 7, 2])]
    with pytest.raises(DataError, match=r"continuation 1 has no context \(1 such\)"):
        list(score_pairs(model, pairs, mix=router.mix(), batch_tokens=64, limit=32))
    name = router.adapters[0]
    found = dict(score_pairs(model, pairs, mix=Mix.one(name), batch_tokens=64, limit=32))
    logs = model.logits(last_hidden(model, [1, 5, 7, 2], {name: 1.0}), AdapterContext())
    total = sum(float(logs.log_softmax(-1)[at, token]) for at, token in enumerate([5, 7, 2]))
    assert found[1].total == pytest.approx(total, abs=5e-5)


def test_a_plain_forward_takes_what_it_is_given_for_the_prompt(tmp_path: Path) -> None:
    model, source, router = routed("decoder", RULES[1], tmp_path)
    get_bank(model).activate(router.mix())
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1]])).logits[0]
    hidden = last_hidden(model, PROMPTS[1], expected_gates(source, router, PROMPTS[1]))
    torch.testing.assert_close(logits, model.logits(hidden, AdapterContext()), rtol=2e-5, atol=2e-5)


def test_a_term_without_its_gate_is_never_run(tmp_path: Path) -> None:
    """Whoever forgets the prompt is told; and gates of a sequence are for the whole of it."""
    model, _, router = routed("decoder", RULES[0], tmp_path)
    with pytest.raises(ContractError, match="with_prompt_gates"):
        model.hidden(PackedInput.of(PROMPTS), AdapterContext(router.mix()))
    half = Mix.packed([router.mix(), Mix.none()], [0, 2, 5])
    with pytest.raises(ContractError, match="part of a sequence"):
        with_prompt_gates(model, PackedInput.of([PROMPTS[1]]), AdapterContext(half), [3])
    of_layers = TokenRouter(NAMES, RoutingRule(), layers=2, width=32)
    with pytest.raises(ContractError, match="one router"):
        Mix.packed([router.mix(), of_layers.mix()], [0, 3, 6])


class TokenStates(nn.Module):
    """Stands for a model whose hidden state of a token is [its number, 1]."""

    device = torch.device("cpu")

    def hidden(self, packed: PackedInput, call: AdapterContext, **asked: object) -> HiddenStates:
        assert call.mix == Mix.none()
        return HiddenStates(torch.stack([packed.tokens, torch.ones_like(packed.tokens)], 1).float())


class MeanToken:
    """Stands for a router: expert a gets the mean of the prompt's tokens, b 0, c its negative."""

    adapters, layer, pooling, state_mix = NAMES, None, "mean", Mix.none()

    def gates(self, states: Tensor) -> Tensor:
        return torch.stack([states[:, 0], torch.zeros(len(states)), -states[:, 0]], 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_token_has_the_gates_of_its_own_prompt(data: st.DataObject) -> None:
    """Whatever is packed beside it, in any order: summed over terms, token by token."""
    router = MeanToken()
    mixes = {"router": Mix.by_prompt(router), "base": Mix.none(), "b": Mix.one("b")}
    kinds = data.draw(st.lists(st.sampled_from(sorted(mixes)), min_size=1, max_size=6))
    rows = [data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)) for _ in kinds]
    lengths = [data.draw(st.integers(1, len(row))) for row in rows]
    packed = PackedInput.of(rows)
    starts = [0, *(stop for _, stop in packed.segments)]
    call = AdapterContext(Mix.packed([mixes[kind] for kind in kinds], starts))
    found = with_prompt_gates(TokenStates(), packed, call, lengths)  # type: ignore[arg-type]
    assert found.mix.sequence_router is None
    total = torch.zeros(len(packed.tokens), 3)
    for term in found.mix.terms:
        assert term.route is None
        total[slice(None) if term.rows is None else term.rows, NAMES.index(term.adapter)] += (
            term.gate
        )
    for kind, row, length, (start, stop) in zip(kinds, rows, lengths, packed.segments, strict=True):
        mean = sum(row[:length]) / length
        own = {"router": [mean, 0.0, -mean], "base": [0.0] * 3, "b": [0.0, 1.0, 0.0]}[kind]
        torch.testing.assert_close(total[start:stop], torch.tensor([own] * (stop - start)))


def test_a_prompt_that_several_share_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of a question have one prompt: its states were made for each of them."""
    asked = list[list[tuple[int, ...]]]()

    def states(model: Any, prompts: Any, *more: Any) -> Tensor:
        asked.append([tuple(prompt) for prompt in prompts])
        return torch.tensor([[sum(prompt) / len(prompt)] for prompt in prompts])

    monkeypatch.setattr("lorry.models.causal_lm.prompt_states", states)
    gates = prompt_gates(TokenStates(), [[1, 2], [3], [1, 2], [1]], MeanToken())  # type: ignore[arg-type]
    assert asked == [[(1, 2), (3,), (1,)]]
    assert gates[:, 0].tolist() == [1.5, 3.0, 1.5, 1.0]
